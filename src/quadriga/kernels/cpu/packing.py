"""Matrices as the CPU kernels want them: packing, unpacking, and memory to hold them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadriga.errors import CheckpointError
from quadriga.kernels.cpu import bindings, searching
from quadriga.kernels.cpu import library as cpu
from quadriga.kernels.cpu.file_context import packing_context
from quadriga.quant import codec
from quadriga.quant.codebooks import codebook
from quadriga.quant.dtypes import Array, as_float32, name_of
from quadriga.quant.feedback import Importance, Moments, columns_of
from quadriga.quant.formats import FORMATS
from quadriga.quant.packed import FROM_GGUF, OF_BLOCKS, PACKED

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Packed:
    """One packed matrix (rows, cols); see ``quant.packed`` for the formats."""

    format: str
    rows: int
    cols: int
    data: Bytes
    """uint8, ``PACKED[format].nbytes_of(rows, cols)`` of them, at a 64-byte boundary; possibly a memory map. None of an
    expert that is another rank's."""

    def struct(self) -> bindings.Matrix:
        """What the kernels are handed. Keep this object alive while they use it."""
        address = self.data.ctypes.data if self.data.size else None
        return bindings.Matrix(address, self.rows, self.cols, cpu.FORMATS[self.format])

    def unpack(self, first: int = 0, n: int | None = None) -> NDArray[np.float32]:
        """Rows [first, first + n) as float32."""
        n = self.rows - first if n is None else n
        assert first >= 0 and first + n <= self.rows, "rows of this matrix"
        out = np.empty((n, self.cols), dtype=np.float32)
        context = packing_context()
        code, address = cpu.FORMATS[self.format], self.data.ctypes.data
        context.call(context.lib.qd_unpack, code, address, self.cols, first, n, out.ctypes.data)
        return out


Parameter = NDArray[np.float32] | Packed | Sequence[Packed]
"""A vector (norms, fuse) as numbers; a matrix packed; a layer's experts as one packed matrix each, and q, k and v that
a file stores in different formats as their runs of rows."""


_HUGE = 2 << 20
_ARENA = 256 << 20


class _Arenas:
    """Memory in large pieces, handed out from front to back: only large pieces get huge pages, and reading weights
    through 4 kB pages is up to a third slower. A piece is freed when nothing points into it any more."""

    def __init__(self) -> None:
        self._piece: Bytes | None = None
        self._used = 0

    def take(self, nbytes: int) -> Bytes:
        if self._piece is None or self._used + nbytes > self._piece.nbytes:
            size = -(-max(nbytes, _ARENA) // _HUGE) * _HUGE
            # Private: shared anonymous memory, Python's default, never gets huge pages.
            memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            whole = np.frombuffer(memory, dtype=np.uint8)
            skip = -whole.ctypes.data % _HUGE
            self._piece, self._used = whole[skip : skip + size], 0
        taken = self._piece[self._used : self._used + nbytes]
        self._used += -(-nbytes // 64) * 64
        return taken


_arenas = _Arenas()


def allocate(nbytes: int) -> Bytes:
    """Fresh zeroed memory at a 64-byte boundary, in huge pages where the system gives them."""
    return _arenas.take(nbytes)


def pack(values: Array, form: str, *, out: Bytes | None = None, importance: Importance | None = None) -> Packed:
    """Pack a matrix.

    Args:
        values: (rows, cols) float32, bfloat16 or float16, contiguous.
        form: a name of ``quant.packed.PACKED``; those of ``OF_BLOCKS`` become a GGUF file's blocks first.
        out: memory to fill; None allocates.
        importance: (cols,) float32, how much each column's squared error counts in the search for scales; or the
            moments of what comes to the columns: errors are fed back then (``quant.feedback``; not in q8 and mx4).

    Raises:
        CheckpointError: a number that is not finite, or whose scale is beyond float16 (block formats).
    """
    source = name_of(values.dtype)
    assert source in cpu.SOURCES and values.flags.c_contiguous, "a contiguous float matrix"
    rows, cols = values.shape
    if form in OF_BLOCKS or (isinstance(importance, Moments) and form in _FED):
        return _pack_searched(values, form, out, importance)
    return _pack(source, values.ctypes.data, values.itemsize * cols, rows, cols, form, out, importance)


def _pack_searched(values: Array, form: str, out: Bytes | None, importance: Importance | None) -> Packed:
    """Numbers as a GGUF file's blocks, the last of a row filled up with zeros; then those packed."""
    block, (rows, cols) = (OF_BLOCKS | _FED)[form], values.shape
    width = -(-cols // FORMATS[block].block) * FORMATS[block].block
    whole = np.zeros((rows, width), dtype=np.float32)
    whole[:, :cols] = as_float32(values)
    if isinstance(importance, Moments):
        weight: Importance | None = importance.padded(width)
    else:
        weight = None if importance is None else np.pad(importance, (0, width - cols))
    raw = codec.quantize(whole, block, weight, searching.fastest())
    return _pack(block, raw.ctypes.data, raw.nbytes // rows, rows, cols, form, out, None)


_FED = {"q4": "q4_0", "q4m": "q4_1"}
"""Packed formats that are made of a file's blocks where rounding is fed back."""

STORED = cpu.codes(bindings.Stored)
"""Block format of ``quant.formats`` -> its number in quadriga.h."""


def codebook_of(source: str) -> int | None:
    """The address of a block format's codebook, for the library; None: it has none."""
    return codebook(source).ctypes.data if STORED[source] >= STORED["iq1_s"] else None


def pack_blocks(
    raw: Any,
    source: str,
    rows: int,
    cols: int,
    form: str,
    *,
    out: Bytes | None = None,
    importance: Importance | None = None,
) -> Packed:
    """Pack rows of blocks: bit by bit where ``form`` holds them (``FROM_GGUF``), else the numbers they stand for.

    Args:
        raw: the stored bytes of ``rows`` rows (any buffer).
        source: the block format.
        form, out, importance: as for :func:`pack`.

    Raises:
        CheckpointError: as :func:`pack`.
    """
    row_bytes = FORMATS[source].nbytes_of((cols,))
    stored = np.frombuffer(raw, dtype=np.uint8)
    assert stored.nbytes == rows * row_bytes, "whole rows of blocks"
    if (OF_BLOCKS | (_FED if isinstance(importance, Moments) else {})).get(form, source) != source:
        numbers, context = np.empty((rows, cols), dtype=np.float32), packing_context()
        n_blocks, table = stored.nbytes // FORMATS[source].nbytes, codebook_of(source)
        context.call(
            context.lib.qd_dequantize, STORED[source], stored.ctypes.data, n_blocks, table, numbers.ctypes.data
        )
        return pack(numbers, form, out=out, importance=importance)
    return _pack(source, stored.ctypes.data, row_bytes, rows, cols, form, out, importance)


def pack_mx4(blocks: Bytes, rows: int, cols: int, *, out: Bytes | None = None) -> Packed:
    """Pack MXFP4's codes as they are.

    Args:
        blocks: of ``quant.mxfp4.as_mx4``, (rows * cols / 32, 18) uint8.
    """
    assert blocks.shape == (rows * cols // 32, 18) and blocks.flags.c_contiguous, "whole rows of blocks"
    return _pack("mx4", blocks.ctypes.data, cols // 32 * 18, rows, cols, "mx4", out, None)


def _pack(
    source: str,
    address: int,
    row_bytes: int,
    rows: int,
    cols: int,
    form: str,
    out: Bytes | None,
    importance: Importance | None,
) -> Packed:
    weights = columns_of(importance)
    weights = None if weights is None else np.ascontiguousarray(weights, dtype=np.float32)
    nbytes = PACKED[form].nbytes_of(rows, cols)
    out = allocate(nbytes) if out is None else out
    assert out.nbytes == nbytes and out.ctypes.data % 64 == 0, "memory of the packed matrix's size, aligned"
    context, bad_row = packing_context(), ctypes.c_int64()
    as_they_are = source in cpu.SOURCES and FROM_GGUF.get(source, form) == form
    function = context.lib.qd_pack if as_they_are else context.lib.qd_pack_stored
    context.call(
        function,
        cpu.SOURCES[source] if as_they_are else STORED[source],
        address,
        row_bytes,
        rows,
        cols,
        *(() if as_they_are else (codebook_of(source),)),
        cpu.FORMATS[form],
        out.ctypes.data,
        None if weights is None else weights.ctypes.data,
        ctypes.byref(bad_row),
    )
    if bad_row.value >= 0:
        raise CheckpointError(
            f"weights to be quantised must be finite, with scales below 65520 (float16): row {bad_row.value} is not. "
            "Check the source with another format, e.g. bfloat16."
        )
    return Packed(form, rows, cols, out)


def linear(matrix: Packed, x: Array, context: cpu.Context | None = None) -> NDArray[np.float32]:
    """x (N, cols) float32 times the matrix transposed: (N, rows) float32."""
    context = context or packing_context()
    x = np.ascontiguousarray(x, dtype=np.float32)
    out = np.empty((x.shape[0], matrix.rows), dtype=np.float32)
    context.call(context.lib.qd_linear, matrix.struct(), x.ctypes.data, x.shape[0], out.ctypes.data)
    return out
