"""Any number of ranks in any layout computes the same run; a checkpoint can be resumed on any number of ranks."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quadriga import runtime
from quadriga.errors import ConfigError
from quadriga.model.config import DenseSpec, QKNormSpec, ShortConvSpec
from quadriga.train import config as sections
from quadriga.train.losses import NextToken
from quadriga.train.objectives import ORPO
from quadriga.train.parallel import check_layout, prepare
from quadriga.train.row_group import RowGroup
from quadriga.train.world import World
from tests.torchrun import torchrun
from tests.train import runs, worker
from tests.waiting import HANG_S


def _torchrun(n_ranks: int, folder: Path) -> dict[str, list[float]]:
    done = torchrun(n_ranks, "tests.train.worker", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[float]] = json.loads((folder / f"losses-{n_ranks}.json").read_text())
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The results of one process that is never stopped: plain, with Muon, with tied embeddings."""
    found = {}
    for layout in worker.LAYOUTS[1]:
        record, folder = runs.Record(), tmp_path_factory.mktemp("alone")
        run = runs.trainer(folder, worker.settings(layout), config=worker.model(layout), record=record)
        run.train()
        found[layout] = worker.results(run, record)
    return found


@pytest.mark.parametrize(("n_context", "n_tensor"), [(2, 1), (4, 1), (3, 2)])
def test_context_parts_have_equal_work_and_every_token_once(n_context: int, n_tensor: int) -> None:
    """Token t of a document that fills the row sees t + 1 keys."""
    n = 10 * n_context * n_tensor
    groups = [RowGroup(n_tensor=n_tensor, n_context=n_context, part=p) for p in range(n_context * n_tensor)]
    tokens = [[t for span in group.spans(n) for t in range(*span)] for group in groups]
    work = {sum(t + 1 for t in own) for own in tokens}
    assert work == {n * (n + 1) // 2 // n_context}
    whole = runs.source(n_rows=1, seq_len=n).rows(0, 0, 1)
    parts = torch.stack([torch.cat([whole.part(g).tokens, whole.part(g).positions]) for g in groups])
    order = torch.tensor([t for own in tokens[::n_tensor] for t in own])
    assert sorted(order.tolist()) == list(range(n))
    kept = parts.view(len(groups), 2, -1).transpose(0, 1).flatten(1)
    assert torch.equal(kept[0], whole.tokens[order]) and torch.equal(kept[1], whole.positions[order])


def test_an_odd_context_part_stays_in_one_piece() -> None:
    assert RowGroup(n_context=2, part=1).spans(6) == ((3, 6),)


@pytest.mark.dist
def test_two_ranks_compute_what_one_does(alone: dict[str, list[float]], tmp_path: Path) -> None:
    for layout, curve in _torchrun(2, tmp_path).items():
        _same(curve, alone[worker.kind(layout)], layout)
    said = [(tmp_path / f"told-2-{rank}").read_text() for rank in (0, 1)]
    assert said[0] == "ConfigError: there is no checkpoint; ValueError: odd"
    assert said[1] == "ConfigError: there is no checkpoint; TrainingError: rank 0 failed: ValueError: odd"


@pytest.mark.dist
def test_four_ranks_compute_what_one_does_and_save_for_two_and_one(
    alone: dict[str, list[float]], tmp_path: Path
) -> None:
    for layout, curve in _torchrun(4, tmp_path).items():
        _same(curve, alone[worker.kind(layout)], layout)
    one = runs.Record()
    run = runs.trainer(tmp_path / "shared-1", worker.settings("one"), config=worker.MODEL, record=one)
    assert run.resume()
    run.train()
    half = alone["one"][10:20] + alone["one"][30:]
    _same(worker.results(run, one), half, "saved by four, resumed by one")
    shutil.rmtree(tmp_path / "shared-1")
    _same(_torchrun(2, tmp_path)["shared-2 resumed"], half, "saved by four, resumed by two")


def _same(curve: list[float], expected: list[float], what: str) -> None:
    """Losses, gradient norms, the held-out loss and the ids of a continuation agree."""
    assert curve == pytest.approx(expected, rel=1e-5), what


LOST = """
import os, signal, sys
from datetime import timedelta
from quadriga.errors import TrainingError
from quadriga.train.world import World
import torch
import torch.distributed as dist
world = World.join("cpu", timeout_s=float(sys.argv[2]))
world.wait()
dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)  # both are here; now one is lost
if world.rank == 1:
    if sys.argv[1] == "dead":
        os._exit(9)
    signal.pause()
try:
    world.sum(torch.ones(1))
except TrainingError as error:
    print(error, flush=True)
os._exit(0)
"""


@pytest.mark.dist
@pytest.mark.parametrize("way", ["dead", "hung"])
def test_a_lost_rank_is_named(way: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(2):
        environment = {
            **runtime.child_environment(), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank),
        }  # fmt: skip
        children.append(
            subprocess.Popen([sys.executable, "-c", LOST, way, str(HANG_S)], stdout=subprocess.PIPE, env=environment)
        )
    try:
        said = children[0].communicate(timeout=HANG_S)[0].decode()
    finally:
        children[1].kill()
        children[1].wait()
    assert "rank 0 of 2 lost the others" in said
    assert "Ranks that do not answer: [1]" in said, said


def test_impossible_layouts_are_refused() -> None:
    model = runs.model()
    four = World(0, 4, torch.device("cpu"))
    for options, message in (
        ({"replicate": 3}, "replicate must divide the number of ranks: got 3 and 4"),
        ({"experts": 3}, "experts must divide the number of ranks: got 3 and 4"),
        (
            {"experts": 4, "replicate": 2},
            "replicate x parallel.experts must divide the number of ranks: got 2 x 4 and 4",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            check_layout(model, sections.ParallelSection(**options), four)
    with pytest.raises(ConfigError, match="must divide the model's 8 experts: got 16"):
        check_layout(model, sections.ParallelSection(experts=16), World(0, 16, torch.device("cpu")))
    with pytest.raises(ConfigError, match=r"7 shards must divide a dimension of the experts' moe.w_gate \[8, 20, 24\]"):
        check_layout(model, sections.ParallelSection(experts=8), World(0, 56, torch.device("cpu")))
    for change, options, message in (
        ({}, {"tensor": 2}, "must divide the model's 3 key/value heads: got 2"),
        (
            {"n_kv_heads": 2, "qk_norm": QKNormSpec(over="vector", eps=1e-5)},
            {"tensor": 2},
            "norm of all heads together",
        ),
        ({"n_kv_heads": 2}, {"tensor": 2, "context": 2, "replicate": 2}, "got 2 x 2 x 2 and 4 ranks"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_layout(runs.model(runs.TINY.with_mixer(**change)), sections.ParallelSection(**options), four)
    with pytest.raises(ConfigError, match="pipeline must be at most the model's 2 layers, got 4"):
        check_layout(model, sections.ParallelSection(pipeline=4), four)
    with pytest.raises(ConfigError, match=r"parallel.replicate x parallel.experts must divide the ranks of a stage"):
        check_layout(model, sections.ParallelSection(pipeline=2, replicate=2, experts=2), four)
    model.requires_grad_(False)
    model.layers[1].requires_grad_(True)
    with pytest.raises(ConfigError, match="pipeline = 2 leaves stage 0 nothing to train: take fewer stages"):
        prepare(model, NextToken(runs.TINY, sections.RouterSection(), four), sections.ParallelSection(pipeline=2), four)
    model.requires_grad_(True)
    for form in (ORPO(0.1), NextToken(runs.TINY, sections.RouterSection(balance_form="hf"), four)):
        with pytest.raises(
            ConfigError, match=r"pipeline is for pre-training, 'sft' and 'text' with router.balance_form = 'megablocks'"
        ):
            prepare(model, form, sections.ParallelSection(pipeline=2), four)
    mixers = {"mixer": ShortConvSpec(width=24, taps=3)}
    recurrent = replace(runs.TINY, layers=(runs.TINY.layers[0], replace(runs.TINY.layers[0], **mixers)))
    with pytest.raises(ConfigError, match="recurrent layers"):
        check_layout(runs.model(recurrent), sections.ParallelSection(context=2), four)
    gated = runs.model(runs.TINY.with_ffn(shared=DenseSpec(d_ff=12, activation="silu"), shared_gate=True))
    with pytest.raises(ConfigError, match="shared expert with a gate"):
        check_layout(gated, sections.ParallelSection(experts=2), four)
