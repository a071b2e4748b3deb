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

Beside the routed experts there may be a network that every token visits (``shared``), whose output is added, times the
sigmoid of a linear form of x where the spec has a ``shared_gate``. It is no expert: no routing, count or loss sees it.

Dropless: no capacity, no padding, no token is ever left out. What the router decided is returned as
:class:`RouterStats`, never kept in a global list, so losses and views see exactly this call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from quadriga.kernels import ops
from quadriga.kernels.cpu.packing import Packed
from quadriga.model.config import MoESpec, NormSpec
from quadriga.nn.feedforward import FeedForward
from quadriga.nn.linear import Adapted, LowRank, Quantised, Weight, grouped_linear, variants
from quadriga.nn.norm import Norm


@dataclass(frozen=True)
class RouterStats:
    """One layer's routing of N tokens."""

    expert_ids: Tensor
    """(N, k) int64, in the order they were chosen in."""
    expert_weights: Tensor
    """(N, k) float32, what each chosen expert's output was multiplied by."""
    probs: Tensor
    """(N, E) float32, the router's distribution over all experts; see ``ops.Routing``."""
    logits: Tensor
    """(N, E) float32, what the scores were taken of."""

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
    """The weights of a layer's experts, of any kind: gate and up (E, F, D), down (E, D, F)."""

    gate: Weight | None
    """None: the networks are not gated."""
    up: Weight
    down: Weight
    b_gate: Tensor | None = None
    """(E, F), as b_up; b_down (E, D). All three or none."""
    b_up: Tensor | None = None
    b_down: Tensor | None = None

    @property
    def matrices(self) -> dict[str, Weight]:
        """What rows are multiplied with, by the parameter's name."""
        gate = {} if self.gate is None else {"w_gate": self.gate}
        return {**gate, "w_up": self.up, "w_down": self.down}


def here(x: Tensor, routing_ids: Tensor, combine: Tensor, weights: ExpertWeights, activation: str) -> Tensor:
    """The experts on the device of x, whatever kind their weights are: an ``ExpertDispatch``.

    Plain weights go to ``ops.experts``. On the host frozen weights with one pair of factors an expert go to
    ``ops.adapted_experts``. What is left (experts with biases, a bank of adapters, dropout on a factor's input, packed
    weights that no adapter is on) is grouped products over rows sorted by expert.
    """
    if weights.b_up is None:
        if all(isinstance(weight, Tensor) for weight in weights.matrices.values()):
            plain = (weights.gate, weights.up, weights.down)
            return ops.experts(x, routing_ids, combine, *plain, activation)  # type: ignore[arg-type]
        if x.device.type == "cpu" and (parts := _parts(weights, x.dtype)) is not None:
            return ops.adapted_experts(x, routing_ids, combine, parts, activation)
    top_k = routing_ids.shape[1]
    flat = routing_ids.reshape(-1)
    order = flat.argsort(stable=True)  # (N k,) slots, all of expert 0 first
    counts = torch.bincount(flat, minlength=n_experts(weights.up))
    tokens = order // top_k
    rows, sorted_ids = x[tokens], flat[order]
    up = _biased(grouped_linear(rows, weights.up, counts, tokens), weights.b_up, sorted_ids)
    if weights.gate is None:
        hidden = ops.activate(up, activation)
    else:
        gate = _biased(grouped_linear(rows, weights.gate, counts, tokens), weights.b_gate, sorted_ids)
        hidden = ops.gated(gate, up, activation)
    y = _biased(grouped_linear(hidden, weights.down, counts, tokens), weights.b_down, sorted_ids)
    slots = torch.empty_like(y).index_copy(0, order, y).view(len(x), top_k, -1)
    return torch.bmm(combine.to(x.dtype)[:, None], slots).squeeze(1)


def _biased(rows: Tensor, bias: Tensor | None, expert_ids: Tensor) -> Tensor:
    """Rows plus the biases of their experts."""
    return rows if bias is None else rows + bias.to(rows.dtype)[expert_ids]


def n_experts(weight: Weight) -> int:
    """Matrices of a weight that has one an expert."""
    match weight:
        case Adapted():
            return n_experts(weight.frozen)
        case Quantised():
            return len(weight.stack())
    return len(weight)


def _parts(weights: ExpertWeights, dtype: torch.dtype) -> dict[str, ops.AdaptedPart] | None:
    """What ``ops.adapted_experts`` takes; None where an adapter is no mere pair of factors, or drops inputs now.

    Nor does it take packed weights that lie on another device than the host.
    """
    made: dict[str, ops.AdaptedPart] = {}
    for name, weight in weights.matrices.items():
        delta = weight.delta if isinstance(weight, Adapted) else None
        frozen = weight.frozen if isinstance(weight, Adapted) else weight
        stack: Any = frozen.stack() if isinstance(frozen, Quantised) else frozen
        if isinstance(frozen, Quantised) and not all(isinstance(one, Packed) for one in stack):
            return None
        if delta is None:
            made[name] = ops.AdaptedPart(stack)
        elif isinstance(delta, LowRank) and not delta.drops_now:
            made[name] = ops.AdaptedPart(stack, delta.a.to(dtype), delta.b.to(dtype), delta.scale)
        else:
            return None
    return made


class Router(nn.Module):
    """The gate: float32 scores of all experts, a choice of k, their weights; see ``MoESpec``."""

    balancing: Tensor | None = None
    """(E,) float32 added to the scores for the choice alone: training's loss-free balancing. No parameter, and in no
    checkpoint format."""
    correction: Tensor | None
    """(E,) float32 added alike, the model's own: a buffer, stored with it and trained by no gradient."""

    steering: Tensor | None = None
    """(N, E) float32 added to the logits of the pass under way, -infinity: never chosen; what requests ask for."""

    weight: Weight

    def __init__(self, d_model: int, spec: MoESpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.n_experts, d_model))
        self.bias = nn.Parameter(torch.empty(spec.n_experts)) if spec.router_bias else None
        self.scale = nn.Parameter(torch.empty(d_model)) if spec.apart else None
        self.expert_scale = nn.Parameter(torch.empty(spec.n_experts)) if spec.apart else None
        self.register_buffer("correction", torch.empty(spec.n_experts) if spec.correction else None)
        self.how = choice_of(spec)

    def forward(self, x: Tensor) -> ops.Routing:
        """(N, D) -> Routing. In training, ``jitter_eps`` disturbs this input only, never what the experts see."""
        eps = self.spec.jitter_eps
        if self.training and eps:
            x = x * torch.empty_like(x).uniform_(1 - eps, 1 + eps)
        (_, common), *others = variants(self.weight)
        routing = self._route(x, common, self.steering)
        if others:  # tokens with adapters of their own on the router
            whole = [values.clone() for values in routing]
            for tokens, matrix in others:
                assert tokens is not None, "only the first variant is for all other tokens"
                steering = None if self.steering is None else self.steering[tokens]
                for values, part in zip(whole, self._route(x[tokens], matrix, steering), strict=True):
                    values[tokens] = part
            routing = ops.Routing(*whole)
        return routing

    def _route(self, x: Tensor, weight: Tensor, steering: Tensor | None) -> ops.Routing:
        if self.scale is not None:
            x = x * self.scale * len(self.scale) ** -0.5
        bias: Tensor | None = self.bias
        correction = self.correction
        if self.balancing is not None:
            correction = self.balancing if correction is None else correction + self.balancing
        if steering is not None:
            bias = steering if bias is None else steering + bias
            if self.how.score != "sparse_mixer":  # which chooses by its logits; a correction lifts a score of 0
                off = torch.where(steering == float("-inf"), steering, 0.0)
                correction = off if correction is None else correction + off
        routing = ops.route(x, weight, self.how, bias=bias, correction=correction)
        if self.expert_scale is None:
            return routing
        return routing._replace(expert_weights=routing.expert_weights * self.expert_scale[routing.expert_ids])


def choice_of(spec: MoESpec) -> ops.Choice:
    """What ``ops.route`` is told of a mixture."""
    return ops.Choice(
        top_k=spec.top_k,
        score=spec.score,
        normalize_p=spec.normalize_p,
        normalize_eps=spec.normalize_eps,
        normalize_min=spec.normalize_min,
        scale=spec.routed_scale,
        n_groups=spec.n_groups,
        top_k_groups=spec.top_k_groups,
        group_worth=spec.group_worth,
        near=2 * (spec.mixer_eps or 0.0),
    )


def aggregation_weights(spec: MoESpec, ids: Tensor, weights: Tensor, fuse: Tensor | None) -> Tensor:
    """The (N, k) multipliers of the chosen experts' outputs under the spec's aggregate.

    Args:
        ids, weights: (N, k), what the router chose. fuse: (E,), where the aggregate is "fuse".
    """
    match spec.aggregate:
        case "weighted_sum":
            return weights
        case "vote":
            return torch.full_like(weights, 1.0 / spec.top_k)
        case "fuse":
            assert fuse is not None, "a model that fuses has numbers to do so"
            lifted = weights * fuse.to(weights.dtype)[ids].exp()
            return lifted / lifted.sum(-1, keepdim=True) * weights.sum(-1, keepdim=True)


class Fuse(nn.Module):
    """The learned part of the ``fuse`` aggregate: one number per expert, zero at the start."""

    def __init__(self, n_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts))


class MoE(nn.Module):
    """Router, experts and aggregate; parameters router.weight (E, D), w_gate and w_up (E, F, D), w_down (E, D, F)."""

    w_gate: Weight | None
    w_up: Weight
    w_down: Weight
    dispatch: ExpertDispatch
    """:func:`here`, unless whoever spreads the experts over ranks has put another way in its place."""

    def __init__(self, d_model: int, spec: MoESpec, norm: NormSpec | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.router = Router(d_model, spec)
        self.w_gate = nn.Parameter(torch.empty(spec.n_experts, spec.d_ff, d_model)) if spec.gated else None
        self.w_up = nn.Parameter(torch.empty(spec.n_experts, spec.d_ff, d_model))
        self.w_down = nn.Parameter(torch.empty(spec.n_experts, d_model, spec.d_ff))
        n, f = spec.n_experts, spec.d_ff
        self.b_gate = nn.Parameter(torch.empty(n, f)) if spec.expert_bias else None
        self.b_up = nn.Parameter(torch.empty(n, f)) if spec.expert_bias else None
        self.b_down = nn.Parameter(torch.empty(n, d_model)) if spec.expert_bias else None
        self.fuse = Fuse(spec.n_experts) if spec.aggregate == "fuse" else None
        self.shared = None if spec.shared is None else FeedForward(d_model, spec.shared)
        self.shared_gate = nn.Parameter(torch.empty(d_model)) if spec.shared_gate else None
        self.norm = self.post_norm = self.shared_post_norm = None
        if spec.apart:
            assert norm is not None, "experts apart have norms like their layer's"
            self.norm, self.post_norm, self.shared_post_norm = (Norm(d_model, norm) for _ in range(3))
        self.dispatch = here

    def forward(self, x: Tensor, stream: Tensor | None = None) -> tuple[Tensor, RouterStats]:
        """What the layer adds, and its routing.

        Args:
            x: (N, D), normed.
            stream: (N, D), before that norm; read where the experts are ``apart``.

        Returns:
            ((N, D), this layer's routing).
        """
        own, judged = self.reads(x, stream)
        out, stats = self.routed(own, judged)
        return self.joined(out, None if self.shared is None else self.shared(x), x), stats

    def reads(self, x: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the experts and what the router reads, (N, D) each."""
        if self.norm is None:
            return x, x
        assert stream is not None, "experts apart read the residual stream"
        return self.norm(stream), ops.norm(stream, torch.ones_like(stream[0]), "rms", self.norm.spec.eps)

    def joined(self, routed: Tensor, shared: Tensor | None, x: Tensor) -> Tensor:
        """The layer's output of what the experts and what the shared network made of their inputs."""
        if shared is None:
            return routed
        if self.post_norm is None or self.shared_post_norm is None:
            return routed + self.share(x) * shared
        added: Tensor = self.post_norm(routed) + self.shared_post_norm(shared)
        return added

    def routed(self, x: Tensor, judged: Tensor) -> tuple[Tensor, RouterStats]:
        """The experts' part of it: each token's x (N, D) to the experts that are chosen by ``judged`` (N, D)."""
        ids, weights, probs, logits = self.router(judged)
        combine = self.aggregation_weights(ids, weights)
        weights = ExpertWeights(self.w_gate, self.w_up, self.w_down, self.b_gate, self.b_up, self.b_down)
        out = self.dispatch(x, ids, combine, weights, self.spec.activation)
        return out, RouterStats(ids, combine, probs, logits)

    def share(self, x: Tensor) -> Tensor | float:
        """What the shared network's output is multiplied by: (N, 1), or 1."""
        return 1.0 if self.shared_gate is None else torch.sigmoid(x @ self.shared_gate.to(x.dtype))[:, None]

    def aggregation_weights(self, ids: Tensor, weights: Tensor) -> Tensor:
        """See :func:`aggregation_weights`."""
        return aggregation_weights(self.spec, ids, weights, None if self.fuse is None else self.fuse.weight)
