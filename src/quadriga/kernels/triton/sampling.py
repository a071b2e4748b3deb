"""Tokens for rows of logits, without a sort, a program a row: what ``engine/sampler.py`` says, in the same order.

    logits -> copy with penalties, moves, -inf where nothing may be chosen -> weights e^((x - best) / T)
           -> the cut: the least weight that stays, and how many of that very weight -> one draw from what stays, by id

The cut is found bit by bit: weights are not negative, so their float32 bits rise as they do, and 31 counts (top-k) or
sums (top-p) of what is at least a candidate give the weight at which the k-th, or the mass p, is reached. Sums are
float64 in one order, and the draw is Philox4x64-10 of the seed and the position in the answer, the same numbers as on a
CPU: a token depends on its row, its settings, its seed and its position alone.

Not here, but on the CPU's kernels: typical-p and XTC.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadriga.kernels.triton.launch import launch


@triton.jit
def _bounded(x):
    """Within what float32 holds."""
    most: tl.constexpr = 3.4028234663852886e38
    return tl.minimum(tl.maximum(x, -most), most)


@triton.jit
def _log_sum(logits, n_tokens, BLOCK: tl.constexpr):
    """log(sum(exp)), float64; not finite where a logit is NaN or +inf."""
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, n_tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.load(logits + at, mask=at < n_tokens, other=float("-inf")))
    best = tl.max(most, axis=0)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n_tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < n_tokens, other=float("-inf"))
        total += tl.exp(x - best).to(tl.float64)
    return tl.log(tl.sum(total, axis=0)) + best.to(tl.float64)


@triton.jit
def _next_largest(x, n_tokens, value, token, BLOCK: tl.constexpr):
    """Of the numbers that come after (value, token), by value and then by the lower id, the first: (value, id)."""
    best, place = tl.full((), float("-inf"), tl.float32), token * 0 + n_tokens
    for start in range(0, n_tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        row = tl.load(x + at, mask=at < n_tokens, other=float("-inf"))
        after = (at < n_tokens) & ((row < value) | ((row == value) & (at > token)))
        most = tl.max(tl.where(after, row, float("-inf")), axis=0)
        first = tl.min(tl.where(after & (row == most), at, n_tokens), axis=0)
        better = (most > best) | ((most == best) & (first < place))
        best, place = tl.where(better, most, best), tl.where(better, first, place)
    return best, place


@triton.jit
def _forbid(x, ids, begin, end, saved, LIST: tl.constexpr):
    """-inf at some ids; what stood there goes to ``saved``, if given."""
    for start in range(begin, end, LIST):
        at = start + tl.arange(0, LIST)
        inside = at < end
        token = tl.load(ids + at, mask=inside, other=0)
        if saved is not None:
            tl.store(saved + at - begin, tl.load(x + token, mask=inside, other=0.0), mask=inside)
        tl.store(x + token, tl.full((LIST,), float("-inf"), tl.float32), mask=inside)
    tl.debug_barrier()


@triton.jit
def _restore(x, ids, begin, end, saved, LIST: tl.constexpr):
    """What :func:`_forbid` has saved."""
    for start in range(begin, end, LIST):
        at = start + tl.arange(0, LIST)
        token = tl.load(ids + at, mask=at < end, other=0)
        tl.store(x + token, tl.load(saved + at - begin, mask=at < end, other=0.0), mask=at < end)
    tl.debug_barrier()


@triton.jit
def _penalise(x, ids, counts, begin, end, repetition, presence, frequency, LIST: tl.constexpr):
    """Penalties of the tokens of prompt and answer; ``counts``: how often in the answer."""
    for start in range(begin, end, LIST):
        at = start + tl.arange(0, LIST)
        inside = at < end
        token = tl.load(ids + at, mask=inside, other=0)
        count = tl.load(counts + at, mask=inside, other=0)
        cell = tl.load(x + token, mask=inside, other=0.0)
        if repetition != 1.0:
            divisor = repetition.to(tl.float32)
            cell = _bounded(tl.where(cell > 0, cell / divisor, cell * divisor))
        penalty = (frequency * count.to(tl.float64) + presence).to(tl.float32)
        cell = tl.where(count > 0, _bounded(cell - penalty), cell)
        tl.store(x + token, cell, mask=inside)
    tl.debug_barrier()


@triton.jit
def _move(x, ids, amounts, begin, end, LIST: tl.constexpr):
    """Add to some logits."""
    for start in range(begin, end, LIST):
        at = start + tl.arange(0, LIST)
        token = tl.load(ids + at, mask=at < end, other=0)
        cell = tl.load(x + token, mask=at < end, other=0.0) + tl.load(amounts + at, mask=at < end, other=0.0)
        tl.store(x + token, _bounded(cell), mask=at < end)
    tl.debug_barrier()


@triton.jit
def _copy(logits, allowed, x, n_tokens, BLOCK: tl.constexpr):
    """Logits where ``allowed`` is not 0, -inf elsewhere; x may be logits."""
    for start in range(0, n_tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        row = tl.load(logits + at, mask=at < n_tokens, other=float("-inf"))
        if allowed is not None:
            row = tl.where(tl.load(allowed + at, mask=at < n_tokens, other=0) != 0, row, float("-inf"))
        tl.store(x + at, row, mask=at < n_tokens)
    tl.debug_barrier()


@triton.jit
def _weigh(x, n_tokens, best, inverse, BLOCK: tl.constexpr):
    """Logits become weights, in place."""
    for start in range(0, n_tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        row = tl.load(x + at, mask=at < n_tokens, other=float("-inf"))
        tl.store(x + at, tl.exp((row - best) * inverse), mask=at < n_tokens)
    tl.debug_barrier()


@triton.jit
def _at_least(weights, n_tokens, bits, BLOCK: tl.constexpr):
    """(how many weights are at least the float32 of these bits, their sum float64)."""
    count, total = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n_tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        w = tl.load(weights + at, mask=at < n_tokens, other=0.0)
        stays = (at < n_tokens) & (w.to(tl.int32, bitcast=True) >= bits)
        count += stays.to(tl.int32)
        total += tl.where(stays, w, 0.0).to(tl.float64)
    return tl.sum(count, axis=0), tl.sum(total, axis=0)


@triton.jit
def _cut_of_top_k(weights, n_tokens, top_k, BLOCK: tl.constexpr):
    """(bits of the k-th largest weight, how many of that very weight stay)."""
    bits = top_k * 0
    for i in range(31):
        candidate = bits | (1 << (30 - i))
        count, _ = _at_least(weights, n_tokens, candidate, BLOCK)
        bits = tl.where(count >= top_k, candidate, bits)
    above, _ = _at_least(weights, n_tokens, bits + 1, BLOCK)
    return bits, top_k - above


@triton.jit
def _cut_of_top_p(weights, n_tokens, least, n_equal, top_p, BLOCK: tl.constexpr):
    """The same where the largest weights, of those that stay, reach ``top_p`` of their sum."""
    _, above = _at_least(weights, n_tokens, least + 1, BLOCK)
    count, total = _at_least(weights, n_tokens, least, BLOCK)
    one = least.to(tl.float32, bitcast=True).to(tl.float64)
    total = tl.where(n_equal < count, above + one * n_equal.to(tl.float64), total)
    target = top_p * total
    bits = least
    if above >= target:  # reached before the least of those that stay
        bits = least * 0
        for i in range(31):
            candidate = bits | (1 << (30 - i))
            _, mass = _at_least(weights, n_tokens, candidate, BLOCK)
            bits = tl.where(mass >= target, candidate, bits)
        _, above = _at_least(weights, n_tokens, bits + 1, BLOCK)
        n_equal = n_equal * 0 + n_tokens
        one = bits.to(tl.float32, bitcast=True).to(tl.float64)
    taken = tl.ceil((target - above) / tl.where(one > 0, one, 1.0))
    return bits, tl.minimum(n_equal, tl.maximum(taken, 1.0).to(tl.int32))


@triton.jit
def _staying(weights, start, n_tokens, least, n_equal, n_before, BLOCK: tl.constexpr):
    """(the weights of a block, 0 where they do not stay; how many equal the least, up to and with this block)."""
    at = start + tl.arange(0, BLOCK)
    w = tl.load(weights + at, mask=at < n_tokens, other=0.0)
    bits = w.to(tl.int32, bitcast=True)
    equal = ((at < n_tokens) & (bits == least)).to(tl.int32)
    rank = n_before + tl.cumsum(equal, axis=0)
    stays = (bits > least) | ((equal > 0) & (rank <= n_equal))
    return tl.where(stays, w, 0.0).to(tl.float64), n_before + tl.sum(equal, axis=0)


@triton.jit
def _pick(weights, n_tokens, least, n_equal, uniform, BLOCK: tl.constexpr):
    """The token in whose part of the summed weights the place ``uniform``, in [0, 1), lies; one of weight 0 never."""
    total, n_before = uniform * 0.0, n_equal * 0
    for start in range(0, n_tokens, BLOCK):
        w, n_before = _staying(weights, start, n_tokens, least, n_equal, n_before, BLOCK)
        total += tl.sum(w, axis=0)
    place, before, n_before = uniform * total, uniform * 0.0, n_equal * 0
    token, last = n_equal * 0 + n_tokens, n_equal * 0 - 1
    for start in range(0, n_tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        w, n_before = _staying(weights, start, n_tokens, least, n_equal, n_before, BLOCK)
        ends = before + tl.cumsum(w, axis=0)
        token = tl.minimum(token, tl.min(tl.where((w > 0) & (ends > place), at, n_tokens), axis=0))
        last = tl.maximum(last, tl.max(tl.where(w > 0, at, -1), axis=0))
        before += tl.sum(w, axis=0)
    return tl.where(token < n_tokens, token, last)


@triton.jit
def uniform_of(seed, position):
    """The first of NumPy's Philox numbers of a key and a counter, in [0, 1) with 53 bits (Salmon et al. 2011)."""
    a, b = tl.full((), 0xD2E7470EE14C6C93, tl.uint64), tl.full((), 0xCA5A826395121157, tl.uint64)
    key, other_key = seed.to(tl.uint64), tl.full((), 0, tl.uint64)
    c0, c1 = position.to(tl.uint64) + 1, tl.full((), 0, tl.uint64)
    c2, c3 = tl.full((), 0, tl.uint64), tl.full((), 0, tl.uint64)
    for _ in range(10):
        high, low = tl.umulhi(c0, a), c0 * a
        other_high, other_low = tl.umulhi(c2, b), c2 * b
        c0, c1, c2, c3 = other_high ^ c1 ^ key, other_low, high ^ c3 ^ other_key, low
        key += tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
        other_key += tl.full((), 0xBB67AE8584CAA73B, tl.uint64)
    return (c0 >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _list_top(x, logits, n_tokens, n_top, out, BLOCK: tl.constexpr):
    """The most probable tokens and their logits, best first; -1 behind the last."""
    value, token = tl.full((), float("inf"), tl.float32), n_top * 0 - 1
    for i in range(n_top):
        value, token = _next_largest(x, n_tokens, value, token, BLOCK)
        there = value > float("-inf")
        tl.store(out + 2 * i, tl.where(there, token, -1).to(tl.float64))
        tl.store(out + 2 * i + 1, tl.load(logits + tl.where(there, token, 0)).to(tl.float64))


@triton.jit
def sample_kernel(
    logits, n_tokens, scratch, scratch_row, places, numbers, seeds, bounds, ids, amounts, counts, masks,
    out, out_row, BLOCK: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """A program is a row that is sampled: see :class:`Rows`."""
    row = tl.program_id(0).to(tl.int64)
    own = logits + tl.load(places + row).to(tl.int64) * n_tokens
    x = scratch + row * scratch_row
    saved = x + n_tokens
    inverse, top_p = tl.load(numbers + row * 6), tl.load(numbers + row * 6 + 1)
    bound = bounds + row * 8
    unused, early, said, moved = tl.load(bound), tl.load(bound + 1), tl.load(bound + 2), tl.load(bound + 3)
    end, top_k, n_top, mask = tl.load(bound + 4), tl.load(bound + 5), tl.load(bound + 6), tl.load(bound + 7)
    log_sum = _log_sum(own, n_tokens, BLOCK)
    made = out + row * out_row
    tl.store(made, tl.full((), -1.0, tl.float64))
    tl.store(made + 1, log_sum)
    tl.store(made + 2, tl.full((), 0.0, tl.float64))
    if (log_sum != log_sum) | (tl.abs(log_sum) == float("inf")):
        for i in range(n_top):
            tl.store(made + 3 + 2 * i, tl.full((), -1.0, tl.float64))
        return
    _copy(own, None, x, n_tokens, BLOCK)
    _forbid(x, ids, unused, early, None, LIST)
    _list_top(x, own, n_tokens, n_top, made + 3, BLOCK)
    _penalise(
        x, ids, counts, said, moved, tl.load(numbers + row * 6 + 3), tl.load(numbers + row * 6 + 4),
        tl.load(numbers + row * 6 + 5), LIST,
    )  # fmt: skip
    _move(x, ids, amounts, moved, end, LIST)
    if mask >= 0:
        _copy(x, masks + mask.to(tl.int64) * n_tokens, x, n_tokens, BLOCK)
    _forbid(x, ids, unused, early, None, LIST)
    _forbid(x, ids, early, said, saved, LIST)
    none, above = n_top * 0 - 1, tl.full((), float("inf"), tl.float32)
    best, token = _next_largest(x, n_tokens, above, none, BLOCK)
    if (best == float("-inf")) & (mask >= 0):  # only what ends the answer is allowed: it ends, however short it is
        _restore(x, ids, early, said, saved, LIST)
        best, token = _next_largest(x, n_tokens, above, none, BLOCK)
    if best == float("-inf"):
        return
    if inverse > 0:
        _weigh(x, n_tokens, best, inverse.to(tl.float32), BLOCK)
        least, n_equal = top_k * 0, top_k * 0
        if (top_k > 0) & (top_k < n_tokens):
            least, n_equal = _cut_of_top_k(x, n_tokens, top_k, BLOCK)
        if top_p < 1.0:
            least, n_equal = _cut_of_top_p(x, n_tokens, least, n_equal, top_p, BLOCK)
        enough = tl.load(numbers + row * 6 + 2).to(tl.float32).to(tl.int32, bitcast=True)
        if enough > least:
            least, n_equal = enough, n_equal * 0 + n_tokens
        position = tl.load(seeds + row * 2 + 1)
        token = _pick(x, n_tokens, least, n_equal, uniform_of(tl.load(seeds + row * 2), position), BLOCK)
    tl.store(made, token.to(tl.float64))
    tl.store(made + 2, tl.load(own + token).to(tl.float64))


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How the rows of a pass become tokens; tensors on the device, of R rows that are sampled."""

    places: Tensor
    """(R,) int32: which row of the logits each one is."""
    numbers: Tensor
    """(R, 6) float64: 1 / temperature (0: greedy), top-p, min-p; repetition, presence and frequency penalty."""
    seeds: Tensor
    """(R, 2) int64: seed, position in the answer."""
    bounds: Tensor
    """(R, 8) int32: where in ``ids`` the unused ids begin, those that are too early, those said, those moved, and
    where they end; top-k (0: all), how many of the most probable are listed, the row of ``masks`` (-1: none)."""
    ids: Tensor
    """(L,) int32; amounts (L,) float32 of those that are moved, counts (L,) int32 of those said in the answer."""
    amounts: Tensor
    counts: Tensor
    masks: Tensor
    """(M, V) uint8, 0 where a token may not be chosen."""
    most_top: int
    """The largest number that any row lists."""
    most_early: int
    """The largest number of ids that are too early."""


_BLOCK, _LIST = 4096, 256


def sample(logits: Tensor, rows: Rows) -> Tensor:
    """Choose a token for each of some rows of logits (N, V) float32.

    Returns:
        (R, 3 + 2 * most_top) float64, in one piece so that the host fetches it at once: the token (-1: none may be
        chosen, or the logits are not finite), log(sum(exp(logits))), the token's own logit; then the most probable
        tokens and their logits, best first, as many as the row asks for (-1: there are no more).
    """
    n, v = len(rows.places), logits.shape[1]
    scratch = torch.empty((n, v + rows.most_early), dtype=torch.float32, device=logits.device)
    out = torch.empty((n, 3 + 2 * rows.most_top), dtype=torch.float64, device=logits.device)
    launch(
        sample_kernel, (n,), logits, v, scratch, scratch.stride(0), rows.places, rows.numbers, rows.seeds, rows.bounds,
        rows.ids, rows.amounts, rows.counts, rows.masks, out, out.stride(0),
        warps=8, BLOCK=min(_BLOCK, triton.next_power_of_2(v)), LIST=_LIST,
    )  # fmt: skip
    return out
