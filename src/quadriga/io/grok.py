"""Grok-1's release: 770 pickle files, read by a machine that can build arrays and nothing else.

Python's unpickler runs what a file tells it to. This reader does not use it (``pickle_machine``): it knows the names
that pickled NumPy arrays consist of and refuses every other. Array bytes are not read while walking, only their place
in the file is noted: opening the 318 GB takes 770 small reads.

    ckpt-0/tensor00000_000 .. tensor00769_000      one leaf of the JAX parameter tree each, in sorted key order:
                                                   layers come as 0, 1, 10, 11, ... 19, 2, 20, ...
    leaf = ndarray  |  QuantizedWeight8bit{weight: int8 ndarray, scales: ndarray}      value = weight * scales

Source of the layout: xai-org/grok-1@7050ed20 (checkpoint.py, model.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from quadriga.errors import CheckpointError
from quadriga.io.pickle_machine import Bytes, Name, PickleMachine
from quadriga.io.source import TensorInfo
from quadriga.model.weight_map import Box, Piece, Shape, source_shapes, whole
from quadriga.quant.dtypes import DTYPES, Array, as_float32

_MAX_OPCODES = 4096

_TORCH_NAMES = {"f4": "float32", "f2": "float16", "bfloat16": "bfloat16", "i1": "int8", "f8": "float64"}
_READ: dict[str, np.dtype[Any]] = {**DTYPES, "int8": np.dtype(np.int8)}
_WIDTHS = {name: dtype.itemsize for name, dtype in _READ.items()}


@dataclass
class _Dtype:
    name: str


@dataclass
class _Array:
    shape: Shape = ()
    dtype: str = ""
    data: Bytes | None = None


@dataclass
class _Quantized:
    fields: dict[str, Any] = field(default_factory=dict)


_NAMES = {
    **{(m, "_reconstruct"): Name("array") for m in ("numpy.core.multiarray", "numpy._core.multiarray")},
    **{(m, "_frombuffer"): Name("frombuffer") for m in ("numpy.core.numeric", "numpy._core.numeric")},
    ("numpy", "ndarray"): Name("ndarray"),
    ("numpy", "dtype"): Name("dtype"),
    ("ml_dtypes", "bfloat16"): Name("bfloat16"),
    ("copyreg", "_reconstructor"): Name("new"),
    ("copy_reg", "_reconstructor"): Name("new"),
    ("builtins", "object"): Name("object"),
    ("__builtin__", "object"): Name("object"),
    ("__main__", "QuantizedWeight8bit"): Name("quantized"),
    ("model", "QuantizedWeight8bit"): Name("quantized"),
}


class _Machine(PickleMachine):
    """Builds arrays and quantised weights."""

    names = _NAMES
    wanted = "one of Grok-1's tensor files"

    def new(self, callee: object, arguments: object) -> Any:
        if callee != Name("quantized") or arguments != ():
            return super().new(callee, arguments)
        return _Quantized()

    def call(self, callee: object, arguments: object) -> Any:
        meaning = callee.meaning if isinstance(callee, Name) else None
        match meaning, arguments:
            case "array", (Name("ndarray"), _, _):
                return _Array()
            case "dtype", (str() as code, *_):
                return _Dtype(code)
            case "dtype", (Name("bfloat16"), *_):
                return _Dtype("bfloat16")
            case "frombuffer", (Bytes() as data, _Dtype() as dtype, tuple() as shape, str() as order):
                return self.array(shape, dtype, order == "F", data)
            case "new", (Name("quantized"), Name("object"), None):
                return _Quantized()
        return super().call(callee, arguments)

    def build(self, target: object, state: object) -> Any:
        match target, state:
            case _Array(), (int(), tuple() as shape, _Dtype() as dtype, bool() | int() as fortran, data):
                return self.array(shape, dtype, bool(fortran), data)
            case _Dtype(), (int(), str() as order, *_):
                if order == ">":
                    raise self.fail("big-endian numbers")
                return target
            case _Quantized(), dict():
                target.fields.update(state)
                return target
            case _Quantized(), (None, dict() as slots):
                target.fields.update(slots)
                return target
        return super().build(target, state)

    def array(self, shape: tuple[Any, ...], dtype: _Dtype, fortran: bool, data: object) -> _Array:
        name = _TORCH_NAMES.get(dtype.name.lstrip("<=|"))
        shape = self.sizes(shape)
        if name is None or (fortran and len(shape) > 1):
            raise self.fail(f"an array of {dtype.name[:40]!r} and shape {list(shape)}")
        if not isinstance(data, Bytes) or data.length != prod(shape) * _WIDTHS[name]:
            raise self.fail("an array whose bytes do not fill its shape")
        return _Array(shape, name, data)


@dataclass(frozen=True)
class _Leaf:
    file: Path
    values: _Array
    scales: _Array | None


def _leaf(path: Path) -> _Leaf:
    with path.open("rb") as file:
        machine = _Machine(file, path.name, os.fstat(file.fileno()).st_size, _MAX_OPCODES)
        root = machine.run()
        if isinstance(root, _Array):
            return _Leaf(path, root, None)
        if isinstance(root, _Quantized):
            weight, scales = root.fields.get("weight"), root.fields.get("scales")
            if isinstance(weight, _Array) and isinstance(scales, _Array):
                _check_broadcast(machine, weight.shape, scales.shape)
                return _Leaf(path, weight, scales)
        raise machine.fail("its content is neither an array nor a quantised weight")


def _check_broadcast(machine: _Machine, weight: Shape, scales: Shape) -> None:
    fits = len(weight) == len(scales) and all(s in (1, w) for w, s in zip(weight, scales, strict=True))
    if not fits:
        raise machine.fail(f"scales of shape {list(scales)} do not fit a weight of shape {list(weight)}")


class GrokSource:
    """Grok-1's released files as a TensorSource; names are the paths of the JAX tree (``families.grok1``, layout jax).

    Args:
        path: the folder with the tensor files.
        pieces: the weight map, which says which leaves there are and what shape each must have.

    Raises:
        CheckpointError: a missing or foreign file, or a leaf of the wrong shape: the tree order is checked by shape.
    """

    def __init__(self, path: Path, pieces: list[Piece]) -> None:
        self.path = path
        expected = source_shapes(pieces)
        order = sorted(expected)
        files = sorted(f for f in path.iterdir() if re.fullmatch(r"tensor\d{5}_000", f.name))
        if len(files) != len(order):
            raise CheckpointError(f"{path} must hold {len(order)} tensor files for this model, got {len(files)}")
        self._leaves: dict[str, _Leaf] = {}
        for name, file in zip(order, files, strict=True):
            leaf = _leaf(file)
            if leaf.values.shape != expected[name]:
                raise CheckpointError(
                    f"{file.name} should be {name} of shape {list(expected[name])}, it has {list(leaf.values.shape)}"
                )
            self._leaves[name] = leaf
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(leaf.values.shape, _read_dtype(leaf), prod(leaf.values.shape) * _WIDTHS[leaf.values.dtype])
            for name, leaf in self._leaves.items()
        }

    def read(self, name: str, box: Box | None = None) -> Array:
        """See ``TensorSource.read``; quantised leaves come out as float32 weight * scales."""
        leaf = self._leaves[name]
        box = box or whole(leaf.values.shape)
        values = self._read_array(leaf.file, leaf.values, box)
        if leaf.scales is None:
            return values
        scale_box = tuple((0, 1) if n == 1 else r for n, r in zip(leaf.scales.shape, box, strict=True))
        return as_float32(values) * as_float32(self._read_array(leaf.file, leaf.scales, scale_box))

    def _read_array(self, file: Path, array: _Array, box: Box) -> Array:
        assert array.data is not None, "an array without data was refused"
        dtype = _READ[array.dtype]
        (start, stop), rest = (box[0] if box else (0, 1)), array.shape[1:]
        row = prod(rest) * _WIDTHS[array.dtype]
        with file.open("rb") as handle:
            handle.seek(array.data.offset + start * row)
            raw = np.fromfile(handle, dtype=np.uint8, count=(stop - start) * row)
        if len(raw) < (stop - start) * row:
            raise CheckpointError(f"{file.name} became shorter while it was read")
        values = raw.view(dtype).reshape(stop - start, *rest)
        return values[(slice(None), *(slice(*r) for r in box[1:]))] if array.shape else values[0]

    def close(self) -> None:
        """Nothing stays open between reads."""


def _read_dtype(leaf: _Leaf) -> str:
    return "float32" if leaf.scales is not None else leaf.values.dtype
