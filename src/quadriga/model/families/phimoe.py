"""Phi-3.5-MoE (Microsoft, August 2024): 16 experts, two of which a SparseMixer chooses, and LayerNorm with biases.

Each of the two weighs its softmax over the experts near it (``MoESpec``'s ``sparse_mixer``), so that the weights do not
sum to one. That is the router's inference. transformers' training draws experts at random among the near ones and
rescales what is not the best one; here the best are chosen in training too, and gradients are those of the weights.
Rotary positions are LongRoPE's, with a stretch for each of its two lists. Source: transformers 4.57.6 (configuration
and modeling of phimoe). llama.cpp's arch phimoe divides the chosen weights of a softmax by their sum, which is another
model, so no GGUF is read or written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quadriga.model.config import LongRopeScaling, ModelConfig, MoESpec, NormSpec, RopeSpec, uniform_model
from quadriga.model.families import windows
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.llama2 import HF_COMMON, HF_TIED, common_from_hf, common_to_hf, hf_qkv
from quadriga.model.families.pieces import copies, experts
from quadriga.model.weight_map import Piece

IGNORED = PRETRAINED_KEYS | {"hidden_dropout", "original_max_position_embeddings", "input_jitter_noise"}
"""The last is noise on what a mixture reads in training, which here disturbs nothing; the one before it a copy of the
key of the same name in rope_scaling."""


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a Phi-MoE config.json, as transformers 4 or 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "phimoe")
    keys.must_be("hidden_act", "silu")
    keys.must_be("num_experts_per_tok", 2)  # the mixer's own number
    keys.integer("num_key_value_heads"), keys.flag("attention_bias")  # whose defaults are no other key's value
    common = common_from_hf(keys, biases=True)
    config = uniform_model(
        family="phimoe",
        ffn=MoESpec(
            d_ff=keys.integer("intermediate_size"),
            n_experts=keys.integer("num_local_experts"),
            top_k=2,
            activation="silu",
            score="sparse_mixer",
            normalize_p=None,
            mixer_eps=keys.number("router_jitter_noise"),
            aux_loss_weight=keys.number("router_aux_loss_coef"),
        ),
        tied_embeddings=keys.flag("tie_word_embeddings"),
        head_bias=keys.flag("lm_head_bias"),
        **{**common, "norm": NormSpec(kind="layer", eps=common["norm"].eps, bias=True)},
    )
    keys.number_or_null("sliding_window")
    config = config.with_mixer(window=windows.for_all(keys, config.max_seq_len))
    keys.finish(IGNORED)
    return config


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "Phi-MoE's config.json"
    layer = config.only_layer(form)
    ffn, rope = of_kind(layer.ffn, MoESpec, form), of_kind(layer.attention.position, RopeSpec, form)
    scaling = rope.scaling
    if isinstance(scaling, LongRopeScaling):  # its two stretches have keys of their own
        rope = replace(rope, scaling=None)
    written = config.with_mixer(position=rope)
    raw: dict[str, object] = {
        **common_to_hf(written, form),
        "architectures": ["PhimoeForCausalLM"],
        "model_type": "phimoe",
        "num_local_experts": ffn.n_experts,
        "num_experts_per_tok": ffn.top_k,
        "router_jitter_noise": ffn.mixer_eps,
        "router_aux_loss_coef": ffn.aux_loss_weight,
        "lm_head_bias": config.head_bias,
        "sliding_window": layer.attention.window,
    }
    # transformers takes it from the other sizes; Phi-mini-MoE's file has it.
    if layer.attention.q_dim == config.d_model:
        del raw["head_dim"]
    if isinstance(scaling, LongRopeScaling):
        raw["rope_scaling"] = _longrope(scaling)
    must_read_back(config, config_from_hf(raw), form)
    return raw


def _longrope(scaling: LongRopeScaling) -> dict[str, Any]:
    return {
        "type": "longrope",
        "short_factor": list(scaling.short_factors),
        "long_factor": list(scaling.long_factors),
        "short_mscale": scaling.short_scale,
        "long_mscale": scaling.long_scale,
        "original_max_position_embeddings": scaling.original_max_seq_len,
    }


_LAYER = "model.layers.{i}."
_MIXTURE = _LAYER + "block_sparse_moe."
_HF = HF_COMMON | {
    _LAYER + "input_layernorm.bias": "layers.{i}.attn_norm.bias",
    _LAYER + "post_attention_layernorm.bias": "layers.{i}.ffn_norm.bias",
    "model.norm.bias": "final_norm.bias",
    "lm_head.bias": "lm_head.bias",
    _MIXTURE + "gate.weight": "layers.{i}.moe.router.weight",
}


def hf_layout(config: ModelConfig) -> list[Piece]:
    """transformers 4, and every published checkpoint: a matrix per expert."""
    name = _MIXTURE + "experts.{e}."
    return [
        *copies(config, _HF),
        *hf_qkv(config),
        *experts(config, "w_gate", name + "w1.weight"),
        *experts(config, "w_up", name + "w3.weight"),
        *experts(config, "w_down", name + "w2.weight"),
    ]


FAMILY = Family(
    name="phimoe",
    presets={},
    model_types=("phimoe",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={"hf": hf_layout},
    tied_copies=HF_TIED,
)
