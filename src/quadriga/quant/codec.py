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
from quadriga.quant.formats import FORMATS

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def dequantize(raw: Bytes, name: str) -> Floats:
    """Dequantise whole blocks.

    Args:
        raw: uint8 of any shape; a whole number of blocks.
        name: a block format of ``quant.formats``.

    Returns:
        float32 (n_blocks * elements per block,).
    """
    spec = FORMATS[name]
    blocks = raw.reshape(-1, spec.nbytes)
    with np.errstate(invalid="ignore", over="ignore"):
        return _UNPACK[name](blocks).reshape(-1)


def quantize(values: Floats, name: str) -> Bytes:
    """Quantise float32 values, row-major in whole blocks, with the rounding of ggml's reference quantiser.

    Returns:
        uint8 (n_blocks * bytes per block,).

    Raises:
        CheckpointError: a value is NaN or infinite, or so large that its block's scale or minimum is beyond float16.
    """
    spec = FORMATS[name]
    blocks = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, spec.block)
    return _PACK[name](blocks).reshape(-1)


# Fields --------------------------------------------------------------------------------------------------------------


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte ``at`` of every block, as float32 (n, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> NDArray[np.uint8]:
    """Unpack nibbles, (n, b) -> (n, 2b): all low ones, then all high ones."""
    return np.concatenate((packed & np.uint8(15), packed >> np.uint8(4)), axis=1)


def _fifth_bits(blocks: Bytes, at: int) -> NDArray[np.uint8]:
    """The fifth bits of 32 numbers (little-endian), as 0 or 16."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


# 32-element blocks ---------------------------------------------------------------------------------------------------


def _unpack_q8_0(blocks: Bytes) -> Floats:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks, 0)


def _unpack_q4_0(blocks: Bytes) -> Floats:
    return (_nibbles(blocks[:, 2:]).astype(np.float32) - 8) * _half(blocks, 0)


def _unpack_q4_1(blocks: Bytes) -> Floats:
    return _nibbles(blocks[:, 4:]).astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _unpack_q5_0(blocks: Bytes) -> Floats:
    return ((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).astype(np.float32) - 16) * _half(blocks, 0)


def _unpack_q5_1(blocks: Bytes) -> Floats:
    q = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return q.astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


# 256-element blocks: 16 sub-blocks of 16 (q2_k, q3_k, q6_k) or 8 of 32 (q4_k, q5_k) -----------------------------------


def _crumbs(packed: Bytes) -> NDArray[np.uint8]:
    """Unpack 2-bit numbers, (n, 64) -> (n, 256): each 32 bytes give four runs of 32, lowest bits first."""
    halves = packed.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    return (halves & np.uint8(3)).reshape(-1, 256)


def _spread(per_subblock: Floats, length: int) -> Floats:
    return np.repeat(per_subblock, length, axis=1)


def _unpack_q2_k(blocks: Bytes) -> Floats:
    scales, d, dmin = blocks[:, :16], _half(blocks, 80), _half(blocks, 82)
    scale = d * (scales & 15).astype(np.float32)
    minimum = dmin * (scales >> 4).astype(np.float32)
    return _spread(scale, 16) * _crumbs(blocks[:, 16:80]).astype(np.float32) - _spread(minimum, 16)


def _unpack_q3_k(blocks: Bytes) -> Floats:
    high = np.unpackbits(blocks[:, :32, None], axis=2, bitorder="little")  # bit j of byte i: element 32 j + i
    third = high.transpose(0, 2, 1).reshape(-1, 256)
    low = _crumbs(blocks[:, 32:96]).astype(np.int8)
    q = low - np.where(third == 1, 0, 4).astype(np.int8)  # if the high bit is 0, subtract 4
    packed = blocks[:, 96:108]
    low_scale = np.concatenate((packed[:, :8] & 15, packed[:, :8] >> 4), axis=1)  # (n, 16)
    top_two = (packed[:, None, 8:] >> np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 4, 1)) & 3
    scales = (low_scale | top_two.reshape(-1, 16) << 4).astype(np.int8) - 32
    return _spread(_half(blocks, 108) * scales.astype(np.float32), 16) * q.astype(np.float32)


def _scales_and_minima(packed: Bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Unpack 12 bytes to eight 6-bit scales and eight 6-bit minima, (n, 8) each."""
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate((a & 63, c & 15 | (a >> 6) << 4), axis=1)
    minima = np.concatenate((b & 63, c >> 4 | (b >> 6) << 4), axis=1)
    return scales, minima


def _affine_k(blocks: Bytes, q: NDArray[np.uint8]) -> Floats:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scale = _half(blocks, 0) * scales.astype(np.float32)
    minimum = _half(blocks, 2) * minima.astype(np.float32)
    return _spread(scale, 32) * q.astype(np.float32) - _spread(minimum, 32)


def _nibble_runs(packed: Bytes) -> NDArray[np.uint8]:
    """Unpack nibbles, (n, 128) -> (n, 256): each 32 bytes give 32 low nibbles, then 32 high nibbles."""
    runs = packed.reshape(-1, 4, 1, 32) >> np.array([0, 4], dtype=np.uint8).reshape(1, 1, 2, 1)
    return (runs & np.uint8(15)).reshape(-1, 256)


def _unpack_q4_k(blocks: Bytes) -> Floats:
    return _affine_k(blocks, _nibble_runs(blocks[:, 16:144]))


def _unpack_q5_k(blocks: Bytes) -> Floats:
    high = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little")  # bit j of byte i: element 32 j + i
    fifth = high.transpose(0, 2, 1).reshape(-1, 256) << np.uint8(4)
    return _affine_k(blocks, _nibble_runs(blocks[:, 48:176]) | fifth)


def _unpack_q6_k(blocks: Bytes) -> Floats:
    low = blocks[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], dtype=np.uint8).reshape(1, 1, 2, 1)
    q = (low & 15).reshape(-1, 256) | _crumbs(blocks[:, 128:192]) << np.uint8(4)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return _spread(_half(blocks, 208) * scales, 16) * (q.astype(np.float32) - 32)


_UNPACK: dict[str, Callable[[Bytes], Floats]] = {
    "q8_0": _unpack_q8_0,
    "q4_0": _unpack_q4_0,
    "q4_1": _unpack_q4_1,
    "q5_0": _unpack_q5_0,
    "q5_1": _unpack_q5_1,
    "q2_k": _unpack_q2_k,
    "q3_k": _unpack_q3_k,
    "q4_k": _unpack_q4_k,
    "q5_k": _unpack_q5_k,
    "q6_k": _unpack_q6_k,
}


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
