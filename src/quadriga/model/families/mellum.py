"""Mellum 2 (JetBrains, 2026): Qwen3's block and mixtures, windows in three layers of four.

Layers with a window turn by frequencies of their own, plain ones in the published files, where the layers that see all
have YaRN's. A configuration may leave single layers dense (``mlp_layer_types``); a layer for multi-token prediction
(``mtp.*``) is left out. Sources: transformers 5.24.0 (configuration and modeling_mellum), llama.cpp (arch mellum, whose
layers turn by one base and whose chosen weights sum to one).
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
    NormSpec,
    QKNormSpec,
    RopeSpec,
    YarnScaling,
    countable,
    in_order,
    uniform,
)
from quadriga.model.families import gguf_keys
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.llama2 import HF_TIED, common_from_gguf, common_to_gguf, common_to_hf
from quadriga.model.families.qwen3 import gguf_map, hf5_layout, hf_layout
from quadriga.model.families.rope_keys import rope_to_hf, ropes_by_kind, usual_attention_factor
from quadriga.model.families.windows import FULL, SLIDING, kinds_of
from quadriga.model.weight_map import Shape

NAME = "mellum"
IGNORED = PRETRAINED_KEYS | {
    "max_window_layers",  # of Qwen's files; layer_types say it
    *("mtp_layer_types", "mtp_mlp_layer_types"),  # of what is left out
}
_DENSE, _SPARSE = "dense", "sparse"
_PREDICTION = ("num_mtp_layers", "num_nextn_predict_layers")


def _model(
    near: AttentionSpec,
    far: AttentionSpec,
    slides: Sequence[bool],
    ffns: Sequence[DenseSpec | MoESpec],
    norm: NormSpec,
    **rest: Any,
) -> ModelConfig:
    """Layers of both kinds of attention.

    Args:
        near, far: with a window, and without.
        slides, ffns: of every layer, whether it has a window, and its feed-forward.
        rest: the other fields of the model.
    """
    layers = in_order(
        LayerSpec(norm=norm, mixer=near if slid else far, ffn=ffn) for slid, ffn in zip(slides, ffns, strict=True)
    )
    return ModelConfig(family=NAME, layers=layers, final_norm=norm, **rest)


def _mellum_2() -> ModelConfig:
    norm, theta = NormSpec(kind="rms", eps=1e-6), 500_000.0
    yarn = YarnScaling(factor=16.0, original_max_seq_len=8192, attention_factor=usual_attention_factor(16.0))
    far = AttentionSpec(
        n_heads=32,
        n_kv_heads=4,
        head_dim=128,
        position=RopeSpec(theta=theta, scaling=yarn),
        qk_norm=QKNormSpec(over="head", eps=norm.eps),
    )
    moe = MoESpec(d_ff=896, n_experts=64, top_k=8, activation="silu", aux_loss_weight=0.001)
    return _model(
        replace(far, position=RopeSpec(theta=theta), window=1024),
        far,
        [i % 4 != 3 for i in range(28)],
        [moe] * 28,
        norm,
        vocab_size=98_304,
        d_model=2304,
        max_seq_len=131_072,
        bos_id=0,
        eos_ids=(28,),
    )


PRESETS = {"mellum2-12b-a2.5b": _mellum_2()}


# config.json ---------------------------------------------------------------------------------------------------------


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a Mellum 2 config.json, as transformers 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", NAME)
    keys.must_be("hidden_act", "silu")
    keys.must_be("attention_bias", False)
    keys.must_be("use_sliding_window", True)
    for key in _PREDICTION:
        keys.must_be(key, 0, 1, None)  # see ``notes``
    n_layers, max_seq_len = countable(keys.integer("num_hidden_layers")), keys.integer("max_position_embeddings")
    norm = NormSpec(kind="rms", eps=keys.number("rms_norm_eps"))
    slides = [one == SLIDING for one in keys.words("layer_types", (FULL, SLIDING), n_layers)]
    near, far = _attentions(keys, norm.eps, max_seq_len)
    dense = DenseSpec(d_ff=keys.integer("intermediate_size"), activation="silu")
    moe = MoESpec(
        d_ff=keys.integer("moe_intermediate_size"),
        n_experts=keys.integer("num_local_experts" if keys.given("num_local_experts") else "num_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        activation="silu",
        normalize_p=1.0 if keys.flag("norm_topk_prob") else None,
        aux_loss_weight=keys.number("router_aux_loss_coef"),
    )
    config = _model(
        near,
        far,
        slides,
        [moe if one == _SPARSE else dense for one in keys.words("mlp_layer_types", (_DENSE, _SPARSE), n_layers)],
        norm,
        vocab_size=keys.integer("vocab_size"),
        d_model=keys.integer("hidden_size"),
        max_seq_len=max_seq_len,
        tied_embeddings=keys.flag("tie_word_embeddings"),
        bos_id=keys.token_id("bos_token_id"),
        eos_ids=keys.token_ids("eos_token_id"),
        pad_id=keys.token_id("pad_token_id"),
    )
    keys.finish(IGNORED)
    return config


def _attentions(keys: Keys, eps: float, max_seq_len: int) -> tuple[AttentionSpec, AttentionSpec]:
    """Attention with a window, and attention that sees all; the frequencies of each stand in a section of its own."""
    head_dim = keys.integer("head_dim")
    near, far = ropes_by_kind(keys, head_dim, max_seq_len)
    full = AttentionSpec(
        n_heads=keys.integer("num_attention_heads"),
        n_kv_heads=keys.integer("num_key_value_heads"),
        head_dim=head_dim,
        position=far,
        qk_norm=QKNormSpec(over="head", eps=eps),
    )
    return replace(full, position=near, window=keys.integer("sliding_window")), full


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 5.24.0 reads it, without the layer that is left out."""
    form = "Mellum's config.json"
    near, far, slides = kinds_of(config, form)
    moe = config.only_moe(form)
    dense = [layer.ffn.d_ff for layer in config.layers if layer.moe is None]
    alike = replace(config, layers=uniform(replace(config.layers[0], mixer=far), config.n_layers))
    raw = common_to_hf(alike, form)
    del raw["rope_theta"], raw["rope_scaling"]
    raw |= {
        "architectures": ["MellumForCausalLM"],
        "model_type": NAME,
        "rope_parameters": {FULL: _section(far, form), SLIDING: _section(near, form)},
        "layer_types": [SLIDING if slid else FULL for slid in slides],
        "sliding_window": near.window,
        # Where no layer is dense, nothing is of this width.
        "intermediate_size": dense[0] if dense else moe.d_ff * moe.top_k,
        "mlp_layer_types": [_DENSE if layer.moe is None else _SPARSE for layer in config.layers],
        "moe_intermediate_size": moe.d_ff,
        "num_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.normalize_p is not None,
        "router_aux_loss_coef": moe.aux_loss_weight,
    }
    must_read_back(config, config_from_hf(raw), form)
    return raw


def _section(attention: AttentionSpec, form: str) -> dict[str, object]:
    """What ``rope_parameters`` says of one kind of layer."""
    keys = rope_to_hf(of_kind(attention.position, RopeSpec, form), attention.head_dim, form)
    scaling = keys.pop("rope_scaling") or {"rope_type": "default"}
    assert isinstance(scaling, dict), "a section or nothing"
    return {**keys, **scaling}


# GGUF ----------------------------------------------------------------------------------------------------------------

_PATTERN = f"{NAME}.attention.sliding_window_pattern"


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``mellum``."""
    said = {key: value for key, value in metadata.items() if key != _PATTERN}
    keys = gguf_keys.architecture_keys(said, NAME)
    common = common_from_gguf(keys, metadata, shapes)
    n_layers, norm = countable(common.pop("n_layers")), common.pop("norm")
    mixer: AttentionSpec = common.pop("mixer")
    slides = _slides(metadata.get(_PATTERN), n_layers) if mixer.window is not None else [False] * n_layers
    rope = of_kind(mixer.position, RopeSpec, f"GGUF arch {NAME}")
    if keys.given("rope.freq_base_swa"):  # llama.cpp turns all layers by the other key
        keys.must_be("rope.freq_base_swa", keys.number("rope.freq_base"))
    far = replace(mixer, window=None, qk_norm=QKNormSpec(over="head", eps=norm.eps))
    keys.has("feed_forward_length")  # of dense layers, which there are none of
    moe = gguf_keys.plain_experts(keys, keys.integer("expert_feed_forward_length"))
    near = replace(far, window=mixer.window, position=RopeSpec(theta=rope.theta))
    config = _model(near, far, slides, [moe] * n_layers, norm, **common)
    keys.finish(gguf_keys.IGNORED)
    return config


def _slides(pattern: object, n_layers: int) -> list[bool]:
    """Which layers have a window: a flag each, or a number n, of which every n-th layer sees all."""
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
        return [i % pattern != pattern - 1 for i in range(n_layers)]
    if isinstance(pattern, list) and len(pattern) == n_layers and all(isinstance(one, bool) for one in pattern):
        return pattern
    raise ConfigError(f"GGUF {_PATTERN} must be a number or {n_layers} flags, got {str(pattern)[:80]}")


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``mellum``."""
    form = f"GGUF arch {NAME}"
    near, far, slides = kinds_of(config, form)
    layer = replace(config.layers[0], mixer=replace(far, window=near.window))
    alike = replace(config, layers=uniform(layer, config.n_layers))
    moe = of_kind(layer.ffn, MoESpec, form)
    metadata = {
        **common_to_gguf(alike, form, NAME),
        **gguf_keys.expert_keys(alike, NAME),
        f"{NAME}.feed_forward_length": moe.d_ff * moe.top_k,
        _PATTERN: slides,
    }
    gguf_keys.must_read_back(config, config_from_gguf, metadata, form)
    return metadata


def notes(raw: Mapping[str, object]) -> list[str]:
    """What is said of the layer for multi-token prediction."""
    if not any(raw.get(key) for key in _PREDICTION):
        return []
    return ["the layer that predicts one token more (multi-token prediction) is left out"]


FAMILY = Family(
    name=NAME,
    presets=PRESETS,
    model_types=(NAME,),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={"hf": hf_layout, "hf5": hf5_layout},
    gguf_archs=(NAME,),
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_map=gguf_map,
    ignored_tensors=("mtp.*",),
    notes=notes,
    tied_copies=HF_TIED,
)
