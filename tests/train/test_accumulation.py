"""Micro-steps of very different lengths: the mean is over the targets of the whole batch, never of a micro-step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from quadriga.nn.context import PackedContext
from quadriga.train import config as sections
from quadriga.train.batch import IGNORE
from quadriga.train.chat_data import Example
from quadriga.train.packing import ExampleSource
from tests.train import runs

LENGTHS = ((3, 1), (2, 27), (11, 2), (5, 14), (4, 9), (20, 3))
"""(prompt, answer) tokens of a document, each in a row of its own."""


def documents() -> list[tuple[list[int], int]]:
    generator = torch.Generator().manual_seed(6)
    return [(torch.randint(0, runs.VOCAB, (p + a,), generator=generator).tolist(), p) for p, a in LENGTHS]


def source() -> ExampleSource:
    groups = [(Example(tuple(ids), (*[IGNORE] * (p - 1), *ids[p:], IGNORE)),) for ids, p in documents()]
    return ExampleSource(groups, ("conversation",), n_rows=6, seq_len=32, together=False)


def settings(micro_rows: int) -> runs.Settings:
    return runs.Settings(
        n_steps=3,
        router=sections.RouterSection(balance_loss=0.0),
        optimiser=sections.OptimiserSection(learning_rate=1e-3, eps=1e-6),
        parallel=sections.ParallelSection(device="cpu", micro_rows=micro_rows),
    )


def test_the_loss_is_the_mean_over_all_targets(tmp_path: Path) -> None:
    record = runs.Record()
    runs.trainer(tmp_path, settings(1), record=record, source=source()).train()
    model, total, n = runs.model().eval(), 0.0, 0
    for ids, prompt in documents():
        logits = model(torch.tensor(ids), PackedContext([len(ids)])).logits[prompt - 1 : -1]
        total += float(F.cross_entropy(logits, torch.tensor(ids[prompt:]), reduction="sum").detach())
        n += len(ids) - prompt
    assert n == sum(answer for _, answer in LENGTHS)
    assert record.losses[0] == pytest.approx(total / n, rel=1e-5)


@pytest.mark.parametrize("micro_rows", [1, 2, 3])
def test_the_updates_are_those_of_the_whole_batch(tmp_path: Path, micro_rows: int) -> None:
    found = []
    for rows in (micro_rows, 6):
        record = runs.Record()
        run = runs.trainer(tmp_path / str(rows), settings(rows), record=record, source=source())
        run.train()
        found.append((record, run.masters.by_name))
    (ours, weights), (whole, theirs) = found
    assert ours.losses == pytest.approx(whole.losses, rel=1e-5)
    assert [one.norm for one in ours.steps] == pytest.approx([one.norm for one in whole.steps], rel=1e-5)
    for name, values in weights.items():
        torch.testing.assert_close(values, theirs[name], rtol=1e-4, atol=2e-6, msg=name)
