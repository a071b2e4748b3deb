"""``quadriga info`` says what the arithmetic says, without torch."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from quadriga.cli.info_report import info, load_config
from quadriga.errors import CatalogueError, CheckpointError, ConfigError
from quadriga.model.families import PRESETS, family_of, preset


def facts_of(capsys, name, **options):
    info(name, as_json=True, **options)
    return json.loads(capsys.readouterr().out)


def test_json_holds_every_figure(capsys):
    facts = facts_of(capsys, "dbrx-132b")
    assert facts["name"] == "dbrx-132b"
    assert facts["parameters"] == {
        "total": 131_596_523_520,
        "active": 36_469_708_800,
        "active_without_input": 35_853_146_112,
    }
    assert [(layer["times"], layer["mixer"]["clip_qkv"]) for layer in facts["config"]["layers"]] == [(40, 8.0)]
    assert facts["shapes"]["layers.{i}.moe.w_down"] == [16, 6144, 10752]
    assert facts["kv_bytes_per_token"] == {"float32": 327_680, "bfloat16": 163_840}
    assert facts["context"] == 32_768
    assert facts["flops_per_token"]["at_context"] == 2 * 35_853_146_112 + 40 * 4 * 6144 * 32_768
    bf16 = facts["formats"]["bf16"]
    assert bf16["weight_bytes"] == 263_193_047_040
    assert bf16["bytes_with_context"] == 263_193_047_040 + 32_768 * 163_840
    assert bf16["fits"] == (bf16["bytes_with_context"] <= facts["memory_bytes"]["available"])


def test_what_fits_depends_on_the_memory_and_the_context(capsys, monkeypatch):
    # q4 weights take 70.6 GiB, a cache of 32,768 positions 5 more.
    monkeypatch.setattr("quadriga.cli.info_report.memory_bytes", lambda: (100 * 2**30, 71 * 2**30))
    short, full = facts_of(capsys, "dbrx-132b", context=1)["formats"], facts_of(capsys, "dbrx-132b")["formats"]
    assert [form for form, row in short.items() if row["fits"]] == ["q4", "iq4nl", "iq4xs", "q3k", "q2k", "gguf-q4_0"]
    assert [form for form, row in full.items() if row["fits"]] == ["q3k", "q2k"]
    assert full["q4"]["bytes_with_context"] - short["q4"]["bytes_with_context"] == 32_767 * 163_840


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_prints(capsys, name):
    info(name)
    out = capsys.readouterr().out
    assert name in out
    assert f"{PRESETS[name].vocab_size:,}" in out


def test_a_directory_is_described_by_its_config(capsys, tmp_path):
    config = preset("mixtral-8x7b").with_n_layers(3)
    folder = tmp_path / "[red]odd name"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(family_of(config).config_to_hf(config)))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_config(str(folder)) == replace(config, eos_ids=(2, 7))
    assert load_config(str(folder / "config.json")) == replace(config, eos_ids=(2, 7))
    info(str(folder))
    assert "[red]odd" in capsys.readouterr().out, "a path is no markup"


def test_what_a_file_leaves_open_is_said(capsys, tmp_path):
    raw = family_of(preset("llama2-7b")).config_to_hf(preset("llama2-7b"))
    del raw["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(raw | {"transformers_version": "4.31.0.dev0"}))
    facts = facts_of(capsys, str(tmp_path))
    assert [layer["mixer"]["position"] for layer in facts["config"]["layers"]] == [
        {"kind": "rope", "theta": 10_000.0, "dim": None, "scaling": None}
    ]
    (note,) = facts["notes"]
    assert note.startswith("config.json does not give rope_theta: 10000 is taken")
    info(str(tmp_path))
    assert f"Note: {note}." in capsys.readouterr().out
    assert facts_of(capsys, "llama2-7b")["notes"] == []


def test_faults_are_named(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'dbrx-132b'"):
        load_config("dbrx-132")
    with pytest.raises(CatalogueError, match="there is no file, folder or catalogue model named"):
        load_config(str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config.json is not valid JSON"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "dbrx"}')
    with pytest.raises(ConfigError, match=r"config.json lacks the key 'd_model'"):
        load_config(str(tmp_path))
    with pytest.raises(ConfigError, match="context must be from 0 to this model's 4096, got 4097"):
        info("llama2-7b", context=4097)


def test_no_torch():
    code = "from quadriga.cli.info_report import info; info('grok-1', as_json=True); import sys; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("glm-4.5-air", ["RoPE 1e+06 of the first 64 numbers", "chosen by sigmoid with a correction; beside them"]),
        ("ernie-4.5-21b-a3b", ["chosen by softmax with a correction; beside them a shared network of width 3,072"]),
        ("qwen1.5-moe-a2.7b", ["4 per token, silu; beside them a shared network of width 5,632"]),
    ],
)
def test_rotation_and_routing_are_said_in_words(capsys, name, says):
    info(name)
    out = capsys.readouterr().out.partition("vocabulary")[0]
    text = " ".join(out.replace("│", " ").split())
    assert all(part in text for part in says)
