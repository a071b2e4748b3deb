"""FP8 under a scale for every block of 128 x 128, as DeepSeek and Qwen publish it, or one for a matrix or for a row.

    NAME.weight (rows, cols) float8_e4m3fn, NAME.weight_scale_inv (ceil(rows/128), ceil(cols/128)) float32
    w = weight * weight_scale_inv of its block, in float32             (deepseek-ai/DeepSeek-V3 inference/kernel.py)

One scale is called weight_scale (AutoFP8) or weight_scale_inv (Mistral, transformers 5); a scale a row, weight_scale of
(rows,) or (rows, 1), is FBGEMM's (Meta's LLaMA-3.1-405B-FP8).

Activations are rounded to FP8 as well where such models were published; here they are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quadriga.errors import ConfigError
from quadriga.io.quantised.method import FLOATS, NOT_ROUNDED, Parts, one_number
from quadriga.model.families.keys import Keys
from quadriga.model.weight_map import Shape
from quadriga.quant.dtypes import Array, as_float32

FLOAT8 = "float8_e4m3fn"
GROUP = 128
"""Columns under one scale that kernels multiply as they are."""


@dataclass(frozen=True)
class Fp8:
    """Settings of a checkpoint; see ``method.Method``."""

    block: tuple[int, int] | None
    """Rows and columns under one scale; None: one scale a matrix, or a row."""
    per_row: bool = False

    label = "fp8"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """See ``method.Method``."""
        names = ("weight_scale_inv",) if self.block else ("weight_scale", "weight_scale_inv")
        return ("weight", *names, *NOT_ROUNDED)

    @staticmethod
    def _scale(parts: Parts) -> str:
        """The part with the only scale, or those of rows."""
        if "weight_scale" in parts and "weight_scale_inv" in parts:
            raise parts.fail("its scale must be 'weight_scale' or 'weight_scale_inv', got both")
        return "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"

    def shape(self, parts: Parts) -> Shape:
        """See ``method.Method``."""
        rows, cols = parts.matrix("weight", (FLOAT8,))
        if self.per_row:
            if parts.expect(self._scale(parts), FLOATS).shape != (rows,):
                parts.expect(self._scale(parts), FLOATS, (rows, 1))
        elif self.block is None:
            one_number(parts, self._scale(parts))
        else:
            height, width = self.block
            parts.expect("weight_scale_inv", FLOATS, (-(-rows // height), -(-cols // width)))
        return rows, cols

    def read(self, parts: Parts, first: int, last: int) -> Array:
        """See ``method.Method``: float32."""
        _, cols = parts.info("weight").shape
        values = parts.read("weight", ((first, last), (0, cols))).astype(np.float32)
        if self.block is None:
            return values * self._scales(parts, first, last)
        _, width = self.block
        return values * self._scales(parts, first, last).repeat(width, axis=1)[:, :cols]

    def codes(self, parts: Parts, first: int, last: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]] | None:
        """See ``method.KeepsCodes``."""
        if self.block is not None and self.block[1] != GROUP:
            return None
        _, cols = parts.info("weight").shape
        codes = parts.read("weight", ((first, last), (0, cols))).view(np.uint8)
        if self.block is not None:
            return codes, self._scales(parts, first, last)
        return codes, self._scales(parts, first, last).repeat(-(-cols // GROUP), axis=1)

    def _scales(self, parts: Parts, first: int, last: int) -> NDArray[np.float32]:
        """Of rows [first, last) and every block of columns; without blocks (last - first, 1)."""
        if self.block is not None:
            return as_float32(parts.read("weight_scale_inv"))[np.arange(first, last) // self.block[0]]
        stored = as_float32(parts.read(self._scale(parts))).reshape(-1, 1)
        return stored[first:last] if self.per_row else stored.repeat(last - first, axis=0)


def read_config(keys: Keys) -> Fp8:
    """quantization_config of the method "fp8" (transformers' FineGrainedFP8Config, AutoFP8).

    Raises:
        ConfigError: a key that is unknown or asks for what is not read.
    """
    keys.must_be("fmt", "e4m3", None)
    keys.must_be("scale_fmt", "ue8m0", "float32", "float", None)
    keys.must_be("activation_scheme", "dynamic", "static", None)
    keys.must_be("kv_cache_scheme", "dynamic", "static", None)
    keys.must_be("dequantize", False, None)
    keys.must_be("expert_dtype", "fp8", None)
    keys.must_be("modules_to_convert", [], None)
    block: tuple[int, ...] = ()
    if keys.given("weight_block_size"):
        block = keys.integers("weight_block_size")
        if len(block) != 2 or min(block) < 1:
            raise ConfigError(
                "quantization_config: weight_block_size must be two whole numbers from 1, or null for one scale a "
                f"matrix; got {list(block)}"
            )
    keys.finish(frozenset({"modules_to_not_convert", "ignored_layers"}))
    return Fp8((block[0], block[1]) if block else None)


def read_fbgemm_config(keys: Keys) -> Fp8:
    """quantization_config of the method "fbgemm_fp8".

    Raises:
        ConfigError: a key that is unknown.
    """
    keys.finish(frozenset({"quant_method", "activation_scale_ub", "modules_to_not_convert"}))
    return Fp8(None, per_row=True)
