"""MiniMax-M2 (MiniMax, October 2025): 256 small experts, norms over all of q and of k, half of every head rotated.

The router is DeepSeek-V3's without groups, shared experts and scale: sigmoid scores, a stored correction for the choice
alone, chosen scores divided by their sum. Published files name experts as Mixtral's do, state the part of a head that
turns as ``rotary_dim``, and are quantised to 8 bits, which is refused; bfloat16 copies and GGUF files are read.
Sources: transformers 5.24.0 (configuration_minimax_m2, modeling_minimax_m2; 4.57.6 does not have it), llama.cpp (arch
minimax-m2, whose chosen weights are always divided and whose rotary halves lie as in Hugging Face's files).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quadriga.model.config import (
    AttentionSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    QKNormSpec,
    RopeSpec,
    countable,
    uniform_model,
)
from quadriga.model.families import gguf_keys, mixtral
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.deepseek_moe import GGUF_CORRECTION, SIGMOID
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.llama2 import HF_TIED, common_from_gguf, common_from_hf, common_to_gguf, common_to_hf
from quadriga.model.families.pieces import copies
from quadriga.model.families.qwen3 import HF_QK_NORMS, gguf_attention
from quadriga.model.weight_map import Piece, Shape

IGNORED = PRETRAINED_KEYS | {"use_mtp", "num_mtp_modules", "mtp_transformer_layers"}
"""Layers for multi-token prediction, which the published checkpoints do not hold."""

_EPS = 1e-6
PRESETS = {
    "minimax-m2": uniform_model(
        family="minimax-m2",
        vocab_size=200_064,
        d_model=3072,
        n_layers=62,
        max_seq_len=196_608,
        norm=NormSpec(kind="rms", eps=_EPS),
        mixer=AttentionSpec(
            n_heads=48,
            n_kv_heads=8,
            head_dim=128,
            position=RopeSpec(theta=5_000_000.0, dim=64),
            qk_norm=QKNormSpec(over="vector", eps=_EPS),
        ),
        ffn=MoESpec(
            d_ff=1536,
            n_experts=256,
            top_k=8,
            activation="silu",
            score="sigmoid",
            correction=True,
            aux_loss_weight=0.001,
        ),
        bos_id=200_019,
        eos_ids=(200_020,),
    )
}


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a MiniMax-M2 config.json, as published or as transformers 5 writes it."""
    keys = Keys(_with_factor(raw), "config.json")
    keys.must_be("model_type", "minimax_m2")
    keys.must_be("hidden_act", "silu")
    keys.must_be("scoring_func", "sigmoid")
    for key in ("use_routing_bias", "use_qk_norm"):
        keys.must_be(key, True)
    keys.must_be("qk_norm_type", "per_layer")
    keys.must_be("shared_intermediate_size", 0)
    keys.must_be("router_jitter_noise", 0, None)  # would disturb what the experts see as well
    keys.integer("head_dim"), keys.integer("num_key_value_heads")  # every published file has both
    common = common_from_hf(keys, partial=True)
    keys.must_be("attn_type_list", [1] * countable(common["n_layers"]), None)  # 1 is attention, 0 was linear attention
    config = uniform_model(
        family="minimax-m2",
        ffn=MoESpec(
            d_ff=keys.integer("intermediate_size"),
            n_experts=keys.integer("num_local_experts"),
            top_k=keys.integer("num_experts_per_tok"),
            activation="silu",
            score="sigmoid",
            correction=True,
            aux_loss_weight=keys.number("router_aux_loss_coef"),
        ),
        tied_embeddings=keys.flag("tie_word_embeddings"),
        **_normed(common),
    )
    keys.finish(IGNORED)
    return config


def _with_factor(raw: Mapping[str, object]) -> dict[str, object]:
    """The configuration with ``rotary_dim`` as the fraction of a head that it is."""
    full, keys = dict(raw), Keys(raw, "config.json")
    section = full.get("rope_parameters")
    within = isinstance(section, Mapping) and "partial_rotary_factor" in section
    stated = keys.given("partial_rotary_factor") or within
    if keys.given("rotary_dim") or not stated:
        n, head_dim = keys.integer("rotary_dim"), keys.integer("head_dim")
        factor = n / head_dim if 0 < n < 2**31 and 0 < head_dim < 2**31 else 0.0
        keys.must_be("partial_rotary_factor", factor, None)
        full["partial_rotary_factor"] = factor
        del full["rotary_dim"]
    return full


def _normed(common: Mapping[str, Any]) -> dict[str, Any]:
    norm = QKNormSpec(over="vector", eps=common["norm"].eps)
    return {**common, "mixer": replace(common["mixer"], qk_norm=norm)}


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as the published code and transformers 5.24.0 read it."""
    form = "MiniMax-M2's config.json"
    layer = config.only_layer(form)
    moe, rope = of_kind(layer.ffn, MoESpec, form), of_kind(layer.attention.position, RopeSpec, form)
    raw: dict[str, object] = {
        **common_to_hf(config, form),
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "rotary_dim": rope.rotated(layer.attention.head_dim),
        "num_local_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "router_aux_loss_coef": moe.aux_loss_weight,
    }
    raw.pop("partial_rotary_factor", None)
    must_read_back(config, config_from_hf(raw), form)
    return raw


_CORRECTION = {"model.layers.{i}.block_sparse_moe.e_score_correction_bias": "layers.{i}.moe.router.correction"}


def hf_layout(config: ModelConfig) -> list[Piece]:
    """Every published checkpoint, and what transformers 5 saves: a matrix per expert, named as Mixtral's."""
    return mixtral.hf_layout(config) + copies(config, HF_QK_NORMS | _CORRECTION)


def gguf_map(config: ModelConfig) -> list[Piece]:
    """Every tensor of arch ``minimax-m2``."""
    return gguf_attention(config) + copies(config, gguf_keys.ROUTER | gguf_keys.MERGED_EXPERTS | GGUF_CORRECTION)


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``minimax-m2``."""
    keys = gguf_keys.architecture_keys(metadata, "minimax-m2")
    keys.integer("expert_gating_func")  # must be there: llama.cpp has no usual one in this arch
    plain = gguf_keys.plain_experts(keys, keys.integer("expert_feed_forward_length"), gating=SIGMOID)
    config = uniform_model(
        family="minimax-m2",
        ffn=replace(plain, score="sigmoid", correction=True),
        **_normed(common_from_gguf(keys, metadata, shapes)),
    )
    keys.finish(gguf_keys.IGNORED | {"feed_forward_length"})
    return config


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``minimax-m2``."""
    form, arch = "GGUF arch minimax-m2", "minimax-m2"
    of_kind(config.only_layer(form).ffn, MoESpec, form)
    metadata = {
        **common_to_gguf(config, form, arch),
        **gguf_keys.expert_keys(config, arch),
        f"{arch}.expert_gating_func": SIGMOID,
    }
    gguf_keys.must_read_back(config, config_from_gguf, metadata, form)
    return metadata


FAMILY = Family(
    name="minimax-m2",
    presets=PRESETS,
    model_types=("minimax_m2",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={"hf": hf_layout},
    gguf_archs=("minimax-m2",),
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_map=gguf_map,
    tied_copies=HF_TIED,
)
