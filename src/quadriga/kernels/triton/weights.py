"""Experts' weights on a GPU: the same numbers as on a disk or a CPU, in planes that a tile of any depth can read.

    format      codes (E, N, .)           scales                       w                                  bits a weight
    plain       (E, N, K) float                                        code                               16 or 32
    fp8         (E, N, K) e4m3 as uint8   float32 a 128 columns        d code                             8.25
    q8          (E, N, K) int8            float16 a 32 columns         d q                                8.5
    q4          (E, N, K/2) nibbles       float16 a 32 columns         d (q - 8)                          4.5
    q4m         (E, N, K/2) nibbles       d and m, float16 a 32        d q + m                            5
    mxfp4       (E, N, K/2) nibbles       E8M0 a 32 columns            2^(s - 127) E2M1[q]                4.25
    q4k         (E, N, K/2) nibbles       uint8 s and m a 32 columns,  d s q - dmin m                     4.625
                                          float16 d and dmin a 256

K is padded to whole groups; what pads it is finite, and meets columns of x that are 0. **Nibbles**: of 64 columns, byte
j (0..31) holds column j in its low half and column j + 32 in its high one. So the low halves of any run of bytes, and
the high ones, are whole groups of 32 columns under one scale, and are multiplied as two tiles without moving a number.

Blocks of GGUF (q8_0, q4_0, q4_1, q4_k, mxfp4) become planes without loss, and so do the CPU's packed matrices q8, q4,
q4m, mx4 and q4k (``from_packed``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quadriga.errors import CheckpointError
from quadriga.kernels.arrays import tensor
from quadriga.kernels.cpu.packing import Packed
from quadriga.quant.blocks import Bytes, nibbles, scales_and_minima
from quadriga.quant.packed import PACKED, TILE

GROUP = {"plain": 1, "fp8": 128, "q8": 64, "q4": 64, "q4m": 64, "mxfp4": 64, "q4k": 256}
"""Format -> columns that K is padded to a multiple of."""

NIBBLES = ("q4", "q4m", "mxfp4", "q4k")
"""Formats of four bits."""

BITS = {"fp8": 8.25, "q8": 8.5, "q4": 4.5, "q4m": 5.0, "mxfp4": 4.25, "q4k": 4.625}
"""Bits a weight of the quantised formats."""


@dataclass(frozen=True)
class GroupedWeight:
    """A matrix (N, K) of each of E experts."""

    format: str
    codes: Tensor
    columns: int
    """K, without padding."""
    scales: Tensor | None = None
    """(E, N, groups of 32, or of 128 for fp8)."""
    minima: Tensor | None = None
    """(E, N, groups of 32): q4m's and q4k's."""
    d: Tensor | None = None
    """(E, N, groups of 256) float16: what q4k's scales are multiplied by, as its minima by ``dmin``."""
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
        """The planes as kernels take them: of every 64 columns the two scales, or minima, as one whole number."""

        def paired(plane: Tensor | None) -> Tensor | None:
            if plane is None or plane.dtype == torch.float32:  # fp8's
                return plane
            return plane.view(torch.int32 if plane.dtype == torch.float16 else torch.int16)

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


def meta(form: str, n_experts: int, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> GroupedWeight:
    """A weight that has shapes and no numbers, for ``launch.recording``; ``dtype`` is a plain one's."""
    padded = -(-columns // GROUP[form]) * GROUP[form]

    def plane(width: int, kind: torch.dtype) -> Tensor:
        return torch.empty(n_experts, rows, width, dtype=kind, device="meta")

    half, byte, groups = torch.float16, torch.uint8, padded // 32
    match form:
        case "plain":
            return GroupedWeight(form, plane(columns, dtype), columns)
        case "fp8":
            return GroupedWeight(form, plane(padded, byte), columns, plane(padded // 128, torch.float32))
        case "q8":
            return GroupedWeight(form, plane(padded, torch.int8), columns, plane(groups, half))
        case "mxfp4":
            return GroupedWeight(form, plane(padded // 2, byte), columns, plane(groups, byte))
        case "q4":
            return GroupedWeight(form, plane(padded // 2, byte), columns, plane(groups, half))
        case "q4m":
            return GroupedWeight(form, plane(padded // 2, byte), columns, plane(groups, half), plane(groups, half))
    superblocks = plane(padded // 256, half), plane(padded // 256, half)
    return GroupedWeight(
        form, plane(padded // 2, byte), columns, plane(groups, byte), plane(groups, byte), *superblocks
    )


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


# From the CPU's packed matrices --------------------------------------------------------------------------------------


def from_packed(matrices: Sequence[Packed]) -> GroupedWeight:
    """The packed matrices of a layer's experts (``kernels/cpu/csrc/layout.hpp``) as planes, without loss.

    Raises:
        CheckpointError: a format that has no planes.
    """
    form, rows, cols = matrices[0].format, matrices[0].rows, matrices[0].cols
    assert all((m.format, m.rows, m.cols) == (form, rows, cols) for m in matrices), "experts of one shape and format"
    if form not in _FROM_TILES:
        raise CheckpointError(
            f"experts on a GPU must be packed as one of {', '.join(_FROM_TILES)}; got {form}. Convert with one of them."
        )
    group = PACKED[form]
    parts = []
    for matrix in matrices:
        tiles = np.asarray(matrix.data).reshape(-(-rows // TILE), -(-cols // group.columns), group.nbytes)
        parts.append([_rows_first(plane)[:rows] for plane in _FROM_TILES[form](tiles)])
    planes = [tensor(np.stack(plane)) for plane in zip(*parts, strict=True)]
    return GroupedWeight("mxfp4" if form == "mx4" else form, planes[0], cols, *planes[1:])


def _rows_first(plane: NDArray[np.generic]) -> NDArray[np.generic]:
    """(tiles, groups, 16, n) -> (tiles * 16, groups * n)."""
    tiles, groups, lanes, n = plane.shape
    return plane.transpose(0, 2, 1, 3).reshape(tiles * lanes, groups * n)


def _per_lane(raw: Bytes, dtype: type[np.generic]) -> NDArray[np.generic]:
    """(tiles, groups, n lines of 16 numbers) as (tiles, groups, 16, n)."""
    tiles, groups, _ = raw.shape
    return np.ascontiguousarray(raw).view(dtype).reshape(tiles, groups, -1, TILE).swapaxes(2, 3)


def _lane_bytes(lines: Bytes) -> Bytes:
    """Lines of 16 x 4 bytes, (tiles, groups, 64 n) -> (tiles, groups, 16, n, 4)."""
    tiles, groups, _ = lines.shape
    return lines.reshape(tiles, groups, -1, TILE, 4).swapaxes(2, 3)


def _tile_nibbles(lines: Bytes) -> Bytes:
    """Lines of nibbles: columns 8 l .. 8 l + 3 in the low halves, the next four in the high ones."""
    quads = _lane_bytes(lines)
    columns = np.stack((quads & np.uint8(15), quads >> np.uint8(4)), axis=-2)  # (tiles, groups, 16, l, 2, 4)
    codes = columns.reshape(*columns.shape[:3], -1, 2, 32)
    packed: Bytes = (codes[..., 0, :] | codes[..., 1, :] << np.uint8(4)).reshape(*columns.shape[:3], -1)
    return packed


def _q8(tiles: Bytes) -> list[NDArray[np.generic]]:
    quads = _lane_bytes(tiles[:, :, 64:])
    codes = (quads.reshape(*quads.shape[:3], -1) ^ np.uint8(128)).view(np.int8)  # u - 128
    return [codes, _per_lane(tiles[:, :, :64], np.float16)]


def _q4(tiles: Bytes) -> list[NDArray[np.generic]]:
    return [_tile_nibbles(tiles[:, :, 64:]), _per_lane(tiles[:, :, :64], np.float16)]


def _q4m(tiles: Bytes) -> list[NDArray[np.generic]]:
    scales, minima = tiles[:, :, :64], tiles[:, :, 64:128]
    return [_tile_nibbles(tiles[:, :, 128:]), _per_lane(scales, np.float16), _per_lane(minima, np.float16)]


def _mx4(tiles: Bytes) -> list[NDArray[np.generic]]:
    """Its scales are half a power of two, 2^(s - 128): float16's own exponents are read."""
    half_scales = _per_lane(tiles[:, :, :64], np.float16).astype(np.float32)
    _, exponents = np.frexp(half_scales)  # 2^e = 0.5 * 2^(e + 1)
    return [_tile_nibbles(tiles[:, :, 64:]), np.where(half_scales == 0, 0, exponents - 1 + 128).astype(np.uint8)]


def _q4k(tiles: Bytes) -> list[NDArray[np.generic]]:
    """Its minima are stored below 0, as what is added."""
    halves = _per_lane(tiles[:, :, :64], np.float16)
    scales, less = (_per_lane(tiles[:, :, at : at + 128], np.int8) for at in (64, 192))
    minima = (-less.astype(np.int16)).astype(np.uint8)
    return [_tile_nibbles(tiles[:, :, 320:]), scales.view(np.uint8), minima, halves[..., :1], halves[..., 1:]]


_FROM_TILES: dict[str, Callable[[Bytes], list[NDArray[np.generic]]]] = {
    "q8": _q8,
    "q4": _q4,
    "q4m": _q4m,
    "mx4": _mx4,
    "q4k": _q4k,
}
"""Packed format -> its tiles (tiles, groups, bytes) as planes (tiles, groups, 16, n), in ``GroupedWeight``'s order."""
