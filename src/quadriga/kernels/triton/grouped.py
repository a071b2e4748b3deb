"""Rows sorted by expert times their experts' matrices, unpacked in the tile: one kernel for all that experts multiply.

    out[r] = act(w_gate_e x_r + b) * (w_up_e x_r + b)        gate and up in one launch, their product never in memory
    out[r] = w_e x_r + b (+ base)                            down; with one expert a dense matrix

A program computes W X^T: the weights are the product's left side, which a tensor core reads from registers, so
numbers that were just unpacked need no way through shared memory, and few tokens fill its narrow side. Programs of the
same weights are neighbours: while one expert's tile is in L2, all its rows pass.

Which expert a tile belongs to is found on the device, from the rows' ``starts``: the grid depends on shapes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadriga.kernels.triton.arithmetic import gated, product
from quadriga.kernels.triton.dequantise import e4m3, numbers, numbers_of_blocks, numbers_of_bytes, scales_of_64
from quadriga.kernels.triton.launch import launch
from quadriga.kernels.triton.tiles import Tile, tile
from quadriga.kernels.triton.weights import NIBBLES, GroupedWeight

_SWIZZLE = 8
"""Tiles of weights that pass the same rows before the next ones come."""


@triton.jit
def tile_of(index, starts, n_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """(expert, first row, end of its rows) of the index-th tile of rows; expert >= n_experts: there is none."""
    expert = tl.arange(0, EXPERTS)
    first = tl.load(starts + expert, expert < n_experts, 0)
    end = tl.load(starts + 1 + expert, expert < n_experts, 0)
    tiles = (end - first + ROWS - 1) // ROWS
    ended = tl.cumsum(tiles, axis=0)
    found = tl.sum((ended <= index).to(tl.int32), axis=0)
    mine = expert == found
    row = tl.sum(tl.where(mine, first + (index - ended + tiles) * ROWS, 0), axis=0)
    return found, row, tl.sum(tl.where(mine, end, 0), axis=0)


@triton.jit
def _columns_of_x(x, row, column, depth, EVEN: tl.constexpr):
    """(columns, rows) of x (., depth), 0 beyond its depth."""
    where = row[None, :] * depth + column[:, None]
    if EVEN:
        values = tl.load(x + where)
    else:
        values = tl.load(x + where, (column < depth)[:, None], 0.0)
    return values


@triton.jit
def _add_plain(
    total, x, codes, scales, minima, d, dmin, row, output, first, depth, n_groups, stride_output, stride_column,
    FORMAT: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """total (outputs, rows) + W x, of weights with a code a column, x (DEPTH, rows) from column ``first`` on.

    ``row`` counts over all experts' outputs, ``output`` over this one's, whose codes begin at ``codes``.
    """
    column = first + tl.arange(0, DEPTH)
    where = codes + output[:, None] * stride_output + column[None, :] * stride_column
    if EVEN:
        q = tl.load(where)
    else:
        q = tl.load(where, (column < depth)[None, :], 0.0 if FORMAT == "plain" else 0)
    if FORMAT == "fp8":
        w = e4m3(q) * tl.load(scales + row * n_groups + first // 128)[:, None]
    elif FORMAT == "q8" or FORMAT == "q8m":
        w = numbers_of_bytes(q, scales, minima, row, first, n_groups, FORMAT)
    elif FORMAT == "k8" or FORMAT == "k8m":
        w = numbers_of_blocks(q, scales, minima, d, dmin, row, first, n_groups, FORMAT, DEPTH)
    else:
        w = q
    return product(w.to(x.dtype), x, total)


@triton.jit
def _add_nibbles(
    total, x_low, x_high, codes, scales, minima, d, dmin, row, first, n_bytes, n_groups,
    FORMAT: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """total (outputs, rows) + W x, of nibbles: x's columns that low halves meet, and those that high ones do."""
    tl.static_assert(DEPTH == 64, "two groups of columns a step")
    byte = first // 2 + tl.arange(0, 32)
    where = codes + row[:, None] * n_bytes + byte[None, :]
    if EVEN:
        q = tl.load(where)
    else:
        q = tl.load(where, (byte < n_bytes)[None, :], 0)
    low, low_least, high, high_least = scales_of_64(scales, minima, d, dmin, row, first, n_groups, FORMAT)
    total = product(numbers(q & 15, low, low_least, FORMAT).to(x_low.dtype), x_low, total)
    return product(numbers(q >> 4, high, high_least, FORMAT).to(x_high.dtype), x_high, total)


@triton.jit
def _place_of_program(n_outputs, n_tiles, OUTPUTS: tl.constexpr, SWIZZLE: tl.constexpr):
    """(tile of outputs, tile of rows): SWIZZLE tiles of outputs pass the same rows before the next rows come."""
    pid = tl.program_id(0)
    wide = SWIZZLE * n_tiles
    first = pid // wide * SWIZZLE
    beside = tl.minimum(tl.cdiv(n_outputs, OUTPUTS) - first, SWIZZLE)
    return first + pid % wide % beside, pid % wide // beside


@triton.jit
def grouped_kernel(
    x, order, starts, codes, scales, minima, d, dmin, codes_up, scales_up, minima_up, d_up, dmin_up, bias, bias_up,
    base, out, out_row, n_rows, n_outputs, depth, n_codes, n_groups, stride_expert, stride_output, stride_column,
    n_experts, n_tiles,
    TOP_K: tl.constexpr, FORMAT: tl.constexpr, FOUR_BITS: tl.constexpr, ACTIVATION: tl.constexpr, EXPERTS: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, SWIZZLE: tl.constexpr,
):  # fmt: skip
    """A program is OUTPUTS outputs of ROWS rows of one expert.

    x is (N, depth) with ``order`` (row -> slot, of TOP_K a token), else (n_rows, depth). ``starts`` None: one expert
    has all rows. out_row: numbers from a row of ``out`` to the next. n_codes: elements of a row of ``codes``; n_groups:
    of its scales. The strides are those of codes.
    """
    output_tile, index = _place_of_program(n_outputs, n_tiles, OUTPUTS, SWIZZLE)
    expert, first_row, end_row = 0, index * ROWS, n_rows
    if starts is not None:
        expert, first_row, end_row = tile_of(index, starts, n_experts, EXPERTS, ROWS)
    if expert >= n_experts:
        return
    rows = first_row + tl.arange(0, ROWS)
    source = tl.minimum(rows, end_row - 1).to(tl.int64)
    if order is not None:
        source = tl.load(order + source).to(tl.int64) // TOP_K
    outputs = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = tl.minimum(outputs, n_outputs - 1).to(tl.int64)
    weight_row = tl.cast(expert, tl.int64) * n_outputs + inside
    own = tl.cast(expert, tl.int64) * stride_expert
    total = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    total_up = total
    for first in range(0, depth, DEPTH):
        if FOUR_BITS:
            column = first + tl.arange(0, DEPTH // 2)
            x_low = _columns_of_x(x, source, column, depth, EVEN)
            x_high = _columns_of_x(x, source, column + 32, depth, EVEN)
            total = _add_nibbles(
                total, x_low, x_high, codes, scales, minima, d, dmin, weight_row, first, n_codes, n_groups,
                FORMAT, DEPTH, EVEN,
            )  # fmt: skip
            if ACTIVATION is not None:
                total_up = _add_nibbles(
                    total_up, x_low, x_high, codes_up, scales_up, minima_up, d_up, dmin_up, weight_row, first, n_codes,
                    n_groups, FORMAT, DEPTH, EVEN,
                )  # fmt: skip
        else:
            part = _columns_of_x(x, source, first + tl.arange(0, DEPTH), depth, EVEN)
            total = _add_plain(
                total, part, codes + own, scales, minima, d, dmin, weight_row, inside, first, depth, n_groups,
                stride_output, stride_column, FORMAT, DEPTH, EVEN,
            )  # fmt: skip
            if ACTIVATION is not None:
                total_up = _add_plain(
                    total_up, part, codes_up + own, scales_up, minima_up, d_up, dmin_up, weight_row, inside, first,
                    depth, n_groups, stride_output, stride_column, FORMAT, DEPTH, EVEN,
                )  # fmt: skip
    _finish(
        total, total_up, bias, bias_up, base, out, out_row, rows, end_row, outputs, n_outputs, weight_row, ACTIVATION
    )


@triton.jit
def _finish(
    total, total_up, bias, bias_up, base, out, out_row, rows, end_row, outputs, n_outputs, weight_row,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Biases, the activation, what is added; then rounded and stored."""
    if bias is not None:
        total += tl.load(bias + weight_row).to(tl.float32)[:, None]
    if ACTIVATION is not None:
        if bias_up is not None:
            total_up += tl.load(bias_up + weight_row).to(tl.float32)[:, None]
        total = gated(total, total_up, ACTIVATION)
    kept = (rows < end_row)[None, :] & (outputs < n_outputs)[:, None]
    if base is not None:
        total += tl.load(base + rows.to(tl.int64)[None, :] * n_outputs + outputs[:, None], kept, 0.0).to(tl.float32)
    where = rows.to(tl.int64)[None, :] * out_row + outputs[:, None]
    tl.store(out + where, total.to(out.dtype.element_ty), kept)


def grouped_product(
    x: Tensor,
    weight: GroupedWeight,
    *,
    up: GroupedWeight | None = None,
    activation: str | None = None,
    bias: Tensor | None = None,
    bias_up: Tensor | None = None,
    base: Tensor | None = None,
    starts: Tensor | None = None,
    order: Tensor | None = None,
    top_k: int = 1,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rows of expert e times its matrix, for rows that are sorted by expert; gated where there is an ``up``.

    Args:
        x: (R, K), or with ``order`` (N, K), of which row r reads order[r] // top_k.
        weight, up: (E, M, K), of one format.
        activation: of ``ops.gated``; given if and only if ``up`` is.
        bias, bias_up: (E, M).
        base: (R, M), added in float32 before the result is rounded.
        starts: (E + 1,) int32, the first row of each expert; None: one expert has all rows.
        order: (R,) int32, the slot of each row.
        transposed: the plain weight is (E, K, M), and what is multiplied with is its transpose.
        dtype: of the result; None: x's.
        out: (R, M), written; its rows may lie further apart than M. None: new memory.

    Returns:
        (R, M).
    """
    assert (up is None) == (activation is None), "gate and up have an activation between them"
    assert up is None or up.format == weight.format, "gate and up of one format"
    assert starts is not None or weight.n_experts == 1, "several experts' rows are sorted"
    assert not transposed or weight.format == "plain", "only plain weights are read by columns"
    n_rows = len(x) if order is None else len(order)
    depth = x.shape[1]
    n_outputs = weight.codes.shape[2] if transposed else weight.rows
    assert depth == (weight.rows if transposed else weight.columns), "x is as deep as the weights"
    x = x.contiguous()
    if out is None:
        out = torch.empty((n_rows, n_outputs), dtype=dtype or x.dtype, device=x.device)
    assert out.shape == (n_rows, n_outputs) and out.stride(1) == 1, "the numbers of a row lie side by side"
    shape = tile(weight.format, n_rows / weight.n_experts, gated=up is not None)
    n_tiles = _most_tiles(n_rows, weight.n_experts, shape)
    expert, output, column = weight.codes.stride()
    if transposed:
        output, column = column, output
    four_bits = weight.format in NIBBLES
    n_groups = 0 if weight.scales is None else weight.scales.shape[2]
    whole = 2 * weight.codes.shape[2] if four_bits else weight.codes.shape[2]
    launch(
        grouped_kernel, (triton.cdiv(n_outputs, shape.outputs) * n_tiles,),
        x, order, starts, *weight.pairs, *((None,) * 5 if up is None else up.pairs), bias, bias_up, base, out,
        out.stride(0), n_rows, n_outputs, depth, weight.codes.shape[2], n_groups, expert, output, column,
        weight.n_experts, n_tiles,
        warps=shape.warps, stages=shape.stages, TOP_K=top_k, FORMAT=weight.format, FOUR_BITS=four_bits,
        ACTIVATION=activation, EXPERTS=triton.next_power_of_2(weight.n_experts), ROWS=shape.rows, OUTPUTS=shape.outputs,
        DEPTH=shape.depth, EVEN=depth % shape.depth == 0 and (transposed or whole % shape.depth == 0), SWIZZLE=_SWIZZLE,
    )  # fmt: skip
    return out


def _most_tiles(n_rows: int, n_experts: int, shape: Tile) -> int:
    """Tiles of rows that may be needed, however they are spread: each expert that has any may leave one unfilled."""
    return (n_rows + min(n_rows, n_experts) * (shape.rows - 1)) // shape.rows
