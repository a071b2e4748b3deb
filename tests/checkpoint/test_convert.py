"""Conversion: byte-identical round trips, and no crash at any instant that loses or spoils anything."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quadriga.errors import CheckpointError, ConfigError
from quadriga.hub import catalogue
from quadriga.io import conversion_writer
from quadriga.io import directory as engine_file
from quadriga.io.convert import convert
from quadriga.io.dry_run import dry_run
from quadriga.io.gguf_source import GGUFSource
from quadriga.io.open import open_checkpoint
from quadriga.model import families
from quadriga.model.config_json import config_from_json, config_to_json
from quadriga.model.weight_map import source_shapes
from quadriga.nn.load import load_parameters
from tests.checkpoint.models import TINY, bits, random_bits, write_hf
from tests.checkpoint.test_open import LAYOUTS
from tests.golden import vocabularies as golden


def tensors_of(folder: Path) -> dict[str, bytes]:
    return {
        name: bits(tensor) for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


WRITTEN = [(name, layout) for name, layout in LAYOUTS if layout not in families.family_of(TINY[name]).read_only]


@pytest.mark.parametrize(("name", "layout"), WRITTEN)
def test_import_then_export_is_byte_identical(tmp_path: Path, name: str, layout: str) -> None:
    stored = write_hf(tmp_path / "hf", TINY[name], layout, n_shards=2)
    convert(tmp_path / "hf", tmp_path / "ours")
    assert engine_file.verify(tmp_path / "ours") == []
    convert(tmp_path / "ours", tmp_path / "back", to="hf", layout=layout, max_shard_bytes=40_000)
    assert tensors_of(tmp_path / "back") == {n: bits(t) for n, t in stored.items()}
    assert open_checkpoint(tmp_path / "back").config == TINY[name]
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("layout", families.FAMILIES["dbrx"].layouts)
def test_fused_to_split_and_back(tmp_path: Path, layout: str) -> None:
    stored = write_hf(tmp_path / "fused", TINY["dbrx"])
    convert(tmp_path / "fused", tmp_path / "other", to="hf", layout=layout)
    assert set(tensors_of(tmp_path / "other")) == set(
        source_shapes(families.FAMILIES["dbrx"].layouts[layout](TINY["dbrx"]))
    )
    convert(tmp_path / "other", tmp_path / "back", to="hf")
    assert tensors_of(tmp_path / "back") == {n: bits(t) for n, t in stored.items()}


IN_GGUF = [name for name in TINY if families.family_of(TINY[name]).gguf_map is not None]


@pytest.mark.parametrize("name", IN_GGUF)
def test_gguf_in_bf16_and_back_is_byte_identical(tmp_path: Path, name: str) -> None:
    config = TINY[name]
    generator = torch.Generator().manual_seed(1)
    values = {n: torch.randn(t.shape, generator=generator).bfloat16() for n, t in random_bits(config).items()}
    # Corrections are float32 in every checkpoint, and stay so.
    values |= {n: torch.randn(t.shape) for n, t in values.items() if n.endswith("router.correction")}
    stored = write_hf(tmp_path / "hf", config, parameters=values)
    convert(tmp_path / "hf", tmp_path / "x.gguf", to="gguf", gguf_format="bfloat16")
    convert(tmp_path / "x.gguf", tmp_path / "back", to="hf", dtype="bfloat16")
    assert tensors_of(tmp_path / "back") == {n: bits(t) for n, t in stored.items()}


@pytest.mark.parametrize("name", ["flex_olmo", "phimoe"])
def test_what_llama_cpp_does_not_compute_is_not_written_for_it(tmp_path: Path, name: str) -> None:
    write_hf(tmp_path / "hf", TINY[name])
    with pytest.raises(ConfigError, match=name):
        convert(tmp_path / "hf", tmp_path / "x.gguf", to="gguf")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize(("form", "bound"), [("q8_0", 1 / 127), ("q4_0", 1 / 7)])
def test_gguf_blocks_are_within_their_rounding(tmp_path: Path, form: str, bound: float) -> None:
    config = TINY["llama2"]
    generator = torch.Generator().manual_seed(2)
    values = {n: torch.randn(t.shape, generator=generator) for n, t in random_bits(config).items()}
    write_hf(tmp_path / "hf", config, parameters=values)
    plan = convert(tmp_path / "hf", tmp_path / "x.gguf", to="gguf", gguf_format=form)
    assert any("float16" in note for note in plan.notes)  # rows of 48 are no whole blocks of 32
    loaded = load_parameters(open_checkpoint(tmp_path / "x.gguf"))
    for name, expected in values.items():
        worst = float((loaded[name] - expected).abs().max())
        assert worst <= bound * float(expected.abs().max())
    assert torch.equal(loaded["final_norm.weight"], values["final_norm.weight"])


@pytest.mark.parametrize(("form", "number"), [("float16", 1), ("q4_0", 2), ("q8_0", 7), ("bfloat16", 32)])
def test_a_gguf_file_says_what_it_is_and_keeps_its_router_wide(tmp_path: Path, form: str, number: int) -> None:
    """The numbers are llama.cpp's LLAMA_FTYPE; its routers are float32 in every file."""
    config = replace(TINY["mixtral"].with_ffn(d_ff=96), d_model=64)
    values = {n: torch.randn(t.shape) for n, t in random_bits(config).items()}
    write_hf(tmp_path / "hf", config, parameters=values)
    convert(tmp_path / "hf", tmp_path / "x.gguf", to="gguf", gguf_format=form)
    source = GGUFSource(tmp_path / "x.gguf")
    assert source.metadata["general.file_type"] == number
    stored = {name: tensor.format for name, tensor in source.header.tensors.items()}
    assert {stored[f"blk.{i}.ffn_gate_inp.weight"] for i in range(config.n_layers)} == {"float32"}
    assert {stored[f"blk.{i}.ffn_down_exps.weight"] for i in range(config.n_layers)} == {form}
    router = load_parameters(open_checkpoint(tmp_path / "x.gguf"))["layers.2.moe.router.weight"]
    assert torch.equal(router, values["layers.2.moe.router.weight"])


def test_a_gguf_file_without_a_vocabulary_says_that_it_has_none(tmp_path: Path) -> None:
    # llama.cpp opens such a file for scoring ids, and refuses one that leaves the key out.
    write_hf(tmp_path / "hf", TINY["mixtral"])
    convert(tmp_path / "hf", tmp_path / "m.gguf", to="gguf")
    assert GGUFSource(tmp_path / "m.gguf").metadata["tokenizer.ggml.model"] == "no_vocab"
    assert open_checkpoint(tmp_path / "m.gguf").load_tokenizer(catalogue.cl100k_ranks) is None


def test_shards_have_an_index_and_end_tokens_go_along(tmp_path: Path) -> None:
    config = replace(TINY["dbrx"], eos_ids=(7, 11), bos_id=3, pad_id=5)
    stored = write_hf(tmp_path / "hf", config)
    (tmp_path / "hf/generation_config.json").write_text(json.dumps({"eos_token_id": [7, 11], "bos_token_id": 3}))
    convert(tmp_path / "hf", tmp_path / "ours")
    (tmp_path / "ours/generation_config.json").unlink()  # what it says is in the configuration
    convert(tmp_path / "ours", tmp_path / "back", to="hf", max_shard_bytes=40_000)
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())["weight_map"]
    where = {name: file.name for file in (tmp_path / "back").glob("*.safetensors") for name in load_file(file)}
    assert index == where
    assert set(where) == set(stored)
    said = json.loads((tmp_path / "back/generation_config.json").read_text())
    assert (said["eos_token_id"], said["bos_token_id"], said["pad_token_id"]) == ([7, 11], 3, 5)


def test_a_dtype_can_be_chosen(tmp_path: Path) -> None:
    values = {n: torch.randn(t.shape) for n, t in random_bits(TINY["mixtral"]).items()}
    write_hf(tmp_path / "hf", TINY["mixtral"], parameters=values)
    convert(tmp_path / "hf", tmp_path / "half", to="hf", dtype="float16")
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "float16"
    loaded = load_parameters(open_checkpoint(tmp_path / "half"))
    assert all(torch.equal(loaded[n], v.half()) for n, v in values.items())


def test_numbers_that_do_not_fit_float16_are_refused(tmp_path: Path) -> None:
    values = {n: torch.randn(t.shape) for n, t in random_bits(TINY["mixtral"]).items()}
    values["layers.1.attn.wo.weight"][3, 3] = 70_000.0
    write_hf(tmp_path / "hf", TINY["mixtral"], parameters=values)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.o_proj\.weight: a weight of 70000 does not fit"):
        convert(tmp_path / "hf", tmp_path / "half", to="hf", dtype="float16")
    convert(tmp_path / "hf", tmp_path / "half", to="hf", dtype="bfloat16", resume=False)


def test_known_side_files_come_along_and_code_does_not(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", TINY["llama2"])
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "hf" / name).write_text("{}")
    (tmp_path / "hf/modeling_evil.py").write_text("boom")
    (tmp_path / "hf/optimizer.pt").write_bytes(b"boom")
    convert(tmp_path / "hf", tmp_path / "out")
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert names == {"quadriga.json", "weights.safetensors", "tokenizer_config.json", "special_tokens_map.json"}


@pytest.mark.parametrize("beside", ["added_tokens.json", "added_tokens_decoder"])
@pytest.mark.parametrize("to", ["quadriga", "hf", "gguf"])
def test_added_tokens_are_tokens_wherever_a_checkpoint_goes(to: str, beside: str, tmp_path: Path) -> None:
    config = replace(TINY["mixtral"], vocab_size=golden.N + 7)
    write_hf(tmp_path / "hf", config, parameters={n: torch.randn(t.shape) for n, t in random_bits(config).items()})
    golden.write(f"tokenizer.model, legacy, {beside}", tmp_path / "hf")
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    convert(tmp_path / "hf", out, to=to)  # type: ignore[arg-type]
    before, after = (open_checkpoint(path).load_tokenizer(catalogue.cl100k_ranks) for path in (tmp_path / "hf", out))
    assert before is not None
    assert after is not None
    end = before.special_ids["<|im_end|>"]
    assert before.eos_ids[0] == after.eos_ids[0] == end
    for text in golden.TEXTS:
        if "extra" not in text and "return" not in text:  # GGUF cannot say that these take white space along
            for allow in (True, False):
                assert before.encode(text, allow_special=allow) == after.encode(text, allow_special=allow), text
    if to == "gguf":
        assert after.n_vocab == config.vocab_size, "a token for every row"


# Crashes -------------------------------------------------------------------------------------------------------------


class Fault:
    """Makes the i-th call of os.pwrite or os.fsync fail, as a full or dying disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int, code: int = errno.ENOSPC) -> None:
        self.calls, self.fail_at, self.code = 0, fail_at, code
        for name in ("pwrite", "fsync"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == self.fail_at:
                raise OSError(self.code, os.strerror(self.code))
            return real(*arguments)

        return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_fault_at_every_write_is_named_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    write_hf(tmp_path / "hf", TINY["llama2"])
    monkeypatch.setattr(conversion_writer, "_SYNC_BYTES", 20_000)  # several journal entries even in a tiny model
    convert(tmp_path / "hf", tmp_path / "whole")
    expected = {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()}
    fail_at = 0
    while True:
        fail_at += 1
        out = tmp_path / f"out{fail_at}"
        with monkeypatch.context() as patch:
            fault = Fault(patch, fail_at, code)
            try:
                convert(tmp_path / "hf", out)
            except CheckpointError as error:
                assert os.strerror(code) in str(error)
                # A result under its final name is whole: only the very last sync, of the parent folder, was refused.
                assert not out.exists() or "in place" in str(error)
        if not out.exists():
            convert(tmp_path / "hf", out)
        assert {f.name: f.read_bytes() for f in out.iterdir()} == expected
        assert not list(tmp_path.glob("*.part"))
        if fault.calls < fail_at:
            break  # this run never reached its fault: every write has failed once
    assert fail_at > 30


def test_killed_at_random_moments_and_resumed(tmp_path: Path) -> None:
    """SIGKILL after the k-th write, for several k, in a process of its own; then the same command again."""
    write_hf(tmp_path / "hf", TINY["dbrx"])
    convert(tmp_path / "hf", tmp_path / "whole")
    expected = {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()}
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom quadriga.io import conversion_writer, convert\n"
        "conversion_writer._SYNC_BYTES = 50_000\nleft = [int(sys.argv[3])]\nreal = os.pwrite\n"
        "def pwrite(*a):\n    n = real(*a)\n    left[0] -= 1\n    left[0] or os.kill(os.getpid(), 9)\n    return n\n"
        "os.pwrite = pwrite\nconvert.convert(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    out = tmp_path / "out"
    for k in (3, 9, 17):
        run = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "hf"), str(out), str(k)], capture_output=True, check=False
        )
        assert run.returncode == -signal.SIGKILL, run.stderr
        assert not out.exists()
    done_before = len((tmp_path / "out.part/journal.jsonl").read_text().splitlines())
    assert done_before > 2
    written: list[str] = []
    convert(tmp_path / "hf", out, progress=lambda done, total, name: written.append(name))
    assert len(set(written)) < len(expected_tensors())
    assert {f.name: f.read_bytes() for f in out.iterdir()} == expected


def expected_tensors() -> set[str]:
    return set(random_bits(TINY["dbrx"]))


def test_an_unfinished_conversion_of_something_else_is_not_touched(tmp_path: Path) -> None:
    write_hf(tmp_path / "a", TINY["dbrx"])
    write_hf(tmp_path / "b", TINY["dbrx"], parameters=random_bits(TINY["dbrx"], seed=5))
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part/journal.jsonl").write_text('{"fingerprint": "of something else"}\n')
    with pytest.raises(CheckpointError, match="--restart"):
        convert(tmp_path / "a", tmp_path / "out")
    convert(tmp_path / "b", tmp_path / "out", resume=False)
    assert engine_file.verify(tmp_path / "out") == []


def test_results_that_exist_are_not_overwritten(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", TINY["mpt"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("x")
    with pytest.raises(CheckpointError, match="exists"):
        convert(tmp_path / "hf", tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists"):
        convert(tmp_path / "hf", tmp_path / "out/precious", to="gguf")


@pytest.mark.parametrize(
    "options",
    [{"to": "onnx"}, {"dtype": "int3"}, {"to": "gguf", "gguf_format": "q9"}, {"to": "hf", "layout": "nope"}]
    + [{"layout": "fused"}, {"to": "gguf", "dtype": "float16"}],
)
def test_options_that_do_not_exist_are_named(tmp_path: Path, options: dict[str, str]) -> None:
    write_hf(tmp_path / "hf", TINY["dbrx"])
    with pytest.raises(ConfigError):
        convert(tmp_path / "hf", tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("out*"))


# The native directory ------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", TINY["grok1"])
    convert(tmp_path / "hf", tmp_path / "ours")
    file = tmp_path / "ours/weights.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert engine_file.verify(tmp_path / "ours") == [list(random_bits(TINY["grok1"]))[-1]]


def test_a_manifest_that_lies_is_refused(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", TINY["dbrx"])
    convert(tmp_path / "hf", tmp_path / "ours")
    good = json.loads((tmp_path / "ours/quadriga.json").read_text())
    first, first_layer = next(iter(good["parameters"])), good["config"]["layers"][0]
    lies = [
        good | {"quadriga": 99},
        good | {"config": good["config"] | {"layers": [first_layer | {"times": 4}]}},
        good | {"config": good["config"] | {"layers": [first_layer | {"times": 10**9}]}},
        good | {"config": good["config"] | {"layers": [first_layer | {"times": 10_000}] * 10_000}},
        good | {"config": good["config"] | {"layers": []}},
        good | {"config": good["config"] | {"surprise": 1}},
        good | {"config": good["config"] | {"layers": [first_layer | {"ffn": {"kind": "mystery"}}]}},
        good | {"config": good["config"] | {"layers": [first_layer | {"mixer": None}]}},
        good | {"parameters": {k: v for k, v in good["parameters"].items() if k != first}},
        good | {"parameters": good["parameters"] | {first: good["parameters"][first] | {"file": "../x.safetensors"}}},
        good | {"parameters": good["parameters"] | {first: good["parameters"][first] | {"format": "float16"}}},
        good | {"parameters": []},
    ]
    for lie in lies:
        (tmp_path / "ours/quadriga.json").write_text(json.dumps(lie))
        with pytest.raises((CheckpointError, ConfigError)):
            open_checkpoint(tmp_path / "ours")


@pytest.mark.parametrize("name", [*TINY, *families.PRESETS])
def test_configs_survive_the_manifest(name: str) -> None:
    config = TINY.get(name) or families.PRESETS[name]
    text = json.dumps(config_to_json(config))
    assert config_from_json(json.loads(text)) == config


# Dry run -------------------------------------------------------------------------------------------------------------


def bare_index(folder: Path, name: str = "dbrx-132b", n_files: int = 61) -> dict[str, str]:
    """config.json and the index of a released model, no weights."""
    config = families.preset(name)
    family = families.family_of(config)
    names = list(source_shapes(family.layouts["fused"](config)))
    table = {n: f"model-{i * n_files // len(names) + 1:05d}-of-{n_files:05d}.safetensors" for i, n in enumerate(names)}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(family.config_to_hf(config)))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return table


def test_dry_run_maps_the_real_dbrx_without_its_weights(tmp_path: Path) -> None:
    table = bare_index(tmp_path)
    report = dry_run(tmp_path)
    assert (report.n_tensors, report.n_parameters, report.layout) == (323, 323, "fused")
    assert (report.n_files, report.files_present) == (61, 0)
    assert report.n_numbers == 131_596_523_520
    assert {s for sources in report.source_of.values() for s in sources} == set(table)
    assert report.source_of["layers.39.moe.w_down"] == ["transformer.blocks.39.ffn.experts.mlp.w2"]


def test_dry_run_finds_a_hole_in_the_index(tmp_path: Path) -> None:
    table = bare_index(tmp_path)
    del table["transformer.blocks.7.ffn.experts.mlp.v1"]
    table["transformer.blocks.40.norm_attn_norm.norm_1.weight"] = "model-00061-of-00061.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(CheckpointError) as raised:
        dry_run(tmp_path)
    assert "transformer.blocks.7.ffn.experts.mlp.v1" in str(raised.value)
    assert "transformer.blocks.40.norm_attn_norm.norm_1.weight" in str(raised.value)
