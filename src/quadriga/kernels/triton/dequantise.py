"""Tiles of planes (``weights.GroupedWeight``) as numbers, inside a kernel: float32, exact, then rounded to what x is.

Powers of two are made from bits: a code's exponent and mantissa are moved to where float16 or float32 has its own.
"""

import triton
import triton.language as tl


@triton.jit
def e4m3(code):
    """uint8 -> float32: sign, four bits of exponent, three of mantissa, as a float16 2^8 times too small."""
    bits = code.to(tl.uint16)
    small = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return small.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def e2m1(code):
    """Codes 0..15 -> float32: sign, two bits of exponent, one of mantissa, as a float16 2^14 times too small."""
    bits = code.to(tl.uint16)
    small = ((bits & 8) << 12) | ((bits & 7) << 9)
    return small.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def e8m0(code):
    """uint8 -> float32: 2^(code - 127); the least, 2^-127, is half of float32's least normal power."""
    bits = code.to(tl.uint32)
    return tl.where(bits == 0, 0x400000, bits << 23).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _two_halves(word):
    """Two float16 that lie in an int32, the first in its low half, as float32."""
    low = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, ((word >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scales_of_64(scales, minima, d, dmin, row, first, n_groups, FORMAT: tl.constexpr):
    """(scale, minimum, scale, minimum), (rows,) float32 each: of 32 columns from ``first`` on, and of the 32 behind.

    Two scales are read as one number, for small reads are what a GPU cannot fetch ahead of their use.

    Args:
        scales, minima: two float16 as int32, or two uint8 as int16; see ``weights.GroupedWeight.pairs``.
        row: (rows,) int64 over all experts' rows. n_groups: groups of 32 a row.
    """
    where = row * (n_groups // 2) + first // 64
    word = tl.load(scales + where)
    low_least, high_least = 0.0, 0.0
    if FORMAT == "mxfp4":
        low, high = e8m0(word & 255), e8m0((word >> 8) & 255)
    elif FORMAT == "q4k":
        whole = row * (n_groups // 8) + first // 256
        by, less = tl.load(d + whole).to(tl.float32), -tl.load(dmin + whole).to(tl.float32)
        least = tl.load(minima + where)
        low, high = by * (word & 255).to(tl.float32), by * ((word >> 8) & 255).to(tl.float32)
        low_least, high_least = less * (least & 255).to(tl.float32), less * ((least >> 8) & 255).to(tl.float32)
    else:
        low, high = _two_halves(word)
        if FORMAT == "q4m" or FORMAT == "q8m":
            low_least, high_least = _two_halves(tl.load(minima + where))
    return low, low_least, high, high_least


@triton.jit
def numbers(q, scale, least, FORMAT: tl.constexpr):
    """Codes q (rows, 32) under scales and minima (rows,) as float32."""
    if FORMAT == "q4":
        w = scale[:, None] * (q.to(tl.float32) - 8.0)
    elif FORMAT == "mxfp4":
        w = scale[:, None] * e2m1(q)
    else:
        tl.static_assert(FORMAT == "q4m" or FORMAT == "q4k", "a format of four bits")
        w = scale[:, None] * q.to(tl.float32) + least[:, None]
    return w


@triton.jit
def numbers_of_bytes(q, scales, minima, row, first, n_groups, FORMAT: tl.constexpr):
    """Codes q (rows, 64) of q8 and q8m from column ``first`` on, as float32; arguments as for ``scales_of_64``."""
    low, low_least, high, high_least = scales_of_64(scales, minima, None, None, row, first, n_groups, FORMAT)
    is_low = (tl.arange(0, 64) < 32)[None, :]
    w = tl.where(is_low, low[:, None], high[:, None]) * q.to(tl.float32)
    if FORMAT == "q8m":
        w += tl.where(is_low, low_least[:, None], high_least[:, None])
    return w


@triton.jit
def _four_bytes(plane, where, part):
    """The signed byte of every column: words of four at ``where`` (rows,), ``part`` (columns,) which of the four."""
    word = tl.load(plane + where)
    return ((word[:, None] << (24 - 8 * part)[None, :]) >> 24).to(tl.float32)


@triton.jit
def numbers_of_blocks(q, scales, minima, d, dmin, row, first, n_groups, FORMAT: tl.constexpr, DEPTH: tl.constexpr):
    """Codes q (rows, 64) of k8 and k8m from column ``first`` on, as float32.

    Args:
        scales, minima: four int8 as int32; see ``weights.GroupedWeight.pairs``.
        row: (rows,) int64 over all experts' rows. n_groups: groups of 16 a row.
    """
    tl.static_assert(DEPTH == 64, "four groups of columns a step")
    part = tl.arange(0, DEPTH) // 16
    where, whole = row * (n_groups // 4) + first // 64, row * (n_groups // 16) + first // 256
    w = tl.load(d + whole).to(tl.float32)[:, None] * _four_bytes(scales, where, part) * q.to(tl.float32)
    if FORMAT == "k8m":
        w -= tl.load(dmin + whole).to(tl.float32)[:, None] * _four_bytes(minima, where, part)
    return w
