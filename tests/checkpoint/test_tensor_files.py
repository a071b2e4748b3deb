"""Safetensors: what the library wrote is read, and every file the format forbids is refused."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quadriga.errors import CheckpointError
from quadriga.io.safetensors import SafetensorsSource, plan_shards, shard_index
from quadriga.io.torch_source import TorchSource
from quadriga.kernels.arrays import tensor
from tests.checkpoint.models import TINY, write_hf


def file_of(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def entry(shape: list[object], span: list[object], dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


GOOD = {"a": entry([2, 3], [0, 24]), "b": entry([4], [24, 40])}
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "header of 2^63 bytes": file_of(GOOD, bytes(40), length=2**63),
    "header past the end": file_of(GOOD, length=10_000),
    "header of 101 MB": (101 << 20).to_bytes(8, "little"),
    "not json": file_of(b"{nope", bytes(40)),
    "a list": file_of([], bytes(40)),
    "deep json": file_of(b'{"a":' * 50_000, bytes(40)),
    "duplicate keys": file_of(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},' * 2 + b'"z":0}', bytes(8)),
    "duplicate inner keys": file_of(b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "extra bytes": file_of(GOOD, bytes(41)),
    "cut short": file_of(GOOD, bytes(39)),
    "overlap": file_of({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, bytes(12)),
    "the same bytes twice": file_of({"a": entry([2], [0, 8]), "b": entry([2], [0, 8])}, bytes(8)),
    "gap": file_of({"a": entry([2], [0, 8]), "b": entry([2], [12, 20])}, bytes(20)),
    "starts late": file_of({"a": entry([2], [4, 12])}, bytes(12)),
    "unknown dtype": file_of({"a": entry([2], [0, 8], "F33")}, bytes(8)),
    "integers": file_of({"a": entry([2], [0, 8], "I32")}, bytes(8)),
    "dtype of another kind": file_of({"a": entry([2], [0, 8], ["F32"])}, bytes(8)),
    "shape and bytes differ": file_of({"a": entry([3], [0, 8])}, bytes(8)),
    "dims overflow": file_of({"a": entry([2**40, 2**40], [0, 8])}, bytes(8)),
    "negative dim": file_of({"a": entry([-2, -1], [0, 8])}, bytes(8)),
    "fractional dim": file_of({"a": entry([2.0], [0, 8])}, bytes(8)),
    "true as a dim": file_of({"a": entry([True], [0, 4])}, bytes(4)),
    "backwards": file_of({"a": entry([2], [8, 0])}, bytes(8)),
    "three offsets": file_of({"a": entry([2], [0, 8, 8])}, bytes(8)),
    "unknown field": file_of({"a": entry([2], [0, 8]) | {"x": 1}}, bytes(8)),
    "tensor is a number": file_of({"a": 5}),
    "metadata is a list": file_of({"__metadata__": []}),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_forbidden_files_end_in_one_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        SafetensorsSource(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = file_of(GOOD, bytes(40))
    for n in range(64):
        path = tmp_path / "model.safetensors"
        path.write_bytes(whole[: len(whole) * n // 64])
        with pytest.raises(CheckpointError):
            SafetensorsSource(path)


def test_a_header_that_is_there_but_too_long_is_not_parsed(tmp_path: Path) -> None:
    """26 MB of spaces, all in the file: what says no is the limit, not the file's end."""
    header = json.dumps({"a": entry([2], [0, 8])}).encode()
    (tmp_path / "x.safetensors").write_bytes(file_of(header + b" " * (26 << 20), bytes(8)))
    with pytest.raises(CheckpointError, match="more than 26214400"):
        SafetensorsSource(tmp_path / "x.safetensors")


def test_hostile_headers_take_little_memory(tmp_path: Path) -> None:
    """A header that claims much, and one that is much: under 200 MB, in a process of its own with that limit."""
    (tmp_path / "claims.safetensors").write_bytes(HOSTILE["header of 101 MB"])
    entries = ",".join(
        f'"t{i}":{{"dtype":"F32","shape":[1],"data_offsets":[{4 * i},{4 * i + 4}]}}' for i in range(90_000)
    )
    (tmp_path / "is.safetensors").write_bytes(file_of(("{" + entries + "}").encode(), b""))
    program = (
        "import sys\nfrom pathlib import Path\nfrom quadriga.io.safetensors import SafetensorsSource\n"
        "from quadriga.errors import CheckpointError\nimport resource\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name in ('claims', 'is'):\n"
        "    try:\n        SafetensorsSource(Path(sys.argv[1]) / f'{name}.safetensors')\n"
        "    except CheckpointError:\n        continue\n    raise SystemExit('accepted')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 200_000  # kilobytes
    assert resource.RUSAGE_SELF == 0


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "f32": torch.randn(7, 5, 3, generator=generator),
        "bf16": torch.randn(9, 4, generator=generator).bfloat16(),
        "f16": torch.randn(11, generator=generator).half(),
        "f64": torch.randn(2, 2, generator=generator).double(),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    source = SafetensorsSource(tmp_path / "x.safetensors")
    assert source.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert torch.equal(tensor(source.read(name)), expected)
        assert source.tensors[name].dtype == str(expected.dtype).removeprefix("torch.")
    assert torch.equal(tensor(source.read("f32", ((2, 5), (1, 4), (0, 2)))), tensors["f32"][2:5, 1:4, 0:2])
    assert torch.equal(tensor(source.read("bf16", ((8, 9), (0, 4)))), tensors["bf16"][8:9])


def test_the_library_reads_what_is_planned(tmp_path: Path) -> None:
    shapes = {"a": ((3, 5), "bfloat16"), "b": ((7,), "float32"), "c": ((2, 2, 2), "float16")}
    plan = plan_shards(shapes, max_shard_bytes=60)
    assert list(plan.sizes) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file, header in plan.headers.items():
        (tmp_path / file).write_bytes(header + bytes(plan.sizes[file] - len(header)))
    assert shard_index(plan)["metadata"]["total_size"] == 30 + 28 + 16
    for name, file in shard_index(plan)["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as opened:
            assert opened.get_tensor(name).shape == shapes[name][0]


def test_a_file_cut_short_while_open_is_an_error_not_a_crash(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000, 10)}, tmp_path / "x.safetensors")
    source = SafetensorsSource(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", 20_000)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        source.read("a")


def sharded(folder: Path, change: Callable[[dict[str, str]], object] = lambda table: None) -> Path:
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": torch.ones(4)}, folder / "model-00002-of-00002.safetensors")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    table = {"a": first, "b": first, "c": second}
    change(table)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


def test_shards_are_one_source(tmp_path: Path) -> None:
    source = SafetensorsSource(sharded(tmp_path))
    assert sorted(source.tensors) == ["a", "b", "c"]
    assert source.read("c").shape == (4,)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update(a="../../etc/passwd"), "same folder"),
        (lambda t: t.update(a="/etc/passwd"), "same folder"),
        (lambda t: t.update(a="model.bin"), "same folder"),
        (lambda t: t.update(a=7), "same folder"),
        (lambda t: t.update(a="..\0.safetensors"), "same folder"),
        (lambda t: t.update(d="model-00003-of-00003.safetensors"), "missing; fetch it again"),
        (lambda t: t.update(d="model-00002-of-00002.safetensors"), "1 tensors missing"),
        (lambda t: t.pop("b"), r"1 unexpected \['b'\]"),
        (lambda t: t.clear(), "weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, change: Callable[[dict[str, str]], object], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        SafetensorsSource(sharded(tmp_path, change))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is in both one\.safetensors and two\.safetensors"):
        SafetensorsSource(tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    sharded(inside)
    shard = inside / "model-00002-of-00002.safetensors"
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="a link that leaves the model's folder"):
        SafetensorsSource(inside)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "weights.npy"])
def test_pickles_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match="convert them to safetensors where they were made"):
            SafetensorsSource(path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_source_that_is_forgotten_leaves_no_file_open(tmp_path: Path, kind: str) -> None:
    write_hf(tmp_path / "hf", TINY["qwen3"], n_shards=3)
    if kind == "bin":
        torch.save({"a": torch.zeros(3)}, tmp_path / "a.bin")
    before = set(Path("/proc/self/fd").iterdir())
    for _ in range(3):
        source = SafetensorsSource(tmp_path / "hf") if kind == "safetensors" else TorchSource(tmp_path / "a.bin")
        assert len(source.tensors) > 0
        del source
    gc.collect()
    assert len(set(Path("/proc/self/fd").iterdir())) <= len(before)


def test_an_index_that_a_larger_model_left_is_passed_over(tmp_path: Path) -> None:
    """transformers takes model.safetensors where it is there; of an index that names it, all tensors must be in it."""
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert SafetensorsSource(tmp_path).read("a").tolist() == [1, 1]
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    assert SafetensorsSource(tmp_path).read("a").tolist() == [1, 1]
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}))
    with pytest.raises(CheckpointError, match="1 tensors missing"):
        SafetensorsSource(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match="in the same folder"):
        SafetensorsSource(tmp_path)
