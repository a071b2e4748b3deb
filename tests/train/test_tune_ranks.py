"""Tuning on two or four ranks is tuning on one: the same curve, a run resumed on another number, the same adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quadriga.io.adapter import load
from quadriga.io.open import open_checkpoint
from quadriga.nn.load import load_parameters
from quadriga.train.metrics import read
from quadriga.train.tune import tune
from tests.torchrun import torchrun
from tests.train import tune_worker
from tests.train.tune_runs import write_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case on one rank and on two, and two runs that have changed between them."""
    where = tmp_path_factory.mktemp("ranks")
    write_base(where / "base")
    write_base(where / "dense", dense=True)
    write_base(where / "teacher", std=0.2)
    for case in tune_worker.CASES:
        tune_worker.run(tune_worker.config(where, case, 1))
    tune_worker.part(tune_worker.config(where, tune_worker.SHARED, 1, run="from-1"))
    for n_ranks in (2, 4):
        done = torchrun(n_ranks, "tests.train.tune_worker", str(where))
        assert done.returncode == 0, done.stderr[-3000:]
    assert tune(tune_worker.config(where, tune_worker.SHARED, 1, run="from-2")).done
    return where


def curve(run: Path) -> tuple[list[float], list[float], list[float]]:
    """(losses, gradient norms, held-out losses or rewards) of a run."""
    lines = read(run / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    found = [line["held_out"]["held out"] for line in lines if "held_out" in line]
    held_out = [one["loss"] if "loss" in one else one["reward"] for one in found]
    return [line["loss"] for line in steps], [line["norm"] for line in steps], held_out


@pytest.mark.dist
@pytest.mark.parametrize(
    ("n_ranks", "case"), [*((2, case) for case in tune_worker.CASES), *((4, case) for case in tune_worker.ON_FOUR)]
)
def test_several_ranks_have_the_curve_of_one(folder: Path, n_ranks: int, case: str) -> None:
    losses, norms, held_out = curve(folder / f"1-{case}")
    assert len(losses) == tune_worker.N_STEPS and len(held_out) == 2
    assert losses[-1] != losses[0]
    for ours, theirs in zip(curve(folder / f"{n_ranks}-{case}"), (losses, norms, held_out), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=2e-6)  # metrics are written with six digits


@pytest.mark.dist
@pytest.mark.parametrize("begun_on", [1, 2])
def test_a_run_is_resumed_on_another_number_of_ranks(folder: Path, begun_on: int) -> None:
    losses, norms, _ = curve(folder / f"from-{begun_on}")
    wanted = curve(folder / f"1-{tune_worker.SHARED}")
    assert losses == pytest.approx(wanted[0], rel=1e-5, abs=2e-6)
    assert norms == pytest.approx(wanted[1], rel=1e-5, abs=2e-6)


@pytest.mark.dist
def test_one_rank_writes_the_adapter_that_two_wrote_byte_for_byte(folder: Path) -> None:
    run = folder / f"2-{tune_worker.SHARED}"
    names = ("adapter.safetensors", "quadriga_adapter.json")
    written = [(run / "adapter" / name).read_bytes() for name in names]
    outcome = tune(tune_worker.config(folder, tune_worker.SHARED, 1, run=run.name))
    assert outcome.result == run / "adapter"
    assert [(run / "adapter" / name).read_bytes() for name in names] == written
    config = open_checkpoint(folder / "base").config
    one = load(folder / f"1-{tune_worker.SHARED}" / "adapter", config).factors
    for name, pair in load(outcome.result, config).factors.items():
        for ours, theirs in zip(pair, one[name], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("n_ranks", "case"),
    [(2, "full experts"), (4, "full experts"), (2, "full tensor"), (4, "full tensor"), (2, "full pipeline")],
)
def test_several_ranks_write_the_whole_model(folder: Path, n_ranks: int, case: str) -> None:
    one, two = (load_parameters(open_checkpoint(folder / f"{n}-{case}" / "model")) for n in (1, n_ranks))
    assert one.keys() == two.keys()
    for name, values in two.items():
        np.testing.assert_allclose(values.numpy(), one[name].numpy(), rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.dist
@pytest.mark.parametrize(("n_ranks", "case"), [(2, "lora tensor"), (4, "lora tensor"), (2, "lora tensor dense")])
def test_an_adapter_of_cut_matrices_is_that_of_one_rank(folder: Path, n_ranks: int, case: str) -> None:
    """What is written is whole: factors that follow heads and columns, and those that every part has."""
    base = open_checkpoint(folder / ("dense" if case.endswith("dense") else "base")).config
    one, two = (load(folder / f"{n}-{case}" / "adapter", base).factors for n in (1, n_ranks))
    assert one.keys() == two.keys()
    for name, pair in two.items():
        for ours, theirs in zip(pair, one[name], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5, err_msg=name)
