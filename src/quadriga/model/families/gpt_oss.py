"""gpt-oss (OpenAI, August 2025): 32 or 128 experts, 4 chosen, with biases everywhere and 4-bit weights as published.

    attention    q, k, v and o with biases; a learned logit a head in the softmax (sinks); windows of 128 in every
                 second layer, the first one too; YaRN whose ramp is not rounded to whole pairs
    experts      biases on router, gate, up and down; (up + 1) gate sigmoid(1.702 gate), both clamped at 7
    tensors      gate and up by turns in one tensor of all experts: columns of (E, D, 2 F), or rows of (E, 2 F, D) where
                 they are stored as MXFP4 (``quant.mxfp4``); GGUF has them apart

Sources: transformers 4.57.6 (configuration_gpt_oss, modular_gpt_oss, integrations/mxfp4), the releases' config.json,
llama.cpp (arch gpt-oss, src/models/openai-moe.cpp and convert_hf_to_gguf.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quadriga.errors import ConfigError
from quadriga.model.config import (
    AttentionSpec,
    LayerSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    RopeSpec,
    YarnScaling,
    countable,
    in_order,
    uniform,
)
from quadriga.model.families import gguf_keys, windows
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.llama2 import (
    GGUF_COMMON,
    HF_COMMON,
    HF_TIED,
    common_from_gguf,
    common_from_hf,
    common_to_gguf,
    common_to_hf,
    hf_qkv,
)
from quadriga.model.families.pieces import copies, in_turn
from quadriga.model.families.rope_keys import usual_attention_factor
from quadriga.model.weight_map import Piece, Shape

_LIMIT = 7.0
"""What gate and up are clamped at; ``clamped_glu`` has no other."""


def _layers(layer: LayerSpec, widths: list[int | None]) -> tuple[LayerSpec, ...]:
    return in_order(replace(layer, mixer=replace(layer.attention, window=width)) for width in widths)


def _experts(**sizes: Any) -> MoESpec:
    return MoESpec(activation="clamped_glu", router_bias=True, expert_bias=True, **sizes)


def _preset(n_layers: int, n_experts: int) -> ModelConfig:
    norm = NormSpec(kind="rms", eps=1e-5)
    yarn = YarnScaling(
        factor=32.0, original_max_seq_len=4096, attention_factor=usual_attention_factor(32.0), truncate=False
    )
    layer = LayerSpec(
        norm=norm,
        mixer=AttentionSpec(
            n_heads=64,
            n_kv_heads=8,
            head_dim=64,
            position=RopeSpec(theta=150_000.0, scaling=yarn),
            qkv_bias=True,
            out_bias=True,
            sinks=True,
        ),
        ffn=_experts(d_ff=2880, n_experts=n_experts, top_k=4, aux_loss_weight=0.9),
    )
    return ModelConfig(
        family="gpt_oss",
        vocab_size=201_088,
        d_model=2880,
        max_seq_len=131_072,
        layers=_layers(layer, _every_second(128, n_layers)),
        final_norm=norm,
        eos_ids=(200_002,),
        pad_id=199_999,
    )


def _every_second(window: int | None, n_layers: int) -> list[int | None]:
    """Windows as published, and as llama.cpp's program fixes them: in the first layer, the third, ..."""
    return [window if i % 2 == 0 else None for i in range(n_layers)]


PRESETS = {"gpt-oss-20b": _preset(24, 32), "gpt-oss-120b": _preset(36, 128)}


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a gpt-oss config.json, as published or as transformers 4 or 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "gpt_oss")
    keys.must_be("hidden_act", "silu")  # the unit's own form is the program's, whatever this says
    keys.must_be("swiglu_limit", _LIMIT)
    keys.must_be("swiglu_alpha", 1.702)  # transformers 5 writes it
    keys.must_be("attention_bias", True)
    _check_quantisation(keys)
    _check_no_default(keys)
    common = common_from_hf(keys, biases=True)
    n_layers = countable(common.pop("n_layers"))
    slides = windows.sliding_layers(keys, n_layers)
    if any(slides):
        keys.integer("sliding_window")
    window = windows.for_all(keys, common["max_seq_len"])
    widths = [window if slid else None for slid in slides]
    experts = _experts(
        d_ff=keys.integer("intermediate_size"),
        n_experts=keys.integer("num_local_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        aux_loss_weight=keys.number("router_aux_loss_coef"),
    )
    keys.must_be("experts_per_token", experts.top_k)  # the release says both things twice
    scaling = common["mixer"].position.scaling
    if isinstance(scaling, YarnScaling):
        keys.must_be("initial_context_length", scaling.original_max_seq_len)
    config = _model(common, experts, widths, keys.flag("tie_word_embeddings"))
    keys.finish(PRETRAINED_KEYS)
    return config


def _check_no_default(keys: Keys) -> None:
    """Refuse a file without keys for which transformers' class has a value of its own, unlike other families'."""
    for key in ("head_dim", "num_key_value_heads"):
        keys.integer(key)
    if not keys.has("layer_types"):
        keys.integers("layer_types")
    if not keys.has("rope_scaling") and not keys.given("rope_parameters"):
        keys.section("rope_scaling")


def _check_quantisation(keys: Keys) -> None:
    """Refuse every way of storing weights but MXFP4; which tensors have it, their names say."""
    if not keys.given("quantization_config"):
        return
    how = keys.section("quantization_config")
    method = how.text("quant_method")
    if method != "mxfp4":
        raise ConfigError(
            f"config.json: quantization_config: quant_method must be 'mxfp4', got {method[:40]!r}. Give the release, "
            "or a GGUF file of this checkpoint."
        )
    kept = how.value("modules_to_not_convert")
    if kept is not None and not (isinstance(kept, list) and all(isinstance(name, str) for name in kept)):
        raise ConfigError("config.json: quantization_config: modules_to_not_convert must be a list of names")
    how.must_be("dequantize", False, None)
    how.finish(frozenset())


def _model(common: dict[str, Any], experts: MoESpec, widths: list[int | None], tied: bool) -> ModelConfig:
    norm = common.pop("norm")
    mixer = replace(common.pop("mixer"), qkv_bias=True, out_bias=True, sinks=True, window=None)
    layers = _layers(LayerSpec(norm=norm, mixer=mixer, ffn=experts), widths)
    return ModelConfig(family="gpt_oss", layers=layers, final_norm=norm, tied_embeddings=tied, **common)


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it, for weights that are not packed."""
    form = "gpt-oss's config.json"
    moe = of_kind(config.layers[0].ffn, MoESpec, form)
    slides = windows.to_hf(config.layers)
    raw: dict[str, object] = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **common_to_hf(config, form),
        "hidden_act": "silu",
        "swiglu_limit": _LIMIT,
        "num_local_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": moe.aux_loss_weight,
        "sliding_window": slides["sliding_window"],
        "layer_types": slides["layer_types"],
    }
    must_read_back(config, config_from_hf(raw), form)
    return raw


_MLP = "model.layers.{i}.mlp."
_EXPERTS = _MLP + "experts."
_HF = HF_COMMON | {
    "model.layers.{i}.self_attn.sinks": "layers.{i}.attn.sinks",
    _MLP + "router.weight": "layers.{i}.moe.router.weight",
    _MLP + "router.bias": "layers.{i}.moe.router.bias",
    _EXPERTS + "down_proj_bias": "layers.{i}.moe.b_down",
}


def _hf_common(config: ModelConfig) -> list[Piece]:
    biases = in_turn(config, ("b_gate", "b_up"), _EXPERTS + "gate_up_proj_bias")
    return copies(config, _HF) + hf_qkv(config) + biases


def hf_layout(config: ModelConfig) -> list[Piece]:
    """Every tensor as transformers names it, experts as plain numbers, (in, out)."""
    down = {_EXPERTS + "down_proj": "layers.{i}.moe.w_down"}
    both = in_turn(config, ("w_gate", "w_up"), _EXPERTS + "gate_up_proj", transpose=True)
    return _hf_common(config) + both + copies(config, down, transpose=True)


def mxfp4_layout(config: ModelConfig) -> list[Piece]:
    """The release: experts as MXFP4, (out, in), which ``io.mxfp4_source`` reads as one tensor of numbers."""
    down = {_EXPERTS + "down_proj_blocks": "layers.{i}.moe.w_down"}
    both = in_turn(config, ("w_gate", "w_up"), _EXPERTS + "gate_up_proj_blocks")
    return _hf_common(config) + both + copies(config, down)


_GGUF_ARCH = "gpt-oss"
_GGUF = {name: target for name, target in GGUF_COMMON.items() if not name.endswith("ffn_norm.weight")} | {
    "blk.{i}.post_attention_norm.weight": "layers.{i}.ffn_norm.weight",
    "blk.{i}.attn_sinks.weight": "layers.{i}.attn.sinks",
    **gguf_keys.ROUTER,
    "blk.{i}.ffn_gate_inp.bias": "layers.{i}.moe.router.bias",
    **gguf_keys.MERGED_EXPERTS,
    "blk.{i}.ffn_gate_exps.bias": "layers.{i}.moe.b_gate",
    "blk.{i}.ffn_up_exps.bias": "layers.{i}.moe.b_up",
    "blk.{i}.ffn_down_exps.bias": "layers.{i}.moe.b_down",
}
_CHOSEN_SOFTMAX = 3
"""gguf's ExpertGatingFuncType for a softmax over the chosen logits, which is what the architecture does."""


def gguf_map(config: ModelConfig) -> list[Piece]:
    """Every tensor of arch ``gpt-oss``."""
    return copies(config, _GGUF) + gguf_keys.projections(config, interleaved=False)


def _unrounded(mixer: AttentionSpec, truncate: bool) -> AttentionSpec:
    """With YaRN's ramp rounded or not. No key says it: llama.cpp rounds in every model, gpt-oss was trained without."""
    rope = mixer.position
    if not isinstance(rope, RopeSpec) or not isinstance(rope.scaling, YarnScaling):
        return mixer
    return replace(mixer, position=replace(rope, scaling=replace(rope.scaling, truncate=truncate)))


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``gpt-oss``."""
    gating = f"{_GGUF_ARCH}.expert_gating_func"
    said = {k: v for k, v in metadata.items() if not (k == gating and v == _CHOSEN_SOFTMAX)}
    keys = gguf_keys.architecture_keys(said, _GGUF_ARCH)
    # Files of llama.cpp's converter have both keys.
    width = "expert_feed_forward_length" if keys.given("expert_feed_forward_length") else "feed_forward_length"
    moe = gguf_keys.plain_experts(keys, keys.integer(width), activation="clamped_glu")
    keys.must_be("feed_forward_length", moe.d_ff)
    common = common_from_gguf(keys, metadata, shapes)
    if not (common["mixer"].qkv_bias and common["mixer"].out_bias):
        raise ConfigError(
            "a GGUF of arch gpt-oss must have blk.0.attn_q.bias and blk.0.attn_output.bias. Is the file complete?"
        )
    common["mixer"] = _unrounded(common["mixer"], False)
    n_layers, tied = countable(common.pop("n_layers")), common.pop("tied_embeddings")
    widths = _every_second(common["mixer"].window, n_layers)
    config = _model(common, replace(moe, router_bias=True, expert_bias=True), widths, tied)
    keys.finish(gguf_keys.IGNORED)
    return config


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``gpt-oss``.

    Raises:
        ConfigError: other layers than every second one have windows, or YaRN's ramp is rounded, as no gpt-oss has it.
    """
    form = f"GGUF arch {_GGUF_ARCH}"
    first = config.layers[0]
    alike = replace(first, mixer=_unrounded(first.attention, True))  # what keys that all layers share are written from
    written = replace(config, layers=uniform(alike, config.n_layers))
    metadata = {**common_to_gguf(written, form, _GGUF_ARCH), **gguf_keys.expert_keys(written, _GGUF_ARCH)}
    gguf_keys.must_read_back(config, config_from_gguf, metadata, form)
    return metadata


FAMILY = Family(
    name="gpt_oss",
    presets=PRESETS,
    model_types=("gpt_oss",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={"hf": hf_layout, "mxfp4": mxfp4_layout},
    read_only={"mxfp4": "its numbers are four bits under a scale; the layout hf holds the same ones as bfloat16"},
    gguf_archs=(_GGUF_ARCH,),
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_map=gguf_map,
    tied_copies=HF_TIED,
)
