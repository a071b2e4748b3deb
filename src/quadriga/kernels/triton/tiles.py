"""Sizes of tiles, as data. Chosen once for a kind of weight, never while a model runs: no autotuning.

Three sizes of each, for few, for some and for many rows an expert. They differ in the rows of x they take at a time,
not in how deep a step of the sum is, so a row's sum is taken in the same order in all of them. A step of a quantised
weight is 64 columns deep: two groups, whose scales are read together.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """What one program computes: ``outputs`` numbers of ``rows`` rows, ``depth`` columns of both a step."""

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int


FEW_ROWS = 16
"""Up to so many rows an expert, on average, a tile takes 16."""

_FEW = {
    "plain": Tile(rows=16, outputs=64, depth=64, warps=4, stages=4),
    "quantised": Tile(rows=16, outputs=64, depth=64, warps=4, stages=4),
}

SOME_ROWS = 64
"""Up to so many, 64."""

_SOME = {
    "plain": Tile(rows=64, outputs=64, depth=64, warps=4, stages=4),
    "quantised": Tile(rows=64, outputs=64, depth=64, warps=4, stages=3),
}

_MANY = {
    "plain": Tile(rows=128, outputs=128, depth=64, warps=8, stages=3),
    "quantised": Tile(rows=128, outputs=128, depth=64, warps=8, stages=3),
}

_MANY_GATED = {
    "plain": Tile(rows=128, outputs=128, depth=64, warps=8, stages=2),
    "quantised": Tile(rows=128, outputs=64, depth=64, warps=8, stages=3),
}
"""Two products a tile, gate and up. Unpacking takes registers, so quantised ones are narrower."""


def tile(form: str, rows_per_expert: float, *, gated: bool) -> Tile:
    """The tile of a format of ``weights.GROUP`` for so many rows an expert on average."""
    kind = "plain" if form == "plain" else "quantised"
    if rows_per_expert <= SOME_ROWS:
        return (_FEW if rows_per_expert <= FEW_ROWS else _SOME)[kind]
    return (_MANY_GATED if gated else _MANY)[kind]
