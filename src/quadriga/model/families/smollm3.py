"""SmolLM3 (Hugging Face, July 2025): LLaMA's block, every fourth layer without rotary positions.

``no_rope_layers`` has a 1 for each layer that rotates and a 0 for each that does not. Sources: transformers 4.57.6 and
5.24.0 (configuration_smollm3, modeling_smollm3), llama.cpp (arch smollm3: every fourth layer, which its program fixes
and no key says; rotary pairs side by side, in layers that do not rotate as well).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quadriga.errors import ConfigError
from quadriga.model.config import (
    AttentionSpec,
    DenseSpec,
    LayerSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
    countable,
    in_order,
    uniform,
)
from quadriga.model.families import gguf_keys, windows
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.llama2 import (
    HF_TIED,
    common_from_gguf,
    common_from_hf,
    common_to_gguf,
    common_to_hf,
    gguf_map,
    hf_layout,
)
from quadriga.model.weight_map import Shape

_GGUF_STEP = 4
IGNORED = PRETRAINED_KEYS | {"no_rope_layer_interval", "max_window_layers"}
"""What no_rope_layers and layer_types were made from."""


def _layers(layer: LayerSpec, rotates: list[bool], widths: list[int | None]) -> tuple[LayerSpec, ...]:
    rope = layer.attention.position
    return in_order(
        replace(layer, mixer=replace(layer.attention, position=rope if turns else None, window=width))
        for turns, width in zip(rotates, widths, strict=True)
    )


def every_fourth_plain(n_layers: int) -> list[bool]:
    """Which layers rotate in the published model, and in llama.cpp."""
    return [(i + 1) % _GGUF_STEP != 0 for i in range(n_layers)]


_NORM = NormSpec(kind="rms", eps=1e-6)
_LAYER = LayerSpec(
    norm=_NORM,
    mixer=AttentionSpec(n_heads=16, n_kv_heads=4, head_dim=128, position=RopeSpec(theta=5_000_000.0)),
    ffn=DenseSpec(d_ff=11_008, activation="silu"),
)
PRESETS = {
    "smollm3-3b": ModelConfig(
        family="smollm3",
        vocab_size=128_256,
        d_model=2048,
        max_seq_len=65_536,
        layers=_layers(_LAYER, every_fourth_plain(36), [None] * 36),
        final_norm=_NORM,
        tied_embeddings=True,
        bos_id=128_000,
        eos_ids=(128_012,),
        pad_id=128_004,
    )
}


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a SmolLM3 config.json, as transformers 4 or 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "smollm3")
    keys.must_be("hidden_act", "silu")
    keys.must_be("mlp_bias", False)
    ffn = DenseSpec(d_ff=keys.integer("intermediate_size"), activation="silu")
    common = common_from_hf(keys, biases=True)
    n_layers = countable(common.pop("n_layers"))
    rotates = keys.integers("no_rope_layers")
    if len(rotates) != n_layers or not set(rotates) <= {0, 1}:
        raise ConfigError(
            f"config.json: no_rope_layers must be {n_layers} numbers, each 0 or 1; got {str(rotates)[:80]}"
        )
    widths = windows.by_layer(keys, n_layers, common["max_seq_len"], None)
    # SmolLM3Config's class default is tied, and transformers leaves out what is.
    tied = keys.flag("tie_word_embeddings") if keys.has("tie_word_embeddings") else True
    config = _model(common, ffn, [bool(turns) for turns in rotates], widths, tied)
    keys.finish(IGNORED)
    return config


def _model(
    common: dict[str, Any], ffn: DenseSpec, rotates: list[bool], widths: list[int | None], tied: bool
) -> ModelConfig:
    norm = common.pop("norm")
    layers = _layers(LayerSpec(norm=norm, mixer=common.pop("mixer"), ffn=ffn), rotates, widths)
    return ModelConfig(family="smollm3", layers=layers, final_norm=norm, tied_embeddings=tied, **common)


def _rotating(config: ModelConfig, form: str) -> ModelConfig:
    """A model whose layers are all like the first that rotates: what the keys that all share are written from."""
    layer = next((layer for layer in config.layers if layer.attention.position is not None), None)
    if layer is None:
        raise ConfigError(f"{form} cannot express this model: none of its layers rotates")
    of_kind(layer.ffn, DenseSpec, form)
    return replace(config, layers=uniform(layer, config.n_layers))


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "SmolLM3's config.json"
    raw = common_to_hf(_rotating(config, form), form) | windows.to_hf(config.layers)
    del raw["head_dim"]  # the class takes it from the other sizes
    raw |= {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "mlp_bias": False,
        "no_rope_layers": [int(layer.attention.position is not None) for layer in config.layers],
        "no_rope_layer_interval": _GGUF_STEP,
    }
    must_read_back(config, config_from_hf(raw), form)
    return raw


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``smollm3``."""
    keys = gguf_keys.architecture_keys(metadata, "smollm3")
    ffn = DenseSpec(d_ff=keys.integer("feed_forward_length"), activation="silu")
    common = common_from_gguf(keys, metadata, shapes)
    n_layers = countable(common.pop("n_layers"))
    tied: bool = common.pop("tied_embeddings")
    width = common["mixer"].window
    config = _model(common, ffn, every_fourth_plain(n_layers), [width] * n_layers, tied)
    keys.finish(gguf_keys.IGNORED)
    return config


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``smollm3``."""
    form = "GGUF arch smollm3"
    metadata = common_to_gguf(_rotating(config, form), form, "smollm3")
    gguf_keys.must_read_back(config, config_from_gguf, metadata, form)
    return metadata


FAMILY = Family(
    name="smollm3",
    presets=PRESETS,
    model_types=("smollm3",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={"hf": hf_layout},
    gguf_archs=("smollm3",),
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_map=gguf_map,
    tied_copies=HF_TIED,
)
