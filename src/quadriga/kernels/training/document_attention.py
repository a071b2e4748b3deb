"""Causal attention within packed documents, by blocks of queries.

    for every block of 128 queries, over the keys from its first document's start to the block's end:
        S = scale q k^T               (G * 128, keys), G query heads per key head
        P = softmax(cap(S) + alibi), each query over its own document, or a window of it, up to itself;   out = P v

So the work is the causal triangle of each document, plus the rest of the blocks at its edges. Only q, k and v are saved
for the backward pass, which recomputes P: the softmax costs less than reading a stored matrix. A block's scores fit
into a CPU's L2 cache up to some thousand keys. torch's fused CPU kernel has half the speed at 512 tokens, and supports
neither documents nor a soft cap.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quadriga.kernels.training import fused

_QUERIES = 128
_KEYS = 64


def document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Sequence[int],
    *,
    scale: float,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    first: int = 0,
) -> Tensor:
    """Causal grouped-query attention within each document; see ``ops.attention`` for the formula.

    Sinks are not done here: the softmax between the products knows no logit without a key.

    Args:
        q: (N, H, d), the queries of the tokens from ``first`` on.
        k: (S, K, d). v: (S, K, e), e usually d; of all tokens.
        bounds: document i is tokens [bounds[i], bounds[i + 1]); must cover all S tokens.
        alibi_slopes: (H,) float32.

    Returns:
        (N, H, e).
    """
    assert bounds[0] == 0 and bounds[-1] == len(k) >= first + len(q), "documents cover every token"
    out: Tensor = _DocumentAttention.apply(q, k, v, bounds, scale, soft_cap, alibi_slopes, window, first)  # type: ignore[no-untyped-call]
    return out


class _Scores:
    """One layer's q and k laid out by key head; computes the probabilities of any block."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        bounds: Sequence[int],
        scale: float,
        soft_cap: float | None,
        alibi_slopes: Tensor | None,
        window: int | None,
        first: int,
    ) -> None:
        n, n_heads, d = q.shape
        self.n_kv_heads = k.shape[1]
        self.group = n_heads // self.n_kv_heads
        # (K, N, G, d): the queries of a key head are adjacent, so a block is one matrix.
        self.q = q.reshape(n, self.n_kv_heads, self.group, d).transpose(0, 1) * scale
        self.k = k.transpose(0, 1).contiguous()  # (K, N, d)
        self.soft_cap = soft_cap
        self.slopes = None if alibi_slopes is None else alibi_slopes.float().contiguous()
        lengths = torch.tensor([last - first for first, last in itertools.pairwise(bounds)])
        self.first = first
        # (N,) the first key of each query: the start of its document, or of its window
        self.starts = torch.tensor(bounds[:-1]).repeat_interleave(lengths)[first : first + n]
        if window is not None:
            self.starts = torch.maximum(self.starts, torch.arange(first, first + n) - window + 1)

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor, int]]:
        """Yield (queries, keys, first key of each query's document, index of the key at query 0) for every block.

        Blocks and the first keys of blocks are aligned to a grid, independent of the documents; the keys start at or
        before the first key that the block's first query sees. So few shapes occur, for each of which oneDNN compiles
        once.
        """
        n = len(self.starts)
        for start in range(0, n, _QUERIES):
            stop = min(start + _QUERIES, n)
            key = int(self.starts[start]) // _KEYS * _KEYS
            lows = self.starts[start:stop] - key
            keys = slice(key, self.first + stop)
            yield slice(start, stop), keys, lows.to(self.q.device), self.first + start - key

    def rows(self, x: Tensor, queries: slice) -> Tensor:
        """A block of queries of a (K, N, G, d) tensor, as (K, queries * G, d)."""
        return x[:, queries].reshape(self.n_kv_heads, -1, x.shape[-1])

    def probabilities(self, queries: slice, keys: slice, lows: Tensor, offset: int) -> tuple[Tensor, Tensor | None]:
        """(softmax (K, Q G, keys) of a block, tanh of its scores for the cap's gradient or None)."""
        scores = torch.bmm(self.rows(self.q, queries), self.k[:, keys].transpose(1, 2))
        tanh = None
        if self.soft_cap is not None:
            tanh = torch.tanh(scores / self.soft_cap)
            scores = tanh * self.soft_cap
        fused.windowed_softmax(self.by_query(scores), lows, offset, self.slopes)
        return scores, tanh

    def by_query(self, block: Tensor) -> Tensor:
        """View (K, Q G, keys) as (K, Q, G, keys)."""
        return block.view(self.n_kv_heads, -1, self.group, block.shape[-1])


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
        window: int | None,
        first: int,
    ) -> Tensor:
        scores = _Scores(q, k, bounds, scale, soft_cap, alibi_slopes, window, first)
        values = v.transpose(0, 1).contiguous()  # (K, N, d)
        out = scores.q.new_empty(*scores.q.shape[:-1], v.shape[-1])
        for queries, keys, lows, offset in scores.blocks():
            p, _ = scores.probabilities(queries, keys, lows, offset)
            mixed = torch.bmm(p, values[:, keys])
            out[:, queries] = mixed.view(scores.n_kv_heads, -1, scores.group, mixed.shape[-1])
        ctx.save_for_backward(q, k, v, alibi_slopes)
        ctx.bounds, ctx.scale, ctx.soft_cap, ctx.window, ctx.first = bounds, scale, soft_cap, window, first
        return out.transpose(0, 1).reshape(*q.shape[:-1], v.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, alibi_slopes = ctx.saved_tensors
        scores = _Scores(q, k, ctx.bounds, ctx.scale, ctx.soft_cap, alibi_slopes, ctx.window, ctx.first)
        values = v.transpose(0, 1).contiguous()
        by_head = d_out.reshape(len(q), scores.n_kv_heads, scores.group, -1).transpose(0, 1).contiguous()
        dq, dk, dv = torch.empty_like(scores.q), torch.zeros_like(scores.k), torch.zeros_like(values)
        for queries, keys, lows, offset in scores.blocks():
            p, tanh = scores.probabilities(queries, keys, lows, offset)
            d_rows = scores.rows(by_head, queries)
            ds = torch.bmm(d_rows, values[:, keys].transpose(1, 2))
            dv[:, keys].baddbmm_(p.transpose(1, 2), d_rows)
            fused.windowed_softmax_backward(scores.by_query(p), scores.by_query(ds), lows, offset)
            if tanh is not None:
                ds.mul_(1 - tanh.square_())
            mixed = torch.bmm(ds, scores.k[:, keys])
            dq[:, queries] = mixed.view(scores.n_kv_heads, -1, scores.group, mixed.shape[-1])
            dk[:, keys].baddbmm_(ds.transpose(1, 2), scores.rows(scores.q, queries))
        dq = dq.transpose(0, 1).reshape(q.shape) * ctx.scale
        return dq, dk.transpose(0, 1), dv.transpose(0, 1), None, None, None, None, None, None
