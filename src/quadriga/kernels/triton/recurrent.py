"""Recurrent layers: short convolutions over the last positions, and the gated delta rule, token by token or by chunks.

States lie in slots: a sequence of a pass reads its state from one and leaves it in another or the same
(``PassBatch.before``, ``after``). Every sequence is computed by itself, so none knows its neighbours.

By chunks of C tokens (Yang et al. 2024, arXiv 2412.06464, section 3.3), with G_t the sum of log decays within the chunk
up to and with t, and S the state before it:

    u_t = beta_t (v_t - exp(G_t) k_t S - sum_{i<t} exp(G_t - G_i) (k_t . k_i) u_i)     (I + A) U = B, A strictly lower
    out_t = exp(G_t) q_t S + sum_{i<=t} exp(G_t - G_i) (q_t . k_i) u_i
    S' = exp(G_C) S + sum_i exp(G_C - G_i) k_i u_i

which is the recurrence, unrolled; no exponent is positive. (I + A)^-1 is built row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadriga.kernels.triton.launch import launch


@dataclass(frozen=True)
class Sequences:
    """S sequences of a pass, and where their states are; int32 on the device."""

    starts: Tensor
    """(S + 1,), of their tokens among the pass's."""
    of_tokens: Tensor
    """(N,), each token's sequence; -1: of none."""
    before: Tensor
    """(S,) slots that states are read from; -1: the sequence begins here."""
    after: Tensor
    """(S,) slots that states are left in; -1: nobody's."""


@triton.jit
def _input(x, x_row, gates, columns, row, inside):
    """Numbers of a row that are convolved: x, or x times the same of ``gates``."""
    values = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    if gates is not None:
        values *= tl.load(gates + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
        values = values.to(x.dtype.element_ty).to(tl.float32)
    return values


@triton.jit
def conv_kernel(
    x, x_row, gates, outer, taps, state, state_row, starts, of_tokens, before, out, width,
    TAPS: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program is a token and BLOCK of its channels: x (N, ...), taps (W, TAPS), state (slots, ...), out (N, W)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    sequence = tl.load(of_tokens + token)
    if sequence >= 0:
        start, slot = tl.load(starts + sequence), tl.load(before + sequence).to(tl.int64)
        for j in tl.static_range(TAPS):
            at = token + (j - TAPS + 1)
            here = tl.where(at >= start, width, 0)
            now = _input(x, x_row, gates, columns, at, columns < here)
            kept = tl.load(
                state + slot * state_row + (at - start + TAPS - 1) * width + columns,
                mask=columns < tl.where((at < start) & (slot >= 0), width, 0), other=0.0,
            )  # fmt: skip
            tap = tl.load(taps + columns * TAPS + j, mask=inside, other=0.0).to(tl.float32)
            total += tap * (now + kept)
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    if outer is not None:
        total *= tl.load(outer + token * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def conv_state_kernel(
    x, x_row, gates, state, state_row, starts, before, after, width, TAPS: tl.constexpr, BLOCK: tl.constexpr
):
    """A program is a sequence and BLOCK of its channels: what is convolved of its last TAPS - 1 positions is kept."""
    sequence = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    start, stop = tl.load(starts + sequence).to(tl.int64), tl.load(starts + sequence + 1).to(tl.int64)
    slot, target = tl.load(before + sequence).to(tl.int64), tl.load(after + sequence).to(tl.int64)
    if target < 0:
        return
    for j in tl.static_range(TAPS - 1):  # upwards: what is read of the same slot lies above what has been written
        at = stop - (TAPS - 1) + j
        now = _input(x, x_row, gates, columns, at, columns < tl.where(at >= start, width, 0))
        kept = tl.load(
            state + slot * state_row + (at - start + TAPS - 1) * width + columns,
            mask=columns < tl.where((at < start) & (slot >= 0), width, 0), other=0.0,
        )  # fmt: skip
        tl.store(state + target * state_row + j * width + columns, now + kept, mask=inside)


def causal_conv(
    x: Tensor,
    taps: Tensor,
    state: Tensor,
    sequences: Sequences,
    *,
    gates: Tensor | None = None,
    outer: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """``ops.causal_conv`` of every sequence from its state, which is then brought up to date.

    Args:
        x: (N, W) of any stride between rows. taps: (W, L).
        state: (slots, L - 1, W) float32, of any stride between slots; changed.
        gates, outer: (N, W) of x's strides: what x is multiplied by before, and the result after.
        silu: the result goes through silu, before ``outer``.

    Returns:
        (N, W) in x's dtype; zeros for tokens of no sequence.
    """
    n, width = x.shape
    assert all(t is None or t.stride() == x.stride() for t in (gates, outer)), "parts of one row"
    out = torch.empty((n, width), dtype=x.dtype, device=x.device)
    block = min(512, triton.next_power_of_2(width))
    n_blocks = triton.cdiv(width, block)
    told = (state, state.stride(0))
    launch(
        conv_kernel, (n, n_blocks), x, x.stride(0), gates, outer, taps, *told, sequences.starts, sequences.of_tokens,
        sequences.before, out, width, TAPS=taps.shape[1], SILU=silu, BLOCK=block,
    )  # fmt: skip
    launch(
        conv_state_kernel, (len(sequences.before), n_blocks), x, x.stride(0), gates, *told, sequences.starts,
        sequences.before, sequences.after, width, TAPS=taps.shape[1], BLOCK=block,
    )  # fmt: skip
    return out


@dataclass(frozen=True, kw_only=True)
class DeltaRule:
    """What the delta rule of a layer is told; see ``model.config.DeltaNetSpec``."""

    n_k_heads: int
    n_v_heads: int
    k_dim: int
    v_dim: int
    rate: Tensor
    """(H,) as it is stored."""
    dt: Tensor
    """(H,)"""
    log_rate: bool
    tiled: bool


@triton.jit
def _decay(ba, token, head, rate, dt, inside, H: tl.constexpr, LOG_RATE: tl.constexpr):
    """(log decay, beta) of some tokens and one head; ba (N, 2 H) is b and a."""
    b = tl.load(ba + token * 2 * H + head, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(ba + token * 2 * H + H + head, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(rate + head).to(tl.float32)
    if LOG_RATE:
        r = tl.exp(r)
    else:
        r = -r
    a += tl.load(dt + head).to(tl.float32)
    softplus = tl.maximum(a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(a)))
    return -r * softplus, 1.0 / (1.0 + tl.exp(-b))


@triton.jit
def _unit(x):
    """Rows of unit length."""
    return x / tl.sqrt(tl.sum(x * x, axis=1) + 1e-6)[:, None]


@triton.jit
def delta_tokens_kernel(
    qkv, ba, rate, dt, state, state_row, starts, before, after, out,
    G: tl.constexpr, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    LOG_RATE: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """A program is a sequence, a head and BLOCK_V columns of its matrix, which go through its tokens one by one."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    k_head = head % G if TILED else head // (H // G)
    rows, columns = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    k_in, v_in = rows < DK, columns < DV
    slot, target = tl.load(before + sequence).to(tl.int64), tl.load(after + sequence).to(tl.int64)
    cells = head * DK * DV + rows[:, None] * DV + columns[None, :]
    read, written = tl.where(slot >= 0, DK, 0), tl.where(target >= 0, DK, 0)
    s = tl.load(state + slot * state_row + cells, mask=(rows < read)[:, None] & v_in[None, :], other=0.0)
    start = tl.load(starts + sequence).to(tl.int64)
    for i in range(tl.load(starts + sequence + 1) - tl.load(starts + sequence)):
        token = start + i
        row = qkv + token * (2 * G * DK + H * DV)
        q = tl.load(row + k_head * DK + rows, mask=k_in, other=0.0).to(tl.float32)
        k = tl.load(row + (G + k_head) * DK + rows, mask=k_in, other=0.0).to(tl.float32)
        v = tl.load(row + 2 * G * DK + head * DV + columns, mask=v_in, other=0.0).to(tl.float32)
        q, k = _unit(q[None, :]), _unit(k[None, :])
        decay, beta = _decay(ba, token, head, rate, dt, True, H, LOG_RATE)
        s = s * tl.exp(decay)
        change = (v - tl.sum(tl.trans(k) * s, axis=0)) * beta
        s += tl.trans(k) * change[None, :]
        y = tl.sum(tl.trans(q) * s, axis=0) * (DK**-0.5)
        tl.store(out + (token * H + head) * DV + columns, y, mask=v_in)
    tl.store(state + target * state_row + cells, s, mask=(rows < written)[:, None] & v_in[None, :])


@triton.jit
def _product(a, b, acc):
    """acc + a b of float32 tiles, each number as three of tf32: float32's precision from the matrix instruction."""
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def _inverse(a, C: tl.constexpr):
    """(I + a)^-1 of a strictly lower triangular (C, C), row by row."""
    rows = tl.arange(0, C)
    inverse = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)
    for i in range(1, C):
        own = tl.sum(tl.where((rows == i)[:, None], a, 0.0), axis=0)
        made = tl.sum(own[:, None] * inverse, axis=0)
        inverse -= tl.where((rows == i)[:, None], made[None, :], 0.0)
    return inverse


@triton.jit
def _chunk(s, q, k, v, decay, beta, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """C tokens at once, as the module says: (results (C, BLOCK_V), the matrix after them)."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    g, last = tl.cumsum(decay, axis=0), tl.sum(decay, axis=0)
    ratio = tl.where(i >= j, tl.exp(tl.where(i >= j, g[:, None] - g[None, :], 0.0)), 0.0)
    square, wide = tl.zeros((C, C), tl.float32), tl.zeros((C, BLOCK_V), tl.float32)
    a = tl.where(i > j, beta[:, None] * ratio * _product(k, tl.trans(k), square), 0.0)
    b = beta[:, None] * (v - tl.exp(g)[:, None] * _product(k, s, wide))
    u = _product(_inverse(a, C), b, wide)
    y = _product(ratio * _product(q, tl.trans(k), square), u, tl.exp(g)[:, None] * _product(q, s, wide))
    return y, _product(tl.trans(k * tl.exp(last - g)[:, None]), u, tl.exp(last) * s)


@triton.jit
def delta_chunks_kernel(
    qkv, ba, rate, dt, state, state_row, starts, before, after, out,
    G: tl.constexpr, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    LOG_RATE: tl.constexpr, TILED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program is a sequence, a head and BLOCK_V columns of its matrix, which go through its tokens C at a time."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    k_head = head % G if TILED else head // (H // G)
    rows, columns = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    k_in, v_in = (rows < DK)[None, :], (columns < DV)[None, :]
    slot, target = tl.load(before + sequence).to(tl.int64), tl.load(after + sequence).to(tl.int64)
    cells = head * DK * DV + rows[:, None] * DV + columns[None, :]
    read, written = tl.where(slot >= 0, DK, 0), tl.where(target >= 0, DK, 0)
    s = tl.load(state + slot * state_row + cells, mask=(rows < read)[:, None] & v_in, other=0.0)
    stop = tl.load(starts + sequence + 1)
    for begin in range(tl.load(starts + sequence), stop, C):
        token = begin + tl.arange(0, C)
        there = token < stop
        row = qkv + token[:, None].to(tl.int64) * (2 * G * DK + H * DV)
        q = tl.load(row + k_head * DK + rows[None, :], mask=there[:, None] & k_in, other=0.0).to(tl.float32)
        k = tl.load(row + (G + k_head) * DK + rows[None, :], mask=there[:, None] & k_in, other=0.0).to(tl.float32)
        v = tl.load(row + 2 * G * DK + head * DV + columns[None, :], mask=there[:, None] & v_in, other=0.0)
        decay, beta = _decay(ba, token, head, rate, dt, there, H, LOG_RATE)
        decay, beta = tl.where(there, decay, 0.0), tl.where(there, beta, 0.0)
        y, s = _chunk(s, _unit(q) * (DK**-0.5), _unit(k), v.to(tl.float32), decay, beta, C, BLOCK_K, BLOCK_V)
        place = (token[:, None].to(tl.int64) * H + head) * DV + columns[None, :]
        tl.store(out + place, y, mask=there[:, None] & v_in)
    tl.store(state + target * state_row + cells, s, mask=(rows < written)[:, None] & v_in)


CHUNK = 32
"""Tokens that are taken at once."""


def delta_rule(
    qkv: Tensor, ba: Tensor, rule: DeltaRule, state: Tensor, sequences: Sequences, *, chunked: bool
) -> Tensor:
    """``ops.delta_rule`` of every sequence and head from its state, which is then brought up to date.

    Args:
        qkv: (N, 2 G d_k + H d_v), convolved. ba: (N, 2 H), what w_ba gives.
        state: (slots, H, d_k, d_v) float32, of any stride between slots; changed.
        chunked: CHUNK tokens at once; else one after the other, which sums a token's numbers in the same order
            wherever its text is cut into passes.

    Returns:
        (N, H, d_v) float32; rows of no sequence are not written.
    """
    n, h, dv = len(qkv), rule.n_v_heads, rule.v_dim
    assert qkv.is_contiguous() and ba.is_contiguous(), "rows lie one after the other"
    out = torch.zeros((n, h, dv), dtype=torch.float32, device=qkv.device)
    block = min(64, max(16, triton.next_power_of_2(dv)))
    told = (
        qkv,
        ba,
        rule.rate,
        rule.dt,
        state,
        state.stride(0),
        sequences.starts,
        sequences.before,
        sequences.after,
        out,
    )
    constants = {
        "G": rule.n_k_heads, "H": h, "DK": rule.k_dim, "DV": dv, "BLOCK_K": max(16, triton.next_power_of_2(rule.k_dim)),
        "BLOCK_V": block, "LOG_RATE": rule.log_rate, "TILED": rule.tiled,
    }  # fmt: skip
    grid = (len(sequences.before), h, triton.cdiv(dv, block))
    if chunked:
        launch(delta_chunks_kernel, grid, *told, **constants, C=CHUNK)
    else:
        launch(delta_tokens_kernel, grid, *told, **constants)
    return out


@triton.jit
def gated_norm_kernel(x, z, z_row, weight, eps, out, D: tl.constexpr, BLOCK: tl.constexpr):
    """A program is a token and a head: x (N, H, D) float32, z (N, H D), out (N, H D)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    place = (token * tl.num_programs(1) + head) * D + columns
    # Rounded as the plain path rounds it, before the norm.
    values = tl.load(x + place, mask=inside, other=0.0).to(out.dtype.element_ty).to(tl.float32)
    values = values / tl.sqrt(tl.sum(values * values, axis=0) / D + eps)
    values *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + token * z_row + head * D + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (values * gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty), mask=inside)


def gated_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Every head's RMSNorm times silu(z).

    Args:
        x: (N, H, d) float32. z: (N, H d) of any stride between rows. weight: (d,).

    Returns:
        (N, H d) in z's dtype.
    """
    n, n_heads, d = x.shape
    out = torch.empty((n, n_heads * d), dtype=z.dtype, device=z.device)
    launch(
        gated_norm_kernel, (n, n_heads), x, z, z.stride(0), weight, eps, out, warps=1, D=d,
        BLOCK=triton.next_power_of_2(d),
    )  # fmt: skip
    return out
