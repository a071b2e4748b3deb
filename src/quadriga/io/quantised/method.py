"""What a quantiser's method says of its files: which tensors are parts of one weight, its shape, and its numbers.

A weight NAME.weight of shape (rows, cols) is stored as several tensors NAME.SUFFIX. Every method states the suffixes
and turns the parts into rows of numbers, which are those of the method's own library in the dtype it computes them in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from quadriga.errors import CheckpointError, ConfigError
from quadriga.io.source import TensorInfo, TensorSource
from quadriga.model.families.keys import Keys
from quadriga.model.weight_map import Box, Shape
from quadriga.quant.dtypes import Array, as_float32


class Parts:
    """The stored tensors of one weight.

    Args:
        weight: the weight's name.
        names: part (its suffix without the first dot) -> the stored tensor.
    """

    def __init__(self, weight: str, source: TensorSource, names: Mapping[str, str]) -> None:
        self.weight, self._source, self._names = weight, source, names

    def __contains__(self, part: str) -> bool:
        return part in self._names

    def __iter__(self) -> Any:
        return iter(self._names)

    def fail(self, message: str) -> CheckpointError:
        """An error about this weight."""
        return CheckpointError(f"{self.weight}: {message}")

    def info(self, part: str) -> TensorInfo:
        """What is known of a part without reading it."""
        if part not in self._names:
            raise self.fail(f"its part {part!r} is missing; it has {', '.join(sorted(self._names))}")
        return self._source.tensors[self._names[part]]

    def expect(self, part: str, dtypes: tuple[str, ...], shape: Shape | None = None) -> TensorInfo:
        """:meth:`info` of a part that must be of one of these dtypes and, if given, of this shape."""
        info = self.info(part)
        if info.dtype not in dtypes:
            raise self.fail(f"its part {part!r} must be {' or '.join(dtypes)}, got {info.dtype}")
        if shape is not None and info.shape != shape:
            raise self.fail(f"its part {part!r} must have the shape {list(shape)}, got {list(info.shape)}")
        return info

    def matrix(self, part: str, dtypes: tuple[str, ...]) -> tuple[int, int]:
        """The shape of a part that must be a matrix of one of these dtypes."""
        shape = self.expect(part, dtypes).shape
        if len(shape) != 2:
            raise self.fail(f"its part {part!r} must be a matrix, got the shape {list(shape)}")
        return shape[0], shape[1]

    def read(self, part: str, box: Box | None = None) -> Array:
        """A box of a part, or all of it, in its stored dtype."""
        return self._source.read(self._names[part], box)

    def bytes(self) -> int:
        """Of all parts together."""
        return sum(self.info(part).nbytes for part in self._names)


class Method(Protocol):
    """A way of packing weights, with the settings of one checkpoint."""

    @property
    def label(self) -> str:
        """What ``TensorInfo.dtype`` says of such weights; no dtype's name."""
        ...

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the tensors that are parts of a weight. "weight" alone, without others, is a plain tensor."""
        ...

    def shape(self, parts: Parts) -> Shape:
        """The weight's shape (rows, cols), after checking every part's dtype and shape.

        Raises:
            CheckpointError: a part that is missing, or does not fit the others.
        """
        ...

    def read(self, parts: Parts, first: int, last: int) -> Array:
        """Rows [first, last) of the weight, (last - first, cols), in a float dtype.

        Raises:
            CheckpointError: bytes that cannot be read, or mean nothing.
        """
        ...


@runtime_checkable
class KeepsBlocks(Method, Protocol):
    """A method some of whose weights are blocks of one of our own formats, in another order."""

    @property
    def kept(self) -> str:
        """Which weights stay as they are in memory, in a few words for ``info``; "": none."""
        ...

    def block_format(self, parts: Parts) -> str | None:
        """The block format of ``quant.formats`` that holds the weight without a number changing, or None."""
        ...

    def raw(self, parts: Parts, first: int, last: int) -> NDArray[np.uint8]:
        """The blocks of rows [first, last), (last - first, bytes of a row)."""
        ...


@runtime_checkable
class KeepsCodes(Method, Protocol):
    """A method whose weights are float8_e4m3fn under scales: kernels may multiply the codes as they are."""

    def codes(self, parts: Parts, first: int, last: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]] | None:
        """Codes of rows [first, last), (n, cols), and scales, (n, ceil(cols / 128)); None: scales lie otherwise."""
        ...


FLOATS = ("float16", "bfloat16", "float32")
"""What scales may be."""

NOT_ROUNDED = (
    "input_scale", "input_zero_point", "input_global_scale", "input_scale_ub", "activation_scale", "output_scale",
    "output_zero_point", "k_scale", "v_scale",
)  # fmt: skip
"""Parts that say how activations, or the keys and values of a cache, would be rounded, which they are not here."""


def one_number(parts: Parts, part: str, dtypes: tuple[str, ...] = FLOATS) -> None:
    """Raise unless a part is a single number of one of these dtypes."""
    info = parts.expect(part, dtypes)
    if info.shape not in ((), (1,), (1, 1)):
        raise parts.fail(f"its part {part!r} must be one number, got the shape {list(info.shape)}")


def run_of_fields(bits: int) -> tuple[int, int]:
    """(fields, words) after which fields of ``bits`` begin at a word's start again: 32 in 3 words of 3 bits."""
    return (32 // bits, 1) if 32 % bits == 0 else (32, bits)


def unpack_words(words: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Whole numbers of 1 to 8 bits from int32 words, lowest bits first: (..., n) -> (..., n * 32 // bits)."""
    packed = np.ascontiguousarray(words).view(np.uint8)  # little-endian
    if 8 % bits:  # fields that lie across two bytes
        n = words.shape[-1] * 32 // bits
        flat = np.unpackbits(packed, axis=-1, bitorder="little")[..., : n * bits]
        return np.packbits(flat.reshape(*words.shape[:-1], n, bits), axis=-1, bitorder="little")[..., 0]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (packed[..., None] >> shifts & np.uint8(2**bits - 1)).reshape(*words.shape[:-1], -1)


_ROWS_AT_ONCE = 64
"""So that what lies between a row's fields and its numbers stays in the cache."""


def scaled(q: NDArray[np.uint8], z: NDArray[Any], scales: Array, group: NDArray[Any], bits: int) -> Array:
    """(q - z) * scale, rounded once to the dtype of the scales: the difference is exact in it.

    Args:
        q: (rows, cols) below 2^bits.
        z, scales: (rows, groups).
        group: (cols,) the group of every column.
    """
    out = np.empty(q.shape, dtype=scales.dtype)
    values, place = np.arange(2**bits, dtype=np.int16), group.astype(np.intp) << bits
    for first in range(0, len(q), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        zeros, wide = z[part].astype(np.int16), as_float32(scales[part])
        if bits > 4:
            out[part] = (q[part] - zeros[:, group]) * wide[:, group]
            continue
        # All that a group's numbers can be, once; then every number is looked up.
        table = ((values - zeros[..., None]) * wide[..., None]).astype(scales.dtype).reshape(len(wide), -1)
        for row, of_row in enumerate(table, first):
            np.take(of_row, place + q[row], out=out[row], mode="clip")  # none is outside; "raise" would copy
    return out


def group_size(keys: Keys, name: str) -> int:
    """How many columns share a scale; -1: all.

    Raises:
        ConfigError: it is neither.
    """
    size = keys.integer(name)
    if size != -1 and size < 1:
        raise ConfigError(f"quantization_config: {name} must be -1 or a whole number from 1, got {size}")
    return size
