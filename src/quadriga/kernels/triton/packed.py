"""The CPU's packed matrices (``kernels/cpu/csrc/layout.hpp``) as planes, without loss, rearranged on the device.

    bytes of a tile of 16 rows ─► one copy to the device ─► lanes become rows, lines become columns ─► planes

A file's matrices go through here one by one: beside the planes the device holds one matrix of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from quadriga.kernels.arrays import tensor
from quadriga.kernels.cpu.packing import Packed
from quadriga.kernels.triton.weights import GroupedWeight, stacked
from quadriga.quant.codebooks import FOUR_BIT_VALUES
from quadriga.quant.packed import PACKED, TILE

PLANES = {
    "q8": "q8", "iq4nl": "q8", "q5": "q8", "q5m": "q8m", "q4": "q4", "q4m": "q4m", "mx4": "mxfp4", "q4k": "q4k",
    "q3k": "k8", "q6k": "k8", "iq4xs": "k8", "q2k": "k8m", "q5k": "k8m",
}  # fmt: skip
"""Packed format -> that of the planes which hold its numbers."""


def from_packed(matrices: Iterable[Packed], n: int, device: torch.device | str = "cpu") -> GroupedWeight:
    """Packed matrices of one shape and one format of ``PLANES`` as planes on a device.

    Args:
        matrices: ``n`` of them, a layer's experts or one; each is let go before the next is asked for.
    """
    return stacked((_one(matrix, device) for matrix in matrices), n, device)


def _one(matrix: Packed, device: torch.device | str) -> GroupedWeight:
    group, form = PACKED[matrix.format], PLANES[matrix.format]
    raw = tensor(np.asarray(matrix.data)).to(device)
    tiles = raw.view(-(-matrix.rows // TILE), -(-matrix.cols // group.columns), group.nbytes)
    planes = [_rows_first(plane)[None, : matrix.rows] for plane in _FROM_TILES[matrix.format](tiles)]
    codes, scales, *others = planes
    if form == "k8":  # no minima
        return GroupedWeight(form, codes.contiguous(), matrix.cols, scales, d=others[0])
    return GroupedWeight(form, codes.contiguous(), matrix.cols, scales, *others)


def _rows_first(plane: Tensor) -> Tensor:
    """(tiles, groups, 16, n) -> (tiles * 16, groups * n)."""
    tiles, groups, lanes, n = plane.shape
    return plane.transpose(1, 2).reshape(tiles * lanes, groups * n)


# Lines of 16 rows ----------------------------------------------------------------------------------------------------


def _per_lane(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """(tiles, groups, n lines of 16 numbers) as (tiles, groups, 16, n)."""
    tiles, groups, _ = raw.shape
    return raw.contiguous().view(dtype).reshape(tiles, groups, -1, TILE).transpose(2, 3)


def _lane_bytes(lines: Tensor) -> Tensor:
    """Lines of 16 x 4 bytes, (tiles, groups, 64 n) -> (tiles, groups, 16, n, 4)."""
    tiles, groups, _ = lines.shape
    return lines.reshape(tiles, groups, -1, TILE, 4).transpose(2, 3)


def _nibble_codes(lines: Tensor) -> Tensor:
    """Lines of nibbles, columns 8 l .. 8 l + 3 in the low halves and the next four in the high ones, as (tiles, groups,
    16, K)."""
    quads = _lane_bytes(lines)
    return torch.stack((quads & 15, quads >> 4), dim=-2).flatten(3)


def _paired(codes: Tensor) -> Tensor:
    """Codes below 16 as planes have them: of 64 columns byte j is column j with column j + 32 above it."""
    runs = codes.reshape(*codes.shape[:3], -1, 2, 32)
    return (runs[..., 0, :] | runs[..., 1, :] << 4).flatten(3)


def _spread_bits(lines: Tensor, width: int) -> Tensor:
    """Lines of codes of ``width`` bits, the i-th in bits i * width ..: columns 4 i .. 4 i + 3 of every line's own."""
    quads = _lane_bytes(lines)
    parts = [quads >> shift & (1 << width) - 1 for shift in range(0, 8, width)]
    return torch.stack(parts, dim=-2).flatten(3)


# Formats of groups of 32 ---------------------------------------------------------------------------------------------


def _q8(tiles: Tensor) -> list[Tensor]:
    codes = _lane_bytes(tiles[:, :, 64:]).flatten(3)
    return [(codes ^ 128).view(torch.int8), _per_lane(tiles[:, :, :64], torch.float16)]  # u - 128


def _q4(tiles: Tensor) -> list[Tensor]:
    return [_paired(_nibble_codes(tiles[:, :, 64:])), _per_lane(tiles[:, :, :64], torch.float16)]


def _q4m(tiles: Tensor) -> list[Tensor]:
    scales, minima = (_per_lane(tiles[:, :, at : at + 64], torch.float16) for at in (0, 64))
    return [_paired(_nibble_codes(tiles[:, :, 128:])), scales, minima]


def _mx4(tiles: Tensor) -> list[Tensor]:
    """Its scales are half a power of two, 2^(s - 128): float16's own exponents are read."""
    codes, half_scales = _q4(tiles)
    _, exponents = torch.frexp(half_scales.float())  # 2^e = 0.5 * 2^(e + 1)
    return [codes, torch.where(half_scales == 0, 0, exponents - 1 + 128).to(torch.uint8)]


def _iq4nl(tiles: Tensor) -> list[Tensor]:
    return [_uneven(_nibble_codes(tiles[:, :, 64:])), _per_lane(tiles[:, :, :64], torch.float16)]


def _fives(lines: Tensor) -> Tensor:
    """Lines of nibbles and one of bits, for each of two groups of 32 columns, as int8 codes below 32."""
    tiles, groups, _ = lines.shape
    halves = lines.reshape(tiles, groups * 2, 320)
    codes = _nibble_codes(halves[:, :, :256]) | _spread_bits(halves[:, :, 256:], 1) << 4
    return codes.reshape(tiles, groups, 2, TILE, 32).transpose(2, 3).flatten(3).view(torch.int8)


def _q5(tiles: Tensor) -> list[Tensor]:
    return [_fives(tiles[:, :, 64:]) - 16, _per_lane(tiles[:, :, :64], torch.float16)]


def _q5m(tiles: Tensor) -> list[Tensor]:
    scales, minima = (_per_lane(tiles[:, :, at : at + 64], torch.float16) for at in (0, 64))
    return [_fives(tiles[:, :, 128:]), scales, minima]


def _uneven(codes: Tensor) -> Tensor:
    """The int8 numbers that codes of IQ4_NL and IQ4_XS stand for."""
    return tensor(FOUR_BIT_VALUES.astype(np.int8)).to(codes.device)[codes.long()]


# Blocks of 256 -------------------------------------------------------------------------------------------------------


def _block_fields(
    tiles: Tensor, per_run: tuple[int, ...], line_bytes: int
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """A block's parts: d and dmin, its bytes a run of columns as often as ``per_run`` says, and lines of codes.

    Returns:
        ([d, dmin] (tiles, blocks, 16, 1) float16, each field (tiles, blocks, 16, runs) uint8,
        (tiles, blocks * 8, line_bytes): the lines of every group of 32 columns).
    """
    halves = _per_lane(tiles[:, :, :64], torch.float16)
    fields, at = [], 64
    for runs in per_run:
        fields.append(_per_lane(tiles[:, :, at : at + TILE * runs], torch.uint8))
        at += TILE * runs
    lines = tiles[:, :, at:].reshape(len(tiles), -1, line_bytes)
    return [halves[..., :1], halves[..., 1:]], fields, lines


def _whole_blocks(codes: Tensor) -> Tensor:
    """(tiles, blocks * 8, 16, 32) -> (tiles, blocks, 16, 256)."""
    tiles, groups, lanes, _ = codes.shape
    return codes.reshape(tiles, groups // 8, 8, lanes, 32).transpose(2, 3).flatten(3)


def _below_zero(minima: Tensor) -> Tensor:
    """Minima of 32 columns are stored below 0, as what is added."""
    return -minima.view(torch.int8)


def _twice(runs: Tensor) -> Tensor:
    """A number of 32 columns as those of 16."""
    return runs.repeat_interleave(2, dim=3)


def _q4k(tiles: Tensor) -> list[Tensor]:
    by, (scales, minima), lines = _block_fields(tiles, (8, 8), 256)
    return [_paired(_whole_blocks(_nibble_codes(lines))), scales, _below_zero(minima).view(torch.uint8), *by]


def _q5k(tiles: Tensor) -> list[Tensor]:
    by, (scales, minima), lines = _block_fields(tiles, (8, 8), 320)
    codes = _nibble_codes(lines[:, :, :256]) | _spread_bits(lines[:, :, 256:], 1) << 4
    spread = _twice(scales.view(torch.int8)), _twice(_below_zero(minima))
    return [_whole_blocks(codes).view(torch.int8), *spread, *by]


def _q2k(tiles: Tensor) -> list[Tensor]:
    by, (both,), lines = _block_fields(tiles, (16,), 128)
    parts = (both & 15).view(torch.int8), (both >> 4).view(torch.int8)
    return [_whole_blocks(_spread_bits(lines, 2)).view(torch.int8), *parts, *by]


def _q3k(tiles: Tensor) -> list[Tensor]:
    (d, _), (scales,), lines = _block_fields(tiles, (16,), 192)
    codes = _spread_bits(lines[:, :, :128], 2) | _spread_bits(lines[:, :, 128:], 1) << 2
    return [_whole_blocks(codes).view(torch.int8) - 4, scales.view(torch.int8), d]


def _q6k(tiles: Tensor) -> list[Tensor]:
    (d, _), (scales,), lines = _block_fields(tiles, (16,), 384)
    codes = _nibble_codes(lines[:, :, :256]) | _spread_bits(lines[:, :, 256:], 2) << 4
    return [_whole_blocks(codes).view(torch.int8) - 32, scales.view(torch.int8), d]


def _iq4xs(tiles: Tensor) -> list[Tensor]:
    (d, _), (scales,), lines = _block_fields(tiles, (8,), 256)
    return [_uneven(_whole_blocks(_nibble_codes(lines))), _twice(scales.view(torch.int8)), d]


_FROM_TILES: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "q8": _q8,
    "iq4nl": _iq4nl,
    "q5": _q5,
    "q5m": _q5m,
    "q4": _q4,
    "q4m": _q4m,
    "mx4": _mx4,
    "q4k": _q4k,
    "q2k": _q2k,
    "q3k": _q3k,
    "q5k": _q5k,
    "q6k": _q6k,
    "iq4xs": _iq4xs,
}
"""Packed format -> its tiles (tiles, groups, bytes) as planes (tiles, groups, 16, n), in ``GroupedWeight``'s order."""
