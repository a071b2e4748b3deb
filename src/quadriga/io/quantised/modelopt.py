"""NVIDIA's ModelOpt: FP8 under one scale a matrix or a row, and NVFP4 (``fp4``); a checkpoint may have both.

    NAME.weight (rows, cols) float8_e4m3fn, NAME.weight_scale (), (rows,) or (rows, 1) float32; input_scale is not used
    w = weight * weight_scale, in float32

Which of them a weight is shows in its dtype. The settings are in config.json, or, in older repositories, in
hf_quant_config.json alone. Source: NVIDIA/Model-Optimizer modelopt/torch/export/quant_utils.py, convert_hf_config.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quadriga.io.quantised.fp4 import Fp4
from quadriga.io.quantised.fp8 import FLOAT8, Fp8
from quadriga.io.quantised.method import Method, Parts
from quadriga.model.families.keys import Keys
from quadriga.model.weight_map import Shape
from quadriga.quant.dtypes import Array

_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_NVFP4", "NVFP4_W4A16", "MIXED_PRECISION")
_FP4 = Fp4("modelopt")


@dataclass(frozen=True)
class ModelOpt:
    """See the module docstring and ``method.Method``."""

    label = "modelopt"
    suffixes = _FP4.suffixes

    @staticmethod
    def _of(parts: Parts) -> Method:
        if parts.info("weight").dtype != FLOAT8:
            return _FP4
        return Fp8(None, per_row=len(parts.info("weight_scale").shape) > 0 and parts.info("weight_scale").shape[0] > 1)

    def shape(self, parts: Parts) -> Shape:
        """See ``method.Method``."""
        return self._of(parts).shape(parts)

    def read(self, parts: Parts, first: int, last: int) -> Array:
        """See ``method.Method``: float32."""
        return self._of(parts).read(parts, first, last)

    def codes(self, parts: Parts, first: int, last: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]] | None:
        """See ``method.KeepsCodes``."""
        method = self._of(parts)
        return method.codes(parts, first, last) if isinstance(method, Fp8) else None


def read_config(keys: Keys) -> ModelOpt:
    """quantization_config of the method "modelopt": a quant_algo, or "quantization" with one (hf_quant_config.json).

    Raises:
        ConfigError: a key that is unknown or asks for what is not read.
    """
    if keys.given("quantization"):
        inner = keys.section("quantization")
        keys.finish(_BESIDE)
        keys = inner
    keys.text("quant_algo")
    keys.must_be("quant_algo", *_ALGORITHMS)
    keys.must_be("has_zero_point", False, None)
    keys.must_be("pre_quant_scale", False, None)
    keys.must_be("group_size", 16, None)
    keys.finish(_BESIDE | _WHAT_AND_HOW)
    return ModelOpt()


_BESIDE = frozenset({"producer", "quant_method", "version"})
_WHAT_AND_HOW = frozenset(
    {"config_groups", "exclude_modules", "ignore", "kv_cache_quant_algo", "kv_cache_scheme", "quantized_layers"}
)
"""Which weights are packed and how shows in the tensors; activations and the cache are not rounded."""
