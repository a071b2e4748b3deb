"""Models shared among ranks compute what one rank does: every family, in layouts of all kinds; and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quadriga.engine.engine import Engine
from quadriga.engine.request import Embed, Embedding, Request, SamplingParams, TokenEvent
from quadriga.errors import ConfigError, HardwareError, RequestError
from quadriga.io import rank_parameters
from quadriga.io.convert import convert
from quadriga.io.open import Checkpoint, open_checkpoint
from quadriga.kernels.cpu.packing import Packed
from quadriga.kernels.pass_batch import PassBatch
from quadriga.model.config import ModelConfig
from quadriga.model.rank_mesh import RankMesh, aligned_part, even_part
from quadriga.model.rank_share import RankShare, Selection
from quadriga.model.weight_map import parameter_shapes
from quadriga.nn.transformer import random_parameters
from quadriga.runners.base import Runner
from quadriga.runners.compiled import CompiledModel
from quadriga.runners.make import make
from quadriga.runners.ranks import Wanted, pack_pass, unpack_pass
from tests.batches import batch
from tests.checkpoint.models import TINY, write_hf
from tests.runners.rank_threads import RankThreads

LAYERS_ONLY = {name for name, config in TINY.items() if RankMesh(tp=2).problem(config) is not None}
"""Families that are shared out by layers and not otherwise."""

MESHES = {"tp": RankMesh(tp=2), "ep": RankMesh(ep=2), "pp": RankMesh(pp=3), "tp pp": RankMesh(tp=2, pp=2)}


def parameters_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    parameters = random_parameters(config, seed=5, std=0.25)
    for name, values in parameters.items():
        if name.endswith("norm.weight"):
            values.uniform_(0.5, 1.5)
        elif values.ndim == 1 or ".b_" in name:
            values.normal_(std=0.3)
        if name.endswith("delta.rate"):
            values.abs_()
    return parameters


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's checkpoint in float32."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("ranks") / name
            write_hf(made[name], TINY[name], parameters=parameters_of(TINY[name]))
        return made[name]

    return folder


def alone(path: Path, **how: Any) -> Runner:
    return make(open_checkpoint(path), **{"format": "float32", "kv_format": "float32", "threads": 1, **how})


@contextmanager
def ranked(path: Path, mesh: RankMesh, **how: Any) -> Iterator[RankThreads]:
    opened: list[Checkpoint] = []

    def open_one(_: int) -> Checkpoint:
        opened.append(open_checkpoint(path))
        return opened[-1]

    with RankThreads(open_one, mesh, **{"format": "float32", "kv_format": "float32", **how}) as ranks:
        yield ranks
    for one in opened:
        one.close()


def sequence(seed: int, n: int) -> list[int]:
    return torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def table(runner: Runner, one: PassBatch) -> PassBatch:
    """The pass with tables for every group of layers."""
    rows = [np.atleast_2d(one.tables)[0] + 10 * group for group in range(runner.cache.n_groups)]
    fields = {} if runner.config.is_recurrent else {"before": None, "after": None}
    return replace(one, tables=np.array(rows, dtype=np.int32), **fields)


def passes(runner: Runner) -> list[Any]:
    """A prompt in two pieces beside another's decoding: logits, hidden states and routing of each pass."""
    a, b = sequence(1, 37), sequence(2, 21)
    batches = [
        batch([(a[:19], 0, [0, 1, 2])]),
        batch([(b[:20], 0, [4, 5]), (a[19:36], 19, [0, 1, 2])]),
        batch([(a[36:], 36, [0, 1, 2]), (b[20:], 20, [4, 5])]),
    ]
    return [runner.forward(table(runner, one), hidden=True, routing=True) for one in batches]


# What they compute ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_every_family_computes_what_one_rank_does(name: str, folder_of: Callable[[str], Path]) -> None:
    expected = passes(alone(folder_of(name)))
    meshes = [m for m in MESHES.values() if RankMesh.problem(m, TINY[name]) is None]
    assert len(meshes) == (1 if name in LAYERS_ONLY else 4 if TINY[name].is_moe else 3)
    for mesh in meshes:
        with ranked(folder_of(name), mesh) as ranks:
            got = passes(ranks.runner)
            load = ranks.runner.expert_load()
        for one, other in zip(expected, got, strict=True):
            scale = np.abs(one.logits).max()
            assert np.abs(one.logits - other.logits).max() < 1e-5 * scale, str(mesh)
            assert np.abs(one.hidden - other.hidden).max() < 1e-5 * np.abs(one.hidden).max()
            assert len(one.routing) == len(other.routing) == len(TINY[name].moe_layers)
            for mine, theirs in zip(one.routing, other.routing, strict=True):
                assert np.array_equal(mine.expert_ids, theirs.expert_ids)
                np.testing.assert_allclose(mine.expert_weights, theirs.expert_weights, rtol=2e-4)
                np.testing.assert_allclose(mine.probs, theirs.probs, rtol=2e-4, atol=1e-6)
        for layer, counts in enumerate(load):
            ids = np.concatenate([one.routing[layer].expert_ids.ravel() for one in got])
            assert np.array_equal(counts, np.bincount(ids, minlength=len(counts)))


def test_most_families_share_heads_and_experts() -> None:
    assert {"olmoe", "olmo2"} <= LAYERS_ONLY and 3 * len(LAYERS_ONLY) < len(TINY)


def answers(runner: Runner, prompts: list[list[int]], **how: Any) -> list[list[Any]]:
    """Greedy and drawn answers of one engine, all together: (token, log-probability) of each."""
    engine = Engine(runner, **how)
    ids = [
        engine.submit(Request(prompt=tuple(p), params=SamplingParams(max_new_tokens=9, temperature=t, seed=3)))
        for p in prompts
        for t in (0.0, 0.9)
    ]
    made: dict[int, list[Any]] = {i: [] for i in ids}
    while engine.has_work:
        for request_id, event in engine.step():
            assert isinstance(event, TokenEvent)
            made[request_id].append((event.token_id, event.logprob))
    return list(made.values())


@pytest.mark.parametrize("mesh", [RankMesh(tp=2), RankMesh(ep=2, pp=2)], ids=str)
@pytest.mark.parametrize("name", ["dbrx", "gpt_oss", "qwen3next", "deepseek_v3"])
def test_answers_are_one_ranks_and_do_not_depend_on_who_else_asks(
    name: str, mesh: RankMesh, folder_of: Callable[[str], Path]
) -> None:
    prompts = [sequence(i, n) for i, n in enumerate((5, 23, 1, 12))]
    expected = answers(alone(folder_of(name)), prompts)
    with ranked(folder_of(name), mesh) as ranks:
        crowd = answers(ranks.runner, prompts, max_batch_tokens=16, max_sequences=16)
        single = [one for prompt in prompts for one in answers(ranks.runner, [prompt])]
    assert [[token for token, _ in one] for one in crowd] == [[token for token, _ in one] for one in expected]
    assert crowd == single  # to the bit, in another mesh's order of adding


def test_a_text_becomes_the_same_vector(folder_of: Callable[[str], Path]) -> None:
    def vector(runner: Runner) -> Any:
        engine = Engine(runner)
        engine.submit(Embed(prompt=tuple(sequence(4, 33))))
        events = [event for _ in range(9) if engine.has_work for _, event in engine.step()]
        assert isinstance(events[0], Embedding)
        return events[0].vector

    with ranked(folder_of("dbrx"), RankMesh(tp=2, pp=3)) as ranks:
        got = vector(ranks.runner)
    np.testing.assert_allclose(got, vector(alone(folder_of("dbrx"))), rtol=1e-4, atol=1e-6)


def test_blocks_are_copied_on_every_rank(folder_of: Callable[[str], Path]) -> None:
    a = sequence(1, 30)
    with ranked(folder_of("dbrx"), RankMesh(ep=2, pp=2)) as ranks:
        runner = ranks.runner
        first = table(runner, batch([(a[:16], 0, [0, 1])]))
        rest = runner.forward(first), runner.forward(table(runner, batch([(a[16:], 16, [0, 1])])))
        runner.forward(table(runner, batch([(sequence(9, 16), 0, [3])])))
        runner.copy_blocks([(0, 3)])
        again = runner.forward(table(runner, batch([(a[16:], 16, [3, 4])])))
    assert np.array_equal(again.logits, rest[1].logits)


def numbers(parameter: Any) -> Any:
    """A parameter's numbers; of experts elsewhere NaN."""
    if isinstance(parameter, np.ndarray):
        return parameter
    if isinstance(parameter, Packed):
        empty = np.full((parameter.rows, parameter.cols), np.nan, np.float32)
        return parameter.unpack() if parameter.data.size else empty
    return np.stack([numbers(one) for one in parameter])


def selected(values: Any, selection: Selection) -> Any:
    """What is wanted of a whole parameter, taken without the code that reads parts."""
    if selection.rows is not None:
        rows = np.concatenate([np.arange(a, b) for a, b in selection.rows])
        values = values[rows] if values.ndim < 3 else values[:, rows]
    if selection.cols is not None:
        values = values[..., np.concatenate([np.arange(a, b) for a, b in selection.cols])]
    return values if selection.experts is None else values[slice(*selection.experts)]


@pytest.mark.parametrize(
    ("form", "mesh"), [*itertools.product(["q8", "q4", "bfloat16"], [RankMesh(ep=2), RankMesh(tp=2, pp=2)])]
)
def test_packed_directories_give_each_rank_its_own_bytes(form: str, mesh: RankMesh, tmp_path: Path) -> None:
    config = TINY["qwen3moe"].with_mixer(head_dim=64).with_ffn(d_ff=256)
    write_hf(tmp_path / "hf", config, parameters=parameters_of(config))
    convert(tmp_path / "hf", tmp_path / "packed", format=form)
    how = {"format": "keep", "activations": "int16"}
    whole = alone(tmp_path / "packed", **how)
    assert isinstance(whole, CompiledModel)
    with ranked(tmp_path / "packed", mesh, **how) as ranks:
        got = passes(ranks.runner)
        parts = [ranks.runner.own, *ranks.others]
        held = [part.local.weights()[1] for part in parts]
        total = ranks.runner.weights()
        for part in parts:
            for own, (source, selection) in part.share.wanted.items():
                mine, theirs = numbers(part.local.parameters[own]), numbers(whole.parameters[source])
                mine = mine[slice(*(selection.experts or (None, None)))]
                assert np.array_equal(mine, selected(theirs, selection)), own
    # An activation that is a last bit off may be rounded to another step of 15 bits, or of bfloat16's 8.
    step = 2**-7 if form == "bfloat16" else 2**-10
    for one, other in zip(passes(whole), got, strict=True):
        assert np.abs(one.logits - other.logits).max() < step * np.abs(one.logits).max()
    assert total == (form, sum(held)) and max(held) < 0.8 * whole.weights()[1]


# Who has what --------------------------------------------------------------------------------------------------------


def shares(config: ModelConfig, mesh: RankMesh) -> list[RankShare]:
    return [RankShare(config, mesh.place(rank)) for rank in range(mesh.size)]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("mesh", MESHES.values(), ids=str)
def test_every_number_is_somebodys_and_parts_fit_their_model(name: str, mesh: RankMesh) -> None:
    config = TINY[name]
    if mesh.problem(config) is not None:
        return
    shapes, filled = parameter_shapes(config), {n: np.zeros(s, np.int32) for n, s in parameter_shapes(config).items()}
    for share in shares(config, mesh):
        own = parameter_shapes(share.config)
        for local, (source, selection) in share.wanted.items():
            grid = np.zeros(shapes[source], np.int32)
            first, last = selection.experts or (0, shapes[source][0])
            index = [np.r_[tuple(slice(a, b) for a, b in runs)] if runs else np.arange(n) for runs, n in zip(
                (selection.rows, selection.cols)[: grid.ndim], shapes[source][-2:], strict=False
            )]  # fmt: skip
            view = grid[first:last] if grid.ndim == 3 else grid[None] if grid.ndim == 2 else grid[None, :, None]
            view[np.ix_(np.arange(len(view)), index[0], index[1] if grid.ndim > 1 else [0])] += 1
            taken = grid.sum() * (1 if grid.ndim < 3 else shapes[source][0] / (last - first))
            rows = share.head_rows if local.startswith("lm_head") else None
            expected = prod(own[local]) if rows is None else (rows[1] - rows[0]) * (own[local][1:] or (1,))[0]
            assert taken == expected, local
            filled[source] += grid * (not selection.zero)
    everywhere = (
        "norm",
        "router",
        "wq_a",
        "wkv_a",
        "bias",
        "shared_gate",
        "embed",
        "b_",
        "fuse",
        "correction",
        "scale",
    )
    for source, grid in filled.items():
        assert grid.min() >= 1, source
        if not any(word in source for word in everywhere):
            assert grid.max() == 1, source


def test_the_parts_of_real_shapes_are_even_and_whole_blocks() -> None:
    assert [aligned_part(10752, 3, i) for i in range(3)] == [(0, 3584), (3584, 7168), (7168, 10752)]
    assert [aligned_part(8, 3, i, 768) for i in range(3)] == [(0, 2), (2, 5), (5, 8)]
    assert [even_part(16, 3, i) for i in range(3)] == [(0, 5), (5, 10), (10, 16)]
    assert [aligned_part(100352, 2, i, most=16) for i in range(2)] == [(0, 50176), (50176, 100352)]
    assert [aligned_part(16, 3, i, 64) for i in range(3)] == [(0, 4), (4, 10), (10, 16)]  # of 256 it were 4, 4 and 8
    for n, parts in itertools.product((1, 5, 97, 257, 768), (1, 2, 3, 7)):
        cuts = [aligned_part(n, parts, i) for i in range(parts)]
        assert cuts[0][0] == 0 and cuts[-1][1] == n and all(a[1] == b[0] for a, b in itertools.pairwise(cuts))
        assert n < parts or min(b - a for a, b in cuts) > 0


def test_a_pass_survives_its_message() -> None:
    one = batch([([5, 6, 7], 0, [3, 4]), ([9], 40, [0, 1, 2])])
    one = replace(one, tables=np.array([[3, 4, 0, 1, 2], [8, -1, 9, -1, 5]], dtype=np.int32))
    for given in (one, replace(one, before=None, after=None), replace(one, rows=np.zeros(0, np.int32))):
        got, wanted = unpack_pass(pack_pass(given, Wanted(hidden=True)))
        assert wanted == Wanted(hidden=True, routing=False)
        for field in ("tokens", "positions", "starts", "tables", "table_starts", "rows", "before", "after"):
            mine, theirs = getattr(given, field), getattr(got, field)
            assert (mine is None and theirs is None) or (np.array_equal(mine, theirs) and theirs.dtype == np.int32)


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "tp", "tp=0", "tp=2,tp=2", "dp=2", "tp=2;ep=2", "tp=-1", "tp=2.0", "tp=1", "tp=99,ep=99", "tp=10000"]
)
def test_what_is_no_mesh(text: str) -> None:
    with pytest.raises(ConfigError, match="parallel must"):
        RankMesh.parse(text)


def test_meshes_are_read_in_any_order() -> None:
    assert RankMesh.parse("pp=3, tp=2") == RankMesh(tp=2, pp=3) == RankMesh.parse(str(RankMesh(tp=2, pp=3)))
    place = RankMesh(tp=2, ep=3, pp=4).place(17)
    assert (place.stage, place.index, place.expert_part, place.tensor_part) == (2, 5, 2, 1)


@pytest.mark.parametrize(
    ("name", "mesh", "says"),
    [
        ("dbrx", "tp=3", "2, the number of key/value heads"),
        ("dbrx", "pp=4", "at most the model's 3 layers"),
        ("llama2", "ep=2", "has none. Give tp=2"),
        ("olmo2", "tp=2", "norm of all heads together"),
        ("deepseek_v3", "tp=7", "6, the number of heads"),
        ("qwen3next", "ep=3", "2, the number of"),
    ],
)
def test_what_a_model_cannot_be_shared_among(name: str, mesh: str, says: str) -> None:
    problem = RankMesh.parse(mesh).problem(TINY[name])
    assert problem is not None and says in problem


def test_cuts_inside_of_stored_blocks_are_refused(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", TINY["dbrx"], parameters=parameters_of(TINY["dbrx"]))
    convert(tmp_path / "hf", tmp_path / "packed", format="q8")
    share = shares(TINY["dbrx"], RankMesh(tp=2))[1]
    with pytest.raises(ConfigError, match="inside of q8's blocks"):
        rank_parameters.load_part(open_checkpoint(tmp_path / "packed"), share)


def test_a_part_larger_than_memory_is_refused(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    share = shares(TINY["dbrx"], RankMesh(ep=2))[1]
    checkpoint = open_checkpoint(folder_of("dbrx"))
    held = sum(
        p.nbytes if isinstance(p, np.ndarray) else sum(one.data.nbytes for one in (p if isinstance(p, list) else [p]))
        for p in rank_parameters.load_part(checkpoint, share, "float32").values()
    )
    monkeypatch.setattr(rank_parameters.runtime, "memory_bytes", lambda: (2 * held, held))
    with pytest.raises(HardwareError, match=r"rank 1's part .* Take more ranks"):
        rank_parameters.load_part(checkpoint, share, "float32")


def test_adapters_and_prefixes_on_disk_are_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    with ranked(folder_of("dbrx"), RankMesh(pp=2)) as ranks:
        assert ranks.runner.adapter_names == []
        with pytest.raises(RequestError, match="several ranks"):
            ranks.runner.adapters()
        with pytest.raises(ConfigError, match="several ranks"):
            Engine(ranks.runner).keep_prefixes(tmp_path, 1 << 20)
