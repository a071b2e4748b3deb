"""A GGUF file as a TensorSource: boxes of tensors, unpacked to float32 where they are stored in blocks.

Reads go through ``preadv``, not a memory map: a file that is cut short while it is open then ends in an error, where a
map would end the process with SIGBUS.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadriga.errors import CheckpointError
from quadriga.io.gguf import GGUFHeader, open_parts
from quadriga.io.source import TensorInfo
from quadriga.kernels.cpu.decoding import dequantize_into
from quadriga.model.weight_map import Box, Shape, whole
from quadriga.quant.dtypes import DTYPES, Array, raw_bytes
from quadriga.quant.formats import FORMATS, PLAIN

_CHUNK_ELEMENTS = 1 << 22
"""Elements dequantised at once: their stored bytes are held beside the result, and are still in the cache."""


class GGUFSource:
    """An open GGUF file, or all the parts of a split one; see ``io.source.TensorSource``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files, header = open_parts(path)
        self.header: GGUFHeader = header
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

    def read(self, name: str, box: Box | None = None) -> Array:
        """See ``TensorSource.read``. Only the box's rows are read and unpacked; rows run along the last axis."""
        tensor = self.header.tensors[name]
        box = box or whole(tensor.shape)
        columns = slice(*box[-1])
        dtype = DTYPES[tensor.format if tensor.format in PLAIN else "float32"]
        out = np.empty([stop - start for start, stop in box], dtype=dtype)
        rows = out.reshape(-1, out.shape[-1])
        step = max(1, _CHUNK_ELEMENTS // tensor.shape[-1])
        done = 0
        for start, stop in _row_runs(tensor.shape, box):
            for first in range(start, stop, step):
                last = min(first + step, stop)
                part = rows[done : done + last - first]
                done += last - first
                whole_rows = part.shape[-1] == tensor.shape[-1]
                if tensor.format in PLAIN and whole_rows:
                    self._read_into(raw_bytes(part).data, name, first)
                    continue
                raw = self.raw(name, first, last)
                if tensor.format in PLAIN:
                    part[:] = raw.view(dtype).reshape(last - first, -1)[:, columns]
                    continue
                values = part if whole_rows else np.empty((last - first, tensor.shape[-1]), dtype=np.float32)
                dequantize_into(values, raw, tensor.format)
                if not whole_rows:
                    part[:] = values[:, columns]
        return out

    def raw(self, name: str, row_start: int, row_stop: int) -> NDArray[np.uint8]:
        """The stored bytes of rows [row_start, row_stop), all axes but the last flattened."""
        tensor = self.header.tensors[name]
        row_bytes = FORMATS[tensor.format].nbytes_of(tensor.shape[-1:])
        assert 0 <= row_start <= row_stop <= tensor.nbytes // row_bytes, f"{name}: rows outside the tensor"
        buffer = np.empty((row_stop - row_start) * row_bytes, dtype=np.uint8)
        self._read_into(buffer.data, name, row_start)
        return buffer

    def _read_into(self, out: memoryview, name: str, row_start: int) -> None:
        """Fill ``out`` with stored bytes from a row on."""
        tensor = self.header.tensors[name]
        buffer = out.cast("B") if out.ndim > 1 else out
        offset, done = tensor.offset + row_start * FORMATS[tensor.format].nbytes_of(tensor.shape[-1:]), 0
        while done < len(buffer):
            try:
                got = os.preadv(self._files[tensor.part].fileno(), [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read tensor {name!r} of {self.path.name}: {error.strerror}") from None
            if got == 0:
                raise CheckpointError(f"{self.path.name} became shorter while it was read; tensor {name!r} is cut off")
            done += got

    def close(self) -> None:
        """Release the files."""
        for file in self._files:
            file.close()


def _row_runs(shape: Shape, box: Box) -> Iterator[tuple[int, int]]:
    """The box's rows as runs of consecutive row numbers, all axes but the last flattened."""
    *outer, inner = box[:-1] or ((0, 1),)  # a vector is one row
    for corner in itertools.product(*(range(*r) for r in outer)):
        row = 0
        for position, size in zip((*corner, 0), shape[:-1], strict=False):
            row = row * size + position
        yield row + inner[0], row + inner[1]
