"""The search for scales of blocks whose sub-blocks have small integer scales of their own.

Both kinds minimise the weighted squared error  sum of weight * (x - stored)^2  of a block of 256:

    symmetric   stored = d s_j v      v of a list of values (or consecutive integers), s_j a whole number per sub-block
    affine      stored = d s_j q - m t_j       q = 0 .. most, s_j and t_j whole numbers per sub-block

First every sub-block by itself: several steps are tried, and for the numbers each of them gives, the best scale (and
minimum) is the least squares solution. Then the scales become whole numbers under d (and m), d (and m) are solved for
again given all numbers, and every sub-block tries the whole numbers next to its own. Arrays are (blocks, sub-blocks,
elements), float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from quadriga.quant.stored_half import inverse, rounded

Floats = NDArray[np.float32]

_ROUNDS = 2
"""Times that d is solved for again and the scales move; a third would lower the error by 0.3 % (q2_k) at most."""


@dataclass(frozen=True)
class Levels:
    """The values that a stored number can have, in ascending order."""

    values: NDArray[np.int8]

    @cached_property
    def of_halves(self) -> NDArray[np.uint8]:
        """For every half from -128 to 127.5, and what lies between it and the next, the index of the nearest value."""
        values = self.values.astype(np.float32)
        return np.searchsorted((values[1:] + values[:-1]) / 2, np.arange(-256, 256) / 2, side="right").astype(np.uint8)

    @property
    def are_consecutive(self) -> bool:
        """True for whole numbers without a gap."""
        return len(self.values) == int(self.values[-1]) - int(self.values[0]) + 1

    def nearest(self, x: Floats) -> Floats:
        """The value nearest to each number."""
        low, high = np.float32(self.values[0]), np.float32(self.values[-1])
        if self.are_consecutive:
            return np.clip(np.rint(x), low, high)
        found: Floats = self.values.astype(np.float32)[self.index(x)]
        return found

    def index(self, x: Floats) -> NDArray[np.uint8]:
        """Which value is nearest to each number."""
        # Midpoints of whole numbers are multiples of a half: a table of halves is faster than a search, and exact.
        found: NDArray[np.uint8] = self.of_halves[np.clip(np.floor(2 * x), -256, 255).astype(np.int16) + 256]
        return found


def _sum(values: Floats) -> Floats:
    summed: Floats = values.sum(axis=-1, keepdims=True, dtype=np.float32)
    return summed


@dataclass(frozen=True)
class Symmetric:
    """What a symmetric block is stored as."""

    d: Floats
    """(blocks, 1)"""
    scales: Floats
    """(blocks, sub-blocks), whole numbers."""
    values: Floats
    """(blocks, sub-blocks, elements), of the levels."""


def symmetric(x: Floats, weight: Floats, levels: Levels, least: int, most: int) -> Symmetric:
    """Find d, scales from ``least`` to ``most`` (|least| > most) and values.

    Args:
        x: (blocks, sub-blocks, elements).
        weight: what an element's squared error counts, of a shape that broadcasts to x's.
        levels: the values.
    """
    free = _free_scales(x, weight, levels)  # (blocks, sub-blocks, 1)
    extreme = np.take_along_axis(free, np.abs(free).argmax(axis=1, keepdims=True), axis=1)
    d = first = rounded(extreme / np.float32(least))
    scales = np.clip(np.rint(free * inverse(d)), least, most)
    values = levels.nearest(x * inverse(d * scales))
    for _ in range(_ROUNDS):
        product = scales * values
        d = rounded(
            (weight * x * product).sum(axis=(1, 2), keepdims=True)
            * inverse((weight * product**2).sum(axis=(1, 2), keepdims=True))
        )
        best = np.full(scales.shape, np.inf, dtype=np.float32)
        start = scales
        for step in (0, -1, 1):
            tried = np.clip(start + np.float32(step), least, most)
            v = levels.nearest(x * inverse(d * tried))
            error = _sum(weight * (x - d * tried * v) ** 2)
            better = error < best
            best = np.where(better, error, best)
            scales, values = np.where(better, tried, scales), np.where(better, v, values)
    d = np.where(np.isfinite(first), d, first)  # beyond float16: for whoever stores it to refuse, not zeros
    return Symmetric(d[:, 0], scales[..., 0], values)


def _free_scales(x: Floats, weight: Floats, levels: Levels) -> Floats:
    """The best scale of every sub-block by itself, (blocks, sub-blocks, 1)."""
    top = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
    unit = inverse(top)
    best, scale = np.full(top.shape, -1, dtype=np.float32), np.zeros_like(top)
    for end in (float(levels.values[0]), float(levels.values[-1])):
        for part in (1.06, 1.0, 0.94, 0.88, 0.82, 0.75):
            v = levels.nearest(x * (unit * np.float32(end * part)))
            product, square = _sum(weight * x * v), _sum(weight * v * v)
            found = product * inverse(square)
            score = found * product  # the error falls by exactly this much
            better = score > best
            best, scale = np.where(better, score, best), np.where(better, found, scale)
    return scale


@dataclass(frozen=True)
class Affine:
    """What an affine block is stored as."""

    d: Floats
    m: Floats
    """(blocks, 1) both"""
    scales: Floats
    minima: Floats
    """(blocks, sub-blocks) both, whole numbers."""
    q: Floats
    """(blocks, sub-blocks, elements), 0 .. most."""


def affine(x: Floats, weight: Floats, most: int, most_scale: int) -> Affine:
    """Find d, m, scales and minima from 0 to ``most_scale``, and numbers from 0 to ``most``; see :func:`symmetric`."""
    free, low = _free_lines(x, weight, most)  # (blocks, sub-blocks, 1): stored = free * q - low
    d, m = (rounded(part.max(axis=1, keepdims=True) / np.float32(most_scale)) for part in (free, low))
    scales, minima = (np.clip(np.rint(part * inverse(unit)), 0, most_scale) for part, unit in ((free, d), (low, m)))
    q = np.clip(np.rint((x + m * minima) * inverse(d * scales)), 0, most)
    for _ in range(_ROUNDS):
        d, m = _units(x, weight, scales * q, np.broadcast_to(minima, q.shape), d, m)
        best = np.full(scales.shape, np.inf, dtype=np.float32)
        start = scales, minima
        for step, shift in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (1, 1), (-1, -1)):
            s, t = (
                np.clip(part + np.float32(by), 0, most_scale) for part, by in zip(start, (step, shift), strict=True)
            )
            tried = np.clip(np.rint((x + m * t) * inverse(d * s)), 0, most)
            error = _sum(weight * (x - (d * s * tried - m * t)) ** 2)
            better = error < best
            best = np.where(better, error, best)
            scales, minima, q = np.where(better, s, scales), np.where(better, t, minima), np.where(better, tried, q)
    return Affine(d[:, 0], m[:, 0], scales[..., 0], minima[..., 0], q)


def _units(x: Floats, weight: Floats, a: Floats, b: Floats, d: Floats, m: Floats) -> tuple[Floats, Floats]:
    """Least squares of x = d a - m b over whole blocks, as float16 stores them; where there is none, d and m stay."""

    def total(values: Floats) -> Floats:
        summed: Floats = (weight * values).sum(axis=(1, 2), keepdims=True, dtype=np.float32)
        return summed

    aa, bb, ab, xa, xb = total(a * a), total(b * b), total(a * b), total(x * a), total(x * b)
    by = inverse(aa * bb - ab * ab)
    found_d, found_m = (xa * bb - xb * ab) * by, (xa * ab - xb * aa) * by
    good = (found_d > 0) & (found_m >= 0)
    alone = xa * inverse(aa)  # where no sub-block has a minimum
    none = (bb == 0) & (alone > 0)
    d = np.where(good, found_d, np.where(none, alone, d))
    return rounded(d), rounded(np.where(good, found_m, m))


def _free_lines(x: Floats, weight: Floats, most: int) -> tuple[Floats, Floats]:
    """The best scale and minimum of every sub-block by itself, both at least 0."""
    weight = np.broadcast_to(weight, x.shape)
    low = np.minimum(x.min(axis=-1, keepdims=True), 0)
    width = x.max(axis=-1, keepdims=True) - low
    unit, ones, xs = inverse(width), _sum(weight), _sum(weight * x)
    best = np.full(low.shape, np.inf, dtype=np.float32)
    scale, minimum = width / np.float32(most), -low
    for part in np.linspace(-1.0, 0.8, 10) * (0.25 + most / 20):
        q = np.clip(np.rint((x - low) * (unit * np.float32(most + part))), 0, most)
        q1, q2, xq = _sum(weight * q), _sum(weight * q * q), _sum(weight * x * q)
        by = inverse(ones * q2 - q1 * q1)
        s, offset = (ones * xq - xs * q1) * by, (q2 * xs - q1 * xq) * by
        above = offset > 0  # a minimum below 0 cannot be stored
        s, offset = np.where(above, xq * inverse(q2), s), np.where(above, 0, offset)
        error = _sum(weight * (x - s * q - offset) ** 2)
        better = (error < best) & (s > 0)
        best = np.where(better, error, best)
        scale, minimum = np.where(better, s, scale), np.where(better, -offset, minimum)
    return scale, minimum


@dataclass(frozen=True)
class Search:
    """Both searches by one kind of program: :data:`NUMPY`'s, or ``kernels.cpu.searching``'s."""

    symmetric: Callable[[Floats, Floats, Levels, int, int], Symmetric]
    affine: Callable[[Floats, Floats, int, int], Affine]


NUMPY = Search(symmetric, affine)
