"""The feed-forward networks of a model on the kernels: what is added to the residual stream, and where tokens went.

A mixture of a step is three launches: router and sort, gate and up, down. Its weighted sum is taken where it is added
to the stream (``norm.add_norm``).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from quadriga.kernels.triton.experts import ExpertNetworks, expert_rows, gated_product
from quadriga.kernels.triton.grouped import grouped_product
from quadriga.kernels.triton.linear import linear
from quadriga.kernels.triton.norm import Chosen
from quadriga.kernels.triton.router import route_and_place
from quadriga.model.config import DenseSpec, LayerSpec, MoESpec
from quadriga.nn.moe import RouterStats, aggregation_weights, choice_of
from quadriga.runners.cuda.weights import DeviceWeights


class FeedForward(Protocol):
    """One layer's network, or mixture."""

    def __call__(self, x: Tensor) -> tuple[Tensor | Chosen, RouterStats | None]:
        """x (N, D), normed -> (what is added, routing of a mixture)."""
        ...


def feed_forward(layer: LayerSpec, weights: DeviceWeights) -> FeedForward:
    """The network of a layer, of whose parameters ``weights`` are."""
    if isinstance(layer.ffn, MoESpec):
        return Mixture(layer.ffn, weights.below("moe."))
    assert isinstance(layer.ffn, DenseSpec), "require_kernels has refused layers without a network"
    dense = Dense(layer.ffn, weights.below("ffn."))
    return lambda x: (dense(x), None)


def _networks(weights: DeviceWeights, activation: str, *, gated: bool) -> ExpertNetworks:
    return ExpertNetworks(
        gate=weights.experts("w_gate") if gated else None,
        up=weights.experts("w_up"),
        down=weights.experts("w_down"),
        activation=activation,
        b_gate=weights.numbers_or_none("b_gate"),
        b_up=weights.numbers_or_none("b_up"),
        b_down=weights.numbers_or_none("b_down"),
    )


class Dense:
    """One network for all tokens: an expert that has all rows."""

    def __init__(self, spec: DenseSpec, weights: DeviceWeights) -> None:
        self._networks = _networks(weights, spec.activation, gated=spec.gated)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        return grouped_product(gated_product(x, self._networks), self._networks.down)


class Mixture:
    """A router and its experts."""

    def __init__(self, spec: MoESpec, weights: DeviceWeights) -> None:
        self._spec, self._how = spec, choice_of(spec)
        self._router = weights.numbers("router.weight")
        self._router_bias = weights.numbers_or_none("router.bias")
        self._correction = weights.numbers_or_none("router.correction")
        self._networks = _networks(weights, spec.activation, gated=spec.gated)
        self._fuse = weights.numbers_or_none("fuse.weight")
        self._shared = None if spec.shared is None else Dense(spec.shared, weights.below("shared."))
        gate = weights.numbers_or_none("shared_gate")
        self._share = None if gate is None else gate[None].to(weights.dtype)

    def __call__(self, x: Tensor) -> tuple[Chosen, RouterStats]:
        """See :class:`FeedForward`."""
        routing, places = route_and_place(x, self._router, self._how, self._router_bias, self._correction)
        combine = aggregation_weights(self._spec, routing.expert_ids, routing.expert_weights, self._fuse)
        chosen = Chosen(
            rows=expert_rows(x, places, combine.shape[1], self._networks),
            home=places.home,
            weights=combine,
            shared=None if self._shared is None else self._shared(x),
            share=None if self._share is None else linear(x, self._share).sigmoid()[:, 0],
        )
        return chosen, RouterStats(routing.expert_ids, combine, routing.probs, routing.logits)
