"""OLMoE (Ai2, September 2024): 64 experts, 8 chosen, and norms over all of q and all of k.

The chosen weights stay as the softmax over all experts gave them; q, k and v may be clipped after the norms. Sources:
transformers 4.57.6 and 5.x (configuration_olmoe, modeling_olmoe), llama.cpp b11434 (arch olmoe).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quadriga.model.config import AttentionSpec, ModelConfig, MoESpec, NormSpec, QKNormSpec, RopeSpec, uniform_model
from quadriga.model.families import gguf_keys
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.llama2 import HF_TIED, common_from_gguf, common_from_hf, common_to_gguf, common_to_hf
from quadriga.model.families.qwen3 import gguf_map, hf5_layout, hf_layout
from quadriga.model.weight_map import Shape

PRESETS = {
    "olmoe-1b-7b": uniform_model(
        family="olmoe",
        vocab_size=50_304,
        d_model=2048,
        n_layers=16,
        max_seq_len=4096,
        norm=NormSpec(kind="rms", eps=1e-5),
        mixer=AttentionSpec(
            n_heads=16,
            n_kv_heads=16,
            head_dim=128,
            position=RopeSpec(theta=10_000.0),
            qk_norm=QKNormSpec(over="vector", eps=1e-5),
        ),
        ffn=MoESpec(d_ff=1024, n_experts=64, top_k=8, activation="silu", normalize_p=None, aux_loss_weight=0.01),
        eos_ids=(50_279,),
        pad_id=1,
    )
}


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read an OLMoE config.json, as transformers 4 or 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "olmoe")
    keys.must_be("hidden_act", "silu")
    common = common_from_hf(keys)
    attention = replace(
        common["mixer"],
        clip_qkv=keys.number_or_null("clip_qkv") if keys.has("clip_qkv") else None,
        qk_norm=QKNormSpec(over="vector", eps=common["norm"].eps),
    )
    config = uniform_model(
        family="olmoe",
        ffn=MoESpec(
            d_ff=keys.integer("intermediate_size"),
            n_experts=keys.integer("num_experts"),
            top_k=keys.integer("num_experts_per_tok"),
            activation="silu",
            normalize_p=1.0 if keys.flag("norm_topk_prob") else None,
            aux_loss_weight=keys.number("router_aux_loss_coef"),
        ),
        tied_embeddings=keys.flag("tie_word_embeddings"),
        **{**common, "mixer": attention},
    )
    keys.finish(PRETRAINED_KEYS)
    return config


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it; that class takes its head size from the others."""
    form = "OLMoE's config.json"
    layer = config.only_layer(form)
    ffn = of_kind(layer.ffn, MoESpec, form)
    raw: dict[str, object] = {
        **common_to_hf(config, form),
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "clip_qkv": layer.attention.clip_qkv,
        "num_experts": ffn.n_experts,
        "num_experts_per_tok": ffn.top_k,
        "norm_topk_prob": ffn.normalize_p is not None,
        "router_aux_loss_coef": ffn.aux_loss_weight,
    }
    del raw["head_dim"]
    must_read_back(config, config_from_hf(raw), form)
    return raw


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``olmoe``; llama.cpp never divides its chosen weights."""
    keys = gguf_keys.architecture_keys(metadata, "olmoe")
    common = common_from_gguf(keys, metadata, shapes)
    qk_norm = QKNormSpec(over="vector", eps=common["norm"].eps)
    # llama.cpp's arch olmoe does not clip.
    config = uniform_model(
        family="olmoe",
        ffn=gguf_keys.plain_experts(keys, keys.integer("feed_forward_length"), normalised=False, normalize_p=None),
        **{**common, "mixer": replace(common["mixer"], qk_norm=qk_norm)},
    )
    keys.finish(gguf_keys.IGNORED)
    return config


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``olmoe``."""
    form = "GGUF arch olmoe"
    metadata = {**common_to_gguf(config, form, "olmoe"), **gguf_keys.expert_keys(config, "olmoe")}
    gguf_keys.must_read_back(config, config_from_gguf, metadata, form)
    return metadata


FAMILY = Family(
    name="olmoe",
    presets=PRESETS,
    model_types=("olmoe",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={"hf": hf_layout, "hf5": hf5_layout},
    gguf_archs=("olmoe",),
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_map=gguf_map,
    tied_copies=HF_TIED,
)
