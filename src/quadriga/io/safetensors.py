"""Safetensors files, read lazily and checked completely, written in place and in any order.

    u64 header length | JSON {name: {dtype, shape, data_offsets}} | tensor bytes, contiguous, no gaps

The format's own library loads some files the format forbids (duplicate keys) and maps files into memory (a file that is
cut short then kills the process), so the header is read here, strictly, and bytes come by ``pread``. One directory is
one :class:`TensorSource`, sharded or not.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from quadriga.errors import CheckpointError
from quadriga.io.file_plan import FilePlan
from quadriga.io.json_files import parse_json, read_json
from quadriga.io.source import TensorInfo
from quadriga.io.weight_names import without_copies
from quadriga.model.weight_map import Box, Shape, whole
from quadriga.quant.dtypes import DTYPES, Array, raw_bytes

_MAX_HEADER_BYTES = 25 << 20
"""100 bytes a tensor: a quarter of a million tensors. DBRX split by expert has some 2,000, over 61 files."""

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CODES = {name: code for code, name in _DTYPES.items()}
_BYTES = {"U8": "uint8"}
_PACKED = {"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "F8_E4M3": "float8_e4m3fn"}
_NUMPY: dict[str, np.dtype[Any]] = {
    **DTYPES,
    **{name: np.dtype(name) for name in ("uint8", "int8", "int16", "int32", "int64")},
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npy", ".npz", ".msgpack", ".h5")
"""Formats that can run code or that nobody here reads; refused with a pointer to safetensors."""


@dataclass(frozen=True)
class _Place:
    file: int
    offset: int
    info: TensorInfo


class SafetensorsSource:
    """A safetensors file, or a directory of shards with or without an index; see ``TensorSource``.

    Args:
        with_bytes: accept tensors of bytes too, which are no numbers yet: somebody else makes weights of them.
        with_packed: accept those, integers and float8 (``io.quantised``).

    Raises (when opened):
        CheckpointError: a missing, foreign or malformed file; see the module docstring.
    """

    def __init__(self, path: Path, *, with_bytes: bool = False, with_packed: bool = False) -> None:
        self.path = path
        self._codes = _DTYPES | (_BYTES if with_bytes or with_packed else {}) | (_PACKED if with_packed else {})
        self._fds: list[int] = []
        weakref.finalize(self, _close, self._fds)  # who forgets to close it leaves no file open for ever
        self._names: list[str] = []
        self._places: dict[str, _Place] = {}
        try:
            for file, expected in _shards(path):
                self._add(file, expected)
        except BaseException:
            self.close()
            raise
        self.tensors: Mapping[str, TensorInfo] = {name: place.info for name, place in self._places.items()}

    def _add(self, file: Path, expected: set[str] | None) -> None:
        try:
            fd = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror}") from None
        self._fds.append(fd)
        self._names.append(file.name)
        header = _read_header(fd, file.name, self._codes)
        if expected is not None and expected != header.keys():
            missing, extra = sorted(expected - header.keys()), sorted(header.keys() - expected)
            raise CheckpointError(
                f"{file.name} does not hold what {INDEX} says: {len(missing)} tensors missing {missing[:4]}, "
                f"{len(extra)} unexpected {extra[:4]}. Are the shards from one checkpoint?"
            )
        for name, (offset, info) in header.items():
            if name in self._places:
                other = self._names[self._places[name].file]
                raise CheckpointError(f"tensor {name[:80]!r} is in both {other} and {file.name}")
            self._places[name] = _Place(len(self._fds) - 1, offset, info)

    def read(self, name: str, box: Box | None = None) -> Array:
        """See ``TensorSource.read``: the rows of the box are read, in the stored dtype."""
        place = self._places[name]
        dtype = _NUMPY[place.info.dtype]
        shape = place.info.shape
        if not shape or prod(shape) == 0:
            return (
                np.empty(shape, dtype=dtype) if prod(shape) == 0 else self._rows(place, name, 0, 1, dtype).reshape(())
            )
        box = box or whole(shape)
        start, stop = box[0]
        row = prod(shape[1:])
        values = self._rows(place, name, start * row, stop * row, dtype).reshape(stop - start, *shape[1:])
        return values[(slice(None), *(slice(*r) for r in box[1:]))]

    def _rows(self, place: _Place, name: str, start: int, stop: int, dtype: np.dtype[Any]) -> Array:
        width = dtype.itemsize
        # np.empty, not bytearray: that one fills with zeros first, a second pass over every byte.
        values = np.empty(stop - start, dtype=dtype)
        buffer = raw_bytes(values).data
        offset, done = place.offset + start * width, 0
        while done < len(buffer):
            # One preadv moves at most 2 GiB.
            got = os.preadv(self._fds[place.file], [buffer[done : done + (1 << 30)]], offset + done)
            if got == 0:
                raise CheckpointError(
                    f"{self._names[place.file]} became shorter while it was read; tensor {name!r} is cut off"
                )
            done += got
        return values

    def close(self) -> None:
        """Release the files."""
        _close(self._fds)


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _shards(path: Path) -> list[tuple[Path, set[str] | None]]:
    """The files of a checkpoint and, where an index says so, the tensors each must hold."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(_unsafe(path.name))
        return [(path, None)]
    if (path / INDEX).exists():
        shards = _indexed_shards(path, path / INDEX)
        stale = is_left_over(path, {file.name for file, _ in shards})
        return [(path / SINGLE, None)] if stale else _present(path, shards)
    files = sorted(path.glob("*.safetensors"))
    if (path / SINGLE) in files:
        return [(path / SINGLE, None)]
    if not files:
        unsafe = sorted(f.name for f in path.iterdir() if f.suffix in UNSAFE_SUFFIXES)
        raise CheckpointError(_unsafe(unsafe[0]) if unsafe else f"{path} holds no *.safetensors files")
    return [(path / name, None) for name in without_copies([file.name for file in files])]


def _unsafe(name: str) -> str:
    return (
        f"{name} is not safetensors. Pickle-based files can run code in the programs that open them: convert them to "
        "safetensors where they were made (transformers: save_pretrained with safe_serialization=True). Files of "
        "torch.save (pytorch_model.bin) can be converted here, running nothing of them: `quadriga convert --pickles`."
    )


def _indexed_shards(path: Path, index: Path) -> list[tuple[Path, set[str] | None]]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{INDEX} must have a 'weight_map' from tensor names to file names")
    by_file: dict[str, set[str]] = {}
    for tensor, file in table.items():
        plain = isinstance(file, str) and file == Path(file).name and file.endswith(".safetensors") and "\0" not in file
        if not plain:
            raise CheckpointError(
                f"{INDEX} puts tensor {tensor[:80]!r} into {str(file)[:80]!r}; shards must be *.safetensors files in "
                "the same folder"
            )
        by_file.setdefault(file, set()).add(tensor)
    return [(path / file, tensors) for file, tensors in sorted(by_file.items())]


def is_left_over(path: Path, named: Collection[str]) -> bool:
    """Whether a larger model, over which this one was saved, left the index that names these files.

    transformers takes the single file, where there is one.
    """
    return (path / SINGLE).is_file() and SINGLE not in named


def _present(path: Path, shards: list[tuple[Path, set[str] | None]]) -> list[tuple[Path, set[str] | None]]:
    """The shards, all of which must be there and in the model's folder."""
    root = path.resolve()
    for file, _ in shards:
        if not file.exists():
            raise CheckpointError(f"shard {file.name} is named by {INDEX} but missing; fetch it again")
        if file.is_symlink() and not _stays_near(file.resolve(), root):
            raise CheckpointError(f"shard {file.name} is a link that leaves the model's folder")
    return shards


def _stays_near(target: Path, root: Path) -> bool:
    """True inside the folder, or inside the blob store that the Hugging Face cache links its snapshots to."""
    return target.is_relative_to(root) or (
        root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    )


def _read_header(fd: int, name: str, codes: Mapping[str, str]) -> dict[str, tuple[int, TensorInfo]]:
    """Tensor name -> (offset in the file, info), or the error that says what is wrong with the file."""

    def fail(message: str) -> CheckpointError:
        return CheckpointError(f"{name} is not a usable safetensors file: {message}")

    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < 8 or length > size - 8:
        raise fail(f"its header claims {length} bytes, the file has {size}. It is cut short or forged")
    if length > _MAX_HEADER_BYTES:
        raise fail(f"its header claims {length} bytes, more than {_MAX_HEADER_BYTES}")
    table = parse_json(os.pread(fd, length, 8), f"the header of {name}")
    metadata = table.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise fail("__metadata__ must be a table of strings")
    tensors: dict[str, tuple[int, TensorInfo]] = {}
    spans = []
    for tensor, entry in table.items():
        what = f"tensor {tensor[:80]!r}"
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise fail(f"{what} must have dtype, shape and data_offsets")
        code, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in codes:
            raise fail(f"{what} has dtype {code!r}; weights are {', '.join(_DTYPES)}")
        if not _are_sizes(shape) or len(shape) > 8 or not _are_sizes(span) or len(span) != 2:
            raise fail(f"{what} must have a shape and two offsets of whole numbers")
        dtype = codes[code]
        start, stop = span
        nbytes = prod(shape) * _NUMPY[dtype].itemsize
        if stop - start != nbytes:
            raise fail(f"{what} of shape {shape} as {code} takes {nbytes} bytes, not {stop - start}")
        if stop > size - 8 - length:
            raise fail(f"{what} ends past the end of the file. It is cut short or forged")
        spans.append((start, stop, tensor))
        tensors[tensor] = (8 + length + start, TensorInfo(tuple(shape), dtype, stop - start))
    end = 0
    for start, stop, tensor in sorted(spans):
        if start != end:
            raise fail(f"tensor {tensor[:80]!r} {'overlaps the one before it' if start < end else 'follows a gap'}")
        end = stop
    if end != size - 8 - length:
        raise fail(f"{size - 8 - length - end} bytes at its end belong to nothing")
    return tensors


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**53 for n in values
    )


# Writing -------------------------------------------------------------------------------------------------------------


def plan_shards(tensors: Mapping[str, tuple[Shape, str]], max_shard_bytes: int, stem: str = "model") -> FilePlan:
    """Lay tensors out over files of at most ``max_shard_bytes`` (a larger tensor gets a file of its own).

    Args:
        tensors: name -> (shape, torch dtype name), in the order they will be written.
        stem: files are STEM.safetensors, or STEM-00001-of-0000N.safetensors when there are several.
    """
    groups: list[list[str]] = [[]]
    used = 0
    nbytes = {name: prod(shape) * DTYPES[dtype].itemsize for name, (shape, dtype) in tensors.items()}
    for name in tensors:
        if groups[-1] and used + nbytes[name] > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += nbytes[name]
    headers, sizes, places = {}, {}, {}
    for number, names in enumerate(groups, 1):
        file = f"{stem}.safetensors" if len(groups) == 1 else f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            shape, dtype = tensors[name]
            span = [offset, offset + nbytes[name]]
            entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": span}
            offset += nbytes[name]
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start on 8-byte borders, as the library writes them
        headers[file] = len(text).to_bytes(8, "little") + text
        sizes[file] = len(headers[file]) + offset
        places.update({n: (file, len(headers[file]) + entries[n]["data_offsets"][0]) for n in names})
    return FilePlan(headers=headers, sizes=sizes, places=places)


def shard_index(plan: FilePlan) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    total = sum(plan.sizes.values()) - sum(map(len, plan.headers.values()))
    return {
        "metadata": {"total_size": total},
        "weight_map": {name: file for name, (file, _) in plan.places.items()},
    }
