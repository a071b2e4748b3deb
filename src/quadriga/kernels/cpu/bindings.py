"""The CPU kernels' structs, enums and functions. Written by tools/bindings.py from csrc/quadriga.h.

Do not edit: change the header and run ``make bindings``; ``kernels/cpu/library.py`` uses what is here."""

from __future__ import annotations

import ctypes as c
from enum import IntEnum
from typing import Any

HEADER_SHA256 = "1aff47134d6883bc608f018dcc60d75f5104d50e8033e15836cff250e1f61a02"
BLOCK_TOKENS = 16
KV_CHUNK = 256
MOST_THREADS = 1024
MOST_EXPERTS = 1024


class Status(IntEnum):
    """enum qd_status"""

    OK = 0
    BAD_ARGUMENT = 1
    OUT_OF_MEMORY = 2
    NO_THREAD = 3
    NO_INSTRUCTIONS = 4
    READ_FAILED = 5
    FAILED = 6


class Format(IntEnum):
    """enum qd_format"""

    FLOAT32 = 0
    BFLOAT16 = 1
    Q8 = 2
    Q4 = 3
    Q4M = 4
    MX4 = 5
    IQ4NL = 6
    Q5 = 7
    Q5M = 8
    Q2K = 9
    Q3K = 10
    Q4K = 11
    Q5K = 12
    Q6K = 13
    IQ4XS = 14


class Source(IntEnum):
    """enum qd_source"""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    Q8_0 = 3
    Q4_0 = 4
    Q4_1 = 5
    MX4 = 6
    IQ4_NL = 7
    Q5_0 = 8
    Q5_1 = 9


class Stored(IntEnum):
    """enum qd_stored"""

    Q4_0 = 0
    Q4_1 = 1
    Q5_0 = 2
    Q5_1 = 3
    Q8_0 = 4
    Q2_K = 5
    Q3_K = 6
    Q4_K = 7
    Q5_K = 8
    Q6_K = 9
    Q8_K = 10
    IQ4_NL = 11
    IQ4_XS = 12
    TQ1_0 = 13
    TQ2_0 = 14
    MXFP4 = 15
    NVFP4 = 16
    IQ1_S = 17
    IQ1_M = 18
    IQ2_XXS = 19
    IQ2_XS = 20
    IQ2_S = 21
    IQ3_XXS = 22
    IQ3_S = 23


class KvFormat(IntEnum):
    """enum qd_kv_format"""

    FLOAT32 = 0
    BFLOAT16 = 1
    Q8 = 2


class NormKind(IntEnum):
    """enum qd_norm_kind"""

    LAYER = 0
    RMS = 1


class Activation(IntEnum):
    """enum qd_activation"""

    SILU = 0
    GELU = 1
    GELU_TANH = 2
    RELU = 3
    CLAMPED_GLU = 4
    RELU2 = 5


class Score(IntEnum):
    """enum qd_score"""

    SOFTMAX = 0
    SIGMOID = 1
    SPARSE_MIXER = 2


class Aggregate(IntEnum):
    """enum qd_aggregate"""

    WEIGHTED_SUM = 0
    VOTE = 1
    FUSE = 2


class Isa(IntEnum):
    """enum qd_isa"""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    NEON = 3
    I8MM = 4


class Op(IntEnum):
    """enum qd_op"""

    EMBED = 0
    QKV = 1
    ATTEND = 2
    ATTN_OUT = 3
    FFN = 4
    HEAD = 5
    SHORT_CONV = 6
    DELTA_NET = 7
    MAMBA2 = 8
    MERGE = 9


class Message(c.Structure):
    """struct qd_message"""

    _fields_ = [
        ("text", c.c_char * 240),
    ]


class Field(c.Structure):
    """struct qd_field"""

    _fields_ = [
        ("name", c.c_char_p),
        ("offset", c.c_int64),
        ("bytes", c.c_int64),
    ]


class Matrix(c.Structure):
    """struct qd_matrix"""

    _fields_ = [
        ("data", c.c_void_p),
        ("rows", c.c_int64),
        ("cols", c.c_int64),
        ("format", c.c_int32),
    ]


class Norm(c.Structure):
    """struct qd_norm"""

    _fields_ = [
        ("weight", c.c_void_p),
        ("kind", c.c_int32),
        ("eps", c.c_float),
        ("bias", c.c_void_p),
    ]


class Embed(c.Structure):
    """struct qd_embed"""

    _fields_ = [
        ("table", Matrix),
        ("scale", c.c_float),
    ]


class Attention(c.Structure):
    """struct qd_attention"""

    _fields_ = [
        ("norm", Norm),
        ("post_norm", Norm),
        ("wqkv", c.POINTER(Matrix)),
        ("n_wqkv", c.c_int32),
        ("wo", Matrix),
        ("n_heads", c.c_int32),
        ("n_kv_heads", c.c_int32),
        ("head_dim", c.c_int32),
        ("kv_format", c.c_int32),
        ("q_norm", Norm),
        ("k_norm", Norm),
        ("q_norm_width", c.c_int32),
        ("k_norm_width", c.c_int32),
        ("clip", c.c_float),
        ("residual_scale", c.c_float),
        ("score_scale", c.c_float),
        ("soft_cap", c.c_float),
        ("inverse_frequencies", c.c_void_p),
        ("alibi_slopes", c.c_void_p),
        ("kv", c.c_void_p),
        ("kv_stride", c.c_int64),
        ("qkv_bias", c.c_void_p),
        ("out_bias", c.c_void_p),
        ("sinks", c.c_void_p),
        ("window", c.c_int32),
        ("rotary_dim", c.c_int32),
        ("rotary_scale", c.c_float),
        ("norm_after_rotation", c.c_int32),
        ("output_gate", c.c_int32),
        ("cache_group", c.c_int32),
        ("keys_as_values", c.c_int32),
        ("v_norm", Norm),
        ("kv_rank", c.c_int32),
        ("rope_dim", c.c_int32),
        ("nope_dim", c.c_int32),
        ("v_dim", c.c_int32),
        ("q_a_norm", Norm),
        ("kv_a_norm", Norm),
        ("wq_a", Matrix),
        ("wkv_a", Matrix),
        ("wk_b", Matrix),
        ("wv_b", Matrix),
    ]


class ShortConv(c.Structure):
    """struct qd_short_conv"""

    _fields_ = [
        ("norm", Norm),
        ("post_norm", Norm),
        ("w_in", Matrix),
        ("w_out", Matrix),
        ("taps", c.c_void_p),
        ("state", c.c_void_p),
        ("n_taps", c.c_int32),
        ("residual_scale", c.c_float),
    ]


class DeltaNet(c.Structure):
    """struct qd_delta_net"""

    _fields_ = [
        ("norm", Norm),
        ("post_norm", Norm),
        ("w_in", Matrix),
        ("w_ba", Matrix),
        ("w_out", Matrix),
        ("taps", c.c_void_p),
        ("rate", c.c_void_p),
        ("dt", c.c_void_p),
        ("head_norm", Norm),
        ("state", c.c_void_p),
        ("n_taps", c.c_int32),
        ("n_k_heads", c.c_int32),
        ("n_v_heads", c.c_int32),
        ("k_dim", c.c_int32),
        ("v_dim", c.c_int32),
        ("tiled", c.c_int32),
        ("residual_scale", c.c_float),
    ]


class Mamba2(c.Structure):
    """struct qd_mamba2"""

    _fields_ = [
        ("norm", Norm),
        ("post_norm", Norm),
        ("w_in", Matrix),
        ("w_dt", Matrix),
        ("w_out", Matrix),
        ("taps", c.c_void_p),
        ("conv_bias", c.c_void_p),
        ("rate", c.c_void_p),
        ("dt", c.c_void_p),
        ("skip", c.c_void_p),
        ("group_norm", Norm),
        ("state", c.c_void_p),
        ("n_taps", c.c_int32),
        ("n_heads", c.c_int32),
        ("n_groups", c.c_int32),
        ("state_dim", c.c_int32),
        ("head_dim", c.c_int32),
        ("residual_scale", c.c_float),
    ]


class Ffn(c.Structure):
    """struct qd_ffn"""

    _fields_ = [
        ("norm", Norm),
        ("post_norm", Norm),
        ("router", Matrix),
        ("gate", c.POINTER(Matrix)),
        ("up", c.POINTER(Matrix)),
        ("down", c.POINTER(Matrix)),
        ("n_experts", c.c_int32),
        ("top_k", c.c_int32),
        ("activation", c.c_int32),
        ("aggregate", c.c_int32),
        ("layer", c.c_int32),
        ("normalize_p", c.c_float),
        ("residual_scale", c.c_float),
        ("fuse", c.c_void_p),
        ("load", c.c_void_p),
        ("ids", c.c_void_p),
        ("weights", c.c_void_p),
        ("logits", c.c_void_p),
        ("store", c.c_void_p),
        ("score", c.c_int32),
        ("n_groups", c.c_int32),
        ("top_k_groups", c.c_int32),
        ("group_by_best", c.c_int32),
        ("normalize_eps", c.c_float),
        ("normalize_min", c.c_float),
        ("routed_scale", c.c_float),
        ("router_bias", c.c_void_p),
        ("correction", c.c_void_p),
        ("gate_bias", c.c_void_p),
        ("up_bias", c.c_void_p),
        ("down_bias", c.c_void_p),
        ("shared_gate", Matrix),
        ("shared_up", Matrix),
        ("shared_down", Matrix),
        ("shared_weight", Matrix),
        ("shared_activation", c.c_int32),
        ("stream_scale", c.c_float),
        ("router_norm", Norm),
        ("expert_norm", Norm),
        ("expert_post_norm", Norm),
        ("shared_post_norm", Norm),
        ("expert_scale", c.c_void_p),
        ("near", c.c_float),
    ]


class Head(c.Structure):
    """struct qd_head"""

    _fields_ = [
        ("norm", Norm),
        ("weight", Matrix),
        ("logit_scale", c.c_float),
        ("bias", c.c_void_p),
        ("logit_cap", c.c_float),
    ]


class Merge(c.Structure):
    """struct qd_merge"""

    _fields_ = [
        ("post_norm", Norm),
        ("bias", c.c_void_p),
        ("residual_scale", c.c_float),
        ("stream_scale", c.c_float),
        ("d_model", c.c_int32),
    ]


class Batch(c.Structure):
    """struct qd_batch"""

    _fields_ = [
        ("n_tokens", c.c_int32),
        ("n_sequences", c.c_int32),
        ("n_rows", c.c_int32),
        ("tokens", c.c_void_p),
        ("positions", c.c_void_p),
        ("starts", c.c_void_p),
        ("tables", c.c_void_p),
        ("table_starts", c.c_void_p),
        ("rows", c.c_void_p),
        ("logits", c.c_void_p),
        ("hidden", c.c_void_p),
        ("before", c.c_void_p),
        ("after", c.c_void_p),
        ("table_size", c.c_int64),
        ("branches", c.c_void_p),
        ("n_branches", c.c_int32),
        ("branch", c.c_int32),
    ]


class Step(c.Structure):
    """struct qd_step"""

    _fields_ = [
        ("kind", c.c_int32),
        ("op", c.c_void_p),
    ]


class Sampled(c.Structure):
    """struct qd_sampled"""

    _fields_ = [
        ("token", c.c_int32),
        ("n_top", c.c_int32),
        ("log_sum", c.c_float),
        ("logit", c.c_float),
    ]


class Sampling(c.Structure):
    """struct qd_sampling"""

    _fields_ = [
        ("logits", c.c_void_p),
        ("allowed", c.c_void_p),
        ("unused", c.c_void_p),
        ("early", c.c_void_p),
        ("said", c.c_void_p),
        ("counts", c.c_void_p),
        ("moved", c.c_void_p),
        ("moves", c.c_void_p),
        ("history", c.c_void_p),
        ("breaks", c.c_void_p),
        ("breakers", c.c_void_p),
        ("n_history", c.c_int32),
        ("n_breakers", c.c_int32),
        ("dry_allowed_length", c.c_int32),
        ("n_unused", c.c_int32),
        ("n_early", c.c_int32),
        ("n_said", c.c_int32),
        ("n_moved", c.c_int32),
        ("temperature", c.c_double),
        ("repetition_penalty", c.c_double),
        ("presence_penalty", c.c_double),
        ("frequency_penalty", c.c_double),
        ("top_p", c.c_double),
        ("min_p", c.c_double),
        ("typical_p", c.c_double),
        ("xtc_probability", c.c_double),
        ("xtc_threshold", c.c_double),
        ("dry_multiplier", c.c_double),
        ("dry_base", c.c_double),
        ("top_k", c.c_int32),
        ("n_top", c.c_int32),
        ("seed", c.c_int64),
        ("position", c.c_int64),
        ("top_ids", c.c_void_p),
        ("top_logits", c.c_void_p),
        ("chosen", Sampled),
    ]


class Search(c.Structure):
    """struct qd_search"""

    _fields_ = [
        ("x", c.c_void_p),
        ("weight", c.c_void_p),
        ("codebook", c.c_void_p),
        ("n", c.c_int64),
        ("length", c.c_int32),
        ("per_block", c.c_int32),
        ("low", c.c_int32),
        ("high", c.c_int32),
        ("least", c.c_int32),
        ("most", c.c_int32),
        ("d", c.c_void_p),
        ("m", c.c_void_p),
        ("scales", c.c_void_p),
        ("minima", c.c_void_p),
        ("numbers", c.c_void_p),
    ]


class StoreCounts(c.Structure):
    """struct qd_store_counts"""

    _fields_ = [
        ("hits", c.c_int64),
        ("misses", c.c_int64),
        ("bytes_read", c.c_int64),
        ("bytes_held", c.c_int64),
    ]


class Allocations(c.Structure):
    """struct qd_allocations"""

    _fields_ = [
        ("made", c.c_int64),
        ("failed", c.c_int64),
        ("elsewhere", c.c_int64),
    ]


STRUCTS: dict[str, type[c.Structure]] = {
    "qd_message": Message,
    "qd_field": Field,
    "qd_matrix": Matrix,
    "qd_norm": Norm,
    "qd_embed": Embed,
    "qd_attention": Attention,
    "qd_short_conv": ShortConv,
    "qd_delta_net": DeltaNet,
    "qd_mamba2": Mamba2,
    "qd_ffn": Ffn,
    "qd_head": Head,
    "qd_merge": Merge,
    "qd_batch": Batch,
    "qd_step": Step,
    "qd_sampled": Sampled,
    "qd_sampling": Sampling,
    "qd_search": Search,
    "qd_store_counts": StoreCounts,
    "qd_allocations": Allocations,
}

PARAMETERS: dict[str, list[Any]] = {
    "qd_has_isa": [
        c.c_int32,  # isa
        c.c_void_p,  # has
        c.POINTER(Message),  # why
    ],
    "qd_create": [
        c.c_int32,  # n_threads
        c.c_int32,  # isa
        c.POINTER(c.c_void_p),  # context
        c.POINTER(Message),  # why
    ],
    "qd_destroy": [
        c.c_void_p,  # context
        c.POINTER(Message),  # why
    ],
    "qd_set_int16": [
        c.c_void_p,  # context
        c.c_int32,  # int16
        c.POINTER(Message),  # why
    ],
    "qd_packed_bytes": [
        c.c_int32,  # format
        c.c_int64,  # rows
        c.c_int64,  # cols
        c.c_void_p,  # bytes
        c.POINTER(Message),  # why
    ],
    "qd_kv_bytes": [
        c.c_int32,  # kv_format
        c.c_int32,  # head_dim
        c.c_void_p,  # bytes
        c.POINTER(Message),  # why
    ],
    "qd_latent_bytes": [
        c.c_int32,  # kv_format
        c.c_int32,  # rank
        c.c_int32,  # rope_dim
        c.c_void_p,  # bytes
        c.POINTER(Message),  # why
    ],
    "qd_pack": [
        c.c_void_p,  # context
        c.c_int32,  # source
        c.c_void_p,  # in
        c.c_int64,  # row_bytes
        c.c_int64,  # rows
        c.c_int64,  # cols
        c.c_int32,  # format
        c.c_void_p,  # out
        c.c_void_p,  # importance
        c.c_void_p,  # bad_row
        c.POINTER(Message),  # why
    ],
    "qd_pack_stored": [
        c.c_void_p,  # context
        c.c_int32,  # stored
        c.c_void_p,  # in
        c.c_int64,  # row_bytes
        c.c_int64,  # rows
        c.c_int64,  # cols
        c.c_void_p,  # codebook
        c.c_int32,  # format
        c.c_void_p,  # out
        c.c_void_p,  # importance
        c.c_void_p,  # bad_row
        c.POINTER(Message),  # why
    ],
    "qd_unpack": [
        c.c_void_p,  # context
        c.c_int32,  # format
        c.c_void_p,  # packed
        c.c_int64,  # cols
        c.c_int64,  # first
        c.c_int64,  # n
        c.c_void_p,  # out
        c.POINTER(Message),  # why
    ],
    "qd_dequantize": [
        c.c_void_p,  # context
        c.c_int32,  # stored
        c.c_void_p,  # blocks
        c.c_int64,  # n
        c.c_void_p,  # codebook
        c.c_void_p,  # out
        c.POINTER(Message),  # why
    ],
    "qd_find_scales": [
        c.c_void_p,  # context
        c.POINTER(Search),  # search
        c.POINTER(Message),  # why
    ],
    "qd_run": [
        c.c_void_p,  # context
        c.POINTER(Step),  # steps
        c.c_int32,  # n_steps
        c.POINTER(Batch),  # batch
        c.POINTER(Message),  # why
    ],
    "qd_linear": [
        c.c_void_p,  # context
        c.POINTER(Matrix),  # matrix
        c.c_void_p,  # x
        c.c_int64,  # n
        c.c_void_p,  # out
        c.POINTER(Message),  # why
    ],
    "qd_norm_rows": [
        c.c_void_p,  # context
        c.POINTER(Norm),  # norm
        c.c_void_p,  # x
        c.c_int64,  # n
        c.c_int64,  # d
        c.c_void_p,  # out
        c.POINTER(Message),  # why
    ],
    "qd_row_stats": [
        c.c_void_p,  # context
        c.c_void_p,  # logits
        c.c_int64,  # r
        c.c_int64,  # v
        c.c_void_p,  # best
        c.c_void_p,  # log_sum
        c.POINTER(Message),  # why
    ],
    "qd_sample": [
        c.c_void_p,  # context
        c.c_void_p,  # rows
        c.c_int64,  # n
        c.c_int64,  # v
        c.POINTER(Message),  # why
    ],
    "qd_gather_rows": [
        c.c_void_p,  # context
        c.c_void_p,  # x
        c.c_int64,  # row_bytes
        c.c_void_p,  # index
        c.c_int64,  # n
        c.c_void_p,  # out
        c.POINTER(Message),  # why
    ],
    "qd_sum_rows": [
        c.c_void_p,  # context
        c.c_int32,  # dtype
        c.c_void_p,  # rows
        c.c_void_p,  # home
        c.c_int64,  # n
        c.c_int64,  # k
        c.c_int64,  # d
        c.c_void_p,  # out
        c.POINTER(Message),  # why
    ],
    "qd_hidden": [
        c.c_void_p,  # context
        c.c_int32,  # dtype
        c.c_int32,  # activation
        c.c_void_p,  # gate
        c.c_void_p,  # up
        c.c_void_p,  # weights
        c.c_int64,  # n
        c.c_int64,  # f
        c.c_void_p,  # hidden
        c.POINTER(Message),  # why
    ],
    "qd_hidden_back": [
        c.c_void_p,  # context
        c.c_int32,  # dtype
        c.c_int32,  # activation
        c.c_void_p,  # gate
        c.c_void_p,  # up
        c.c_void_p,  # weights
        c.c_int64,  # n
        c.c_int64,  # f
        c.c_void_p,  # dh
        c.c_void_p,  # hidden
        c.c_void_p,  # du
        c.c_void_p,  # d_weights
        c.POINTER(Message),  # why
    ],
    "qd_attention_softmax": [
        c.c_void_p,  # context
        c.c_int32,  # dtype
        c.c_void_p,  # scores
        c.c_void_p,  # lows
        c.c_int64,  # offset
        c.c_int64,  # n_kv_heads
        c.c_int64,  # n_queries
        c.c_int64,  # group
        c.c_int64,  # keys
        c.c_void_p,  # slopes
        c.POINTER(Message),  # why
    ],
    "qd_attention_softmax_back": [
        c.c_void_p,  # context
        c.c_int32,  # dtype
        c.c_void_p,  # p
        c.c_void_p,  # dp
        c.c_void_p,  # lows
        c.c_int64,  # offset
        c.c_int64,  # n_kv_heads
        c.c_int64,  # n_queries
        c.c_int64,  # group
        c.c_int64,  # keys
        c.POINTER(Message),  # why
    ],
    "qd_cross_entropy": [
        c.c_void_p,  # context
        c.c_int32,  # dtype
        c.c_void_p,  # logits
        c.c_void_p,  # targets
        c.c_int64,  # n
        c.c_int64,  # v
        c.c_float,  # logit_scale
        c.c_int32,  # gradient
        c.c_void_p,  # losses
        c.POINTER(Message),  # why
    ],
    "qd_read_bandwidth": [
        c.c_void_p,  # context
        c.c_void_p,  # data
        c.c_int64,  # bytes
        c.c_int32,  # repeats
        c.c_void_p,  # rate
        c.POINTER(Message),  # why
    ],
    "qd_peak": [
        c.c_void_p,  # context
        c.c_int32,  # format
        c.c_int64,  # iterations
        c.c_void_p,  # rate
        c.POINTER(Message),  # why
    ],
    "qd_store_create": [
        c.c_int32,  # n_layers
        c.c_int32,  # n_experts
        c.c_int32,  # n_parts
        c.c_void_p,  # files
        c.c_void_p,  # offsets
        c.c_void_p,  # sizes
        c.c_int64,  # budget
        c.c_int32,  # n_readers
        c.POINTER(c.c_void_p),  # store
        c.POINTER(Message),  # why
    ],
    "qd_store_destroy": [
        c.c_void_p,  # store
        c.POINTER(Message),  # why
    ],
    "qd_store_stats": [
        c.c_void_p,  # store
        c.POINTER(StoreCounts),  # counts
        c.POINTER(Message),  # why
    ],
    "qd_watch_allocations": [
        c.c_int64,  # fail_at
        c.POINTER(Allocations),  # seen
        c.POINTER(Message),  # why
    ],
    "qd_throw_in_phase": [
        c.c_void_p,  # context
        c.POINTER(Message),  # why
    ],
}
"""Of the functions that return a Status."""

CONSTANT_DATA: dict[str, Any] = {
    "qd_header_sha256": c.c_char_p,
    "qd_fields": c.POINTER(Field),
}
"""Functions without parameters -> what they return."""
