"""What ``torch.save`` writes, without running any of it: where each tensor of a state dictionary lies in the file.

    ZIP, nothing compressed:   ROOT/data.pkl           {name: tensor over storage K from element o, sizes, strides}
                               ROOT/data/K             the numbers of storage K
                               ROOT/byteorder          "little" (files since torch 2.1)

The pickle is walked by :class:`~quadriga.io.pickle_machine.PickleMachine`, which knows dictionaries of tensors
and nothing else. The directory of the ZIP is read here and bounded, so a forged one costs no more than its bytes. Files
from before torch 1.6 (no ZIP) are refused by name. Source: torch/serialization.py and torch/_utils.py of torch 2.13. No
torch.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from quadriga.errors import CheckpointError
from quadriga.io.pickle_machine import Name, PickleMachine
from quadriga.model.weight_map import Shape

_MAX_DIRECTORY_BYTES = 64 << 20
_MAX_PICKLE_BYTES = 32 << 20
_MAX_OPCODES = 1 << 21  # some 35 a tensor
_WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
}
_NOT_ZIP = (
    "it is no ZIP file, as torch has saved since 1.6. Load it with an older torch where it was made and save it again"
)


class _Storage(NamedTuple):
    key: str
    dtype: str
    numel: int


@dataclass(frozen=True)
class TorchTensor:
    """Where one tensor's numbers lie, one after the other."""

    shape: Shape
    dtype: str
    offset: int
    """From the start of the file."""


def read_tensors(fd: int, name: str) -> dict[str, TorchTensor]:
    """The tensors of an open ``torch.save`` file; no number is read.

    Raises:
        CheckpointError: no such file, or one with anything but a dictionary of contiguous floating-point tensors.
    """
    size = os.fstat(fd).st_size
    entries = _entries(fd, size, name)
    roots = [entry.removesuffix("/data.pkl") for entry in entries if entry.endswith("/data.pkl")]
    if len(roots) != 1:
        raise _fail(name, f"it must hold one data.pkl, it has {len(roots)}")
    order = entries.get(f"{roots[0]}/byteorder")
    if order is not None and _bytes(fd, *order, name)[:16] != b"little":
        raise _fail(name, "its numbers are big-endian")
    raw = _bytes(fd, *entries[f"{roots[0]}/data.pkl"], name)
    stored = _Machine(io.BytesIO(raw), f"{name}: data.pkl", len(raw), _MAX_OPCODES).run()
    if not isinstance(stored, dict) or not stored or not all(isinstance(t, _Tensor) for t in stored.values()):
        raise _fail(name, "it is not a dictionary of tensors by name, as a model's weights are saved")
    return {tensor: _placed(t, entries, roots[0], f"{name}: tensor {tensor[:80]!r}") for tensor, t in stored.items()}


def _placed(tensor: _Tensor, entries: Mapping[str, tuple[int, int]], root: str, what: str) -> TorchTensor:
    storage, width = tensor.storage, _WIDTHS[tensor.storage.dtype]
    place = entries.get(f"{root}/data/{storage.key}")
    if place is None or place[1] != storage.numel * width:
        raise CheckpointError(f"{what} lies in a storage that is not in the file, or not of the size it says")
    if tensor.first + prod(tensor.shape) > storage.numel:
        raise CheckpointError(f"{what} goes past the end of its storage")
    return TorchTensor(tensor.shape, storage.dtype, place[0] + tensor.first * width)


def _fail(name: str, message: str) -> CheckpointError:
    return CheckpointError(f"{name} is not a usable torch file: {message}")


# The pickle ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    first: int
    shape: Shape


_NAMES = {
    ("collections", "OrderedDict"): Name("dict"),
    ("torch._utils", "_rebuild_tensor_v2"): Name("tensor"),
    ("torch._utils", "_rebuild_parameter"): Name("parameter"),
    **{("torch", storage): Name(dtype) for storage, dtype in _STORAGES.items()},
}


class _Machine(PickleMachine):
    """Builds dictionaries of tensors."""

    names = _NAMES
    wanted = "a model's weights as torch saves them"

    def persistent(self, identity: object) -> Any:
        match identity:
            case ("storage", Name(dtype), str() as key, str(), int() as numel) if dtype in _WIDTHS and numel >= 0:
                return _Storage(key, dtype, numel)
        return super().persistent(identity)

    def call(self, callee: object, arguments: object) -> Any:
        meaning = callee.meaning if isinstance(callee, Name) else None
        match meaning, arguments:
            case "dict", ():
                return {}
            case "tensor", (_Storage() as storage, int() as first, tuple() as shape, tuple() as strides, *_):
                return self.tensor(storage, first, self.sizes(shape), self.sizes(strides))
            case "parameter", (_Tensor() as tensor, *_):
                return tensor
        return super().call(callee, arguments)

    def build(self, target: object, state: object) -> Any:
        # A module's state dictionary carries the versions of its classes as an attribute.
        if isinstance(target, dict) and isinstance(state, dict) and state.keys() == {"_metadata"}:
            return target
        return super().build(target, state)

    def tensor(self, storage: _Storage, first: int, shape: Shape, strides: Shape) -> _Tensor:
        """A tensor whose numbers lie one after the other."""
        wanted, step = [], 1
        for n in reversed(shape):
            wanted.append(step)
            step *= n
        moves = [(stride, want) for n, stride, want in zip(shape, strides, reversed(wanted), strict=False) if n != 1]
        if len(strides) != len(shape) or first < 0 or any(stride != want for stride, want in moves):
            raise self.fail(f"a tensor of shape {list(shape)} whose numbers do not lie one after the other")
        return _Tensor(storage, first, shape)


# The ZIP -------------------------------------------------------------------------------------------------------------

_END = struct.Struct("<4s4H2LH")
_END64_PLACE = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")


def _bytes(fd: int, offset: int, length: int, name: str, most: int = _MAX_PICKLE_BYTES) -> bytes:
    if length > most:
        raise _fail(name, f"its list of tensors has {length} bytes, more than {most}")
    raw = os.pread(fd, length, offset)
    if len(raw) < length:
        raise _fail(name, "it is cut short")
    return raw


def _entries(fd: int, size: int, name: str) -> dict[str, tuple[int, int]]:
    """Name -> (offset, length) of everything in the ZIP."""
    n_entries, length, offset = _directory(fd, size, name)
    if length > _MAX_DIRECTORY_BYTES or offset + length > size or n_entries * _ENTRY.size > length:
        raise _fail(name, "its directory claims more than the file holds")
    raw, at = _bytes(fd, offset, length, name, _MAX_DIRECTORY_BYTES), 0
    found: dict[str, tuple[int, int]] = {}
    for _ in range(n_entries):
        if at + _ENTRY.size > len(raw):
            raise _fail(name, "its directory is cut short")
        entry, at = _one_entry(raw, at, name)
        if entry[0] in found:
            raise _fail(name, f"it holds {entry[0][:80]!r} twice")
        found[entry[0]] = _data_of(fd, size, *entry, name)
    return found


def _directory(fd: int, size: int, name: str) -> tuple[int, int, int]:
    """(entries, bytes, offset) of the directory, from the record at the file's end."""
    start = max(0, size - (1 << 16) - _END.size)
    tail = os.pread(fd, size - start, start)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size or os.pread(fd, 2, 0) != b"PK":
        raise _fail(name, _NOT_ZIP)
    _, _, _, _, n_entries, length, offset, _ = _END.unpack_from(tail, at)
    place = at - _END64_PLACE.size
    if place >= 0 and tail[place : place + 4] == b"PK\6\7":
        record = os.pread(fd, _END64.size, min(_END64_PLACE.unpack_from(tail, place)[2], size))
        if len(record) < _END64.size or record[:4] != b"PK\6\6":
            raise _fail(name, "its directory is not where the file says")
        *_, n_entries, length, offset = _END64.unpack(record)
    return n_entries, length, offset


def _one_entry(raw: bytes, at: int, name: str) -> tuple[tuple[str, int, int], int]:
    """((name, offset of its local header, length), where the next entry starts)."""
    fields = _ENTRY.unpack_from(raw, at)
    sign, flags, method, packed, length = fields[0], fields[3], fields[4], fields[8], fields[9]
    n_name, n_extra, n_comment, offset = fields[10], fields[11], fields[12], fields[16]
    start = at + _ENTRY.size
    text, extra = raw[start : start + n_name], raw[start + n_name : start + n_name + n_extra]
    if sign != b"PK\1\2" or len(text) < n_name or len(extra) < n_extra:
        raise _fail(name, "its directory is malformed")
    # Values beyond 32 bits stand in an extra field, in this order.
    wide = _wide_values(extra)
    values = [wide.pop(0) if value == 0xFFFFFFFF and wide else value for value in (length, packed, offset)]
    if method != 0 or flags & 1 or values[0] != values[1]:
        raise _fail(name, "its parts are compressed or encrypted; torch saves them as they are")
    entry = (text.decode("utf-8", "replace"), values[2], values[0])
    return entry, start + n_name + n_extra + n_comment


def _wide_values(extra: bytes) -> list[int]:
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            body = extra[at + 4 : at + 4 + length]
            return list(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
        at += 4 + length
    return []


def _data_of(fd: int, size: int, entry: str, header: int, length: int, name: str) -> tuple[int, int]:
    """Where an entry's bytes are: behind a header of its own, whose length its directory entry does not tell."""
    raw = os.pread(fd, _LOCAL.size, min(header, size))
    if len(raw) < _LOCAL.size or raw[:4] != b"PK\3\4":
        raise _fail(name, f"{entry[:80]!r} is not where its directory says")
    n_name, n_extra = _LOCAL.unpack(raw)[-2:]
    start = header + _LOCAL.size + n_name + n_extra
    if start + length > size:
        raise _fail(name, f"{entry[:80]!r} ends past the end of the file. It is cut short or forged")
    return start, length
