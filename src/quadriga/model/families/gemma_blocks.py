"""What Gemma 2 and 3 have in common: a dense block between norms on both sides, whose weights are stored less one.

    h = h + norm(attention(norm(h)));    h = h + norm(network(norm(h)))        norm(x) = x / rms(x) * (1 + weight)

Embeddings are multiplied by sqrt(D) and are the head as well. Some layers have a window. GGUF files have 1 + weight
(``io.restate``). Sources: see :mod:`quadriga.model.families.gemma2` and :mod:`quadriga.model.families.gemma3`.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    in_order,
    uniform,
)
from quadriga.model.families import gguf_keys
from quadriga.model.families.base import of_kind
from quadriga.model.families.keys import Keys
from quadriga.model.families.llama2 import GGUF_COMMON, GGUF_FFN, HF_COMMON, HF_FFN, common_to_gguf, hf_qkv
from quadriga.model.families.pieces import copies
from quadriga.model.families.qwen3 import GGUF_QK_NORMS, HF_QK_NORMS
from quadriga.model.families.windows import FULL, SLIDING, kinds_of
from quadriga.model.weight_map import Piece

ACTIVATION = "gelu_pytorch_tanh"
_LAYER, _OURS = "model.layers.{i}.", "layers.{i}."
_HF_NAMES = {
    **{source: target for source, target in HF_COMMON.items() if "post_attention" not in source},
    **HF_FFN,
    **HF_QK_NORMS,
    _LAYER + "post_attention_layernorm.weight": _OURS + "attn_post_norm.weight",
    _LAYER + "pre_feedforward_layernorm.weight": _OURS + "ffn_norm.weight",
    _LAYER + "post_feedforward_layernorm.weight": _OURS + "ffn_post_norm.weight",
}
_GGUF_NAMES = {
    **GGUF_COMMON,
    **GGUF_FFN,
    **GGUF_QK_NORMS,
    "blk.{i}.post_attention_norm.weight": _OURS + "attn_post_norm.weight",
    "blk.{i}.post_ffw_norm.weight": _OURS + "ffn_post_norm.weight",
}


def model_of(
    family: str,
    near: AttentionSpec,
    far: AttentionSpec,
    slides: Sequence[bool],
    d_ff: int,
    norm: NormSpec,
    *,
    d_model: int,
    **rest: Any,
) -> ModelConfig:
    """The model.

    Args:
        near, far: attention with a window, and without.
        slides: of every layer, whether it has one.
        rest: the other fields of the model.
    """
    ffn = DenseSpec(d_ff=d_ff, activation="gelu_tanh")
    layers = in_order(LayerSpec(norm=norm, mixer=near if slid else far, ffn=ffn, post_norms=True) for slid in slides)
    scale = max(d_model, 1) ** 0.5
    return ModelConfig(family=family, layers=layers, final_norm=norm, d_model=d_model, embedding_scale=scale, **rest)


def slides_from_hf(keys: Keys, n_layers: int, period: int) -> list[bool]:
    """Which layers have a window: as ``layer_types`` says, or all but every ``period``-th, as in files before it."""
    if keys.given("layer_types"):
        return [one == SLIDING for one in keys.words("layer_types", (FULL, SLIDING), n_layers)]
    return every_nth_full(n_layers, period)


def every_nth_full(n_layers: int, period: int) -> list[bool]:
    """Windows in all layers but every ``period``-th."""
    return [(i + 1) % max(1, period) != 0 for i in range(n_layers)]


def common_from_hf(keys: Keys, d_model: int) -> dict[str, Any]:
    """Fields of the model that both families' config.json name alike."""
    for key in ("hidden_activation", "hidden_act"):
        keys.must_be(key, ACTIVATION)
    keys.must_be("attention_bias", False)
    keys.must_be("use_bidirectional_attention", False, None)
    return {
        "d_model": d_model,
        "vocab_size": keys.integer("vocab_size"),
        "max_seq_len": keys.integer("max_position_embeddings"),
        # The classes tie them, and early files leave the key out.
        "tied_embeddings": keys.flag("tie_word_embeddings") if keys.has("tie_word_embeddings") else True,
        "logit_cap": cap_of(keys, "final_logit_softcapping"),
        "bos_id": keys.token_id("bos_token_id"),
        "eos_ids": keys.token_ids("eos_token_id"),
        "pad_id": keys.token_id("pad_token_id"),
    }


def cap_of(keys: Keys, key: str) -> float | None:
    """A soft cap, where there is one."""
    return keys.number(key) if keys.given(key) else None


def common_to_hf(config: ModelConfig, form: str) -> dict[str, object]:
    """The keys that both families write."""
    near, far, slides = kinds_of(config, form)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": of_kind(config.layers[0].ffn, DenseSpec, form).d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": far.n_heads,
        "num_key_value_heads": far.n_kv_heads,
        "head_dim": far.head_dim,
        "hidden_activation": ACTIVATION,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.final_norm.eps,
        "query_pre_attn_scalar": scalar_of(far),
        "attention_bias": False,
        "sliding_window": near.window,
        "layer_types": [SLIDING if slid else FULL for slid in slides],
        "attn_logit_softcapping": far.soft_cap,
        "final_logit_softcapping": config.logit_cap,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
        "pad_token_id": config.pad_id,
        "use_cache": True,
    }


def scalar_of(attention: AttentionSpec) -> float | int:
    """``query_pre_attn_scalar``, whose root scores are divided by."""
    exact = attention.score_scale**-2
    return round(exact) if abs(exact - round(exact)) < 1e-6 else exact


def hf_map(config: ModelConfig) -> list[Piece]:
    """Every tensor of the text as transformers names it."""
    return [*copies(config, _HF_NAMES), *hf_qkv(config)]


def gguf_map(config: ModelConfig) -> list[Piece]:
    """Every tensor as llama.cpp names it; rotary halves are left as they are."""
    return [*copies(config, _GGUF_NAMES), *gguf_keys.projections(config, interleaved=False)]


def stored_scale(attention: AttentionSpec, d_model: int, *, largest: bool) -> AttentionSpec:
    """With llama.cpp's scale of scores: 1 / sqrt(head_dim), or of the largest model 1 / sqrt(D / heads)."""
    wanted = d_model // max(1, attention.n_heads) if largest else attention.head_dim
    return gguf_keys.with_scale(attention, max(1, wanted) ** -0.5)


def to_gguf(config: ModelConfig, arch: str, form: str) -> dict[str, object]:
    """The keys that both architectures share."""
    near, far, _ = kinds_of(config, form)
    layer = replace(config.layers[0], mixer=replace(far, window=near.window))
    return common_to_gguf(replace(config, layers=uniform(layer, config.n_layers)), form, arch)


def _stored_as(config: ModelConfig, *, plus_one: bool) -> ModelConfig:
    def changed(layer: LayerSpec) -> LayerSpec:
        attn = layer.attention
        norm = None if attn.qk_norm is None else replace(attn.qk_norm, plus_one=plus_one)
        return replace(layer, norm=replace(layer.norm, plus_one=plus_one), mixer=replace(attn, qk_norm=norm))

    return replace(config.with_layers(changed), final_norm=replace(config.final_norm, plus_one=plus_one))


def gguf_form(config: ModelConfig) -> ModelConfig:
    """Norms' weights as they multiply."""
    return _stored_as(config, plus_one=False)


def hf_form(config: ModelConfig) -> ModelConfig:
    """Norms' weights less one."""
    return _stored_as(config, plus_one=True)


def plain_rope(attention: AttentionSpec, form: str) -> float:
    """The base of a rotation that is not scaled."""
    rope = of_kind(attention.position, RopeSpec, form)
    if rope.scaling is not None or rope.dim is not None:
        raise ConfigError(f"{form} cannot express this model: some layers turn by plain frequencies, got {rope}")
    return rope.theta
