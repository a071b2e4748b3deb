"""The rows of ``cases`` beside a mixture's: norms, projections, attention, recurrent layers, sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from quadriga.kernels.triton.attention import Attend, Tiles, attend_prompts
from quadriga.kernels.triton.attention_tokens import Meeting, attend_tokens
from quadriga.kernels.triton.embedding import embed
from quadriga.kernels.triton.heads import Heads, prepare
from quadriga.kernels.triton.latent import prepare_latent
from quadriga.kernels.triton.linear import head_linear, linear
from quadriga.kernels.triton.norm import Chosen, NormWeights, add_norm, norm
from quadriga.kernels.triton.recurrent import DeltaRule, Sequences, causal_conv, delta_rule, gated_norm
from quadriga.kernels.triton.sampling import Rows, sample
from quadriga.kernels.triton.weights import empty

Call = Callable[[], object]


def _numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _ints(*shape: int) -> Tensor:
    return _numbers(*shape, dtype=torch.int32)


def _wide(*shape: int) -> Tensor:
    return _numbers(*shape, dtype=torch.float32)


_DBRX = Attend(n_heads=48, n_kv_heads=8, key_dim=128, value_dim=128, scale=0.088, max_seq_len=32768)
_GPT_OSS = Attend(
    n_heads=64, n_kv_heads=8, key_dim=64, value_dim=64, scale=0.125, max_seq_len=131072, window=128, sinks=_numbers(64)
)
_GROK = replace(_DBRX, max_seq_len=8192, soft_cap=30.0)
_MPT = replace(_DBRX, n_heads=32, n_kv_heads=32, max_seq_len=2048, slopes=_wide(32))
_QWEN3_NEXT = Attend(n_heads=16, n_kv_heads=2, key_dim=256, value_dim=256, scale=0.0625, max_seq_len=262144)
_LATENT = Attend(n_heads=128, n_kv_heads=1, key_dim=576, value_dim=512, scale=0.07, max_seq_len=163840)


def _prompts(attend: Attend, *, gated: bool = False) -> Call:
    n, dims = 2048, (attend.n_kv_heads, attend.key_dim)
    values = None if attend.value_dim < attend.key_dim else _numbers(65536, *dims)
    tiles = Tiles(*(_ints(n // attend.tile_tokens) for _ in range(3)))
    gates = (_numbers(n, 2 * attend.n_heads * attend.value_dim), None) if gated else None
    q = _numbers(n, attend.n_heads, attend.key_dim)
    return lambda: attend_prompts(q, _numbers(65536, *dims), values, attend, _ints(4, 2048), _ints(n), tiles, gates)


def _heads(attend: Attend, *, norms: bool = False, gated: bool = False) -> Heads:
    weight = _numbers(attend.key_dim) if norms else None
    return Heads(
        n_heads=attend.n_heads, n_kv_heads=attend.n_kv_heads, head_dim=attend.key_dim, gated=gated, q_norm=weight,
        k_norm=weight, rotation=_wide(attend.max_seq_len, 2, attend.key_dim // 2), clip=None if norms else 8.0,
    )  # fmt: skip


def _tokens(attend: Attend, n: int, heads: Heads | None = None) -> Call:
    dims = (attend.n_kv_heads, attend.key_dim)
    values = None if attend.value_dim < attend.key_dim else _numbers(65536, *dims)
    q = _numbers(n, attend.n_heads * attend.key_dim if heads is None else heads.width)
    told = (_numbers(65536, *dims), values, attend, _ints(n, 2048), _ints(n), _ints(n))
    return lambda: attend_tokens(q, *told, Meeting([attend], n, "meta"), heads)


def _prepare(attend: Attend, heads: Heads) -> Call:
    cache = [_numbers(65536, attend.n_kv_heads, attend.key_dim) for _ in range(2)]
    return lambda: prepare(_numbers(2048, heads.width), heads, _ints(2048), _ints(2048), *cache)


def _prepare_latent() -> None:
    prepare_latent(
        _numbers(8, 128, 192), _numbers(8, 576), _numbers(8, 128, 576), _wide(163840, 2, 32),
        NormWeights(_numbers(512), "rms", 1e-6), _ints(8), _ints(8), _numbers(65536, 1, 576),
    )  # fmt: skip


def _planes(form: str, n: int, n_out: int, *, rows: int | None = None) -> Call:
    wanted = None if rows is None else _ints(rows)
    dtype = torch.bfloat16 if rows is None else torch.float32
    return lambda: linear(_numbers(n, 6144), empty(form, 1, n_out, 6144), rows=wanted, dtype=dtype)


def _add_norm(chosen: bool) -> Call:
    by = NormWeights(_numbers(6144), "layer", 1e-5)
    branch: Tensor | Chosen = _numbers(8, 6144)
    if chosen:
        branch = Chosen(rows=_numbers(32, 6144), home=_ints(8, 4), weights=_wide(8, 4))
    return lambda: add_norm(_numbers(8, 6144), branch, then=by)


_SEQUENCES = Sequences(_ints(5), _ints(2048), _ints(4), _ints(4))
_RULE = DeltaRule(
    n_k_heads=16, n_v_heads=32, k_dim=128, v_dim=128, rate=_numbers(32), dt=_numbers(32), log_rate=True, tiled=False
)


def _delta() -> None:
    state = _wide(64, 32, 128, 128)
    delta_rule(_numbers(2048, 8192), _numbers(2048, 64), _RULE, state, _SEQUENCES, chunked=False)


def _sample() -> None:
    rows = Rows(
        places=_ints(8), numbers=_numbers(8, 6, dtype=torch.float64), seeds=_numbers(8, 2, dtype=torch.int64),
        bounds=_ints(8, 8), ids=_ints(99), amounts=_wide(99), counts=_ints(99),
        masks=_numbers(2, 100352, dtype=torch.uint8), most_top=20, most_early=4,
    )  # fmt: skip
    sample(_wide(8, 100352), rows)


def _head_linear() -> None:
    head_linear(_numbers(8, 128, 192)[..., :128], _numbers(128, 512, 128), _numbers(8, 128, 576)[..., :512])


CALLS: tuple[tuple[str, Call, tuple[str, ...]], ...] = (
    ("embed, dbrx-132b, 8 tokens", lambda: embed(_ints(8), _numbers(100352, 6144)), ()),
    ("embed in q8, dbrx-132b, 8 tokens", lambda: embed(_ints(8), empty("q8", 1, 100352, 6144)), ()),
    ("embed in k8m, qwen3-30b-a3b, 8 tokens", lambda: embed(_ints(8), empty("k8m", 1, 151936, 2048)), ()),
    ("norm, dbrx-132b", lambda: norm(_numbers(8, 6144), NormWeights(_numbers(6144), "layer", 1e-5)), ()),
    ("add and norm, dbrx-132b", _add_norm(False), ()),
    ("sum of experts, add and norm, dbrx-132b", _add_norm(True), ()),
    ("wqkv, dbrx-132b", lambda: linear(_numbers(8, 6144), _numbers(8192, 6144)), ("linear_kernel",)),
    (
        "head, dbrx-132b",
        lambda: linear(_numbers(2048, 6144), _numbers(100352, 6144), rows=_ints(8), dtype=torch.float32),
        ("linear_kernel",),
    ),
    ("wqkv in q4, dbrx-132b", _planes("q4", 8, 8192), ("grouped_kernel",)),
    ("wqkv in q4, dbrx-132b, 2048 tokens", _planes("q4", 2048, 8192), ("grouped_kernel",)),
    ("head in q8, dbrx-132b", _planes("q8", 2048, 100352, rows=8), ("grouped_kernel",)),
    ("heads, dbrx-132b", _prepare(_DBRX, _heads(_DBRX)), ()),
    ("heads, qwen3-next", _prepare(_QWEN3_NEXT, _heads(_QWEN3_NEXT, norms=True, gated=True)), ()),
    ("attention of prompts, dbrx-132b", _prompts(_DBRX), ("prompt_kernel",)),
    ("attention of prompts, gpt-oss-120b", _prompts(_GPT_OSS), ("prompt_kernel",)),
    ("attention of prompts, grok-1", _prompts(_GROK), ("prompt_kernel",)),
    ("attention of prompts, mpt-7b", _prompts(_MPT), ("prompt_kernel",)),
    ("attention of prompts, qwen3-next", _prompts(_QWEN3_NEXT, gated=True), ()),
    ("attention of prompts, deepseek-v3", _prompts(_LATENT), ()),
    ("attention of 8 tokens, dbrx-132b", _tokens(_DBRX, 8, _heads(_DBRX)), ("token_kernel",)),
    ("attention of 8 tokens, gpt-oss-120b", _tokens(_GPT_OSS, 8, _heads(_GPT_OSS)), ("token_kernel",)),
    ("attention of 8 tokens, qwen3-next", _tokens(_QWEN3_NEXT, 8, _heads(_QWEN3_NEXT, norms=True, gated=True)), ()),
    ("attention of 8 tokens, deepseek-v3", _tokens(_LATENT, 8), ()),
    ("latents, deepseek-v3", _prepare_latent, ()),
    ("W_Kb, deepseek-v3", _head_linear, ("linear_kernel",)),
    (
        "convolution, qwen3-next",
        lambda: causal_conv(_numbers(2048, 8192), _numbers(8192, 4), _wide(64, 3, 8192), _SEQUENCES, silu=True),
        (),
    ),
    ("delta rule by tokens, qwen3-next", _delta, ()),
    ("gated norm, qwen3-next", lambda: gated_norm(_wide(8, 32, 128), _numbers(8, 4096), _numbers(128), 1e-6), ()),
    ("sampling, dbrx-132b, 8 rows", _sample, ()),
)
"""(name, call with tensors on the meta device, kernels that must multiply by the matrix instruction)."""
