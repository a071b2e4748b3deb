"""Sliding windows as config.json states them: one for all layers (Mistral), or by layer (Qwen2, SmolLM3).

A key counts for a query at position p if it stands at p - window + 1 or later
(``masking_utils.sliding_window_overlay`` of transformers 4.57.6 keeps key > query - window). A window at least as long
as the context hides nothing and is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quadriga.errors import ConfigError
from quadriga.model.config import AttentionSpec, LayerSpec, ModelConfig
from quadriga.model.families.keys import Keys

FULL, SLIDING = "full_attention", "sliding_attention"


def for_all(keys: Keys, max_seq_len: int) -> int | None:
    """``sliding_window``, or None where it is null, absent or as long as the context."""
    window = keys.integer("sliding_window") if keys.given("sliding_window") else None
    return None if window is None or window >= max_seq_len else window


def by_layer(keys: Keys, n_layers: int, max_seq_len: int, slides: Callable[[int], bool] | None) -> list[int | None]:
    """The window of every layer.

    Args:
        slides: which layers have one where ``layer_types`` does not say; None: it must say.

    Raises:
        ConfigError: ``layer_types`` that are none, or as many as there are no layers.
    """
    uses = keys.flag("use_sliding_window") if keys.given("use_sliding_window") else False
    named, window = keys.given("layer_types"), for_all(keys, max_seq_len)
    if named:
        sliding = sliding_layers(keys, n_layers)
    elif uses and slides is None:
        raise ConfigError("config.json: use_sliding_window needs layer_types, which say which layers have a window")
    else:
        sliding = [slides is not None and slides(i) for i in range(n_layers)]
    if named and any(sliding) and not uses:
        raise ConfigError(f"config.json: layer_types name {SLIDING}, and use_sliding_window says there is none")
    return [window if uses and slid else None for slid in sliding]


def sliding_layers(keys: Keys, n_layers: int) -> list[bool]:
    """Which layers have a window, as ``layer_types`` says.

    Raises:
        ConfigError: types that are none, or as many as there are no layers.
    """
    named = keys.value("layer_types")
    if not isinstance(named, list) or len(named) != n_layers or not set(map(str, named)) <= {FULL, SLIDING}:
        raise ConfigError(
            f"config.json: layer_types must be {n_layers} times {FULL} or {SLIDING}, got {str(named)[:80]}"
        )
    return [kind == SLIDING for kind in named]


def kinds_of(config: ModelConfig, form: str) -> tuple[AttentionSpec, AttentionSpec, list[bool]]:
    """Attention with a window, attention without, and which layers have one.

    Raises:
        ConfigError: all layers have one, or none has.
    """
    slides = [layer.attention.window is not None for layer in config.layers]
    if len(set(slides)) != 2:
        raise ConfigError(f"{form} cannot express this model: some of its layers must have a window, not all")
    near, far = (config.layers[slides.index(slid)].attention for slid in (True, False))
    return near, far, slides


def to_hf(layers: Sequence[LayerSpec]) -> dict[str, object]:
    """The keys of windows by layer; all windows of a model are of one size, which the writer's reading back checks."""
    widths = [layer.attention.window for layer in layers]
    window = next((width for width in widths if width is not None), None)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": [FULL if width is None else SLIDING for width in widths],
    }
