"""GGUF headers: read as gguf-py writes them, written as gguf-py reads them, and every forged one refused quickly."""

from __future__ import annotations

import math
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import gguf as oracle
import numpy as np
import pytest

from quadriga.errors import CheckpointError
from quadriga.io.gguf import GGUFTensor, Typed, is_gguf, plan_gguf, read_header, storable_format

UINT32, FLOAT32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9


# Bytes by hand, from the format's description ------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, body: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + body


def array(element: int, count: int, body: bytes = b"") -> bytes:
    return struct.pack("<IQ", element, count) + body


def row(name: str, axes: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """One row of the tensor table; ``axes`` as stored, fastest first."""
    return text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)


def file_bytes(
    keys: list[bytes], rows: list[bytes], data: bytes, *, version: int = 3, n_keys: int | None = None
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(rows), len(keys) if n_keys is None else n_keys)
    head += b"".join(keys) + b"".join(rows)
    return head + bytes(-len(head) % 32) + data


def small() -> bytes:
    """A valid file: every kind of metadata, two tensors."""
    keys = [
        key("general.architecture", STRING, text("llama")),
        key("a.u8", 0, b"\xff"),
        key("a.i16", 3, struct.pack("<h", -300)),
        key("a.u64", 10, struct.pack("<Q", 2**63 + 5)),
        key("a.f32", FLOAT32, struct.pack("<f", 0.1)),
        key("a.nan", 12, struct.pack("<d", math.nan)),
        key("a.yes", BOOL, b"\x01"),
        key("a.words", ARRAY, array(STRING, 3, text("Ġt") + text("") + text("牛"))),
        key("a.ids", ARRAY, array(5, 4, struct.pack("<4i", 3, -1, 2, 7))),
        key("a.flags", ARRAY, array(BOOL, 2, b"\x00\x01")),
    ]
    rows = [row("x", (64, 3), 8, 0), row("y", (5,), 0, 224)]  # 204 bytes of q8_0, padded to 224
    return file_bytes(keys, rows, bytes(range(204)) + bytes(20) + np.arange(5, dtype="<f4").tobytes())


def read(tmp_path: Path, content: bytes) -> object:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    return read_header(path)


# Reading -------------------------------------------------------------------------------------------------------------


def test_a_file_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small())
    assert is_gguf(path)
    header = read_header(path)
    assert header.version == 3
    assert math.isnan(header.metadata.pop("a.nan"))
    assert header.metadata == {
        "general.architecture": "llama",
        "a.u8": 255,
        "a.i16": -300,
        "a.u64": 2**63 + 5,
        "a.f32": float(np.float32(0.1)),
        "a.yes": True,
        "a.words": ["Ġt", "", "牛"],
        "a.ids": [3, -1, 2, 7],
        "a.flags": [False, True],
    }
    assert header.types["a.ids"] == "int32"
    assert header.types["a.nan"] == "float64"
    data = len(small()) - 224 - 20
    assert header.tensors == {
        "x": GGUFTensor((3, 64), "q8_0", data, 204),
        "y": GGUFTensor((5,), "float32", data + 224, 20),
    }


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_a_file_written_by_gguf_py(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "m.gguf"
    writer = oracle.GGUFWriter(path, "dbrx")
    writer.add_custom_alignment(alignment)
    writer.add_block_count(40)
    writer.add_rope_freq_base(500_000.0)
    writer.add_token_list([f"token{i}é" for i in range(70_001)])  # more than one read of the file
    writer.add_token_scores([i / 7 for i in range(70_001)])
    writer.add_token_types([1, 3] * 20)
    weights = np.random.default_rng(1).standard_normal((3, 7, 96), dtype=np.float32)
    writer.add_tensor("blk.0.ffn_up_exps.weight", weights)
    packed = oracle.quants.quantize(weights[0], oracle.GGMLQuantizationType.Q4_0)
    writer.add_tensor("q", packed, raw_dtype=oracle.GGMLQuantizationType.Q4_0)
    writer.add_tensor("norm", weights[0, 0, :5])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header = read_header(path)
    assert header.metadata["general.architecture"] == "dbrx"
    assert header.metadata["dbrx.block_count"] == 40
    assert header.metadata["dbrx.rope.freq_base"] == 500_000.0
    assert header.metadata["tokenizer.ggml.tokens"] == [f"token{i}é" for i in range(70_001)]
    assert header.metadata["tokenizer.ggml.scores"] == [float(np.float32(i / 7)) for i in range(70_001)]
    stored = path.read_bytes()
    for name, shape, form, expected in (
        ("blk.0.ffn_up_exps.weight", (3, 7, 96), "float32", weights.tobytes()),
        ("q", (7, 96), "q4_0", packed.tobytes()),
        ("norm", (5,), "float32", weights[0, 0, :5].tobytes()),
    ):
        tensor = header.tensors[name]
        assert (tensor.shape, tensor.format) == (shape, form)
        assert stored[tensor.offset : tensor.offset + tensor.nbytes] == expected


def test_roles_that_no_token_has(tmp_path: Path) -> None:
    """llama.cpp's converter of llama2.c's models writes 2^32 - 1 there; elsewhere the number is one."""
    path = tmp_path / "m.gguf"
    writer = oracle.GGUFWriter(path, "llama")
    writer.add_pad_token_id(0xFFFFFFFF)
    writer.add_sep_token_id(0xFFFFFFFF)
    writer.add_eos_token_id(2)
    writer.add_uint64("tokenizer.ggml.mask_token_id", 0xFFFFFFFF)
    writer.add_uint32("general.file_type", 0xFFFFFFFF)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = read_header(path).metadata
    roles = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    assert roles == {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.mask_token_id": 0xFFFFFFFF}
    assert metadata["general.file_type"] == 0xFFFFFFFF


def test_version_2_is_read(tmp_path: Path) -> None:
    content = bytearray(small())
    content[4] = 2
    assert read(tmp_path, bytes(content)).version == 2  # type: ignore[attr-defined]


def test_a_large_vocabulary_is_read_in_one_pass_over_the_file(tmp_path: Path) -> None:
    """Strings of every length, so that many lie across the borders of the reader's buffer."""
    words = [chr(97 + i % 26) * (i % 301) for i in range(30_000)]
    content = file_bytes([key("t", ARRAY, array(STRING, len(words), b"".join(map(text, words))))], [], b"")
    assert read(tmp_path, content).metadata["t"] == words  # type: ignore[attr-defined]


# Hostile files -------------------------------------------------------------------------------------------------------

ONE = [row("x", (32,))]
DATA = bytes(128)

HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not start with GGUF"),
    "another format": (b"PK\x03\x04" + bytes(60), "does not start with GGUF"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(8), "big-endian"),
    "version 1": (file_bytes([], [], b"", version=1), "version 1: convert the original checkpoint again"),
    "big-endian version 2": (b"GGUF" + struct.pack(">IQQ", 2, 0, 0) + bytes(8), "gguf_convert_endian"),
    "version 99": (file_bytes([], [], b"", version=99), "version 99"),
    "2^60 tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(8), "claims 1152921504606846976 tensors"),
    "2^60 keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(8), "1152921504606846976 metadata keys"),
    "more keys than bytes": (file_bytes([], [], b"", n_keys=1000), "bytes are claimed where"),
    "key of 2^63 bytes": (
        file_bytes([struct.pack("<Q", 2**63) + b"abc"], [], b""),
        "a string claims 9223372036854775808 bytes",
    ),
    "string past the end": (
        file_bytes([key("k", STRING, struct.pack("<Q", 4000) + b"abc")], [], b""),
        "4000 bytes are claimed",
    ),
    "array of 2^40 bytes": (file_bytes([key("k", ARRAY, array(0, 2**40))], [], b""), "claims 1099511627776 elements"),
    "array of 2^40 strings": (file_bytes([key("k", ARRAY, array(STRING, 2**40))], [], b""), "1099511627776 elements"),
    "array of 2^64 - 1 doubles": (file_bytes([key("k", ARRAY, array(12, 2**64 - 1))], [], b""), "elements"),
    "nested arrays": (
        file_bytes([key("k", ARRAY, array(ARRAY, 1, array(ARRAY, 2**40)) * 50)], [], b""),
        "arrays of arrays",
    ),
    "value of no type": (file_bytes([key("k", 77, b"")], [], b""), "metadata type 77 does not exist"),
    "array of no type": (file_bytes([key("k", ARRAY, array(77, 1, b"x"))], [], b""), "metadata type 77 does not exist"),
    "truth value 2": (file_bytes([key("k", BOOL, b"\x02")], [], b""), "must be 0 or 1, got 2"),
    "truth value 9 in an array": (file_bytes([key("k", ARRAY, array(BOOL, 2, b"\1\t"))], [], b""), "0 or 1, got 9"),
    "not UTF-8": (file_bytes([key("k", STRING, text(b"\xff\xfe"))], [], b""), "not UTF-8"),
    "not UTF-8 in an array": (
        file_bytes([key("k", ARRAY, array(STRING, 2, text("a") + text(b"\xc3")))], [], bytes(64)),
        "not UTF-8",
    ),
    "key twice": (file_bytes([key("k", 0, b"\1"), key("k", 0, b"\2")], [], b""), "key 'k' comes twice"),
    "tensor twice": (file_bytes([], ONE * 2, DATA), "tensor 'x' comes twice"),
    "no axes": (file_bytes([], [row("x", ())], DATA), "has 0 axes"),
    "five axes": (file_bytes([], [row("x", (1, 1, 1, 1, 1))], DATA), "has 5 axes"),
    "2^32 - 1 axes": (
        file_bytes([], [text("x") + struct.pack("<I", 2**32 - 1) + bytes(40)], DATA),
        "has 4294967295 axes",
    ),
    "axis of zero": (file_bytes([], [row("x", (32, 0))], DATA), r"shape \[0, 32\]"),
    "sizes beyond 64 bits": (file_bytes([], [row("x", (2**32, 2**32, 2**32))], DATA), "past the end"),
    "an axis of 2^64 - 1": (file_bytes([], [row("x", (2**64 - 1,))], DATA), "cannot be stored as float32"),
    "rows of half a block": (file_bytes([], [row("x", (48, 2), 2)], DATA), "cannot be stored as q4_0"),
    "unknown format": (file_bytes([], [row("x", (32,), 999)], DATA), "unsupported format number 999; supported: float"),
    "integers": (file_bytes([], [row("x", (32,), 26)], DATA), "unsupported format number 26: I32; supported: float"),
    "offset past the end": (file_bytes([], [row("x", (32,), 0, 2**62)], DATA), "ends past the end of the file"),
    "offset that wraps": (file_bytes([], [row("x", (32,), 0, 2**64 - 64)], DATA), "ends past the end of the file"),
    "crooked offset": (file_bytes([], [row("x", (32,), 0, 4)], bytes(160)), "starts at 4, not a multiple of 32"),
    "overlap": (
        file_bytes([], [row("x", (32,)), row("y", (32,), 0, 96)], bytes(256)),
        "'y' overlaps the one before it",
    ),
    "hole": (file_bytes([], [row("x", (32,)), row("y", (32,), 0, 160)], bytes(288)), "32 bytes before tensor 'y'"),
    "hole at the front": (file_bytes([], [row("x", (32,), 0, 32)], bytes(160)), "32 bytes before tensor 'x'"),
    "bytes at the end": (file_bytes([], ONE, bytes(128 + 31) + b"x"), "32 bytes at its end belong to nothing"),
    "bytes far behind the end": (file_bytes([], ONE, bytes(3 << 20) + b"x"), "bytes at its end belong to nothing"),
    "alignment zero": (file_bytes([key("general.alignment", 4, bytes(4))], ONE, DATA), "power of two"),
    "alignment 24": (file_bytes([key("general.alignment", 4, struct.pack("<I", 24))], ONE, DATA), "power of two"),
    "alignment of words": (file_bytes([key("general.alignment", STRING, text("x" * 999))], ONE, DATA), "power of two"),
    "one part of three": (
        file_bytes([key("split.count", 2, b"\3\0")], ONE, DATA),
        "one of 3 parts, which must be called NAME-00001-of-00003.gguf",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    with pytest.raises(CheckpointError, match=message) as error:
        read(tmp_path, content)
    assert len(str(error.value)) < 400, "a hostile name must not fill the terminal"


def test_a_valid_file_like_the_hostile_ones(tmp_path: Path) -> None:
    """What the hostile files are made from is sound, so each is refused for its own fault."""
    keys = [
        key("k", ARRAY, array(STRING, 2, text("a") + text("b"))),
        key("general.alignment", 4, struct.pack("<I", 32)),
    ]
    content = file_bytes(keys, [row("x", (32,)), row("y", (32,), 0, 128)], bytes(256))
    assert set(read(tmp_path, content).tensors) == {"x", "y"}  # type: ignore[attr-defined]


def test_zeros_behind_the_last_tensor_are_no_content(tmp_path: Path) -> None:
    """Files made of whole disk or download blocks; more than 64 MB of them are no rounding any more."""
    content = small()
    expected = read(tmp_path, content).tensors  # type: ignore[attr-defined]
    for n in (31, 32, 4096, (1 << 20) + 7):
        assert read(tmp_path, content + bytes(n)).tensors == expected  # type: ignore[attr-defined]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    os.truncate(path, len(content) + (64 << 20) + 1)
    with pytest.raises(CheckpointError, match="67108865 bytes at its end belong to nothing"):
        read_header(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """The last bytes are weights, so no prefix is a whole file; 1/64ths and every byte of the header."""
    content = small()
    for stop in sorted({*range(0, len(content) - 244, 3), *(len(content) * i // 64 for i in range(64))}):
        with pytest.raises(CheckpointError):
            read(tmp_path, content[:stop])


def test_random_damage_is_refused_or_read(tmp_path: Path) -> None:
    rng = random.Random(8)
    content = small()
    header = len(content) - 244
    refused = 0
    for _ in range(500):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 2, 8))):
            damaged[rng.randrange(header)] = rng.randrange(256)
        try:
            read(tmp_path, bytes(damaged))
        except CheckpointError:
            refused += 1
    assert 250 < refused < 500  # damage inside a string or a number is a valid file


def test_what_is_not_a_file_is_refused_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # opening it for reading would wait for a writer, for ever
    for path in (pipe, tmp_path, tmp_path / "missing", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="must be a file"):
            read_header(path)


@pytest.mark.parametrize(
    "claim",
    [
        key("k", STRING, struct.pack("<Q", 2**32)),
        key("k", ARRAY, array(0, 2**30)),
        key("k", ARRAY, array(STRING, 2**28)),
        b"".join(key(f"k{i}", STRING, struct.pack("<Q", 15 << 20) + bytes(15 << 20)) for i in range(5)),
        b"".join(key(f"k{i}", ARRAY, array(4, 2**20, bytes(2**22))) for i in range(3)),
    ],
    ids=["long string", "long array", "many strings", "75 MB of strings", "many arrays"],
)
def test_claims_that_a_huge_sparse_file_keeps(tmp_path: Path, claim: bytes) -> None:
    """The file really is that long (of zeros, taking no disk): the caps must stop it, in a process of 200 MB."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 40) + claim)
    os.truncate(path, 8 << 30)
    message, n_read, peak_kb = read_alone(path)
    assert "m.gguf is not a usable GGUF file" in message
    assert n_read < 200 << 20, "the caps end the reading, not the file"
    assert peak_kb < 200_000


@pytest.mark.parametrize("count", [(3 << 19) - 8, 1 << 20, 1 << 18])
@pytest.mark.parametrize("n_numbers", [0, 1 << 19])
def test_a_forged_vocabulary_of_wide_strings_stays_under_200_mb(tmp_path: Path, count: int, n_numbers: int) -> None:
    """Strings that are all different, each with one emoji: the costliest that Python keeps."""
    count = min(count, (3 << 19) - 8 - n_numbers)
    length = max(11, ((39 << 20) - 8 * n_numbers) // count - 8)
    words = b"".join(text(b"%07d" % i + b"a" * (length - 11) + "😀".encode()) for i in range(count))
    numbers = np.arange(2**62, 2**62 + n_numbers, dtype="<u8").tobytes()
    keys = [
        key("n", ARRAY, array(10, n_numbers, numbers)),
        key("t", ARRAY, array(STRING, count, words)),
        key("bad", BOOL, b"\x02"),
    ]
    path = tmp_path / "m.gguf"
    path.write_bytes(file_bytes(keys, [], bytes(64)))
    message, n_read, peak_kb = read_alone(path)
    assert "m.gguf is not a usable GGUF file" in message
    assert n_read < 200 << 20, "the caps end the reading, not the file"
    assert peak_kb < 195_000  # 200 MB are 195,312 of the kernel's kB


def test_reading_headers_needs_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small())
    assert read_alone(path)[0] == "fine"


def read_alone(path: Path) -> tuple[str, int, int]:
    """Read a header in a fresh process: what it said, the bytes it read, the process's peak memory in kB."""
    program = """
import re, sys
from pathlib import Path
from quadriga.io.gguf import read_header
from quadriga.errors import CheckpointError
def n_read():
    return int(re.search(r"rchar: (\\d+)", Path("/proc/self/io").read_text())[1])
start = n_read()
try:
    read_header(Path(sys.argv[1]))
    print("fine")
except CheckpointError as error:
    print(error)
print(n_read() - start)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    message, n_read, peak_kb = done.stdout.splitlines()
    return message, int(n_read), int(peak_kb)


# Writing -------------------------------------------------------------------------------------------------------------

METADATA = {
    "general.architecture": Typed("string", "llama"),
    "llama.block_count": Typed("uint32", 7),
    "llama.rope.freq_base": Typed("float32", 1e5),
    "tokenizer.ggml.add_bos_token": Typed("bool", False),
    "tokenizer.ggml.tokens": Typed("string", ["a", "", "Ġ牛"]),
    "tokenizer.ggml.scores": Typed("float32", [0.0, -1.5, 3.25]),
    "tokenizer.ggml.token_type": Typed("int32", [1, 3, -1]),
    "big": Typed("uint64", 2**64 - 1),
}
TENSORS = {"a": ((3, 64), "q8_0"), "b": ((5,), "float32"), "c": ((2, 3, 96), "q4_0"), "d": ((7, 11), "bfloat16")}


def written(path: Path) -> dict[str, bytes]:
    """Fill a planned file with random bytes; returns what each tensor got."""
    plan = plan_gguf(path.name, METADATA, TENSORS)
    assert list(plan.headers) == [path.name]
    content = bytearray(plan.sizes[path.name])
    content[: len(plan.headers[path.name])] = plan.headers[path.name]
    sizes = {"a": 3 * 68, "b": 20, "c": 6 * 54, "d": 154}
    rng = random.Random(9)
    filled = {name: rng.randbytes(sizes[name]) for name in TENSORS}
    for name, raw in filled.items():
        file, offset = plan.places[name]
        assert file == path.name
        content[offset : offset + len(raw)] = raw
    path.write_bytes(content)
    return filled


def test_gguf_py_reads_what_is_planned(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    filled = written(path)
    reader = oracle.GGUFReader(path)
    for name, (kind, value) in METADATA.items():
        field = reader.get_field(name)
        assert field is not None
        assert field.contents() == value, name
        assert field.types[-1].name == kind.upper()
    assert {t.name: t.data.tobytes() for t in reader.tensors} == filled
    assert {t.name: tuple(reversed(t.shape.tolist())) for t in reader.tensors} == {
        name: shape for name, (shape, _) in TENSORS.items()
    }
    assert {t.name: t.tensor_type.name for t in reader.tensors} == {"a": "Q8_0", "b": "F32", "c": "Q4_0", "d": "BF16"}


def test_a_written_file_reads_back_and_is_written_again_the_same(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    filled = written(path)
    header = read_header(path)
    assert header.typed() == METADATA
    assert header.typed("tokenizer.").keys() == {k for k in METADATA if k.startswith("tokenizer.")}
    content = path.read_bytes()
    assert {n: content[t.offset : t.offset + t.nbytes] for n, t in header.tensors.items()} == filled
    again = plan_gguf("m.gguf", header.typed(), {n: (t.shape, t.format) for n, t in header.tensors.items()})
    assert content.startswith(again.headers["m.gguf"])


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("uint32", -1),
        ("uint32", 2**32),
        ("uint32", 1.5),
        ("uint32", [1, 1.5]),
        ("uint32", True),
        ("int32", "7"),
        ("float32", 1e39),
        ("bool", 1),
        ("string", 7),
        ("string", ["a", 7]),
        ("string", "\ud800"),
    ],
)
def test_metadata_of_another_type_is_refused(kind: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"GGUF metadata k must be of type {kind}"):
        plan_gguf("m.gguf", {"k": Typed(kind, value)}, {})


def test_storable_formats_follow_llama_cpp() -> None:
    assert storable_format((576,), "q4_0") == "float32"
    assert storable_format((3, 576), "q4_0") == "q4_0"
    assert storable_format((3, 5, 48), "q8_0") == "float16"
    assert storable_format((3, 48), "bfloat16") == "bfloat16"
