"""Several sources as one: the files of a model that was cut up for several processes.

Meta's larger models come in a file a process, each with a part of every matrix: rows of those whose outputs were shared
out, columns of the others, whole norms. Along which axis follows from the sizes the configuration asks for, so no table
of names is needed; what does not fit along one axis is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from quadriga.errors import CheckpointError
from quadriga.io.source import TensorInfo, TensorSource
from quadriga.model.weight_map import Box, Shape, whole
from quadriga.quant.dtypes import Array, raw_bytes


class JoinedSource:
    """The parts as one ``TensorSource``; it closes them.

    Args:
        parts: in the order in which their pieces follow each other.
        expected: tensor -> the shape it must have as a whole; others are taken from the first part that has them.

    Raises:
        CheckpointError: parts that make no whole, or repeat each other with other numbers.
    """

    def __init__(self, parts: Sequence[TensorSource], expected: Mapping[str, Shape]) -> None:
        self._parts = list(parts)
        self._joins: dict[str, tuple[list[TensorSource], int | None]] = {}
        tensors: dict[str, TensorInfo] = {}
        for name in dict.fromkeys(name for part in self._parts for name in part.tensors):
            holders = [part for part in self._parts if name in part.tensors]
            axis = self._axis(name, holders, expected.get(name))
            self._joins[name] = (holders if axis is not None else holders[:1]), axis
            info = holders[0].tensors[name]
            if axis is not None:
                shape = tuple(n if i != axis else expected[name][axis] for i, n in enumerate(info.shape))
                info = TensorInfo(shape, info.dtype, sum(holder.tensors[name].nbytes for holder in holders))
            tensors[name] = info
        self.tensors: Mapping[str, TensorInfo] = tensors

    def _axis(self, name: str, holders: list[TensorSource], wanted: Shape | None) -> int | None:
        """Along which axis the parts follow each other; None: the first has all of it."""
        infos = [holder.tensors[name] for holder in holders]
        shapes, first = [info.shape for info in infos], infos[0].shape
        if len(holders) == 1 or wanted is None:
            return None
        if len({info.dtype for info in infos}) > 1:
            raise CheckpointError(f"the parts of {name[:80]} are stored as {sorted({i.dtype for i in infos})}")
        if all(shape == wanted for shape in shapes):
            # Every process kept it whole; matrices are too large to be kept twice, or to be compared here.
            if len(wanted) > 1 or any(_bits(h.read(name)) != _bits(holders[0].read(name)) for h in holders[1:]):
                raise CheckpointError(f"{name[:80]} is whole in {len(holders)} files, which must not differ")
            return None
        for axis in range(len(wanted)):
            others = [(*shape[:axis], *shape[axis + 1 :]) == (*wanted[:axis], *wanted[axis + 1 :]) for shape in shapes]
            if len(first) == len(wanted) and all(others) and sum(shape[axis] for shape in shapes) == wanted[axis]:
                return axis
        raise CheckpointError(
            f"the parts of {name[:80]} in {len(holders)} files have shapes {[list(shape) for shape in shapes][:4]}; "
            f"together they must make {list(wanted)}. Is a file missing, or of another model?"
        )

    def read(self, name: str, box: Box | None = None) -> Array:
        """See ``TensorSource.read``."""
        holders, axis = self._joins[name]
        if axis is None:
            return holders[0].read(name, box)
        box = box or whole(self.tensors[name].shape)
        found, start = [], 0
        for holder in holders:
            stop = start + holder.tensors[name].shape[axis]
            first, last = max(box[axis][0], start), min(box[axis][1], stop)
            if first < last:
                found.append(holder.read(name, (*box[:axis], (first - start, last - start), *box[axis + 1 :])))
            start = stop
        return np.concatenate(found, axis)

    def close(self) -> None:
        """Release the parts."""
        for part in self._parts:
            part.close()


def _bits(values: Array) -> bytes:
    return raw_bytes(values).tobytes()
