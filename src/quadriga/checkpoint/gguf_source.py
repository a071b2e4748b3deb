"""A GGUF file as a TensorSource: boxes of tensors, unpacked to float32 where they are stored in blocks.

Reads go through ``pread``, not a memory map: a file that is cut short while it is open then ends in an error, where a
map would end the process with SIGBUS.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quadriga.checkpoint.gguf import GGUFHeader, read_header
from quadriga.checkpoint.source import TensorInfo
from quadriga.errors import CheckpointError
from quadriga.model.weight_map import Box, Shape, whole
from quadriga.quant import codec
from quadriga.quant.formats import FORMATS, PLAIN


class GGUFSource:
    """An open GGUF file; see ``checkpoint.source.TensorSource``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: GGUFHeader = read_header(path)
        self._fd = os.open(path, os.O_RDONLY)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(t.shape, t.format, t.nbytes) for name, t in self.header.tensors.items()
        }

    @property
    def metadata(self) -> dict[str, Any]:
        """The file's metadata."""
        return self.header.metadata

    @property
    def shapes(self) -> dict[str, Shape]:
        """Name -> shape of every tensor."""
        return {name: info.shape for name, info in self.tensors.items()}

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """See ``TensorSource.read``. Only the rows the box touches are read."""
        tensor = self.header.tensors[name]
        box = box or whole(tensor.shape)
        row = tensor.shape[-1]
        lead = tensor.shape[:-1]
        # Rows (all but the last axis, flattened) from the box's first to its last corner.
        first = _row_index([start for start, _ in box[:-1]], lead)
        last = _row_index([stop - 1 for _, stop in box[:-1]], lead)
        raw = self.raw(name, first, last + 1)
        if tensor.format in PLAIN:
            values = torch.frombuffer(raw, dtype=getattr(torch, tensor.format))
        else:
            values = torch.from_numpy(codec.dequantize(np.frombuffer(raw, dtype=np.uint8), tensor.format))
        values = values.view(-1, row)
        if len(lead) <= 1:
            return values[:, slice(*box[-1])].reshape([stop - start for start, stop in box])
        rows = torch.arange(prod(lead)).view(lead)[tuple(slice(*r) for r in box[:-1])].reshape(-1) - first
        picked = values if len(rows) == len(values) else values[rows]
        return picked[:, slice(*box[-1])].reshape([stop - start for start, stop in box])

    def raw(self, name: str, row_start: int, row_stop: int) -> bytearray:
        """The stored bytes of rows [row_start, row_stop), all axes but the last flattened."""
        tensor = self.header.tensors[name]
        spec = FORMATS[tensor.format]
        row_bytes = tensor.shape[-1] // spec.block * spec.nbytes
        buffer = bytearray((row_stop - row_start) * row_bytes)
        offset, done = tensor.offset + row_start * row_bytes, 0
        while done < len(buffer):
            got = os.preadv(self._fd, [memoryview(buffer)[done:]], offset + done)
            if got == 0:
                raise CheckpointError(f"{self.path.name} became shorter while it was read; tensor {name!r} is cut off")
            done += got
        return buffer

    def close(self) -> None:
        """Release the file."""
        os.close(self._fd)


def _row_index(corner: list[int], lead: Shape) -> int:
    index = 0
    for position, size in zip(corner, lead, strict=True):
        index = index * size + position
    return index
