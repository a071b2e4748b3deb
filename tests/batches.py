"""Passes over several sequences, written by hand."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quadriga.kernels.pass_batch import PassBatch
from quadriga.nn.moe import RouterStats
from quadriga.runners.base import Runner


def batch(chunks: list[tuple[list[int], int, list[int]]]) -> PassBatch:
    """A pass over (tokens, position of the first, blocks) of several sequences, logits of every row.

    A sequence's recurrent states, if the model has any, are in the slot of its first block's number.
    """
    tokens = [t for chunk, _, _ in chunks for t in chunk]
    positions = [start + i for chunk, start, _ in chunks for i in range(len(chunk))]
    starts = np.cumsum([0] + [len(chunk) for chunk, _, _ in chunks])
    tables = [b for _, _, blocks in chunks for b in blocks]
    table_starts = np.cumsum([0] + [len(blocks) for _, _, blocks in chunks])
    after = [blocks[0] for _, _, blocks in chunks]
    before = [blocks[0] if start else -1 for _, start, blocks in chunks]
    lists = (tokens, positions, starts, tables, table_starts, range(len(tokens)), before, after)
    ints = [np.array(x, dtype=np.int32) for x in lists]
    return PassBatch(*ints)


def logits_of(runner: Runner, one: PassBatch) -> Tensor:
    """What a runner computes for a pass, as a tensor."""
    return torch.from_numpy(np.asarray(runner.forward(one).logits))


def passed(runner: Runner, one: PassBatch) -> tuple[Tensor, list[RouterStats]]:
    """Logits and routing of a pass, as tensors."""
    result = runner.forward(one, routing=True)
    assert result.routing is not None
    fields = ("expert_ids", "expert_weights", "probs", "logits")
    stats = [RouterStats(*(torch.from_numpy(getattr(layer, name)) for name in fields)) for layer in result.routing]
    return torch.from_numpy(np.asarray(result.logits)), stats
