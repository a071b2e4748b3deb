"""Weights of the golden models, made from a seed by NumPy so that only results have to be stored.

Imported by make_golden.py (in an environment with transformers 4.57.6) and by the tests: both must draw the same
numbers, so nothing here may change without making the golden files anew.
"""

from __future__ import annotations

import numpy as np

# fmt: off
TOKENS = [3, 96, 41, 7, 7, 58, 12, 90, 33, 71, 5, 64, 28, 19, 82, 47,
          1, 60, 39, 88, 2, 14, 75, 53, 36, 9, 67, 22, 94, 30, 81, 44, 17]
# fmt: on
"""33 tokens; the first 16 are read at once and the others one by one in the decoding run."""
PREFILL = 16
RAGGED = [33, 9, 21]
"""Lengths of the sequences of the batch, each the beginning of TOKENS rotated by its index."""

_SHARED = {"vocab_size": 97, "initializer_range": 0.02}
_LLAMA = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    **_SHARED,
}
_QWEN = {
    "rope_theta": 1000000.0,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 4,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
_LFM2 = {
    **{key: value for key, value in _LLAMA.items() if key != "rms_norm_eps"},
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "layer_types": ["conv", "full_attention", "conv", "conv"],
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
_GRANITE_HYBRID = {
    "layer_types": ["mamba", "mamba", "attention", "mamba"],
    "mamba_n_heads": 8,
    "mamba_d_head": 12,
    "mamba_d_state": 14,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
    "shared_intermediate_size": 56,
    "router_aux_loss_coef": 0.01,
    "attention_bias": False,
    "rope_theta": 1000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
_GEMMA = {
    "head_dim": 10,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "sliding_window": 7,
    "tie_word_embeddings": True,
}
_DELTA = {
    "head_dim": 20,
    "attention_bias": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 18,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "moe_intermediate_size": 56,
    "shared_expert_intermediate_size": 72,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
_LATENT = {
    **_LLAMA,
    "num_key_value_heads": 6,
    "rms_norm_eps": 1e-6,
    "q_lora_rank": 20,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 10,
    "v_head_dim": 16,
    "moe_intermediate_size": 56,
    "n_routed_experts": 9,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 3,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "rope_theta": 100.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
_MPT = {
    "model_type": "mpt",
    "d_model": 48,
    "n_layers": 4,
    "expansion_ratio": 4,
    "max_seq_len": 64,
    "no_bias": True,
    "tie_word_embeddings": True,
    **_SHARED,
}

MODELS: dict[str, dict[str, object]] = {
    "dbrx": {
        "model_type": "dbrx",
        "d_model": 48,
        "n_heads": 6,
        "n_layers": 4,
        "max_seq_len": 64,
        "attn_config": {"clip_qkv": 2.5, "kv_n_heads": 2, "rope_theta": 500000.0},
        "ffn_config": {
            "ffn_hidden_size": 80,
            "moe_num_experts": 5,
            "moe_top_k": 3,
            "moe_normalize_expert_weights": 1,
            "moe_loss_weight": 0.05,
            "moe_jitter_eps": 0,
        },
        "tie_word_embeddings": False,
        **_SHARED,
    },
    "mixtral": {
        "model_type": "mixtral",
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "router_aux_loss_coef": 0.02,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "llama": {
        "model_type": "llama",
        "head_dim": 10,  # the heads together are wider than the model: 60 against 48
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "llama-tied": {
        "model_type": "llama",
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "llama3": {  # bands of frequencies, of which this short context has all three; biases on q, k, v and o
        "model_type": "llama",
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 24,
        },
        "attention_bias": True,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "llama-yarn": {
        "model_type": "llama",
        "rope_theta": 1000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "llama-linear": {
        "model_type": "llama",
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.5},
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "mistral": {
        "model_type": "mistral",
        "head_dim": 10,
        "sliding_window": 7,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "qwen2": {  # the last two layers have a window
        "model_type": "qwen2",
        "rope_theta": 1000000.0,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 2,
        "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "smollm3": {
        "model_type": "smollm3",
        "rope_theta": 5000.0,
        "no_rope_layers": [1, 0, 1, 1],
        "no_rope_layer_interval": 2,
        "pad_token_id": 5,
        "use_sliding_window": False,
        "sliding_window": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "qwen3": {
        "model_type": "qwen3",
        "head_dim": 10,
        **_QWEN,
        **_LLAMA,
    },
    "qwen3moe": {
        "model_type": "qwen3_moe",
        "head_dim": 10,
        "moe_intermediate_size": 56,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        **_QWEN,
        **_LLAMA,
    },
    "olmoe": {
        "model_type": "olmoe",
        "clip_qkv": 1.2,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "granite": {
        "model_type": "granite",
        "attention_multiplier": 0.21,
        "embedding_multiplier": 3.0,
        "logits_scaling": 1.7,
        "residual_multiplier": 0.6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "granitemoe": {
        "model_type": "granitemoe",
        "attention_multiplier": 0.21,
        "embedding_multiplier": 3.0,
        "logits_scaling": 1.7,
        "residual_multiplier": 0.6,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "router_aux_loss_coef": 0.001,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "granitemoeshared": {
        "model_type": "granitemoeshared",
        "attention_multiplier": 0.21,
        "embedding_multiplier": 3.0,
        "logits_scaling": 1.7,
        "residual_multiplier": 0.6,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "shared_intermediate_size": 56,
        "router_aux_loss_coef": 0.001,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "gpt-oss": {  # the first and the third layer have a window; the unrounded ramp of YaRN lies within pairs 0 and 4
        "model_type": "gpt_oss",
        "head_dim": 10,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 7,
        "rope_theta": 1000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 2.0,
            "beta_slow": 0.3,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "router_aux_loss_coef": 0.9,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "glm4moe": {
        "model_type": "glm4_moe",
        "head_dim": 20,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": True,
        "attention_bias": True,
        "moe_intermediate_size": 56,
        "n_routed_experts": 5,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.7,
        "first_k_dense_replace": 1,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "qwen2moe": {
        "model_type": "qwen2_moe",
        "qkv_bias": True,
        "moe_intermediate_size": 56,
        "shared_expert_intermediate_size": 72,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [2],
        **{key: value for key, value in _QWEN.items() if key != "attention_bias"},
        **_LLAMA,
    },
    "dots1": {
        "model_type": "dots1",
        "attention_bias": True,
        "moe_intermediate_size": 56,
        "n_routed_experts": 5,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "ernie4_5-moe": {  # the last layer is dense too
        "model_type": "ernie4_5_moe",
        "use_bias": False,
        "moe_intermediate_size": 56,
        "moe_num_experts": 5,
        "moe_k": 3,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        "router_aux_loss_coef": 0.001,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "hunyuan-moe": {
        "model_type": "hunyuan_v1_moe",
        "head_dim": 10,
        "num_experts": 5,
        "moe_topk": 3,
        "rope_theta": 100.0,
        "rope_scaling": {"type": "dynamic", "alpha": 50.0, "factor": 1.0},
        "attention_bias": False,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "olmo2": {
        "model_type": "olmo2",
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "olmo3": {  # every second layer sees all, and it alone rotates by YaRN's frequencies; biases on q, k, v and o
        "model_type": "olmo3",
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 7,
        "rope_theta": 1000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "attention_bias": True,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "flex_olmo": {
        "model_type": "flex_olmo",
        "pad_token_id": 5,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "phimoe": {  # a noise of a third makes most of the experts near; the text is longer than the original context
        "model_type": "phimoe",
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.3,
        "input_jitter_noise": 0.0,
        "router_aux_loss_coef": 0.001,
        "rope_theta": 1000.0,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 1.5, 2.5, 4.0],
            "short_mscale": 1.1,
            "long_mscale": 1.2,
            "original_max_position_embeddings": 8,
        },
        "sliding_window": None,
        "attention_bias": True,
        "lm_head_bias": True,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        **_LLAMA,
    },
    "deepseek-v2": {  # no mscale: transformers before 5 leaves mscale_all_dim out of this model's softmax scale
        "model_type": "deepseek_v2",
        **_LATENT,
        "topk_method": "group_limited_greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.7,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        **_LATENT,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen3next": {
        "model_type": "qwen3_next",
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "partial_rotary_factor": 0.5,
        "rope_theta": 1000.0,
        **_DELTA,
        **_LLAMA,
    },
    "lfm2": {"model_type": "lfm2", "block_auto_adjust_ff_dim": False, **_LFM2},
    "granitehybrid": {
        "model_type": "granitemoehybrid",
        "mamba_n_groups": 1,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "position_embedding_type": "nope",
        **_GRANITE_HYBRID,
        **_LLAMA,
    },
    "granitehybrid-dense": {  # attention that turns
        "model_type": "granitemoehybrid",
        "mamba_n_groups": 1,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "position_embedding_type": "rope",
        **_GRANITE_HYBRID,
        **_LLAMA,
    },
    "gemma2": {
        "model_type": "gemma2",
        "rope_theta": 1000.0,
        "query_pre_attn_scalar": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
        **_GEMMA,
        **_LLAMA,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "rope_theta": 5000.0,
        "rope_local_base_freq": 1000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "query_pre_attn_scalar": 10,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        **_GEMMA,
        **_LLAMA,
        "num_hidden_layers": 6,
    },
    "mpt": {**_MPT, "n_heads": 6, "attn_config": {"alibi": True, "alibi_bias_max": 8, "clip_qkv": None}},
    "mpt-clipped": {**_MPT, "n_heads": 8, "attn_config": {"alibi": True, "alibi_bias_max": 8, "clip_qkv": 2.0}},
}
"""config.json of each golden model, without what transformers adds. Six ALiBi heads take their slopes in two runs, eight
in one; transformers 4.57.6 reads alibi_bias_max and then uses 8 whatever it says."""

WITH_PROBABILITIES = ("dbrx", "mixtral", "qwen3moe", "olmoe", "granitemoe", "granitemoeshared", "qwen2moe")
"""Mixtures of which transformers hands back what the router computed."""

GROK1: dict[str, object] = {
    "model_type": "grok-1",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_attn_value": 30.0,
    "attn_output_multiplier": 10**-0.5,
    "embedding_multiplier_scale": 48**0.5,
    "output_multiplier_scale": 0.5773502691896257,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Grok-1 has no golden file: transformers does not know it. Its truth is ``tests.oracles.numpy_models.grok1``."""

MINIMAX_M2: dict[str, object] = {
    "model_type": "minimax_m2",
    "head_dim": 20,
    "rotary_dim": 10,
    "num_local_experts": 5,
    "num_experts_per_tok": 3,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "router_aux_loss_coef": 0.001,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    **_LLAMA,
}
"""Nor has MiniMax-M2, which transformers knows from version 5 on: ``tests.oracles.numpy_models.ORACLES`` states it."""

DEEPSEEK_V2_LITE: dict[str, object] = {
    "model_type": "deepseek_v2",
    **_LATENT,
    "q_lora_rank": None,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 16,
    },
}
"""Whose softmax scale transformers has from version 5 on."""

GLM4_MOE_LITE: dict[str, object] = {
    "model_type": "glm4_moe_lite",
    **_LATENT,
    "rms_norm_eps": 1e-5,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
}
"""GLM-4.7-Flash, which transformers knows from version 5 on."""
LFM2_MOE: dict[str, object] = {
    "model_type": "lfm2_moe",
    "moe_intermediate_size": 56,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "num_dense_layers": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
    "use_expert_bias": True,
    **_LFM2,
}
"""Known to transformers from version 5 on."""

QWEN35_MOE: dict[str, object] = {
    "model_type": "qwen3_5_moe_text",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
    **_DELTA,
    **{key: value for key, value in _LLAMA.items() if key != "intermediate_size"},
}
"""Likewise."""

GRANITE_HYBRID_GROUPS: dict[str, object] = {
    **MODELS["granitehybrid"],
    "mamba_n_groups": 2,
}
"""Groups of heads, which transformers norms by themselves from version 5 on."""

GEMMA4: dict[str, object] = {
    "model_type": "gemma4_text",
    "head_dim": 8,
    "global_head_dim": 20,
    "num_global_key_value_heads": 3,
    "attention_k_eq_v": True,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 7,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        "full_attention": {"rope_type": "proportional", "rope_theta": 5000.0, "partial_rotary_factor": 0.6},
    },
    "final_logit_softcapping": 3.0,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "use_bidirectional_attention": None,
    "enable_moe_block": True,
    "num_experts": 5,
    "top_k_experts": 4,
    "moe_intermediate_size": 56,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    **_LLAMA,
}
"""Known to transformers from version 5 on."""
GEMMA4_DENSE: dict[str, object] = {**GEMMA4, "enable_moe_block": False, "attention_k_eq_v": False}

_NEMOTRON_H = {
    **{key: value for key, value in _LLAMA.items() if key not in ("rms_norm_eps", "num_hidden_layers")},
    "model_type": "nemotron_h",
    "layer_norm_epsilon": 1e-5,
    "head_dim": 10,
    "mamba_num_heads": 8,
    "mamba_head_dim": 12,
    "ssm_state_size": 14,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 8,
    "use_conv_bias": True,
    "time_step_min": 1e-9,  # transformers 5.24.0 makes no step smaller, which no other program does
    "mlp_hidden_act": "relu2",
    "tie_word_embeddings": False,
}
NEMOTRON_H: dict[str, object] = {
    **_NEMOTRON_H,
    "hybrid_override_pattern": "ME*ME",
    "n_routed_experts": 5,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 56,
    "moe_shared_expert_intermediate_size": 72,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
}
"""Known to transformers from version 5 on."""
NEMOTRON_H_DENSE: dict[str, object] = {**_NEMOTRON_H, "hybrid_override_pattern": "M-*MM-", "n_groups": 4}

MELLUM: dict[str, object] = {
    "model_type": "mellum",
    "head_dim": 10,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    "sliding_window": 7,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        "full_attention": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "attention_factor": 1.1386294361119891,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
    },
    "mlp_layer_types": ["sparse"] * 4,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 56,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.01,
    "attention_bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    **_LLAMA,
}
"""Known to transformers from version 5 on."""

GRANITE_SWA: dict[str, object] = {
    **MODELS["granitemoeshared"],
    "model_type": "granitemoe_swa",
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 7,
    "layer_rope_theta": [0, 1000.0, 10000.0, 0],
}
"""Granite Swash: windows, sinks, and layers without positions; known to transformers from version 5 on."""
GRANITE_SWA_DENSE: dict[str, object] = {
    **MODELS["granite"],
    "model_type": "granite_swa",
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 9,
    "layer_rope_theta": [1000.0, 0, 5000.0, 1000.0],
}

SOLAR_OPEN: dict[str, object] = {
    "model_type": "solar_open",
    "head_dim": 10,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    "moe_intermediate_size": 56,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
    "attention_bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    **{key: value for key, value in _LLAMA.items() if key != "intermediate_size"},
}

_PICTURES = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
_QWEN3_VL = {
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
    "attention_bias": False,
    "hidden_act": "silu",
    **_LLAMA,
}
QWEN3_VL: dict[str, object] = {
    "model_type": "qwen3_vl",
    "tie_word_embeddings": False,
    "vision_config": {"model_type": "qwen3_vl", **_PICTURES},
    "text_config": {"model_type": "qwen3_vl_text", **_QWEN3_VL},
}
"""The text of a model that reads pictures: its keys are a section."""
QWEN3_VL_MOE: dict[str, object] = {
    "model_type": "qwen3_vl_moe",
    "tie_word_embeddings": False,
    "vision_config": {"model_type": "qwen3_vl_moe", **_PICTURES},
    "text_config": {
        "model_type": "qwen3_vl_moe_text",
        "moe_intermediate_size": 56,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        **_QWEN3_VL,
    },
}

BESIDE_TRANSFORMERS = {
    "grok1": GROK1,
    "minimax-m2": MINIMAX_M2,
    "deepseek-v2-lite": DEEPSEEK_V2_LITE,
    "glm4_moe_lite": GLM4_MOE_LITE,
    "lfm2moe": LFM2_MOE,
    "qwen35moe": QWEN35_MOE,
    "granitehybrid-groups": GRANITE_HYBRID_GROUPS,
    "gemma4": GEMMA4,
    "gemma4-dense": GEMMA4_DENSE,
    "nemotron_h": NEMOTRON_H,
    "nemotron_h-dense": NEMOTRON_H_DENSE,
    "mellum": MELLUM,
    "granitemoe_swa": GRANITE_SWA,
    "granite_swa": GRANITE_SWA_DENSE,
    "solar_open": SOLAR_OPEN,
    "qwen3_vl": QWEN3_VL,
    "qwen3_vl_moe": QWEN3_VL_MOE,
}
"""Golden models that transformers 4.57.6 does not know, or computes otherwise."""
IN_TRANSFORMERS_5 = tuple(name for name in BESIDE_TRANSFORMERS if name != "grok1")
"""Those of them whose golden files version 5.24.0 made (make_golden5.py)."""
DIRECTIONS = 8
FIXED = ("_correction_bias", ".expert_bias", ".layer_scalar")
"""How the names of numbers end that transformers does not learn: corrections of the choice, scales of the stream."""


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights of one tensor, float32: norms around 1, everything else N(0, 0.3) from a seed made of the name.

    0.3 makes logits, router probabilities and clipped projections vary as in a trained model; 0.02 would leave the
    router almost uniform and the clipping idle.
    """
    seed = np.frombuffer(name.encode(), dtype=np.uint8).astype(np.uint32)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed.tolist())))
    values = rng.standard_normal(shape, dtype=np.float64)
    if name.endswith("A_log"):  # slow enough to forget that the state of a few tokens before is seen
        return (-2 + 0.5 * values).astype(np.float32)
    is_norm = len(shape) == 1
    return (1 + 0.2 * values if is_norm else 0.3 * values).astype(np.float32)


def in_directions(name: str, values: np.ndarray) -> np.ndarray:
    """A float64 tensor as its products with drawn directions, and at last its norm: (DIRECTIONS + 1,).

    What two tensors differ by has products of its own norm, on average over directions, so a share of the norm that is
    small in all of them is small.
    """
    seed = np.frombuffer(f"direction of {name}".encode(), dtype=np.uint8).astype(np.uint32)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed.tolist())))
    flat = values.astype(np.float64).ravel()
    return np.append(rng.standard_normal((DIRECTIONS, flat.size)) @ flat, np.linalg.norm(flat))


ADAPTER_ROWS = 6
"""The last positions whose logits are stored for each golden adapter."""


def drawn_adapter(shapes: dict[str, list[int]], tied: bool) -> dict[str, np.ndarray]:
    """The tensors of an adapter under the names peft gives them; copies of the base's tables are the base's.

    Args:
        tied: the head is the table, so what is the head's is the table's.
    """
    prefix, copy, table = "base_model.model.", ".base_layer.weight", "model.embed_tokens"
    tensors = {}
    for name, shape in shapes.items():
        module = name.removeprefix(prefix)
        if tied and module.startswith("lm_head."):
            module = module.replace("lm_head", table)
        if name.endswith(copy):
            tensors[name] = draw(module.replace(copy, ".weight"), tuple(shape))
        elif tied and table in module and module.endswith(("lora_A.weight", "lora_B.weight")):
            other = "lora_embedding_B" if module.endswith("lora_A.weight") else "lora_embedding_A"
            tensors[name] = draw(f"{prefix}{table}.{other}", tuple(reversed(shape))).T.copy()
        else:
            tensors[name] = draw(name, tuple(shape))
    return tensors


def ragged() -> list[list[int]]:
    """The sequences of the batch."""
    return [(TOKENS[i:] + TOKENS[:i])[:n] for i, n in enumerate(RAGGED)]
