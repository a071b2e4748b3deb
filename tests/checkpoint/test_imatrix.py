"""Importance matrices of llama.cpp in both forms: what they say of which matrix, and what is not believed."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import gguf as oracle
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from quadriga.cli import app
from quadriga.edits.calibrate import Calibration, calibrate
from quadriga.errors import CheckpointError, ConfigError
from quadriga.io.imatrix import is_imatrix, read_imatrix
from quadriga.io.imatrix_write import ColumnSums, TextRead, write_imatrix
from quadriga.io.open import open_checkpoint
from quadriga.kernels.arrays import tensor
from quadriga.model.weight_map import stays_float32
from quadriga.nn.context import PackedContext
from quadriga.nn.load import load_parameters
from quadriga.nn.transformer import Transformer
from tests.checkpoint.models import TINY
from tests.checkpoint.test_calibrate import checkpoint
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
    with pytest.raises(CheckpointError, match=r"m.gguf is no model: its general.type is 'imatrix'"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", rows(), {}))
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


# Written -------------------------------------------------------------------------------------------------------------

IDS = torch.randint(0, 97, (90,), generator=torch.Generator().manual_seed(4)).tolist()


def measured(folder: Path, name: str) -> Calibration:
    return calibrate(checkpoint(folder, name), IDS)


def written(path: Path, name: str, found: Calibration) -> dict[str, NDArray[np.float32]]:
    """The tensors of a file in the GGUF form, as gguf-py reads them."""
    write_imatrix(path, TINY[name], found.sums, TextRead("sample.txt", 2, 64))
    reader = oracle.GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert keys == {
        "general.type": "imatrix", "imatrix.datasets": ["sample.txt"],
        "imatrix.chunk_count": 2, "imatrix.chunk_size": 64,
    }  # fmt: skip
    return {tensor.name: tensor.data for tensor in reader.tensors}


@torch.inference_mode()
def test_sums_and_counts_are_those_of_the_whole_model(tmp_path: Path) -> None:
    """An expert's are of the tokens that visited it; the head's of the normed states."""
    found = measured(tmp_path / "m", "mixtral")
    table = written(tmp_path / "m.gguf", "mixtral", found)
    opened = open_checkpoint(tmp_path / "m")
    parameters = {n: v.float() for n, v in load_parameters(opened).items()}
    model = Transformer.from_parameters(TINY["mixtral"], parameters).eval()
    seen: dict[str, list[torch.Tensor]] = {"x": [], "ids": [], "head": []}
    moe = model.layers[1].moe
    moe.register_forward_pre_hook(lambda _, inputs: seen["x"].append(inputs[0]))
    moe.router.register_forward_hook(lambda _, inputs, out: seen["ids"].append(out[0]))
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen["head"].append(inputs[0]))
    for part in (IDS[:64], IDS[64:]):
        model(torch.tensor(part), PackedContext([len(part)]))
    x, ids, head = (torch.cat(parts) for parts in seen.values())
    counts = [int((ids == expert).sum()) for expert in range(5)]
    for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
        assert table[f"blk.1.{name}.weight.counts"].tolist() == [[n] for n in counts]
    for expert in range(5):
        expected = x[(ids == expert).any(dim=1)].square().sum(0)
        for name in ("ffn_gate_exps", "ffn_up_exps"):
            got = tensor(table[f"blk.1.{name}.weight.in_sum2"][expert].copy())
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        tensor(table["output.weight.in_sum2"][0].copy()), head.square().sum(0), rtol=1e-4, atol=1e-5
    )
    assert table["output.weight.counts"].tolist() == [[90.0]]
    assert "token_embd.weight.in_sum2" not in table and not any("ffn_gate_inp" in name for name in table)


@pytest.mark.parametrize("form", ["gguf", "dat"])
@pytest.mark.parametrize("name", ["dbrx", "llama2-tied", "deepseek_v2", "qwen35moe"])
def test_what_is_written_is_read(tmp_path: Path, name: str, form: str) -> None:
    """Heads that share a matrix, and columns that GGUF keeps in another order, come back to the model's own."""
    found = measured(tmp_path / "m", name)
    unseen = "layers.1.moe.w_up/2"
    if unseen in found.sums:
        found.sums[unseen] = ColumnSums(np.zeros_like(found.sums[unseen].squares), 0)
    path = tmp_path / f"m.{form}"
    n = write_imatrix(path, TINY[name], found.sums, TextRead("sample.txt", 2, 64))
    assert is_imatrix(path) and n > 8
    got = read_imatrix(path, TINY[name])
    known = {matrix for matrix in found.sums if not stays_float32(matrix)}
    assert known - {unseen} <= set(got) <= known
    for matrix, row in got.items():
        sums = found.sums[matrix]
        expected = sums.squares / sums.count if sums.count else np.ones_like(sums.squares)
        np.testing.assert_allclose(row, expected, rtol=1e-5, err_msg=matrix)
    assert (unseen in got) == (form == "dat" and unseen in found.sums)


def test_columns_that_gguf_keeps_in_another_order_are_written_so(tmp_path: Path) -> None:
    found = measured(tmp_path / "m", "qwen35moe")
    out = next(n for n in found.sums if n.endswith("delta.w_out.weight"))
    table = written(tmp_path / "m.gguf", "qwen35moe", found)
    row = table[f"blk.{out.split('.')[1]}.ssm_out.weight.in_sum2"][0]
    assert not np.array_equal(row, found.sums[out].squares)
    assert np.array_equal(np.sort(row), np.sort(found.sums[out].squares))


def test_names_that_say_no_form_and_files_that_exist_are_refused(tmp_path: Path) -> None:
    found = Calibration(1, 1, {"layers.0.attn.wo.weight": ColumnSums(np.ones(48, np.float32), 3)})
    text = TextRead("t", 1, 1)
    with pytest.raises(ConfigError, match=r"must be called NAME.gguf .* got 'm.bin'"):
        write_imatrix(tmp_path / "m.bin", TINY["dbrx"], found.sums, text)
    (tmp_path / "m.dat").write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        write_imatrix(tmp_path / "m.dat", TINY["dbrx"], found.sums, text)
    with pytest.raises(CheckpointError, match="none was measured"):
        write_imatrix(tmp_path / "n.dat", TINY["dbrx"], {}, text)
    assert (tmp_path / "m.dat").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_the_command_writes_what_convert_reads(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The capital of France is Paris. " * 9)
    run, out = CliRunner(), tmp_path / "nano.gguf"
    words = [
        "imatrix",
        "quadriga-nano",
        str(out),
        "--calibrate",
        str(tmp_path / "text.txt"),
        "--calibrate-tokens",
        "50",
    ]
    result = run.invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "50 tokens in windows of" in result.output
    made = run.invoke(
        app,
        ["convert", "quadriga-nano", str(tmp_path / "q"), "--format", "q4", "--calibrate", str(out)],
    )
    assert made.exit_code == 0, made.output
    assert isinstance(run.invoke(app, words).exception, CheckpointError)
    assert isinstance(run.invoke(app, [*words[:2], "x.txt", *words[3:]]).exception, ConfigError)
