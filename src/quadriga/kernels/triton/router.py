"""Router and sort: which experts every token meets, and where its rows lie once they are sorted by expert.

    choose   logits = x W^T (+ bias) -> scores -> the k best -> weights                          BLOCK tokens a program
    place    a token's rank among those of its expert -> home (N, k), order (N k,), starts (E + 1,)

A token meets an expert once at most, so a slot's rank within its expert is the number of earlier tokens that chose
the same one: a running sum down the (tokens, experts) matrix of ones and zeros, the same as a stable sort by expert. A
batch of one block places itself in the launch that chose; larger ones take a second.

Experts lie in columns padded group by group, so that groups are an axis and padding never wins; a column's order is its
expert's order, and of equal ones the lowest wins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadriga.kernels import reference
from quadriga.kernels.ops import Choice, Routing
from quadriga.kernels.triton.arithmetic import product, sigmoid
from quadriga.kernels.triton.launch import launch

BLOCK = 16
"""Tokens a program; whatever the batch, so that a token's logits do not depend on it."""


@dataclass(frozen=True)
class Places:
    """Slots (token, choice) sorted by expert, stably."""

    home: Tensor
    """(N, k) int32, each slot's row."""
    order: Tensor
    """(N k,) int32, each row's slot: token * k + choice."""
    starts: Tensor
    """(E + 1,) int32, the first row of each expert, and the number of rows."""


@triton.jit
def _expert_of(column, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The expert of a column, whose group has WIDTH experts in PADDED columns."""
    return column // PADDED * WIDTH + column % PADDED


@triton.jit
def _best(values, columns, COLUMNS: tl.constexpr):
    """(T,) the column of each row's greatest value, the lowest of equal ones."""
    greatest = tl.max(values, axis=1)[:, None]
    return tl.min(tl.where(values == greatest, columns, COLUMNS), axis=1)


@triton.jit
def _open_groups(by, GROUPS: tl.constexpr, PADDED: tl.constexpr, OPEN: tl.constexpr, TWO: tl.constexpr):
    """by (T, GROUPS PADDED), with -infinity in all groups but the OPEN best ones."""
    TOKENS: tl.constexpr = by.shape[0]
    grouped = tl.reshape(by, (TOKENS, GROUPS, PADDED))
    worth = tl.max(grouped, axis=2)
    if TWO:
        within = tl.arange(0, PADDED)[None, None, :]
        first = tl.min(tl.where(grouped == worth[:, :, None], within, PADDED), axis=2)
        worth += tl.max(tl.where(within == first[:, :, None], -float("inf"), grouped), axis=2)
    group = tl.arange(0, GROUPS)[None, :]
    is_open = tl.zeros((TOKENS, GROUPS), dtype=tl.int32)
    for _ in tl.static_range(OPEN):
        best = _best(worth, group, GROUPS)
        hit = group == best[:, None]
        is_open = tl.where(hit, 1, is_open)
        worth = tl.where(hit, -float("inf"), worth)
    return tl.reshape(tl.where(is_open[:, :, None] != 0, grouped, -float("inf")), (TOKENS, GROUPS * PADDED))


@triton.jit
def _normalised(chosen, P: tl.constexpr, EPS: tl.constexpr, LEAST: tl.constexpr):
    """chosen (T, k) over its p-norm; what pads it is 0."""
    size = tl.abs(chosen)
    if P == 1.0:
        norm = tl.sum(size, axis=1)
    elif P == 2.0:
        norm = tl.sqrt(tl.sum(size * size, axis=1))
    else:
        power = tl.where(size > 0, tl.exp2(P * tl.log2(tl.where(size > 0, size, 1.0))), 0.0)
        norm = tl.exp2(tl.log2(tl.sum(power, axis=1)) / P)
    if EPS > 0.0 or LEAST > 0.0:
        norm = tl.maximum(norm + EPS, LEAST)
    return chosen / norm[:, None]


@triton.jit
def _softmax(values, is_expert):
    """Of the columns that are experts; 0 in the others."""
    shifted = tl.where(is_expert, values, -float("inf"))
    powers = tl.exp(shifted - tl.max(shifted, axis=1)[:, None])
    return powers / tl.sum(powers, axis=1)[:, None]


@triton.jit
def _logits(x, weight, bias, token, is_token, expert, is_expert, width, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """(T, COLUMNS) float32: x W^T (+ bias)."""
    total = tl.zeros((token.shape[0], COLUMNS), dtype=tl.float32)
    for first in range(0, width, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        inside = depth < width
        a = tl.load(x + token[:, None].to(tl.int64) * width + depth[None, :], is_token[:, None] & inside[None, :], 0.0)
        b = tl.load(weight + expert[None, :] * width + depth[:, None], is_expert[None, :] & inside[:, None], 0.0)
        total = product(a.to(tl.float32), b.to(tl.float32), total)
    if bias is not None:
        total += tl.load(bias + expert, is_expert, 0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def _choose(
    by, z, scores, ids, token, is_token, columns, valid, NEAR: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    SCORE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The TOP_K greatest of ``by`` (T, COLUMNS), whose ids are stored: (worth (T, SLOTS), ones there (T, COLUMNS))."""
    TOKENS: tl.constexpr = by.shape[0]
    COLUMNS: tl.constexpr = by.shape[1]
    slot = tl.arange(0, SLOTS)[None, :]
    chosen = tl.zeros((TOKENS, SLOTS), dtype=tl.float32)
    met = tl.zeros((TOKENS, COLUMNS), dtype=tl.int32)
    left = by
    for j in tl.static_range(TOP_K):
        best = _best(left, columns, COLUMNS)
        hit = columns == best[:, None]
        tl.store(ids + token.to(tl.int64) * TOP_K + j, _expert_of(best, WIDTH, PADDED), is_token)
        if SCORE == "sparse_mixer":
            top = tl.max(left, axis=1)[:, None]
            far = (top - z) > NEAR * tl.maximum(tl.abs(z), top)
            worth = tl.sum(tl.where(hit, _softmax(tl.where(far, -float("inf"), left), valid), 0.0), axis=1)
        else:
            worth = tl.sum(tl.where(hit, scores, 0.0), axis=1)
        chosen = tl.where(slot == j, worth[:, None], chosen)
        met = tl.where(hit & is_token[:, None], 1, met)
        left = tl.where(hit, -float("inf"), left)
    return chosen, met


@triton.jit
def choose_kernel(
    x, weight, bias, correction, ids, weights, probs, logits_out, counts, home, order, starts, n_tokens, width,
    n_experts,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, SCORE: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr,
    LEAST: tl.constexpr, SCALE: tl.constexpr, NEAR: tl.constexpr, N_GROUPS: tl.constexpr, GROUPS: tl.constexpr,
    OPEN: tl.constexpr, TWO: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """A program is TOKENS tokens: x (N, D), weight (E, D), bias and correction (E,) -> what ``Routing`` says.

    GROUPS x PADDED columns hold N_GROUPS x WIDTH experts. ``counts`` (programs, E): how many of its tokens chose each
    expert; where it is None, this is the only program and ``home``, ``order`` and ``starts`` are written at once.
    """
    COLUMNS: tl.constexpr = GROUPS * PADDED
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < n_tokens
    column = tl.arange(0, COLUMNS)
    is_expert = (column % PADDED < WIDTH) & (column // PADDED < N_GROUPS)
    expert = _expert_of(column, WIDTH, PADDED)
    columns, valid = column[None, :], is_expert[None, :]
    z = _logits(x, weight, bias, token, is_token, expert, is_expert, width, COLUMNS, DEPTH)
    scores = tl.where(valid, sigmoid(z), 0.0) if SCORE == "sigmoid" else _softmax(z, valid)
    shares = scores / tl.sum(scores, axis=1)[:, None] if SCORE == "sigmoid" else scores
    cell = token[:, None].to(tl.int64) * n_experts + expert[None, :]
    tl.store(logits_out + cell, z, is_token[:, None] & valid)
    tl.store(probs + cell, shares, is_token[:, None] & valid)
    by = z if SCORE == "sparse_mixer" else scores
    if correction is not None:
        by += tl.load(correction + expert, is_expert, 0.0).to(tl.float32)[None, :]
    by = tl.where(valid, by, -float("inf"))
    if N_GROUPS > 1:
        by = _open_groups(by, GROUPS, PADDED, OPEN, TWO)
    chosen, met = _choose(
        by, z, scores, ids, token, is_token, columns, valid, NEAR, TOP_K, SLOTS, SCORE, WIDTH, PADDED
    )  # fmt: skip
    if SCORE != "sparse_mixer":
        if P is not None:
            chosen = _normalised(chosen, P, EPS, LEAST)
        chosen = chosen * SCALE
    slot = tl.arange(0, SLOTS)[None, :]
    tl.store(weights + token[:, None].to(tl.int64) * TOP_K + slot, chosen, is_token[:, None] & (slot < TOP_K))
    taken = tl.sum(met, axis=0)
    if counts is not None:
        tl.store(counts + tl.program_id(0) * n_experts + expert, taken, is_expert)
    else:
        first = tl.cumsum(taken, axis=0) - taken
        _write_places(met, first, ids, home, order, token, is_token, columns, TOP_K, WIDTH, PADDED)
        tl.store(starts + expert, first, is_expert)
        tl.store(starts + n_experts, tl.sum(taken, axis=0))


@triton.jit
def _write_places(
    met, first, ids, home, order, token, is_token, columns,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """home and order of a block's tokens: met (T, COLUMNS) ones and zeros, first (COLUMNS,) the block's first rows."""
    row = first[None, :] + tl.cumsum(met, axis=0) - met
    tl.debug_barrier()  # the ids were stored by this program's other threads
    for j in tl.static_range(TOP_K):
        slot = token * TOP_K + j
        expert = tl.load(ids + slot, is_token, 0).to(tl.int32)
        hit = columns == (expert // WIDTH * PADDED + expert % WIDTH)[:, None]
        place = tl.sum(tl.where(hit, row, 0), axis=1)
        tl.store(home + slot, place, is_token)
        tl.store(order + place, slot, is_token)


@triton.jit
def _met(ids, token, is_token, expert, TOP_K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """(T, COLUMNS) ones where a token chose an expert, else zeros."""
    met = tl.zeros((TOKENS, COLUMNS), dtype=tl.int32)
    for j in tl.static_range(TOP_K):
        chosen = tl.load(ids + token * TOP_K + j, is_token, -1).to(tl.int32)
        met = tl.where(expert[None, :] == chosen[:, None], 1, met)
    return met


@triton.jit
def count_kernel(
    ids, counts, n_tokens, n_experts, TOP_K: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """counts (programs, E): how many of a block's tokens chose each expert."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, COLUMNS)
    met = _met(ids, token, token < n_tokens, expert, TOP_K, TOKENS, COLUMNS)
    tl.store(counts + tl.program_id(0) * n_experts + expert, tl.sum(met, axis=0), expert < n_experts)


@triton.jit
def place_kernel(
    ids, counts, home, order, starts, n_tokens, n_experts, n_blocks,
    TOP_K: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A program is one block of :func:`choose_kernel`; all of them read the counts of all blocks (n_blocks, E)."""
    mine = tl.program_id(0)
    expert = tl.arange(0, COLUMNS)
    is_expert = expert < n_experts
    before = tl.zeros((COLUMNS,), dtype=tl.int32)
    total = tl.zeros((COLUMNS,), dtype=tl.int32)
    for first_block in range(0, n_blocks, CHUNK):
        block = first_block + tl.arange(0, CHUNK)
        some = tl.load(
            counts + block[:, None] * n_experts + expert[None, :], (block < n_blocks)[:, None] & is_expert[None, :], 0
        )
        total += tl.sum(some, axis=0)
        before += tl.sum(tl.where((block < mine)[:, None], some, 0), axis=0)
    first = tl.cumsum(total, axis=0) - total
    token = mine * TOKENS + tl.arange(0, TOKENS)
    is_token = token < n_tokens
    met = _met(ids, token, is_token, expert, TOP_K, TOKENS, COLUMNS)
    _write_places(met, first + before, ids, home, order, token, is_token, expert[None, :], TOP_K, COLUMNS, COLUMNS)
    if mine == 0:
        tl.store(starts + expert, first, is_expert)
        tl.store(starts + n_experts, tl.sum(total, axis=0))


def route_and_place(
    x: Tensor, weight: Tensor, how: Choice, bias: Tensor | None = None, correction: Tensor | None = None
) -> tuple[Routing, Places]:
    """``ops.route``, and the sort of what it chose: one launch for up to BLOCK tokens, two for more.

    Args:
        x: (N, D). weight: (E, D). bias, correction: (E,). Any float dtype; sums are float32.

    Returns:
        (routing, places).
    """
    assert how.score != "sparse_mixer" or correction is None, "a sparse mixer chooses by its logits alone"
    n_tokens, width = x.shape
    n_experts, top_k = len(weight), how.top_k
    routing = Routing(
        torch.empty(n_tokens, top_k, dtype=torch.int64, device=x.device),
        *(torch.empty(n_tokens, columns, device=x.device) for columns in (top_k, n_experts, n_experts)),
    )
    places, n_blocks = _unplaced(n_tokens, top_k, n_experts, x.device), triton.cdiv(n_tokens, BLOCK)
    counts = None if n_blocks <= 1 else torch.empty(n_blocks, n_experts, dtype=torch.int32, device=x.device)
    group_width, groups = n_experts // how.n_groups, triton.next_power_of_2(how.n_groups)
    padded = max(triton.next_power_of_2(group_width), 16 // groups)
    many = groups * padded >= 128
    launch(
        choose_kernel, (n_blocks,),
        x.contiguous(), weight, bias, correction, *routing, counts, places.home, places.order, places.starts,
        n_tokens, width, n_experts,
        TOP_K=top_k, SLOTS=triton.next_power_of_2(top_k), SCORE=how.score, P=how.normalize_p, EPS=how.normalize_eps,
        LEAST=how.normalize_min, SCALE=how.scale, NEAR=how.near, N_GROUPS=how.n_groups,
        GROUPS=groups, OPEN=how.top_k_groups, TWO=how.group_worth == "two_best", WIDTH=group_width, PADDED=padded,
        TOKENS=BLOCK, DEPTH=16 if many else 64, warps=8 if many else 4,
    )  # fmt: skip
    if counts is not None:
        _place(routing.expert_ids, counts, places)
    return routing, places


def place(ids: Tensor, n_experts: int) -> Places:
    """The sort alone: ids (N, k), no expert twice in a row of them."""
    n_tokens, top_k = ids.shape
    n_blocks = triton.cdiv(n_tokens, BLOCK)
    places = _unplaced(n_tokens, top_k, n_experts, ids.device)
    counts = torch.empty(n_blocks, n_experts, dtype=torch.int32, device=ids.device)
    columns = triton.next_power_of_2(n_experts)
    launch(
        count_kernel, (n_blocks,), ids, counts, n_tokens, n_experts, TOP_K=top_k, COLUMNS=columns, TOKENS=BLOCK
    )  # fmt: skip
    _place(ids, counts, places)
    return places


def _unplaced(n_tokens: int, top_k: int, n_experts: int, device: torch.device) -> Places:
    """Memory for places; without tokens no kernel runs, and it says so by zeros."""
    new = torch.empty if n_tokens else torch.zeros
    shapes: tuple[tuple[int, ...], ...] = (n_tokens, top_k), (n_tokens * top_k,), (n_experts + 1,)
    return Places(*(new(shape, dtype=torch.int32, device=device) for shape in shapes))


def _place(ids: Tensor, counts: Tensor, places: Places) -> None:
    """Fill ``places`` from the ids and every block's counts."""
    n_blocks, n_experts = counts.shape
    n_tokens, top_k = ids.shape
    launch(
        place_kernel, (n_blocks,),
        ids, counts, places.home, places.order, places.starts, n_tokens, n_experts, n_blocks,
        TOP_K=top_k, COLUMNS=triton.next_power_of_2(n_experts), TOKENS=BLOCK, CHUNK=16,
    )  # fmt: skip


def route(
    x: Tensor, weight: Tensor, how: Choice, bias: Tensor | None = None, correction: Tensor | None = None
) -> Routing:
    """``ops.route``; the reference where tokens have biases or corrections of their own, as few requests do."""
    if any(one is not None and one.ndim > 1 for one in (bias, correction)):
        return reference.route(x, weight, how, bias, correction)
    return route_and_place(x, weight, how, bias, correction)[0]
