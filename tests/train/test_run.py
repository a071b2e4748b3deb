"""`quadriga train` as users run it: configuration, corpus, interruptions, report, and an export for other programs."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.run
import typer
from typer.testing import CliRunner

from quadriga import runtime
from quadriga.cli import app
from quadriga.errors import CheckpointError, ConfigError
from quadriga.hub import catalogue
from quadriga.io.open import open_checkpoint
from quadriga.nn.load import load_parameters
from quadriga.train import branch, report
from quadriga.train.config import LogSection, RunConfig, parse_toml
from quadriga.train.export import export
from quadriga.train.held_out import HeldOutLoss
from quadriga.train.metrics import FILE, MetricsFile, read
from quadriga.train.run import train
from quadriga.train.run_directory import MANIFEST, Manifest, RunDirectory, chosen
from quadriga.train.step_report import StepReport
from quadriga.train.trackers import TensorBoard, trackers
from quadriga.train.view import duration, load_bars, sparkline
from tests.train.corpora import prose
from tests.train.tune_runs import write_base
from tests.waiting import HANG_S

ROOT = Path(__file__).parent.parent.parent

RUN = """
run = "{run}"
[model]
preset = "dbrx-132b"
d_model = 24
n_layers = 2
n_heads = 6
n_kv_heads = 3
head_dim = 4
d_ff = 20
n_experts = 8
top_k = 2
max_seq_len = 64
[data]
corpora = ["{corpus}"]
unit_tokens = 64
[[data.stages]]
tokens = 1536
seq_len = 32
batch_tokens = 256
[[data.stages]]
tokens = 512
seq_len = 64
batch_tokens = 256
[schedule]
warmup_steps = 2
[router]
bias_rate = 0.001
[parallel]
device = "cpu"
[checkpoint]
every = 3
[log]
every = 1
routing_every = 2
[evaluate]
every = 4
rows = 2
prompts = ["the quick"]
sample_tokens = 4
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred short texts of two domains, prepared with a vocabulary of 300."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": prose(i), "domain": ("a", "b")[i % 2]}) for i in range(200)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    arguments = [
        "data", "prepare", str(folder / "text.jsonl"), "--out", str(folder / "made"), "--train-tokenizer", "300",
        "--domain-field", "domain", "--held-out", "0.2", "--workers", "1",
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return folder / "made"


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from its first step to its last."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    outcome = train(_config(folder, corpus))
    assert outcome.done and outcome.step == 8
    return folder


def _config(run: Path, corpus: Path, extra: str = "") -> RunConfig:
    return parse_toml((RUN.format(run=run, corpus=corpus) + extra).encode(), RunConfig)


def test_torchruns_own_options_swallow_none_of_ours() -> None:
    """torchrun looks through the whole command line, and takes what begins as one of its options for that one."""
    theirs = torch.distributed.run.get_args_parser()
    for command in ("train", "tune"):
        found = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
        ours = [
            max((o for o in p.opts if o.startswith("--")), key=len) for p in found.params if p.opts[0].startswith("-")
        ]
        assert "--run-folder" in ours and "--allow-change" in ours
        for option in ours:
            taken = theirs.parse_args(["--nproc-per-node", "2", "-m", "quadriga", command, "x.toml", option])
            assert taken.training_script_args == [command, "x.toml", option]


def _weights(run: Path) -> bytes:
    folder = RunDirectory(run).at(8)
    return (folder / "rank-00000.safetensors").read_bytes()


def test_a_run_writes_all_its_files(finished: Path) -> None:
    lines = read(finished / FILE)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(8))
    assert [line["tokens"] for line in steps] == [256 * n for n in range(1, 9)]
    assert [bool("experts" in line) for line in steps] == [True, False] * 4
    held_out = [line for line in lines if "held_out" in line]
    assert [line["step"] for line in held_out] == [4, 8]
    assert held_out[0]["held_out"].keys() == {"a", "b"}
    entry = held_out[1]["held_out"]["a"]
    assert entry["loss"] < held_out[0]["held_out"]["a"]["loss"]
    assert 0.5 < entry["bits_per_byte"] < entry["loss"] / 0.69
    assert held_out[0]["samples"].keys() == {"the quick"}
    assert RunDirectory(finished).steps() == [3, 6, 8]
    page = (finished / "report.html").read_text()
    assert page.count("<svg") >= 8
    assert "http" not in page.replace("http-equiv", "")  # self-contained
    assert "layer 1" in page and "Samples" in page


def _last(calls: Iterator[int], n: int) -> bool:
    return next(calls) == n - 1


def test_stopped_and_resumed_it_is_the_same_run(corpus: Path, finished: Path, tmp_path: Path) -> None:
    config = _config(tmp_path / "run", corpus)
    for n_steps in (2, 5):
        calls = iter(range(n_steps))
        assert not train(config, stop=partial(_last, calls, n_steps)).done
    assert train(config).done
    assert _weights(tmp_path / "run") == _weights(finished)
    mine, theirs = ([line for line in read(p / FILE) if "loss" in line] for p in (tmp_path / "run", finished))
    assert [line["loss"] for line in mine] == [line["loss"] for line in theirs]


def test_sigterm_saves_and_exits_with_0(corpus: Path, finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(RUN.format(run=tmp_path / "run", corpus=corpus))
    command = [sys.executable, "-m", "quadriga", "train", str(file), "--threads", "1"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=runtime.child_environment())
    assert child.stderr is not None
    while "step 2/8" not in child.stderr.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    rest = child.stderr.read()
    assert child.wait(HANG_S) == 0
    done = CliRunner().invoke(app, ["train", str(file), "--threads", "1"])
    assert done.exit_code == 0
    assert _weights(tmp_path / "run") == _weights(finished)
    assert "stopped and saved" in rest or "step 8/8" in rest


def test_resume_must_and_never(corpus: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="already has checkpoints"):
        train(_config(finished, corpus), resume="never")
    with pytest.raises(ConfigError, match="no checkpoint to resume from"):
        train(_config(tmp_path / "new", corpus), resume="must")


def test_a_begun_stage_must_not_change(corpus: Path, finished: Path) -> None:
    config = RUN.format(run=finished, corpus=corpus).replace("tokens = 1536", "tokens = 1280")
    with pytest.raises(ConfigError, match="must not change"):
        train(parse_toml(config.encode(), RunConfig))


def test_rows_longer_than_the_model_are_refused(corpus: Path, tmp_path: Path) -> None:
    config = RUN.format(run=tmp_path, corpus=corpus).replace("max_seq_len = 64", "max_seq_len = 48")
    with pytest.raises(ConfigError, match="longest stage's 64"):
        train(parse_toml(config.encode(), RunConfig))


def test_corpora_of_another_vocabulary_than_the_start_are_refused(corpus: Path, tmp_path: Path) -> None:
    """Ids beyond its table would be a traceback; ids of other tokens would train it on nonsense."""
    base = write_base(tmp_path / "base")
    text = RUN.format(run=tmp_path / "run", corpus=corpus)
    start = re.sub(r"\[model\].*\[data\]", f'[model]\nstart = "{base}"\n[data]', text, flags=re.DOTALL)
    with pytest.raises(ConfigError, match=r"tokenised with the vocabulary of model.start, .*theirs is another one"):
        train(parse_toml(start.encode(), RunConfig))


def test_check_says_what_would_run(corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(RUN.format(run=tmp_path / "run", corpus=corpus))
    done = CliRunner().invoke(app, ["train", str(file), "--check"])
    assert done.exit_code == 0, done.output
    assert "8 steps, 2,048 tokens" in done.output
    assert "stage 1: 2 steps of 4 rows of 64" in done.output
    assert not (tmp_path / "run").exists()


def test_an_export_is_the_trained_model(corpus: Path, finished: Path, tmp_path: Path) -> None:
    """It opens like any Hugging Face checkpoint, with its tokenizer, and its weights are the trained ones byte for byte."""
    file = tmp_path / "run.toml"
    file.write_text(RUN.format(run=finished, corpus=corpus))
    done = CliRunner().invoke(app, ["train", str(file), "--export", str(tmp_path / "hf")])
    assert done.exit_code == 0, done.output
    opened = open_checkpoint(tmp_path / "hf")
    assert opened.layout == "fused" and opened.config.only_moe("this test").n_experts == 8
    parameters = load_parameters(opened)
    tokenizer = opened.load_tokenizer(catalogue.cl100k_ranks)
    assert tokenizer is not None and tokenizer.decode(tokenizer.encode("the quick")) == "the quick"
    from quadriga.train.shards import ShardReader

    trained = ShardReader([RunDirectory(finished).at(8) / "rank-00000.safetensors"])
    for name, value in parameters.items():
        assert torch.equal(value, trained.whole(f"parameter/{name}")), name
    opened.close()
    with pytest.raises(CheckpointError, match="must not exist"):
        export(finished, tmp_path / "hf", tokenizer_files={})
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; it has \[3, 6, 8\]"):
        export(finished, tmp_path / "other", step=5, tokenizer_files={})
    with pytest.raises(ConfigError, match="bias"):
        export(finished, tmp_path / "other", step=3, tokenizer_files={})


# Branches ------------------------------------------------------------------------------------------------------------

WSD = "[schedule]\nkind = 'wsd'\nwarmup_steps = 2\ndecay_share = 0.5\n"


def _wsd(folder: Path, corpus: Path, more: str = "") -> Path:
    """A run's file: warm-up, stable, decay; no bias, whose fade would be another schedule."""
    text = RUN.format(run=folder, corpus=corpus).replace("[schedule]\nwarmup_steps = 2\n", WSD + more)
    file = folder.with_suffix(".toml")
    file.write_text(text.replace("[router]\nbias_rate = 0.001\n", ""))
    return file


def test_a_branch_is_the_run_that_its_settings_alone_would_have_been(corpus: Path, tmp_path: Path) -> None:
    """The trunk of 8 steps falls after 4; at step 3 a branch of 6 leaves it, which falls after 3."""
    trunk = _wsd(tmp_path / "trunk", corpus)
    assert CliRunner().invoke(app, ["train", str(trunk)]).exit_code == 0
    before = _contents(tmp_path / "trunk")
    own = _wsd(tmp_path / "branch", corpus, "steps = 6\n")
    words = ["train", str(own), "--branch", str(tmp_path / "trunk"), "--step", "3"]
    cut = CliRunner().invoke(app, [*words, "--stop-after", "1"])
    assert cut.exit_code == 0 and "step 4 of 6" in cut.output, cut.output
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "step 6 of 6, done" in done.output, done.output
    assert _contents(tmp_path / "trunk") == before
    alone = _wsd(tmp_path / "alone", corpus, "steps = 6\n")
    assert CliRunner().invoke(app, ["train", str(alone)]).exit_code == 0
    weights = [tmp_path / name / "checkpoints/step-00000006/rank-00000.safetensors" for name in ("branch", "alone")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    steps = [[line for line in read(tmp_path / name / FILE) if "loss" in line] for name in ("branch", "alone")]
    losses = [[(line["step"], line["loss"]) for line in lines] for lines in steps]
    assert losses[0] == losses[1], "the trunk's metrics up to the branch are its own"


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_branch_that_cannot_be_says_why(corpus: Path, finished: Path, tmp_path: Path) -> None:
    other = _wsd(tmp_path / "other", corpus)
    for words, message in (
        (["--branch", str(tmp_path / "no")], "has no checkpoint to begin at"),
        (["--branch", str(finished), "--step", "5"], "has no checkpoint of step 5; it has [3, 6, 8]"),
        (["--branch", str(tmp_path / "other")], "a branch needs a folder of its own"),
        (["--branch", str(finished), "--step", "6"], "the settings differ from those of"),
    ):
        found = CliRunner().invoke(app, ["train", str(other), *words])
        assert isinstance(found.exception, ConfigError | CheckpointError), found.output
        assert message in str(found.exception), str(found.exception)
        left = {path.name for path in (tmp_path / "other").rglob("*") if path.is_file()}
        assert left == {"lock"}, "a branch that is refused may begin elsewhere"


def test_a_branch_goes_on_only_where_it_began(corpus: Path, tmp_path: Path) -> None:
    trunk, own = _wsd(tmp_path / "trunk", corpus), _wsd(tmp_path / "branch", corpus, "steps = 6\n")
    assert CliRunner().invoke(app, ["train", str(trunk), "--stop-after", "4"]).exit_code == 0
    words = ["train", str(own), "--branch", str(tmp_path / "trunk")]
    assert CliRunner().invoke(app, [*words, "--step", "3", "--stop-after", "1"]).exit_code == 0
    for others in ([*words, "--step", "4"], [*words[:3], str(tmp_path / "elsewhere"), "--step", "3"]):
        found = CliRunner().invoke(app, others)
        message = f"began at step 3 of {tmp_path / 'trunk'}: leave --branch and --step out"
        assert isinstance(found.exception, ConfigError) and message in str(found.exception), found.output
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "step 6 of 6, done" in done.output, done.output
    found = CliRunner().invoke(app, ["train", str(trunk), "--branch", str(tmp_path / "branch")])
    assert "began not as a branch" in str(found.exception), found.output


def test_a_checkpoint_that_its_run_removes_meanwhile_is_no_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on removes the manifest first: what is left of its folder would be a run from nothing."""
    trunk, run = RunDirectory(tmp_path / "trunk"), RunDirectory(tmp_path / "run")
    trunk.part(3).mkdir(parents=True)
    trunk.finish(Manifest(step=3, files={}, state={}))
    run.checkpoints.mkdir(parents=True)

    def then_removed(trunk: RunDirectory, step: int | None) -> tuple[Path, Manifest] | None:
        found = chosen(trunk, step)
        assert found is not None
        (found[0] / MANIFEST).unlink()
        return found

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(branch, "chosen", then_removed)
        with pytest.raises(CheckpointError, match="was removed while it was taken"):
            branch.begin(branch.Branch(of=trunk.path, step=3), run)
    assert run.steps() == []


# What is shown -------------------------------------------------------------------------------------------------------


def test_metrics_of_steps_that_run_again_are_removed(tmp_path: Path) -> None:
    lines = [{"step": n, "loss": 1.0} for n in range(6)]
    lines.insert(4, {"step": 4, "held_out": {}, "samples": {}})
    (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')
    MetricsFile(tmp_path, 4, peak_flops=None, learning_rate=1.0, routing_every=1).close()
    assert read(tmp_path / FILE) == lines[:5]


def test_a_line_of_metrics_says_what_the_step_cost(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, 0, peak_flops=20.0, learning_rate=0.5, routing_every=1)
    file.on_step(
        StepReport(step=0, loss=1.5, norm=1.0, rate=0.1, tokens=8, tokens_seen=8, flops=10.0, seconds=2.0, verdict=None)
    )
    file.close()
    (line,) = read(tmp_path / FILE)
    assert (line["flops"], line["mfu"], line["tokens_per_s"], line["learning_rate"]) == (10.0, 0.25, 4.0, 0.05)


def test_a_report_of_an_empty_run_and_of_nan() -> None:
    assert "No step has been completed" in report.render([], "x")
    page = report.render([{"step": 0, "loss": float("nan"), "seconds": 1.0, "tokens": 5}], "<b>")
    assert "&lt;b&gt;" in page and "<h1><b>" not in page
    held_out = [{"step": i, "held_out": {"en": {"loss": loss}}} for i, loss in enumerate((1.5, float("nan")))]
    assert "polyline" in report.render(held_out, "x"), "what is finite is drawn"


def test_tensorboard_files_are_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    board = TensorBoard(tmp_path, 0)
    board.on_step(
        StepReport(step=3, loss=1.5, norm=1.0, rate=1.0, tokens=8, tokens_seen=8, flops=1.0, seconds=2.0, verdict=None)
    )
    board.on_evaluation(4, {"a": HeldOutLoss(2.5, None)}, {"p": "t"})
    board.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 1.5)]
    assert [(e.step, e.value) for e in events.Scalars("train/tokens_per_s")] == [(3, 4.0)]
    assert [(e.step, e.value) for e in events.Scalars("held_out/a")] == [(4, 2.5)]


class Recorder(types.ModuleType):
    """A module whose every call is written down: in place of wandb and mlflow, which need a server."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[object, ...], dict[str, object]]] = []
        self.id = "id-1"

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("info", "summary"):
            return self

        def call(*args: object, **kwargs: object) -> Recorder:
            self.calls.append((name, args, kwargs))
            return self

        return call

    run_id = "id-1"

    def of(self, name: str) -> list[tuple[tuple[object, ...], dict[str, object]]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


def test_wandb_and_mlflow_are_sent_every_step_under_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, mlflow = Recorder("wandb"), Recorder("mlflow")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    report = StepReport(
        step=3, loss=1.5, norm=1.0, rate=0.5, tokens=8, tokens_seen=8, flops=1.0, seconds=2.0, verdict=None
    )
    for _ in range(2):  # the second time as a resumed run
        for tracker in trackers(LogSection(wandb="project", mlflow="trial"), tmp_path, 0, {"seed": 1}):
            tracker.on_step(report)
            tracker.on_evaluation(4, {"a b": HeldOutLoss(2.5, None)}, {"p": "t"})
            tracker.on_event(4, "word")
            tracker.close()
    scalars = {"train/loss": 1.5, "train/norm": 1.0, "train/rate": 0.5, "train/tokens_per_s": 4.0}
    assert wandb.of("log")[:2] == [(({"step": 3, **scalars},), {}), (({"step": 4, "held_out/a b": 2.5},), {})]
    assert [kwargs["id"] for _, kwargs in wandb.of("init")] == [None, "id-1"] and len(wandb.of("finish")) == 2
    assert mlflow.of("log_metrics")[:2] == [
        ((scalars,), {"step": 3, "synchronous": False}),
        (({"held_out/a_b": 2.5},), {"step": 4, "synchronous": False}),
    ]
    assert [kwargs for _, kwargs in mlflow.of("start_run")] == [{"run_name": tmp_path.name}, {"run_id": "id-1"}]
    assert mlflow.of("log_dict")[0] == (({"seed": 1}, "config.json"), {})


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"log.{name} needs the {name}"):
        trackers(LogSection(**{name: "x"}), tmp_path, 0, {})


def test_launch_files_call_what_there_is() -> None:
    """Every option after `quadriga train` is one, and what begins with -- before it is torchrun's."""
    theirs = torch.distributed.run.get_args_parser()
    launch = ROOT / "recipes" / "launch"
    assert subprocess.run(["bash", "-n", str(launch / "slurm.sbatch")]).returncode == 0
    slurm = (launch / "slurm.sbatch").read_text().replace("\\\n", " ")
    line = next(line for line in slurm.splitlines() if "torchrun" in line and "srun" in line)
    words = shlex.split(line.replace('"$@" &', "").partition("torchrun")[2])
    words = ["1" if word in ("$SLURM_JOB_NUM_NODES", "$per_node") else word for word in words]
    assert theirs.parse_args(words).training_script_args == ["train", "$config"]
    plain = re.findall(r"^            - (\S+)$", (launch / "kubernetes.yaml").read_text(), re.M)
    assert theirs.parse_args(plain).training_script_args == ["train", "/runs/run.toml"]
    kubeflow = re.search(r"command: \[torchrun, (.*)\]", (launch / "kubeflow.yaml").read_text())
    assert kubeflow is not None
    assert theirs.parse_args(kubeflow[1].split(", ")).training_script_args == ["train", "/runs/run.toml"]


def test_ticks_and_thinning() -> None:
    assert report.ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert report.ticks(0.013, 0.047) == [0.02, 0.03, 0.04]
    assert report.ticks(3, 3) == [3]
    assert report.thin([(float(i), 2.0 * i) for i in range(10)], 5) == [(0.5 + 2 * i, 1.0 + 4 * i) for i in range(5)]


def test_sparklines_and_load_bars() -> None:
    assert sparkline([0.0, 7.0]) == "▁█"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert len(sparkline([float(i) for i in range(1000)])) == 40
    assert load_bars([0.0, 1.0, 2.0, 9.0]) == "▁▅██"
    assert duration(3723) == "1:02:03" and duration(65) == "1:05"


def test_the_training_page_is_true() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], "docs/training.md", "exec"), {})
