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
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from quadriga.kernels import ops
from quadriga.model.config import MoESpec
from quadriga.nn.linear import Adapted, Factors, Quantised, Weight, grouped_linear, variants


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


class ExpertDispatch(Protocol):
    """Who brings tokens to the experts they chose: :func:`here`, or a way over several ranks.

    Expert parallelism is one such function: it sends tokens to the ranks that hold their experts, lets :func:`here`
    compute those, and brings the results back. The layer knows nothing of it.
    """

    def __call__(
        self, x: Tensor, routing_ids: Tensor, combine: Tensor, weights: ExpertWeights, activation: str
    ) -> Tensor:
        """x (N, D), routing_ids (N, k) int64, combine (N, k) -> (N, D): see ``ops.experts``."""
        ...


class ExpertWeights(NamedTuple):
    """The three weights of a layer's experts, of any kind: gate and up (E, F, D), down (E, D, F)."""

    gate: Weight
    up: Weight
    down: Weight


def here(x: Tensor, routing_ids: Tensor, combine: Tensor, weights: ExpertWeights, activation: str) -> Tensor:
    """The experts on the device of x, whatever kind their weights are: an ``ExpertDispatch``.

    Plain weights go to ``ops.experts``. On the host frozen weights with one pair of factors an expert go to
    ``ops.adapted_experts``. What is left (a bank of adapters, dropout on a factor's input, packed weights that no
    adapter is on) is grouped products over rows sorted by expert.
    """
    if all(isinstance(weight, Tensor) for weight in weights):
        gate, up, down = weights
        return ops.experts(x, routing_ids, combine, gate, up, down, activation)  # type: ignore[arg-type]
    if x.device.type == "cpu" and (parts := _parts(weights, x.dtype)) is not None:
        return ops.adapted_experts(x, routing_ids, combine, parts, activation)
    top_k = routing_ids.shape[1]
    flat = routing_ids.reshape(-1)
    order = flat.argsort(stable=True)  # (N k,) slots, all of expert 0 first
    counts = torch.bincount(flat, minlength=n_experts(weights.gate))
    tokens = order // top_k
    rows = x[tokens]
    hidden = ops.activate(grouped_linear(rows, weights.gate, counts, tokens), activation)
    hidden = hidden * grouped_linear(rows, weights.up, counts, tokens)
    y = grouped_linear(hidden, weights.down, counts, tokens)
    slots = torch.empty_like(y).index_copy(0, order, y).view(len(x), top_k, -1)
    return torch.bmm(combine.to(x.dtype)[:, None], slots).squeeze(1)


def n_experts(weight: Weight) -> int:
    """Matrices of a weight that has one an expert."""
    match weight:
        case Adapted():
            return n_experts(weight.frozen)
        case Quantised():
            return len(weight.stack())
    return len(weight)


def _parts(weights: ExpertWeights, dtype: torch.dtype) -> dict[str, ops.AdaptedPart] | None:
    """What ``ops.adapted_experts`` takes; None where an adapter is no mere pair of factors, or drops inputs now."""
    made: dict[str, ops.AdaptedPart] = {}
    for name, weight in zip(("w_gate", "w_up", "w_down"), weights, strict=True):
        delta = weight.delta if isinstance(weight, Adapted) else None
        frozen = weight.frozen if isinstance(weight, Adapted) else weight
        stack = frozen.stack() if isinstance(frozen, Quantised) else frozen
        if delta is None:
            made[name] = ops.AdaptedPart(stack)
        elif isinstance(delta, Factors) and not delta.drops_now:
            made[name] = ops.AdaptedPart(stack, delta.a.to(dtype), delta.b.to(dtype), delta.scale)
        else:
            return None
    return made


class Router(nn.Module):
    """The gate: float32 softmax over all experts, top k, renormalised by the spec's p-norm."""

    bias: Tensor | None = None
    """(E,) float32 added to the probabilities for the choice alone: training's loss-free balancing. No parameter, and
    in no checkpoint format."""

    weight: Weight

    def __init__(self, d_model: int, spec: MoESpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.n_experts, d_model))

    def forward(self, x: Tensor) -> ops.Routing:
        """(N, D) -> Routing. In training, ``jitter_eps`` disturbs this input only, never what the experts see."""
        eps = self.spec.jitter_eps
        if self.training and eps:
            x = x * torch.empty_like(x).uniform_(1 - eps, 1 + eps)
        (_, common), *others = variants(self.weight)
        routing = self._route(x, common)
        if others:  # tokens with adapters of their own on the router
            whole = [values.clone() for values in routing]
            for tokens, matrix in others:
                assert tokens is not None, "only the first variant is for all other tokens"
                for values, part in zip(whole, self._route(x[tokens], matrix), strict=True):
                    values[tokens] = part
            routing = ops.Routing(*whole)
        return routing

    def _route(self, x: Tensor, weight: Tensor) -> ops.Routing:
        return ops.route(x, weight, self.spec.top_k, self.spec.normalize_p, self.bias)


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

    w_gate: Weight
    w_up: Weight
    w_down: Weight
    dispatch: ExpertDispatch
    """:func:`here`, unless whoever spreads the experts over ranks has put another way in its place."""

    def __init__(self, d_model: int, spec: MoESpec) -> None:
        super().__init__()
        self.spec = spec
        self.router = Router(d_model, spec)
        self.w_gate = nn.Parameter(torch.empty(spec.n_experts, spec.d_ff, d_model))
        self.w_up = nn.Parameter(torch.empty(spec.n_experts, spec.d_ff, d_model))
        self.w_down = nn.Parameter(torch.empty(spec.n_experts, d_model, spec.d_ff))
        self.fuse = Fuse(spec.n_experts) if spec.aggregate == "fuse" else None
        self.dispatch = here

    def forward(self, x: Tensor) -> tuple[Tensor, RouterStats]:
        """(N, D) -> ((N, D), this layer's routing)."""
        ids, weights, probs, logits = self.router(x)
        combine = self.aggregation_weights(ids, weights)
        weights = ExpertWeights(self.w_gate, self.w_up, self.w_down)
        out = self.dispatch(x, ids, combine, weights, self.spec.activation)
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
