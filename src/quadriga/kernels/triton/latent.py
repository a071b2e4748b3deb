"""Latent attention's own steps between its projections: rotate, norm the latent, store it with the shared key."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quadriga.kernels.triton.launch import launch
from quadriga.kernels.triton.norm import NormWeights, normed


@triton.jit
def _turned(source, target, inside, cos, sin, PAIRS: tl.constexpr):
    """Numbers of pairs at ``source`` and PAIRS behind it, rotated, to ``target``."""
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + PAIRS, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, (a * cos - b * sin).to(target.dtype.element_ty), mask=inside)
    tl.store(target + PAIRS, (b * cos + a * sin).to(target.dtype.element_ty), mask=inside)


@triton.jit
def latent_kernel(
    q, latent, queries, rotation, weight, eps, positions, slots, keys,
    H: tl.constexpr, NOPE: tl.constexpr, RANK: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A program is a token: see :func:`prepare_latent`."""
    token = tl.program_id(0).to(tl.int64)
    ROPE: tl.constexpr = 2 * PAIRS
    pair = tl.arange(0, BLOCK_P)
    there = pair < PAIRS
    turning = rotation + tl.maximum(tl.load(positions + token), 0).to(tl.int64) * ROPE + pair
    cos, sin = tl.load(turning, mask=there, other=0.0), tl.load(turning + PAIRS, mask=there, other=0.0)
    heads = tl.arange(0, BLOCK_H)
    _turned(
        q + (token * H + heads[:, None]) * (NOPE + ROPE) + NOPE + pair[None, :],
        queries + (token * H + heads[:, None]) * (RANK + ROPE) + RANK + pair[None, :],
        (heads < H)[:, None] & there[None, :], cos[None, :], sin[None, :], PAIRS,
    )  # fmt: skip
    slot = tl.load(slots + token).to(tl.int64)
    source, target = latent + token * (RANK + ROPE), keys + slot * (RANK + ROPE)
    _turned(source + RANK + pair, target + RANK + pair, pair < tl.where(slot >= 0, PAIRS, 0), cos, sin, PAIRS)
    columns = tl.arange(0, BLOCK_R)
    values = tl.load(source + columns, mask=columns < RANK, other=0.0).to(tl.float32)
    values = normed(values, columns < RANK, weight, None, columns, RANK, eps, False)
    tl.store(target + columns, values.to(keys.dtype.element_ty), mask=columns < tl.where(slot >= 0, RANK, 0))


def prepare_latent(
    q: Tensor,
    latent: Tensor,
    queries: Tensor,
    rotation: Tensor,
    norm: NormWeights,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
) -> None:
    """Rotate q and the shared key, norm the latent, store latent and key as the token's key.

    Args:
        q: (N, H, nope_dim + rope_dim).
        latent: (N, R + rope_dim), what wkv_a gives.
        queries: (N, H, R + rope_dim), whose last rope_dim numbers are written; the first are W_Kb q_nope.
        rotation: (positions, 2, rope_dim / 2) float32, see ``heads.rotation_table``.
        norm: of the latent, rms.
        positions, slots: as ``heads.prepare`` has them.
        keys: (blocks * 16, 1, R + rope_dim), changed.
    """
    n, n_heads, qk_dim = q.shape
    pairs = rotation.shape[2]
    rank = latent.shape[1] - 2 * pairs
    launch(
        latent_kernel, (n,), q, latent, queries, rotation, norm.weight, norm.eps, positions, slots,
        keys, warps=8, H=n_heads, NOPE=qk_dim - 2 * pairs, RANK=rank, PAIRS=pairs,
        BLOCK_H=triton.next_power_of_2(n_heads), BLOCK_P=triton.next_power_of_2(pairs),
        BLOCK_R=triton.next_power_of_2(rank),
    )  # fmt: skip
