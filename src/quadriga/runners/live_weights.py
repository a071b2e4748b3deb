"""A model on the CPU's kernels whose weights training changes.

    (name, values) ─► packed matrices, overwritten where they lie ─► CompiledModel, which computes from them

Matrices that an adapter changes are handed to the kernels as they lie, so new numbers in the same memory are all there
is to do. A vector may have been turned into another one when the program was captured (a norm's 1 + w, exp of a rate);
where one of them changes, the program is captured again over the same matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from quadriga.kernels.cpu.packing import Packed, Parameter, pack
from quadriga.model.adapter_spec import target_of
from quadriga.model.weight_map import stays_float32
from quadriga.runners.compiled import CompiledModel

Values = NDArray[np.float32]


class LiveWeights:
    """Packed weights, and the model over them.

    Args:
        form: what matrices are packed as, a name of ``quant.packed.PACKED``; routers stay float32.
        build: makes a model of packed parameters.
    """

    def __init__(self, form: str, build: Callable[[dict[str, Parameter]], CompiledModel]) -> None:
        self._form, self._build = form, build
        self._parameters: dict[str, Parameter] = {}
        self._model: CompiledModel | None = None

    def load(self, weights: Iterable[tuple[str, Values]]) -> CompiledModel:
        """The model with these weights: the first time all of them, later those that changed.

        What its cache holds is of the weights before.
        """
        anew = self._model is None
        for name, values in weights:
            known = self._parameters.get(name)
            if known is None:
                self._parameters[name] = _packed(name, values, self._form)
            else:
                _overwrite(known, values)
            anew = anew or target_of(name) is None
        if anew:
            self._model = self._build(self._parameters)
        assert self._model is not None, "built the first time"
        return self._model


def _packed(name: str, values: Values, form: str) -> Parameter:
    if values.ndim == 1:
        return np.array(values, dtype=np.float32)
    if values.ndim == 2:
        return pack(np.ascontiguousarray(values), "float32" if stays_float32(name) else form)
    return [pack(np.ascontiguousarray(expert), form) for expert in values]


def _overwrite(parameter: Parameter, values: Values) -> None:
    match parameter:
        case Packed():
            pack(np.ascontiguousarray(values), parameter.format, out=parameter.data)
        case np.ndarray():
            parameter[...] = values
        case _:
            for one, expert in zip(parameter, values, strict=True):
                pack(np.ascontiguousarray(expert), one.format, out=one.data)
