"""Files of ``torch.save`` as a TensorSource, read by ``checkpoint.torch_zip``, which runs nothing of them.

One file each, and Hugging Face's directories of such files from before safetensors (pytorch_model.bin and its shards).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np

from quadriga.errors import CheckpointError
from quadriga.io.joined import JoinedSource
from quadriga.io.json_files import read_json
from quadriga.io.source import TensorInfo
from quadriga.io.torch_zip import TorchTensor, read_tensors
from quadriga.model.weight_map import Box, whole
from quadriga.quant.dtypes import DTYPES, Array, raw_bytes


class TorchSource:
    """One file; see ``TensorSource``.

    Raises (when opened):
        CheckpointError: it cannot be read, or holds more than tensors by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
        self._fd = self._file.fileno()
        try:
            self._places: dict[str, TorchTensor] = read_tensors(self._fd, path.name)
        except BaseException:
            self.close()
            raise
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(t.shape, t.dtype, prod(t.shape) * DTYPES[t.dtype].itemsize)
            for name, t in self._places.items()
        }

    def read(self, name: str, box: Box | None = None) -> Array:
        """See ``TensorSource.read``: the rows of the box are read, in the stored dtype."""
        place = self._places[name]
        dtype = DTYPES[place.dtype]
        box = box or whole(place.shape)
        start, stop = box[0] if box else (0, 1)
        row = prod(place.shape[1:])
        values = np.empty((stop - start) * row, dtype=dtype)
        buffer = raw_bytes(values).data
        offset, done = place.offset + start * row * dtype.itemsize, 0
        while done < len(buffer):
            got = os.preadv(self._fd, [buffer[done : done + (1 << 30)]], offset + done)
            if got == 0:
                raise CheckpointError(f"{self.path.name} became shorter while it was read; tensor {name!r} is cut off")
            done += got
        if not box:
            return values.reshape(())
        return values.reshape(stop - start, *place.shape[1:])[(slice(None), *(slice(*r) for r in box[1:]))]

    def close(self) -> None:
        """Release the file."""
        self._file.close()


BIN = "pytorch_model"
BIN_INDEX = "pytorch_model.bin.index.json"


def open_bins(folder: Path) -> JoinedSource:
    """The ``pytorch_model*.bin`` files of a Hugging Face directory as one source.

    Raises:
        CheckpointError: there are none, one is missing or holds other tensors than the index says, or a tensor comes
            twice.
    """
    files = sorted(folder.glob(f"{BIN}*.bin"))
    named = read_json(folder / BIN_INDEX).get("weight_map") if (folder / BIN_INDEX).is_file() else None
    if named is not None:
        if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
            raise CheckpointError(f"{BIN_INDEX} must have a 'weight_map' from tensor names to file names")
        missing = sorted(set(named.values()) - {file.name for file in files})
        if missing:
            raise CheckpointError(f"shard {missing[0][:80]} is named by {BIN_INDEX} but missing; fetch it again")
    if not files:
        raise CheckpointError(f"{folder} holds no {BIN}*.bin files")
    parts: list[TorchSource] = []
    try:
        for file in files:
            parts.append(TorchSource(file))
            wanted = {tensor for tensor, place in named.items() if place == file.name} if named is not None else None
            if wanted is not None and wanted != parts[-1].tensors.keys():
                odd = sorted(wanted ^ parts[-1].tensors.keys())
                raise CheckpointError(f"{file.name} does not hold what {BIN_INDEX} says, e.g. {odd[:3]}")
        names = [tensor for part in parts for tensor in part.tensors]
        if len(set(names)) != len(names):
            twice = next(tensor for tensor in names if names.count(tensor) > 1)
            raise CheckpointError(f"tensor {twice[:80]!r} is in two files of {folder}")
        return JoinedSource(parts, {})
    except BaseException:
        for part in parts:
            part.close()
        raise
