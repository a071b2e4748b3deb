"""From what wqkv gives to heads that attend: bias, norm of q and k, clip, rotation; keys and values into the cache.

    q, k, v -> + bias -> norm (q, k) -> clip -> rotate (q, k)            the order of ``nn.attention``
    q, k, v -> + bias -> clip -> rotate (q, k) -> norm (q, k)            where the norm comes late (Hunyuan)

Two kernels do so with the functions here: that of :func:`prepare`, before the attention of prompts, and the attention
of single tokens (``attention_tokens``), which prepares its own heads and needs no launch for it. All steps are float32,
rounded once at the end. cos and sin of all positions are a table, made once: computed here, at every head of every
layer, they would take registers and local memory for angles that never change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadriga.kernels.triton.launch import launch


@dataclass(frozen=True, kw_only=True)
class Heads:
    """How the rows of wqkv become heads; see ``model.config.AttentionSpec``."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rotation: Tensor | None = None
    """(positions, 2, pairs) float32, cos and sin (:func:`rotation_table`), of the first 2 * pairs numbers of every
    head; None: nothing turns."""
    bias: Tensor | None = None
    """Of the projection, a number for each of its rows."""
    q_norm: Tensor | None = None
    """(d,) of every head, or (H d,) of all of q; k_norm alike."""
    k_norm: Tensor | None = None
    norm_eps: float = 0.0
    norm_late: bool = False
    """The norm comes after the rotation; only of every head."""
    clip: float | None = None
    gated: bool = False
    """Behind v there are H d gates: what a head gives is multiplied by their sigmoid."""

    @property
    def width(self) -> int:
        """Rows of wqkv."""
        return (self.n_heads * (2 if self.gated else 1) + 2 * self.n_kv_heads) * self.head_dim

    def gates(self, qkv: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """The gates in rows of wqkv, (N, H d), and their bias; None: there are none."""
        if not self.gated:
            return None
        first = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
        return qkv[:, first:], None if self.bias is None else self.bias[first:]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What kernels that use :func:`prepared` are told: bias, both norms, rotation, eps, clip."""
        return self.bias, self.q_norm, self.k_norm, self.rotation, self.norm_eps, self.clip

    @property
    def constants(self) -> dict[str, Any]:
        """Their constants."""
        over_vector = self.q_norm is not None and len(self.q_norm) != self.head_dim
        assert not (over_vector and self.norm_late), "the runner refuses a late norm over all heads"
        return {
            "H": self.n_heads,
            "K": self.n_kv_heads,
            "D": self.head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(self.head_dim)),
            "BLOCK_Q": triton.next_power_of_2(self.n_heads * self.head_dim),
            "PAIRS": 0 if self.rotation is None else self.rotation.shape[2],
            "OVER_VECTOR": over_vector,
            "LATE": self.norm_late,
        }


def rotation_table(frequencies: Tensor, scale: float, n_positions: int) -> Tensor:
    """(n_positions, 2, pairs) float32 on the frequencies' device: cos and sin of position * frequency, times ``scale``.

    Args:
        frequencies: (pairs,) float32; products are float32, as ``nn.rope`` has them.
    """
    positions = torch.arange(n_positions, device=frequencies.device)
    angles = positions[:, None].float() * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=1) * scale


@triton.jit
def projected(row, bias, at, inside):
    """Numbers ``at`` of a row of wqkv, with their bias, float32."""
    x = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _vector_spread(row, bias, first, n, eps, BLOCK: tl.constexpr):
    """sqrt(mean of squares + eps) of ``n`` numbers from ``first`` on."""
    columns = tl.arange(0, BLOCK)
    x = projected(row, bias, first + columns, columns < n)
    return tl.sqrt(tl.sum(x * x, axis=0) / n + eps)


@triton.jit
def _clipped(x, clip):
    if clip is not None:
        x = tl.minimum(tl.maximum(x, -clip), clip)
    return x


@triton.jit
def prepared(
    row, heads, known, first, n_numbers, position, bias, weight, rotation, eps, clip,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ALL: tl.constexpr, PAIRS: tl.constexpr,
    OVER_VECTOR: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Heads of one kind (q, or k, or v) of one token, ready to attend: (M, BLOCK_D) float32, zeros outside.

    Args:
        row: where the token's row of wqkv begins.
        heads, known: (M,) numbers of the heads, and which of them there are.
        first, n_numbers: where the heads of this kind begin in the row, and how many numbers they have together.
        weight: of their norm, or None. PAIRS: 0: they do not turn.
    """
    columns = tl.arange(0, BLOCK_D)
    inside = known[:, None] & (columns < D)[None, :]
    at = heads[:, None] * D + columns[None, :]
    x = projected(row, bias, first + at, inside)
    if PAIRS > 0:  # the other number of every pair
        swapped = tl.where(columns < PAIRS, columns + PAIRS, columns - PAIRS)
        turns = columns < 2 * PAIRS
        pairs_in = known[:, None] & turns[None, :]
        other_at = heads[:, None] * D + swapped[None, :]
        other = projected(row, bias, first + other_at, pairs_in)
    if weight is not None and not LATE:
        if OVER_VECTOR:
            spread = _vector_spread(row, bias, first, n_numbers, eps, BLOCK_ALL)
            x = x / spread * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
            if PAIRS > 0:
                other = other / spread * tl.load(weight + other_at, mask=pairs_in, other=0.0).to(tl.float32)
        else:
            spreads = tl.sqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
            x = x / spreads * tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
            if PAIRS > 0:
                other = other / spreads * tl.load(weight + swapped, mask=turns, other=0.0).to(tl.float32)[None, :]
    x = _clipped(x, clip)
    if PAIRS > 0:
        other = _clipped(other, clip)
        pair = tl.where(columns < PAIRS, columns, swapped)
        turning = rotation + tl.maximum(position, 0).to(tl.int64) * (2 * PAIRS)
        cos = tl.load(turning + pair, mask=turns, other=0.0)
        sin = tl.load(turning + PAIRS + pair, mask=turns, other=0.0)
        sin = tl.where(columns < PAIRS, -sin, sin)
        x = tl.where(turns[None, :], x * cos[None, :] + other * sin[None, :], x)
    if weight is not None and LATE:
        spreads = tl.sqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        x = x / spreads * tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def prepare_kernel(
    qkv, width, positions, slots, q, keys, values, bias, q_norm, k_norm, rotation, eps, clip,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    PAIRS: tl.constexpr, OVER_VECTOR: tl.constexpr, LATE: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program is a token and its q, k or v: qkv (N, width), q (N, H, D), keys and values (places, K, D)."""
    token = tl.program_id(0).to(tl.int64)
    kind = tl.program_id(1)
    position = tl.load(positions + token)
    slot = tl.load(slots + token).to(tl.int64)
    row = qkv + token * width
    heads, columns = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    at = heads[:, None] * D + columns[None, :]
    if kind == 0:
        x = prepared(
            row, heads, heads < H, 0, H * D, position, bias, q_norm, rotation, eps, clip,
            D, BLOCK_D, BLOCK_Q, PAIRS, OVER_VECTOR, LATE,
        )  # fmt: skip
        tl.store(q + token * (H * D) + at, x.to(q.dtype.element_ty), mask=(heads < H)[:, None] & (columns < D)[None, :])
    inside = (heads < tl.where(slot >= 0, K, 0))[:, None] & (columns < D)[None, :]
    if kind == 1:
        x = prepared(
            row, heads, heads < K, H * D, K * D, position, bias, k_norm, rotation, eps, clip,
            D, BLOCK_D, BLOCK_Q, PAIRS, OVER_VECTOR, LATE,
        )  # fmt: skip
        tl.store(keys + slot * (K * D) + at, x.to(keys.dtype.element_ty), mask=inside)
    if kind == 2:
        x = prepared(
            row, heads, heads < K, (H + K) * D, K * D, position, bias, None, rotation, eps, clip,
            D, BLOCK_D, BLOCK_Q, 0, OVER_VECTOR, LATE,
        )  # fmt: skip
        tl.store(values + slot * (K * D) + at, x.to(values.dtype.element_ty), mask=inside)


def prepare(qkv: Tensor, heads: Heads, positions: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Make heads of a projection, and store keys and values.

    Args:
        qkv: (N, heads.width), without the bias.
        positions: (N,) int32.
        slots: (N,) int32, where each token's key and value go: block * 16 + position in it; -1: nowhere.
        keys, values: (blocks * 16, K, d), changed.

    Returns:
        q (N, H, d) in qkv's dtype.
    """
    n = len(qkv)
    q = torch.empty((n, heads.n_heads, heads.head_dim), dtype=qkv.dtype, device=qkv.device)
    launch(
        prepare_kernel, (n, 3), qkv, heads.width, positions, slots, q, keys, values, *heads.arguments,
        warps=8, BLOCK_H=triton.next_power_of_2(heads.n_heads), **heads.constants,
    )  # fmt: skip
    return q
