"""What a model may be made of that these kernels do not compute: refused by name, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from quadriga.errors import ConfigError
from quadriga.model.config import AttentionSpec, DeltaNetSpec, LayerSpec, ModelConfig, MoESpec, ShortConvSpec


def require_kernels(config: ModelConfig) -> None:
    """Refuse a model of which a piece has no kernel.

    Raises:
        ConfigError: it names the pieces.
    """
    missing = list(dict.fromkeys(piece for layer in config.kinds() for piece in _of_layer(layer)))
    if config.logit_cap is not None:
        missing.append("capped logits")
    if missing:
        raise ConfigError(
            f"the kernels for GPUs have no {', no '.join(missing)}. Unset QUADRIGA_OPS: plain torch computes this model"
        )


def _of_layer(layer: LayerSpec) -> Iterator[str]:
    mixer, ffn = layer.mixer, layer.ffn
    if not (layer.mixes and layer.feeds):
        yield "layer of one branch"
    elif not isinstance(mixer, (AttentionSpec, ShortConvSpec, DeltaNetSpec)):
        yield f"mixer {type(mixer).__name__.removesuffix('Spec')}"
    if isinstance(mixer, AttentionSpec):
        late = mixer.qk_norm is not None and mixer.qk_norm.after_rotation
        if late and mixer.qk_norm is not None and mixer.qk_norm.over == "vector":
            yield "norm of all heads together after the rotation"
        if mixer.v_norm_eps is not None:
            yield "norm of v"
        if mixer.keys_as_values:
            yield "keys that are values as well"
    if isinstance(ffn, MoESpec) and ffn.apart:
        yield "experts apart from the shared network"
    if layer.scaled:
        yield "scale of a layer"
