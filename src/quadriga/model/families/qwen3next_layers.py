"""Layers of Qwen3-Next and Qwen3.5: gated DeltaNets, and attention whose output is gated between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quadriga.errors import ConfigError
from quadriga.model.config import (
    AttentionSpec,
    DeltaNetSpec,
    DenseSpec,
    LayerSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    QKNormSpec,
    in_order,
)
from quadriga.model.families.base import of_kind

Ffns = Sequence[DenseSpec | MoESpec]


def model_of(
    family: str, common: Mapping[str, Any], ffns: Ffns, attends: Sequence[bool], delta: DeltaNetSpec
) -> ModelConfig:
    """Layers of both kinds; ``common`` as of LLaMA, with ``tied_embeddings``."""
    rest = {key: value for key, value in common.items() if key not in ("norm", "mixer", "n_layers")}
    norm: NormSpec = common["norm"]
    qk_norm = QKNormSpec(over="head", eps=norm.eps, plus_one=norm.plus_one)
    attention = replace(common["mixer"], qk_norm=qk_norm, output_gate=True)
    layers = in_order(
        LayerSpec(norm=norm, mixer=attention if full else delta, ffn=ffn)
        for full, ffn in zip(attends, ffns, strict=True)
    )
    return ModelConfig(family=family, layers=layers, final_norm=norm, **rest)


def delta_of(config: ModelConfig, form: str) -> DeltaNetSpec:
    for layer in config.kinds():
        if not isinstance(layer.mixer, AttentionSpec):
            return of_kind(layer.mixer, DeltaNetSpec, form)
    raise ConfigError(f"{form} cannot express this model: it has no gated delta rule")
