"""The residual stream and its norms: one kernel adds what a branch made to the stream and norms the sum.

    branch (N, D), or the rows of chosen experts with their weights (N, k)      [+ share * shared network's output]
        [-> post norm] -> h += residual_scale * branch -> x = norm(h)

A program is one row, so no row knows its neighbours. Statistics and sums are float32, and h and x are rounded once,
when they are stored; torch's path rounds every step of the sum to the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadriga.kernels.triton.launch import launch


@dataclass(frozen=True)
class NormWeights:
    """A norm's numbers: weight (D,) as it multiplies (1 added where it is stored less one), and what kind it is."""

    weight: Tensor
    kind: str
    """layer or rms."""
    eps: float
    bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What the chosen experts made of N tokens, not yet summed; see ``combine``."""

    rows: Tensor
    """(R, D)"""
    home: Tensor
    """(N, k) int32, where each slot's row is."""
    weights: Tensor
    """(N, k) float32, added up in this order."""
    shared: Tensor | None = None
    """(N, D), of the network that every token visits."""
    share: Tensor | None = None
    """(N,) what it is multiplied by; None: 1."""


@triton.jit
def normed(x, inside, weight, bias, columns, width, eps, LAYER: tl.constexpr):
    """A row (BLOCK,) float32, zeros outside, normed."""
    if LAYER:
        x = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)
    y = x / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    y *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def norm_kernel(x, stride, weight, bias, out, width, eps, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """A program is a row: x (N, D), ``stride`` numbers from row to row, out (N, D)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    y = normed(values, inside, weight, bias, columns, width, eps, LAYER)
    tl.store(out + row * width + columns, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_norm_kernel(
    h, branch, home, weights, shared, share, out, width, scale,
    post_weight, post_bias, post_eps, weight, bias, eps,
    TOP_K: tl.constexpr, POST_LAYER: tl.constexpr, LAYER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program is a row of h (N, D); branch (N, D), or (R, D) with home and weights (N, k)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    if home is None:
        made = tl.load(branch + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        made = tl.zeros((BLOCK,), tl.float32)
        for j in tl.static_range(TOP_K):
            place = tl.load(home + row * TOP_K + j).to(tl.int64)
            one = tl.load(branch + place * width + columns, mask=inside, other=0.0).to(tl.float32)
            made += tl.load(weights + row * TOP_K + j).to(tl.float32) * one
    if shared is not None:
        every = tl.load(shared + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        if share is not None:
            every *= tl.load(share + row).to(tl.float32)
        made += every
    if post_weight is not None:
        made = normed(made, inside, post_weight, post_bias, columns, width, post_eps, POST_LAYER)
    stream = tl.load(h + row * width + columns, mask=inside, other=0.0).to(tl.float32) + scale * made
    rounded = stream.to(h.dtype.element_ty)
    tl.store(h + row * width + columns, rounded, mask=inside)
    if weight is not None:  # of the rounded numbers: whoever norms h later gets the same
        y = normed(rounded.to(tl.float32), inside, weight, bias, columns, width, eps, LAYER)
        tl.store(out + row * width + columns, y.to(out.dtype.element_ty), mask=inside)


def norm(x: Tensor, weights: NormWeights) -> Tensor:
    """LayerNorm or RMSNorm of rows; ``ops.norm``.

    Args:
        x: (N, D), whose rows may lie further apart than D.

    Returns:
        (N, D) in x's dtype.
    """
    n, d = x.shape
    assert x.stride(1) == 1, "the numbers of a row lie side by side"
    out = torch.empty((n, d), dtype=x.dtype, device=x.device)
    block, warps = _tile(d)
    launch(
        norm_kernel, (n,), x, x.stride(0), weights.weight, weights.bias, out, d, weights.eps,
        warps=warps, LAYER=weights.kind == "layer", BLOCK=block,
    )  # fmt: skip
    return out


def add_norm(
    h: Tensor,
    branch: Tensor | Chosen,
    *,
    scale: float = 1.0,
    post: NormWeights | None = None,
    then: NormWeights | None = None,
) -> Tensor:
    """h += scale * branch in place, the branch normed by ``post`` first if given; then the sum normed by ``then``.

    Args:
        h: (N, D), the residual stream, changed.
        branch: (N, D), or rows of experts that are to be summed.

    Returns:
        (N, D) in h's dtype: norm(h), or h itself where no norm follows.
    """
    n, d = h.shape
    out = h if then is None else torch.empty_like(h)
    block, warps = _tile(d)
    made: tuple[Tensor | None, ...]
    if isinstance(branch, Chosen):
        made = (branch.rows, branch.home, branch.weights, branch.shared, branch.share)
        top_k = branch.home.shape[1]
    else:
        made, top_k = (branch, None, None, None, None), 0
    launch(
        add_norm_kernel, (n,), h, *made, out, d, scale, *_numbers(post), *_numbers(then),
        warps=warps, TOP_K=top_k, POST_LAYER=_is_layer(post), LAYER=_is_layer(then), BLOCK=block,
    )  # fmt: skip
    return out


def _numbers(norm: NormWeights | None) -> tuple[Tensor | None, Tensor | None, float]:
    return (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)


def _is_layer(norm: NormWeights | None) -> bool:
    return norm is not None and norm.kind == "layer"


def _tile(width: int) -> tuple[int, int]:
    """A row's tile, and the warps that share it; both depend on the width alone."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 256))
