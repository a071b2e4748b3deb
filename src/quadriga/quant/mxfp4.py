"""MXFP4: 32 consecutive numbers of 4 bits (E2M1) under one scale of 8 bits (E8M0).

    w = E2M1[code] * 2^(scale - 127)        code: sign, two bits of exponent, one of mantissa; a scale of 255 is NaN

Source: OCP Microscaling Formats v1.0, sections 5.3.3, 5.4.1 and 6.1. Every number is one of bfloat16's. The same 16
bytes of codes come in two orders:

    pairs    byte j holds elements 2 j (low nibble) and 2 j + 1         gpt-oss's safetensors; scales in another tensor
    halves   byte j holds elements j (low nibble) and j + 16 (high)     GGUF's block type 39; the scale's byte before

Nothing here knows a file.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quadriga.errors import CheckpointError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

BLOCK = 32
"""Numbers under one scale."""

E2M1: Floats = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
"""The number of each code; code 8 is negative zero."""


def _scales() -> Floats:
    exponents = np.arange(256) - 127
    scales = np.ldexp(np.float32(1), exponents, where=exponents < 128, out=np.full(256, np.nan, dtype=np.float32))
    return scales.astype(np.float32)


_E8M0 = _scales()
_BYTES = np.arange(256, dtype=np.uint8)
_PAIRS = np.stack((E2M1[_BYTES & 15], E2M1[_BYTES >> 4]), axis=-1)
"""The two numbers of a byte, low nibble first."""
_WHOLE_PAIRS = (2 * _PAIRS).astype(np.int8)
_LEAST, _GREATEST = 128 - 24, 128 + 15
"""Scales whose half is one of float16's powers."""


def powers(scales: Bytes) -> Floats:
    """2^(scale - 127) of every byte; 255 is NaN."""
    return _E8M0[scales]


def pairs(codes: Bytes) -> Floats:
    """The numbers of codes that lie in pairs: (..., n) uint8 -> (..., 2 n) float32."""
    return _PAIRS.view(np.uint64)[:, 0][codes].view(np.float32)  # one look-up of eight bytes


def halves_of_pairs(codes: Bytes) -> Bytes:
    """The same codes in the other order: (..., 16) uint8 in pairs -> (..., 16) in halves."""
    one_by_one = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*codes.shape[:-1], BLOCK)
    halves: Bytes = one_by_one[..., : BLOCK // 2] | one_by_one[..., BLOCK // 2 :] << np.uint8(4)
    return halves


def from_pairs(codes: Bytes, scales: Bytes) -> Floats:
    """Numbers whose codes lie in pairs.

    Args:
        codes: (..., 16) uint8.
        scales: (...) uint8.

    Returns:
        (..., 32) float32. 6 * 2^127 and 4 * 2^127, 3 and 2, are beyond float32 and infinite.
    """
    values = pairs(codes)
    with np.errstate(over="ignore"):
        values *= _E8M0[scales][..., None]
    return values


def from_halves(codes: Bytes, scales: Bytes) -> Floats:
    """Numbers whose codes lie in halves; see :func:`from_pairs`."""
    with np.errstate(over="ignore"):
        low, high = _PAIRS[codes][..., 0], _PAIRS[codes][..., 1]
        return np.concatenate((low, high), axis=-1) * _E8M0[scales][..., None]


def dequantize_blocks(blocks: Bytes) -> Floats:
    """GGUF's blocks of 17 bytes, scale first: (n, 17) uint8 -> (n, 32) float32. ggml has no negative zero."""
    return from_halves(blocks[:, 1:], blocks[:, 0]) + np.float32(0)


def as_mx4(codes: Bytes, scales: Bytes) -> Bytes | None:
    """What the packed format mx4 keeps of codes in pairs: half of every scale as float16, and the codes.

    Args:
        codes: (n, 16) uint8.
        scales: (n,) uint8.

    Returns:
        (n, 18) uint8; None where float16 does not have half of some scale.
    """
    if ((scales < _LEAST) | (scales > _GREATEST)).any():
        return None
    blocks = np.empty((len(codes), 18), dtype=np.uint8)
    blocks[:, :2] = _steps()[scales][:, None].view(np.uint8)
    blocks[:, 2:] = codes
    return blocks


def _steps() -> NDArray[np.float16]:
    """Half of every scale, within float16's powers of two."""
    return np.ldexp(np.float16(1), np.clip(np.arange(256) - 128, -24, 15)).astype(np.float16)


def pairs_as_q8_0(codes: Bytes, scales: Bytes) -> Bytes:
    """The blocks of :func:`as_q8_0` from codes in pairs, without the numbers between.

    Args:
        codes: (n, 16) uint8.
        scales: (n,) uint8.

    Returns:
        (n, 34) uint8.

    Raises:
        CheckpointError: see :func:`as_q8_0`.
    """
    blocks = np.empty((len(codes), 34), dtype=np.uint8)
    blocks[:, :2] = _steps()[scales][:, None].view(np.uint8)
    blocks[:, 2:] = _WHOLE_PAIRS.view(np.uint16)[:, 0][codes].view(np.uint8)
    others = np.flatnonzero((scales < _LEAST) | (scales > _GREATEST))
    if others.size:
        blocks[others] = as_q8_0(from_pairs(codes[others], scales[others]))
    return blocks


def as_q8_0(values: Floats) -> Bytes:
    """MXFP4 numbers as blocks of GGUF's q8_0, int8 under a float16 scale, without loss where the scale allows it.

    Under a scale of 2^e the numbers are whole multiples of 2^(e - 1), 12 of them at most. A block whose step is below
    float16's least, 2^-24, is rounded to whole multiples of that; above its greatest power, 2^15, the integers grow,
    up to 127.

    Args:
        values: (..., 32) float32, each last axis the numbers of one block.

    Returns:
        (n, 34) uint8.

    Raises:
        CheckpointError: a number is NaN, or beyond 127 * 2^15.
    """
    rows = values.reshape(-1, BLOCK)
    largest = np.abs(rows).max(axis=1, initial=0)
    if not (largest <= 127 * 2.0**15).all():
        raise CheckpointError(
            f"a weight of {float(largest.max()):g} does not fit q8, whose largest number here is 4161536. "
            "Choose bfloat16 or float32."
        )
    _, exponents = np.frexp(largest)  # largest = m 2^exponent, 1/2 <= m < 1, and 16 m is 12 at most
    steps = np.clip(exponents - 4, -24, 15)
    blocks = np.empty((len(rows), 34), dtype=np.uint8)
    blocks[:, :2] = np.ldexp(np.float16(1), steps)[:, None].view(np.uint8)
    blocks[:, 2:] = np.rint(np.ldexp(rows, -steps[:, None])).astype(np.int8).view(np.uint8)
    return blocks
