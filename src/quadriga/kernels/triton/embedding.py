"""Rows of the embedding table, scaled; the table may be of a quantised format, whose rows are unpacked here."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadriga.kernels.triton.dequantise import e4m3, numbers, numbers_of_blocks, numbers_of_bytes, scales_of_64
from quadriga.kernels.triton.launch import launch
from quadriga.kernels.triton.weights import NIBBLES, GroupedWeight

_BLOCK = 1024
"""Numbers of a row that one program copies."""
_GROUP = 64
"""Columns that one program unpacks: those under one word of scales."""


@triton.jit
def embed_kernel(tokens, table, out, width, scale, BLOCK: tl.constexpr):
    """A program is a token and BLOCK of its columns: tokens (N,), table (V, D), out (N, D)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    token = tl.load(tokens + row).to(tl.int64)
    values = tl.load(table + token * width + columns, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _store_columns(out, row, column, width, values):
    """values (1, columns) of one row."""
    where = row[:, None] * width + column[None, :]
    tl.store(out + where, values.to(out.dtype.element_ty), mask=(column < width)[None, :])


@triton.jit
def embed_planes_kernel(
    tokens, codes, scales, minima, d, dmin, out, width, n_codes, n_groups, scale,
    FORMAT: tl.constexpr, FOUR_BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program is a token and GROUP of its columns; planes as ``grouped.grouped_kernel`` has them."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    first = tl.program_id(1) * GROUP
    token = tl.load(tokens + row).to(tl.int64)
    if FOUR_BITS:
        byte = tl.arange(0, GROUP // 2)
        q = tl.load(codes + token[:, None] * n_codes + (first // 2 + byte)[None, :])
        low, low_least, high, high_least = scales_of_64(scales, minima, d, dmin, token, first, n_groups, FORMAT)
        _store_columns(out, row, first + byte, width, numbers(q & 15, low, low_least, FORMAT) * scale)
        _store_columns(out, row, first + GROUP // 2 + byte, width, numbers(q >> 4, high, high_least, FORMAT) * scale)
    else:
        column = first + tl.arange(0, GROUP)
        q = tl.load(codes + token[:, None] * n_codes + column[None, :])
        if FORMAT == "fp8":
            w = e4m3(q) * tl.load(scales + token * n_groups + first // 128)[:, None]
        elif FORMAT == "q8" or FORMAT == "q8m":
            w = numbers_of_bytes(q, scales, minima, token, first, n_groups, FORMAT)
        else:
            w = numbers_of_blocks(q, scales, minima, d, dmin, token, first, n_groups, FORMAT, GROUP)
        _store_columns(out, row, column, width, w * scale)


def embed(
    tokens: Tensor, table: Tensor | GroupedWeight, scale: float = 1.0, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Rows of a table times a number.

    Args:
        tokens: (N,) int32, below V.
        table: (V, D), or planes (1, V, D).
        dtype: of the result; None: the table's, or float32 of planes.

    Returns:
        (N, D).
    """
    n = len(tokens)
    if isinstance(table, GroupedWeight):
        d = table.columns
        out = torch.empty((n, d), dtype=dtype or torch.float32, device=tokens.device)
        assert table.scales is not None, "planes of a quantised format"
        launch(
            embed_planes_kernel, (n, triton.cdiv(d, _GROUP)), tokens, *table.pairs, out, d, table.codes.shape[2],
            table.scales.shape[2], scale, warps=1, FORMAT=table.format, FOUR_BITS=table.format in NIBBLES, GROUP=_GROUP,
        )  # fmt: skip
        return out
    d = table.shape[1]
    out = torch.empty((n, d), dtype=dtype or table.dtype, device=table.device)
    block = min(_BLOCK, triton.next_power_of_2(d))
    launch(embed_kernel, (n, triton.cdiv(d, block)), tokens, table, out, d, scale, BLOCK=block)
    return out
