"""A checkpoint computed from another one: upcycled, pruned, merged, or with an adapter folded in.

    base Checkpoint ──► Edit: rows of one matrix ──► DerivedSource ──► load_parameters / convert.write

An edit states, for any run of rows of any matrix, the numbers it has in the result. So a derived checkpoint is opened,
loaded, packed and converted by the code that does so for files, with one part in memory at a time, and is written as
anything ``convert`` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, Protocol

import numpy as np

from quadriga.io.open import Checkpoint, identity_map
from quadriga.io.source import TensorInfo
from quadriga.model.config import ModelConfig
from quadriga.model.weight_map import Box, check_cover, parameter_shapes, whole
from quadriga.quant.dtypes import Array, name_of


class Edit(Protocol):
    """What is done to a base checkpoint."""

    config: ModelConfig
    """Of the result."""
    recipe: str
    """What is done, in words that differ whenever the numbers do; it goes into manifests and resumed conversions."""

    def dtype(self, name: str) -> np.dtype[Any]:
        """What :meth:`rows` returns for this parameter."""
        ...

    def rows(self, name: str, expert: int | None, first: int, last: int) -> Array:
        """Rows [first, last) of a matrix (n, columns), or elements of a vector (n,).

        Args:
            name: a parameter of the result.
            expert: which matrix of a parameter (E, rows, columns); None for others.
        """
        ...


class DerivedSource:
    """The parameters of an edited checkpoint as a :class:`~quadriga.io.source.TensorSource`."""

    def __init__(self, edit: Edit) -> None:
        self._edit = edit
        self.tensors: Mapping[str, TensorInfo] = {
            name: _info(shape, edit.dtype(name)) for name, shape in parameter_shapes(edit.config).items()
        }

    def read(self, name: str, box: Box | None = None) -> Array:
        """See ``TensorSource.read``; one expert's matrix is computed at a time."""
        box = box or whole(self.tensors[name].shape)
        if len(box) < 3:
            return self._edit.rows(name, None, *box[0])[(slice(None), *(slice(*r) for r in box[1:]))]
        matrices = [self._edit.rows(name, expert, *box[1])[:, slice(*box[2])] for expert in range(*box[0])]
        return np.stack(matrices)

    def close(self) -> None:
        """Nothing is held open: the base checkpoint is closed by whoever opened it."""


def _info(shape: tuple[int, ...], dtype: np.dtype[Any]) -> TensorInfo:
    return TensorInfo(shape, name_of(dtype), prod(shape) * dtype.itemsize)


def derive(base: Checkpoint, edit: Edit) -> Checkpoint:
    """``base`` under an edit. Keep the base open while the result is read; closing the result leaves it open."""
    source, pieces = DerivedSource(edit), identity_map(edit.config)
    check_cover(pieces, parameter_shapes(edit.config), {name: info.shape for name, info in source.tensors.items()})
    return Checkpoint("derived", base.path, edit.config, "quadriga", source, pieces, base=base, recipe=edit.recipe)


class Unchanged:
    """The edit that changes nothing; others begin with it and say what they change."""

    def __init__(self, base: Checkpoint, config: ModelConfig, recipe: str) -> None:
        self.base, self.config, self.recipe = base, config, recipe

    def dtype(self, name: str) -> np.dtype[Any]:
        """See :class:`Edit`."""
        return self.base.parameters.dtype(name)

    def rows(self, name: str, expert: int | None, first: int, last: int) -> Array:
        """See :class:`Edit`."""
        shape = parameter_shapes(self.base.config)[name]
        if expert is None:
            return self.base.parameters.read(name, ((first, last), *whole(shape[1:])))
        box = ((expert, expert + 1), (first, last), (0, shape[2]))
        return self.base.parameters.read(name, box).reshape(last - first, shape[2])
