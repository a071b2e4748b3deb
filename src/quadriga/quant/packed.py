"""Packed formats: how the CPU kernels want matrices to lie in memory. A literal table and its arithmetic, no torch.

A packed matrix is tiles of 16 rows; ``kernels/cpu/csrc/layout.hpp`` draws them. Columns are padded with zeros to
whole groups, so any shape can be packed. The sizes are stated there too; ``tests/ops/test_bindings.py`` holds both to
each other.

    float32   16 rows x 1 column a line
    bfloat16  16 rows x 2 columns a line
    q8        groups of 32 columns, one float16 scale each: w = d q,        q in -128..127    8.5 bits a weight
    q4        the same:                                     w = d (q - 8),  q in 0..15        4.5 bits
    q4m       with a minimum:                               w = d q + m,    q in 0..15        5 bits

GGUF's Q8_0, Q4_0 and Q4_1 blocks become q8, q4 and q4m without a number changing.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE = 16
"""Rows of a tile."""


@dataclass(frozen=True)
class PackedFormat:
    """One row of the table."""

    name: str
    columns: int
    """Columns a line group covers; rows are padded to whole ones."""
    nbytes: int
    """Bytes of one tile over ``columns`` columns."""

    @property
    def bits(self) -> float:
        """Bits a weight, scales included, padding not."""
        return 8.0 * self.nbytes / (TILE * self.columns)

    def nbytes_of(self, rows: int, cols: int) -> int:
        """Bytes of a packed matrix."""
        return -(-rows // TILE) * (-(-cols // self.columns)) * self.nbytes


PACKED: dict[str, PackedFormat] = {
    f.name: f
    for f in (
        PackedFormat("float32", 1, 64),
        PackedFormat("bfloat16", 2, 64),
        PackedFormat("q8", 64, 1088),
        PackedFormat("q4", 64, 576),
        PackedFormat("q4m", 64, 640),
    )
}

FROM_GGUF = {"q8_0": "q8", "q4_0": "q4", "q4_1": "q4m"}
"""Block format of a file -> the packed format that holds its blocks bit by bit."""

BLOCK_TOKENS = 16
"""Positions of a sequence that one block of the cache holds, in every layer."""

KV_FORMATS = ("float32", "bfloat16", "q8")
"""Formats of cached keys and values. q8: one float32 scale a token and head."""


def kv_block_bytes(kv_format: str, n_kv_heads: int, head_dim: int) -> int:
    """Bytes of one layer's keys and values for a block of 16 tokens."""
    padded = -(-head_dim // 16) * 16
    width = {"float32": 4, "bfloat16": 2, "q8": 1}[kv_format]
    one = 16 * width * (head_dim + padded) + (128 if kv_format == "q8" else 0)
    return n_kv_heads * (-(-one // 64) * 64)
