"""Safetensors with weights in MXFP4, as gpt-oss is published: two tensors of bytes are one of numbers.

    NAME_blocks (..., G, 16) uint8, NAME_scales (..., G) uint8   ──►   NAME_blocks (..., 32 G), stored as "mxfp4"

The numbers keep the name of their codes: under NAME itself transformers stores the transposed matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from quadriga.errors import CheckpointError
from quadriga.io.safetensors import SafetensorsSource
from quadriga.io.source import TensorInfo, TensorSource
from quadriga.model.weight_map import Box, whole
from quadriga.quant import mxfp4
from quadriga.quant.dtypes import Array

_BLOCKS, _SCALES = "_blocks", "_scales"
_CODE_BYTES = mxfp4.BLOCK // 2


def with_mxfp4(source: SafetensorsSource) -> TensorSource:
    """The source with its tensors of bytes as numbers; the source itself where it has none.

    Args:
        source: opened ``with_bytes``.

    Raises:
        CheckpointError: bytes that are no MXFP4.
    """
    if all(info.dtype != "uint8" for info in source.tensors.values()):
        return source
    return Mxfp4Source(source)


def of_numbers(names: Iterable[str]) -> list[str]:
    """The tensors there will be of those that an index names: without the scales of blocks."""
    known = set(names)
    return [name for name in known if not name.endswith(_SCALES) or name.removesuffix(_SCALES) + _BLOCKS not in known]


class Mxfp4Source:
    """See the module docstring; it closes the source it is given."""

    def __init__(self, source: SafetensorsSource) -> None:
        self._source = source
        self._scales: dict[str, str] = {}
        tensors: dict[str, TensorInfo] = {}
        try:
            for name, info in source.tensors.items():
                if info.dtype == "uint8":
                    self._add(name, tensors)
                else:
                    tensors[name] = info
        except BaseException:
            source.close()
            raise
        self.tensors: Mapping[str, TensorInfo] = tensors

    def _add(self, name: str, tensors: dict[str, TensorInfo]) -> None:
        stem = name.removesuffix(_BLOCKS).removesuffix(_SCALES)
        codes, scales = (self._source.tensors.get(stem + end) for end in (_BLOCKS, _SCALES))
        if name == stem or codes is None or scales is None or {codes.dtype, scales.dtype} != {"uint8"}:
            raise CheckpointError(
                f"tensor {name[:80]!r} is of bytes, which are weights only as MXFP4: one NAME{_BLOCKS} with one "
                f"NAME{_SCALES} beside it. Is a shard missing, or was this packed by another quantiser?"
            )
        *outer, groups, width = codes.shape if len(codes.shape) > 1 else (0, 0)
        if scales.shape != (*outer, groups) or width != _CODE_BYTES:
            raise CheckpointError(
                f"{stem[:80]}{_BLOCKS} must have 16 bytes for each number of {_SCALES}: got {list(codes.shape)} and "
                f"{list(scales.shape)}"
            )
        self._scales[stem + _BLOCKS] = stem + _SCALES
        shape = (*outer, groups * mxfp4.BLOCK)
        tensors[stem + _BLOCKS] = TensorInfo(shape, "mxfp4", codes.nbytes + scales.nbytes)

    def read(self, name: str, box: Box | None = None) -> Array:
        """See ``TensorSource.read``: float32 of tensors in MXFP4."""
        if name not in self._scales:
            return self._source.read(name, box)
        box = box or whole(self.tensors[name].shape)
        start, stop = box[-1]
        groups = (start // mxfp4.BLOCK, -(-stop // mxfp4.BLOCK))
        values = mxfp4.from_pairs(*self.codes(name, (*box[:-1], groups)))
        first = groups[0] * mxfp4.BLOCK
        return values.reshape(*values.shape[:-2], -1)[..., start - first : stop - first]

    def codes(self, name: str, box: Box) -> tuple[Array, Array]:
        """Codes in pairs (..., 16) and scales (...) of a tensor in MXFP4, as they are stored.

        Args:
            box: its last axis counts blocks.
        """
        return self._source.read(name, (*box, (0, _CODE_BYTES))), self._source.read(self._scales[name], box)

    def close(self) -> None:
        """Release the files."""
        self._source.close()
