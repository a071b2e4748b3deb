"""Plain dtypes by name, in NumPy: NumPy's own, and bfloat16 from ml_dtypes.

The names are torch's ("bfloat16"), as used in manifests and configurations. Imports no torch.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def name_of(dtype: np.dtype[Any]) -> str:
    """The name of one of DTYPES."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def wider(a: np.dtype[Any], b: np.dtype[Any]) -> np.dtype[Any]:
    """The narrowest of DTYPES that can represent both; float32 for bfloat16 and float16."""
    if a == b:
        return a
    return max((a, b), key=lambda dtype: dtype.itemsize) if a.itemsize != b.itemsize else DTYPES["float32"]


def as_float32(values: Array) -> NDArray[np.float32]:
    """Convert to float32; no copy if the values are float32 already."""
    return values.astype(np.float32, copy=False)


def raw_bytes(values: Array) -> NDArray[np.uint8]:
    """The bytes of an array in row-major order; a view if it is contiguous."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
