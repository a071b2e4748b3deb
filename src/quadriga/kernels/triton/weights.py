"""Weights on a GPU: the same numbers as on a disk or a CPU, in planes that a tile of any depth can read.

    format      codes (E, N, .)           scales                       w                                  bits a weight
    plain       (E, N, K) float                                        code                               16 or 32
    fp8         (E, N, K) e4m3 as uint8   float32 a 128 columns        d code                             8.25
    q8          (E, N, K) int8            float16 a 32 columns         d q                                8.5
    q8m         (E, N, K) int8            d and m, float16 a 32        d q + m                            9
    q4          (E, N, K/2) nibbles       float16 a 32 columns         d (q - 8)                          4.5
    q4m         (E, N, K/2) nibbles       d and m, float16 a 32        d q + m                            5
    mxfp4       (E, N, K/2) nibbles       E8M0 a 32 columns            2^(s - 127) E2M1[q]                4.25
    q4k         (E, N, K/2) nibbles       uint8 s and m a 32 columns,  d s q - dmin m                     4.625
                                          float16 d and dmin a 256
    k8          (E, N, K) int8            int8 s a 16 columns,         d s q                              8.5625
                                          float16 d a 256
    k8m         (E, N, K) int8            int8 s and m a 16 columns,   d s q - dmin m                     9.125
                                          float16 d and dmin a 256

K is padded to whole groups; what pads it is finite, and meets columns of x that are 0. **Nibbles**: of 64 columns, byte
j (0..31) holds column j in its low half and column j + 32 in its high one. So the low halves of any run of bytes, and
the high ones, are whole groups of 32 columns under one scale, and are multiplied as two tiles without moving a number.

k8 and k8m are GGUF's blocks of 256 columns whose codes are not of four bits, a byte each: Q6_K, Q3_K, IQ4_XS and Q5_K,
Q2_K. No number changes; they take more room than in the file. IQ4_NL's and Q5_0's numbers are q8's, Q5_1's q8m's.

Blocks of GGUF (q8_0, q4_0, q4_1, q4_k, mxfp4) become planes without loss, and so do the CPU's packed matrices
(``packed.from_packed``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quadriga.errors import CheckpointError
from quadriga.kernels.arrays import tensor
from quadriga.quant.blocks import Bytes, nibbles, scales_and_minima

GROUP = {
    "plain": 1, "fp8": 128, "q8": 64, "q8m": 64, "q4": 64, "q4m": 64, "mxfp4": 64, "q4k": 256, "k8": 256, "k8m": 256,
}  # fmt: skip
"""Format -> columns that K is padded to a multiple of."""

NIBBLES = ("q4", "q4m", "mxfp4", "q4k")
"""Formats of four bits."""

BITS = {
    "fp8": 8.25, "q8": 8.5, "q8m": 9.0, "q4": 4.5, "q4m": 5.0, "mxfp4": 4.25, "q4k": 4.625, "k8": 8.5625, "k8m": 9.125,
}  # fmt: skip
"""Bits a weight of the quantised formats."""


@dataclass(frozen=True)
class GroupedWeight:
    """A matrix (N, K) of each of E experts."""

    format: str
    codes: Tensor
    columns: int
    """K, without padding."""
    scales: Tensor | None = None
    """(E, N, groups of 32, or of 128 for fp8, of 16 for k8 and k8m)."""
    minima: Tensor | None = None
    """As scales: q8m's, q4m's, q4k's and k8m's."""
    d: Tensor | None = None
    """(E, N, groups of 256) float16: what scales of blocks of 256 are multiplied by, as their minima by ``dmin``."""
    dmin: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.format in GROUP and self.codes.ndim == 3 and self.codes.is_contiguous(), "planes of a known format"
        assert (self.format == "plain") == (self.scales is None), "scales go with codes"

    @property
    def n_experts(self) -> int:
        """E."""
        return self.codes.shape[0]

    @property
    def rows(self) -> int:
        """N: numbers that a product with one expert has."""
        return self.codes.shape[1]

    @property
    def planes(self) -> tuple[Tensor | None, ...]:
        """Codes, scales, minima, d, dmin."""
        return self.codes, self.scales, self.minima, self.d, self.dmin

    @property
    def pairs(self) -> tuple[Tensor | None, ...]:
        """The planes as kernels take them: of every 64 columns the scales, or minima, as one whole number."""

        def paired(plane: Tensor | None) -> Tensor | None:
            if plane is None or plane.dtype == torch.float32:  # fp8's
                return plane
            return plane.view(torch.int16 if plane.dtype == torch.uint8 else torch.int32)

        return self.codes, paired(self.scales), paired(self.minima), self.d, self.dmin

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(plane.nbytes for plane in self.planes if plane is not None)

    def expert(self, index: int) -> GroupedWeight:
        """One expert's matrix, as that of one expert."""
        codes, *others = (None if plane is None else plane[index : index + 1] for plane in self.planes)
        assert codes is not None, "every weight has codes"
        return GroupedWeight(self.format, codes, self.columns, *others)

    def to(self, device: torch.device | str) -> GroupedWeight:
        """The same planes on another device."""
        codes, *others = (None if plane is None else plane.to(device) for plane in self.planes)
        assert codes is not None, "every weight has codes"
        return GroupedWeight(self.format, codes, self.columns, *others)


def plain(weight: Tensor) -> GroupedWeight:
    """Numbers (E, N, K) as they are."""
    return GroupedWeight("plain", weight.contiguous(), weight.shape[2])


def empty(
    form: str,
    n_experts: int,
    rows: int,
    columns: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "meta",
) -> GroupedWeight:
    """Planes that nothing was written to; on the meta device, for ``launch.recording`` and sizes, no memory at all.

    Args:
        dtype: a plain one's.
    """
    padded = -(-columns // GROUP[form]) * GROUP[form]

    def plane(width: int, kind: torch.dtype) -> Tensor:
        return torch.empty(n_experts, rows, width, dtype=kind, device=device)

    half, byte, signed, groups = torch.float16, torch.uint8, torch.int8, padded // 32
    blocks = padded // 256
    match form:
        case "plain":
            return GroupedWeight(form, plane(columns, dtype), columns)
        case "fp8":
            return GroupedWeight(form, plane(padded, byte), columns, plane(padded // 128, torch.float32))
        case "q8":
            return GroupedWeight(form, plane(padded, signed), columns, plane(groups, half))
        case "q8m":
            return GroupedWeight(form, plane(padded, signed), columns, plane(groups, half), plane(groups, half))
        case "mxfp4":
            return GroupedWeight(form, plane(padded // 2, byte), columns, plane(groups, byte))
        case "q4":
            return GroupedWeight(form, plane(padded // 2, byte), columns, plane(groups, half))
        case "q4m":
            return GroupedWeight(form, plane(padded // 2, byte), columns, plane(groups, half), plane(groups, half))
        case "q4k":
            planes = [plane(groups, byte), plane(groups, byte), plane(blocks, half), plane(blocks, half)]
            return GroupedWeight(form, plane(padded // 2, byte), columns, *planes)
        case "k8":
            scales = plane(2 * groups, signed)
            return GroupedWeight(form, plane(padded, signed), columns, scales, d=plane(blocks, half))
    assert form == "k8m", f"a format of planes, not {form}"
    planes = [plane(2 * groups, signed), plane(2 * groups, signed), plane(blocks, half), plane(blocks, half)]
    return GroupedWeight(form, plane(padded, signed), columns, *planes)


def stacked(parts: Iterable[GroupedWeight], n: int, device: torch.device | str) -> GroupedWeight:
    """Weights of one expert each, of one shape and format, as one weight on a device.

    Args:
        parts: ``n`` of them; each is let go before the next is asked for.
    """
    made: GroupedWeight | None = None
    index = -1
    for index, part in enumerate(parts):
        if made is None:
            made = empty(part.format, n, part.rows, part.columns, dtype=part.codes.dtype, device=device)
        assert (made.format, made.rows, made.columns) == (part.format, part.rows, part.columns), (
            "matrices that are alike"
        )
        for plane, own in zip(made.planes, part.planes, strict=True):
            if plane is not None and own is not None:
                plane[index] = own[0]
    assert made is not None and index == n - 1, "as many matrices as were announced"
    return made


# From blocks of GGUF -------------------------------------------------------------------------------------------------


def _halves(blocks: Bytes, at: int) -> NDArray[np.float16]:
    """The float16 at byte ``at`` of every block: (n,)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)[:, 0]


def _pairs_of_32(q: Bytes) -> Bytes:
    """Codes below 16, (n, 32 * even) -> (n, 16 * even): the nibbles described above."""
    runs = q.reshape(len(q), -1, 2, 32)
    packed: Bytes = (runs[:, :, 0] | runs[:, :, 1] << np.uint8(4)).reshape(len(q), -1)
    return packed


def from_blocks(source: str, blocks: Bytes, n_experts: int, rows: int, columns: int) -> GroupedWeight:
    """Rows of GGUF's blocks as planes, without loss.

    Args:
        source: q8_0, q4_0, q4_1, mxfp4 or q4_k.
        blocks: (n_experts * rows * columns / numbers of a block, bytes of a block) uint8.

    Raises:
        CheckpointError: a scale that is NaN (mxfp4).
    """
    n = n_experts * rows

    def plane(values: NDArray[np.generic]) -> Tensor:
        return tensor(values.reshape(n_experts, rows, -1))

    def by_row(codes: Bytes) -> Bytes:
        """(blocks, 32) codes as (n, K), padded to whole pairs of groups with ``codes``' own last zeros."""
        whole = codes.reshape(n, -1)
        return np.pad(whole, ((0, 0), (0, -whole.shape[1] % 64)))

    def per_32(values: NDArray[np.generic]) -> Tensor:
        groups = values.reshape(n, -1)
        return plane(np.pad(groups, ((0, 0), (0, groups.shape[1] % 2))))

    match source:
        case "q8_0":
            codes = by_row(np.ascontiguousarray(blocks[:, 2:]))
            return GroupedWeight("q8", plane(codes.view(np.int8)), columns, per_32(_halves(blocks, 0)))
        case "q4_0":
            codes = _pairs_of_32(by_row(nibbles(blocks[:, 2:])))
            return GroupedWeight("q4", plane(codes), columns, per_32(_halves(blocks, 0)))
        case "q4_1":
            codes = _pairs_of_32(by_row(nibbles(blocks[:, 4:])))
            scales, minima = per_32(_halves(blocks, 0)), per_32(_halves(blocks, 2))
            return GroupedWeight("q4m", plane(codes), columns, scales, minima)
        case "mxfp4":
            if (blocks[:, 0] == 255).any():
                raise CheckpointError("scales of mxfp4 must be numbers; one is NaN (255). The file is damaged.")
            codes = _pairs_of_32(by_row(nibbles(blocks[:, 1:])))
            return GroupedWeight("mxfp4", plane(codes), columns, per_32(blocks[:, 0]))
        case "q4_k":
            scales_q, minima_q = scales_and_minima(blocks[:, 4:16])
            d, dmin = plane(_halves(blocks, 0)), plane(_halves(blocks, 2))
            return GroupedWeight(
                "q4k", plane(blocks[:, 16:144]), columns, plane(scales_q), plane(minima_q), d, dmin
            )  # its nibbles lie as here
    raise AssertionError(f"blocks of {source} have no planes")


def from_fp8(codes: Tensor, scales: Tensor) -> GroupedWeight:
    """e4m3 codes (E, N, K) float8_e4m3fn under float32 scales (E, N, ceil(K / 128)).

    Raises:
        CheckpointError: a code that is NaN.
    """
    raw = codes.view(torch.uint8)
    if ((raw & 0x7F) == 0x7F).any():
        raise CheckpointError("weights of fp8 must be numbers; one is NaN. The file is damaged.")
    columns = codes.shape[2]
    padded = torch.nn.functional.pad(raw, (0, -columns % GROUP["fp8"])).contiguous()
    return GroupedWeight("fp8", padded, columns, scales.float().contiguous())
