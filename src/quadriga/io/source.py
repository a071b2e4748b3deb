"""The one seam between file formats and the rest: a source is named tensors that can be read box by box.

Safetensors directories, GGUF files and Grok-1's released pickles all open as a :class:`TensorSource`; everything above
(import, export, loading, conversion) is written against this protocol and one weight map (``model.weight_map``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from quadriga.model.weight_map import Box, Shape
from quadriga.quant.dtypes import Array


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a stored tensor without reading it."""

    shape: Shape
    """Row-major, slowest axis first."""
    dtype: str
    """The stored element format: a dtype's name ("bfloat16", "float32") or a block format ("q4_0", "q6_k", ...)."""
    nbytes: int


class TensorSource(Protocol):
    """Named tensors that can be read box by box without holding the rest of the checkpoint in memory."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the checkpoint, after the header checks; no weight has been read."""
        ...

    def read(self, name: str, box: Box | None = None) -> Array:
        """Read a box of one tensor.

        Returns:
            an array of the box's shape: in the stored dtype for plain floats (possibly a view of a memory map, so do
            not write to it), float32 for block formats.

        Raises:
            CheckpointError: the bytes cannot be read, or are not what the header promised.
        """
        ...

    def close(self) -> None:
        """Release file handles and maps; arrays already returned must not be used afterwards."""
        ...
