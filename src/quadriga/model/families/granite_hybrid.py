"""Granite 4 (IBM, October 2025): nine layers of ten are Mamba-2, the tenth is attention without positions.

The constants are Granite 3's (``granite``). Behind every mixer is a mixture with a shared network, or in the small
models (350M, 1B, Micro) one network, which config.json calls shared as well. Sources: transformers 4.57.6 and 5.24.0
(configuration and modeling_granitemoehybrid), llama.cpp (arch granitehybrid; conversion/granite.py and mamba.py). GGUF
files have the negative rate in place of its logarithm: they are read as they are, and a conversion to or from them
restates the numbers (``io.restate``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quadriga.errors import ConfigError
from quadriga.model.config import (
    AttentionSpec,
    DenseSpec,
    LayerSpec,
    Mamba2Spec,
    ModelConfig,
    MoESpec,
    NormSpec,
    RopeSpec,
    countable,
    in_order,
    uniform,
)
from quadriga.model.families import gguf_keys
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.granite import inverse, logits_divisor, stored_scale
from quadriga.model.families.granite_hybrid_layouts import gguf_map, hf_layout
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys, equal_heads
from quadriga.model.families.llama2 import HF_TIED, attention_from_hf, common_from_gguf, common_to_gguf, common_to_hf
from quadriga.model.weight_map import Shape

ARCH = "granitehybrid"
IGNORED = PRETRAINED_KEYS | {"mamba_chunk_size", "init_method", "normalization_function", "logits_to_keep"}
"""How many tokens other programs compute at once; how the weights were drawn; what RMSNorm is called."""
_ATTENTION, _MAMBA = ("attention", "full_attention"), ("mamba", "linear_attention")
"""transformers 4's words for the layers, and 5's."""
_UNUSED_ROPE = RopeSpec(theta=10_000.0)
"""What is written of positions where nothing turns; so do the published files."""


def _model(
    common: Mapping[str, Any], attention: AttentionSpec, mamba: Mamba2Spec | None, ffn: DenseSpec | MoESpec, **own: Any
) -> ModelConfig:
    """Layers of both kinds.

    Args:
        common: fields of the model, and ``attends``, a flag a layer; ``mamba`` may be None where all are set.
        own: fields of every layer.
    """
    rest = {key: value for key, value in common.items() if key not in ("norm", "attends")}
    layers = in_order(
        LayerSpec(norm=common["norm"], mixer=attention if attends or mamba is None else mamba, ffn=ffn, **own)
        for attends in common["attends"]
    )
    return ModelConfig(family=ARCH, layers=layers, final_norm=common["norm"], **rest)


def _preset(
    *,
    d_model: int,
    attention: AttentionSpec,
    mamba_heads: int,
    mamba_head_dim: int,
    ffn: DenseSpec | MoESpec,
    attends: Sequence[int],
    logits: float,
    n_layers: int = 40,
    max_seq_len: int = 131_072,
    residual: float = 0.22,
) -> ModelConfig:
    mamba = Mamba2Spec(n_heads=mamba_heads, head_dim=mamba_head_dim, n_groups=1, state_dim=128, taps=4, eps=1e-5)
    common = {
        "vocab_size": 100_352,
        "d_model": d_model,
        "max_seq_len": max_seq_len,
        "norm": NormSpec(kind="rms", eps=1e-5),
        "attends": [i in attends for i in range(n_layers)],
        "embedding_scale": 12.0,
        "logit_scale": 1 / logits,
        "tied_embeddings": True,
        "bos_id": 100_257,
        "eos_ids": (100_257,),
        "pad_id": 100_256,
    }
    return _model(common, attention, mamba, ffn, residual_scale=residual)


def _heads(n_heads: int, n_kv_heads: int, head_dim: int, scale: float) -> AttentionSpec:
    plain = AttentionSpec(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, position=None)
    return gguf_keys.with_scale(plain, scale)


def _experts(d_ff: int, n_experts: int, top_k: int, shared: int) -> MoESpec:
    network = DenseSpec(d_ff=shared, activation="silu")
    return MoESpec(d_ff=d_ff, n_experts=n_experts, top_k=top_k, activation="silu", shared=network)


PRESETS = {
    "granite-4.0-h-350m": _preset(
        d_model=768,
        attention=_heads(12, 4, 64, 0.015625),
        mamba_heads=48,
        mamba_head_dim=32,
        ffn=DenseSpec(d_ff=2048, activation="silu"),
        attends=(10, 13, 17, 27),
        logits=3.0,
        n_layers=32,
        max_seq_len=32_768,
        residual=0.246,
    ),
    "granite-4.0-h-tiny": _preset(
        d_model=1536,
        attention=_heads(12, 4, 128, 0.0078125),
        mamba_heads=48,
        mamba_head_dim=64,
        ffn=_experts(512, 64, 6, shared=1024),
        attends=(5, 15, 25, 35),
        logits=6.0,
    ),
    "granite-4.0-h-small": _preset(
        d_model=4096,
        attention=_heads(32, 8, 128, 0.0078125),
        mamba_heads=128,
        mamba_head_dim=64,
        ffn=_experts(768, 72, 10, shared=1536),
        attends=(5, 15, 25, 35),
        logits=16.0,
    ),
}


# config.json ---------------------------------------------------------------------------------------------------------


def from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read Granite 4's config.json, as transformers 4 or 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "granitemoehybrid")
    keys.must_be("hidden_act", "silu")
    norm = NormSpec(kind="rms", eps=keys.number("rms_norm_eps"))
    n_layers = countable(keys.integer("num_hidden_layers"))
    attends = [word in _ATTENTION for word in keys.words("layer_types", _ATTENTION + _MAMBA, n_layers)]
    common = {
        "vocab_size": keys.integer("vocab_size"),
        "d_model": keys.integer("hidden_size"),
        "max_seq_len": keys.integer("max_position_embeddings"),
        "norm": norm,
        "attends": attends,
        "embedding_scale": keys.number("embedding_multiplier"),
        "logit_scale": inverse(keys, "logits_scaling"),
        "tied_embeddings": keys.flag("tie_word_embeddings"),
        "bos_id": keys.token_id("bos_token_id"),
        "eos_ids": keys.token_ids("eos_token_id"),
        "pad_id": keys.token_id("pad_token_id"),
    }
    mamba = _mamba_from_hf(keys, norm.eps, used=not all(attends))
    residual = keys.number("residual_multiplier")
    config = _model(common, _attention_from_hf(keys), mamba, _ffn_from_hf(keys), residual_scale=residual)
    keys.finish(IGNORED)
    return config


def _attention_from_hf(keys: Keys) -> AttentionSpec:
    scale = keys.number("attention_multiplier")
    keys.must_be("position_embedding_type", "nope", None, "rope")
    if keys.value("position_embedding_type") == "rope":
        return gguf_keys.with_scale(attention_from_hf(keys), scale)
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):  # without a say where nothing turns
        keys.has(key)
    keys.must_be("attention_bias", False)
    n_heads = keys.integer("num_attention_heads")
    head_dim = equal_heads(keys.integer("hidden_size"), n_heads)
    keys.must_be("head_dim", head_dim)
    return _heads(n_heads, keys.integer("num_key_value_heads"), head_dim, scale)


def _mamba_from_hf(keys: Keys, eps: float, *, used: bool) -> Mamba2Spec | None:
    """The state-space layers; None where there are none, whatever the keys say of them."""
    names = ("n_heads", "d_head", "n_groups", "d_state", "d_conv", "conv_bias", "expand", "proj_bias")
    if not used:
        for name in names:
            keys.has(f"mamba_{name}")
        keys.has("time_step_limit")
        return None
    keys.must_be("mamba_proj_bias", False)
    keys.must_be("time_step_limit", [0.0, math.inf], [0.0, {"__float__": "Infinity"}], None)
    n_heads, inner = keys.integer("mamba_n_heads"), keys.integer("mamba_expand") * keys.integer("hidden_size")
    head_dim = equal_heads(inner, n_heads)
    keys.must_be("mamba_d_head", head_dim, "auto")
    return Mamba2Spec(
        n_heads=n_heads,
        head_dim=head_dim,
        n_groups=keys.integer("mamba_n_groups"),
        state_dim=keys.integer("mamba_d_state"),
        taps=keys.integer("mamba_d_conv"),
        eps=eps,
        conv_bias=keys.flag("mamba_conv_bias"),
    )


def _ffn_from_hf(keys: Keys) -> DenseSpec | MoESpec:
    network = DenseSpec(d_ff=keys.integer("shared_intermediate_size"), activation="silu")
    n_experts = keys.integer("num_local_experts")
    if n_experts == 0:
        for key in ("intermediate_size", "num_experts_per_tok", "router_aux_loss_coef"):  # of experts
            keys.has(key)
        return network
    return MoESpec(
        d_ff=keys.integer("intermediate_size"),
        n_experts=n_experts,
        top_k=keys.integer("num_experts_per_tok"),
        activation="silu",
        aux_loss_weight=keys.number("router_aux_loss_coef"),
        shared=network,
    )


def _alike(config: ModelConfig) -> ModelConfig:
    """A model whose layers are all like its first attention, with positions: what shared keys are written from."""
    layer = config.first_attention()
    turning = replace(layer.attention, position=layer.attention.position or _UNUSED_ROPE)
    return replace(config, layers=uniform(replace(layer, mixer=turning), config.n_layers))


def _mamba(config: ModelConfig, form: str) -> Mamba2Spec:
    for layer in config.kinds():
        if not isinstance(layer.mixer, AttentionSpec):
            return of_kind(layer.mixer, Mamba2Spec, form)
    raise ConfigError(
        f"{form} cannot express this model: it has no Mamba-2 layer. Without one it is a Granite 3 (granite, "
        "granitemoeshared)"
    )


def to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "Granite 4's config.json"
    mamba, layer = _mamba(config, form), config.first_attention()
    raw = common_to_hf(_alike(config), form)
    del raw["head_dim"]  # the class takes it from the other sizes
    moe = layer.ffn if isinstance(layer.ffn, MoESpec) else None
    network = of_kind(layer.ffn if moe is None else moe.shared, DenseSpec, form)
    raw |= {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "position_embedding_type": "nope" if layer.attention.position is None else "rope",
        "layer_types": [_MAMBA[0] if isinstance(one.mixer, Mamba2Spec) else _ATTENTION[0] for one in config.layers],
        "attention_multiplier": layer.attention.score_scale,
        "residual_multiplier": layer.residual_scale,
        "embedding_multiplier": config.embedding_scale,
        "logits_scaling": logits_divisor(config),
        "mamba_n_heads": mamba.n_heads,
        "mamba_d_head": mamba.head_dim,
        "mamba_n_groups": mamba.n_groups,
        "mamba_d_state": mamba.state_dim,
        "mamba_d_conv": mamba.taps,
        "mamba_expand": mamba.inner_dim // config.d_model,
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": False,
        "num_local_experts": 0 if moe is None else moe.n_experts,
        "num_experts_per_tok": 0 if moe is None else moe.top_k,
        "router_aux_loss_coef": 0.0 if moe is None else moe.aux_loss_weight,
        "shared_intermediate_size": network.d_ff,
    }
    if mamba.inner_dim % config.d_model:
        raise ConfigError(
            f"{form} cannot express this model: the heads of a state-space layer together must be a multiple of the "
            f"model's width, got {mamba.inner_dim} and {config.d_model}"
        )
    must_read_back(config, from_hf(raw), form)
    return raw


# GGUF ----------------------------------------------------------------------------------------------------------------


def from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``granitehybrid``."""
    plain, attends = gguf_keys.by_heads(metadata, ARCH, "a state-space layer")
    keys = gguf_keys.architecture_keys(plain, ARCH)
    common = common_from_gguf(keys, metadata, shapes)
    attention: AttentionSpec = common.pop("mixer")
    common.pop("n_layers")
    # llama.cpp: layers turn by position unless this says no.
    if keys.given("rope.scaling.finetuned") and not keys.flag("rope.scaling.finetuned"):
        attention = replace(attention, position=None)
    scales = {name: stored_scale(keys, name) for name in ("residual_scale", "embedding_scale", "logit_scale")}
    common |= {
        "attends": attends,
        "embedding_scale": scales["embedding_scale"],
        "logit_scale": 1 / scales["logit_scale"],
    }
    mamba = _mamba_from_gguf(keys, shapes, attends, common["norm"].eps)
    config = _model(common, attention, mamba, _ffn_from_gguf(keys), residual_scale=scales["residual_scale"])
    keys.finish(gguf_keys.IGNORED)
    return config


def _mamba_from_gguf(keys: Keys, shapes: Mapping[str, Shape], attends: Sequence[bool], eps: float) -> Mamba2Spec:
    first = next((i for i, one in enumerate(attends) if not one), 0)
    n_heads = keys.integer("ssm.time_step_rank")
    return Mamba2Spec(
        n_heads=n_heads,
        head_dim=equal_heads(keys.integer("ssm.inner_size"), n_heads),
        n_groups=keys.integer("ssm.group_count"),
        state_dim=keys.integer("ssm.state_size"),
        taps=keys.integer("ssm.conv_kernel"),
        eps=eps,
        conv_bias=f"blk.{first}.ssm_conv1d.bias" in shapes,
        log_rate=False,
    )


def _ffn_from_gguf(keys: Keys) -> DenseSpec | MoESpec:
    d_ff = keys.integer("feed_forward_length")
    if keys.given("expert_count") and keys.integer("expert_count"):
        shared = DenseSpec(d_ff=keys.integer("expert_shared_feed_forward_length"), activation="silu")
        return gguf_keys.plain_experts(keys, d_ff, shared=shared)
    keys.must_be("expert_used_count", 0)
    keys.must_be("expert_shared_feed_forward_length", d_ff, 0)  # converters write it of the one network as well
    return DenseSpec(d_ff=d_ff, activation="silu")


def to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``granitehybrid``, of a model in :func:`gguf_form`."""
    form = f"GGUF arch {ARCH}"
    mamba, layer, alike = _mamba(config, form), config.first_attention(), _alike(config)
    written = {
        **common_to_gguf(alike, form, ARCH),
        f"{ARCH}.attention.head_count_kv": [
            one.mixer.n_kv_heads if isinstance(one.mixer, AttentionSpec) else 0 for one in config.layers
        ],
        f"{ARCH}.rope.scaling.finetuned": layer.attention.position is not None,
        f"{ARCH}.attention.scale": layer.attention.score_scale,
        f"{ARCH}.residual_scale": layer.residual_scale,
        f"{ARCH}.embedding_scale": config.embedding_scale,
        f"{ARCH}.logit_scale": logits_divisor(config),
        f"{ARCH}.ssm.conv_kernel": mamba.taps,
        f"{ARCH}.ssm.state_size": mamba.state_dim,
        f"{ARCH}.ssm.group_count": mamba.n_groups,
        f"{ARCH}.ssm.inner_size": mamba.inner_dim,
        f"{ARCH}.ssm.time_step_rank": mamba.n_heads,
    }
    if isinstance(layer.ffn, MoESpec):
        written |= gguf_keys.expert_keys(alike, ARCH)
        written[f"{ARCH}.expert_shared_feed_forward_length"] = of_kind(layer.ffn.shared, DenseSpec, form).d_ff
    gguf_keys.must_read_back(config, from_gguf, written, form)
    return written


def _with_rates(config: ModelConfig, *, logarithms: bool) -> ModelConfig:
    return config.with_layers(
        lambda layer: (
            replace(layer, mixer=replace(layer.mixer, log_rate=logarithms))
            if isinstance(layer.mixer, Mamba2Spec)
            else layer
        )
    )


def gguf_form(config: ModelConfig) -> ModelConfig:
    """Negative rates."""
    return _with_rates(config, logarithms=False)


def hf_form(config: ModelConfig) -> ModelConfig:
    """Logarithms of rates."""
    return _with_rates(config, logarithms=True)


FAMILY = Family(
    name=ARCH,
    presets=PRESETS,
    model_types=("granitemoehybrid",),
    config_from_hf=from_hf,
    config_to_hf=to_hf,
    layouts={"hf": hf_layout},
    gguf_archs=(ARCH,),
    config_from_gguf=from_gguf,
    config_to_gguf=to_gguf,
    gguf_form=gguf_form,
    hf_form=hf_form,
    gguf_map=gguf_map,
    tied_copies=HF_TIED,
)
