"""Passes over several sequences, written by hand."""

from __future__ import annotations

import numpy as np

from quadriga.ops.program import Batch


def batch(chunks: list[tuple[list[int], int, list[int]]]) -> Batch:
    """A pass over (tokens, position of the first, blocks) of several sequences, logits of every row."""
    tokens = [t for chunk, _, _ in chunks for t in chunk]
    positions = [start + i for chunk, start, _ in chunks for i in range(len(chunk))]
    starts = np.cumsum([0] + [len(chunk) for chunk, _, _ in chunks])
    tables = [b for _, _, blocks in chunks for b in blocks]
    table_starts = np.cumsum([0] + [len(blocks) for _, _, blocks in chunks])
    ints = [np.array(x, dtype=np.int32) for x in (tokens, positions, starts, tables, table_starts, range(len(tokens)))]
    return Batch(*ints)
