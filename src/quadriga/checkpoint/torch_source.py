"""Files of ``torch.save`` as a TensorSource, read by ``checkpoint.torch_zip``, which runs nothing of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

from quadriga.checkpoint.source import TensorInfo
from quadriga.checkpoint.torch_zip import TorchTensor, read_tensors
from quadriga.errors import CheckpointError
from quadriga.model.weight_map import Box, whole


class TorchSource:
    """One file; see ``TensorSource``.

    Raises (when opened):
        CheckpointError: it cannot be read, or holds more than tensors by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
        try:
            self._places: dict[str, TorchTensor] = read_tensors(self._fd, path.name)
        except BaseException:
            self.close()
            raise
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(t.shape, t.dtype, prod(t.shape) * getattr(torch, t.dtype).itemsize)
            for name, t in self._places.items()
        }

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """See ``TensorSource.read``: the rows of the box are read, in the stored dtype."""
        place = self._places[name]
        dtype: torch.dtype = getattr(torch, place.dtype)
        box = box or whole(place.shape)
        start, stop = box[0] if box else (0, 1)
        row = prod(place.shape[1:])
        values = torch.empty((stop - start) * row, dtype=dtype)
        buffer = memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]
        offset, done = place.offset + start * row * dtype.itemsize, 0
        while done < len(buffer):
            got = os.preadv(self._fd, [buffer[done : done + (1 << 30)]], offset + done)
            if got == 0:
                raise CheckpointError(f"{self.path.name} became shorter while it was read; tensor {name!r} is cut off")
            done += got
        if not box:
            return values[0]
        return values.view(stop - start, *place.shape[1:])[(slice(None), *(slice(*r) for r in box[1:]))]

    def close(self) -> None:
        """Release the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
