"""The search for scales of ``quant.search`` by the CPU's kernels: the same steps, sums in another order.

Of two scales whose errors are nearly the same the other may win than with NumPy: most blocks are the same bytes, and a
matrix has the same squared error to one part in a thousand (``tests/ops/test_searching.py``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadriga.kernels.cpu.bindings import Search as Call
from quadriga.kernels.cpu.file_context import is_built, packing_context
from quadriga.quant.search import NUMPY, Affine, Floats, Levels, Search, Symmetric


def fastest() -> Search:
    """The kernels' search, or NumPy's where the library is missing."""
    return KERNELS if is_built() else NUMPY


class _Found:
    """One call of the library: what it reads, and the arrays that it fills."""

    def __init__(self, x: Floats, weight: Floats, *, minima: bool, **how: Any) -> None:
        blocks, per_block, length = x.shape
        self.d, self.scales = np.empty((blocks, 1), dtype=np.float32), np.empty((blocks, per_block), dtype=np.float32)
        self.numbers = np.empty(x.shape, dtype=np.float32)
        x = np.ascontiguousarray(x, dtype=np.float32)
        # One weight for all numbers of a block changes nothing that is found.
        weights = None if weight.shape[1:] == (1, 1) else np.ascontiguousarray(weight, dtype=np.float32)
        assert weights is None or weights.shape == x.shape, "a weight for every number"
        call = Call(
            x=x.ctypes.data,
            weight=None if weights is None else weights.ctypes.data,
            n=blocks * per_block,
            length=length,
            per_block=per_block,
            d=self.d.ctypes.data,
            scales=self.scales.ctypes.data,
            numbers=self.numbers.ctypes.data,
            **how,
        )
        if minima:
            self.m, self.minima = np.empty_like(self.d), np.empty_like(self.scales)
            call.m, call.minima = self.m.ctypes.data, self.minima.ctypes.data
        context = packing_context()
        context.call(context.lib.qd_find_scales, call)


def _symmetric(x: Floats, weight: Floats, levels: Levels, least: int, most: int) -> Symmetric:
    values: NDArray[np.int8] = levels.values
    codebook = None if levels.are_consecutive else values.ctypes.data
    found = _Found(
        x, weight, minima=False, codebook=codebook, low=int(values[0]), high=int(values[-1]), least=least, most=most
    )
    return Symmetric(found.d, found.scales, found.numbers)


def _affine(x: Floats, weight: Floats, most: int, most_scale: int) -> Affine:
    found = _Found(x, weight, minima=True, high=most, most=most_scale)
    return Affine(found.d, found.m, found.scales, found.minima, found.numbers)


KERNELS = Search(_symmetric, _affine)
