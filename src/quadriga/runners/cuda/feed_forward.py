"""The feed-forward networks of a model on the kernels: what is added to the residual stream, and where tokens went.

A mixture of a step is three launches: router and sort, gate and up, down. Its weighted sum is taken where it is added
to the stream (``norm.add_norm``).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from quadriga.kernels import reference
from quadriga.kernels.triton.grouped import grouped_product
from quadriga.kernels.triton.linear import linear
from quadriga.kernels.triton.norm import Chosen
from quadriga.kernels.triton.router import route_and_place
from quadriga.kernels.triton.weights import GroupedWeight
from quadriga.kernels.triton.weights import plain as as_grouped
from quadriga.nn import feedforward, moe
from quadriga.nn.linear import Weight
from quadriga.nn.moe import RouterStats
from quadriga.nn.transformer import Block


class FeedForward(Protocol):
    """One layer's network, or mixture."""

    def __call__(self, x: Tensor) -> tuple[Tensor | Chosen, RouterStats | None]:
        """x (N, D), normed -> (what is added, routing of a mixture)."""
        ...


def feed_forward(block: Block) -> FeedForward:
    """The network of a layer."""
    if block.moe is not None:
        return Mixture(block.moe)
    assert block.ffn is not None, "a block has one feed-forward or experts"
    dense = Dense(block.ffn)
    return lambda x: (dense(x), None)


def _numbers(weight: Weight | None) -> Tensor:
    assert isinstance(weight, Tensor), "this runner's weights are plain numbers"
    return weight.detach()


def _alone(weight: Weight) -> GroupedWeight:
    """A matrix as the one expert that has all rows."""
    return as_grouped(_numbers(weight)[None])


class Dense:
    """One network for all tokens."""

    def __init__(self, module: feedforward.FeedForward) -> None:
        self._activation = module.activation
        self._gate = None if module.w_gate is None else _alone(module.w_gate)
        self._up, self._down = _alone(module.w_up), _alone(module.w_down)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        if self._gate is None:
            hidden = reference.activate(grouped_product(x, self._up), self._activation)
        else:
            hidden = grouped_product(x, self._gate, up=self._up, activation=self._activation)
        return grouped_product(hidden, self._down)


class Mixture:
    """A router and its experts."""

    def __init__(self, module: moe.MoE) -> None:
        self._module, self._router = module, module.router
        self._router_weight = _numbers(module.router.weight)
        self._router_bias = None if module.router.bias is None else module.router.bias.detach()
        self._gate, self._up, self._down = (
            as_grouped(_numbers(w)) for w in (module.w_gate, module.w_up, module.w_down)
        )
        self._biases = [None if b is None else b.detach() for b in (module.b_gate, module.b_up, module.b_down)]
        self._shared = None if module.shared is None else Dense(module.shared)
        self._share = None if module.shared_gate is None else module.shared_gate.detach()[None]

    def __call__(self, x: Tensor) -> tuple[Chosen, RouterStats]:
        """See :class:`FeedForward`."""
        router, (b_gate, b_up, b_down) = self._router, self._biases
        routing, places = route_and_place(x, self._router_weight, router.how, self._router_bias, router.correction)
        combine = self._module.aggregation_weights(routing.expert_ids, routing.expert_weights)
        hidden = grouped_product(
            x, self._gate, up=self._up, activation=self._module.spec.activation, bias=b_gate, bias_up=b_up,
            starts=places.starts, order=places.order, top_k=combine.shape[1],
        )  # fmt: skip
        rows = grouped_product(hidden, self._down, bias=b_down, starts=places.starts)
        chosen = Chosen(
            rows=rows,
            home=places.home,
            weights=combine,
            shared=None if self._shared is None else self._shared(x),
            share=None if self._share is None else linear(x, self._share.to(x.dtype)).sigmoid()[:, 0],
        )
        return chosen, RouterStats(routing.expert_ids, combine, routing.probs, routing.logits)
