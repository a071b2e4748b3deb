"""Quantisers of the block formats with sub-blocks, of IQ4 and of MXFP4: our search (``quant.search``), ggml's layouts.

The layouts are those that ``quant.blocks`` reads, backwards. All functions take (blocks, elements) float32, weights
of the squared errors that broadcast to that, and who searches; they return (blocks, bytes) uint8.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from quadriga.errors import CheckpointError
from quadriga.quant.blocks import Bytes, Floats
from quadriga.quant.codebooks import FOUR_BIT_VALUES
from quadriga.quant.search import Affine, Levels, Search
from quadriga.quant.stored_half import as_half

_FOUR_BITS = Levels(FOUR_BIT_VALUES)
_2, _3, _4, _6, _15 = np.array((2, 3, 4, 6, 15), dtype=np.uint8)
"""Shifts and masks that keep bytes bytes."""
_E2M1 = np.array((0, 0.5, 1, 1.5, 2, 3, 4, 6), dtype=np.float32)


def _whole(first: int, last: int) -> Levels:
    return Levels(np.arange(first, last + 1, dtype=np.int8))


def _cut(values: Floats, length: int) -> Floats:
    """(n, elements) -> (n, sub-blocks, length); one weight for all stays one."""
    return values.reshape(len(values), -1, length) if values.shape[1] > 1 else values[:, :, None]


def _nibble_runs(q: NDArray[np.uint8], run: int) -> Bytes:
    """(n, elements) below 16 -> (n, elements / 2): low halves of ``run`` numbers, high ones of the next."""
    pairs = q.reshape(len(q), -1, 2, run)
    packed: Bytes = (pairs[:, :, 0] | pairs[:, :, 1] << _4).reshape(len(q), -1)
    return packed


def _crumb_runs(q: NDArray[np.uint8]) -> Bytes:
    """(n, 256) below 4 -> (n, 64): four runs of 32 to 32 bytes, the first in the lowest bits."""
    runs = q.reshape(len(q), 2, 4, 32)
    packed: Bytes = (runs[:, :, 0] | runs[:, :, 1] << _2 | runs[:, :, 2] << _4 | runs[:, :, 3] << _6).reshape(
        len(q), 64
    )
    return packed


def _bit_runs(bits: NDArray[np.uint8]) -> Bytes:
    """(n, 256) of 0 and 1 -> (n, 32): bit j of byte i is element 32 j + i."""
    return np.packbits(bits.reshape(-1, 8, 32), axis=1, bitorder="little")[:, 0]


def _bytes(values: Floats) -> NDArray[np.uint8]:
    return values.reshape(len(values), -1).astype(np.int16).astype(np.uint8)


def _pack_q2_k(x: Floats, weight: Floats, search: Search) -> Bytes:
    found = search.affine(_cut(x, 16), _cut(weight, 16), 3, 15)
    scales = _bytes(found.scales) | _bytes(found.minima) << _4
    return np.concatenate((scales, _crumb_runs(_bytes(found.q)), as_half(found.d), as_half(found.m)), axis=1)


def _pack_q3_k(x: Floats, weight: Floats, search: Search) -> Bytes:
    found = search.symmetric(_cut(x, 16), _cut(weight, 16), _whole(-4, 3), -32, 31)
    q, s = _bytes(found.values + 4), _bytes(found.scales + 32)
    low = s[:, :8] & _15 | (s[:, 8:] & _15) << _4
    high = (s.reshape(-1, 4, 4) >> _4 << np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]).sum(axis=1, dtype=np.uint8)
    return np.concatenate((_bit_runs(q >> _2), _crumb_runs(q & _3), low, high, as_half(found.d)), axis=1)


def _scales_and_minima(found: Affine) -> Bytes:
    s, m = _bytes(found.scales), _bytes(found.minima)
    a, b = s[:, :4] | s[:, 4:] >> _4 << _6, m[:, :4] | m[:, 4:] >> _4 << _6
    return np.concatenate((as_half(found.d), as_half(found.m), a, b, s[:, 4:] & _15 | (m[:, 4:] & _15) << _4), axis=1)


def _pack_q4_k(x: Floats, weight: Floats, search: Search) -> Bytes:
    found = search.affine(_cut(x, 32), _cut(weight, 32), 15, 63)
    return np.concatenate((_scales_and_minima(found), _nibble_runs(_bytes(found.q), 32)), axis=1)


def _pack_q5_k(x: Floats, weight: Floats, search: Search) -> Bytes:
    found = search.affine(_cut(x, 32), _cut(weight, 32), 31, 63)
    q = _bytes(found.q)
    return np.concatenate((_scales_and_minima(found), _bit_runs(q >> _4), _nibble_runs(q & _15, 32)), axis=1)


def _pack_q6_k(x: Floats, weight: Floats, search: Search) -> Bytes:
    found = search.symmetric(_cut(x, 16), _cut(weight, 16), _whole(-32, 31), -128, 127)
    q = _bytes(found.values + 32)
    return np.concatenate(
        (_nibble_runs(q & _15, 64), _crumb_runs(q >> _4), _bytes(found.scales), as_half(found.d)), axis=1
    )


def _pack_iq4_xs(x: Floats, weight: Floats, search: Search) -> Bytes:
    found = search.symmetric(_cut(x, 32), _cut(weight, 32), _FOUR_BITS, -32, 31)
    s, q = _bytes(found.scales + 32), _FOUR_BITS.index(found.values).reshape(-1, 256)
    high = (s.astype(np.uint16) >> np.uint16(4) << np.arange(0, 16, 2, dtype=np.uint16)).sum(axis=1, dtype=np.uint16)
    low = s[:, 0::2] & _15 | (s[:, 1::2] & _15) << _4
    return np.concatenate((as_half(found.d), high[:, None].view(np.uint8), low, _nibble_runs(q, 16)), axis=1)


def _pack_iq4_nl(x: Floats, weight: Floats, search: Search) -> Bytes:
    # One sub-block: d is its scale, of any sign.
    found = search.symmetric(_cut(x, 32), _cut(weight, 32), _FOUR_BITS, -1, 0)
    q = _FOUR_BITS.index(found.values).reshape(-1, 32)
    return np.concatenate((as_half(found.d * found.scales), _nibble_runs(q, 16)), axis=1)


def _pack_q4_0(x: Floats, weight: Floats, search: Search) -> Bytes:
    found = search.symmetric(_cut(x, 32), _cut(weight, 32), _whole(-8, 7), -1, 0)
    return np.concatenate((as_half(found.d * found.scales), _nibble_runs(_bytes(found.values + 8), 16)), axis=1)


def _pack_q4_1(x: Floats, weight: Floats, search: Search) -> Bytes:
    found = search.affine(_cut(x, 32), _cut(weight, 32), 15, 1)
    d, low = found.d * found.scales, -found.m * found.minima
    return np.concatenate((as_half(d), as_half(low), _nibble_runs(_bytes(found.q), 16)), axis=1)


def _five_bits(q: NDArray[np.uint8]) -> tuple[Bytes, Bytes]:
    """(n, 32) below 32 -> their fifth bits (n, 4), the first lowest; their nibbles (n, 16)."""
    return np.packbits(q >> _4, axis=1, bitorder="little"), _nibble_runs(q & _15, 16)


def _pack_q5_0(x: Floats, weight: Floats, search: Search) -> Bytes:
    found = search.symmetric(_cut(x, 32), _cut(weight, 32), _whole(-16, 15), -1, 0)
    q = _bytes(found.values + 16)
    return np.concatenate((as_half(found.d * found.scales), *_five_bits(q)), axis=1)


def _pack_q5_1(x: Floats, weight: Floats, search: Search) -> Bytes:
    found = search.affine(_cut(x, 32), _cut(weight, 32), 31, 1)
    d, low = found.d * found.scales, -found.m * found.minima
    return np.concatenate((as_half(d), as_half(low), *_five_bits(_bytes(found.q))), axis=1)


def _pack_mxfp4(x: Floats, weight: Floats, _: Search) -> Bytes:
    """The power of two that the largest number asks for, or a neighbour of it: whichever leaves the smallest error."""
    _, exponent = np.frexp(np.abs(x).max(axis=1, keepdims=True))
    size = np.abs(np.ldexp(x, -exponent))  # up to 1: squares of it overflow nowhere
    best, code = np.full((len(x), 1), np.inf, dtype=np.float32), np.zeros(x.shape, dtype=np.uint8)
    e = np.zeros((len(x), 1), dtype=np.uint8)
    for step in (-3, -2, -4):
        tried = np.clip(exponent + step, -127, 127)
        scale = np.ldexp(np.float32(1), tried - exponent)
        index = np.searchsorted((_E2M1[1:] + _E2M1[:-1]) / 2, size / scale)
        error = (weight * (size - scale * _E2M1[index]) ** 2).sum(axis=1, keepdims=True)
        better = error < best
        best = np.where(better, error, best)
        code = np.where(better, index + 8 * (np.signbit(x) & (index > 0)), code).astype(np.uint8)
        e = np.where(better, tried + 127, e).astype(np.uint8)
    return np.concatenate((e, _nibble_runs(code, 16)), axis=1)


PACK: dict[str, Callable[[Floats, Floats, Search], Bytes]] = {
    "q2_k": _pack_q2_k,
    "q3_k": _pack_q3_k,
    "q4_k": _pack_q4_k,
    "q5_k": _pack_q5_k,
    "q6_k": _pack_q6_k,
    "q5_0": _pack_q5_0,
    "q5_1": _pack_q5_1,
    "iq4_nl": _pack_iq4_nl,
    "iq4_xs": _pack_iq4_xs,
    "mxfp4": _pack_mxfp4,
}
"""Quantisers by format."""


WEIGHED: dict[str, Callable[[Floats, Floats, Search], Bytes]] = {"q4_0": _pack_q4_0, "q4_1": _pack_q4_1}
"""Quantisers by a search, of formats that otherwise have ggml's rounding."""


def require_finite(x: Floats) -> None:
    """Refuse what no search can be led by.

    Raises:
        CheckpointError: a number is NaN or infinite.
    """
    if not np.isfinite(x).all():
        raise CheckpointError(
            f"weights to be quantised must be finite: got {x[~np.isfinite(x)][0]}. Check the source with another "
            "format, e.g. bfloat16."
        )
