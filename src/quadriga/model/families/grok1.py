"""Grok-1 (xAI, March 2024): eight GeGLU experts of which two work, norms around each branch, soft-capped scores.

    h += norm(attn(norm(h)));  h += norm(moe(norm(h)))        embeddings * sqrt(D), logits / sqrt(3)

Sources: xai-org/grok-1@7050ed20 (the mathematics and the released files), the hpcai-tech port (tensor names and
config.json), gguf 0.19.0 and llama.cpp b11434 (src/models/grok.cpp).

The two experts' weights are the softmax values, not renormalised. llama.cpp does renormalise; because a norm follows
the experts, a common factor only moves its epsilon, so a GGUF is read as the same model. What is called gelu here is
jax's default, the tanh form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from quadriga.errors import ConfigError
from quadriga.model.config import AttentionSpec, ModelConfig, MoESpec, NormSpec, RopeSpec, uniform_model
from quadriga.model.families import gguf_keys
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys, equal_heads, exact_or
from quadriga.model.families.llama2 import HF_TIED
from quadriga.model.families.pieces import copies, experts, qkv
from quadriga.model.weight_map import Piece, Shape

IGNORED = PRETRAINED_KEYS

SOFT_CAP = 30.0
THETA = 10_000.0
LOGIT_SCALE = 0.5773502691896257  # 1/sqrt(3)

PRESETS = {
    "grok-1": uniform_model(
        family="grok1",
        vocab_size=131_072,
        d_model=6144,
        n_layers=64,
        max_seq_len=8192,
        norm=NormSpec(kind="rms", eps=1e-5),
        mixer=AttentionSpec(n_heads=48, n_kv_heads=8, head_dim=128, position=RopeSpec(theta=THETA), soft_cap=SOFT_CAP),
        ffn=MoESpec(d_ff=32_768, n_experts=8, top_k=2, activation="gelu_tanh", normalize_p=None, aux_loss_weight=0.001),
        post_norms=True,
        tied_embeddings=True,
        embedding_scale=math.sqrt(6144),
        logit_scale=LOGIT_SCALE,
        bos_id=1,
        eos_ids=(2,),
        pad_id=0,
    )
}


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read the hpcai-tech config.json and its relatives."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "grok-1", "grok1")
    keys.must_be("hidden_act", "gelu", "gelu_new", "gelu_pytorch_tanh")
    keys.must_be("tie_word_embeddings", True)
    keys.must_be("rope_scaling", None)
    d_model, n_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    attn = AttentionSpec(
        n_heads=n_heads,
        n_kv_heads=keys.integer("num_key_value_heads"),
        head_dim=keys.integer("head_dim") if keys.given("head_dim") else equal_heads(d_model, n_heads),
        # hpcai's file leaves it out: xAI's code fixes 10000.
        position=RopeSpec(theta=keys.number("rope_theta") if keys.has("rope_theta") else THETA),
        # One port leaves it out: xAI's code fixes 30.
        soft_cap=keys.number("max_attn_value") if keys.has("max_attn_value") else SOFT_CAP,
    )
    config = uniform_model(
        family="grok1",
        vocab_size=keys.integer("vocab_size"),
        d_model=d_model,
        n_layers=keys.integer("num_hidden_layers"),
        max_seq_len=keys.integer("max_position_embeddings"),
        norm=NormSpec(kind="rms", eps=keys.number("rms_norm_eps")),
        # It multiplies the scores, not the output, whatever its name says (xai-org/grok-1 model.py).
        mixer=gguf_keys.with_scale(attn, keys.number("attn_output_multiplier")),
        ffn=MoESpec(
            d_ff=keys.integer("intermediate_size"),
            # hpcai says num_experts, ports that came from Mixtral's code num_local_experts.
            n_experts=keys.integer("num_local_experts" if keys.has("num_local_experts") else "num_experts"),
            top_k=keys.integer("num_experts_per_tok"),
            activation="gelu_tanh",
            normalize_p=None,
            # Training only; the ports made for inference leave it out.
            aux_loss_weight=keys.number("router_aux_loss_coef") if keys.has("router_aux_loss_coef") else 0.0,
        ),
        post_norms=True,
        tied_embeddings=True,
        embedding_scale=keys.number("embedding_multiplier_scale"),
        logit_scale=keys.number("output_multiplier_scale"),
        bos_id=keys.token_id("bos_token_id"),
        eos_ids=keys.token_ids("eos_token_id"),
        pad_id=keys.token_id("pad_token_id"),
    )
    keys.finish(IGNORED)
    return config


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as the hpcai-tech port reads it; transformers itself has no Grok-1."""
    form = "Grok-1's config.json"
    layer = config.only_layer(form)
    attn, ffn = layer.attention, of_kind(layer.ffn, MoESpec, form)
    rope = of_kind(attn.position, RopeSpec, form)
    raw: dict[str, object] = {
        "architectures": ["Grok1ModelForCausalLM"],
        "model_type": "grok-1",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": ffn.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": attn.n_heads,
        "num_key_value_heads": attn.n_kv_heads,
        "head_dim": attn.head_dim,
        "attn_output_multiplier": attn.score_scale,
        "max_attn_value": attn.soft_cap,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": rope.theta,
        "embedding_multiplier_scale": config.embedding_scale,
        "output_multiplier_scale": config.logit_scale,
        "rms_norm_eps": layer.norm.eps,
        "num_experts": ffn.n_experts,
        "num_experts_per_tok": ffn.top_k,
        "router_aux_loss_coef": ffn.aux_loss_weight,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
        "pad_token_id": config.pad_id,
        "use_cache": True,
    }
    must_read_back(config, config_from_hf(raw), form)
    return raw


_NORMS = {
    "pre_attn_norm": "layers.{i}.attn_norm.weight",
    "post_attn_norm": "layers.{i}.attn_post_norm.weight",
    "pre_moe_norm": "layers.{i}.ffn_norm.weight",
    "post_moe_norm": "layers.{i}.ffn_post_norm.weight",
}


def _hpcai_layout(config: ModelConfig, *, norm: str) -> list[Piece]:
    """The hpcai-tech names; its norms call their weight ``scale``, later ports ``weight``."""
    layer = "model.layers.{i}."
    one = layer + "moe_block.experts.{e}."
    names = {
        "model.embed_tokens.weight": "embed.weight",
        **{f"{layer}{name}.{norm}": target for name, target in _NORMS.items()},
        layer + "attn.o_proj.weight": "layers.{i}.attn.wo.weight",
        layer + "moe_block.gate.weight": "layers.{i}.moe.router.weight",
        f"model.norm.{norm}": "final_norm.weight",
    }
    q, k, v = (f"{layer}attn.{p}_proj.weight" for p in "qkv")
    return [
        *copies(config, names),
        *qkv(config, q, k, v),
        *experts(config, "w_gate", one + "linear.weight"),
        *experts(config, "w_up", one + "linear_v.weight"),
        *experts(config, "w_down", one + "linear_1.weight"),
    ]


_JAX_LAYER = "transformer/decoder_layer_{i}/"
_JAX_NORMS = {
    "language_model/in_out_embed/embeddings": "embed.weight",
    "language_model/rms_norm/scale": "final_norm.weight",
    _JAX_LAYER + "rms_norm/scale": "layers.{i}.attn_norm.weight",
    _JAX_LAYER + "rms_norm_1/scale": "layers.{i}.attn_post_norm.weight",
    _JAX_LAYER + "rms_norm_2/scale": "layers.{i}.ffn_norm.weight",
    _JAX_LAYER + "rms_norm_3/scale": "layers.{i}.ffn_post_norm.weight",
}
_JAX_MATRICES = {
    _JAX_LAYER + "multi_head_attention/linear/w": "layers.{i}.attn.wo.weight",
    _JAX_LAYER + "router/w": "layers.{i}.moe.router.weight",
    _JAX_LAYER + "moe/linear/w": "layers.{i}.moe.w_gate",
    _JAX_LAYER + "moe/linear_v/w": "layers.{i}.moe.w_up",
    _JAX_LAYER + "moe/linear_1/w": "layers.{i}.moe.w_down",
}


def _jax_layout(config: ModelConfig) -> list[Piece]:
    """The released files under their names in the JAX parameter tree; matrices are stored (in, out)."""
    q, k, v = (f"{_JAX_LAYER}multi_head_attention/{p}/w" for p in ("query", "key", "value"))
    return [
        *copies(config, _JAX_NORMS),
        *copies(config, _JAX_MATRICES, transpose=True),
        *qkv(config, q, k, v, transpose=True),
    ]


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read GGUF arch ``grok`` of a Grok-1.

    Files made before llama.cpp wrote the scales have none of their keys; its loader then takes Grok-1's own constants,
    and so does this reader. ``router_logit_softcapping`` is written by the converter and applied by nobody.
    """
    gguf_keys.refuse_tensors(
        shapes, {"blk.0.ffn_up.weight": "Grok-2's dense branch", "rope_freqs.weight": "scaled rotary frequencies"}
    )
    keys = gguf_keys.architecture_keys(metadata, "grok")
    d_model = keys.integer("embedding_length")
    soft_cap = _constant(keys, "attn_logit_softcapping", SOFT_CAP)
    config = uniform_model(
        family="grok1",
        vocab_size=gguf_keys.vocabulary_size(keys, shapes),
        d_model=d_model,
        n_layers=keys.integer("block_count"),
        max_seq_len=keys.integer("context_length"),
        norm=NormSpec(kind="rms", eps=gguf_keys.number(keys, "attention.layer_norm_rms_epsilon")),
        mixer=gguf_keys.with_scale(
            gguf_keys.attention(keys, d_model, RopeSpec(theta=gguf_keys.rope_theta(keys)), soft_cap=soft_cap),
            _constant(keys, "attention.output_scale", 128**-0.5),
        ),
        ffn=gguf_keys.plain_experts(
            keys, keys.integer("feed_forward_length"), activation="gelu_tanh", normalize_p=None
        ),
        post_norms=True,
        tied_embeddings=gguf_keys.OUTPUT not in shapes,
        embedding_scale=exact_or(_constant(keys, "embedding_scale", math.sqrt(6144)), math.sqrt(d_model)),
        logit_scale=exact_or(_constant(keys, "logit_scale", LOGIT_SCALE), LOGIT_SCALE),
        **gguf_keys.token_ids(metadata),
    )
    keys.must_be("final_logit_softcapping", 0)
    keys.must_be("attention.temperature_length", 0)
    keys.finish(gguf_keys.IGNORED | {"router_logit_softcapping"})
    return config


def _constant(keys: Keys, key: str, grok1: float) -> float:
    return gguf_keys.number(keys, key) if keys.has(key) else grok1


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of GGUF arch ``grok``, every scale spelled out."""
    form = "GGUF arch grok"
    layer = config.only_layer(form)
    attn, ffn = layer.attention, of_kind(layer.ffn, MoESpec, form)
    rope = of_kind(attn.position, RopeSpec, form)
    if attn.soft_cap is None:
        raise ConfigError(f"{form} cannot express this model: llama.cpp caps Grok's attention scores, soft_cap is None")
    metadata = {
        **gguf_keys.common_keys(config, "grok"),
        "grok.rope.freq_base": rope.theta,
        "grok.attention.key_length": attn.head_dim,
        "grok.attention.value_length": attn.head_dim,
        "grok.attention.output_scale": attn.score_scale,
        "grok.attn_logit_softcapping": attn.soft_cap,
        "grok.embedding_scale": config.embedding_scale,
        "grok.logit_scale": config.logit_scale,
        "grok.expert_count": ffn.n_experts,
        "grok.expert_used_count": ffn.top_k,
    }
    gguf_keys.must_read_back(config, config_from_gguf, metadata, form)
    return metadata


_GGUF_NAMES = {
    gguf_keys.TOKEN_EMBEDDING: "embed.weight",
    "blk.{i}.attn_norm.weight": "layers.{i}.attn_norm.weight",
    "blk.{i}.attn_output.weight": "layers.{i}.attn.wo.weight",
    "blk.{i}.attn_output_norm.weight": "layers.{i}.attn_post_norm.weight",
    "blk.{i}.ffn_norm.weight": "layers.{i}.ffn_norm.weight",
    **gguf_keys.ROUTER,
    "blk.{i}.layer_output_norm.weight": "layers.{i}.ffn_post_norm.weight",
    "output_norm.weight": "final_norm.weight",
    gguf_keys.OUTPUT: "lm_head.weight",
}


def _gguf_map(config: ModelConfig) -> list[Piece]:
    # No rotary permutation: llama.cpp runs Grok with NeoX (half) rotation.
    return copies(config, _GGUF_NAMES | gguf_keys.MERGED_EXPERTS) + gguf_keys.projections(config, interleaved=False)


def _gguf_split_map(config: ModelConfig) -> list[Piece]:
    return (
        copies(config, _GGUF_NAMES) + gguf_keys.projections(config, interleaved=False) + gguf_keys.split_experts(config)
    )


FAMILY = Family(
    name="grok1",
    presets=PRESETS,
    model_types=("grok-1", "grok1"),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={
        "hpcai": partial(_hpcai_layout, norm="scale"),
        "hpcai-weight": partial(_hpcai_layout, norm="weight"),
        "jax": _jax_layout,
    },
    gguf_archs=("grok",),
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_map=_gguf_map,
    gguf_split_map=_gguf_split_map,
    tied_copies=HF_TIED,
)
