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
def _per_group(plane, row, group, n_groups):
    """(rows, groups, 1) of a plane (all rows, n_groups); groups beyond it are its last, whose columns meet zeros."""
    where = row[:, None] * n_groups + tl.minimum(group, n_groups - 1)[None, :]
    return tl.load(plane + where)[:, :, None]


@triton.jit
def grouped_numbers(
    q, scales, minima, d, dmin, row, group, n_groups,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Codes q (ROWS, COLUMNS) as float32, whole groups of 32 columns.

    Args:
        row: (ROWS,) int64 over all experts' rows. group: (COLUMNS / 32,) number of each group in its row.
        n_groups: groups of 32 a row.
    """
    cut = tl.reshape(q, (ROWS, COLUMNS // 32, 32))
    scale = _per_group(scales, row, group, n_groups)
    if FORMAT == "q8":
        w = scale.to(tl.float32) * cut.to(tl.float32)
    elif FORMAT == "q4":
        w = scale.to(tl.float32) * (cut.to(tl.float32) - 8.0)
    elif FORMAT == "q4m":
        w = scale.to(tl.float32) * cut.to(tl.float32) + _per_group(minima, row, group, n_groups).to(tl.float32)
    elif FORMAT == "mxfp4":
        w = e8m0(scale) * e2m1(cut)
    else:
        tl.static_assert(FORMAT == "q4k", "a format of weights.GROUP")
        whole = n_groups // 8
        by = _per_group(d, row, group // 8, whole).to(tl.float32) * scale.to(tl.float32)
        less = _per_group(dmin, row, group // 8, whole).to(tl.float32)
        w = by * cut.to(tl.float32) - less * _per_group(minima, row, group, n_groups).to(tl.float32)
    return tl.reshape(w, (ROWS, COLUMNS))
