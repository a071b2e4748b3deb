"""What the chosen experts said, added up: out[n] = sum_j weights[n, j] * rows[home[n, j]], j = 0..k-1 in this order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadriga.kernels.triton.launch import launch


@triton.jit
def combine_kernel(rows, home, weights, base, out, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """A program is a token and BLOCK of its columns: rows (R, D), home and weights (N, k), base and out (N, D)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in tl.static_range(TOP_K):
        row = tl.load(home + token * TOP_K + j).to(tl.int64)
        share = tl.load(weights + token * TOP_K + j).to(tl.float32)
        total += share * tl.load(rows + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if base is not None:
        total += tl.load(base + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=inside)


def combine(rows: Tensor, home: Tensor, weights: Tensor, base: Tensor | None = None) -> Tensor:
    """The weighted sum of every token's rows, summed in float32 and rounded once, after ``base`` is added if given.

    Args:
        rows: (R, D), contiguous.
        home: (N, k) int32, where each slot's row is.
        weights: (N, k) float32.
        base: (N, D), what the sum is added to: the residual stream, or a shared network's output.

    Returns:
        (N, D) in the rows' dtype.
    """
    n_tokens, top_k = home.shape
    width = rows.shape[1]
    out = torch.empty((n_tokens, width), dtype=rows.dtype, device=rows.device)
    block = min(1024, triton.next_power_of_2(width))
    grid = (n_tokens, triton.cdiv(width, block))
    launch(combine_kernel, grid, rows, home, weights, base, out, width, warps=4, TOP_K=top_k, BLOCK=block)
    return out
