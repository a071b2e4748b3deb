"""A tuning run from TOML file to result, on a tiny mixture: every objective learns, adapters are written and read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from quadriga.cli import app
from quadriga.engine.live_sampler import LiveSampler
from quadriga.errors import ConfigError, CorpusError
from quadriga.hub import catalogue
from quadriga.io.adapter import load
from quadriga.io.open import open_checkpoint
from quadriga.kernels.arrays import tensor
from quadriga.model.config import ModelConfig
from quadriga.nn.context import PackedContext
from quadriga.nn.load import load_parameters
from quadriga.nn.lora import attach
from quadriga.nn.transformer import Transformer
from quadriga.quant.dtypes import DTYPES
from quadriga.text.tokenizer import Tokenizer
from quadriga.train.config import parse_toml
from quadriga.train.metrics import read
from quadriga.train.run_directory import RunDirectory
from quadriga.train.services import SamplerOptions, Services
from quadriga.train.shards import ShardReader
from quadriga.train.tune import tune
from quadriga.train.tune_config import TuneConfig
from quadriga.train.tune_data import read_data
from tests.train.tune_runs import FACTS, LORA, settings, toml, write_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


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


def test_grpo_renders_with_the_runs_template_and_holds_questions_out(tmp_path: Path, base: Path) -> None:
    text = toml(tmp_path, base, "grpo", LORA).replace(
        "seq_len = 64", 'seq_len = 64\ntemplate = "{{ messages[0].content }}!"'
    )
    config = parse_toml(text.encode(), TuneConfig)
    tokenizer = open_checkpoint(base).load_tokenizer(catalogue.cl100k_ranks)
    assert tokenizer is not None
    rows = read_data(config, tokenizer)
    assert {tokenizer.decode(ids) for ids in rows.problems} == {f"Colour {i} of {FACTS[i % 4][0]}?!" for i in range(24)}
    assert rows.problems[rows.questions[0].ids].row["response"] in dict(FACTS).values()
    assert len(rows.train._groups) == 20 and len(rows.questions) == 4 and not rows.held_out
    assert rows.train.rows_per_epoch == 20, "a question has a row of its own"
    some = [json.dumps({"prompt": p, "response": "1"}) + "\n" for p in "abcdefabcghijklm"]
    (tmp_path / "rows.jsonl").write_text("".join(some))
    rows = read_data(config, tokenizer)
    assert [tokenizer.decode(one.ids) for one in rows.questions] == ["f!", "i!"], "every sixth"
    assert len(rows.train._groups) == 11, "one that occurs twice is one"
    with pytest.raises(CorpusError, match=r"data.rows must be at most the number of questions, 11, got 12"):
        read_data(parse_toml(text.replace("rows = 2", "rows = 12").encode(), TuneConfig), tokenizer)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": "1?", "response": a}) + "\n" for a in "12"))
    with pytest.raises(CorpusError, match="a question must have one answer"):
        read_data(config, tokenizer)
    asked = [{"messages": [{"role": "user", "content": f"{i}?"}], "test": f"assert {i}"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    with pytest.raises(CorpusError, match="no answer that a sampled one could be compared with"):
        read_data(config, tokenizer)
    coded = parse_toml((text + "[[grpo.rewards]]\nkind = 'code'\n").encode(), TuneConfig)
    assert [one.row["test"] for one in read_data(coded, tokenizer).problems.values()] == [row["test"] for row in asked]


GRPO = (
    LORA
    + """
[grpo]
samples = 6
max_new_tokens = 5
kl_weight = 0.01
updates = 2
[[grpo.rewards]]
kind = "regex"
pattern = "[aeiou]"
[[grpo.rewards]]
kind = "finished"
weight = 0.25
[checkpoint]
every = 4
"""
)


def sampler(config: ModelConfig, tokenizer: Tokenizer, options: SamplerOptions) -> LiveSampler:
    return LiveSampler(config, tokenizer, form=options.format, max_len=options.max_len, threads=1)


def test_grpo_samples_by_the_engine_and_resumes_between_rollouts(tmp_path: Path, base: Path) -> None:
    """Stopped in the middle of a rollout's updates it goes on to the rollout's end, and resumes with the same bits."""
    services = Services(sampler=sampler)
    once = tune(settings(tmp_path, base, "grpo", GRPO), services=services)
    assert once.done and once.result is not None
    lines = read(tmp_path / "run" / "metrics.jsonl")
    rewards = [line["reward"] for line in lines if "reward" in line]
    assert len(rewards) == 12 and rewards[::2] == rewards[1::2], "two updates on the same answers"
    held_out = [line["held_out"]["held out"] for line in lines if "held_out" in line]
    assert [one["questions"] for one in held_out] == [4, 4]
    clipped = [line["clipped"] for line in lines if "reward" in line]
    assert not any(clipped[::2]) and any(clipped[1::2]), "at the first update every ratio is 1"
    calls = iter(range(100))
    config = settings(tmp_path, base, "grpo", GRPO, run="again")
    first = tune(config, stop=lambda: next(calls) >= 2, services=services)
    assert not first.done and first.step == 4
    second = tune(config, services=services)
    assert second.done and second.result is not None
    names = ("adapter.safetensors", "quadriga_adapter.json")
    assert [(second.result / n).read_bytes() for n in names] == [(once.result / n).read_bytes() for n in names]
    with pytest.raises(ConfigError, match="grpo samples with the engine"):
        tune(settings(tmp_path, base, "grpo", GRPO, run="third"))


def test_grpo_of_all_parameters_samples_from_the_model_that_is_trained(tmp_path: Path, base: Path) -> None:
    text = toml(tmp_path, base, "grpo", GRPO.replace(LORA, ""))
    config = parse_toml(text.replace("updates = 2", 'updates = 2\nsampler = "model"').encode(), TuneConfig)
    outcome = tune(config)
    assert outcome.done and outcome.result == tmp_path / "run" / "model"
    engine = tune(
        settings(tmp_path, base, "grpo", GRPO.replace(LORA, ""), run="engine"), services=Services(sampler=sampler)
    )
    assert engine.done
    losses = [
        [line["loss"] for line in read(tmp_path / run / "metrics.jsonl") if "loss" in line] for run in ("run", "engine")
    ]
    assert losses[0] != losses[1], "other answers were drawn"


def test_grpo_is_saved_between_rollouts_only() -> None:
    good = 'run = "r"\nmodel = "m"\nobjective = "grpo"\n[data]\nfiles = ["f"]\n[grpo]\nupdates = 3\n'
    with pytest.raises(ConfigError, match=r"checkpoint.every must be a multiple of grpo.updates.*got 200 and 3"):
        parse_toml(good.encode(), TuneConfig)
    parse_toml((good + "[checkpoint]\nevery = 300\n").encode(), TuneConfig)
    with pytest.raises(ConfigError, match=r"schedule.steps must be a multiple of grpo.updates"):
        parse_toml((good + "[checkpoint]\nevery = 300\n[schedule]\nsteps = 7\n").encode(), TuneConfig)


def test_plain_text_ends_with_the_end_of_text(tmp_path: Path, base: Path) -> None:
    tokenizer = open_checkpoint(base).load_tokenizer(catalogue.cl100k_ranks)
    assert tokenizer is not None
    source = read_data(settings(tmp_path, base, "text"), tokenizer).train
    assert all(group[0].targets[-1] == tokenizer.special_ids["<|endoftext|>"] for group in source._groups)


def test_max_rows_limits_the_rows_read(tmp_path: Path, base: Path) -> None:
    text = toml(tmp_path, base, "sft", LORA).replace("seq_len = 64", "seq_len = 64\nmax_rows = 7")
    config = parse_toml(text.encode(), TuneConfig)
    tokenizer = open_checkpoint(base).load_tokenizer(catalogue.cl100k_ranks)
    assert tokenizer is not None
    rows = read_data(config, tokenizer)
    assert len(rows.train._groups) + len(rows.held_out["held out"]._groups) == 7  # type: ignore[attr-defined]
    assert rows.rejects.n == 0, "the broken line lies behind"


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
        ["adapter", "merge", str(base), str(tmp_path / "ours"), str(tmp_path / "merged")],
    ):
        result = runner.invoke(app, command)
        assert result.exit_code == 0, result.output
    assert open_checkpoint(tmp_path / "merged").config == open_checkpoint(base).config
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ours = Transformer.from_parameters(
        open_checkpoint(base).config, load_parameters(open_checkpoint(tmp_path / "merged"), dtype=torch.float32)
    ).eval()
    ids = torch.arange(20)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(ids[None]).logits[0], ours(ids, PackedContext([20])).logits, rtol=1e-3, atol=1e-3
        )


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
