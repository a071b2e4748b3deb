"""Layers of Gemma 4: attention with a window, and attention that sees all, between norms on both sides."""

from __future__ import annotations

from collections.abc import Sequence

from quadriga.errors import ConfigError
from quadriga.model.config import AttentionSpec, DenseSpec, LayerSpec, ModelConfig, MoESpec, NormSpec, in_order

FULL, SLIDING = "full_attention", "sliding_attention"


def layers_of(
    norm: NormSpec, sliding: AttentionSpec, full: AttentionSpec, ffn: DenseSpec | MoESpec, attends: Sequence[bool]
) -> tuple[LayerSpec, ...]:
    """A layer for each of ``attends``: whether it sees all."""
    return in_order(
        LayerSpec(norm=norm, mixer=full if sees_all else sliding, ffn=ffn, post_norms=True, scaled=True)
        for sees_all in attends
    )


def both_kinds(config: ModelConfig, form: str) -> tuple[LayerSpec, LayerSpec]:
    """The first layer with a window, and the first that sees all.

    Raises:
        ConfigError: there is no layer of one kind, for which the format has keys all the same.
    """
    found: dict[bool, LayerSpec] = {}
    for layer in config.layers:
        found.setdefault(layer.attention.window is None, layer)
    if len(found) != 2:
        raise ConfigError(f"{form} cannot express this model: it needs layers with a window and layers without")
    return found[False], found[True]
