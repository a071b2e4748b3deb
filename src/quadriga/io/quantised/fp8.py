"""FP8 under a scale for every block of 128 x 128, as DeepSeek and Qwen publish it, or one scale for a whole matrix.

    NAME.weight (rows, cols) float8_e4m3fn, NAME.weight_scale_inv (ceil(rows/128), ceil(cols/128)) float32
    w = weight * weight_scale_inv of its block, in float32             (deepseek-ai/DeepSeek-V3 inference/kernel.py)

Activations are rounded to FP8 as well where such models were published; here they are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quadriga.errors import ConfigError
from quadriga.io.quantised.method import FLOATS, Parts
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
    """Rows and columns under one scale; None: one scale a matrix."""

    label = "fp8"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """See ``method.Method``. input_scale is for activations, which stay as they are."""
        return ("weight", "weight_scale_inv" if self.block else "weight_scale", "input_scale")

    def shape(self, parts: Parts) -> Shape:
        """See ``method.Method``."""
        rows, cols = parts.matrix("weight", (FLOAT8,))
        if self.block is None:
            scale = parts.expect("weight_scale", FLOATS)
            if scale.shape not in ((), (1,)):
                raise parts.fail(f"its part 'weight_scale' must be one number, got the shape {list(scale.shape)}")
        else:
            height, width = self.block
            parts.expect("weight_scale_inv", FLOATS, (-(-rows // height), -(-cols // width)))
        return rows, cols

    def read(self, parts: Parts, first: int, last: int) -> Array:
        """See ``method.Method``: float32."""
        _, cols = parts.info("weight").shape
        values = parts.read("weight", ((first, last), (0, cols))).astype(np.float32)
        if self.block is None:
            return values * as_float32(parts.read("weight_scale")).reshape(1, 1)
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
        scale = as_float32(parts.read("weight_scale")).reshape(())
        return codes, np.full((last - first, -(-cols // GROUP)), scale, dtype=np.float32)

    def _scales(self, parts: Parts, first: int, last: int) -> NDArray[np.float32]:
        """Of rows [first, last) and every block of columns."""
        assert self.block is not None, "one scale has no rows"
        return as_float32(parts.read("weight_scale_inv"))[np.arange(first, last) // self.block[0]]


def read_config(keys: Keys) -> Fp8:
    """quantization_config of the method "fp8" (transformers' FineGrainedFP8Config).

    Raises:
        ConfigError: a key that is unknown or asks for what is not read.
    """
    keys.must_be("fmt", "e4m3", None)
    keys.must_be("scale_fmt", "ue8m0", "float32", None)
    keys.must_be("activation_scheme", "dynamic", "static", None)
    keys.must_be("dequantize", False, None)
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
