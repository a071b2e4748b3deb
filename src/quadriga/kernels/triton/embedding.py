"""Rows of the embedding table, scaled."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadriga.kernels.triton.launch import launch

_BLOCK = 1024
"""Numbers of a row that one program copies."""


@triton.jit
def embed_kernel(tokens, table, out, width, scale, BLOCK: tl.constexpr):
    """A program is a token and BLOCK of its columns: tokens (N,), table (V, D), out (N, D)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    token = tl.load(tokens + row).to(tl.int64)
    values = tl.load(table + token * width + columns, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=inside)


def embed(tokens: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    """Rows of a table times a number.

    Args:
        tokens: (N,) int32, below V.
        table: (V, D).

    Returns:
        (N, D) in the table's dtype.
    """
    n, d = len(tokens), table.shape[1]
    out = torch.empty((n, d), dtype=table.dtype, device=table.device)
    block = min(_BLOCK, triton.next_power_of_2(d))
    launch(embed_kernel, (n, triton.cdiv(d, block)), tokens, table, out, d, scale, BLOCK=block)
    return out
