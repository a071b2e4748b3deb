"""The runner on the kernels for GPUs, interpreted: plain torch's logits for every family, and one token's bits anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from quadriga.errors import ConfigError, RequestError
from quadriga.kernels.pass_batch import PassBatch
from quadriga.model.cache_layout import cache_layout
from quadriga.model.config import ModelConfig, QKNormSpec
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.runners.cuda.graphs import DecodeGraphs
from quadriga.runners.cuda.inputs import slots_and_tables, tiles_of
from quadriga.runners.cuda.missing import require_kernels
from quadriga.runners.cuda.model import Computed
from quadriga.runners.cuda.runner import CudaRunner
from quadriga.runners.cuda.weights import DeviceWeights
from quadriga.runners.torch import TorchRunner
from tests.batches import batch, logits_of, passed
from tests.checkpoint.models import TINY
from tests.mixed import MIXED
from tests.mixed import PIECES as MIXTURES
from tests.runners.test_attention_pieces import PIECES
from tests.runners.test_compiled import sequence

N_BLOCKS = 12
WITHOUT_KERNELS = [name for name in TINY if name.startswith(("gemma2", "gemma4", "granitehybrid", "nemotron_h"))]
"""Families that are refused."""
FAMILIES = {n: c for n, c in TINY.items() if n not in WITHOUT_KERNELS} | {"mixed": MIXED, "mixtures": MIXTURES} | PIECES


def parameters(config: ModelConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    made = random_parameters(config, seed=3, std=0.25)
    for name, values in made.items():
        if name.endswith("norm.weight"):
            values.uniform_(0.5, 1.5)
        if name.endswith("fuse.weight"):
            values.normal_()
    return made


def pair(config: ModelConfig, **options: object) -> tuple[CudaRunner, TorchRunner]:
    values = parameters(config)
    model, weights = Transformer.from_parameters(config, values), DeviceWeights(values)
    cache = cache_layout(config)
    kernels = CudaRunner(config, weights, N_BLOCKS * cache.n_groups, cache, n_slots=N_BLOCKS, **options)  # type: ignore[arg-type]
    return kernels, TorchRunner(model, N_BLOCKS * cache.n_groups, cache, n_slots=N_BLOCKS)


def grouped(one: PassBatch, n_groups: int) -> PassBatch:
    """The same pass where every group of layers has blocks of its own."""
    tables = np.stack([one.tables + g * N_BLOCKS for g in range(n_groups)]).astype(np.int32)
    return replace(one, tables=tables)


def passes(config: ModelConfig) -> list[PassBatch]:
    """Prompts of 15, 1 and 12 tokens, two steps of all three, a piece of one beside steps of the others."""
    texts = [sequence(seed, n) for seed, n in ((5, 40), (6, 20), (7, 30))]
    tables, lengths = [[3, 9, 0], [5, 7], [1, 4]], [15, 1, 12]
    out = [batch([(text[:n], 0, table) for text, n, table in zip(texts, lengths, tables, strict=True)])]
    for _ in range(2):
        out.append(batch([(t[n : n + 1], n, b) for t, n, b in zip(texts, lengths, tables, strict=True)]))
        lengths = [n + 1 for n in lengths]
    out.append(batch([(t[n : n + m], n, b) for t, n, m, b in zip(texts, lengths, (7, 1, 1), tables, strict=True)]))
    return [grouped(one, cache_layout(config).n_groups) for one in out]


QUICK = [
    "dbrx", "gpt_oss", "deepseek_v3", "qwen3next", "lfm2moe", "olmoe", "grok1", "mpt", "mixed", "mixtures",
    "window, sinks, bias, cap", "part of a head turns", "norm after the rotation", "longrope",
]  # fmt: skip
"""The kernels are interpreted: seconds for each model. Together these meet every branch."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_logits_are_those_of_plain_torch(name: str) -> None:
    """Prompts, single tokens by graphs, and both in one pass."""
    kernels, plain = pair(FAMILIES[name])
    for one in passes(FAMILIES[name]):
        (mine, my_routing), (theirs, their_routing) = passed(kernels, one), passed(plain, one)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.std()))
        for a, b in zip(my_routing, their_routing, strict=True):
            assert torch.equal(a.expert_ids, b.expert_ids)
            torch.testing.assert_close(a.expert_weights, b.expert_weights, rtol=1e-4, atol=1e-5)
    assert [x.tolist() for x in kernels.expert_load()] == [x.tolist() for x in plain.expert_load()]


@pytest.mark.parametrize("name", ["dbrx", "deepseek_v3", pytest.param("lfm2", marks=pytest.mark.slow)])
def test_a_token_is_the_same_alone_and_in_a_crowd(name: str) -> None:
    """To the bit: three sequences together, and each by itself, in other blocks and another bucket."""
    config = FAMILIES[name]
    together, _ = pair(config)
    crowd = [together.forward(one).logits.copy() for one in passes(config)]
    for s in (0, 1):
        alone, _ = pair(config)
        for one, wanted in zip(passes(config), crowd, strict=True):
            rows = range(one.starts[s], one.starts[s + 1])
            assert np.array_equal(np.asarray(alone.forward(only(one, s)).logits), wanted[rows])


def only(one: PassBatch, s: int) -> PassBatch:
    """One sequence of a pass."""
    tokens, blocks = slice(one.starts[s], one.starts[s + 1]), slice(one.table_starts[s], one.table_starts[s + 1])
    n = one.starts[s + 1] - one.starts[s]
    assert one.before is not None and one.after is not None
    return PassBatch(
        one.tokens[tokens], one.positions[tokens], np.array([0, n], np.int32), np.ascontiguousarray(one.tables[:, blocks]),
        np.array([0, blocks.stop - blocks.start], np.int32), np.arange(n, dtype=np.int32), one.before[s : s + 1], one.after[s : s + 1],
    )  # fmt: skip


def test_hidden_states_are_those_that_the_head_reads() -> None:
    kernels, plain = pair(TINY["dbrx"])
    for one in passes(TINY["dbrx"])[:2]:
        mine, theirs = kernels.forward(one, hidden=True).hidden, plain.forward(one, hidden=True).hidden
        assert mine is not None and theirs is not None and mine.shape == theirs.shape
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_some_rows_are_wanted_of_a_step() -> None:
    kernels, plain = pair(TINY["mixtral"])
    prompts, step = passes(TINY["mixtral"])[:2]
    for runner in (kernels, plain):
        runner.forward(prompts)
    some = replace(step, rows=np.array([2, 0], np.int32))
    torch.testing.assert_close(logits_of(kernels, some), logits_of(plain, some), rtol=1e-4, atol=1e-4)


def test_a_result_is_a_value_that_the_next_step_does_not_change() -> None:
    kernels, _ = pair(TINY["mixtral"])
    every = passes(TINY["mixtral"])
    kernels.forward(every[0])
    first = kernels.forward(every[1]).logits
    kernels.forward(every[2])
    again, _ = pair(TINY["mixtral"])
    again.forward(every[0])
    assert np.array_equal(np.asarray(first), np.asarray(again.forward(every[1]).logits))


def test_blocks_are_copied() -> None:
    kernels, plain = pair(TINY["llama2"])
    one = batch([(sequence(5, 20), 0, [3, 9])])
    step = batch([([4], 20, [6, 2])])
    for runner in (kernels, plain):
        runner.forward(one)
        runner.copy_blocks([(3, 6), (9, 2)])
    torch.testing.assert_close(logits_of(kernels, step), logits_of(plain, step), rtol=1e-4, atol=1e-4)
    assert kernels.kv_bytes == plain.kv_bytes and kernels.weights() == plain.weights()


def test_every_bucket_is_captured_once_and_replayed_from_the_same_tensors() -> None:
    captured: list[Callable[[], Computed]] = []
    replays: list[int] = []

    def capture(run: Callable[[], Computed]) -> Callable[[], Computed]:
        captured.append(run)
        number = len(captured)

        def replay() -> Computed:
            replays.append(number)
            return run()

        return replay

    kernels, plain = pair(TINY["mixtral"], capture=capture, most_tokens=5)
    assert isinstance(kernels._graphs, DecodeGraphs) and kernels._graphs.buckets == [1, 2, 4, 8]
    every, addresses = passes(TINY["mixtral"]), []
    for one in every:
        torch.testing.assert_close(logits_of(kernels, one), logits_of(plain, one), rtol=1e-4, atol=1e-4)
        if captured:
            static = kernels._graphs._made[4][0].inputs
            read = (static.tokens, static.positions, *static.slots, *static.tables)
            addresses.append([(t.data_ptr(), t.shape, t.stride()) for t in read])
    assert len(addresses) == 3 and addresses[0] == addresses[1] == addresses[2], "a graph reads the same memory"
    logits_of(kernels, batch([([4], 0, [8])]))
    assert len(captured) == 2 and replays == [1, 1, 2], "three sequences fill up four places"


def test_more_tokens_than_a_bucket_go_without_a_graph() -> None:
    kernels, plain = pair(TINY["llama2"], most_tokens=2)
    assert kernels._graphs.bucket(3) is None
    for one in passes(TINY["llama2"])[:2]:
        torch.testing.assert_close(logits_of(kernels, one), logits_of(plain, one), rtol=1e-4, atol=1e-4)


def test_tables_slots_and_tiles() -> None:
    one = batch([([1] * 18, 14, [5, 2]), ([1], 3, [7])])
    slots, tables = slots_and_tables(one)
    assert tables.tolist() == [[[5, 2], [7, -1]]]
    assert slots[0].tolist() == [94, 95, *range(32, 48), 115]
    rows, tokens, sequences = tiles_of(one.starts, 8)
    assert (rows.tolist(), tokens.tolist(), sequences.tolist()) == ([0, 8, 16, 18], [8, 8, 2, 1], [0, 0, 0, 1])


def test_what_no_kernel_has_is_refused() -> None:
    kernels, _ = pair(TINY["llama2"])
    with pytest.raises(RequestError, match="plain torch"):
        kernels.adapters()
    base = TINY["llama2"]
    refused = {
        "norm of all heads": base.with_mixer(qk_norm=QKNormSpec(over="vector", eps=1e-5, after_rotation=True)),
        "norm of v, no keys that are values": base.with_mixer(v_norm_eps=1e-5, keys_as_values=True),
        "capped logits": replace(base, logit_cap=30.0),
        "scale of a layer": base.with_layers(lambda layer: replace(layer, scaled=True)),
    }
    for piece, config in refused.items():
        with pytest.raises(ConfigError, match=f"have no {piece}.*Unset QUADRIGA_OPS"):
            require_kernels(config)
    wide = {name: values.double() for name, values in parameters(TINY["llama2"]).items()}
    with pytest.raises(ConfigError, match="float64"):
        DeviceWeights(wide)
