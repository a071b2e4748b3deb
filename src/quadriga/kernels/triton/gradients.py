"""Grouped products with gradients, for training: dX by the forward pass's own kernel, dW by one that sums over rows.

dX[r] = W_e^T dY[r]               the rows' product with the transposed matrix, read by columns
dW[e] = sum over rows r of e of dY[r] X[r]^T        in the order of the rows; zeros for an expert without any
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from quadriga.kernels.triton.arithmetic import product
from quadriga.kernels.triton.grouped import grouped_product
from quadriga.kernels.triton.launch import launch
from quadriga.kernels.triton.weights import plain

_OUTPUTS, _COLUMNS, _ROWS = 128, 128, 64
"""What one program of dW computes, and the rows it takes a step."""


@triton.jit
def weight_gradient_kernel(
    dy, x, starts, dw, n_outputs, n_columns,
    OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A program is a tile (OUTPUTS, COLUMNS) of one expert: dy (R, M), x (R, K) -> dw (E, M, K)."""
    tiles = tl.cdiv(n_columns, COLUMNS)
    output = tl.program_id(0) // tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.program_id(1)
    end = tl.load(starts + expert + 1)
    total = tl.zeros((OUTPUTS, COLUMNS), dtype=tl.float32)
    for first in range(tl.load(starts + expert), end, ROWS):
        row = first + tl.arange(0, ROWS)
        here = row.to(tl.int64)
        left, right = (row < end)[None, :], (row < end)[:, None]
        if not EVEN:
            left, right = left & (output < n_outputs)[:, None], right & (column < n_columns)[None, :]
        a = tl.load(dy + here[None, :] * n_outputs + output[:, None], left, 0.0)
        b = tl.load(x + here[:, None] * n_columns + column[None, :], right, 0.0)
        total = product(a, b, total)
    where = (expert.to(tl.int64) * n_outputs + output[:, None]) * n_columns + column[None, :]
    kept = (output < n_outputs)[:, None] & (column < n_columns)[None, :]
    tl.store(dw + where, total.to(dw.dtype.element_ty), kept)


def weight_gradient(dy: Tensor, x: Tensor, starts: Tensor) -> Tensor:
    """dW (E, M, K) in x's dtype from dy (R, M) and x (R, K), rows sorted by expert; starts (E + 1,) int32."""
    n_outputs, n_columns, n_experts = dy.shape[1], x.shape[1], len(starts) - 1
    dw = torch.empty(n_experts, n_outputs, n_columns, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(n_outputs, _OUTPUTS) * triton.cdiv(n_columns, _COLUMNS), n_experts)
    launch(
        weight_gradient_kernel, grid, dy.contiguous(), x.contiguous(), starts, dw, n_outputs, n_columns,
        warps=8, stages=3, OUTPUTS=_OUTPUTS, COLUMNS=_COLUMNS, ROWS=_ROWS,
        EVEN=n_outputs % _OUTPUTS == 0 and n_columns % _COLUMNS == 0,
    )  # fmt: skip
    return dw


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, starts)
        return grouped_product(rows, plain(weight), starts=starts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight, starts = ctx.saved_tensors
        d_rows, d_weight, _ = ctx.needs_input_grad
        return (
            grouped_product(dy, plain(weight), starts=starts, transposed=True) if d_rows else None,
            weight_gradient(dy, rows, starts) if d_weight else None,
            None,
        )


def _linear(rows: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
    out: Tensor = _GroupedLinear.apply(rows, weight, starts)
    return out


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """``ops.grouped_linear``."""
    return _linear(rows, weight, F.pad(counts.cumsum(0), (1, 0)).to(torch.int32))
