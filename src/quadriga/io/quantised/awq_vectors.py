"""AWQ in the versions "gemv" and "gemv_fast" (llm-awq's own): 4 bits, packed along the columns.

    gemv        NAME.qweight (rows, cols / 8) int32     nibble i of word [r, j] is q of column 8 j + i
                NAME.qzeros  (rows, n) int32            z of group 8 j + i; NAME.scales (rows, 8 n) float16
                w = (q - z) * scales, in the dtype of the scales
    gemv_fast   NAME.qweight (rows / 4, cols) int16     see :func:`_unpacked`
                NAME.scales, NAME.scaled_zeros (8 n, rows) float16     (the zeros are called qzeros by GPTQModel)
                w = q * scales + scaled_zeros, rounded once, as the kernels' fused multiplication

n is the groups' number over 8, rounded up (for short groups to a multiple of 2 or 4); nothing beyond them is read.
Source: casper-hansen/AutoAWQ awq/modules/linear/gemv.py, gemv_fast.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quadriga.io.quantised.method import FLOATS, Parts, scaled, unpack_words
from quadriga.model.weight_map import Shape
from quadriga.quant.dtypes import Array


def _groups(parts: Parts, cols: int, group_size: int) -> int:
    size = cols if group_size == -1 else group_size
    if cols % size:
        raise parts.fail(f"its {cols} columns must be whole groups of {size}")
    return cols // size


def _width(groups: int, group_size: int) -> int:
    """Words of eight groups that the files have room for."""
    multiple = {64: 2, 32: 4}.get(group_size, 1)
    return -(-groups // (8 * multiple)) * multiple


@dataclass(frozen=True)
class AwqVectors:
    """Settings of a checkpoint of the version "gemv"; see ``method.Method``."""

    group_size: int
    """Columns of a group; -1: all."""

    label = "awq"
    suffixes = ("qweight", "qzeros", "scales")

    def shape(self, parts: Parts) -> Shape:
        """See ``method.Method``."""
        rows, words = parts.matrix("qweight", ("int32",))
        width = _width(_groups(parts, 8 * words, self.group_size), self.group_size)
        parts.expect("qzeros", ("int32",), (rows, width))
        parts.expect("scales", FLOATS, (rows, 8 * width))
        return rows, 8 * words

    def read(self, parts: Parts, first: int, last: int) -> Array:
        """See ``method.Method``: in the dtype of the scales."""
        words = parts.info("qweight").shape[1]
        groups = _groups(parts, 8 * words, self.group_size)
        q = unpack_words(parts.read("qweight", ((first, last), (0, words))), 4)
        z = unpack_words(parts.read("qzeros", ((first, last), (0, -(-groups // 8)))), 4)[:, :groups]
        scales = parts.read("scales", ((first, last), (0, groups)))
        return scaled(q, z, scales, np.arange(8 * words) // (8 * words // groups), 4)


@dataclass(frozen=True)
class AwqVectorsFast:
    """Settings of a checkpoint of the version "gemv_fast"; see ``method.Method``."""

    group_size: int
    """Columns of a group; -1: all."""

    label = "awq"
    suffixes = ("qweight", "scales", "scaled_zeros", "qzeros")

    def shape(self, parts: Parts) -> Shape:
        """See ``method.Method``."""
        fours, cols = parts.matrix("qweight", ("int16",))
        if cols % 64:
            raise parts.fail(f"its {cols} columns must be whole runs of 64")
        if "qzeros" in parts and "scaled_zeros" in parts:
            raise parts.fail("its zeros must be 'scaled_zeros' or 'qzeros', got both")
        width = _width(_groups(parts, cols, self.group_size), self.group_size)
        for part in ("scales", self._zeros(parts)):
            parts.expect(part, ("float16",), (8 * width, 4 * fours))
        return 4 * fours, cols

    @staticmethod
    def _zeros(parts: Parts) -> str:
        return "qzeros" if "qzeros" in parts else "scaled_zeros"

    def read(self, parts: Parts, first: int, last: int) -> Array:
        """See ``method.Method``: float16."""
        cols = parts.info("qweight").shape[1]
        groups, fours = _groups(parts, cols, self.group_size), (first // 4, -(-last // 4))
        q = _unpacked(parts.read("qweight", (fours, (0, cols))))[first % 4 :][: last - first]
        scales, zeros = (
            parts.read(part, ((0, groups), (first, last))).T.astype(np.float64).repeat(cols // groups, axis=1)
            for part in ("scales", self._zeros(parts))
        )
        return (q * scales + zeros).astype(np.float16)


def _unpacked(words: NDArray[np.int16]) -> NDArray[np.uint8]:
    """(rows / 4, cols) int16 -> (rows, cols): four rows share a run of 64 columns, and columns are dealt out.

    The 256 nibbles of 64 words are four rows of 64. Of 32 columns, 8 a + 2 b + c stands at 8 b + 4 c + a.
    """
    fours, cols = words.shape
    nibbles = np.ascontiguousarray(words).view(np.uint16)[..., None] >> np.arange(0, 16, 4, dtype=np.uint16)
    rows = (nibbles & np.uint16(15)).astype(np.uint8).reshape(fours, cols // 64, 4, 64).transpose(0, 2, 1, 3)
    dealt = rows.reshape(4 * fours, cols // 32, 4, 2, 4)  # b, c, a
    return dealt.transpose(0, 1, 4, 2, 3).reshape(4 * fours, cols)
