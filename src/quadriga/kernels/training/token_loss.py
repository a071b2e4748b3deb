"""Head and cross-entropy together, so that logits are computed for only a few hundred tokens at a time.

    loss[n] = logsumexp(z) - z[target],   z = logit_scale * W h[n]        d loss / d z = softmax(z) - onehot(target)

For 4096 tokens and a vocabulary of 100k the logits and their gradient would take 3 GB. Three functions:

    linear_cross_entropy   the weighted sum over tokens. The gradient is computed together with the loss, while a
                           chunk's logits are in cache: three products in total.
    token_losses           the loss of each token, for objectives that are not a weighted sum (preference tuning).
                           The backward pass recomputes the logits: four products.
    capped_losses          the same of logits behind a soft cap.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from quadriga.kernels.training import fused

IGNORE = -100
_ROWS, _LOGITS_BYTES = 1024, 128 << 20
"""Most tokens and bytes of logits per chunk; not smaller, as each chunk reads and writes the whole weight gradient."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of weights[n] * loss[n] over the tokens whose target is not IGNORE.

    Args:
        hidden: (N, D), after the last norm.
        weight: (V, D), the head, of the same dtype.
        targets: (N,) int64.
        weights: (N,) float32; None: all 1.
        kept: (M,) int64 indices of the tokens whose target is not IGNORE; None: they are looked for, for which the host
            waits.

    Returns:
        (sum, losses): the sum in float32 (float64 for float64), with a gradient for ``hidden`` and ``weight``; and each
            token's unweighted loss (N,), detached, 0 at IGNORE.
    """
    out: tuple[Tensor, Tensor] = _Sum.apply(hidden, weight, targets, weights, logit_scale, kept)  # type: ignore[no-untyped-call]
    return out


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, *, logit_scale: float = 1.0) -> Tensor:
    """The loss of each token (N,) with a gradient, 0 where the target is IGNORE; arguments as above."""
    out: Tensor = _Each.apply(hidden, weight, targets, logit_scale)  # type: ignore[no-untyped-call]
    return out


def capped_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    cap: float,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    kept: Tensor | None = None,
) -> Tensor:
    """:func:`token_losses` of logits cap * tanh(scale * W h / cap) / temperature, in torch's own operations.

    Logits are computed for some hundred tokens at a time, and again in the backward pass.
    """

    def of(h: Tensor, chosen: Tensor, head: Tensor) -> Tensor:
        logits = (h @ head.t()).to(fused.wide(h.dtype)) * logit_scale
        return F.cross_entropy(cap * torch.tanh(logits / cap) / temperature, chosen, reduction="none")

    parts = list(_chunks(targets, weight, kept))
    losses = torch.cat([checkpoint(of, hidden[part], targets[part], weight, use_reentrant=False) for part in parts])
    return torch.zeros(len(targets), dtype=losses.dtype, device=losses.device).index_copy(0, torch.cat(parts), losses)


def _chunks(targets: Tensor, weight: Tensor, kept: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the indices of tokens with a target, in chunks; ``kept``: all of them, if they are known."""
    if kept is None:
        kept = (targets != IGNORE).nonzero()[:, 0]
    yield from torch.split(kept, max(32, min(_ROWS, _LOGITS_BYTES // weight[:, 0].nbytes)))


def _logits(h: Tensor, weight: Tensor, work: Tensor | None) -> Tensor:
    """A chunk's logits (C, V), written to ``work`` if it is given."""
    return torch.mm(h, weight.t(), out=None if work is None else work[: len(h)])


def _backward(d_logits: Tensor, h: Tensor, weight: Tensor, scale: Tensor | float, d_weight: Tensor | None) -> Tensor:
    """Return the gradient of h (C, D) and accumulate that of the weight, given that of the scaled logits.

    ``scale`` multiplies both; (C, 1) or a number.
    """
    if d_weight is not None:
        d_weight.addmm_(d_logits.t(), (h * scale).to(h.dtype))
    return (d_logits @ weight) * scale


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        logit_scale: float,
        all_kept: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        wide = fused.wide(hidden.dtype)
        losses = torch.zeros(len(targets), dtype=wide, device=hidden.device)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        need_h, need_w = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden) if need_h or need_w else None
        d_weight = torch.zeros_like(weight) if need_w else None
        work = None
        for kept in _chunks(targets, weight, all_kept):
            h, target = hidden[kept], targets[kept]
            work = logits = _logits(h, weight, work)
            chunk = fused.cross_entropy(logits, target, logit_scale, gradient=d_hidden is not None)
            losses[kept] = chunk
            scale: Tensor | float = logit_scale
            if weights is not None:
                chunk_weights = weights[kept].to(wide)
                scale = (chunk_weights * logit_scale)[:, None]
                chunk = chunk * chunk_weights
            total += chunk.sum()
            if d_hidden is not None:
                d_hidden[kept] = _backward(logits, h, weight, scale, d_weight).to(hidden.dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            d_hidden * d_total if ctx.needs_input_grad[0] else None,
            d_weight * d_total if ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
            None,
        )


class _Each(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, logit_scale: float) -> Tensor:
        wide = fused.wide(hidden.dtype)
        losses = torch.zeros(len(targets), dtype=wide, device=hidden.device)
        for kept in _chunks(targets, weight):
            logits = _logits(hidden[kept], weight, None)
            losses[kept] = fused.cross_entropy(logits, targets[kept], logit_scale, gradient=False)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.logit_scale = logit_scale
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for kept in _chunks(targets, weight):
            h, target = hidden[kept], targets[kept]
            logits = _logits(h, weight, None)
            fused.cross_entropy(logits, target, ctx.logit_scale, gradient=True)
            scale = (d_losses[kept] * ctx.logit_scale)[:, None]
            d_hidden[kept] = _backward(logits, h, weight, scale, d_weight).to(hidden.dtype)
        return d_hidden, d_weight, None, None
