"""Attention over the paged cache: prompts and single tokens by one arithmetic, the same sums in the same order.

Keys are visited in tiles of 64 positions, aligned to the text's beginning, and tiles in splits, aligned alike. A split
is summed by itself (Dao et al. 2022, arXiv 2205.14135), and splits are put together from the first to the last:

    prompts        a program is a tile of queries and a key head; it goes through its splits one after the other
    single tokens  a program is one query, a key head and a split (``attention_tokens``); the last one that is ready
                   puts all of them together in the order of the splits, whoever was first

Tiles and splits depend on the model alone, never on the batch, and what a query may not see adds exact zeros: a token's
numbers depend neither on who else is computed, nor on how its text was cut into passes.

    score = scale q.k;  cap tanh(score / cap);  + slope (key - query);  softmax over what is seen, and a sink;  times v
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadriga.kernels.triton.arithmetic import product
from quadriga.kernels.triton.launch import launch
from quadriga.quant.packed import BLOCK_TOKENS

KEYS = 64
"""Of a tile."""

MOST_SPLITS, LEAST_SPLIT = 32, 512
"""Programs that share one query and key head at most, at the model's whole context; positions of a split at least."""

_PAGE = tl.constexpr(BLOCK_TOKENS)


@dataclass(frozen=True, kw_only=True)
class Attend:
    """How one layer attends: what ``ops.attention`` is told, and sizes that follow from the model alone."""

    n_heads: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    """Where it is less than key_dim, values are the keys' first numbers (latent attention)."""
    scale: float
    max_seq_len: int
    soft_cap: float | None = None
    slopes: Tensor | None = None
    """(H,) float32."""
    window: int | None = None
    sinks: Tensor | None = None
    """(H,)"""

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.n_heads // self.n_kv_heads

    @property
    def tile(self) -> int:
        """Rows of a tile of queries: 64, wgmma's height, or 16 where wide values would not fit into registers."""
        return 64 if self.value_dim <= 128 else 16

    @property
    def tile_heads(self) -> int:
        """Of them, query heads of one token, with padding."""
        return min(self.tile, int(triton.next_power_of_2(self.group)))

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile."""
        return self.tile // self.tile_heads

    @property
    def head_tiles(self) -> int:
        """Tiles that the query heads of one key head take."""
        return int(triton.cdiv(self.group, self.tile_heads))

    @property
    def split(self) -> int:
        """Positions of a split, whole tiles."""
        tiles = int(triton.cdiv(triton.cdiv(self.max_seq_len, MOST_SPLITS), KEYS))
        return max(LEAST_SPLIT, tiles * KEYS)

    @property
    def most_splits(self) -> int:
        """Splits that one query sees at most."""
        most = int(triton.cdiv(self.max_seq_len, self.split))
        return most if self.window is None else min(most, int(triton.cdiv(self.window + KEYS, self.split)) + 1)

    @property
    def block(self) -> int:
        """Numbers of a value, with padding."""
        return max(16, int(triton.next_power_of_2(self.value_dim)))

    @property
    def warps(self) -> int:
        """Of a program: as many as keep its sums in registers."""
        return 8 if self.tile * self.block > 4096 else 4

    @property
    def stages(self) -> int:
        """How deep loads of keys and values are pipelined: as deep as registers allow."""
        return 1 if self.block > 128 else 2

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What both kernels are told: slopes, sinks, scale, cap, window."""
        return self.slopes, self.sinks, self.scale, self.soft_cap, self.window

    @property
    def constants(self) -> dict[str, Any]:
        """Their constants."""
        rest = self.key_dim - self.value_dim
        return {
            "H": self.n_heads,
            "K": self.n_kv_heads,
            "D": self.value_dim,
            "REST": rest,
            "BLOCK_D": self.block,
            "BLOCK_REST": max(16, triton.next_power_of_2(rest)),
            "TILE": self.tile,
            "TILE_HEADS": self.tile_heads,
            "HEAD_TILES": self.head_tiles,
            "KEYS": KEYS,
            "SPLIT": self.split,
        }


@triton.jit
def nothing(TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    """The softmax over no key: largest score (TILE,), sum of weights (TILE,), weighted sum (TILE, BLOCK_D)."""
    most = tl.full((TILE,), float("-inf"), tl.float32)
    return most, tl.zeros((TILE,), tl.float32), tl.zeros((TILE, BLOCK_D), tl.float32)


@triton.jit
def _scores(q, q_rest, keys, place, there, distance, slopes, scale, cap, window, D: tl.constexpr, REST: tl.constexpr):
    """What queries think of a tile of keys, (TILE, KEYS), -inf where they see none; and the keys, (BLOCK_D, KEYS)."""
    columns = tl.arange(0, q.shape[1])
    k = tl.load(keys + place[None, :] + columns[:, None], mask=there[None, :] & (columns < D)[:, None], other=0.0)
    score = product(q, k, tl.zeros((q.shape[0], k.shape[1]), tl.float32))
    if REST > 0:
        others = tl.arange(0, q_rest.shape[1])
        inside = there[None, :] & (others < REST)[:, None]
        rest = tl.load(keys + place[None, :] + D + others[:, None], mask=inside, other=0.0)
        score = product(q_rest, rest, score)
    score *= scale
    if cap is not None:
        score = cap * (1.0 - 2.0 / (tl.exp(2.0 * (score / cap)) + 1.0))  # tanh
    if slopes is not None:
        score += slopes[:, None] * distance.to(tl.float32)
    seen = there[None, :] & (distance <= 0)
    if window is not None:
        seen = seen & (distance > -window)
    return tl.where(seen, score, float("-inf")), k


@triton.jit
def over_split(
    q, q_rest, table, keys, values, begin, split, stop, positions, slopes, head, scale, cap, window,
    K: tl.constexpr, D: tl.constexpr, REST: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The softmax over the keys of one split that lie from ``begin``, a multiple of KEYS, to before ``stop``.

    Args:
        q, q_rest: (TILE, BLOCK_D) and (TILE, BLOCK_REST), the first D and the other numbers of the queries.
        positions: (TILE,), -1 where there is no query. slopes: (TILE,), or None.

    Returns:
        as :func:`nothing`.
    """
    columns = tl.arange(0, q.shape[1])
    most, total, mixed = nothing(q.shape[0], q.shape[1])
    for tile in range(tl.maximum(split * SPLIT, begin), tl.minimum(stop, (split + 1) * SPLIT), KEYS):
        at = tile + tl.arange(0, KEYS)
        block = tl.load(table + at // _PAGE, mask=at < stop, other=-1).to(tl.int64)
        there = block >= 0  # blocks that no query of the pass sees may have been given up
        place = ((block * _PAGE + at % _PAGE) * K + head) * (D + REST)
        distance = at[None, :] - positions[:, None]
        score, k = _scores(q, q_rest, keys, place, there, distance, slopes, scale, cap, window, D, REST)
        higher = tl.maximum(most, tl.max(score, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights, before = tl.exp(score - base[:, None]), tl.exp(most - base)
        if values is None:
            v = tl.trans(k)
        else:
            v = tl.load(
                values + place[:, None] + columns[None, :], mask=there[:, None] & (columns < D)[None, :], other=0.0
            )
        total = total * before + tl.sum(weights, axis=1)
        mixed = product(weights.to(v.dtype), v, mixed * before[:, None])
        most = higher
    return most, total, mixed


@triton.jit
def joined(most, total, mixed, next_most, next_total, next_mixed):
    """Two parts of a softmax as one."""
    higher = tl.maximum(most, next_most)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    a, b = tl.exp(most - base), tl.exp(next_most - base)
    return higher, total * a + next_total * b, mixed * a[:, None] + next_mixed * b[:, None]


@triton.jit
def finish(
    most, total, mixed, sinks, out, gates, gates_row, gates_bias, row, heads, known, H: tl.constexpr, D: tl.constexpr
):
    """Divide by the sum of weights, a sink's among them; times the sigmoid of the gates; to out (N, H, D)."""
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=known, other=0.0).to(tl.float32)
        higher = tl.maximum(most, sink)
        kept = tl.exp(most - higher)
        total = total * kept + tl.exp(sink - higher)
        mixed = mixed * kept[:, None]
    y = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    columns = tl.arange(0, mixed.shape[1])
    inside = known[:, None] & (columns < D)[None, :]
    at = heads[:, None] * D + columns[None, :]
    if gates is not None:
        gate = tl.load(gates + row[:, None] * gates_row + at, mask=inside, other=0.0).to(tl.float32)
        if gates_bias is not None:
            gate += tl.load(gates_bias + at, mask=inside, other=0.0).to(tl.float32)
        y = y / (1.0 + tl.exp(-gate))
    tl.store(out + row[:, None] * (H * D) + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def queries(q, row, heads, known, H: tl.constexpr, D: tl.constexpr, REST: tl.constexpr, BLOCK_D: tl.constexpr,
            BLOCK_REST: tl.constexpr):  # fmt: skip
    """Queries of q (N, H, D + REST): their first D numbers (TILE, BLOCK_D), the others (TILE, BLOCK_REST)."""
    query = q + (row[:, None] * H + heads[:, None]) * (D + REST)
    columns, others = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_REST)
    first = tl.load(query + columns[None, :], mask=known[:, None] & (columns < D)[None, :], other=0.0)
    return first, tl.load(query + D + others[None, :], mask=known[:, None] & (others < REST)[None, :], other=0.0)


@triton.jit
def prompt_kernel(
    q, keys, values, tables, table_width, positions, tile_rows, tile_tokens, tile_sequences, out,
    gates, gates_row, gates_bias, slopes, sinks, scale, cap, window,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, REST: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr, TILE: tl.constexpr, TILE_HEADS: tl.constexpr, HEAD_TILES: tl.constexpr,
    KEYS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A program is a tile of queries and of heads that share a key head."""
    tile, lane = tl.program_id(0), tl.arange(0, TILE)
    head = tl.program_id(1) // HEAD_TILES
    within = (tl.program_id(1) % HEAD_TILES) * TILE_HEADS + lane % TILE_HEADS
    n_tokens, first_row = tl.load(tile_tokens + tile), tl.load(tile_rows + tile)
    known = (lane // TILE_HEADS < n_tokens) & (within < H // K)
    row, heads = (first_row + lane // TILE_HEADS).to(tl.int64), head * (H // K) + within
    position, first_position = tl.load(positions + row, mask=known, other=-1), tl.load(positions + first_row)
    stop = first_position + n_tokens
    table = tables + tl.load(tile_sequences + tile).to(tl.int64) * table_width
    if slopes is not None:
        slopes = tl.load(slopes + heads, mask=known, other=0.0)
    first, others = queries(q, row, heads, known, H, D, REST, BLOCK_D, BLOCK_REST)
    begin = first_position * 0
    if window is not None:
        begin = tl.maximum(first_position - window + 1, 0) // KEYS * KEYS
    most, total, mixed = nothing(TILE, BLOCK_D)
    for split in range(begin // SPLIT, tl.cdiv(stop, SPLIT)):
        m, t, x = over_split(
            first, others, table, keys, values, begin, split, stop, position, slopes, head, scale, cap, window,
            K, D, REST, KEYS, SPLIT,
        )  # fmt: skip
        most, total, mixed = joined(most, total, mixed, m, t, x)
    finish(most, total, mixed, sinks, out, gates, gates_row, gates_bias, row, heads, known, H, D)


@dataclass(frozen=True)
class Tiles:
    """Queries of a pass cut into tiles, each of tokens of one sequence; int32 on the device."""

    rows: Tensor
    """Each tile's first row."""
    tokens: Tensor
    sequences: Tensor


def attend_prompts(
    q: Tensor,
    keys: Tensor,
    values: Tensor | None,
    attend: Attend,
    tables: Tensor,
    positions: Tensor,
    tiles: Tiles,
    gates: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """Attention of the tokens of a pass to their own sequences, whose keys and values are all in the cache.

    Args:
        q: (N, H, key_dim), ready.
        keys: (blocks * 16, K, key_dim). values: (blocks * 16, K, value_dim); None: the keys' first numbers.
        tables: (S, most blocks) int32, the blocks of every sequence; -1 where no query sees one.
        positions: (N,) int32.
        gates: (N, H value_dim) of any stride between rows, and their bias, whose sigmoids multiply the result.

    Returns:
        (N, H, value_dim) in q's dtype; rows of no tile are not written.
    """
    out = torch.empty((len(q), attend.n_heads, attend.value_dim), dtype=q.dtype, device=q.device)
    gate, bias = gates or (None, None)
    launch(
        prompt_kernel, (len(tiles.rows), attend.n_kv_heads * attend.head_tiles),
        q, keys, values, tables, tables.stride(0), positions, tiles.rows, tiles.tokens, tiles.sequences, out,
        gate, 0 if gate is None else gate.stride(0), bias, *attend.arguments,
        warps=attend.warps, stages=attend.stages, **attend.constants,
    )  # fmt: skip
    return out
