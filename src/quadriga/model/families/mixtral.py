"""Mixtral 8x7B (Mistral AI, December 2023): LLaMA's block with eight experts of which two work.

Softmax over the two chosen logits, as the model is often described, is the softmax over all eight divided by the sum
of the chosen two: normalize_p = 1. Sources: transformers 4.57.6 and 5.x, mistralai/mistral-inference, gguf 0.19.0.
"""

from __future__ import annotations

from collections.abc import Mapping

from quadriga.model.config import AttentionSpec, ModelConfig, MoESpec, NormSpec, RopeSpec, uniform_model
from quadriga.model.families import gguf_keys, windows
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.llama2 import (
    GGUF_COMMON,
    HF_COMMON,
    HF_TIED,
    META_COMMON,
    META_TIED,
    common_from_gguf,
    common_from_hf,
    common_to_gguf,
    common_to_hf,
    gguf_qkv,
    hf_qkv,
    meta_qkv,
)
from quadriga.model.families.pieces import copies, experts, flat_experts, gate_up
from quadriga.model.families.rope_keys import FREQS
from quadriga.model.weight_map import Piece, Shape

IGNORED = PRETRAINED_KEYS

PRESETS = {
    "mixtral-8x7b": uniform_model(
        family="mixtral",
        vocab_size=32_000,
        d_model=4096,
        n_layers=32,
        max_seq_len=32_768,
        norm=NormSpec(kind="rms", eps=1e-5),
        mixer=AttentionSpec(n_heads=32, n_kv_heads=8, head_dim=128, position=RopeSpec(theta=1_000_000.0)),
        ffn=MoESpec(d_ff=14_336, n_experts=8, top_k=2, activation="silu", aux_loss_weight=0.02),
        bos_id=1,
        eos_ids=(2,),
    )
}


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a Mixtral config.json, as transformers 4 or 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "mixtral")
    keys.must_be("hidden_act", "silu")
    config = uniform_model(
        family="mixtral",
        ffn=MoESpec(
            d_ff=keys.integer("intermediate_size"),
            n_experts=keys.integer("num_local_experts"),
            top_k=keys.integer("num_experts_per_tok"),
            activation="silu",
            aux_loss_weight=keys.number("router_aux_loss_coef"),
            # Files older than transformers 4.40 have no such key, and transformers multiplies only if it is above 0.
            jitter_eps=(keys.number("router_jitter_noise") or None) if keys.given("router_jitter_noise") else None,
        ),
        # MixtralConfig's class default is untied, and early files leave the key out.
        tied_embeddings=keys.flag("tie_word_embeddings") if keys.has("tie_word_embeddings") else False,
        **common_from_hf(keys),
    )
    # The first release's file has a window of 4096, taken back a week later.
    config = config.with_mixer(window=windows.for_all(keys, config.max_seq_len))
    keys.finish(IGNORED)
    return config


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "Mixtral's config.json"
    ffn = of_kind(config.only_layer(form).ffn, MoESpec, form)
    raw: dict[str, object] = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **common_to_hf(config, form),
        "num_local_experts": ffn.n_experts,
        "num_experts_per_tok": ffn.top_k,
        "router_aux_loss_coef": ffn.aux_loss_weight,
        "router_jitter_noise": ffn.jitter_eps or 0.0,
        "sliding_window": config.layers[0].attention.window,
    }
    must_read_back(config, config_from_hf(raw), form)
    return raw


_LAYER = "model.layers.{i}."


def hf_layout(config: ModelConfig) -> list[Piece]:
    """transformers 4, and every published checkpoint: a matrix per expert."""
    moe = _LAYER + "block_sparse_moe."
    return [
        *copies(config, HF_COMMON | {moe + "gate.weight": "layers.{i}.moe.router.weight"}),
        *hf_qkv(config),
        *experts(config, "w_gate", moe + "experts.{e}.w1.weight"),
        *experts(config, "w_up", moe + "experts.{e}.w3.weight"),
        *experts(config, "w_down", moe + "experts.{e}.w2.weight"),
    ]


def _hf5_layout(config: ModelConfig) -> list[Piece]:
    """transformers 5 in memory: all experts in one tensor, gate above up."""
    names = {
        _LAYER + "mlp.gate.weight": "layers.{i}.moe.router.weight",
        _LAYER + "mlp.experts.down_proj": "layers.{i}.moe.w_down",
    }
    return copies(config, HF_COMMON | names) + hf_qkv(config) + gate_up(config, _LAYER + "mlp.experts.gate_up_proj")


def _mistral_layout(config: ModelConfig) -> list[Piece]:
    """Mistral's own files (consolidated.*.safetensors)."""
    moe = "layers.{i}.feed_forward."
    return [
        *copies(config, META_COMMON | {moe + "gate.weight": "layers.{i}.moe.router.weight"}),
        *meta_qkv(config),
        *experts(config, "w_gate", moe + "experts.{e}.w1.weight"),
        *experts(config, "w_up", moe + "experts.{e}.w3.weight"),
        *experts(config, "w_down", moe + "experts.{e}.w2.weight"),
    ]


def _stacked_layout(config: ModelConfig) -> list[Piece]:
    """Mistral's first release of Mixtral (consolidated.00.pt to 07): all experts below each other, w2 transposed."""
    moe = "layers.{i}.block_sparse_moe."
    return [
        *copies(config, META_COMMON | {moe + "gate.weight": "layers.{i}.moe.router.weight"}),
        *meta_qkv(config),
        *flat_experts(config, "w_gate", moe + "w1"),
        *flat_experts(config, "w_up", moe + "w3"),
        *flat_experts(config, "w_down", moe + "w2", transpose=True),
    ]


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``llama`` with experts."""
    keys = gguf_keys.architecture_keys(metadata, "llama")
    config = uniform_model(
        family="mixtral",
        ffn=gguf_keys.plain_experts(keys, keys.integer("feed_forward_length")),
        **common_from_gguf(keys, metadata, shapes),
    )
    keys.finish(gguf_keys.IGNORED)
    return config


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``llama`` with experts."""
    form = "GGUF arch llama with experts"
    ffn = of_kind(config.only_layer(form).ffn, MoESpec, form)
    metadata = {
        **common_to_gguf(config, form),
        "llama.expert_count": ffn.n_experts,
        "llama.expert_used_count": ffn.top_k,
    }
    gguf_keys.must_read_back(config, config_from_gguf, metadata, form)
    return metadata


def _gguf_map(config: ModelConfig) -> list[Piece]:
    return copies(config, GGUF_COMMON | gguf_keys.ROUTER | gguf_keys.MERGED_EXPERTS) + gguf_qkv(config)


def _gguf_split_map(config: ModelConfig) -> list[Piece]:
    return copies(config, GGUF_COMMON | gguf_keys.ROUTER) + gguf_qkv(config) + gguf_keys.split_experts(config)


FAMILY = Family(
    name="mixtral",
    presets=PRESETS,
    model_types=("mixtral",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={"hf": hf_layout, "hf5": _hf5_layout, "mistral": _mistral_layout, "mistral-stacked": _stacked_layout},
    gguf_archs=("llama",),
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_map=_gguf_map,
    gguf_split_map=_gguf_split_map,
    counterpart="llama2",
    ignored_tensors=("model.layers.*.self_attn.rotary_emb.inv_freq", FREQS),
    tied_copies={**HF_TIED, **META_TIED},
)
