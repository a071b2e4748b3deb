"""Every option of every command: used or refused by its name, checked before a model is looked for; and one name, one
meaning, in all commands.
"""

from __future__ import annotations

import inspect
import typing
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from quadriga.cli import app, bench, options
from quadriga.cli import eval as eval_module
from quadriga.cli.rules import RULES
from quadriga.engine import load as load_module
from quadriga.engine.load_options import LoadOptions
from quadriga.errors import ConfigError, InputError
from quadriga.hub import catalogue
from quadriga.io import convert as convert_module
from quadriga.io.suggested import Suggested
from quadriga.kernels import dispatch
from quadriga.server import run as server_run


class Reached(BaseException):
    """What a command would have done, had it not been stopped there."""

    def __init__(self, what: str, given: dict[str, Any]) -> None:
        super().__init__(what)
        self.what, self.given = what, given


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end where they would look for a model."""

    def load(model: Any, **given: Any) -> None:
        raise Reached("load", {"model": model, **given})

    def resolve(model: str, **_: Any) -> Path:
        raise Reached("resolve", {"model": model})

    monkeypatch.setattr(load_module, "load", load)
    monkeypatch.setattr(catalogue, "resolve", resolve)
    monkeypatch.setattr(server_run, "listen", lambda host, port: None)
    monkeypatch.setattr(eval_module, "_fits_three_times", lambda model: False)


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), input="a question")


def reached(*words: str) -> dict[str, Any]:
    """What a command asked for when it was stopped."""
    with pytest.raises(Reached) as stopped:
        CliRunner().invoke(app, list(words), input="a question", catch_exceptions=False)
    return stopped.value.given


def commands(of: Any = None, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """(words, command) of every command there is."""
    here = typer.main.get_command(app) if of is None else of
    if hasattr(here, "commands"):
        for name, one in here.commands.items():
            yield from commands(one, (*words, name))
    else:
        yield " ".join(words), here


COMMANDS = dict(commands())


def flag(param: Any) -> str:
    if param.param_type_name != "option":
        return str(param.name).upper()
    return str(next(name for name in param.opts if name.startswith("--")))


# How a model is loaded -----------------------------------------------------------------------------------------------

LOADERS = {
    "chat": ["chat", "hello"],
    "generate": ["generate", "hello"],
    "serve": ["serve"],
    "eval": ["eval", "--tasks", "hellaswag"],
    "experts label": ["experts", "label", "smollm2-135m-instruct"],
    "bench decode": ["bench", "decode"],
    "bench prefill": ["bench", "prefill"],
    "bench batch": ["bench", "batch"],
    "bench depth": ["bench", "depth"],
    "bench load": ["bench", "load"],
}
"""Commands that run a model, and words that are enough for each."""

LOADED: dict[str, tuple[list[str], Any]] = {
    "format": (["--format", "q8"], "q8"),
    "activations": (["--activations", "int8"], "int8"),
    "kv_format": (["--kv-format", "q8"], "q8"),
    "kv_memory": (["--kv-memory", "2MB"], 2_000_000),
    "expert_memory": (["--expert-memory", "3MB"], 3_000_000),
    "dtype": (["--dtype", "float64"], "float64"),
    "device": (["--device", "auto"], "auto"),
    "threads": (["--threads", "2"], 2),
    "parallel": (["--parallel", "tp=2"], "tp=2"),
    "max_sequences": (["--max-sequences", "3"], 3),
    "max_batch_tokens": (["--max-batch-tokens", "300"], 300),
}

KERNELS = ("format", "activations", "kv_format", "expert_memory", "parallel")
ELSEWHERE = {
    "max_sequences": {"serve"},
    "max_batch_tokens": {"serve"},
    "parallel": {"chat", "generate", "serve", *(f"bench {what}" for what in ("decode", "prefill", "batch", "depth"))},
    **{
        key: {"chat", "generate", "serve", "eval", "experts label"}
        for key in ("dtype", "device", "kv_memory", "expert_memory")
    },
}
"""Options that only some of the commands have."""


def has(option: str, command: str) -> bool:
    return command in ELSEWHERE.get(option, LOADERS)


def test_the_tables_have_every_command_and_option() -> None:
    assert set(LOADED) == {field.name for field in fields(LoadOptions)}
    for name, command in COMMANDS.items():
        own = {param.name for param in command.params} & set(LOADED)
        if name in LOADERS:
            assert own == {option for option in LOADED if has(option, name)}, name
        else:
            # What is written has a format and a dtype, training has threads, the claim makes weights of its own.
            assert own <= {"format", "dtype", "threads"}, name


@pytest.mark.parametrize("option", LOADED)
@pytest.mark.parametrize("command", LOADERS)
def test_what_is_given_reaches_the_model(command: str, option: str) -> None:
    words, value = LOADED[option]
    if not has(option, command):
        assert "No such option" in run(*LOADERS[command], *words).output
        return
    assert reached(*LOADERS[command], *words)[option] == value != reached(*LOADERS[command])[option]


@pytest.mark.parametrize("option", KERNELS)
@pytest.mark.parametrize("command", LOADERS)
@pytest.mark.parametrize("torch", ["dtype", "reference"])
def test_what_only_kernels_use_is_refused_on_torch(
    monkeypatch: pytest.MonkeyPatch, command: str, option: str, torch: str
) -> None:
    if not has(option, command) or (torch == "dtype" and not has("dtype", command)):
        return
    words = [*LOADERS[command], *LOADED[option][0]]
    if torch == "dtype":
        words += ["--dtype", "float32"]
    else:
        monkeypatch.setattr(dispatch, "_from_environment", lambda: "reference")
    error = run(*words).exception
    assert isinstance(error, ConfigError)
    said = str(error)
    if command.startswith("bench"):
        assert "QUADRIGA_OPS=reference" in said and "Unset it" in said
        return
    assert said.startswith(LOADED[option][0][0]) and "would have no effect" in said
    assert ("--dtype float32" if torch == "dtype" else "unset QUADRIGA_OPS") in said


@pytest.mark.parametrize("command", LOADERS)
def test_bench_and_the_rest_need_no_model_to_refuse(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """The fault this began with: a cache's format that is none, beside a dtype."""
    if has("dtype", command):
        error = run(*LOADERS[command], "--dtype", "float32", "--kv-format", "nonsense").exception
        assert isinstance(error, ConfigError) and "--kv-format must be one of" in str(error)


WRONG = {
    **dict.fromkeys(("format", "activations", "kv_format", "dtype", "device"), ("nonsense", "Q8", "q8 q4")),
    **dict.fromkeys(("kv_memory", "expert_memory"), ("-1GB", "0", "many", "9e99GB", "1e30")),
    **dict.fromkeys(("threads", "max_sequences", "max_batch_tokens"), ("0", "-1", "1.5", "many", "9" * 40)),
}
CELLS = [
    (command, option, value)
    for command in LOADERS
    for option in WRONG
    if has(option, command)
    for value in WRONG[option]
]


@pytest.mark.parametrize(("command", "option", "value"), CELLS)
def test_wrong_values_are_refused_by_name_before_a_model_is_looked_for(command: str, option: str, value: str) -> None:
    name = "--" + option.replace("_", "-")
    result = run(*LOADERS[command], f"{name}={value}")
    assert isinstance(result.exception, (InputError, SystemExit)), result.exception
    assert result.exit_code in (1, 2) and name in f"{result.exception} {result.output}"


# What is asked -------------------------------------------------------------------------------------------------------

SAMPLING = {
    "--max-tokens": ("7", "max_new_tokens", 7),
    "--temperature": ("0.6", "temperature", 0.6),
    "--top-k": ("5", "top_k", 5),
    "--top-p": ("0.5", "top_p", 0.5),
    "--min-p": ("0.1", "min_p", 0.1),
    "--repetition-penalty": ("1.5", "repetition_penalty", 1.5),
    "--presence-penalty": ("0.5", "presence_penalty", 0.5),
    "--frequency-penalty": ("0.25", "frequency_penalty", 0.25),
    "--logit-bias": ("3=-5", "logit_bias", {3: -5.0}),
    "--stop": ("END", "stop", ("END",)),
    "--seed": ("11", "seed", 11),
    "--speculate": ("4", "speculate", 4),
}
OUTSIDE = {
    "--max-tokens": ("0", "-1", "99999999999"),
    "--temperature": ("-1", "101", "nan", "warm"),
    "--top-k": ("-1", "1.5"),
    "--top-p": ("0", "1.1", "nan"),
    "--min-p": ("-0.1", "2"),
    "--repetition-penalty": ("0", "nan", "101"),
    "--presence-penalty": ("-101",),
    "--frequency-penalty": ("101", "inf"),
    "--logit-bias": ("x", "3=", "3=1000", "-1=1"),
    "--stop": ("",),
    "--seed": ("-1", "9" * 30),
    "--speculate": ("-1", "65"),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The parameters of what a model is asked."""
    seen: list[Any] = []

    class Fake:
        name, tokenizer, expert_store, suggested = "fake", None, None, Suggested()

        def stream(self, prompt: Any, params: Any) -> None:
            seen.append(params)
            raise Reached("asked", {})

        def chat_stream(self, messages: Any, params: Any) -> None:
            self.stream(messages, params)

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name)

    monkeypatch.setattr(options, "load_model", lambda model, how: Fake())
    return seen


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("command", ["chat", "generate"])
def test_how_tokens_are_chosen_reaches_the_model(asked: list[Any], command: str, name: str) -> None:
    value, field, expected = SAMPLING[name]
    sampled = ["--temperature", "0.9"] if name in ("--top-k", "--top-p", "--min-p", "--seed") else []
    for words in ([], [name, value]):
        with pytest.raises(Reached):
            CliRunner().invoke(app, [command, "hello", *sampled, *words], catch_exceptions=False)
    before, after = (getattr(params, field) for params in asked)
    assert after == expected != before


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("command", ["chat", "generate"])
def test_parameters_outside_their_range_are_refused_first(command: str, name: str) -> None:
    for value in OUTSIDE[name]:
        result = run(command, "hello", "--temperature=1" if name == "--seed" else "--json", f"{name}={value}")
        assert isinstance(result.exception, (InputError, SystemExit)), (value, result.exception)
        said = f"{result.exception} {result.output}".replace("_", "-")
        assert name.removeprefix("--").replace("max-tokens", "max-") in said, (value, said)


def test_a_chat_draws_as_the_models_makers_suggest(asked: list[Any]) -> None:
    for words in ([], ["--top-p", "0.5"], ["--temperature", "0"], ["--temperature", "0.9"]):
        with pytest.raises(Reached):
            CliRunner().invoke(app, ["chat", "hello", *words], catch_exceptions=False)
    drawn = [(params.temperature, params.top_p) for params in asked]
    assert drawn == [(0.7, 0.95), (0.7, 0.5), (0.0, 1.0), (0.9, 1.0)]


# What goes with what -------------------------------------------------------------------------------------------------

REFUSED: dict[str, dict[str, list[list[str]]]] = {
    "chat": {
        "--top-k": [["hello", "--temperature", "0", "--top-k", "5"]],
        "--top-p": [["hello", "--temperature", "0", "--top-p", "1.0"]],
        "--min-p": [["hello", "--temperature", "0", "--min-p", "0.1"]],
        "--seed": [["hello", "--temperature", "0", "--seed", "1"]],
        "--model": [["hello", "--url", "http://x", "--model", "m"]],
        "--format": [["hello", "--url", "http://x", "--format", "q8"]],
        "--activations": [["hello", "--url", "http://x", "--activations", "int8"]],
        "--kv-format": [["hello", "--url", "http://x", "--kv-format", "q8"]],
        "--kv-memory": [["hello", "--url", "http://x", "--kv-memory", "2MB"]],
        "--expert-memory": [["hello", "--url", "http://x", "--expert-memory", "2MB"]],
        "--dtype": [["hello", "--url", "http://x", "--dtype", "float32"]],
        "--device": [["hello", "--url", "http://x", "--device", "cpu"]],
        "--threads": [["hello", "--url", "http://x", "--threads", "1"]],
        "--parallel": [["hello", "--url", "http://x", "--parallel", "tp=2"]],
        "--api-key": [["hello", "--api-key", "k"]],
        "--api-model": [["hello", "--api-model", "m"]],
    },
    "generate": {
        "--top-k": [["hello", "--top-k", "5"], ["hello", "--temperature", "0", "--top-k", "5"]],
        "--top-p": [["hello", "--top-p", "0.5"]],
        "--min-p": [["hello", "--min-p", "0.1"]],
        "--seed": [["hello", "--seed", "1"]],
        "--logprobs": [["hello", "--logprobs", "3"]],
    },
    "convert": {
        "OUT": [["m", "out", "--dry-run"]],
        "--to": [["m", "--dry-run", "--to", "quadriga"]],
        "--layout": [["m", "--dry-run", "--layout", "x"]],
        "--dtype": [["m", "--dry-run", "--dtype", "keep"]],
        "--format": [["m", "--dry-run", "--format", "q4"]],
        "--gguf-format": [["m", "--dry-run", "--gguf-format", "q8_0"]],
        "--embeddings": [["m", "--dry-run", "--embeddings", "q8"]],
        "--budget": [
            ["m", "--dry-run", "--budget", "1GB"],
            ["m", "out", "--budget", "1GB", "--calibrate", "t", "--format", "q4"],
            ["m", "out", "--budget", "1GB"],
            ["m", "out", "--to", "gguf", "--budget", "1GB", "--calibrate", "t", "--gguf-format", "q4_k"],
            ["m", "out", "--budget", "1GB", "--calibrate", "t", "--to", "hf"],
        ],
        "--calibrate": [
            ["m", "--dry-run", "--calibrate", "t"],
            ["m", "out", "--calibrate", "t"],
            ["m", "out", "--calibrate", "t", "--format", "bfloat16"],
        ],
        "--calibrate-tokens": [
            ["m", "--dry-run", "--calibrate-tokens", "9"],
            ["m", "out", "--calibrate-tokens", "2048"],
        ],
        "--restart": [["m", "--dry-run", "--restart"]],
    },
    "train": {
        "--step": [["run.toml", "--step", "3"]],
        "--dtype": [["run.toml", "--dtype", "float32"]],
        "--resume": [["run.toml", "--check", "--resume", "auto"], ["run.toml", "--export", "x", "--resume", "must"]],
        "--threads": [["run.toml", "--check", "--threads", "1"], ["run.toml", "--export", "x", "--threads", "1"]],
        "--stop-after": [
            ["run.toml", "--check", "--stop-after", "1"],
            ["run.toml", "--export", "x", "--stop-after", "1"],
        ],
        "--branch": [["run.toml", "--check", "--branch", "r"], ["run.toml", "--export", "x", "--branch", "r"]],
        "--export": [["run.toml", "--check", "--export", "x"]],
    },
    "upcycle": {
        "--router-label": [["m", "out", "--router-label", "lang"]],
        "--router-tokens": [["m", "out", "--router-tokens", "7"]],
        "--router-std": [["m", "out", "--router-text", "t", "--router-std", "0.1"]],
        "--seed": [["m", "out", "--router-text", "t", "--seed", "1"]],
    },
    "merge-experts": {"--calibrate-tokens": [["m", "out", "--calibrate-tokens", "9"]]},
    "eval": {
        **{
            name: [["--limit", "3"] if name == "--limit" else [name, "3"]]
            for name in ("--limit", "--shots", "--samples", "--k", "--temperature", "--seed")
        },
        "MODEL": [["--model", "m"], ["m"]],
        "--chat": [["--chat"]],
        "--unsafe-exec": [["--unsafe-exec"]],
        "--restart": [["--restart"]],
        "--json": [["--json"]],
        "--data-dir": [["--data-dir", "x"]],
        "--out": [["--out", "x"]],
        "--picture": [["--picture", "x.svg"]],
        "--judge": [["--judge", "x"]],
        "--judge-model": [["--judge-model", "x"]],
        **{name: [[name, "auto"], ["--tasks", "mmlu", name, "auto"]] for name in ("--api", "--api-model", "--api-key")},
        "--concurrency": [["--concurrency", "3"], ["--tasks", "mmlu", "--concurrency", "8"]],
        **{
            name: [[name, value], ["http://127.0.0.1:9/v1", "--tasks", "mmlu", name, value]]
            for name, value in (
                *(("--format", "q8"), ("--activations", "auto"), ("--kv-format", "q8"), ("--kv-memory", "1GB")),
                *(("--expert-memory", "1GB"), ("--dtype", "float32"), ("--device", "cpu"), ("--threads", "1")),
            )
        },
    },
    "bench invariance": {
        "--format": [["http://127.0.0.1:9", "--format", "q8"]],
        "--dtype": [["http://127.0.0.1:9", "--dtype", "float32"]],
        "--threads": [["http://127.0.0.1:9", "--threads", "1"]],
        "--api-model": [["quadriga-nano", "--api-model", "m"]],
        "--api-key": [["quadriga-nano", "--api-key", "k"]],
        "--timeout": [["quadriga-nano", "--timeout", "9"]],
        "--completions": [["quadriga-nano", "--completions"]],
    },
    "compare": {"--markdown": [["--markdown", "--json"]]},
    "plan": {"--verify": [["dbrx-132b", "--verify"]]}
    | {
        name: [["dbrx-132b", name, value]]
        for name, value in (
            *(("--tokens", "1T"), ("--seq-len", "4096"), ("--batch-tokens", "16M"), ("--stack", "tuned")),
            *(("--price", "2"), ("--availability", "0.9"), ("--top", "5"), ("--picture", "x.svg")),
        )
    },
    "serve": {
        "--models-memory": [["m", "--replicas", "2", "--models-memory", "1GB"]],
        "--parallel": [
            ["m", "--replicas", "2", "--parallel", "tp=2"],
            ["m", "--models-memory", "1GB", "--parallel", "tp=2"],
        ],
        "--admin-key": [["m", "--replicas", "2", "--admin-key", "12345678"]],
        "--stay-on-failure": [["m", "--ray", "local", "--stay-on-failure"]],
        "--keep-alive": [["m", "--keep-alive", "1m"]],
        "--adapter": [["m", "--models-memory", "1GB", "--adapter", "a=b"]],
    },
    "data prepare": {
        "--text-field": [["mix.toml", "--out", "x", "--text-field", "text"]],
        "--domain": [["mix.toml", "--out", "x", "--domain", "d"]],
        "--domain-field": [["c/manifest.json", "--out", "x", "--domain-field", "d"]],
    },
    "data inspect": {
        "--domain": [["c", "--domain", "d"]],
        "--split": [["c", "--split", "train"]],
        "--verify": [["c", "--document", "1", "--verify"]],
        "--json": [["c", "--document", "1", "--json"]],
    },
    "data mix": {"--tokens": [["run.toml", "--tokens", "1B"]], "--power": [["run.toml", "--power", "1"]]},
}
"""Command -> option -> words in which it would have no effect."""


def test_every_rule_is_tried() -> None:
    assert set(REFUSED) == set(RULES) <= set(COMMANDS)
    for command, rules in RULES.items():
        names = {param.name: flag(param) for param in COMMANDS[command].params}
        assert {names[rule.option] for rule in rules} == set(REFUSED[command]), command


@pytest.mark.parametrize(("command", "option"), [(c, o) for c, table in REFUSED.items() for o in table])
def test_what_would_have_no_effect_is_refused_by_name(command: str, option: str) -> None:
    for words in REFUSED[command][option]:
        error = run(*command.split(), *words).exception
        assert isinstance(error, ConfigError), (words, error)
        assert str(error).startswith(option) and "would have no effect: " in str(error)
        assert any(what in str(error) for what in ("Leave", "leave", "Give", "give"))


def test_replicas_of_several_models_are_refused_with_the_reason_and_what_to_do() -> None:
    error = run("serve", "a", "b", "--replicas", "2").exception
    assert isinstance(error, ConfigError) and "--replicas is for a server of one model" in str(error)
    assert "Start a server for each model, or leave --replicas out" in str(error)


def test_the_formats_of_written_models_are_held_to_their_target() -> None:
    text = ["--calibrate", "t", "--experts", "3"]
    writers = {
        "convert": [],
        "upcycle": [],
        "prune": text,
        "merge-experts": [],
        "adapter merge": [],
    }
    for command, more in writers.items():
        names = ["m", "adapter", "out"] if command.startswith("adapter") else ["m", "out"]
        for words, says in (
            (["--to", "hf", "--gguf-format", "q8_0"], "--gguf-format q8_0 would have no effect"),
            (["--gguf-format", "bfloat16"], "--gguf-format bfloat16 would have no effect"),
            (["--to", "gguf", "--dtype", "float32"], "--dtype float32 would have no effect"),
            (["--format", "q4", "--dtype", "keep"], "--dtype keep would have no effect"),
            (["--to", "hf", "--format", "q4"], "--format q4 would have no effect"),
            (["--to", "pt"], "--to must be one of"),
            (["--dtype", "int4"], "--dtype must be one of"),
            (["--to", "gguf", "--gguf-format", "q9"], "--gguf-format must be one of"),
            (["--format", "q9"], "--format must be one of"),
        ):
            error = run(*command.split(), *names, *more, *words).exception
            assert isinstance(error, ConfigError) and says in str(error), (command, words, error)
        assert reached(*command.split(), *names, *more, "--to", "gguf", "--gguf-format", "q8_0")["model"] == "m"


def test_what_is_given_reaches_the_conversion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def convert(path: Path, out: Path, **given: Any) -> None:
        raise Reached("convert", given)

    monkeypatch.setattr(catalogue, "resolve", lambda model, **_: tmp_path)
    monkeypatch.setattr(convert_module, "convert", convert)
    base = reached("convert", "m", "out")
    for words, option, value in (
        (["--to", "hf"], "to", "hf"),
        (["--to", "hf", "--layout", "split"], "layout", "split"),
        (["--dtype", "float16"], "dtype", "float16"),
        (["--format", "q4"], "format", "q4"),
        (["--format", "q4", "--embeddings", "float32"], "embeddings", "float32"),
        (["--to", "gguf", "--gguf-format", "q4_0"], "gguf_format", "q4_0"),
        (["--restart"], "resume", False),
        (["--pickles"], "pickles", True),
    ):
        assert reached("convert", "m", "out", *words)[option] == value != base[option]


def test_coding_options_need_a_coding_task() -> None:
    for words in (["--samples", "3"], ["--k", "1"], ["--temperature", "0.5"], ["--seed", "1"], ["--unsafe-exec"]):
        error = run("eval", "--tasks", "hellaswag", *words).exception
        assert isinstance(error, ConfigError) and str(error).startswith(words[0]) and "coding tasks" in str(error)
    error = run("eval", "--tasks", "humaneval", "--seed", "1").exception
    assert isinstance(error, ConfigError) and "--seed 1 would have no effect: at --temperature 0" in str(error)


@pytest.mark.parametrize("words", [["--adapter", "a=x"], ["--adapter", "a=x", "--threads", "1"]])
def test_adapters_need_torch(words: list[str]) -> None:
    error = run("serve", *words).exception
    assert isinstance(error, ConfigError) and str(error).startswith("--adapter a=x would have no effect")
    for more, says in ((["--adapter", "a=y"], "each name once"), (["--adapter", "b:c=y"], "no colon")):
        assert says in str(run("serve", *words, *more, "--dtype", "float32").exception)


def test_bench_measures_the_kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_from_environment", lambda: "reference")
    for what in bench._HELP:
        error = run("bench", what).exception
        assert isinstance(error, ConfigError) and "QUADRIGA_OPS" in str(error)
    for words in (["--n", "3"], ["--csv", "x.csv"], ["--rounds", "3"]):
        assert "No such option" in run("bench", "load", *words).output


# Given twice, given empty --------------------------------------------------------------------------------------------


SINGLE = [
    (name, param)
    for name, command in COMMANDS.items()
    for param in command.params
    if param.param_type_name == "option" and not param.multiple and param.name != "help"
]


@pytest.mark.parametrize(("command", "param"), SINGLE, ids=[f"{c} {flag(p)}" for c, p in SINGLE])
def test_nothing_is_given_twice_or_empty(command: str, param: Any) -> None:
    name = flag(param)
    value = [] if param.is_flag else ["1"]
    result = run(*command.split(), name, *value, name, *value)
    assert result.exit_code == 2 and f"{name} is given twice" in " ".join(result.output.split())
    if param.is_flag or param.name == "system":
        return
    result = run(*command.split(), name, " ")
    assert result.exit_code == 2 and f"{name} must not be empty" in " ".join(result.output.split())


def test_what_may_be_repeated_may_not_be_empty() -> None:
    for command, words in (
        ("serve", ["--api-key", ""]),
        ("generate", ["x", "--stop", ""]),
        ("serve", ["--adapter", ""]),
    ):
        result = run(command, *words)
        assert result.exit_code == 2 and "must not be empty" in result.output
    assert "MODEL must not be empty" in run("info", "").output


def annotation(command: str, param: Any) -> Any:
    """What the command's function says of a parameter."""
    function = inspect.unwrap(COMMANDS[command].callback)
    return typing.get_type_hints(function, include_extras=True)[param.name]


# One name, one meaning -----------------------------------------------------------------------------------------------

REPEATED = {
    ("--api-key", "serve"),
    ("--concurrency", "bench serve"),
    ("MODEL", "serve"),
    ("--concurrency", "bench invariance"),
}
"""May be given several times there: keys that are accepted, levels of load, models."""

OWN_TEXT = {"config", "inputs", "prompt", "path", "paths", "results", "target", "url"}
"""Arguments, which have no name on the command line."""

DEFAULTS = {
    # Once without a default, once with one: random numbers, files and tokens of different work.
    "--max-tokens": {128, 512, 64},
    "--temperature": {0.0, None},
    "--seed": {None, 0},
    "--calibrate-tokens": {2048, 4096, 16_384},
    "--calibrate": {None},
    "--experts": {16, None},
    "--to": {"quadriga", None},
    "--tokens": {"1T", "1B"},
    "--api-key": {None},
    "--concurrency": {8, None},
    "--domain-field": {None, "domain"},
    "--out": {None},
    "MODEL": {"smollm2-135m-instruct", None},
}
"""Where commands may differ, what they stand at; all others are the same everywhere."""


def by_name() -> dict[str, list[tuple[str, Any]]]:
    table: dict[str, list[tuple[str, Any]]] = defaultdict(list)
    for name, command in COMMANDS.items():
        for param in command.params:
            if param.name not in OWN_TEXT:
                table[flag(param)].append((name, param))
    return table


@pytest.mark.parametrize("name", sorted(name for name, users in by_name().items() if len(users) > 1))
def test_one_name_means_one_thing(name: str) -> None:
    users = by_name()[name]
    for what in ("help", "rich_help_panel", "opts", "min", "max", "is_flag"):
        said = {str(getattr(param, what, None)) for _, param in users}
        assert len(said) == 1, (what, said)
    kinds = {annotation(command, param).__origin__ for command, param in users if (name, command) not in REPEATED}
    kinds = {typing.get_args(kind)[0] if type(None) in typing.get_args(kind) else kind for kind in kinds}
    assert len(kinds) == 1
    defaults = {param.default if not isinstance(param.default, list) else tuple(param.default) for _, param in users}
    assert defaults <= DEFAULTS[name] if name in DEFAULTS else len(defaults) == 1


def test_one_thing_has_one_name() -> None:
    texts: dict[str, set[str]] = defaultdict(set)
    for name, users in by_name().items():
        for _, param in users:
            if param.param_type_name == "option":
                texts[str(param.help)].add(name)
    assert {text: names for text, names in texts.items() if len(names) > 1} == {}


BESIDE = {
    **{key: ["adapter", "out"] for key in ("adapter merge", "adapter export", "adapter import")},
    **{key: ["out"] for key in ("convert", "upcycle", "merge-experts")},
    "prune": ["out", "--calibrate", "t", "--experts", "3"],
    "imatrix": ["out.gguf", "--calibrate", "t"],
    "eval": ["--tasks", "mmlu"],
}
"""What commands need beside a model."""


@pytest.mark.parametrize("command", [n for n, c in COMMANDS.items() if any(p.name == "model" for p in c.params)])
def test_a_model_is_given_as_an_option_everywhere(command: str) -> None:
    (param,) = (p for p in COMMANDS[command].params if p.name == "model")
    if param.param_type_name == "option":
        assert command in ("chat", "generate") and param.opts == ["--model", "-m"]
        return
    seen = []
    for words in (["mine"], ["--model", "mine"], ["-m", "mine"], ["--model=mine"]):
        try:
            result = run(*command.split(), *words, *BESIDE.get(command, []))
            seen.append(f"{type(result.exception).__name__} {result.exception}")
        except Reached as stopped:
            seen.append(f"{stopped.what} {stopped.given | {'progress': None}}")
    assert len(set(seen)) == 1 and "mine" in seen[0]
    assert "given twice" in run(*command.split(), "-m", "a", "--model", "b").output
    assert "must be followed" in run(*command.split(), "--model").output


@pytest.mark.parametrize("name", sorted(name for name, users in by_name().items() if len(users) > 1))
def test_shared_options_are_stated_once(name: str) -> None:
    """A parameter that several functions have is one of ``cli.options``, not a copy of it."""
    shared = [one for value in vars(options).values() for one in (value, *getattr(value, "__metadata__", ()))]
    if len({COMMANDS[command].callback for command, _ in by_name()[name]}) > 1:
        for command, param in by_name()[name]:
            (info,) = annotation(command, param).__metadata__
            assert any(info is one for one in shared), command
