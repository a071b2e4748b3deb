"""A tuning run from TOML file to result, on a tiny mixture: every objective learns, adapters are written and read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from quadriga.cli import app
from quadriga.errors import ConfigError, CorpusError
from quadriga.hub import catalogue
from quadriga.io.adapter import load
from quadriga.io.open import open_checkpoint
from quadriga.kernels.arrays import tensor
from quadriga.nn.context import PackedContext
from quadriga.nn.load import load_parameters
from quadriga.nn.lora import attach
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.quant.dtypes import DTYPES
from quadriga.train.config import parse_toml
from quadriga.train.metrics import read
from quadriga.train.run_directory import RunDirectory
from quadriga.train.shards import ShardReader
from quadriga.train.tune import tune
from quadriga.train.tune_config import TuneConfig
from quadriga.train.tune_data import read_data
from tests.checkpoint.models import TINY, write_hf
from tests.text.vocabularies import write_bpe

FACTS = [("sky", "blue"), ("grass", "green"), ("coal", "black"), ("snow", "white")]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    config = replace(TINY["mixtral"], vocab_size=448, max_seq_len=96, eos_ids=(2,))
    write_hf(tmp_path / "base", config, parameters=random_parameters(config, std=0.05))
    write_bpe(tmp_path / "base", eos_token="<|im_end|>")
    return tmp_path / "base"


def rows(path: Path, objective: str) -> Path:
    made = []
    for thing, colour in FACTS * 6:
        question, wrong = f"Colour of {thing}?", FACTS[(len(made) + 1) % 4][1]
        match objective:
            case "text":
                made.append({"text": f"{thing} is {colour}. " * 4, "domain": "a" if thing < "m" else "b"})
            case "dpo" | "orpo":
                made.append({"prompt": question, "chosen": colour, "rejected": wrong + "!"})
            case _:
                made.append({"prompt": question, "response": colour})
    path.write_text("\n".join(json.dumps(row) for row in made) + "\nbroken\n")
    return path


def toml(tmp_path: Path, base: Path, objective: str, extra: str = "", run: str = "run") -> str:
    return f"""
run = "{tmp_path / run}"
model = "{base}"
objective = "{objective}"
[data]
files = ["{rows(tmp_path / "rows.jsonl", objective)}"]
held_out_every = 6
seq_len = 64
rows = 2
{'label = "domain"' if objective == "text" else ""}
[schedule]
steps = 12
warmup_steps = 1
[optimiser]
learning_rate = 2e-2
weight_decay = 0.0
[evaluate]
every = 12
[log]
report = false
{extra}
"""


def settings(*args: Any, **kwargs: Any) -> TuneConfig:
    return parse_toml(toml(*args, **kwargs).encode(), TuneConfig)


LORA = '[lora]\nrank = 4\nalpha = 8.0\ntargets = ["attention", "experts", "router"]\n'


@pytest.mark.parametrize("objective", ["sft", "text", "dpo", "orpo"])
def test_the_held_out_loss_falls(tmp_path: Path, base: Path, objective: str) -> None:
    outcome = tune(settings(tmp_path, base, objective, LORA))
    assert outcome.done and outcome.rejected == "1 rows skipped: not JSON (rows.jsonl:25)"
    evaluations = [line["held_out"] for line in read(tmp_path / "run" / "metrics.jsonl") if "held_out" in line]
    assert len(evaluations) == 2 and set(evaluations[0]) == ({"a", "b"} if objective == "text" else {"held out"})
    for domain, before in evaluations[0].items():
        assert evaluations[1][domain]["loss"] < 0.9 * before["loss"], (before, evaluations[1])


def test_the_adapter_that_is_written_is_the_one_that_was_trained(tmp_path: Path, base: Path) -> None:
    outcome = tune(settings(tmp_path, base, "sft", LORA + 'base_format = "q8"\n'))
    assert outcome.result == tmp_path / "run" / "adapter"
    checkpoint = open_checkpoint(base)
    adapter = load(outcome.result, checkpoint.config)
    assert adapter.spec.targets == ("attention", "experts", "router") and adapter.base == str(base)
    assert all(b.any() for name, (_, b) in adapter.factors.items() if "moe.w_" not in name)
    model = Transformer.from_parameters(checkpoint.config, load_parameters(checkpoint)).eval()
    before = model(torch.arange(20), PackedContext([20])).logits
    attach(model, adapter.spec, {name: (tensor(a), tensor(b)) for name, (a, b) in adapter.factors.items()})
    assert not torch.allclose(model(torch.arange(20), PackedContext([20])).logits, before, atol=1e-2)


def test_in_bfloat16_the_float32_masters_are_written(tmp_path: Path, base: Path) -> None:
    outcome = tune(settings(tmp_path, base, "sft", LORA + '[parallel]\ndtype = "bfloat16"\n'))
    assert outcome.result is not None
    _, b = load(outcome.result, open_checkpoint(base).config).factors["layers.0.attn.wqkv.weight"]
    assert not np.array_equal(b, b.astype(DTYPES["bfloat16"]).astype(np.float32))


def test_a_stopped_run_resumes_and_ends_with_the_same_bits(tmp_path: Path, base: Path) -> None:
    once = tune(settings(tmp_path, base, "sft", LORA))
    whole = (once.result / "adapter.safetensors").read_bytes()  # type: ignore[operator]
    calls = iter(range(100))
    config = settings(tmp_path, base, "sft", LORA, run="again")
    first = tune(config, stop=lambda: next(calls) >= 4)
    assert not first.done and first.result is None and first.step == 5
    second = tune(config)
    assert second.done
    assert (second.result / "adapter.safetensors").read_bytes() == whole  # type: ignore[operator]


def test_without_an_adapter_the_whole_model_is_trained_and_written(tmp_path: Path, base: Path) -> None:
    outcome = tune(settings(tmp_path, base, "sft"))
    assert outcome.result == tmp_path / "run" / "model"
    tuned, before = open_checkpoint(outcome.result), open_checkpoint(base)
    assert tuned.config == before.config and tuned.load_tokenizer(catalogue.cl100k_ranks) is not None
    changed = load_parameters(tuned), load_parameters(before)
    assert all(not torch.equal(changed[0][n], changed[1][n].float()) for n in changed[0] if "moe" not in n)


@pytest.mark.parametrize("lora", [LORA, ""])
def test_the_average_of_the_weights_is_written_where_there_is_one(tmp_path: Path, base: Path, lora: str) -> None:
    outcome = tune(settings(tmp_path, base, "sft", lora + "[ema]\ndecay = 0.9\n"))
    assert outcome.result is not None
    run = RunDirectory(tmp_path / "run")
    saved = ShardReader([run.at(12) / "rank-00000.safetensors"])
    if lora:
        written = load(outcome.result, open_checkpoint(base).config).factors["layers.0.attn.wqkv.weight"][1]
        name = next(n for n in saved.names() if n.startswith("ema/layers.0.attn.wqkv") and n.endswith(".b"))
    else:
        written, name = load_parameters(open_checkpoint(outcome.result))["final_norm.weight"], "ema/final_norm.weight"
    assert torch.equal(torch.as_tensor(written), saved.whole(name))
    assert not torch.equal(saved.whole(name), saved.whole(name.replace("ema/", "parameter/")))


def test_grpo_renders_with_the_runs_template_and_trains_on_every_question(tmp_path: Path, base: Path) -> None:
    text = toml(tmp_path, base, "grpo", LORA).replace(
        "seq_len = 64", 'seq_len = 64\ntemplate = "{{ messages[0].content }}!"'
    )
    config = parse_toml(text.encode(), TuneConfig)
    tokenizer = open_checkpoint(base).load_tokenizer(catalogue.cl100k_ranks)
    assert tokenizer is not None
    source, held_out, problems, _ = read_data(config, tokenizer)
    assert {tokenizer.decode(ids) for ids in problems} == {f"Colour of {thing}?!" for thing, _ in FACTS}
    assert len(source._groups) == 24 and not held_out
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": "1?", "response": a}) + "\n" for a in "12"))
    with pytest.raises(CorpusError, match="a question must have one answer"):
        read_data(config, tokenizer)
    given = parse_toml(text.replace("seq_len", 'held_out = ["x"]\nseq_len').encode(), TuneConfig)
    with pytest.raises(ConfigError, match="grpo samples its answers"):
        read_data(given, tokenizer)


def test_plain_text_ends_with_the_end_of_text(tmp_path: Path, base: Path) -> None:
    tokenizer = open_checkpoint(base).load_tokenizer(catalogue.cl100k_ranks)
    assert tokenizer is not None
    source, _, _, _ = read_data(settings(tmp_path, base, "text"), tokenizer)
    assert all(group[0].targets[-1] == tokenizer.special_ids["<|endoftext|>"] for group in source._groups)


def test_max_rows_limits_the_rows_read(tmp_path: Path, base: Path) -> None:
    text = toml(tmp_path, base, "sft", LORA).replace("seq_len = 64", "seq_len = 64\nmax_rows = 7")
    config = parse_toml(text.encode(), TuneConfig)
    tokenizer = open_checkpoint(base).load_tokenizer(catalogue.cl100k_ranks)
    assert tokenizer is not None
    source, held_out, _, rejects = read_data(config, tokenizer)
    assert len(source._groups) + len(held_out["held out"]._groups) == 7  # type: ignore[attr-defined]
    assert rejects.n == 0, "the broken line lies behind"


def test_the_commands(tmp_path: Path, base: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(toml(tmp_path, base, "sft", LORA))
    runner = CliRunner()
    result = runner.invoke(app, ["tune", str(file), "--steps", "2"])
    assert result.exit_code == 0, result.output
    adapter = str(tmp_path / "run" / "adapter")
    assert adapter in result.output
    for command in (
        ["adapter", "export", str(base), adapter, str(tmp_path / "peft")],
        ["adapter", "import", str(base), str(tmp_path / "peft"), str(tmp_path / "ours")],
        ["adapter", "merge", str(base), str(tmp_path / "ours"), str(tmp_path / "merged"), "--to", "hf"],
    ):
        result = runner.invoke(app, command)
        assert result.exit_code == 0, result.output
    assert open_checkpoint(tmp_path / "merged").config == open_checkpoint(base).config


def test_unknown_keys_and_impossible_values_are_refused() -> None:
    good = 'run = "r"\nmodel = "m"\n[data]\nfiles = ["f"]\n'
    assert parse_toml(good.encode(), TuneConfig).objective == "sft"
    with pytest.raises(ConfigError, match="Did you mean 'targets'"):
        parse_toml((good + "[lora]\ntarget = ['attention']\n").encode(), TuneConfig)
    with pytest.raises(ConfigError, match=r"lora.rank must be between"):
        parse_toml((good + "[lora]\nrank = 0\n").encode(), TuneConfig)
    for objective in ("dpo", "orpo", "grpo"):
        for key in ("balance_loss", "z_loss", "bias_rate"):
            with pytest.raises(ConfigError, match=f"router.{key} must be 0 with objective '{objective}'"):
                parse_toml(f'objective = "{objective}"\n{good}[router]\n{key} = 0.1\n'.encode(), TuneConfig)
    with pytest.raises(ConfigError, match="bias_fade must be above 0"):
        parse_toml((good + "[router]\nbias_rate = 0.1\nbias_fade = 0.0\n").encode(), TuneConfig)
    with pytest.raises(ConfigError, match="grpo needs samples >= 2"):
        parse_toml((good + "[grpo]\nsamples = 1\n").encode(), TuneConfig)
    with pytest.raises(ConfigError, match="temperature >= 1e-5"):
        parse_toml((good + "[grpo]\ntemperature = 1e-38\n").encode(), TuneConfig)
