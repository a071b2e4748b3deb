"""GGUF files: a bounded header reader that hostile bytes cannot hang, and the layout of files to write. No torch.

    magic "GGUF" | version u32 | n_tensors u64 | n_metadata u64 | metadata ... | tensor table ... | pad | tensor data

Every count and length is checked against the bytes that are really there before anything is allocated: a file of n
bytes costs O(n) time and memory whatever it claims. Little-endian versions 2 and 3; layout: ggml-org/ggml docs/gguf.md.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from quadriga.errors import CheckpointError
from quadriga.io.file_plan import FilePlan
from quadriga.io.weight_names import PART
from quadriga.model.weight_map import Shape
from quadriga.quant.formats import BY_GGML_TYPE, FORMATS, UNREAD

_MAX_PARTS = 1000
_MAGIC = b"GGUF"
# Caps far above any real file, so that forged ones cost little: a vocabulary of 262k tokens with merges, scores and
# types is about 1.3 million array elements in 20 MB.
_MAX_HEADER_BYTES = 40 << 20
_MAX_STRING_BYTES = 16 << 20
_MAX_ELEMENTS = 3 << 19
_MAX_PARSED_BYTES = 112 << 20  # as Python keeps it: one emoji makes a string four bytes a character, plus 76
_MAX_TENSORS = 1 << 16
_MAX_KEYS = 1 << 16
_MAX_AXES = 4  # ggml has no more
_MAX_PADDING = 64 << 20
_NO_TOKEN = ("uint32", 0xFFFFFFFF)  # LLAMA_TOKEN_NULL, in files of llama.cpp's converter of llama2.c's models
ALIGNMENT = 32
"""Bytes that tensors begin at multiples of, in the files that are written."""
_LENGTH = struct.Struct("<Q")

# GGUF value types: number -> (name, struct code); 8 is a string and 9 an array.
_SCALARS = {
    0: ("uint8", "B"),
    1: ("int8", "b"),
    2: ("uint16", "H"),
    3: ("int16", "h"),
    4: ("uint32", "I"),
    5: ("int32", "i"),
    6: ("float32", "f"),
    7: ("bool", "?"),
    10: ("uint64", "Q"),
    11: ("int64", "q"),
    12: ("float64", "d"),
}
_STRING, _ARRAY = 8, 9
_NUMBER_OF = {name: number for number, (name, _) in _SCALARS.items()} | {"string": _STRING}


class Typed(NamedTuple):
    """A metadata value with its GGUF type, for writing: ``Typed("uint32", 40)``, ``Typed("string", ["a", "b"])``."""

    type: str
    value: Any


@dataclass(frozen=True)
class GGUFTensor:
    """One row of the tensor table."""

    shape: Shape
    """In torch's order (GGUF stores the fastest axis first)."""
    format: str
    offset: int
    """From the start of the file."""
    nbytes: int
    part: int = 0
    """Which of the model's files it is in, counted from 0."""


@dataclass(frozen=True)
class GGUFHeader:
    """Everything of a GGUF file but the weights."""

    version: int
    metadata: dict[str, Any]
    """Numbers, strings, and lists of them."""
    types: dict[str, str]
    """GGUF type of each metadata value, or of an array's elements; enough to write it again."""
    tensors: dict[str, GGUFTensor]

    def typed(self, prefix: str = "") -> dict[str, Typed]:
        """The metadata under ``prefix``, ready for :func:`plan_gguf`."""
        return {k: Typed(self.types[k], v) for k, v in self.metadata.items() if k.startswith(prefix)}


def is_gguf(path: Path) -> bool:
    """True if the file starts as GGUF files do.

    Raises:
        CheckpointError: it cannot be opened.
    """
    with open_file(path) as file:
        return file.read(4) == _MAGIC


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading; a pipe or a device, which could block for ever, is an error."""
    if not path.is_file():
        raise CheckpointError(f"cannot read {path}: it must be a file")
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def read_header(path: Path) -> GGUFHeader:
    """Read and check everything before the weights.

    Raises:
        CheckpointError: not GGUF, big-endian, an unsupported version or format, or any claim the file does not keep.
    """
    files, header = open_parts(path)
    for file in files:
        file.close()
    return header


def open_parts(path: Path) -> tuple[list[BinaryIO], GGUFHeader]:
    """Open a GGUF file, and the other parts if it is one of several (NAME-00001-of-00003.gguf, ...).

    Returns:
        the open files in their order, and one header over all their tensors with the first part's metadata.

    Raises:
        CheckpointError: as :func:`read_header`, or parts that are missing or do not belong together.
    """
    files: list[BinaryIO] = []
    try:
        files.append(open_file(path))
        header = parse_header(files[0], path.name)
        paths = _part_paths(path, header)
        if paths == [path]:
            return files, header
        files.pop().close()
        headers = []
        for part in paths:
            files.append(open_file(part))
            headers.append(parse_header(files[-1], part.name))
        return files, _joined(paths, headers)
    except BaseException:
        for file in files:
            file.close()
        raise


def _part_paths(path: Path, header: GGUFHeader) -> list[Path]:
    count = header.metadata.get("split.count", 0)
    if not isinstance(count, int) or not 0 <= count <= _MAX_PARTS:
        raise CheckpointError(f"{path.name}: split.count must be from 0 to {_MAX_PARTS}, got {count!r}")
    if count <= 1:
        return [path]
    match = PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            f"{path.name} is one of {count} parts, which must be called NAME-00001-of-{count:05d}.gguf and so on; "
            "give them back their names"
        )
    return [path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def _joined(paths: list[Path], headers: list[GGUFHeader]) -> GGUFHeader:
    tensors: dict[str, GGUFTensor] = {}
    for number, (path, header) in enumerate(zip(paths, headers, strict=True)):
        said = (header.metadata.get("split.no"), header.metadata.get("split.count"))
        if said != (number, len(paths)):
            raise CheckpointError(f"{path.name} says it is part {said[0]} of {said[1]}; the parts are mixed up")
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            raise CheckpointError(f"{path.name} holds {min(twice)[:80]!r} again; are the parts of one model?")
        tensors |= {name: replace(tensor, part=number) for name, tensor in header.tensors.items()}
    promised = headers[0].metadata.get("split.tensors.count", len(tensors))
    if promised != len(tensors):
        raise CheckpointError(f"the {len(paths)} parts must hold {promised} tensors, they hold {len(tensors)}")
    return replace(headers[0], tensors=tensors)


def parse_header(file: BinaryIO, name: str) -> GGUFHeader:
    """:func:`read_header` of an open file; ``name`` is for messages."""
    try:
        return _Reader(file, name).header()
    except OSError as error:
        raise CheckpointError(f"cannot read {name}: {error.strerror}") from None


class _Reader:
    """Walks a header; no read goes past the end of the file or the header's cap."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name = file, name
        self.size = os.fstat(file.fileno()).st_size
        self.buffer = b""
        self.start = 0  # file offset of buffer[0]
        self.at = 0  # position in buffer
        self.n_elements = 0  # of all arrays so far
        self.parsed_bytes = 0  # memory of the strings and arrays so far

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.name} is not a usable GGUF file: {message} (near byte {self.start + self.at})")

    def take(self, n: int) -> memoryview:
        if n > self.size - self.start - self.at:
            raise self.fail(f"{n} bytes are claimed where {self.size - self.start - self.at} are left")
        if self.start + self.at + n > _MAX_HEADER_BYTES:
            raise self.fail(f"its header exceeds {_MAX_HEADER_BYTES >> 20} MB")
        if n > len(self.buffer) - self.at:
            rest = self.buffer[self.at :]
            self.start += self.at
            self.buffer, self.at = rest + self.file.read(max(n - len(rest), 1 << 20)), 0
            if len(self.buffer) < n:
                raise self.fail("it ends while being read")
        view = memoryview(self.buffer)[self.at : self.at + n]
        self.at += n
        return view

    def unpack(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        length = self.unpack("Q")
        if length > _MAX_STRING_BYTES:
            raise self.fail(f"a string claims {length} bytes, the limit is {_MAX_STRING_BYTES}")
        try:
            value = str(self.take(length), "utf-8")
        except UnicodeDecodeError:
            raise self.fail("a string is not UTF-8") from None
        self.keep([value])
        return value

    def keep(self, values: list[Any]) -> None:
        """Count what the values and a list of them take in memory."""
        self.parsed_bytes += 8 * len(values) + sum(map(sys.getsizeof, values))
        if self.parsed_bytes > _MAX_PARSED_BYTES:
            raise self.fail(f"its metadata takes more than {_MAX_PARSED_BYTES >> 20} MB of memory")

    def strings(self, count: int) -> list[str]:
        """A string array; a real vocabulary has 10^5 of them, so this is the one hot loop."""
        values: list[str] = []
        while len(values) < count:
            values.append(self.string())  # checks everything and refills the buffer
            buffer, at, last = self.buffer, self.at, len(self.buffer) - 8
            n_kept = len(values)
            try:
                while at <= last and len(values) < count:  # the strings that are whole in the buffer
                    end = at + 8 + _LENGTH.unpack_from(buffer, at)[0]
                    if end > len(buffer):
                        break
                    values.append(buffer[at + 8 : end].decode())
                    at = end
            except UnicodeDecodeError:
                raise self.fail("a string is not UTF-8") from None
            self.at = at
            self.keep(values[n_kept:])
        return values

    def array(self) -> tuple[str, list[Any]]:
        element, count = self.unpack("I"), self.unpack("Q")
        if element == _ARRAY:
            raise self.fail("arrays of arrays are not supported")
        if element != _STRING and element not in _SCALARS:
            raise self.fail(f"metadata type {element} does not exist")
        name, code = _SCALARS.get(element, ("string", "Q"))  # a string is at least its length
        width = struct.calcsize("<" + code)
        if count > (self.size - self.start - self.at) // width:
            raise self.fail(f"an array claims {count} elements, more than the file could hold")
        self.n_elements += count
        if self.n_elements > _MAX_ELEMENTS:
            raise self.fail(f"its arrays have more than {_MAX_ELEMENTS} elements")
        if element == _STRING:
            return name, self.strings(count)
        if code == "?":
            return name, [self.boolean() for _ in range(count)]
        raw = np.frombuffer(self.take(count * width), dtype=np.dtype(name).newbyteorder("<"))
        values = raw.tolist()
        self.keep(values)
        return name, values

    def value(self) -> tuple[str, Any]:
        kind = self.unpack("I")
        if kind == _ARRAY:
            return self.array()
        if kind == _STRING:
            return "string", self.string()
        if kind not in _SCALARS:
            raise self.fail(f"metadata type {kind} does not exist")
        name, code = _SCALARS[kind]
        return name, self.boolean() if code == "?" else self.unpack(code)

    def boolean(self) -> bool:
        value = self.unpack("B")
        if value > 1:
            raise self.fail(f"a truth value must be 0 or 1, got {value}")
        return bool(value)

    def header(self) -> GGUFHeader:
        if self.size < 24 or bytes(self.take(4)) != _MAGIC:
            raise self.fail("it does not start with GGUF")
        version = self.unpack("I")
        if version not in (2, 3):
            raise self.fail(_not_supported(version))
        n_tensors, n_keys = self.unpack("Q"), self.unpack("Q")
        if n_tensors > _MAX_TENSORS or n_keys > _MAX_KEYS:
            raise self.fail(f"it claims {n_tensors} tensors and {n_keys} metadata keys")
        metadata: dict[str, Any] = {}
        types: dict[str, str] = {}
        for _ in range(n_keys):
            key = self.string()
            if key in metadata:
                raise self.fail(f"metadata key {key[:80]!r} comes twice")
            kind, value = self.value()
            if (kind, value) == _NO_TOKEN and key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
                continue  # it says that no token has this role, as a file without the key does
            types[key], metadata[key] = kind, value
        rows: dict[str, tuple[Shape, str, int]] = {}
        for _ in range(n_tensors):
            name = self.string()
            if name in rows:
                raise self.fail(f"tensor {name[:80]!r} comes twice")
            rows[name] = self.tensor_row(name)
        alignment = metadata.get("general.alignment", ALIGNMENT)
        whole_number = isinstance(alignment, int) and not isinstance(alignment, bool)
        if not whole_number or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment must be a power of two up to 2^20, got {str(alignment)[:40]}")
        data = -(-(self.start + self.at) // alignment) * alignment
        return GGUFHeader(version, metadata, types, self.place(rows, data, alignment))

    def tensor_row(self, name: str) -> tuple[Shape, str, int]:
        axes = self.unpack("I")
        if not 0 < axes <= _MAX_AXES:
            raise self.fail(f"tensor {name[:80]!r} has {axes} axes")
        shape = tuple(reversed([self.unpack("Q") for _ in range(axes)]))
        kind, offset = self.unpack("I"), self.unpack("Q")
        if kind not in BY_GGML_TYPE:
            known, what = ", ".join(FORMATS), f": {UNREAD[kind]}" if kind in UNREAD else ""
            raise self.fail(f"tensor {name[:80]!r} has the unsupported format number {kind}{what}; supported: {known}")
        spec = BY_GGML_TYPE[kind]
        if not all(0 < n < 2**40 for n in shape) or shape[-1] % spec.block:
            raise self.fail(f"tensor {name[:80]!r} of shape {list(shape)} cannot be stored as {spec.name}")
        return shape, spec.name, offset

    def place(self, rows: dict[str, tuple[Shape, str, int]], data: int, alignment: int) -> dict[str, GGUFTensor]:
        """Absolute offsets, checked: inside the file, aligned, not overlapping, no unexplained gaps."""
        tensors = {}
        for name, (shape, form, offset) in rows.items():
            nbytes = FORMATS[form].nbytes_of(shape)
            if offset % alignment:
                raise self.fail(f"tensor {name[:80]!r} starts at {offset}, not a multiple of {alignment}")
            if nbytes > self.size or offset > self.size or data + offset + nbytes > self.size:
                raise self.fail(f"tensor {name[:80]!r} ends past the end of the file; the file is cut short or forged")
            tensors[name] = GGUFTensor(shape, form, data + offset, nbytes)
        end = data
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset < end:
                raise self.fail(f"tensor {name[:80]!r} overlaps the one before it")
            if tensor.offset - end >= alignment:
                raise self.fail(f"{tensor.offset - end} bytes before tensor {name[:80]!r} belong to nothing")
            end = tensor.offset + tensor.nbytes
        if self.size - end >= alignment and not self.only_zeros(end):
            raise self.fail(f"{self.size - end} bytes at its end belong to nothing")
        return tensors

    def only_zeros(self, start: int) -> bool:
        """True if all bytes from ``start`` on are zero: a file made of whole disk or download blocks. At most 64 MB."""
        if self.size - start > _MAX_PADDING:
            return False
        self.file.seek(start)
        while chunk := self.file.read(1 << 20):
            if chunk.count(0) != len(chunk):
                return False
        return True


def _not_supported(version: int) -> str:
    """What a version number other than 2 and 3 means, and what to do."""
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3):
        return "it is big-endian; turn its bytes round where it was made (llama.cpp: gguf_convert_endian.py)"
    older = ": convert the original checkpoint again, that form had no 64-bit lengths" if version == 1 else ""
    return f"version {version}{older}; versions 2 and 3, little-endian, are supported"


# Writing -------------------------------------------------------------------------------------------------------------


def storable_format(shape: Shape, wanted: str) -> str:
    """What llama.cpp expects a tensor to be stored as: vectors float32, rows of no whole blocks q8_0 or float16."""
    if len(shape) == 1:
        return "float32"
    for form in (wanted, "q8_0") if FORMATS[wanted].block > 32 else (wanted,):
        if shape[-1] % FORMATS[form].block == 0:
            return form
    return "float16"


_BESIDE_Q6_K = ("q2_k", "q3_k", "q4_k", "q5_k", "q5_0", "q5_1", "iq4_nl", "iq4_xs")
TABLES = {**dict.fromkeys(_BESIDE_Q6_K, "q6_k"), "mxfp4": "q8_0"}
"""What embedding table and head are stored as beside matrices of a searched format, as in llama.cpp's mixtures: their
errors reach every token."""


def plan_gguf(file: str, metadata: Mapping[str, Typed], tensors: Mapping[str, tuple[Shape, str]]) -> FilePlan:
    """Lay a GGUF v3 file out: its header, and where each tensor's bytes go.

    Args:
        file: the file's name.
        metadata: key -> Typed value, without general.alignment: 32 is what a reader takes for granted.
        tensors: name -> (shape in torch's order, format name), in the order they will be written.

    Raises:
        CheckpointError: a metadata value is not of its type.
    """
    assert "general.alignment" not in metadata, "tensors are laid out for the default alignment"
    table, offset = [], 0
    offsets: dict[str, int] = {}
    for name, (shape, form) in tensors.items():
        spec = FORMATS[form]
        assert shape[-1] % spec.block == 0, f"{name} cannot be stored as {form}; see storable_format"
        axes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        table.append(_pack_string(name) + axes + struct.pack("<IQ", spec.ggml_type, offset))
        offsets[name] = offset
        offset += -(-spec.nbytes_of(shape) // ALIGNMENT) * ALIGNMENT
    keys = b"".join(_pack_string(key) + _pack_value(key, typed) for key, typed in metadata.items())
    head = _MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + keys + b"".join(table)
    head += b"\0" * (-len(head) % ALIGNMENT)
    places = {name: (file, len(head) + at) for name, at in offsets.items()}
    return FilePlan(headers={file: head}, sizes={file: len(head) + offset}, places=places)


def _pack_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _pack_value(key: str, typed: Typed) -> bytes:
    kind, value = typed
    assert kind in _NUMBER_OF, f"{key}: no GGUF type is called {kind!r}"
    number = _NUMBER_OF[kind]
    is_array = isinstance(value, (list, tuple))
    values = value if is_array else [value]
    try:
        if any(isinstance(v, bool) != (kind == "bool") for v in values):
            raise TypeError("a truth value is not a number")
        if kind == "string":
            body = b"".join(map(_pack_string, values))
        else:
            body = struct.pack(f"<{len(values)}{_SCALARS[number][1]}", *values)
    except (struct.error, TypeError, AttributeError, OverflowError, UnicodeEncodeError) as error:
        raise CheckpointError(f"GGUF metadata {key} must be of type {kind}: {error}") from None
    head = struct.pack("<IIQ", _ARRAY, number, len(values)) if is_array else struct.pack("<I", number)
    return head + body
