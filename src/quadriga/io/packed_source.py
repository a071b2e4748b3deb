"""A packed directory as a TensorSource: matrices unpacked to float32, so that it can be converted like any other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from quadriga.errors import CheckpointError
from quadriga.io.directory import Entry, Manifest
from quadriga.io.source import TensorInfo
from quadriga.kernels.cpu.packing import Bytes, Packed
from quadriga.model.weight_map import Box, whole
from quadriga.quant.dtypes import Array


class PackedSource:
    """See ``io.source.TensorSource``. The manifest has been checked against the files' sizes."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._entries = manifest.parameters
        self._files: dict[str, np.memmap[tuple[int], np.dtype[np.uint8]]] = {}
        try:
            for file in {entry.file for entry in manifest.parameters.values()}:
                self._files[file] = np.memmap(path / file, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path.name}: a weight file cannot be mapped: {error}") from None
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(entry.shape), entry.format, entry.nbytes) for name, entry in self._entries.items()
        }

    def read(self, name: str, box: Box | None = None) -> Array:
        """See ``TensorSource.read``: float32 whatever the format."""
        entry = self._entries[name]
        box = box or whole(tuple(entry.shape))
        if len(entry.shape) == 1:
            return np.array(self._bytes(entry)).view(np.float32)[box[0][0] : box[0][1]]
        (first, last), columns = box
        return self.matrix(name).unpack(first, last - first)[:, slice(*columns)]

    def matrix(self, name: str) -> Packed:
        """A matrix as it is stored, where the file is mapped."""
        entry = self._entries[name]
        rows, cols = entry.shape
        return Packed(entry.format, rows, cols, self._bytes(entry))

    def _bytes(self, entry: Entry) -> Bytes:
        return self._files[entry.file][entry.offset : entry.offset + entry.nbytes]

    def close(self) -> None:
        """Release the maps."""
        self._files.clear()
