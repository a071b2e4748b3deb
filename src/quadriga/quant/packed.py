"""Packed formats: the memory layouts of matrices for the CPU kernels, as a table. Imports no torch.

A packed matrix consists of tiles of 16 rows, drawn in ``kernels/cpu/csrc/layout.hpp``. Columns are padded with zeros to
whole groups, so any shape can be packed. The sizes are stated there too; ``tests/ops/test_bindings.py`` compares them.

    float32   16 rows x 1 column per line
    bfloat16  16 rows x 2 columns per line
    q8        groups of 32 columns, one float16 scale each: w = d q,        q in -128..127    8.5 bits per weight
    q4        the same:                                     w = d (q - 8),  q in 0..15        4.5 bits
    q4m       with a minimum:                               w = d q + m,    q in 0..15        5 bits
    mx4       as q4, of MXFP4's numbers:                    w = d k,        k in 0 1 2 3 4 6 8 12, +-   4.5 bits

MXFP4 becomes mx4 without loss, as long as half its scales are float16's: d is a power of two, 2^-24 to 2^15.
GGUF's Q8_0, Q4_0 and Q4_1 blocks are converted to q8, q4 and q4m without loss.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE = 16
"""Rows per tile."""


@dataclass(frozen=True)
class PackedFormat:
    """The layout of one packed format."""

    name: str
    columns: int
    """Columns per group; rows are padded to whole groups."""
    nbytes: int
    """Bytes of one tile over ``columns`` columns."""

    @property
    def bits(self) -> float:
        """Bits per weight, including scales, without padding."""
        return 8.0 * self.nbytes / (TILE * self.columns)

    def nbytes_of(self, rows: int, cols: int) -> int:
        """Bytes of a packed matrix, including padding."""
        return -(-rows // TILE) * (-(-cols // self.columns)) * self.nbytes


PACKED: dict[str, PackedFormat] = {
    f.name: f
    for f in (
        PackedFormat("float32", 1, 64),
        PackedFormat("bfloat16", 2, 64),
        PackedFormat("q8", 64, 1088),
        PackedFormat("q4", 64, 576),
        PackedFormat("q4m", 64, 640),
        PackedFormat("mx4", 64, 576),
    )
}

FROM_GGUF = {"q8_0": "q8", "q4_0": "q4", "q4_1": "q4m"}
"""Block format of a file -> the packed format that stores its blocks without loss."""

BLOCK_TOKENS = 16
"""Positions per block of the KV cache, the same in every layer."""

KV_FORMATS = ("float32", "bfloat16", "q8")
"""Formats of cached keys and values. The cache's q8 has one float32 scale per token and head."""


def kv_block_bytes(kv_format: str, n_kv_heads: int, head_dim: int) -> int:
    """Bytes of one layer's keys and values for a block of BLOCK_TOKENS positions."""
    padded = -(-head_dim // 16) * 16
    width = {"float32": 4, "bfloat16": 2, "q8": 1}[kv_format]
    one = 16 * width * (head_dim + padded) + (128 if kv_format == "q8" else 0)
    return n_kv_heads * (-(-one // 64) * 64)


def latent_block_bytes(kv_format: str, rank: int, rope_dim: int) -> int:
    """Bytes of one layer's latents for a block of BLOCK_TOKENS positions; in q8 with two float32 scales each."""
    width = {"float32": 4, "bfloat16": 2, "q8": 1}[kv_format]
    return 16 * width * (rank + rope_dim) + (128 if kv_format == "q8" else 0)
