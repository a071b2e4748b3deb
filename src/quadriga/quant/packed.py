"""Packed formats: the memory layouts of matrices for the CPU kernels, as a table. Imports no torch.

A packed matrix consists of tiles of 16 rows, drawn in ``kernels/cpu/csrc/layout.hpp``. Columns are padded with zeros to
whole groups, so any shape can be packed. The sizes are stated there too; ``tests/ops/test_bindings.py`` compares them.

    float32   16 rows x 1 column per line
    bfloat16  16 rows x 2 columns per line
    q8        groups of 32 columns, one float16 scale each: w = d q,        q in -128..127    8.5 bits per weight
    q4        the same:                                     w = d (q - 8),  q in 0..15        4.5 bits
    q4m       with a minimum:                               w = d q + m,    q in 0..15        5 bits
    mx4       as q4, of MXFP4's numbers:                    w = d k,        k in 0 1 2 3 4 6 8 12, +-   4.5 bits
    iq4nl     as q4, of IQ4_NL's sixteen uneven numbers                                                 4.5 bits
    q5, q5m   as q4 and q4m, of five bits: d (q - 16) and d q + m, q in 0..31           5.5 and 6 bits
    q2k, q3k, q4k, q5k, q6k, iq4xs   GGUF's blocks of 256 columns of these names, a byte for each scale and minimum:
                                                                       2.625, 3.625, 4.625, 5.625, 6.625, 4.375 bits

MXFP4 becomes mx4 without loss, as long as half its scales are float16's: d is a power of two, 2^-24 to 2^15.
Blocks of the formats of ``FROM_GGUF`` are converted without loss.
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
        PackedFormat("iq4nl", 64, 576),
        PackedFormat("q5", 64, 704),
        PackedFormat("q5m", 64, 768),
        PackedFormat("q2k", 256, 1344),
        PackedFormat("q3k", 256, 1856),
        PackedFormat("q4k", 256, 2368),
        PackedFormat("q5k", 256, 2880),
        PackedFormat("q6k", 256, 3392),
        PackedFormat("iq4xs", 256, 2240),
    )
}

OF_BLOCKS = {
    "iq4nl": "iq4_nl", "q5": "q5_0", "q5m": "q5_1",
    "q2k": "q2_k", "q3k": "q3_k", "q4k": "q4_k", "q5k": "q5_k", "q6k": "q6_k", "iq4xs": "iq4_xs",
}  # fmt: skip
"""Packed formats that are made of a file's blocks only: numbers become such blocks first (``quant.codec.quantize``)."""

FROM_GGUF = {"q8_0": "q8", "q4_0": "q4", "q4_1": "q4m"} | {block: form for form, block in OF_BLOCKS.items()}
"""Block format of a file -> the packed format that stores its blocks without loss."""

QUANTISED = ("q8", "q4", "q4m", "mx4", *OF_BLOCKS)
"""Packed formats whose weights are integers with scales."""

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
