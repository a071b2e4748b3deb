"""A checkpoint whose weights a quantiser packed, as a TensorSource of numbers.

    NAME.qweight, NAME.qzeros, NAME.scales, NAME.g_idx   ──►   NAME.weight (rows, cols)

Which tensors belong together, the method says (``method``); everything else is passed on as it is stored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
from numpy.typing import NDArray

from quadriga.errors import CheckpointError
from quadriga.io.quantised.method import NOT_ROUNDED, KeepsBlocks, KeepsCodes, Method, Parts
from quadriga.io.source import TensorInfo, TensorSource
from quadriga.model.weight_map import Box, whole
from quadriga.quant.dtypes import DTYPES, Array


def grouped(names: Iterable[str], method: Method) -> dict[str, dict[str, str]]:
    """Weight -> part -> stored tensor, of the weights that are packed."""
    by_length = sorted(method.suffixes, key=len, reverse=True)
    weights: dict[str, dict[str, str]] = {}
    for name in names:
        for suffix in by_length:
            if name.endswith("." + suffix):
                weights.setdefault(name.removesuffix(suffix) + "weight", {})[suffix] = name
                break
    return {weight: parts for weight, parts in weights.items() if parts.keys() - NOT_ROUNDED - {"weight"}}


def _beside(names: Iterable[str], method: Method) -> set[str]:
    """Those of the tensors that only say how a cache or activations would be rounded, by weights that are plain too."""
    suffixes = tuple("." + suffix for suffix in NOT_ROUNDED if suffix in method.suffixes)
    return {name for name in names if name.endswith(suffixes)}


def of_numbers(names: Iterable[str], method: Method) -> list[str]:
    """The tensors there will be of those that an index names."""
    names = list(names)
    weights = grouped(names, method)
    taken = {name for parts in weights.values() for name in parts.values()} | _beside(names, method)
    return [*weights, *(name for name in names if name not in taken)]


class QuantisedSource:
    """See the module docstring; it closes the source it is given.

    Raises (when opened):
        CheckpointError: parts that are missing or do not fit each other, or no packed weight at all.
    """

    def __init__(self, source: TensorSource, method: Method) -> None:
        self._source, self._method = source, method
        self._parts: dict[str, Parts] = {}
        try:
            self.tensors: dict[str, TensorInfo] = self._table()
        except BaseException:
            source.close()
            raise

    @property
    def stored(self) -> TensorSource:
        """The tensors as the files have them, packed parts and all."""
        return self._source

    def _table(self) -> dict[str, TensorInfo]:
        weights = grouped(self._source.tensors, self._method)
        if not weights:
            raise CheckpointError(
                f"the configuration says that the weights are packed ({self._method.label}), but no tensor is called "
                f"so: NAME.{', NAME.'.join(self._method.suffixes)}. Take that out (quantization_config in config.json) "
                "if they are plain numbers."
            )
        taken = {name for parts in weights.values() for name in parts.values()}
        taken |= _beside(self._source.tensors, self._method)
        tensors = {name: info for name, info in self._source.tensors.items() if name not in taken}
        for name, info in tensors.items():
            if info.dtype not in DTYPES:
                raise CheckpointError(
                    f"{name[:80]!r} is of {info.dtype} and no part of a weight of {self._method.label}"
                )
        for weight, names in weights.items():
            parts = self._parts[weight] = Parts(weight, self._source, names)
            shape = self._method.shape(parts)
            blocks = self._method.block_format(parts) if isinstance(self._method, KeepsBlocks) else None
            tensors[weight] = TensorInfo(shape, blocks or self._method.label, parts.bytes())
        return tensors

    def without_empty_biases(self, used: Collection[str]) -> None:
        """Leave out zero biases of packed weights that the model has no place for: AutoGPTQ before 0.5 stores one for
        every matrix.

        Args:
            used: the tensors that the model takes.

        Raises:
            CheckpointError: bytes that cannot be read.
        """
        for weight in self._parts:
            bias = weight.removesuffix("weight") + "bias"
            if bias in self.tensors and bias not in used and not self._source.read(bias).any():
                del self.tensors[bias]

    def read(self, name: str, box: Box | None = None) -> Array:
        """See ``TensorSource.read``: packed weights in the dtype that the method's library computes them in."""
        if name not in self._parts:
            return self._source.read(name, box)
        rows, columns = box or whole(self.tensors[name].shape)
        return self._method.read(self._parts[name], *rows)[:, slice(*columns)]

    def raw(self, name: str, first: int, last: int) -> NDArray[np.uint8]:
        """The blocks of rows [first, last) of a weight whose dtype is a block format's, row after row."""
        assert isinstance(self._method, KeepsBlocks) and name in self._parts, "a weight of blocks"
        return self._method.raw(self._parts[name], first, last).reshape(-1)

    def codes(self, name: str, first: int, last: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]] | None:
        """Rows [first, last) of a weight of FP8 as stored, with a scale for every 128 columns; None: it is none."""
        if name not in self._parts or not isinstance(self._method, KeepsCodes):
            return None
        return self._method.codes(self._parts[name], first, last)

    def close(self) -> None:
        """Release the files."""
        self._source.close()
