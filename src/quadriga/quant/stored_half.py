"""Scales of blocks as they are stored, in float16, and what a quantiser divides by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quadriga.errors import CheckpointError

Floats = NDArray[np.float32]


def inverse(scale: Floats) -> Floats:
    """1 / scale, or 0 where scale is 0 or its inverse overflows; such a block is stored as zeros."""
    with np.errstate(divide="ignore", over="ignore"):
        result = np.float32(1) / scale
    return np.where(np.isinf(result), np.float32(0), result)


def as_half(scale: Floats) -> NDArray[np.uint8]:
    """Scales (n, k) as float16: (n, 2 k) bytes.

    Raises:
        CheckpointError: one is NaN, infinite or beyond float16.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        half = scale.astype(np.float16)
    if not np.isfinite(half).all():
        raise CheckpointError(
            "weights to be quantised must be finite, with scales and minima of blocks below 65520 (float16): got "
            f"{scale[~np.isfinite(half)][0]}. Check the source with another format, e.g. bfloat16."
        )
    return half.view(np.uint8)


def rounded(scale: Floats) -> Floats:
    """Scales as a reader will have them."""
    with np.errstate(over="ignore", invalid="ignore"):
        return scale.astype(np.float16).astype(np.float32)
