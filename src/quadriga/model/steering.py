"""Experts of a mixture that a request switches off or boosts: what is added to the routers' logits.

    factor f of expert e  ->  logit_e + ln f       f = 0: -infinity, the expert is never chosen

Of a softmax router this multiplies the expert's probability by f before the k best are chosen and weighed; of a sigmoid
router it multiplies the odds of its score. Every family routes by logits, so it works for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quadriga.errors import RequestError
from quadriga.model.config import ModelConfig, MoESpec

Floats = NDArray[np.float32]

MOST_FACTOR = 1000.0
MOST_STEERED = 4096
"""Experts in one request."""


@dataclass(frozen=True)
class ExpertFactor:
    """What one expert's chances are multiplied by."""

    layer: int
    """Counts the layers that have experts, from 0, as ``Routing`` does."""
    expert: int
    factor: float
    """0 switches the expert off; 1 changes nothing."""


def router_shift(factors: Sequence[ExpertFactor], config: ModelConfig) -> Floats:
    """What is added to the routers' logits: (n_layers, E) float32, E that of the layer with the most experts.

    Raises:
        RequestError: a dense model, an expert that is not there or is named twice, a factor out of bounds, or so many
            switched off that a layer could not choose.
    """
    layers = config.moe_layers
    if not layers:
        raise RequestError("experts cannot be steered: this model is dense, it has none")
    if len(factors) > MOST_STEERED:
        raise RequestError(f"at most {MOST_STEERED} experts can be steered at once, got {len(factors)}")
    shift = np.zeros((config.n_layers, max(spec.n_experts for _, spec in layers)), dtype=np.float32)
    named = set[tuple[int, int]]()
    for one in factors:
        if not 0 <= one.layer < len(layers):
            raise RequestError(f"layer must be from 0 to {len(layers) - 1}, the layers with experts; got {one.layer}")
        index, spec = layers[one.layer]
        if not 0 <= one.expert < spec.n_experts:
            raise RequestError(f"expert must be from 0 to {spec.n_experts - 1} in layer {one.layer}; got {one.expert}")
        if not (one.factor == 0 or 1 / MOST_FACTOR <= one.factor <= MOST_FACTOR):
            raise RequestError(
                f"factor must be 0, which switches an expert off, or from {1 / MOST_FACTOR:g} to {MOST_FACTOR:g}; "
                f"got {one.factor:g}"
            )
        if (one.layer, one.expert) in named:
            raise RequestError(f"expert {one.expert} of layer {one.layer} is named twice")
        named.add((one.layer, one.expert))
        shift[index, one.expert] = math.log(one.factor) if one.factor else -math.inf
    for number, (index, spec) in enumerate(layers):
        _require_choice(number, spec, shift[index, : spec.n_experts])
    return shift


def _require_choice(number: int, spec: MoESpec, shift: Floats) -> None:
    """Refuse a layer in which too few experts are on, whichever groups its router opens."""
    on = np.isfinite(shift).reshape(spec.n_groups, -1).sum(-1)  # (groups,)
    if spec.n_groups > 1:
        least = max(2 if spec.group_worth == "two_best" else 1, -(-spec.top_k // spec.top_k_groups))
        if int(on.min()) < least:
            raise RequestError(
                f"layer {number} chooses {spec.top_k} experts from {spec.top_k_groups} of {spec.n_groups} groups, so "
                f"each group must keep at least {least} experts on; {int(on.min())} are left in one"
            )
    elif int(on.sum()) < spec.top_k:
        raise RequestError(
            f"layer {number} chooses {spec.top_k} experts for each token, and only {int(on.sum())} are left on"
        )
