"""bitsandbytes in 8 bits (LLM.int8): whole numbers under a scale for every row.

    NAME.weight (rows, cols) int8, NAME.SCB (rows,) float32: the largest magnitude of a row
    NAME.weight_format uint8: 0, rows after each other; the others are a GPU's own order, which releases do not have
    w = weight * SCB * (1 / 127), in float32, both products rounded

Columns of activations that are large are multiplied by the same weights there (llm_int8_threshold); nothing is rounded
here. Source: bitsandbytes-foundation/bitsandbytes bitsandbytes/backends/default/ops.py (int8_vectorwise_dequant).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quadriga.io.quantised.method import Parts
from quadriga.model.weight_map import Shape
from quadriga.quant.dtypes import Array

_PER_STEP = np.float32(7.874015718698502e-3)
"""1 / 127 as the library writes it."""


@dataclass(frozen=True)
class LlmInt8:
    """See the module docstring and ``method.Method``."""

    label = "bitsandbytes"
    suffixes = ("weight", "SCB", "weight_format")

    def shape(self, parts: Parts) -> Shape:
        """See ``method.Method``."""
        rows, cols = parts.matrix("weight", ("int8",))
        parts.expect("SCB", ("float32",), (rows,))
        if "weight_format" in parts:
            parts.expect("weight_format", ("uint8",), ())
            if parts.read("weight_format") != 0:
                raise parts.fail("its part 'weight_format' must be 0 (rows after each other)")
        return rows, cols

    def read(self, parts: Parts, first: int, last: int) -> Array:
        """See ``method.Method``: float32."""
        stored = parts.read("weight", ((first, last), (0, parts.info("weight").shape[1])))
        return stored.astype(np.float32) * parts.read("SCB", ((first, last),))[:, None] * _PER_STEP
