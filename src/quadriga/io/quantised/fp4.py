"""E2M1 in pairs under a scale for every 16 or 32 columns: compressed-tensors' NVFP4 and MXFP4, and ModelOpt's NVFP4.

    NAME.weight_packed (rows, cols / 2) uint8        low nibble first; ModelOpt calls it NAME.weight
    NAME.weight_scale  (rows, cols / 16) float8_e4m3fn          NVFP4; uint8, 2^(e - 127), for every 32 columns: MXFP4
    NAME.weight_global_scale (1,) float32            w = E2M1[code] * (scale / global), NVFP4 of compressed-tensors
    NAME.weight_scale_2 () float32                   w = E2M1[code] * (scale * scale_2), ModelOpt's

compressed-tensors rounds both to bfloat16; ModelOpt's are float32. MXFP4 is GGUF's block type of that name in another
order (``quant.mxfp4``), and kept as it is; no format of ours has NVFP4's two scales.

Sources: vllm-project/compressed-tensors 0.20.1 compressors/nvfp4, mxfp4; NVIDIA/Model-Optimizer modelopt/torch/quantization/qtensor/nvfp4_tensor.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quadriga.io.quantised.fp8 import FLOAT8
from quadriga.io.quantised.method import NOT_ROUNDED, Parts, one_number
from quadriga.model.weight_map import Shape
from quadriga.quant.dtypes import Array, as_float32
from quadriga.quant.mxfp4 import halves_of_pairs, pairs, powers

_KINDS: dict[str, tuple[str, str, int]] = {
    "nvfp4": ("weight_packed", FLOAT8, 16),
    "mxfp4": ("weight_packed", "uint8", 32),
    "modelopt": ("weight", FLOAT8, 16),
}
"""The part that holds the codes, the dtype of the scales, the columns under one."""


@dataclass(frozen=True)
class Fp4:
    """Settings of a checkpoint; see ``method.Method``."""

    kind: Literal["nvfp4", "mxfp4", "modelopt"]

    @property
    def label(self) -> str:
        """See ``method.Method``."""
        return "modelopt" if self.kind == "modelopt" else "compressed-tensors"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """See ``method.Method``."""
        outer = {"nvfp4": ("weight_global_scale",), "mxfp4": (), "modelopt": ("weight_scale_2",)}[self.kind]
        return (_KINDS[self.kind][0], "weight_scale", *outer, *NOT_ROUNDED)

    def shape(self, parts: Parts) -> Shape:
        """See ``method.Method``."""
        codes, dtype, size = _KINDS[self.kind]
        rows, pairs = parts.matrix(codes, ("uint8",))
        if 2 * pairs % size:
            raise parts.fail(f"its {2 * pairs} columns must be whole groups of {size}")
        parts.expect("weight_scale", (dtype,), (rows, 2 * pairs // size))
        if self.kind == "nvfp4":
            one_number(parts, "weight_global_scale")
        elif self.kind == "modelopt":
            one_number(parts, "weight_scale_2")
        return rows, 2 * pairs

    def read(self, parts: Parts, first: int, last: int) -> Array:
        """See ``method.Method``: bfloat16, ModelOpt's float32."""
        part, _, size = _KINDS[self.kind]
        codes = parts.read(part, ((first, last), (0, parts.info(part).shape[1])))
        values = pairs(codes).reshape(last - first, -1, size)
        out = (values * self._scales(parts, first, last)[..., None]).reshape(last - first, -1)
        return out if self.kind == "modelopt" else out.astype(ml_dtypes.bfloat16)

    @property
    def kept(self) -> str:
        """See ``method.KeepsBlocks``."""
        return "MXFP4 (as mx4)" if self.kind == "mxfp4" else ""

    def block_format(self, parts: Parts) -> str | None:
        """See ``method.KeepsBlocks``: MXFP4 is."""
        return "mxfp4" if self.kind == "mxfp4" else None

    def raw(self, parts: Parts, first: int, last: int) -> NDArray[np.uint8]:
        """See ``method.KeepsBlocks``."""
        n_codes, n_scales = (parts.info(part).shape[1] for part in ("weight_packed", "weight_scale"))
        codes = parts.read("weight_packed", ((first, last), (0, n_codes))).reshape(last - first, n_scales, 16)
        scales = parts.read("weight_scale", ((first, last), (0, n_scales))).view(np.uint8)
        return np.concatenate((scales[..., None], halves_of_pairs(codes)), axis=2).reshape(last - first, -1)

    def _scales(self, parts: Parts, first: int, last: int) -> NDArray[np.float32]:
        stored = parts.read("weight_scale", ((first, last), (0, parts.info("weight_scale").shape[1])))
        if self.kind == "mxfp4":
            return powers(stored.view(np.uint8))
        scales = stored.astype(np.float32)
        if self.kind == "nvfp4":
            return scales / as_float32(parts.read("weight_global_scale")).reshape(())
        return scales * as_float32(parts.read("weight_scale_2")).reshape(())
