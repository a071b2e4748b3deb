"""Dequantising GGUF's IQ1, IQ2 and IQ3 formats, whose numbers are indices of a codebook (``quant.codebooks``).

256 weights a block, float16 d, and per sub-block a small scale s. Fields in the order of ggml's structs:

    iq2_xxs  d, 8 x (4 x u8 index, u32: 4 x 7 bits of signs, s in the top 4)      w = d (0.5 + s) / 4 * vector * signs
    iq2_xs   d, 32 x u16 (9 bits index, 7 of signs), 16 x u4 s                     the same
    iq2_s    d, 32 x u8 index, 32 x u8 signs, 32 x u2 high bits, 16 x u4 s         the same
    iq3_xxs  d, 64 x u8 index, 8 x u32 (4 x 7 bits of signs, s in the top 4)       w = d (0.5 + s) / 2 * vector * signs
    iq3_s    d, 64 x u8 index, 64 x u1 high bits, 32 x u8 signs, 8 x u4 s          w = d (1 + 2 s) * vector * signs
    iq1_s    d, 32 x u8 index, 8 x u16 (4 x 3 high bits, 3 of s, 1 of shift)       w = d (1 + 2 s) * (vector +- 1/8)
    iq1_m    32 x u8 index, 32 x u4 (3 high bits, 1 of shift), 4 x u16 (4 x 3 bits of s, 4 of d)   the same
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadriga.quant.blocks import Bytes, Floats, half, spread
from quadriga.quant.codebooks import codebook, even_signs


def _words(blocks: Bytes, start: int, stop: int, dtype: Any) -> NDArray[Any]:
    """Little-endian numbers in bytes [start, stop) of every block."""
    return np.ascontiguousarray(blocks[:, start:stop]).view(dtype)


def _low_first(packed: Bytes) -> NDArray[np.uint8]:
    """Nibbles in the order of their bytes, (n, b) -> (n, 2b)."""
    return np.stack((packed & 15, packed >> 4), axis=2).reshape(len(packed), -1)


def _vectors(name: str, index: NDArray[Any]) -> Floats:
    """The codebook's vectors one after the other, (n, 256)."""
    vectors: Floats = codebook(name)[index].reshape(len(index), -1).astype(np.float32)
    return vectors


def _signs(bits: NDArray[np.uint8]) -> Floats:
    """A bit a weight, 1 for minus: (n, 32) -> (n, 256)."""
    return 1 - 2 * np.unpackbits(bits, axis=1, bitorder="little").astype(np.float32)


def _seven_bit_signs(words: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Four times seven bits of signs in each word, (n, 8) -> (n, 32)."""
    sevens = words[:, :, None] >> np.array([0, 7, 14, 21], dtype=np.uint32) & 127
    signs: NDArray[np.uint8] = even_signs()[sevens.reshape(len(words), -1)]
    return signs


def _half_steps(d: Floats, s: NDArray[Any], factor: float) -> Floats:
    return d * (s.astype(np.float32) + np.float32(0.5)) * np.float32(factor)


def _odd_steps(d: Floats, s: NDArray[Any]) -> Floats:
    return d * (1 + 2 * s.astype(np.float32))


def _unpack_iq2_xxs(blocks: Bytes) -> Floats:
    words = _words(blocks, 2, 66, np.uint32).reshape(-1, 8, 2)
    index = np.ascontiguousarray(words[:, :, 0]).view(np.uint8)
    scale = _half_steps(half(blocks, 0), words[:, :, 1] >> 28, 0.25)
    return spread(scale, 32) * _vectors("iq2_xxs", index) * _signs(_seven_bit_signs(words[:, :, 1]))


def _unpack_iq2_xs(blocks: Bytes) -> Floats:
    words = _words(blocks, 2, 66, np.uint16)
    scale = _half_steps(half(blocks, 0), _low_first(blocks[:, 66:74]), 0.25)
    return spread(scale, 16) * _vectors("iq2_xs", words & 511) * _signs(even_signs()[words >> 9])


def _unpack_iq2_s(blocks: Bytes) -> Floats:
    high = blocks[:, 66:74, None] >> np.array([0, 2, 4, 6], dtype=np.uint8) & 3
    index = blocks[:, 2:34] | high.reshape(-1, 32).astype(np.uint16) << 8
    scale = _half_steps(half(blocks, 0), _low_first(blocks[:, 74:82]), 0.25)
    return spread(scale, 16) * _vectors("iq2_s", index) * _signs(blocks[:, 34:66])


def _unpack_iq3_xxs(blocks: Bytes) -> Floats:
    words = _words(blocks, 66, 98, np.uint32)
    scale = _half_steps(half(blocks, 0), words >> 28, 0.5)
    return spread(scale, 32) * _vectors("iq3_xxs", blocks[:, 2:66]) * _signs(_seven_bit_signs(words))


def _unpack_iq3_s(blocks: Bytes) -> Floats:
    high = np.unpackbits(blocks[:, 66:74], axis=1, bitorder="little")
    index = blocks[:, 2:66] | high.astype(np.uint16) << 8
    scale = _odd_steps(half(blocks, 0), _low_first(blocks[:, 106:110]))
    return spread(scale, 32) * _vectors("iq3_s", index) * _signs(blocks[:, 74:106])


def _shifted(vectors: Floats, minus: NDArray[np.bool_]) -> Floats:
    return vectors + np.where(minus, np.float32(-0.125), np.float32(0.125)).repeat(256 // minus.shape[1], axis=1)


def _unpack_iq1_s(blocks: Bytes) -> Floats:
    words = _words(blocks, 34, 50, np.uint16)
    high = (words[:, :, None] >> np.array([0, 3, 6, 9], dtype=np.uint16) & 7).reshape(-1, 32)
    vectors = _shifted(_vectors("iq1_s", blocks[:, 2:34] | high << 8), words >= 0x8000)
    return spread(_odd_steps(half(blocks, 0), words >> 12 & 7), 32) * vectors


def _unpack_iq1_m(blocks: Bytes) -> Floats:
    words = _words(blocks, 48, 56, np.uint16)
    d = (words >> 12 << np.array([0, 4, 8, 12], dtype=np.uint16)).sum(axis=1, dtype=np.uint16)
    s = (words[:, :, None] >> np.array([0, 3, 6, 9], dtype=np.uint16) & 7).reshape(-1, 16)
    nibbles = _low_first(blocks[:, 32:48])
    vectors = _vectors("iq1_m", blocks[:, :32] | (nibbles & 7).astype(np.uint16) << 8)
    scale = _odd_steps(d.view(np.float16).astype(np.float32)[:, None], s)
    return spread(scale, 16) * _shifted(vectors, nibbles >= 8)


UNPACK: dict[str, Callable[[Bytes], Floats]] = {
    "iq1_s": _unpack_iq1_s,
    "iq1_m": _unpack_iq1_m,
    "iq2_xxs": _unpack_iq2_xxs,
    "iq2_xs": _unpack_iq2_xs,
    "iq2_s": _unpack_iq2_s,
    "iq3_xxs": _unpack_iq3_xxs,
    "iq3_s": _unpack_iq3_s,
}
"""Format -> (n_blocks, bytes of a block) uint8 to (n_blocks, 256) float32."""
