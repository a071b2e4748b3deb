"""Rounding whose errors the columns behind make up for: GPTQ (Frantar et al. 2022, arXiv 2210.17323) for all blocks.

What counts is what the rounding does to a matrix's outputs, E |(W - V) x|^2, which needs the second moments of its
inputs H = E x x^T; the importance of columns is their diagonal alone. With H^-1 = U^T U (U upper triangular), columns
are rounded in order, and each one's error, divided by U[c, c], is taken from those behind it as row c of U says:

    e_c = (w_c - v_c) / U[c, c]        w_j -= e_c U[c, j]    for all j > c             so that  W - V = e U

A block's scales are searched for when its turn comes, on what its columns are by then, with 1 / U[c, c]^2 as the weight
of an error: that is what it costs after all columns behind have made up for it. :class:`Feedback` is a ``Search`` that
rounds the columns of a block in turn; the blocks behind it take the rest of the error from :func:`carry`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadriga.quant.search import Affine, Floats, Levels, Search, Symmetric
from quadriga.quant.stored_half import inverse

_DAMPING = 0.01
"""Added to the diagonal of H, of its mean."""
_DOUBT = 0.05
"""The same, times columns over rows: few tokens span few directions, and errors in the others are not free."""

_FREE = np.float32(1e3)
"""U's diagonal where errors do not matter; the others' is near 1."""

_RUN = 32
"""Columns after which a block's others are brought up to date: fewer, longer products."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What is kept of the second moments of a matrix's inputs."""

    diagonal: Floats
    """(columns,) mean squares."""
    upper: Floats
    """U of the module's docstring, (columns, columns), of H over the mean of its diagonal."""

    @classmethod
    def of(cls, moments: Floats, count: int) -> Moments:
        """Of H (columns, columns), symmetric, the mean over ``count`` rows; columns that met nothing count a little."""
        diagonal = np.diag(moments).astype(np.float32)
        mean = float(diagonal.mean())
        if not np.isfinite(mean) or mean <= 0:
            return cls(diagonal, np.eye(len(diagonal), dtype=np.float32))
        damping = _DAMPING + _DOUBT * len(diagonal) / max(count, 1)
        damped = moments.astype(np.float64) / mean + damping * np.eye(len(diagonal))
        # With J the reversal and J H J = C C^T: H^-1 = U^T U for U = (J C J)^-1.
        lower = np.linalg.cholesky(damped[::-1, ::-1])
        upper = np.triu(np.linalg.inv(lower)[::-1, ::-1])
        return cls(diagonal, np.ascontiguousarray(upper, dtype=np.float32))

    def reordered(self, order: NDArray[np.intp]) -> Moments:
        """Of the same columns in another order: column ``order[i]`` comes i-th."""
        wide = self.upper.astype(np.float64)
        turned = (wide.T @ wide)[np.ix_(order, order)]
        upper = np.linalg.cholesky(turned).T
        return Moments(self.diagonal[order], np.ascontiguousarray(upper, dtype=np.float32))

    def padded(self, columns: int) -> Moments:
        """With columns behind whose errors do not matter."""
        more = columns - len(self.diagonal)
        if not more:
            return self
        upper = np.pad(self.upper, (0, more))
        upper[np.arange(columns - more, columns), np.arange(columns - more, columns)] = _FREE
        return Moments(np.pad(self.diagonal, (0, more)), upper)


Importance = NDArray[Any] | Moments
"""How much errors count: a weight for every column's square, or all that is needed for feedback."""


def columns_of(importance: Importance | None) -> NDArray[Any] | None:
    """The weights of columns alone."""
    return importance.diagonal if isinstance(importance, Moments) else importance


def carry(values: Floats, stored: Floats, upper: Floats, rest: Floats, onto: Floats) -> None:
    """Take the errors of finished columns from those behind them, in place.

    Args:
        values: (rows, n) what the finished columns were when their block's turn came.
        stored: (rows, n) what they became.
        upper: (n, n) their part of U, and ``rest`` (n, m) its rows' parts behind.
        onto: (rows, m) the columns behind; changed.
    """
    errors = np.linalg.solve(upper.T.astype(np.float64), (values - stored).T.astype(np.float64)).T
    onto -= errors.astype(np.float32) @ rest


class Feedback:
    """A ``Search`` for one block of columns whose errors the block's own later columns make up for.

    Args:
        inner: who looks for scales.
        upper: (columns of a block, the same), the block's part of U.
    """

    def __init__(self, inner: Search, upper: Floats) -> None:
        self._inner, self._upper = inner, upper

    def search(self) -> Search:
        """This one, as quantisers take it."""
        return Search(self._symmetric, self._affine)

    def _symmetric(self, x: Floats, weight: Floats, levels: Levels, least: int, most: int) -> Symmetric:
        found = self._inner.symmetric(x, weight, levels, least, most)
        step = found.d * found.scales  # (blocks, sub-blocks)
        unit = inverse(step)
        numbers = self._rounded(x, lambda j, w: levels.nearest(w * unit[:, j]), lambda j, v: step[:, j] * v)
        return Symmetric(found.d, found.scales, numbers)

    def _affine(self, x: Floats, weight: Floats, most: int, most_scale: int) -> Affine:
        found = self._inner.affine(x, weight, most, most_scale)
        step, low = found.d * found.scales, found.m * found.minima
        unit = inverse(step)
        numbers = self._rounded(
            x,
            lambda j, w: np.clip(np.rint((w + low[:, j]) * unit[:, j]), 0, most),
            lambda j, q: step[:, j] * q - low[:, j],
        )
        return Affine(found.d, found.m, found.scales, found.minima, numbers)

    def _rounded(
        self, x: Floats, nearest: Callable[[int, Floats], Floats], value: Callable[[int, Floats], Floats]
    ) -> Floats:
        """Numbers of all columns, rounded in order.

        Args:
            x: (blocks, sub-blocks, elements).
            nearest: the numbers nearest to a column of a sub-block; ``value``: what they stand for.
        """
        blocks, _, length = x.shape
        columns = np.ascontiguousarray(x.reshape(blocks, -1).T)  # (columns, blocks): a column lies together
        numbers, errors = np.empty_like(columns), np.empty_like(columns)
        upper, n = self._upper, len(columns)
        for start in range(0, n, _RUN):
            stop = min(start + _RUN, n)
            for c in range(start, stop):
                numbers[c] = nearest(c // length, columns[c])
                errors[c] = (columns[c] - value(c // length, numbers[c])) / upper[c, c]
                columns[c + 1 : stop] -= upper[c, c + 1 : stop, None] * errors[c]
            columns[stop:] -= upper[start:stop, stop:].T @ errors[start:stop]
        return np.ascontiguousarray(numbers.T).reshape(x.shape)
