"""Hunyuan-A13B (Tencent, June 2025): norms of every head's q and k behind the rotation, 64 experts and a shared one.

Its rotary base is stretched by a constant, alpha^(d / (d - 2)), which the file calls ``dynamic`` scaling: within the
context that the file states nothing in it depends on the text's length, so it is read as the base that it comes to.
The chosen weights always sum to one; experts and the shared network are of one width. Sources: transformers 4.57.6 and
5.24.0 (configuration_hunyuan_v1_moe, modeling_hunyuan_v1_moe), llama.cpp (arch hunyuan-moe, whose converter writes the
stretched base and a context of 262144; rotary halves lie as in Hugging Face's files).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from quadriga.errors import ConfigError
from quadriga.model.config import (
    AttentionSpec,
    DenseSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    QKNormSpec,
    RopeSpec,
    countable,
    uniform_model,
)
from quadriga.model.families import gguf_keys
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys, equal_heads, shortest_float32
from quadriga.model.families.llama2 import (
    HF_COMMON,
    HF_TIED,
    common_from_gguf,
    common_from_hf,
    common_to_gguf,
    common_to_hf,
    hf_qkv,
)
from quadriga.model.families.pieces import copies
from quadriga.model.families.qwen3 import gguf_attention, hf5_experts, hf_experts
from quadriga.model.weight_map import Piece, Shape

_OTHER_PARTS = frozenset(
    {
        "add_classification_head", "anyres_pooling_size", "anyres_vit_max_image_size", "anyres_vit_two_views",
        "class_num", "dense_list", "im_end_id", "im_newline_id", "im_start_id", "image_token_id", "mask_init_id",
        "max_image_size", "num_media_embeds", "pool_type", "skip_cls_token", "text_end_id", "text_start_id",
        "video_end_id", "video_start_id", "vit_add_patchemb_bias", "vit_input_resolution", "vit_mapping_type",
        "vit_norm_type", "vit_patch", "vit_path", "vit_remove_prenorm", "vit_token", "vit_type", "vit_used_rms_norm",
        "xdrope_section",
    }
)  # fmt: skip
"""Settings of a vision tower and of classifiers that the files carry along and these checkpoints do not have."""
IGNORED = PRETRAINED_KEYS | _OTHER_PARTS | {
    "cla_share_factor", "eod_token_id", "kv_lora_rank", "moe_drop_tokens", "moe_random_routing_dropped_token",
    "org_vocab_size", "pad_id", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
}  # fmt: skip
"""Beside those: sizes that belong to what ``_refuse`` refuses, how training fills its batches, and more token ids."""

_EPS = 1e-5
PRESETS = {
    "hunyuan-a13b": uniform_model(
        family="hunyuan-moe",
        vocab_size=128_167,
        d_model=4096,
        n_layers=32,
        max_seq_len=32_768,
        norm=NormSpec(kind="rms", eps=_EPS),
        mixer=AttentionSpec(
            n_heads=32,
            n_kv_heads=8,
            head_dim=128,
            position=RopeSpec(theta=11_158_840.0),
            qk_norm=QKNormSpec(over="head", eps=_EPS, after_rotation=True),
        ),
        ffn=MoESpec(
            d_ff=3072, n_experts=64, top_k=8, activation="silu", shared=DenseSpec(d_ff=3072, activation="silu")
        ),
        tied_embeddings=True,
        bos_id=1,
        eos_ids=(127_960,),
        pad_id=127_961,
    )
}


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a Hunyuan config.json, as transformers 4 or 5 writes it."""
    keys = Keys(_with_stretched_base(raw), "config.json")
    keys.must_be("model_type", "hunyuan_v1_moe")
    keys.must_be("hidden_act", "silu")
    _refuse(keys)
    keys.integer("num_key_value_heads")  # every published file has it
    common = common_from_hf(keys, biases=True)
    n_layers, width = countable(common["n_layers"]), keys.integer("intermediate_size")
    for key, value in (("moe_intermediate_size", width), ("num_shared_expert", 1)):
        keys.must_be(key, value, [value] * n_layers, None)
    norm = QKNormSpec(over="head", eps=common["norm"].eps, after_rotation=True)
    moe = MoESpec(
        d_ff=width,
        n_experts=_of_every_layer(keys, "num_experts", n_layers),
        top_k=_of_every_layer(keys, "moe_topk", n_layers),
        activation="silu",
        shared=DenseSpec(d_ff=width, activation="silu"),
    )
    config = uniform_model(
        family="hunyuan-moe",
        ffn=moe,
        tied_embeddings=keys.flag("tie_word_embeddings"),
        **{**common, "mixer": replace(common["mixer"], qk_norm=norm)},
    )
    keys.finish(IGNORED)
    return config


def _refuse(keys: Keys) -> None:
    """Raise for what Hunyuan's own program knows and transformers' does not compute."""
    for key in ("use_cla", "use_mla", "mlp_bias", "position_embedding_xdrope", "group_limited_greedy"):
        keys.must_be(key, False, None)
    for key in ("use_qk_norm", "use_rotary_pos_emb", "norm_topk_prob", "use_mixed_mlp_moe"):
        keys.must_be(key, True)
    keys.must_be("norm_type", "rms")
    keys.must_be("routed_scaling_factor", 1, None)
    keys.must_be("moe_layer_num_skipped", 0, None)
    for key in ("n_group", "topk_group"):
        keys.must_be(key, False, None)


def _of_every_layer(keys: Keys, key: str, n_layers: int) -> int:
    """A number that files give once, or once a layer."""
    if isinstance(keys.value(key), list):
        numbers = set(keys.integers(key))
        if len(numbers) != 1 or len(keys.integers(key)) != n_layers:
            raise ConfigError(
                f"config.json: {key} must be one number or the same one {n_layers} times, got "
                f"{str(keys.value(key))[:80]}"
            )
        return numbers.pop()
    return keys.integer(key)


def _with_stretched_base(raw: Mapping[str, object]) -> dict[str, object]:
    """The configuration with the rotary base that ``alpha`` stretches it to, and no scaling."""
    full, outer = dict(raw), Keys(raw, "config.json")
    for name in ("rope_scaling", "rope_parameters"):
        section = full.get(name)
        if not isinstance(section, Mapping) or "dynamic" not in (section.get("type"), section.get("rope_type")):
            continue
        keys = Keys(section, f"config.json: {name}")
        for key in ("type", "rope_type"):
            keys.must_be(key, "dynamic")
        keys.must_be("factor", 1, None)
        base = (keys if keys.given("rope_theta") else outer).number("rope_theta")
        full["rope_theta"] = _stretched(base, keys.number("alpha"), _head_dim(outer))
        full[name] = None
        # YaRN's settings, which this formula has no place for.
        keys.finish(frozenset({"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}))
    return full


def _stretched(base: float, alpha: float, head_dim: int) -> float:
    """As float32 keeps it, in which transformers and llama.cpp compute with it."""
    if not 0 < alpha <= 1e9 or not 2 < head_dim < 2**31:
        raise ConfigError(
            f"config.json: rope_scaling's alpha must be above 0 and at most 1e9, and a head wider than 2; got "
            f"{alpha:g} and {str(head_dim)[:20]}"
        )
    stretched = base * alpha ** (head_dim / (head_dim - 2))
    return shortest_float32(float(np.float32(stretched))) if abs(stretched) < 1e30 else stretched


def _head_dim(keys: Keys) -> int:
    if keys.given("head_dim"):
        return keys.integer("head_dim")
    return equal_heads(keys.integer("hidden_size"), keys.integer("num_attention_heads"))


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it; a stretched base is written as the base."""
    form = "Hunyuan's config.json"
    moe = of_kind(config.only_layer(form).ffn, MoESpec, form)
    raw: dict[str, object] = {
        **common_to_hf(config, form),
        "architectures": ["HunYuanMoEV1ForCausalLM"],
        "model_type": "hunyuan_v1_moe",
        "num_experts": moe.n_experts,
        "moe_topk": moe.top_k,
    }
    must_read_back(config, config_from_hf(raw), form)
    return raw


_LAYER = "model.layers.{i}."
_HF_NAMES = {
    **HF_COMMON,
    _LAYER + "self_attn.query_layernorm.weight": "layers.{i}.attn.q_norm.weight",
    _LAYER + "self_attn.key_layernorm.weight": "layers.{i}.attn.k_norm.weight",
    _LAYER + "mlp.gate.wg.weight": "layers.{i}.moe.router.weight",
    **{
        f"{_LAYER}mlp.shared_mlp.{part}_proj.weight": f"layers.{{i}}.moe.shared.w_{part}"
        for part in ("gate", "up", "down")
    },
}


def hf_layout(config: ModelConfig) -> list[Piece]:
    """transformers 4, and every published checkpoint: a matrix per expert."""
    return copies(config, _HF_NAMES) + hf_qkv(config) + hf_experts(config)


def hf5_layout(config: ModelConfig) -> list[Piece]:
    """transformers 5 in memory: all experts in one tensor, gate above up."""
    return copies(config, _HF_NAMES) + hf_qkv(config) + hf5_experts(config)


def gguf_map(config: ModelConfig) -> list[Piece]:
    """Every tensor of arch ``hunyuan-moe``."""
    names = gguf_keys.ROUTER | gguf_keys.MERGED_EXPERTS | gguf_keys.SHARED_EXPERT
    return gguf_attention(config) + copies(config, names)


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``hunyuan-moe``."""
    keys = gguf_keys.architecture_keys(metadata, "hunyuan-moe")
    width, shared_key = keys.integer("feed_forward_length"), "expert_shared_feed_forward_length"
    # llama.cpp: no shared width means feed_forward_length, which is the experts' in any case.
    shared = keys.integer(shared_key) if keys.given(shared_key) else width
    ffn = gguf_keys.plain_experts(keys, width, shared=DenseSpec(d_ff=shared, activation="silu"), n_shared=1)
    common = common_from_gguf(keys, metadata, shapes)
    norm = QKNormSpec(over="head", eps=common["norm"].eps, after_rotation=True)
    config = uniform_model(family="hunyuan-moe", ffn=ffn, **{**common, "mixer": replace(common["mixer"], qk_norm=norm)})
    keys.finish(gguf_keys.IGNORED)
    return config


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``hunyuan-moe``."""
    form, arch = "GGUF arch hunyuan-moe", "hunyuan-moe"
    moe = of_kind(config.only_layer(form).ffn, MoESpec, form)
    metadata = {
        **common_to_gguf(config, form, arch),
        **gguf_keys.expert_keys(config, arch),
        f"{arch}.expert_shared_feed_forward_length": of_kind(moe.shared, DenseSpec, form).d_ff,
        f"{arch}.expert_shared_count": 1,
    }
    gguf_keys.must_read_back(config, config_from_gguf, metadata, form)
    return metadata


FAMILY = Family(
    name="hunyuan-moe",
    presets=PRESETS,
    model_types=("hunyuan_v1_moe",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={"hf": hf_layout, "hf5": hf5_layout},
    gguf_archs=("hunyuan-moe",),
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_map=gguf_map,
    tied_copies=HF_TIED,
)
