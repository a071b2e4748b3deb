"""compressed-tensors (llm-compressor, vLLM): integers of 1 to 8 bits, packed or plain, and FP8; its FP4 is in ``fp4``.

    pack-quantized    NAME.weight_packed int32 (rows, cols * bits / 32), lowest bits first; q = field - 2^(bits - 1)
                      NAME.weight_shape int64 (2,)      NAME.weight_zero_point int32, packed along the rows
    int-quantized     NAME.weight int8                  NAME.weight_zero_point int8
    float-quantized   NAME.weight float8_e4m3fn         naive-quantized is either of the two
    mxfp8-quantized   the same with NAME.weight_scale uint8 (rows, cols / 32): 2^(e - 127) in bfloat16
    all               NAME.weight_scale (rows, groups)  NAME.weight_g_idx int32 (cols,): the group of every column
    w = (q - z) * scale, in the dtype of the scales

Scales are one a matrix (strategy "tensor"), a row ("channel"), a group of columns ("group") or a block ("block").
Activations are not rounded here. Source: vllm-project/compressed-tensors 0.20.1, compressors/ and
quantization/lifecycle/forward.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quadriga.io.quantised.fp8 import FLOAT8
from quadriga.io.quantised.method import FLOATS, NOT_ROUNDED, Parts, one_number, scaled, unpack_words
from quadriga.model.weight_map import Shape
from quadriga.quant.dtypes import Array, as_float32
from quadriga.quant.mxfp4 import powers


@dataclass(frozen=True)
class Compressed:
    """One scheme of a checkpoint; see ``method.Method``."""

    packed: bool
    bits: int
    is_float: bool
    symmetric: bool
    strategy: str
    height: int
    """Rows under one scale; 0: all."""
    width: int
    """Columns under one scale; 0: all."""
    powers: bool = False
    """Scales are the exponents of powers of two."""

    label = "compressed-tensors"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """See ``method.Method``."""
        own = ("weight_packed", "weight_shape") if self.packed else ("weight",)
        return (*own, "weight_scale", "weight_zero_point", "weight_g_idx", *NOT_ROUNDED)

    def shape(self, parts: Parts) -> Shape:
        """See ``method.Method``."""
        if self.packed:
            parts.expect("weight_shape", ("int64", "int32"), (2,))
            rows, cols = map(int, parts.read("weight_shape"))
            if not 0 < cols < 2**31:
                raise parts.fail(f"its part 'weight_shape' must say how many rows and columns, got {[rows, cols]}")
            parts.expect("weight_packed", ("int32",), (rows, -(-cols * self.bits // 32)))
        else:
            rows, cols = parts.matrix("weight", (FLOAT8 if self.is_float else "int8",))
        groups, dtypes = self._groups(rows, cols), ("uint8",) if self.powers else FLOATS
        if self.strategy == "tensor":
            one_number(parts, "weight_scale")
        elif parts.expect("weight_scale", dtypes).shape != groups[:1] or groups[1] != 1:
            parts.expect("weight_scale", dtypes, groups)
        self._check_zeros(parts, groups)
        if "weight_g_idx" in parts:
            parts.expect("weight_g_idx", ("int32",), (cols,))
        return rows, cols

    def _check_zeros(self, parts: Parts, groups: tuple[int, int]) -> None:
        if self.symmetric:
            if "weight_zero_point" in parts and as_float32(parts.read("weight_zero_point")).any():
                raise parts.fail("its part 'weight_zero_point' must be zero: the configuration says it is symmetric")
        elif self.strategy == "tensor":
            one_number(parts, "weight_zero_point", ("int8",))
        else:
            packed_rows = -(-groups[0] * self.bits // 32)
            wanted = ("int32", (packed_rows, groups[1])) if self.packed else ("int8", groups)
            parts.expect("weight_zero_point", (wanted[0],), wanted[1])

    def _groups(self, rows: int, cols: int) -> tuple[int, int]:
        return -(-rows // (self.height or rows or 1)), -(-cols // (self.width or cols or 1))

    def read(self, parts: Parts, first: int, last: int) -> Array:
        """See ``method.Method``: in the dtype of the scales."""
        rows, cols = parts.read("weight_shape") if self.packed else parts.info("weight").shape
        groups = self._groups(int(rows), int(cols))
        of_row = np.arange(first, last) // (self.height or int(rows) or 1)
        of_column = self._group_of_columns(parts, int(cols), groups[1])
        scales = self._scales(parts).reshape(groups)[of_row]
        zeros = (
            np.zeros((last - first, groups[1]), dtype=np.int16)
            if self.symmetric
            else self._zeros(parts, groups)[of_row]
        )
        if self.packed:
            words = parts.read("weight_packed", ((first, last), (0, parts.info("weight_packed").shape[1])))
            fields = unpack_words(words, self.bits)[:, : int(cols)]
            return scaled(fields, zeros + np.int16(2 ** (self.bits - 1)), scales, of_column, self.bits)
        stored = as_float32(parts.read("weight", ((first, last), (0, int(cols)))))
        difference = stored if self.symmetric else stored - zeros[:, of_column]
        return (difference * as_float32(scales)[:, of_column]).astype(scales.dtype)

    def _scales(self, parts: Parts) -> Array:
        stored = parts.read("weight_scale")
        return powers(stored.view(np.uint8)).astype(ml_dtypes.bfloat16) if self.powers else stored

    def _zeros(self, parts: Parts, groups: tuple[int, int]) -> NDArray[np.int16]:
        stored = parts.read("weight_zero_point")
        if not self.packed or self.strategy == "tensor":
            return stored.astype(np.int16).reshape(groups)
        fields = unpack_words(stored.T, self.bits)[:, : groups[0]].T
        return fields.astype(np.int16) - np.int16(2 ** (self.bits - 1))

    def _group_of_columns(self, parts: Parts, cols: int, groups: int) -> NDArray[np.int32]:
        if "weight_g_idx" not in parts:
            return np.arange(cols, dtype=np.int32) // np.int32(self.width or cols or 1)
        group = parts.read("weight_g_idx")
        if not 0 <= group.min() <= group.max() < groups:
            raise parts.fail(f"its part 'weight_g_idx' must name groups from 0 to {groups - 1}")
        return group
