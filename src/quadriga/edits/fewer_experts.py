"""Reduce the number of experts: drop the least useful ones (`quadriga prune`), or merge them into a dense network
(`quadriga merge-experts`).

Usefulness is measured on a text. ``edits.calibrate`` sums over its tokens, for every expert

    use       how many tokens visited it
    output    sum over them of  routing weight * |y_e(x)|_2      its contribution to the residual stream

The second is use times the mean by which REAP prunes (Lasby et al. 2025, arXiv 2510.13999).

    prune    the best n experts of every layer are kept, in their order, with their router rows; nothing else changes
    merge    granule j of the dense network = mean over the copies of granule j, weighted by use;  w_down / g

Merging expects experts in upcycling's order (copy * g + granule) and is its inverse: directly after upcycling it
returns the dense model. For a mixture that was never dense (g = 1) it gives the average expert, as a start for
training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from quadriga.edits.calibrate import Calibration
from quadriga.errors import ConfigError
from quadriga.io.derive import Unchanged, derive
from quadriga.io.open import Checkpoint
from quadriga.model import families
from quadriga.model.config import DenseSpec, ModelConfig, MoESpec
from quadriga.model.weight_map import parameter_shapes, whole
from quadriga.quant.dtypes import Array, as_float32

By = Literal["output", "use"]


def _experts_of(config: ModelConfig) -> MoESpec:
    """The MoE spec, which must be the same in every layer; raises ConfigError for dense models."""
    moe = config.only_layer("pruning or merging experts").moe
    if moe is None:
        raise ConfigError("pruning and merging need a model with experts; this model has no experts")
    if moe.n_groups > 1:
        raise ConfigError(
            "pruning and merging need experts that are chosen freely; this model chooses them from "
            f"{moe.n_groups} groups of equal size, which fewer experts would not be"
        )
    return moe


def usefulness(measured: Calibration, by: By = "output") -> list[list[float]]:
    """For each layer, the usefulness of each expert on the calibration text."""
    if by not in ("output", "use"):
        raise ConfigError(f"experts must be ranked by 'output' or 'use', got {by!r}")
    if by == "use":
        return [[float(n) for n in counts] for counts in measured.expert_tokens.values()]
    return [list(added) for added in measured.expert_output.values()]


def prune(moe: Checkpoint, n_experts: int, worth: Sequence[Sequence[float]]) -> Checkpoint:
    """Keep the ``n_experts`` most useful experts of every layer; returns a derived checkpoint.

    Args:
        worth: for each layer, one number per expert (:func:`usefulness`).

    Raises:
        ConfigError: fewer experts than top_k, more than the model has, or a model without experts.
    """
    spec = _experts_of(moe.config)
    if not spec.top_k <= n_experts <= spec.n_experts:
        raise ConfigError(
            f"n_experts must be between top_k={spec.top_k} and the model's {spec.n_experts}; got {n_experts}"
        )
    if [len(layer) for layer in worth] != [spec.n_experts] * moe.config.n_layers:
        raise ConfigError(f"worth must give {spec.n_experts} numbers for each of {moe.config.n_layers} layers")
    kept = [
        sorted(sorted(range(spec.n_experts), key=lambda e, layer=layer: (-layer[e], e))[:n_experts])  # type: ignore[misc]
        for layer in worth
    ]
    return derive(moe, _Prune(moe, kept))


class _Prune(Unchanged):
    def __init__(self, base: Checkpoint, kept: list[list[int]]) -> None:
        config = base.config.with_ffn(n_experts=len(kept[0]))
        super().__init__(base, config, f"pruned to experts {kept}")
        self.kept = kept

    def rows(self, name: str, expert: int | None, first: int, last: int) -> Array:
        if ".moe." not in name or ".moe.shared" in name:
            return super().rows(name, expert, first, last)
        kept = self.kept[int(name.split(".")[1])]
        if expert is not None:
            return super().rows(name, kept[expert], first, last)
        return self.base.parameters.read(name)[np.array(kept[first:last], dtype=np.int64)]  # router rows, biases, fuse


def merge_experts(
    moe: Checkpoint, granules: int | None = None, *, use: Sequence[Sequence[float]] | None = None
) -> Checkpoint:
    """Average the copies of every granule; returns a derived dense checkpoint.

    Args:
        granules: number of parts the dense network was cut into; None: top_k, as in upcycling; 1: experts are copies.
        use: for each layer, the weight of each expert (tokens that visited it); None: equal weights.

    Raises:
        ConfigError: granules do not divide the experts, or no supported dense family can describe the result.
    """
    spec, config = _experts_of(moe.config), moe.config
    g = granules or spec.top_k
    more = [name for name in ("shared", "expert_bias", "router_bias", "correction") if getattr(spec, name)]
    if more or spec.score != "softmax" or spec.routed_scale != 1:
        raise ConfigError(
            f"merging takes mixtures of plain experts under a softmax; this one has {', '.join(more) or spec.score}, "
            "which a dense network has no place for"
        )
    if g < 1 or spec.n_experts % g:
        raise ConfigError(f"granules must divide n_experts={spec.n_experts}, got {g}")
    if families.family_of(config).counterpart is None:
        raise ConfigError(
            "merging supports mixtures like Mixtral or Qwen3-MoE, which become like LLaMA or Qwen3; this one is of the "
            f"family {config.family}, whose dense counterpart is not supported"
        )
    return derive(moe, _Merge(moe, g, use))


class _Merge(Unchanged):
    def __init__(self, base: Checkpoint, granules: int, use: Sequence[Sequence[float]] | None) -> None:
        spec = _experts_of(base.config)
        dense = DenseSpec(d_ff=spec.d_ff * granules, activation=spec.activation)
        family = families.family_of(base.config).counterpart
        assert family is not None, "checked in merge_experts"
        weighting = "equally" if use is None else f"by use {[[round(n) for n in layer] for layer in use]}"
        super().__init__(
            base,
            replace(base.config.with_layers(lambda layer: replace(layer, ffn=dense)), family=family),
            f"merged into {granules} granules {weighting}",
        )
        self.granules, self.use = granules, use

    def dtype(self, name: str) -> np.dtype[Any]:
        return super().dtype(name.replace(".ffn.", ".moe.") if ".ffn." in name else name)

    def rows(self, name: str, expert: int | None, first: int, last: int) -> Array:
        if ".ffn." not in name:
            return super().rows(name, expert, first, last)
        source, layer = name.replace(".ffn.", ".moe."), int(name.split(".")[1])
        dtype = self.dtype(name)
        parts = [self._granule(source, layer, j) for j in range(self.granules)]
        if name.endswith("w_down"):
            return (np.concatenate(parts, axis=1) / np.float32(self.granules))[first:last].astype(dtype)
        return np.concatenate(parts)[first:last].astype(dtype)

    def _granule(self, source: str, layer: int, granule: int) -> Array:
        """The weighted mean of one granule's copies."""
        spec, view = _experts_of(self.base.config), self.base.parameters
        experts = range(granule, spec.n_experts, self.granules)
        weights = [1.0] * len(experts) if self.use is None else [float(self.use[layer][e]) for e in experts]
        total, shape = sum(weights), parameter_shapes(self.base.config)[source]
        if total == 0:  # no token visited any of them
            weights, total = [1.0] * len(experts), float(len(experts))
        mean: Array | None = None
        for e, weight in zip(experts, weights, strict=True):
            part = as_float32(view.read(source, ((e, e + 1), *whole(shape[1:])))[0]) * np.float32(weight)
            mean = part if mean is None else mean + part
        assert mean is not None, "a granule has at least one copy"
        return mean / np.float32(total)
