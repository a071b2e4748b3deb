"""Mixture of experts in its three named parts: the Router chooses, the Experts compute, aggregate adds up.

    x (N, D) ──Router──► ids (N, k), weights (N, k), probs (N, E)
        │                     │
        └────────► Experts ◄──┴── combine = aggregation weights (N, k)
                      │
                      ▼  out[n] = sum_j combine[n, j] * y_{ids[n, j]}(x[n])

How the chosen outputs combine is the spec's ``aggregate``:

    weighted_sum   combine = the router's weights                                     (DBRX, Mixtral, Grok-1)
    vote           combine = 1/k: every chosen expert counts the same
    fuse           combine_j = w_j exp(f_j) / sum_i w_i exp(f_i) * sum_i w_i, f a learned number per expert;
                   f = 0 is the weighted sum

Dropless: no capacity, no padding, no token is ever left out. What the router decided is returned as
:class:`RouterStats`, never kept in a global list, so losses and views see exactly this call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from quadriga import ops
from quadriga.model.config import MoESpec


@dataclass(frozen=True)
class RouterStats:
    """One layer's routing of N tokens."""

    expert_ids: Tensor
    """(N, k) int64, most probable first."""
    expert_weights: Tensor
    """(N, k) float32, what each chosen expert's output was multiplied by."""
    probs: Tensor
    """(N, E) float32, the router's softmax over all experts."""
    logits: Tensor
    """(N, E) float32, what the softmax was taken of."""

    def load(self) -> Tensor:
        """(E,) int64: how many (token, slot) pairs each expert got."""
        return torch.bincount(self.expert_ids.reshape(-1), minlength=self.probs.shape[-1])


class ExpertCompute(Protocol):
    """Whoever computes the chosen experts: ``ops.experts``, or what training puts in its place.

    Expert parallelism is one such function: it sends tokens to the ranks that hold their experts and brings the
    results back. The layer knows nothing of it.
    """

    def __call__(
        self,
        x: Tensor,
        routing_ids: Tensor,
        combine: Tensor,
        w_gate: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        activation: str,
    ) -> Tensor:
        """See ``ops.experts``."""
        ...


class Router(nn.Module):
    """The gate: float32 softmax over all experts, top k, renormalised by the spec's p-norm."""

    bias: Tensor | None = None
    """(E,) float32 added to the probabilities for the choice alone: training's loss-free balancing. No parameter, and
    in no checkpoint format."""

    def __init__(self, d_model: int, spec: MoESpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.n_experts, d_model))

    def forward(self, x: Tensor) -> ops.Routing:
        """(N, D) -> Routing. In training, ``jitter_eps`` disturbs this input only, never what the experts see."""
        eps = self.spec.jitter_eps
        if self.training and eps:
            x = x * torch.empty_like(x).uniform_(1 - eps, 1 + eps)
        return ops.route(x, self.weight, self.spec.top_k, self.spec.normalize_p, self.bias)


class Fuse(nn.Module):
    """The learned part of the ``fuse`` aggregate: one number per expert, zero at the start."""

    def __init__(self, n_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts))

    def forward(self, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """Reweighted expert weights (N, k); their sum per token is unchanged."""
        lifted = expert_weights * self.weight.to(expert_weights.dtype)[expert_ids].exp()
        return lifted / lifted.sum(-1, keepdim=True) * expert_weights.sum(-1, keepdim=True)


class MoE(nn.Module):
    """Router, experts and aggregate; parameters router.weight (E, D), w_gate and w_up (E, F, D), w_down (E, D, F)."""

    def __init__(self, d_model: int, spec: MoESpec) -> None:
        super().__init__()
        self.spec = spec
        self.router = Router(d_model, spec)
        self.w_gate = nn.Parameter(torch.empty(spec.n_experts, spec.d_ff, d_model))
        self.w_up = nn.Parameter(torch.empty(spec.n_experts, spec.d_ff, d_model))
        self.w_down = nn.Parameter(torch.empty(spec.n_experts, d_model, spec.d_ff))
        self.fuse = Fuse(spec.n_experts) if spec.aggregate == "fuse" else None
        self.compute: ExpertCompute = ops.experts

    def forward(self, x: Tensor) -> tuple[Tensor, RouterStats]:
        """(N, D) -> ((N, D), this layer's routing)."""
        ids, weights, probs, logits = self.router(x)
        combine = self.aggregation_weights(ids, weights)
        out = self.compute(x, ids, combine, self.w_gate, self.w_up, self.w_down, self.spec.activation)
        return out, RouterStats(ids, combine, probs, logits)

    def aggregation_weights(self, ids: Tensor, weights: Tensor) -> Tensor:
        """The (N, k) multipliers of the chosen experts' outputs under the spec's aggregate."""
        match self.spec.aggregate:
            case "weighted_sum":
                return weights
            case "vote":
                return torch.full_like(weights, 1.0 / self.spec.top_k)
            case "fuse":
                assert self.fuse is not None, "MoE builds Fuse for this aggregate"
                fused: Tensor = self.fuse(ids, weights)
                return fused
