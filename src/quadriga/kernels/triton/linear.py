"""Rows times a matrix, or times one matrix a head: x W^T + b, for projections, W_Kb and W_Vb, and the head.

A matrix of numbers has its own kernel here; planes of a quantised format are multiplied as those of the one expert that
has all rows (``grouped``), one launch for each run of rows of one format.

The kernel's tile is 64 rows high whatever the number of rows: wgmma's own height, and a batch of one pays for it in
arithmetic alone, which waits for the weights anyway. So the same instructions add up a row's products in the same
order, alone or in a crowd.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadriga.kernels.triton.arithmetic import product
from quadriga.kernels.triton.grouped import grouped_product
from quadriga.kernels.triton.launch import launch
from quadriga.kernels.triton.weights import GroupedWeight

Matrix = Tensor | GroupedWeight | tuple[GroupedWeight, ...]
"""Numbers (out, in); planes (1, out, in); or runs of rows of such planes, one below the other, of several formats."""

ROWS, COLUMNS, DEPTH = 64, 64, 64
"""A tile of the result, and how many products are added to it at a time."""


@triton.jit
def linear_kernel(
    x, x_row, x_head, places, weight, bias, y, y_row, y_head, n_rows, n_out, n_in, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A program is a tile of y (N, H, out): x (N, H, in), or rows of it at ``places``; weight (H, out, in)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outs = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    head = tl.program_id(2).to(tl.int64)
    row_in, out_in = rows < n_rows, outs < n_out
    source = rows.to(tl.int64)
    if places is not None:
        source = tl.load(places + rows, mask=row_in, other=0).to(tl.int64)
    left = x + source[:, None] * x_row + head * x_head
    matrix = weight + head * n_out * n_in + outs[None, :].to(tl.int64) * n_in
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, n_in, DEPTH):
        k = start + tl.arange(0, DEPTH)
        a = tl.load(left + k[None, :], mask=row_in[:, None] & (k < n_in)[None, :], other=0.0)
        b = tl.load(matrix + k[:, None], mask=(k < n_in)[:, None] & out_in[None, :], other=0.0)
        total = product(a, b, total)
    if bias is not None:
        total += tl.load(bias + head * n_out + outs, mask=out_in, other=0.0).to(tl.float32)[None, :]
    target = y + rows[:, None].to(tl.int64) * y_row + head * y_head + outs[None, :]
    tl.store(target, (total * scale).to(y.dtype.element_ty), mask=row_in[:, None] & out_in[None, :])


def linear(
    x: Tensor,
    weight: Matrix,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """scale * (x W^T + b).

    Args:
        x: (N, in). weight: (out, in), where it is numbers of the same dtype. bias: (out,).
        rows: (R,) int32, the rows of x that are multiplied; None: all.
        dtype: of the result; None: x's.

    Returns:
        (N or R, out).
    """
    n = len(x) if rows is None else len(rows)
    if isinstance(weight, Tensor):
        y = torch.empty(n, len(weight), dtype=dtype or x.dtype, device=x.device)
        _launch(x[:, None], weight[None], bias, rows, y[:, None], scale)
        return y
    pieces, first = (weight,) if isinstance(weight, GroupedWeight) else weight, 0
    y = torch.empty(n, sum(piece.rows for piece in pieces), dtype=dtype or x.dtype, device=x.device)
    for piece in pieces:
        own = slice(first, first + piece.rows)
        grouped_product(x, piece, bias=None if bias is None else bias[None, own], order=rows, out=y[:, own])
        first += piece.rows
    return y if scale == 1.0 else y.mul_(scale)


def head_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Every head's numbers times its own matrix.

    Args:
        x: (N, H, in), of any strides but the last. weight: (H, out, in) of the same dtype.
        out: (N, H, out), written; of any strides but the last.
    """
    _launch(x, weight, None, None, out, 1.0)


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, y: Tensor, scale: float) -> None:
    n, (n_heads, n_out, n_in) = len(y), weight.shape
    assert x.stride(2) == y.stride(2) == 1 and weight.is_contiguous(), "the numbers of a row lie side by side"
    assert x.dtype == weight.dtype, f"rows of {x.dtype} meet weights of {weight.dtype}"
    grid = (triton.cdiv(n, ROWS), triton.cdiv(n_out, COLUMNS), n_heads)
    launch(
        linear_kernel, grid, x, x.stride(0), x.stride(1), rows, weight, bias, y, y.stride(0), y.stride(1), n, n_out,
        n_in, scale, warps=4, stages=4, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH,
    )  # fmt: skip
