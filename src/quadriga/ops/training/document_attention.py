"""Causal attention within packed documents, in blocks of queries.

    for every document, for every block of 128 queries:
        S = scale q k^T  over the keys up to the block's end        (G * 128, keys), G queries heads a key head
        P = softmax(cap(S) + alibi + mask);   out = P v

Keys past the block and other documents are never touched, so the work is that of the causal triangle of each document.
Nothing but q, k and v is kept for the backward pass, which computes P again: torch's softmax costs less here than
reading the stored matrix would. A block's scores fit a processor's second-level cache up to some thousand keys.
torch's fused CPU kernel reaches half this speed at 512 tokens, knows no documents and no soft cap.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_QUERIES = 128


def document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Sequence[int],
    *,
    scale: float,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention of each document with itself; see ``ops.attention`` for the formula.

    Args:
        q: (N, H, d). k, v: (N, K, d).
        bounds: document i is tokens [bounds[i], bounds[i + 1]); they cover all N.
        alibi_slopes: (H,) float32.

    Returns:
        (N, H, d).
    """
    assert bounds[0] == 0 and bounds[-1] == q.shape[0], "documents cover every token"
    out: Tensor = _DocumentAttention.apply(q, k, v, bounds, scale, soft_cap, alibi_slopes)  # type: ignore[no-untyped-call]
    return out


class _Scores:
    """One layer's q, k, v laid out by key head, and the probabilities of any block of them."""

    def __init__(self, q: Tensor, k: Tensor, scale: float, soft_cap: float | None, alibi_slopes: Tensor | None) -> None:
        n, n_heads, d = q.shape
        self.n_kv_heads = k.shape[1]
        self.group = n_heads // self.n_kv_heads
        # (K, N, G, d): the rows of a key head's queries lie together, so a block is one matrix.
        self.q = q.reshape(n, self.n_kv_heads, self.group, d).transpose(0, 1) * scale
        self.k = k.transpose(0, 1).contiguous()  # (K, N, d)
        self.soft_cap = soft_cap
        self.slopes = None
        if alibi_slopes is not None:
            self.slopes = alibi_slopes.to(_wide(q.dtype)).view(self.n_kv_heads, 1, self.group, 1)
        mask = torch.full((_QUERIES, _QUERIES), float("-inf"), dtype=_wide(q.dtype), device=q.device).triu(1)
        self.mask = mask[:, None, :]  # (queries, 1, keys)

    def rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        """A block of a (K, N, G, d) tensor as (K, queries * G, d)."""
        return x[:, start:stop].reshape(self.n_kv_heads, -1, x.shape[-1])

    def probabilities(self, first: int, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Softmax of queries [start, stop) over keys [first, stop), and tanh of the capped scores: (K, Q G, keys)."""
        queries = self.rows(self.q, start, stop)
        scores = torch.bmm(queries, self.k[:, first:stop].transpose(1, 2))
        scores = scores.to(_wide(scores.dtype))
        tanh = None
        if self.soft_cap is not None:
            tanh = torch.tanh(scores / self.soft_cap)
            scores = tanh * self.soft_cap
        by_query = scores.view(self.n_kv_heads, stop - start, self.group, stop - first)
        if self.slopes is not None:
            keys = torch.arange(first, stop, device=scores.device)
            distance = (keys - torch.arange(start, stop, device=scores.device)[:, None]).to(scores.dtype)
            by_query.add_(self.slopes * distance[:, None, :])
        by_query[..., start - first :].add_(self.mask[: stop - start, :, : stop - start])
        torch.softmax(scores, dim=-1, out=scores)
        return scores, tanh


def _blocks(bounds: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(the document's first token, first query, end of the block) of every block."""
    for first, last in itertools.pairwise(bounds):
        for start in range(first, last, _QUERIES):
            yield first, start, min(start + _QUERIES, last)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bounds: Sequence[int],
        scale: float,
        soft_cap: float | None,
        alibi_slopes: Tensor | None,
    ) -> Tensor:
        scores = _Scores(q, k, scale, soft_cap, alibi_slopes)
        values = v.transpose(0, 1).contiguous()  # (K, N, d)
        out = torch.empty_like(scores.q)
        for first, start, stop in _blocks(bounds):
            p, _ = scores.probabilities(first, start, stop)
            mixed = torch.bmm(p.to(v.dtype), values[:, first:stop])
            out[:, start:stop] = mixed.view(scores.n_kv_heads, stop - start, scores.group, -1)
        ctx.save_for_backward(q, k, v, alibi_slopes)
        ctx.bounds, ctx.scale, ctx.soft_cap = bounds, scale, soft_cap
        return out.transpose(0, 1).reshape(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, alibi_slopes = ctx.saved_tensors
        scores = _Scores(q, k, ctx.scale, ctx.soft_cap, alibi_slopes)
        values = v.transpose(0, 1).contiguous()
        by_head = d_out.reshape(len(q), scores.n_kv_heads, scores.group, -1).transpose(0, 1).contiguous()
        dq, dk, dv = torch.empty_like(scores.q), torch.zeros_like(scores.k), torch.zeros_like(values)
        for first, start, stop in _blocks(ctx.bounds):
            p, tanh = scores.probabilities(first, start, stop)
            d_rows = scores.rows(by_head, start, stop)
            dp = torch.bmm(d_rows, values[:, first:stop].transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp.to(p.dtype), p, -1, p.dtype)
            if tanh is not None:
                ds.mul_(1 - tanh.square_())
            ds = ds.to(q.dtype)
            mixed = torch.bmm(ds, scores.k[:, first:stop])
            dq[:, start:stop] = mixed.view(scores.n_kv_heads, stop - start, scores.group, -1)
            dk[:, first:stop].baddbmm_(ds.transpose(1, 2), scores.rows(scores.q, start, stop))
            dv[:, first:stop].baddbmm_(p.to(v.dtype).transpose(1, 2), d_rows)
        dq = dq.transpose(0, 1).reshape(q.shape) * ctx.scale
        return dq, dk.transpose(0, 1), dv.transpose(0, 1), None, None, None, None
