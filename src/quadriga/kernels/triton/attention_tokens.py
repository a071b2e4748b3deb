"""Attention of one token of each sequence: heads made of the projection, keys stored, splits attended, all in a launch.

A program is a token, a key head and a split of the positions before it. The one whose split holds the token's own
position stores its key and value first. Each leaves its sums in memory and counts itself; who finds that all others
have counted puts the sums together in the order of the splits, so that the result is the same whoever comes last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadriga.kernels.triton.attention import Attend, finish, joined, nothing, over_split, queries
from quadriga.kernels.triton.heads import Heads, prepared
from quadriga.kernels.triton.launch import launch


@triton.jit
def _store_own(
    row, keys, values, slot, head, position, bias, k_norm, rotation, eps, clip,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    PAIRS: tl.constexpr, OVER_VECTOR: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Store a token's key and value of one key head."""
    one = tl.arange(0, 1) + head
    key = prepared(
        row, one, one < K, H * D, K * D, position, bias, k_norm, rotation, eps, clip,
        D, BLOCK_D, BLOCK_Q, PAIRS, OVER_VECTOR, LATE,
    )  # fmt: skip
    value = prepared(
        row, one, one < K, (H + K) * D, K * D, position, bias, None, rotation, eps, clip,
        D, BLOCK_D, BLOCK_Q, 0, OVER_VECTOR, LATE,
    )  # fmt: skip
    columns = tl.arange(0, BLOCK_D)
    place = (slot * K + one[:, None]) * D + columns[None, :]
    inside = (one < K)[:, None] & (columns < D)[None, :]
    tl.store(keys + place, key.to(keys.dtype.element_ty), mask=inside)
    tl.store(values + place, value.to(values.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # all threads of the program have stored


@triton.jit
def _leave(part, totals, place, most, total, mixed, TILE_HEADS: tl.constexpr):
    """Leave one split's sums where the last program finds them."""
    lane, columns = tl.arange(0, mixed.shape[0]), tl.arange(0, mixed.shape[1])
    own, line = lane < TILE_HEADS, place * TILE_HEADS + lane
    tl.store(totals + line * 2, most, mask=own)
    tl.store(totals + line * 2 + 1, total, mask=own)
    tl.store(part + line[:, None] * mixed.shape[1] + columns[None, :], mixed, mask=own[:, None])
    tl.debug_barrier()  # all threads have stored before one of them says so


@triton.jit
def _gather(part, totals, first_place, n_splits, TILE: tl.constexpr, TILE_HEADS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sums of all splits, put together in their order; not from this processor's own cache."""
    lane, columns = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    own = lane < TILE_HEADS
    most, total, mixed = nothing(TILE, BLOCK_D)
    for i in range(n_splits):
        line = (first_place + i) * TILE_HEADS + lane
        m = tl.load(totals + line * 2, mask=own, other=0.0, cache_modifier=".cg")
        t = tl.load(totals + line * 2 + 1, mask=own, other=0.0, cache_modifier=".cg")
        at = line[:, None] * BLOCK_D + columns[None, :]
        x = tl.load(part + at, mask=own[:, None], other=0.0, cache_modifier=".cg")
        most, total, mixed = joined(most, total, mixed, m, t, x)
    return most, total, mixed


@triton.jit
def token_kernel(
    q, width, gates, gates_row, gates_bias, keys, values, tables, table_width, positions, slots, out,
    part, totals, arrived, bias, q_norm, k_norm, rotation, eps, clip,
    slopes, sinks, scale, cap, window,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, REST: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr, TILE: tl.constexpr, TILE_HEADS: tl.constexpr, HEAD_TILES: tl.constexpr,
    KEYS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_Q: tl.constexpr, PAIRS: tl.constexpr, OVER_VECTOR: tl.constexpr, LATE: tl.constexpr, PREPARE: tl.constexpr,
):  # fmt: skip
    """See the module. ``q`` has the rows of wqkv with PREPARE, else queries that are ready."""
    token, lane = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    head = tl.program_id(1) // HEAD_TILES
    within = (tl.program_id(1) % HEAD_TILES) * TILE_HEADS + lane
    heads, known, row = head * (H // K) + within, (lane < TILE_HEADS) & (within < H // K), token + lane * 0
    position = tl.load(positions + token)
    most, total, mixed = nothing(TILE, BLOCK_D)
    if position < 0:  # a place in the batch that nobody has
        if tl.program_id(2) == 0:
            finish(most, total, mixed, None, out, None, 0, None, row, heads, known, H, D)
        return
    begin = position * 0
    if window is not None:
        begin = tl.maximum(position - window + 1, 0) // KEYS * KEYS
    n_splits, split = position // SPLIT - begin // SPLIT + 1, begin // SPLIT + tl.program_id(2)
    if tl.program_id(2) >= n_splits:
        return
    if PREPARE:
        if tl.program_id(2) == n_splits - 1:
            _store_own(
                q + token * width, keys, values, tl.load(slots + token).to(tl.int64), head, position,
                bias, k_norm, rotation, eps, clip, H, K, D, BLOCK_D, BLOCK_Q, PAIRS, OVER_VECTOR, LATE,
            )  # fmt: skip
        first = prepared(
            q + token * width, heads, known, 0, H * D, position, bias, q_norm, rotation, eps, clip,
            D, BLOCK_D, BLOCK_Q, PAIRS, OVER_VECTOR, LATE,
        ).to(keys.dtype.element_ty)  # fmt: skip
        others = first
    else:
        first, others = queries(q, row, heads, known, H, D, REST, BLOCK_D, BLOCK_REST)
    if slopes is not None:
        slopes = tl.load(slopes + heads, mask=known, other=0.0)
    most, total, mixed = over_split(
        first, others, tables + token * table_width, keys, values, begin, split, position + 1,
        tl.where(known, position, -1), slopes, head, scale, cap, window, K, D, REST, KEYS, SPLIT,
    )  # fmt: skip
    if n_splits > 1:
        group = token * tl.num_programs(1) + tl.program_id(1)
        first_place = group * tl.num_programs(2)
        _leave(part, totals, first_place + tl.program_id(2), most, total, mixed, TILE_HEADS)
        if tl.atomic_add(arrived + group, 1, sem="acq_rel") < n_splits - 1:
            return
        tl.store(arrived + group, 0)  # as the next pass wants it
        most, total, mixed = _gather(part, totals, first_place, n_splits, TILE, TILE_HEADS, BLOCK_D)
    finish(most, total, mixed, sinks, out, gates, gates_row, gates_bias, row, heads, known, H, D)


class Meeting:
    """Where the splits of single tokens leave their sums; made once, for the largest batch and all layers.

    Args:
        n_tokens: of the largest batch.
    """

    def __init__(self, attends: Sequence[Attend], n_tokens: int, device: torch.device | str) -> None:
        groups = [n_tokens * a.n_kv_heads * a.head_tiles for a in attends]
        lanes = [n * a.most_splits * a.tile_heads for n, a in zip(groups, attends, strict=True)]
        numbers = max((n * a.block for n, a in zip(lanes, attends, strict=True)), default=0)
        self.part = torch.empty(numbers, dtype=torch.float32, device=device)
        self.totals = torch.empty(2 * max(lanes, default=0), dtype=torch.float32, device=device)
        self.arrived = torch.zeros(max(groups, default=0), dtype=torch.int32, device=device)


def attend_tokens(
    q: Tensor,
    keys: Tensor,
    values: Tensor | None,
    attend: Attend,
    tables: Tensor,
    positions: Tensor,
    slots: Tensor,
    meeting: Meeting,
    heads: Heads | None = None,
    gates: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """Attention of one token of each of N sequences, the last one it has.

    Args:
        q: (N, width): with ``heads`` the rows of wqkv, whose keys and values are stored first; else (N, H key_dim),
            queries that are ready, of tokens whose keys are in the cache.
        keys, values: as ``attend_prompts`` has them; changed with ``heads``.
        tables: (N, most blocks) int32.
        positions: (N,) int32; -1: nobody has this row, and its result is zeros.
        slots: (N,) int32, as ``heads.prepare`` has them.
        gates: as ``attend_prompts`` has them; with ``heads`` they are in its rows.

    Returns:
        (N, H, value_dim) in q's dtype.
    """
    n = len(q)
    out = torch.empty((n, attend.n_heads, attend.value_dim), dtype=q.dtype, device=q.device)
    assert heads is None or prepares_itself(attend), "one program stores a token's key"
    ready = heads or Heads(n_heads=attend.n_heads, n_kv_heads=attend.n_kv_heads, head_dim=attend.value_dim)
    if heads is not None:
        gates = heads.gates(q)
    gate, gate_bias = gates or (None, None)
    launch(
        token_kernel, (n, attend.n_kv_heads * attend.head_tiles, attend.most_splits),
        q, q.stride(0), gate, 0 if gate is None else gate.stride(0), gate_bias, keys, values,
        tables, tables.stride(0), positions, slots, out,
        meeting.part, meeting.totals, meeting.arrived, *ready.arguments, *attend.arguments,
        warps=attend.warps, stages=attend.stages, PREPARE=heads is not None, **(ready.constants | attend.constants),
    )  # fmt: skip
    return out


def prepares_itself(attend: Attend) -> bool:
    """True if the kernel can make the heads of single tokens: one program has all that share a key head."""
    return attend.head_tiles == 1 and attend.value_dim == attend.key_dim
