"""What a pass is told, on the device: tokens, positions, where keys go and lie, which queries make a tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quadriga.kernels.pass_batch import PassBatch
from quadriga.kernels.triton.attention import Tiles
from quadriga.kernels.triton.recurrent import Sequences
from quadriga.quant.packed import BLOCK_TOKENS

Ints = NDArray[np.int32]

_ALIGNED = 4
"""int32 numbers in 16 bytes, at multiples of which every array begins: kernels load such addresses widest."""


@dataclass(frozen=True, kw_only=True)
class DevicePass:
    """N tokens of S sequences; int32 on the device."""

    tokens: Tensor
    """(N,)"""
    positions: Tensor
    """(N,); -1: nobody has this row of a graph."""
    slots: tuple[Tensor, ...]
    """Of each group of layers (N,): where each token's key goes, -1: nowhere."""
    tables: tuple[Tensor, ...]
    """Of each group of layers (S, most blocks)."""
    rows: Tensor | None
    """(R,), whose logits are wanted; None: all."""
    tiles: Mapping[int, Tiles] | None
    """Tokens of a tile -> queries in tiles of so many; None: every sequence has one token."""
    sequences: Sequences | None
    """None: the model has no recurrent layer."""


def to_device(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """A host's array on the device; the host does not wait for the copy."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def is_single_tokens(batch: PassBatch) -> bool:
    """True if every sequence has one token in this pass."""
    return len(batch.tokens) == len(batch.starts) - 1


def slots_and_tables(batch: PassBatch) -> tuple[Ints, Ints]:
    """Of each of G groups: where each token's key goes (G, N), and the blocks of each sequence (G, S, most)."""
    lengths, n_blocks = np.diff(batch.starts), np.diff(batch.table_starts)
    flat = np.atleast_2d(batch.tables)
    of_token = np.repeat(batch.table_starts[:-1], lengths) + batch.positions // BLOCK_TOKENS
    slots = flat[:, of_token] * BLOCK_TOKENS + batch.positions % BLOCK_TOKENS
    tables = np.full((len(flat), len(n_blocks), max(1, int(n_blocks.max(initial=0)))), -1, dtype=np.int32)
    sequence = np.repeat(np.arange(len(n_blocks)), n_blocks)
    tables[:, sequence, np.arange(flat.shape[1]) - batch.table_starts[sequence]] = flat
    return slots.astype(np.int32), tables


def tiles_of(starts: Ints, n_tokens: int) -> tuple[Ints, Ints, Ints]:
    """(first row, tokens, sequence) of every tile of at most ``n_tokens`` tokens of one sequence."""
    lengths = np.diff(starts)
    n_tiles = -(-lengths // n_tokens)
    sequence = np.repeat(np.arange(len(lengths)), n_tiles)
    first = (np.arange(len(sequence)) - np.repeat(np.cumsum(n_tiles) - n_tiles, n_tiles)) * n_tokens
    tokens = np.minimum(n_tokens, lengths[sequence] - first)
    return (starts[sequence] + first).astype(np.int32), tokens.astype(np.int32), sequence.astype(np.int32)


def upload(batch: PassBatch, *, tile_tokens: Sequence[int], is_recurrent: bool, device: torch.device) -> DevicePass:
    """A pass of any shape, in one copy.

    Args:
        tile_tokens: the numbers of tokens that tiles of the model's layers have.
    """
    slots, tables = slots_and_tables(batch)
    parts: list[NDArray[np.integer]] = [batch.tokens, batch.positions, batch.rows, slots, tables]
    for n in tile_tokens:
        parts += tiles_of(batch.starts, n)
    if is_recurrent:
        assert batch.before is not None and batch.after is not None, "a recurrent model's pass says where states are"
        of_tokens = np.repeat(np.arange(len(batch.starts) - 1), np.diff(batch.starts))
        parts += [batch.starts, of_tokens, batch.before, batch.after]
    rooms = [-(-part.size // _ALIGNED) * _ALIGNED for part in parts]
    filled = [np.pad(part.reshape(-1), (0, room - part.size)) for part, room in zip(parts, rooms, strict=True)]
    whole = to_device(np.concatenate(filled).astype(np.int32), device)
    views = [cut[: part.size].view(part.shape) for cut, part in zip(torch.split(whole, rooms), parts, strict=True)]
    n_own = 5 + 3 * len(tile_tokens)
    return DevicePass(
        tokens=views[0],
        positions=views[1],
        rows=views[2],
        slots=tuple(views[3]),
        tables=tuple(views[4]),
        tiles={n: Tiles(*views[5 + 3 * i : 8 + 3 * i]) for i, n in enumerate(tile_tokens)},
        sequences=Sequences(*views[n_own:]) if is_recurrent else None,
    )


class StaticPass:
    """A pass of single tokens whose tensors stay where they are: what a graph reads, filled anew for every step.

    Args:
        n: places for sequences. Those that nobody has compute something that nobody reads.
        n_groups: of layers.
        most_blocks: of a sequence.
    """

    def __init__(self, n: int, n_groups: int, most_blocks: int, *, is_recurrent: bool, device: torch.device) -> None:
        self.n, self._n_groups = n, n_groups
        # tokens, positions, slots of every group, states before and after
        self._lines = torch.full((4 + n_groups, n), -1, dtype=torch.int32, device=device)
        self._lines[0] = 0
        self._tables = torch.full((n_groups, n, most_blocks), -1, dtype=torch.int32, device=device)
        every = torch.arange(n + 1, dtype=torch.int32, device=device)
        self.inputs = DevicePass(
            tokens=self._lines[0],
            positions=self._lines[1],
            slots=tuple(self._lines[4:]),
            tables=tuple(self._tables),
            rows=None,
            tiles=None,
            sequences=Sequences(every, every[:-1], self._lines[2], self._lines[3]) if is_recurrent else None,
        )

    def fill(self, batch: PassBatch) -> None:
        """Take over a pass of at most ``n`` single tokens."""
        assert is_single_tokens(batch) and len(batch.tokens) <= self.n, "chosen by its size"
        slots, tables = slots_and_tables(batch)
        m = len(batch.tokens)
        lines = np.full((4 + self._n_groups, self.n), -1, dtype=np.int32)
        lines[0] = 0
        lines[0, :m], lines[1, :m], lines[4:, :m] = batch.tokens, batch.positions, slots
        if batch.before is not None and batch.after is not None:
            lines[2, :m], lines[3, :m] = batch.before, batch.after
        self._lines.copy_(to_device(lines, self._lines.device))
        self._tables[:, :m, : tables.shape[2]] = to_device(tables, self._tables.device)
