"""Dequantising the block formats of ``quant.formats`` that need no codebook: the readable statement of their layouts.

All functions take whole blocks, (n_blocks, bytes per block) uint8. A block's scale multiplies first by a sub-block's
and then by the number, in float32, as in ggml; codebooks' formats are in ``quant.codebook_blocks``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from quadriga.quant.codebooks import FOUR_BIT_VALUES

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


# Fields --------------------------------------------------------------------------------------------------------------


def half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte ``at`` of every block, as float32 (n, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def nibbles(packed: Bytes) -> NDArray[np.uint8]:
    """Unpack nibbles, (n, b) -> (n, 2b): all low ones, then all high ones."""
    return np.concatenate((packed & np.uint8(15), packed >> np.uint8(4)), axis=1)


def _fifth_bits(blocks: Bytes, at: int) -> NDArray[np.uint8]:
    """The fifth bits of 32 numbers (little-endian), as 0 or 16."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


# 32-element blocks ---------------------------------------------------------------------------------------------------


def _unpack_q8_0(blocks: Bytes) -> Floats:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * half(blocks, 0)


def _unpack_q4_0(blocks: Bytes) -> Floats:
    return (nibbles(blocks[:, 2:]).astype(np.float32) - 8) * half(blocks, 0)


def _unpack_q4_1(blocks: Bytes) -> Floats:
    return nibbles(blocks[:, 4:]).astype(np.float32) * half(blocks, 0) + half(blocks, 2)


def _unpack_q5_0(blocks: Bytes) -> Floats:
    return ((nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).astype(np.float32) - 16) * half(blocks, 0)


def _unpack_q5_1(blocks: Bytes) -> Floats:
    q = nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return q.astype(np.float32) * half(blocks, 0) + half(blocks, 2)


# 256-element blocks: 16 sub-blocks of 16 (q2_k, q3_k, q6_k) or 8 of 32 (q4_k, q5_k) -----------------------------------


def crumbs(packed: Bytes) -> NDArray[np.uint8]:
    """Unpack 2-bit numbers, (n, 64) -> (n, 256): each 32 bytes give four runs of 32, lowest bits first."""
    halves = packed.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    return (halves & np.uint8(3)).reshape(-1, 256)


def spread(per_subblock: Floats, length: int) -> Floats:
    """A value a sub-block, (n, s), as a value an element, (n, s * length)."""
    return np.repeat(per_subblock, length, axis=1)


def _unpack_q2_k(blocks: Bytes) -> Floats:
    scales, d, dmin = blocks[:, :16], half(blocks, 80), half(blocks, 82)
    scale = d * (scales & 15).astype(np.float32)
    minimum = dmin * (scales >> 4).astype(np.float32)
    return spread(scale, 16) * crumbs(blocks[:, 16:80]).astype(np.float32) - spread(minimum, 16)


def _unpack_q3_k(blocks: Bytes) -> Floats:
    high = np.unpackbits(blocks[:, :32, None], axis=2, bitorder="little")  # bit j of byte i: element 32 j + i
    third = high.transpose(0, 2, 1).reshape(-1, 256)
    low = crumbs(blocks[:, 32:96]).astype(np.int8)
    q = low - np.where(third == 1, 0, 4).astype(np.int8)  # if the high bit is 0, subtract 4
    packed = blocks[:, 96:108]
    low_scale = np.concatenate((packed[:, :8] & 15, packed[:, :8] >> 4), axis=1)  # (n, 16)
    top_two = (packed[:, None, 8:] >> np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 4, 1)) & 3
    scales = (low_scale | top_two.reshape(-1, 16) << 4).astype(np.int8) - 32
    return spread(half(blocks, 108) * scales.astype(np.float32), 16) * q.astype(np.float32)


def scales_and_minima(packed: Bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Unpack 12 bytes to eight 6-bit scales and eight 6-bit minima, (n, 8) each."""
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate((a & 63, c & 15 | (a >> 6) << 4), axis=1)
    minima = np.concatenate((b & 63, c >> 4 | (b >> 6) << 4), axis=1)
    return scales, minima


def _affine_k(blocks: Bytes, q: NDArray[np.uint8]) -> Floats:
    scales, minima = scales_and_minima(blocks[:, 4:16])
    scale = half(blocks, 0) * scales.astype(np.float32)
    minimum = half(blocks, 2) * minima.astype(np.float32)
    return spread(scale, 32) * q.astype(np.float32) - spread(minimum, 32)


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
    q = (low & 15).reshape(-1, 256) | crumbs(blocks[:, 128:192]) << np.uint8(4)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return spread(half(blocks, 208) * scales, 16) * (q.astype(np.float32) - 32)


def _unpack_q8_k(blocks: Bytes) -> Floats:
    """The sums of 16 in the last 32 bytes follow from the numbers."""
    return np.ascontiguousarray(blocks[:, :4]).view(np.float32) * blocks[:, 4:260].view(np.int8).astype(np.float32)


# Ternary: -1, 0, 1 ---------------------------------------------------------------------------------------------------


def _trits(packed: Bytes, count: int) -> NDArray[np.int8]:
    """Digits of base 3, (n, b) -> (n, count * b), the first of every byte first: a byte is ceil(256 * 0.t0t1t2t3t4)."""
    powers = np.array([3**i for i in range(count)], dtype=np.uint8).reshape(1, count, 1)
    rest = packed[:, None, :] * powers  # modulo 256: the digits in front are gone
    return ((rest.astype(np.uint16) * 3) >> 8).astype(np.int8).reshape(len(packed), -1) - np.int8(1)


def _unpack_tq1_0(blocks: Bytes) -> Floats:
    runs = (_trits(blocks[:, :32], 5), _trits(blocks[:, 32:48], 5), _trits(blocks[:, 48:52], 4))
    return half(blocks, 52) * np.concatenate(runs, axis=1).astype(np.float32)


def _unpack_tq2_0(blocks: Bytes) -> Floats:
    return half(blocks, 64) * (crumbs(blocks[:, :64]).astype(np.int8) - np.int8(1)).astype(np.float32)


# Sixteen values of four bits -----------------------------------------------------------------------------------------

_TWICE_E2M1 = np.array((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), dtype=np.float32)
"""Twice the values of E2M1, so that they are whole; -0 is 0, as in ggml."""


def _unpack_iq4_nl(blocks: Bytes) -> Floats:
    return half(blocks, 0) * FOUR_BIT_VALUES[nibbles(blocks[:, 2:])].astype(np.float32)


def _unpack_iq4_xs(blocks: Bytes) -> Floats:
    low = np.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), axis=2).reshape(-1, 8)
    high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)
    scales = (low | (high.astype(np.uint8) & 3) << np.uint8(4)).astype(np.int8) - np.int8(32)
    q = nibbles(blocks[:, 8:].reshape(-1, 16)).reshape(-1, 256)
    return spread(half(blocks, 0) * scales.astype(np.float32), 32) * FOUR_BIT_VALUES[q].astype(np.float32)


def _unpack_mxfp4(blocks: Bytes) -> Floats:
    """OCP Microscaling Formats 1.0: a power of two (E8M0), E2M1 numbers. 255, NaN there, is 2^128, as in ggml."""
    e = blocks[:, :1].astype(np.uint32)
    half_of_power = np.where(e < 2, np.uint32(0x200000) << e, (e - np.uint32(1)) << np.uint32(23)).view(np.float32)
    return half_of_power * _TWICE_E2M1[nibbles(blocks[:, 1:])]


def _unpack_nvfp4(blocks: Bytes) -> Floats:
    """Four runs of 16, each with an E4M3 scale without a sign; 0x7f, NaN there, is 0, as in ggml."""
    code = blocks[:, :4]
    exponent, mantissa = (code >> 3 & 15).astype(np.int32), (code & 7).astype(np.float32)
    steps = np.where(exponent == 0, mantissa, mantissa + 8)
    half_of_scale = np.ldexp(steps, np.maximum(exponent, 1) - 11).astype(np.float32)  # 2^(e - 7) / 8, halved
    half_of_scale[code == 0x7F] = 0
    return spread(half_of_scale, 16) * _TWICE_E2M1[nibbles(blocks[:, 4:].reshape(-1, 8))].reshape(-1, 64)


UNPACK: dict[str, Callable[[Bytes], Floats]] = {
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
    "q8_k": _unpack_q8_k,
    "tq1_0": _unpack_tq1_0,
    "tq2_0": _unpack_tq2_0,
    "iq4_nl": _unpack_iq4_nl,
    "iq4_xs": _unpack_iq4_xs,
    "mxfp4": _unpack_mxfp4,
    "nvfp4": _unpack_nvfp4,
}
"""Format -> (n_blocks, bytes of a block) uint8 to (n_blocks, elements of a block) float32."""
