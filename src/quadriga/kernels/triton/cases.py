"""The table that ``make gpu-check`` walks: calls of every kernel at sizes of models that people run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quadriga.kernels.triton.combine import combine

CAPABILITIES = (80, 90, 100)
"""Compute capabilities that everything is compiled for: A100, H100 and H200, B200."""


@dataclass(frozen=True)
class Case:
    """One call, whose launches are recorded on the meta device and compiled."""

    name: str
    call: Callable[[], object]
    """A host function with tensors on the meta device."""
    matrix: bool = False
    """Some launch must multiply by the capability's matrix instruction (wgmma on 90)."""
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


CASES: tuple[Case, ...] = (
    Case("combine, dbrx-132b, 8 tokens", _combine(8, 4, 6144)),
)  # fmt: skip
