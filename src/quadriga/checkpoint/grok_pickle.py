"""Grok-1's release: 770 pickle files, read by a machine that can build arrays and nothing else.

Python's unpickler runs what a file tells it to. This reader does not use it: it walks the few opcodes that pickled
NumPy arrays consist of, knows a few names (all inert markers here), and refuses every other opcode or name. Array bytes
are not read while walking, only their place in the file is noted: opening the 318 GB takes 770 small reads.

    ckpt-0/tensor00000_000 .. tensor00769_000      one leaf of the JAX parameter tree each, in sorted key order:
                                                   layers come as 0, 1, 10, 11, ... 19, 2, 20, ...
    leaf = ndarray  |  QuantizedWeight8bit{weight: int8 ndarray, scales: ndarray}      value = weight * scales

Source of the layout: xai-org/grok-1@7050ed20 (checkpoint.py, model.py).
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from quadriga.checkpoint.source import TensorInfo
from quadriga.errors import CheckpointError
from quadriga.model.weight_map import Box, Piece, Shape, source_shapes, whole

_MAX_OPCODES = 4096
_MAX_STRING_BYTES = 1 << 16

_TORCH_NAMES = {"f4": "float32", "f2": "float16", "bfloat16": "bfloat16", "i1": "int8", "f8": "float64"}
_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "float64": 8}


@dataclass
class _Bytes:
    """Array data left in the file."""

    offset: int
    length: int


@dataclass
class _Dtype:
    name: str


@dataclass
class _Array:
    shape: Shape = ()
    dtype: str = ""
    data: _Bytes | None = None


@dataclass
class _Quantized:
    fields: dict[str, Any] = field(default_factory=dict)


class _Name(NamedTuple):
    """A global the file mentions; nothing is imported."""

    meaning: str


_NAMES = {
    **{(m, "_reconstruct"): _Name("array") for m in ("numpy.core.multiarray", "numpy._core.multiarray")},
    **{(m, "_frombuffer"): _Name("frombuffer") for m in ("numpy.core.numeric", "numpy._core.numeric")},
    ("numpy", "ndarray"): _Name("ndarray"),
    ("numpy", "dtype"): _Name("dtype"),
    ("ml_dtypes", "bfloat16"): _Name("bfloat16"),
    ("copyreg", "_reconstructor"): _Name("new"),
    ("copy_reg", "_reconstructor"): _Name("new"),
    ("builtins", "object"): _Name("object"),
    ("__builtin__", "object"): _Name("object"),
    ("__main__", "QuantizedWeight8bit"): _Name("quantized"),
    ("model", "QuantizedWeight8bit"): _Name("quantized"),
}


class _Machine:
    """Walks one pickle. Values are None, numbers, strings, tuples, dicts and the inert classes above."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name = file, name
        self.size = os.fstat(file.fileno()).st_size
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(
            f"{self.name} is not one of Grok-1's tensor files: {message}. Only pickled arrays are read, nothing else."
        )

    def take(self, n: int) -> bytes:
        if n > _MAX_STRING_BYTES:
            raise self.fail(f"a string of {n} bytes")
        raw = self.file.read(n)
        if len(raw) < n:
            raise self.fail("it is cut short")
        return raw

    def number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0])

    def line(self) -> str:
        raw = self.file.readline(256)
        if not raw.endswith(b"\n"):
            raise self.fail("a name without an end")
        return raw[:-1].decode("ascii", errors="replace")

    def skip(self, length: int) -> _Bytes:
        offset = self.file.tell()
        if length > self.size - offset:
            raise self.fail("it is cut short")
        self.file.seek(length, os.SEEK_CUR)
        return _Bytes(offset, length)

    def pop(self) -> Any:
        if not self.stack or (self.marks and len(self.stack) <= self.marks[-1]):
            raise self.fail("its opcodes do not fit together")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise self.fail("its opcodes do not fit together")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def run(self) -> Any:
        for _ in range(_MAX_OPCODES):
            code = self.take(1)
            if code == b".":
                return self.pop()
            self.step(code)
        raise self.fail(f"more than {_MAX_OPCODES} opcodes")

    def step(self, code: bytes) -> None:
        push = self.stack.append
        match code:
            case b"\x80":  # protocol
                if self.number("B") > 5:
                    raise self.fail("an unknown pickle protocol")
            case b"\x95":  # frame
                self.number("Q")
            case b"c":
                push(self.named(self.line(), self.line()))
            case b"\x93":
                attribute, module = self.pop(), self.pop()
                push(self.named(module, attribute))
            case b"N":
                push(None)
            case b"\x88" | b"\x89":
                push(code == b"\x88")
            case b"K":
                push(self.number("B"))
            case b"M":
                push(self.number("H"))
            case b"J":
                push(self.number("i"))
            case b"\x8a":  # a long integer, of at most eight bytes here
                push(int.from_bytes(self.take(min(self.number("B"), 8)), "little", signed=True))
            case b"\x8c" | b"X" | b"\x8d":
                push(self.take(self.number({b"\x8c": "B", b"X": "I", b"\x8d": "Q"}[code])).decode("utf-8", "replace"))
            case b"C" | b"B" | b"\x8e" | b"\x96":
                push(self.skip(self.number({b"C": "B", b"B": "I", b"\x8e": "Q", b"\x96": "Q"}[code])))
            case b"(":
                self.marks.append(len(self.stack))
            case b")":
                push(())
            case b"t":
                push(tuple(self.pop_mark()))
            case b"\x85" | b"\x86" | b"\x87":
                items = [self.pop() for _ in range(code[0] - 0x84)]
                push(tuple(reversed(items)))
            case b"}":
                push({})
            case b"s":
                value, key = self.pop(), self.pop()
                self.assign([key, value])
            case b"u":
                self.assign(self.pop_mark())
            case b"q":
                self.memo[self.number("B")] = self.stack[-1] if self.stack else None
            case b"r":
                self.memo[self.number("I")] = self.stack[-1] if self.stack else None
            case b"\x94":
                self.memo[len(self.memo)] = self.stack[-1] if self.stack else None
            case b"h" | b"j":
                push(self.memo.get(self.number("B" if code == b"h" else "I")))
            case b"R":
                arguments, callee = self.pop(), self.pop()
                push(self.call(callee, arguments))
            case b"\x81":  # cls.__new__(*args)
                arguments, callee = self.pop(), self.pop()
                if callee != _Name("quantized") or arguments != ():
                    raise self.fail("it makes an object that is no array")
                push(_Quantized())
            case b"b":
                state, target = self.pop(), self.pop()
                push(self.build(target, state))
            case _:
                raise self.fail(f"the opcode {code!r} has no place in an array")

    def named(self, module: object, attribute: object) -> _Name:
        name = _NAMES.get((str(module), str(attribute)))
        if name is None:
            raise self.fail(f"it names {str(module)[:60]}.{str(attribute)[:60]}")
        return name

    def assign(self, items: list[Any]) -> None:
        target = self.stack[-1] if self.stack else None
        if not isinstance(target, dict) or len(items) % 2 or not all(isinstance(k, str) for k in items[::2]):
            raise self.fail("its opcodes do not fit together")
        target.update(zip(items[::2], items[1::2], strict=True))

    def call(self, callee: object, arguments: object) -> Any:
        meaning = callee.meaning if isinstance(callee, _Name) else None
        match meaning, arguments:
            case "array", (_Name("ndarray"), _, _):
                return _Array()
            case "dtype", (str() as code, *_):
                return _Dtype(code)
            case "dtype", (_Name("bfloat16"), *_):
                return _Dtype("bfloat16")
            case "frombuffer", (_Bytes() as data, _Dtype() as dtype, tuple() as shape, str() as order):
                return self.array(shape, dtype, order == "F", data)
            case "new", (_Name("quantized"), _Name("object"), None):
                return _Quantized()
        raise self.fail("it calls something that builds no array")

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
        raise self.fail("it sets the state of something that is no array")

    def array(self, shape: tuple[Any, ...], dtype: _Dtype, fortran: bool, data: object) -> _Array:
        name = _TORCH_NAMES.get(dtype.name.lstrip("<=|"))
        sizes_fine = len(shape) <= 4 and all(isinstance(n, int) and 0 <= n < 2**31 for n in shape)
        if name is None or not sizes_fine or (fortran and len(shape) > 1):
            raise self.fail(f"an array of {dtype.name!r} and shape {str(shape)[:80]}")
        if not isinstance(data, _Bytes) or data.length != prod(shape) * _WIDTHS[name]:
            raise self.fail("an array whose bytes do not fill its shape")
        return _Array(shape, name, data)


@dataclass(frozen=True)
class _Leaf:
    file: Path
    values: _Array
    scales: _Array | None


def _leaf(path: Path) -> _Leaf:
    with path.open("rb") as file:
        machine = _Machine(file, path.name)
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

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """See ``TensorSource.read``; quantised leaves come out as float32 weight * scales."""
        leaf = self._leaves[name]
        box = box or whole(leaf.values.shape)
        values = self._read_array(leaf.file, leaf.values, box)
        if leaf.scales is None:
            return values
        scale_box = tuple((0, 1) if n == 1 else r for n, r in zip(leaf.scales.shape, box, strict=True))
        return values.float() * self._read_array(leaf.file, leaf.scales, scale_box).float()

    def _read_array(self, file: Path, array: _Array, box: Box) -> torch.Tensor:
        assert array.data is not None, "an array without data was refused"
        dtype = getattr(torch, array.dtype)
        (start, stop), rest = (box[0] if box else (0, 1)), array.shape[1:]
        row = prod(rest) * _WIDTHS[array.dtype]
        with file.open("rb") as handle:
            handle.seek(array.data.offset + start * row)
            raw = np.fromfile(handle, dtype=np.uint8, count=(stop - start) * row)
        if len(raw) < (stop - start) * row:
            raise CheckpointError(f"{file.name} became shorter while it was read")
        values = torch.from_numpy(raw).view(dtype).view(stop - start, *rest)
        return values[(slice(None), *(slice(*r) for r in box[1:]))] if array.shape else values[0]

    def close(self) -> None:
        """Nothing stays open between reads."""


def _read_dtype(leaf: _Leaf) -> str:
    return "float32" if leaf.scales is not None else leaf.values.dtype
