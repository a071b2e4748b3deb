"""A table of the formats of stored weights: plain dtypes and block formats.

A block format stores ``block`` consecutive elements of a row in ``nbytes`` bytes: one or two scales and small integers.
Field order and meaning are ggml's (ggml-common.h in ggml-org/ggml); ``quant.codec`` has the reference code.

    q8_0  d:f16, q:i8[32]                      w = d q
    q4_0  d:f16, q:u4[32]                      w = d (q - 8)          nibbles: low half = elements 0..15
    q4_1  d:f16, m:f16, q:u4[32]               w = d q + m
    q5_0  d:f16, high:u1[32], q:u4[32]         w = d (q - 16)
    q5_1  d:f16, m:f16, high:u1[32], q:u4[32]  w = d q + m
    q2_k .. q6_k  256 elements in 8 or 16 sub-blocks, each with its own small integer scale (and minimum)
    q8_k          d:f32, q:i8[256], sums               w = d q
    tq1_0, tq2_0  -1, 0 and 1, five or four a byte     w = d t
    iq4_nl, iq4_xs, mxfp4, nvfp4  sixteen uneven values of four bits, with one scale or several
    iq1_s .. iq3_s  indices of codebooks, see ``quant.codebook_blocks``
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Format:
    """How the elements of a stored tensor are encoded."""

    name: str
    ggml_type: int
    """The type number in GGUF files."""
    block: int
    """Elements per block; rows consist of whole blocks."""
    nbytes: int
    """Bytes per block."""

    @property
    def bits(self) -> float:
        """Bits per element, including scales."""
        return 8.0 * self.nbytes / self.block

    def nbytes_of(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape, whose rows must be whole blocks."""
        return prod(shape) // self.block * self.nbytes


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("float32", 0, 1, 4),
        Format("float16", 1, 1, 2),
        Format("q4_0", 2, 32, 18),
        Format("q4_1", 3, 32, 20),
        Format("q5_0", 6, 32, 22),
        Format("q5_1", 7, 32, 24),
        Format("q8_0", 8, 32, 34),
        Format("q2_k", 10, 256, 84),
        Format("q3_k", 11, 256, 110),
        Format("q4_k", 12, 256, 144),
        Format("q5_k", 13, 256, 176),
        Format("q6_k", 14, 256, 210),
        Format("q8_k", 15, 256, 292),
        Format("iq2_xxs", 16, 256, 66),
        Format("iq2_xs", 17, 256, 74),
        Format("iq3_xxs", 18, 256, 98),
        Format("iq1_s", 19, 256, 50),
        Format("iq4_nl", 20, 32, 18),
        Format("iq3_s", 21, 256, 110),
        Format("iq2_s", 22, 256, 82),
        Format("iq4_xs", 23, 256, 136),
        Format("float64", 28, 1, 8),
        Format("iq1_m", 29, 256, 56),
        Format("bfloat16", 30, 1, 2),
        Format("tq1_0", 34, 256, 54),
        Format("tq2_0", 35, 256, 66),
        Format("mxfp4", 39, 32, 17),
        Format("nvfp4", 40, 64, 36),
    )
}

UNREAD = {
    9: "Q8_1, which is for activations",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    **dict.fromkeys((31, 32, 33, 36, 37, 38), "a form that llama.cpp repacked for a processor (Q4_0_4_4 and its kin)"),
    41: "Q1_0",
}
"""Types of GGUF files that have a meaning and are no weights here, for messages."""

BY_GGML_TYPE: dict[int, Format] = {f.ggml_type: f for f in FORMATS.values()}

PLAIN = ("float64", "float32", "float16", "bfloat16")
"""Formats without blocks; the names are those of torch's dtypes."""
