"""FlexOlmo (Ai2, July 2025): OLMo 2's block with experts that were trained apart, each on its owner's data.

Seven networks of OLMo 2 7B's width, five chosen; the chosen weights stay as the softmax over all experts gave them.
Sources: transformers 4.57.6 (configuration and modeling of flex_olmo). llama.cpp has no architecture for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quadriga.model.config import (
    AttentionSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    QKNormSpec,
    RopeSpec,
    uniform_model,
)
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.llama2 import HF_TIED, common_from_hf, common_to_hf
from quadriga.model.families.olmo2 import hf_attention
from quadriga.model.families.pieces import copies
from quadriga.model.families.qwen3 import HF_ROUTER, hf5_experts, hf_experts
from quadriga.model.weight_map import Piece

PRESETS = {
    "flexolmo-7x7b": uniform_model(
        family="flex_olmo",
        vocab_size=100_352,
        d_model=4096,
        n_layers=32,
        max_seq_len=4096,
        norm=NormSpec(kind="rms", eps=1e-6),
        mixer=AttentionSpec(
            n_heads=32,
            n_kv_heads=32,
            head_dim=128,
            position=RopeSpec(theta=500_000.0),
            qk_norm=QKNormSpec(over="vector", eps=1e-6),
        ),
        ffn=MoESpec(d_ff=11_008, n_experts=7, top_k=5, activation="silu", normalize_p=None, aux_loss_weight=0.01),
        pre_norms=False,
        post_norms=True,
        eos_ids=(100_257,),
        pad_id=100_277,
    )
}


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a FlexOlmo config.json, as transformers 4 or 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "flex_olmo")
    keys.must_be("hidden_act", "silu")
    keys.integer("num_key_value_heads")  # every published file has it
    common = common_from_hf(keys, biases=True)
    mixer = replace(common["mixer"], qk_norm=QKNormSpec(over="vector", eps=common["norm"].eps))
    config = uniform_model(
        family="flex_olmo",
        ffn=MoESpec(
            d_ff=keys.integer("intermediate_size"),
            n_experts=keys.integer("num_experts"),
            top_k=keys.integer("num_experts_per_tok"),
            activation="silu",
            normalize_p=1.0 if keys.flag("norm_topk_prob") else None,
            aux_loss_weight=keys.number("router_aux_loss_coef"),
        ),
        tied_embeddings=keys.flag("tie_word_embeddings"),
        pre_norms=False,
        post_norms=True,
        **{**common, "mixer": mixer},
    )
    keys.finish(PRETRAINED_KEYS)
    return config


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "FlexOlmo's config.json"
    ffn = of_kind(config.only_layer(form).ffn, MoESpec, form)
    raw: dict[str, object] = {
        **common_to_hf(config, form),
        "architectures": ["FlexOlmoForCausalLM"],
        "model_type": "flex_olmo",
        "num_experts": ffn.n_experts,
        "num_experts_per_tok": ffn.top_k,
        "norm_topk_prob": ffn.normalize_p is not None,
        "router_aux_loss_coef": ffn.aux_loss_weight,
    }
    must_read_back(config, config_from_hf(raw), form)
    return raw


def hf_layout(config: ModelConfig) -> list[Piece]:
    """transformers 4, and every published checkpoint: a matrix per expert."""
    return hf_attention(config) + copies(config, HF_ROUTER) + hf_experts(config)


def hf5_layout(config: ModelConfig) -> list[Piece]:
    """transformers 5 in memory: all experts in one tensor, gate above up."""
    return hf_attention(config) + copies(config, HF_ROUTER) + hf5_experts(config)


FAMILY = Family(
    name="flex_olmo",
    presets=PRESETS,
    model_types=("flex_olmo",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={"hf": hf_layout, "hf5": hf5_layout},
    counterpart="olmo2",
    tied_copies=HF_TIED,
)
