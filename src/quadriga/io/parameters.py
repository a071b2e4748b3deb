"""A checkpoint seen as the model's parameters: any box of any parameter, whatever layout it is stored in.

:class:`ParameterView` reads a source through its weight map; :func:`slices` cuts the pieces of a map into parts small
enough to hold, and :func:`from_stored` / :func:`to_stored` move one part's numbers between the two layouts. Import,
export, conversion and loading are loops over these four.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from quadriga.io.source import TensorSource
from quadriga.model.weight_map import Box, Piece, Shape, taken_shape, whole
from quadriga.quant.dtypes import DTYPES, Array, wider

SLICE_BYTES = 64 << 20
"""Most bytes of a parameter moved at once, except that a matrix to be transposed moves whole."""

_HELD_BY = {"mxfp4": "bfloat16"}
"""Block formats whose every number is one of a narrower dtype than float32."""

Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in all, what is being moved)."""


def slices(piece: Piece, max_elements: int) -> Iterator[Piece]:
    """Cut a piece along its first axis into pieces of at most ``max_elements``, each again a valid piece.

    A transposed matrix is not cut, and rotary heads are not cut in the middle.
    """
    box = piece.source_box or whole(piece.source_shape)
    target = piece.target_box or whole(piece.target_shape)
    shape = piece.view or taken_shape(piece)
    matrix = piece.transpose and len(shape) == 2
    step = max(1, max_elements // max(1, prod(shape[1:])))
    if piece.rotary_heads:
        rows = shape[0] // piece.rotary_heads
        step = max(rows, step // rows * rows)
    if matrix or step >= shape[0]:
        yield replace(piece, source_box=box, target_box=target)
        return
    # Rows of the source that one step along the view's first axis takes.
    rows_a_step, rest = divmod(box[0][1] - box[0][0], shape[0])
    if rest:  # the view splits a row, e.g. (F, D) seen as (1, F, D) is not cut here
        yield replace(piece, source_box=box, target_box=target)
        return
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        yield replace(
            piece,
            source_box=((box[0][0] + start * rows_a_step, box[0][0] + stop * rows_a_step), *box[1:]),
            target_box=((target[0][0] + start, target[0][0] + stop), *target[1:]),
            view=None if piece.view is None else (stop - start, *piece.view[1:]),
            rotary_heads=piece.rotary_heads * (stop - start) // shape[0],
        )


def from_stored(stored: Array, piece: Piece) -> Array:
    """The target box of a piece from its source box."""
    if piece.stride is not None:
        axis = (slice(None),) * piece.stride.axis
        stored = stored[(*axis, slice(piece.stride.start, None, piece.stride.step))]
    values = stored if piece.view is None else stored.reshape(piece.view)
    if piece.transpose:
        values = values.swapaxes(-2, -1)
    return from_pairs(values, piece.rotary_heads, piece.rotary_last) if piece.rotary_heads else values


def from_pairs(values: Array, n_heads: int, last: int = 0) -> Array:
    """Rows of every head in halves, from rotary pairs side by side: (head, pair, side) -> (head, side, pair).

    Args:
        last: how many of a head's rows are pairs, behind the others; 0: all.
    """
    return _turned(values, n_heads, last, (-1, 2))


def to_pairs(values: Array, n_heads: int, last: int = 0) -> Array:
    """The inverse of :func:`from_pairs`."""
    return _turned(values, n_heads, last, (2, -1))


def _turned(values: Array, n_heads: int, last: int, grid: tuple[int, int]) -> Array:
    order = np.arange(values.shape[0]).reshape(n_heads, -1)
    turning = order[:, -last:]  # all of them where last is 0
    order[:, -last:] = turning.reshape(n_heads, *grid).swapaxes(1, 2).reshape(turning.shape)
    return values[order.reshape(-1)]


def to_stored(values: Array, piece: Piece) -> Array:
    """What a piece takes of its source, from its target box: the inverse of :func:`from_stored`, bit for bit.

    Its place in the source is ``weight_map.source_index``.
    """
    if piece.rotary_heads:
        values = to_pairs(values, piece.rotary_heads, piece.rotary_last)
    if piece.transpose:
        values = values.swapaxes(-2, -1)
    return values.reshape(taken_shape(piece))


class ParameterView:
    """A source under its weight map; parts are read when asked for, the last one is kept.

    Args:
        source: where the tensors are.
        pieces: a weight map that covers every parameter (``check_cover``).
    """

    def __init__(self, source: TensorSource, pieces: Iterable[Piece]) -> None:
        self.source = source
        self._by_target: dict[str, list[Piece]] = {}
        self._shapes: dict[str, Shape] = {}
        for piece in pieces:
            self._shapes[piece.target] = piece.target_shape
            self._by_target.setdefault(piece.target, []).extend(slices(piece, SLICE_BYTES // 4))
        self._kept: tuple[Piece, Array] | None = None

    def dtype(self, parameter: str) -> np.dtype[Any]:
        """The narrowest dtype that holds the parameter's stored numbers; float32 for most block formats."""
        result: np.dtype[Any] | None = None
        for name in {piece.source for piece in self._by_target[parameter]}:
            form = self.source.tensors[name].dtype
            stored = DTYPES.get(_HELD_BY.get(form, form), DTYPES["float32"])
            result = stored if result is None else wider(result, stored)
        assert result is not None, "check_cover has seen a piece for every parameter"
        return result

    def read(self, parameter: str, box: Box | None = None) -> Array:
        """A box of one parameter, in its :meth:`dtype`."""
        box = box or whole(self._shapes[parameter])
        out: Array | None = None
        for piece in self._by_target[parameter]:
            target = piece.target_box or whole(piece.target_shape)
            common = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(box, target, strict=True))
            if any(start >= stop for start, stop in common):
                continue
            values = self._part(piece)[_within(common, target)]
            if common == box:
                return values.astype(self.dtype(parameter), copy=False)
            if out is None:
                out = np.empty(_extent(box), dtype=self.dtype(parameter))
            out[_within(common, box)] = values
        assert out is not None, f"{parameter}: nothing covers {box}"
        return out

    def _part(self, piece: Piece) -> Array:
        if self._kept is None or self._kept[0] != piece:
            self._kept = None  # free the old part before reading the next
            self._kept = (piece, from_stored(self.source.read(piece.source, piece.source_box), piece))
        return self._kept[1]


def _extent(box: Box) -> Shape:
    return tuple(stop - start for start, stop in box)


def _within(inner: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(inner, outer, strict=True))
