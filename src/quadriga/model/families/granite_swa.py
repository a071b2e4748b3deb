"""Granite with windows (IBM's Granite Swash, 2026), dense and as mixtures: Granite's block with layers that differ.

Every layer has a window or sees all (``layer_types``), and a rotary base of its own or no positions at all, which a
base of 0 means (``layer_rope_theta``); a learned logit a head stands in the softmax of each (sinks). The mixtures may
have a network beside the experts (``shared_intermediate_size``). llama.cpp has no such architecture. Source:
transformers 5.24.0 (configuration and modular of granite_swa and granitemoe_swa).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quadriga.errors import ConfigError
from quadriga.model.config import (
    AttentionSpec,
    DenseSpec,
    LayerSpec,
    ModelConfig,
    MoESpec,
    RopeSpec,
    countable,
    in_order,
    uniform,
)
from quadriga.model.families import granite, windows
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.gguf_keys import with_scale
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.llama2 import HF_COMMON, HF_FFN, HF_TIED, common_from_hf, hf_qkv
from quadriga.model.families.pieces import copies, gate_up, shared_gate_up
from quadriga.model.weight_map import Piece

_DENSE, _MIXTURE = "granite_swa", "granitemoe_swa"


def _from_hf(name: str, keys: Keys, ffn: DenseSpec | MoESpec) -> ModelConfig:
    keys.must_be("model_type", name)
    keys.must_be("hidden_act", "silu")
    common: dict[str, Any] = common_from_hf(keys)
    n_layers, norm = countable(common.pop("n_layers")), common.pop("norm")
    mixer = replace(with_scale(common.pop("mixer"), keys.number("attention_multiplier")), sinks=True)
    slides, window = windows.sliding_layers(keys, n_layers), windows.for_all(keys, common["max_seq_len"])
    if any(slides):
        keys.integer("sliding_window")
    config = ModelConfig(
        family=name,
        layers=in_order(
            LayerSpec(
                norm=norm,
                mixer=replace(mixer, window=window if slid else None, position=position),
                ffn=ffn,
                residual_scale=keys.number("residual_multiplier"),
            )
            for slid, position in zip(slides, _positions(keys, mixer, n_layers), strict=True)
        ),
        final_norm=norm,
        embedding_scale=keys.number("embedding_multiplier"),
        logit_scale=granite.inverse(keys, "logits_scaling"),
        tied_embeddings=keys.flag("tie_word_embeddings"),
        **common,
    )
    keys.finish(PRETRAINED_KEYS)
    return config


def _positions(keys: Keys, mixer: AttentionSpec, n_layers: int) -> Sequence[RopeSpec | None]:
    """The rotation of every layer; None where nothing turns."""
    rope = of_kind(mixer.position, RopeSpec, "config.json")
    if not keys.given("layer_rope_theta"):
        return [rope] * n_layers
    thetas = keys.numbers("layer_rope_theta")
    if len(thetas) != n_layers:
        raise ConfigError(f"config.json: layer_rope_theta must be {n_layers} numbers, got {len(thetas)}")
    return [replace(rope, theta=theta) if theta else None for theta in thetas]


def dense_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read the config.json of a dense model, as transformers 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("mlp_bias", False)
    return _from_hf(_DENSE, keys, DenseSpec(d_ff=keys.integer("intermediate_size"), activation="silu"))


def moe_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a mixture's config.json, as transformers 5 writes it."""
    keys = Keys(raw, "config.json")
    width = keys.integer("shared_intermediate_size")
    shared = DenseSpec(d_ff=width, activation="silu") if width else None
    return _from_hf(_MIXTURE, keys, granite.mixture(keys, shared))


def _to_hf(config: ModelConfig, form: str) -> dict[str, object]:
    ropes = [layer.attention.position for layer in config.layers]
    turning = next((layer for layer in config.layers if layer.attention.position is not None), None)
    if turning is None:
        raise ConfigError(f"{form} cannot express this model: some layer must turn by position")
    raw = {
        **granite.blocks_to_hf(replace(config, layers=uniform(turning, config.n_layers)), form),
        "layer_rope_theta": [of_kind(rope, RopeSpec, form).theta if rope else 0 for rope in ropes],
        **windows.to_hf(config.layers),
    }
    del raw["use_sliding_window"]  # the classes do not know it
    return raw


def dense_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 5.24.0 reads it."""
    form = "Granite Swash's config.json"
    for layer in config.layers:
        of_kind(layer.ffn, DenseSpec, form)
    raw = {**_to_hf(config, form), "architectures": ["GraniteSWAForCausalLM"], "model_type": _DENSE, "mlp_bias": False}
    must_read_back(config, dense_from_hf(raw), form)
    return raw


def moe_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 5.24.0 reads it."""
    form = "the config.json of Granite Swash's mixtures"
    moe = config.only_moe(form)
    raw = {
        **_to_hf(config, form),
        "architectures": ["GraniteMoeSWAForCausalLM"],
        "model_type": _MIXTURE,
        **granite.mixture_to_hf(moe),
        "shared_intermediate_size": of_kind(moe.shared, DenseSpec, form).d_ff if moe.shared else 0,
    }
    must_read_back(config, moe_from_hf(raw), form)
    return raw


_SINKS = {"model.layers.{i}.self_attn.sinks": "layers.{i}.attn.sinks"}
_MOE = "model.layers.{i}.block_sparse_moe."
_EXPERTS = {
    _MOE + "router.weight": "layers.{i}.moe.router.weight",
    _MOE + "experts.down_proj": "layers.{i}.moe.w_down",
    granite.HF_SHARED + "output_linear.weight": "layers.{i}.moe.shared.w_down",
}


def _dense_layout(config: ModelConfig) -> list[Piece]:
    return copies(config, HF_COMMON | _SINKS | HF_FFN) + hf_qkv(config)


def _moe_layout(config: ModelConfig) -> list[Piece]:
    experts = gate_up(config, _MOE + "experts.gate_up_proj")
    shared = shared_gate_up(config, granite.HF_SHARED + "input_linear.weight")
    return copies(config, HF_COMMON | _SINKS | _EXPERTS) + hf_qkv(config) + experts + shared


DENSE = Family(
    name=_DENSE,
    presets={},
    model_types=(_DENSE,),
    config_from_hf=dense_from_hf,
    config_to_hf=dense_to_hf,
    layouts={"hf": _dense_layout},
    counterpart=_MIXTURE,
    tied_copies=HF_TIED,
)
MIXTURE = Family(
    name=_MIXTURE,
    presets={},
    model_types=(_MIXTURE,),
    config_from_hf=moe_from_hf,
    config_to_hf=moe_to_hf,
    layouts={"hf": _moe_layout},
    counterpart=_DENSE,
    tied_copies=HF_TIED,
)
