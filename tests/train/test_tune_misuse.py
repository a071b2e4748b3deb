"""Tuning runs as a careless user writes them: each ends in one line that says what is wrong, and nothing is ignored."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from quadriga.errors import ConfigError, CorpusError
from quadriga.text.tokenizer import load_directory
from quadriga.train.batch import BatchSource
from quadriga.train.config import parse_toml
from quadriga.train.metrics import FILE, read
from quadriga.train.rollouts import prompts_of
from quadriga.train.tune import tune
from quadriga.train.tune_config import TuneConfig
from quadriga.train.tune_data import read_data
from tests.train.tune_runs import LORA, settings, toml, write_base

SMALL = """
run = "r"
model = "m"
objective = "{objective}"
[data]
files = ["f"]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("misuse") / "base")


@pytest.mark.parametrize(
    ("objective", "text", "message"),
    [
        ("dpo", "[parallel]\ncontext = 2", "parallel.context cuts rows or layers, and objective 'dpo' compares whole"),
        ("grpo", "[parallel]\npipeline = 2", "parallel.pipeline cuts rows or layers, and objective 'grpo' compares"),
        (
            "sft",
            "[parallel]\ncontext = 2\n[router]\nbalance_form = 'document'",
            "balance_form 'document' needs whole documents on a rank",
        ),
        (
            "sft",
            "[parallel]\ntensor = 2\n[lora]\ndropout = 0.1",
            r"'float32' and lora.dropout 0, got 'float32' and 0.1",
        ),
        ("sft", "[parallel]\ntensor = 2\n[lora]\nbase_format = 'q8'", "lora.dropout 0, got 'q8' and 0"),
        ("sft", "max_rows = 0", "max_rows must be at least 1, got 0"),
        ("sft", "max_bad_rows = -1", "max_bad_rows must be 0 or above, got -1"),
        ("sft", "held_out_every = 1", "held_out_every must be at least 2"),
        ("dpo", "[preference]\nbeta = -1.0", "beta must be above 0 and .* got -1 and 0.1"),
        ("dpo", "[preference]\nbeta = nan", "beta must be above 0 and .* got nan"),
        ("orpo", "[preference]\nodds_weight = -0.5", "odds_weight 0 or above; got 0.1 and -0.5"),
        ("orpo", "[preference]\nodds_weight = inf", "preference.odds_weight must be a finite number, got inf"),
        ("dpo", "[preference]\nodds_weight = 0.5", "odds_weight is used with objective 'orpo' only; .* 'dpo'"),
        ("orpo", "[preference]\nbeta = 0.5", "preference.beta is used with objective 'dpo' only"),
        ("sft", "[grpo]\nsamples = 5", r"\[grpo\] is used with objective 'grpo' only; this run's is 'sft'"),
        ("sft", "[distill]\ntop_k = 5", r"\[distill\] is used with objective 'distill' only"),
        ("text", "template = 'chatml'", "data.template is used with objective 'sft' and .* 'text': leave it out"),
        ("grpo", "label = 'x'", "data.label is used with"),
        ("grpo", "[evaluate]\nprompts = ['x']", "evaluate.prompts is used with"),
        ("grpo", "[grpo]\nkl_weight = nan", "kl_weight must be 0 or above, got nan"),
        ("grpo", "[[grpo.rewards]]\nkind = 'finished'\nweight = nan", r"grpo.rewards\[0\].weight must be a finite"),
        ("grpo", "[[grpo.rewards]]\nkind = 'code'\ntimeout_s = -1.0", "timeout_s must be above 0, got -1"),
        ("sft", "epochs = 0", "data.epochs must be at least 1, got 0"),
        ("sft", "epochs = 2\n[schedule]\nsteps = 9", r"schedule.steps \(9\) and data.epochs \(2\) both say how long"),
        ("sft", "[lora]\nalpha = inf", "lora.alpha must be a finite number, got inf"),
    ],
)
def test_values_without_sense_or_effect_are_refused(objective: str, text: str, message: str) -> None:
    parse_toml(SMALL.replace("{objective}", objective).encode(), TuneConfig)
    with pytest.raises(ConfigError, match=message):
        parse_toml((SMALL.replace("{objective}", objective) + text).encode(), TuneConfig)


def test_a_run_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match="run must be the folder of the run, got ''"):
        parse_toml(SMALL.replace('"r"', '""').replace("{objective}", "sft").encode(), TuneConfig)


def _changed(folder: Path, base: Path, objective: str, edit: Callable[[str], str], rows: str = "") -> TuneConfig:
    text = edit(toml(folder, base, objective).replace("steps = 12", "steps = 2"))
    if rows:
        (folder / "rows.jsonl").write_text(rows)
    return parse_toml(text.encode(), TuneConfig)


def test_a_document_longer_than_the_model_s_positions_is_refused(tmp_path: Path, base: Path) -> None:
    longer = _changed(tmp_path, base, "sft", lambda text: text.replace("seq_len = 64", "seq_len = 97"))
    with pytest.raises(ConfigError, match=r"data.seq_len must be at most the model's 96 positions, got 97"):
        tune(longer)
    answers = settings(tmp_path, base, "grpo", "[grpo]\nsampler = 'model'\nmax_new_tokens = 90\n")
    with pytest.raises(ConfigError, match=r"the longest question and grpo.max_new_tokens together must be at most"):
        tune(answers)


def test_a_template_that_nobody_has_is_refused_by_name(tmp_path: Path, base: Path) -> None:
    config = _changed(tmp_path, base, "sft", lambda text: text.replace("rows = 2", "rows = 2\ntemplate = 'chatlm'"))
    with pytest.raises(ConfigError, match=r"data.template must be one of .*chatml.*; got 'chatlm'"):
        tune(config)


def test_texts_without_a_word_are_counted_and_do_not_end_in_a_traceback(tmp_path: Path, base: Path) -> None:
    empty = _changed(tmp_path, base, "text", str, json.dumps({"text": " "}) + "\n")
    with pytest.raises(CorpusError, match=r"no row of rows.jsonl can be used. rows.jsonl:1: an empty text"):
        tune(empty)
    some = "\n".join(json.dumps({"text": text}) for text in ("", "sky is blue", "snow is white")) + "\n"
    done = tune(_changed(tmp_path, base, "text", str, some))
    assert done.done and done.rejected == "1 rows skipped: an empty text (rows.jsonl:1)"


def test_a_run_that_holds_nothing_out_says_so_and_still_shows_samples(tmp_path: Path, base: Path) -> None:
    def edit(text: str) -> str:
        return text.replace("held_out_every = 6", "held_out_every = 600").replace(
            "[evaluate]", "[evaluate]\nprompts = ['sky']\nsample_tokens = 3"
        )

    config = _changed(tmp_path, base, "sft", edit)
    assert tune(config).done
    lines = read(Path(config.run) / FILE)
    assert [line["event"] for line in lines if "event" in line] == [
        "warning: nothing is held out: fewer rows than data.held_out_every"
    ]
    assert [set(line["samples"]) for line in lines if "samples" in line] == [{"sky"}, {"sky"}]


@pytest.mark.parametrize("seed", [2**62, -3])
def test_any_seed_that_toml_can_write_is_a_seed(tmp_path: Path, base: Path, seed: int) -> None:
    config = _changed(tmp_path, base, "sft", lambda text: f"seed = {seed}\n{text}{LORA}")
    assert tune(config).done


def test_metrics_wait_for_a_disk_that_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from quadriga.train.metrics import MetricsFile

    file = MetricsFile(tmp_path, 0, peak_flops=None, learning_rate=1.0, routing_every=1)
    whole, room = file._file, [40]

    class Full:
        def write(self, raw: bytes) -> int:
            if not room[0]:
                raise OSError(28, "No space left on device")
            n = whole.write(raw[: room[0]])
            room[0] -= n
            return n

        def close(self) -> None:
            whole.close()

    file._file = Full()  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            file.on_event(step, "x" * 20)
    assert caplog.text.count("No space left on device") == 1, "said once"
    room[0] = 10_000
    file.on_event(3, "room again")
    file.close()
    assert [line["step"] for line in read(tmp_path / FILE)] == [0, 1, 2, 3]


def test_tokens_of_grpo_are_those_of_its_answers(tmp_path: Path, base: Path) -> None:
    """Not the rows that hold the questions: two of 64 tokens."""
    extra = "[grpo]\nsampler = 'model'\nsamples = 2\nmax_new_tokens = 3\n"
    text = toml(tmp_path, base, "grpo", extra).replace("steps = 12", "steps = 1")
    config = parse_toml(text.encode(), TuneConfig)
    assert tune(config).done
    (line,) = [line for line in read(Path(config.run) / FILE) if "loss" in line]
    assert line["answer_tokens"] == 3.0
    tokenizer = load_directory(base)
    assert tokenizer is not None
    asked = prompts_of(read_data(config, tokenizer).train.rows(0, 0, 2))
    assert line["tokens"] == sum(2 * (len(prompt) + 3) for prompt in asked), "each question with two answers"


@pytest.mark.parametrize(
    ("objective", "extra", "changed", "refused"),
    [
        ("sft", LORA, "base", True),
        ("dpo", "", "base", True),
        ("sft", "", "base", False),
        ("distill", '[distill]\nteacher = "{teacher}"\n', "teacher", True),
    ],
)
def test_a_run_does_not_resume_over_other_weights_without_a_word(
    tmp_path: Path, objective: str, extra: str, changed: str, refused: bool
) -> None:
    """What is frozen is not in the checkpoint: a base or teacher of the same shapes would be taken for the old one."""
    for name in ("base", "teacher"):
        write_base(tmp_path / name, std=0.1)
    config = settings(tmp_path, tmp_path / "base", objective, extra.format(teacher=tmp_path / "teacher"))
    assert not tune(config, stop=lambda: True).done
    write_base(tmp_path / changed, std=0.2)
    if refused:
        with pytest.raises(ConfigError, match=rf"weights.{changed} was '\w+', is '\w+'.*--allow-change"):
            tune(config)
    assert tune(config, allow_change=refused).done


def test_a_long_text_is_trained_on_or_held_out_as_a_whole(tmp_path: Path, base: Path) -> None:
    """Every third row is held out, not every third piece of them: the rest of a text would tell its end."""
    text = (
        toml(tmp_path, base, "text").replace("held_out_every = 6", "held_out_every = 3").replace('label = "domain"', "")
    )
    rows = [json.dumps({"text": f"{name} " * 50}) for name in "abcdef"]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    tokenizer = load_directory(base)
    assert tokenizer is not None
    made = read_data(parse_toml(text.replace("seq_len = 64", "seq_len = 16").encode(), TuneConfig), tokenizer)

    def seen(source: BatchSource, n: int) -> set[str]:
        return set(tokenizer.decode(source.rows(0, 0, n).tokens.tolist())) & set("abcdef")

    assert seen(made.held_out["held out"], 40) == {"c", "f"}
    assert seen(made.train, 40) == {"a", "b", "d", "e"}
