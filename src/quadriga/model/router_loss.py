"""What training adds to the loss so that routers use all their experts.

    hf            E * sum_j sum_e f[j, e] P[e] over the rows of all layers together     perfect balance: k
    megablocks    mean over layers of  E / (T k) * sum_e counts[e] P[e]                 perfect balance: 1

f[j, e] is the share of rows whose j-th choice is e, counts[e] = T * sum_j f[j, e], P[e] the mean probability. For one
layer the first is k times the second, so the same weight means k times the strength: DBRX's published 0.05 is of the
megablocks form (mosaicml/llm-foundry, databricks/megablocks@78eea65f), transformers applies it in its own. Only P
carries a gradient; f and counts are constants, as in Switch Transformers (Fedus et al. 2021, eq. 4).

Probabilities go in once softmaxed. DBRX's first official file softmaxed them a second time inside its loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from quadriga.errors import ConfigError
from quadriga.model.moe import RouterStats

Form = Literal["hf", "megablocks"]


def load_balancing_loss(stats: Sequence[RouterStats], *, form: Form, mask: Tensor | None = None) -> Tensor:
    """The balance loss of one forward pass, unweighted.

    Args:
        stats: one entry per layer, as the Transformer returned them.
        form: see the module docstring.
        mask: (N,) bool, False for padding tokens, which count neither in f nor in P.

    Returns:
        a float32 scalar, differentiable through the probabilities; NaN if the mask keeps no token.

    Raises:
        ConfigError: an unknown form.
    """
    assert stats, "a dense model has no balance loss"
    kept = [_rows(layer, mask) for layer in stats]
    match form:
        case "hf":
            return _balance(torch.cat([ids for ids, _ in kept]), torch.cat([probs for _, probs in kept]))
        case "megablocks":
            return torch.stack([_balance(ids, probs) / ids.shape[1] for ids, probs in kept]).mean()
        case _:
            raise ConfigError(f"the form of the balance loss must be 'hf' or 'megablocks', got {form!r}")


def _rows(layer: RouterStats, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return (layer.expert_ids, layer.probs) if mask is None else (layer.expert_ids[mask], layer.probs[mask])


def _balance(ids: Tensor, probs: Tensor) -> Tensor:
    n_experts = probs.shape[1]
    counts = torch.bincount(ids.reshape(-1), minlength=n_experts).to(probs.dtype)
    return n_experts * torch.dot(counts / len(ids), probs.mean(0))


def router_z_loss(stats: Sequence[RouterStats], *, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(router logits)^2, summed over layers (Zoph et al. 2022, eq. 5), unweighted."""
    assert stats, "a dense model has no router"
    logits = [layer.logits if mask is None else layer.logits[mask] for layer in stats]
    return torch.stack([layer.logsumexp(-1).square().mean() for layer in logits]).sum()
