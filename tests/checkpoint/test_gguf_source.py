"""Boxes of GGUF tensors against whole tensors unpacked by gguf-py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import gguf as oracle
import numpy as np
import pytest
import torch

from quadriga.errors import CheckpointError
from quadriga.io import gguf_source
from quadriga.io.gguf_source import GGUFSource
from quadriga.io.source import TensorInfo
from quadriga.quant import codec
from quadriga.quant.dtypes import DTYPES
from quadriga.quant.formats import FORMATS, PLAIN

SHAPE = (3, 5, 512)  # experts, rows, columns: two 256-blocks a row
BOXES = [
    None,
    ((1, 2), (0, 5), (0, 512)),
    ((0, 3), (2, 4), (0, 512)),
    ((1, 3), (4, 5), (37, 301)),
    ((0, 3), (0, 5), (511, 512)),
    ((2, 2), (0, 5), (0, 512)),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tensor of every format, and a vector and a matrix of float32."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    rng = np.random.default_rng(3)
    writer = oracle.GGUFWriter(path, "llama")
    for name, spec in FORMATS.items():
        kind = oracle.GGMLQuantizationType(spec.ggml_type)
        if name == "float64":
            raw = rng.standard_normal(SHAPE)
        elif name in PLAIN:
            raw = oracle.quants.quantize(rng.standard_normal(SHAPE, dtype=np.float32), kind)
        else:
            raw = rng.integers(0, 256, (*SHAPE[:-1], SHAPE[-1] // spec.block * spec.nbytes), dtype=np.uint8)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.add_tensor("vector", np.arange(7, dtype=np.float32) / 3)
    writer.add_tensor("matrix", np.arange(33, dtype=np.float32).reshape(3, 11))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def source(path: Path) -> Iterator[GGUFSource]:
    source = GGUFSource(path)
    yield source
    source.close()


def unpacked(path: Path, name: str) -> np.ndarray:
    tensor = next(t for t in oracle.GGUFReader(path).tensors if t.name == name)
    if name == "float64":
        return tensor.data.reshape(SHAPE).astype(np.float32)
    with np.errstate(all="ignore"):
        if name == "q8_k":  # gguf-py cannot; see tests/quant/test_codec.py
            values: np.ndarray = codec.dequantize(np.array(tensor.data), name)
        else:
            values = oracle.quants.dequantize(tensor.data, tensor.tensor_type)
    return values.reshape(tuple(reversed(tensor.shape.tolist())))


@pytest.mark.parametrize("rows_a_chunk", [1, 2, 2048])
@pytest.mark.parametrize("name", FORMATS)
def test_boxes(path: Path, source: GGUFSource, name: str, rows_a_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_source, "_CHUNK_ELEMENTS", rows_a_chunk * SHAPE[-1])
    expected = unpacked(path, name)
    for box in BOXES:
        got = source.read(name, box)
        assert got.dtype == DTYPES[name if name in PLAIN else "float32"]
        part = expected if box is None else expected[tuple(slice(*r) for r in box)]
        np.testing.assert_array_equal(got.astype(np.float32), part)


def test_vectors_and_matrices(source: GGUFSource) -> None:
    assert source.read("vector", ((2, 5),)).tolist() == (torch.arange(2, 5) / 3).tolist()
    assert source.read("matrix", ((1, 3), (4, 6))).tolist() == [[15, 16], [26, 27]]


def test_only_the_boxes_rows_are_read(source: GGUFSource, monkeypatch: pytest.MonkeyPatch) -> None:
    n_bytes = []
    preadv = os.preadv

    def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
        n_bytes.append(len(buffers[0]))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    source.read("q4_k", ((0, 3), (1, 3), (0, 512)))
    assert n_bytes == [2 * 288] * 3  # two rows of two 144-byte blocks, in each of three experts


def test_what_is_known_without_reading(source: GGUFSource) -> None:
    assert source.tensors["q6_k"] == TensorInfo(SHAPE, "q6_k", 3 * 5 * 2 * 210)
    assert source.shapes["matrix"] == (3, 11)
    assert source.metadata["general.architecture"] == "llama"


def test_raw_rows_are_the_stored_bytes(path: Path, source: GGUFSource) -> None:
    stored = next(t for t in oracle.GGUFReader(path).tensors if t.name == "q5_k").data.reshape(15, 2 * 176)
    assert bytes(source.raw("q5_k", 4, 11)) == stored[4:11].tobytes()


def test_a_file_cut_short_while_open_is_an_error(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "m.gguf"
    copy.write_bytes(path.read_bytes())
    source = GGUFSource(copy)
    os.truncate(copy, source.header.tensors["matrix"].offset + 20)
    assert source.read("matrix", ((0, 0), (0, 11))).shape == (0, 11)
    with pytest.raises(CheckpointError, match=r"m\.gguf became shorter while it was read; tensor 'matrix' is cut off"):
        source.read("matrix")
    source.close()


def test_a_disk_that_fails_is_an_error(source: GGUFSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match=r"cannot read tensor 'matrix' of m\.gguf: Input/output error"):
        source.read("matrix")


def test_a_bad_file_leaves_nothing_open(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(CheckpointError):
        GGUFSource(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
