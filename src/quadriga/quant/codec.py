"""Quantise and dequantise block formats: the readable reference that the kernels are tested against.

Everything works on NumPy arrays of whole blocks, (n_blocks, bytes per block) uint8 <-> (n_blocks, elements per block)
float32. Scales are float16 on disk and multiply in float32, in the same order as in ggml, so that dequantising is
bit-exact to ggml. Inf or NaN scales of a broken file give Inf or NaN (Inf * 0 = NaN), never a finite number. Quantising
refuses values that a block cannot represent. Plain float formats are not blocks; they are cast.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from quadriga.errors import CheckpointError
from quadriga.quant import blocks, codebook_blocks
from quadriga.quant.blocks import Bytes, Floats
from quadriga.quant.formats import FORMATS

_UNPACK = blocks.UNPACK | codebook_blocks.UNPACK


def dequantize(raw: Bytes, name: str) -> Floats:
    """Dequantise whole blocks.

    Args:
        raw: uint8 of any shape; a whole number of blocks.
        name: a block format of ``quant.formats``.

    Returns:
        float32 (n_blocks * elements per block,).
    """
    spec = FORMATS[name]
    with np.errstate(invalid="ignore", over="ignore"):
        return _UNPACK[name](raw.reshape(-1, spec.nbytes)).reshape(-1)


def quantize(values: Floats, name: str) -> Bytes:
    """Quantise float32 values, row-major in whole blocks, with the rounding of ggml's reference quantiser.

    Returns:
        uint8 (n_blocks * bytes per block,).

    Raises:
        CheckpointError: a value is NaN or infinite, or so large that its block's scale or minimum is beyond float16.
    """
    spec = FORMATS[name]
    return _PACK[name](np.ascontiguousarray(values, dtype=np.float32).reshape(-1, spec.block)).reshape(-1)


# Packing -------------------------------------------------------------------------------------------------------------


def _inverse(scale: Floats) -> Floats:
    """1 / scale, or 0 where scale is 0 or its inverse overflows; such a block is stored as zeros."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    return np.where(np.isinf(inverse), np.float32(0), inverse)


def _as_half(scale: Floats) -> Bytes:
    with np.errstate(over="ignore", invalid="ignore"):
        half = scale.astype(np.float16)
    if not np.isfinite(half).all():
        raise CheckpointError(
            "weights to be quantised must be finite, with scales and minima of blocks below 65520 (float16): got "
            f"{scale[~np.isfinite(half)][0]}. Check the source with another format, e.g. bfloat16."
        )
    return half.view(np.uint8)


def _round_half_away(values: Floats) -> Floats:
    """Round like C's roundf. Truncating x + 0.5 would round 0.49999997 to 1, and NumPy's rint rounds halves to even."""
    whole = np.trunc(values)
    return whole + np.trunc(2 * (values - whole))


def _pack_q8_0(blocks: Floats) -> Bytes:
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scale = _as_half(d)
    q = _round_half_away(blocks * _inverse(d)).astype(np.int8)
    return np.concatenate((scale, q.view(np.uint8)), axis=1)


def _pack_nibbles(q: NDArray[np.uint8]) -> Bytes:
    return q[:, :16] | q[:, 16:] << np.uint8(4)


def _pack_q4_0(blocks: Floats) -> Bytes:
    largest = np.abs(blocks).argmax(axis=1)[:, None]
    # The value furthest from zero becomes exactly -8, which keeps its sign and uses the whole range.
    d = np.take_along_axis(blocks, largest, axis=1) / np.float32(-8)
    scale = _as_half(d)
    q = (blocks * _inverse(d) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    return np.concatenate((scale, _pack_nibbles(q)), axis=1)


def _pack_q4_1(blocks: Floats) -> Bytes:
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    with np.errstate(over="ignore", invalid="ignore"):
        d = (high - low) / np.float32(15)
    scale, minimum = _as_half(d), _as_half(low)
    q = ((blocks - low) * _inverse(d) + np.float32(0.5)).astype(np.uint8).clip(0, 15)
    return np.concatenate((scale, minimum, _pack_nibbles(q)), axis=1)


_PACK: dict[str, Callable[[Floats], Bytes]] = {"q8_0": _pack_q8_0, "q4_0": _pack_q4_0, "q4_1": _pack_q4_1}
"""Quantisers by format, for the formats that Quadriga writes."""
