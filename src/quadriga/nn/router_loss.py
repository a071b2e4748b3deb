"""What training adds to the loss so that routers use all their experts.

    hf            E * sum_j sum_e f[j, e] P[e] over the rows of all layers together     perfect balance: k
    megablocks    mean over layers of  E / (T k) * sum_e counts[e] P[e]                 perfect balance: 1
    document      the same of each document's own tokens; mean of documents, by tokens  perfect balance: 1

f[j, e] is the share of rows whose j-th choice is e, counts[e] = T * sum_j f[j, e], P[e] the mean probability. For one
layer the first is k times the second, so the same weight means k times the strength: DBRX's published 0.05 is of the
megablocks form (mosaicml/llm-foundry, databricks/megablocks@78eea65f), transformers applies it in its own. Only P
carries a gradient; f and counts are constants, as in Switch Transformers (Fedus et al. 2021, eq. 4).

A router of sigmoids has the same losses: P is the mean of its scores divided by their sum, which makes the third form
DeepSeek-V3's complementary loss of a sequence (eq. 17-20), for a small weight beside a balancing bias, and the second
one the same over a batch. A network that every token visits is in none.

Probabilities go in once softmaxed. DBRX's first official file softmaxed them a second time inside its loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quadriga.errors import ConfigError
from quadriga.nn.moe import RouterStats

Form = Literal["hf", "megablocks", "document"]


@dataclass(frozen=True)
class Usage:
    """How some tokens used every layer's experts: sums, so the usage of several ranks' tokens is their sum."""

    counts: Tensor
    """(L, E): (token, slot) pairs sent to each expert. No gradient."""
    probs: Tensor
    """(L, E): summed probabilities, differentiable."""
    n_tokens: Tensor
    """Scalar."""

    @classmethod
    def of(cls, stats: Sequence[RouterStats], mask: Tensor | None = None) -> Usage:
        """The usage of one forward pass, without the tokens that ``mask`` (N,) leaves out."""
        assert stats, "a dense model has no router"
        first = stats[0].probs
        kept = torch.ones(len(first), dtype=torch.bool, device=first.device) if mask is None else mask
        counts = torch.stack([_counted(layer.expert_ids, kept, layer.probs.shape[1]) for layer in stats])
        probs = torch.stack([torch.where(kept[:, None], layer.probs, 0.0).sum(0) for layer in stats])
        return cls(counts.to(probs.dtype), probs, kept.sum().to(probs.dtype))


def balance_loss(counts: Tensor, probs: Tensor, n_tokens: Tensor, top_k: int, form: Form) -> Tensor:
    """The balance loss from usage; see the module docstring.

    ``counts`` and ``n_tokens`` belong to all tokens that are balanced together. ``probs`` may be of a part of them, one
    rank's: the loss is linear in it, so what the ranks compute from their own adds up to the loss of the whole.

    Raises:
        ConfigError: an unknown form.
    """
    n_layers, n_experts = counts.shape
    match form:
        case "hf":
            rows = n_layers * n_tokens
            return n_experts * torch.dot(counts.sum(0) / rows, probs.sum(0) / rows)
        case "megablocks":
            return n_experts / (top_k * n_layers) * ((counts / n_tokens) * (probs / n_tokens)).sum()
        case _:
            raise ConfigError(f"the form of the balance loss of a batch must be 'hf' or 'megablocks', got {form!r}")


def document_balance(stats: Sequence[RouterStats], mask: Tensor, bounds: Tensor) -> Tensor:
    """The balance loss of documents, each by its own tokens, summed over tokens: see the module docstring.

    Args:
        stats: one entry per layer.
        mask: (N,) bool, False for tokens that count in nothing.
        bounds: (documents + 1,) integers on the host: document i is tokens [bounds[i], bounds[i + 1]).

    Returns:
        a float32 scalar, to be divided by the number of tokens, differentiable through the probabilities.
    """
    lengths = bounds.diff().long()
    place = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(mask.device)
    n_tokens = lengths.new_zeros(len(lengths), device=mask.device).scatter_add_(0, place, mask.long()).clamp(min=1)
    total = torch.zeros((), device=mask.device)
    for layer in stats:
        n_experts, top_k = layer.probs.shape[1], layer.expert_ids.shape[1]
        slots = place[:, None] * n_experts + layer.expert_ids
        counts = _counted(slots, mask, len(lengths) * n_experts).view(-1, n_experts)
        kept = torch.where(mask[:, None], layer.probs, 0.0)
        probs = kept.new_zeros(counts.shape).index_add_(0, place, kept)
        total = total + n_experts / top_k * ((counts * probs).sum(1) / n_tokens).sum()
    return total / len(stats)


def load_balancing_loss(stats: Sequence[RouterStats], *, form: Form, mask: Tensor | None = None) -> Tensor:
    """The balance loss of one forward pass, unweighted.

    Args:
        stats: one entry per layer, as the Transformer returned them.
        form: "hf" or "megablocks": see the module docstring.
        mask: (N,) bool, False for padding tokens, which count neither in f nor in P.

    Returns:
        a float32 scalar, differentiable through the probabilities; NaN if the mask keeps no token.

    Raises:
        ConfigError: an unknown form.
    """
    usage = Usage.of(stats, mask)
    return balance_loss(usage.counts, usage.probs, usage.n_tokens, stats[0].expert_ids.shape[1], form)


def _counted(ids: Tensor, kept: Tensor, n: int) -> Tensor:
    """(n,) how many of ids (N, k) are each, of the tokens ``kept`` (N,). No row is chosen: hosts would have to wait."""
    counted = kept[:, None].expand_as(ids).reshape(-1).to(ids.dtype)
    return ids.new_zeros(n).scatter_add_(0, ids.reshape(-1), counted)


def router_z_loss(stats: Sequence[RouterStats], *, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(router logits)^2, summed over layers (Zoph et al. 2022, eq. 5), unweighted."""
    assert stats, "a dense model has no router"
    squares = [layer.logits.logsumexp(-1).square() for layer in stats]
    if mask is None:
        return torch.stack([square.mean() for square in squares]).sum()
    return torch.stack([torch.where(mask, square, 0.0).sum() for square in squares]).sum() / mask.sum()
