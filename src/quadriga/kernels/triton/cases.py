"""The table that ``make gpu-check`` walks: calls of every kernel at sizes of models that people run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quadriga.kernels.ops import Choice
from quadriga.kernels.triton import weights
from quadriga.kernels.triton.cases_attention import CALLS
from quadriga.kernels.triton.combine import combine
from quadriga.kernels.triton.experts import ExpertNetworks, run_experts
from quadriga.kernels.triton.gradients import weight_gradient
from quadriga.kernels.triton.grouped import grouped_product
from quadriga.kernels.triton.router import Places, route_and_place

CAPABILITIES = (80, 90, 100)
"""Compute capabilities that everything is compiled for: A100, H100 and H200, B200."""


@dataclass(frozen=True)
class Case:
    """One call, whose launches are recorded on the meta device and compiled."""

    name: str
    call: Callable[[], object]
    """A host function with tensors on the meta device."""
    matrix: tuple[str, ...] = ()
    """Kernels that must multiply by the capability's matrix instruction (wgmma on 90)."""
    capabilities: tuple[int, ...] = CAPABILITIES


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor that has a shape and no numbers."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _combine(tokens: int, top_k: int, d_model: int) -> Callable[[], object]:
    return lambda: combine(
        meta(tokens * top_k, d_model),
        meta(tokens, top_k, dtype=torch.int32),
        meta(tokens, top_k, dtype=torch.float32),
        meta(tokens, d_model),
    )


def _route(tokens: int, d_model: int, n_experts: int, how: Choice, *, corrected: bool = False) -> Callable[[], object]:
    weight = meta(n_experts, d_model, dtype=torch.float32)
    correction = meta(n_experts, dtype=torch.float32) if corrected else None
    return lambda: route_and_place(meta(tokens, d_model), weight, how, None, correction)


_DBRX = Choice(top_k=4)
_QWEN3_30B = Choice(top_k=8)
_DEEPSEEK_V3 = Choice(top_k=8, score="sigmoid", normalize_eps=1e-20, scale=2.5, n_groups=8, top_k_groups=4)
_PHI35 = Choice(top_k=2, score="sparse_mixer", near=0.02)


def _experts(
    tokens: int, d_model: int, d_ff: int, n_experts: int, top_k: int, form: str, activation: str = "silu"
) -> Callable[[], object]:
    gate, up = (weights.empty(form, n_experts, d_ff, d_model) for _ in range(2))
    down = weights.empty(form, n_experts, d_model, d_ff)
    places = Places(
        meta(tokens, top_k, dtype=torch.int32),
        meta(tokens * top_k, dtype=torch.int32),
        meta(n_experts + 1, dtype=torch.int32),
    )
    networks = ExpertNetworks(gate, up, down, activation)
    share = meta(tokens, top_k, dtype=torch.float32)
    return lambda: run_experts(meta(tokens, d_model), places, share, networks)


def _gradients(rows: int, d_model: int, d_ff: int, n_experts: int) -> Callable[[], object]:
    starts, dy = meta(n_experts + 1, dtype=torch.int32), meta(rows, d_ff)
    weight = weights.empty("plain", n_experts, d_ff, d_model)
    return lambda: (
        grouped_product(dy, weight, starts=starts, transposed=True),
        weight_gradient(dy, meta(rows, d_model), starts),
    )


_FORMATS = ("plain", "fp8", "q8", "q8m", "q4", "q4m", "mxfp4", "q4k", "k8", "k8m")

CASES: tuple[Case, ...] = (
    Case("route, dbrx-132b, 8 tokens", _route(8, 6144, 16, _DBRX)),
    Case("route, qwen3-30b-a3b, 256 tokens", _route(256, 2048, 128, _QWEN3_30B)),
    Case("route, deepseek-v3, 16 tokens", _route(16, 7168, 256, _DEEPSEEK_V3, corrected=True)),
    Case("route, phi-3.5-moe, 300 tokens", _route(300, 4096, 16, _PHI35)),
    Case("combine, dbrx-132b, 8 tokens", _combine(8, 4, 6144)),
    Case(
        "gradients of experts, 32768 rows of dbrx-132b",
        _gradients(32768, 6144, 10752, 16),
        matrix=("grouped_kernel", "weight_gradient_kernel"),
    ),
    *(
        Case(
            f"experts in {form}, dbrx-132b, {tokens} tokens",
            _experts(tokens, 6144, 10752, 16, 4, form),
            matrix=("grouped_kernel",),
        )
        for form in _FORMATS
        for tokens in ((8, 256, 4096) if form in ("plain", "q4", "q4k") else (8, 4096))
    ),
    *(Case(name, call, matrix) for name, call, matrix in CALLS),
)
