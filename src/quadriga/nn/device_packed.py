"""A matrix packed for the CPU's kernels, unpacked by torch on any device: QLoRA's base on a GPU.

The bytes stay as ``kernels/cpu/csrc/layout.hpp`` draws them, so a model over them is the one that the CPU has:

    (tiles, pairs of groups)   2 x 16 float16 scales, then of each group of 32 columns
    q8    8 lines of 16 rows x 4 bytes       column 4 l + b           w = d (u - 128)
    q4    4 lines of 16 rows x 4 bytes       low nibbles column 8 l + b, high ones 8 l + 4 + b         w = d (n - 8)
"""

from __future__ import annotations

import torch
from torch import Tensor

from quadriga.errors import ConfigError
from quadriga.kernels.arrays import tensor
from quadriga.kernels.cpu.packing import Packed
from quadriga.quant.packed import PACKED, TILE

FORMATS = ("q8", "q4")
_SCALES = 2 * TILE * 2
"""Bytes of the scales of a pair of groups."""


class DevicePacked:
    """A packed matrix (rows, cols) on a device.

    Args:
        packed: q8 or q4.

    Raises:
        ConfigError: another format.
    """

    def __init__(self, packed: Packed, device: torch.device) -> None:
        if packed.format not in FORMATS:
            raise ConfigError(f"packed weights outside the CPU must be {' or '.join(FORMATS)}, got {packed.format}")
        self.format, self.rows, self.cols = packed.format, packed.rows, packed.cols
        self.data = tensor(packed.data).to(device, copy=True)

    @property
    def device(self) -> torch.device:
        """Where the bytes lie."""
        return self.data.device

    def unpack(self) -> Tensor:
        """The matrix as float32 (rows, cols)."""
        form = PACKED[self.format]
        tiles = -(-self.rows // TILE)
        blocks = self.data.view(tiles, -1, form.nbytes)
        scales = blocks[..., :_SCALES].contiguous().view(torch.float16).view(tiles, -1, 2, 1, TILE, 1).float()
        codes = blocks[..., _SCALES:]
        if self.format == "q8":
            lines = codes.reshape(tiles, -1, 2, 8, TILE, 4).float() - 128
        else:
            bytes_ = codes.reshape(tiles, -1, 2, 4, 1, TILE, 4)
            lines = torch.cat((bytes_ & 15, bytes_ >> 4), dim=4).reshape(tiles, -1, 2, 8, TILE, 4).float() - 8
        whole = (lines * scales).permute(0, 4, 1, 2, 3, 5).reshape(tiles * TILE, -1)
        return whole[: self.rows, : self.cols]
