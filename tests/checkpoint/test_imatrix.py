"""Importance matrices of llama.cpp in both forms: what they say of which matrix, and what is not believed."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import gguf as oracle
import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from quadriga.cli import app
from quadriga.errors import CheckpointError
from quadriga.io.imatrix import is_imatrix, read_imatrix
from quadriga.io.open import open_checkpoint
from tests.checkpoint.test_gguf_searched import DENSE, MOE, stored, write

Rows = Mapping[str, NDArray[np.float32]]


def write_gguf(path: Path, rows: Rows, counts: Mapping[str, list[float]], kind: str = "imatrix") -> Path:
    """Mean squares (experts, columns) and how many tokens they are of, as llama-imatrix writes them."""
    writer = oracle.GGUFWriter(path, arch="")
    writer.add_type(kind)
    for name, mean in rows.items():
        n = np.array(counts.get(name, [7.0] * len(mean)), dtype=np.float32)[:, None]
        writer.add_tensor(f"{name}.in_sum2", mean * n)
        writer.add_tensor(f"{name}.counts", n)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_dat(path: Path, rows: Rows) -> Path:
    raw = struct.pack("<i", len(rows))
    for name, mean in rows.items():
        raw += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 5, mean.size) + (mean * 5).tobytes()
    path.write_bytes(raw + struct.pack("<ii", 5, 4) + b"text")
    return path


def rows() -> dict[str, NDArray[np.float32]]:
    """Of a model of 5 experts, in numbers that division leaves exact."""
    rng = np.random.default_rng(0)
    shapes = {
        "blk.0.attn_q.weight": (1, 256), "blk.0.attn_k.weight": (1, 256), "blk.1.attn_output.weight": (1, 48),
        "blk.2.ffn_down_exps.weight": (5, 256), "blk.0.ffn_gate_inp.weight": (1, 256),
    }  # fmt: skip
    return {name: rng.integers(1, 100, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_columns_of_every_matrix_have_their_mean_squares(tmp_path: Path, form: str) -> None:
    """Not the router's, which stays float32; experts by number, and none for one that no token came to."""
    means = rows()
    means["blk.2.ffn_down_exps.weight"][3] = 0
    path = tmp_path / f"m.{form}"
    counts = {"blk.2.ffn_down_exps.weight": [1.0, 2.0, 4.0, 0.0, 8.0]}
    write_gguf(path, means, counts) if form == "gguf" else write_dat(path, means)
    assert is_imatrix(path)
    found = read_imatrix(path, MOE)
    experts = {f"layers.2.moe.w_down/{e}" for e in (0, 1, 2, 4)}
    assert set(found) == {"layers.0.attn.wqkv.weight", "layers.1.attn.wo.weight"} | experts
    assert np.array_equal(found["layers.0.attn.wqkv.weight"], means["blk.0.attn_q.weight"][0])
    assert np.array_equal(found["layers.2.moe.w_down/4"], means["blk.2.ffn_down_exps.weight"][4])


def test_files_of_other_kinds_and_models_are_refused(tmp_path: Path) -> None:
    assert not is_imatrix(write_gguf(tmp_path / "model.gguf", rows(), {}, kind="model"))
    (tmp_path / "text.txt").write_text("words")
    assert not is_imatrix(tmp_path / "text.txt")
    wrong = write_gguf(tmp_path / "wrong.gguf", {"blk.0.attn_q.weight": np.ones((1, 64), np.float32)}, {})
    with pytest.raises(CheckpointError, match=r"attn_q.weight must have 1 x 256 numbers.*got 64"):
        read_imatrix(wrong, MOE)
    with pytest.raises(CheckpointError, match=r"knows no matrix .* called blk.9.attn_q.weight"):
        read_imatrix(write_dat(tmp_path / "far.dat", {"blk.9.attn_q.weight": np.ones((1, 256), np.float32)}), MOE)
    whole = write_dat(tmp_path / "cut.dat", rows()).read_bytes()
    for length in (2, 30, len(whole) - 900):
        (tmp_path / "cut.dat").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut.dat is no importance matrix"):
            read_imatrix(tmp_path / "cut.dat", MOE)


def test_convert_weighs_errors_with_a_matrix(tmp_path: Path) -> None:
    """One matrix has columns that count: it alone is stored otherwise, and they are nearer."""
    source, part = write(tmp_path / "hf", DENSE), "blk.1.ffn_up.weight"
    weights = np.ones((1, 256), dtype=np.float32)
    weights[:, ::7] = 1000
    heavy = write_gguf(tmp_path / "heavy.imatrix.gguf", {part: weights}, {})
    run, to = CliRunner(), ["--to", "gguf", "--gguf-format", "q3_k"]
    for name, more in (("plain", []), ("weighed", ["--calibrate", str(heavy)])):
        result = run.invoke(app, ["convert", str(source), str(tmp_path / f"{name}.gguf"), *to, *more])
        assert result.exit_code == 0, result.output
    plain, weighed = (stored(tmp_path / f"{name}.gguf") for name in ("plain", "weighed"))
    assert [n for n in plain if not np.array_equal(plain[n].data, weighed[n].data)] == [part]
    expected = open_checkpoint(source).parameters.read("layers.1.ffn.w_up")
    errors = [
        ((oracle.quants.dequantize(t[part].data, t[part].tensor_type) - expected)[:, ::7] ** 2).mean()
        for t in (plain, weighed)
    ]
    assert errors[1] < 0.9 * errors[0]
    refused = run.invoke(
        app, ["convert", str(source), str(tmp_path / "x"), "--budget", "1GB", "--calibrate", str(heavy)]
    )
    assert refused.exit_code != 0 and "importance matrix" in str(refused.output) + str(refused.exception)
