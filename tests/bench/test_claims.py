"""The launch's claims: steps run once, values from made-up runs by hand, verdicts, records, and the page."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
from typer.testing import CliRunner

from quadriga.bench import equal_loss
from quadriga.bench.claims import measures, picture, registry, results, steps
from quadriga.bench.claims.page import page
from quadriga.bench.claims.registry import CLAIMS, Claim, Scale, claim
from quadriga.bench.claims.results import Record
from quadriga.bench.claims.steps import Step, run_steps, toml
from quadriga.cli import app
from quadriga.errors import EvaluationError, QuadrigaError
from quadriga.model.cost import n_params
from quadriga.train.architecture import model_config
from quadriga.train.config import ModelSection, RunConfig, parse_toml
from tests.waiting import HANG_S, until

ROOT = Path(__file__).parent.parent.parent
RECIPES = ROOT / "recipes"


class Program:
    """Stands for this program: writes what it is told to, fails where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[str]] = []
        self.fails_at = ""
        monkeypatch.setattr(steps, "_ended", self.run)

    def run(self, command: list[str], output: IO[str], errors: IO[str]) -> int:
        words = command[3:]
        self.calls.append(words)
        code = int(bool(self.fails_at) and self.fails_at in words)
        errors.write("it said\nwhy")
        if output is not errors:
            output.write(json.dumps(words))
        return code


THREE = [Step(name=name, argv=("info", name, "{out}/x", "{recipes}/y"), output=f"{name}.json") for name in "abc"]


def test_finished_steps_are_left_alone_and_a_failed_one_is_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, told = Program(monkeypatch), list[str]()
    program.fails_at = "b"
    with pytest.raises(QuadrigaError, match=r"the step b ended with code 1: it said / why \(.*b.log has all of it"):
        run_steps(THREE, tmp_path, RECIPES, told.append)
    assert (tmp_path / "a.json").exists() and not (tmp_path / "b.json").exists()
    program.fails_at = ""
    run_steps(THREE, tmp_path, RECIPES, told.append)
    assert [words[1] for words in program.calls] == ["a", "b", "b", "c"]
    words = ["info", "c", f"{tmp_path}/x", f"{RECIPES}/y"]
    assert json.loads((tmp_path / "c.json").read_text()) == words
    assert told[-1] == f"[3/3] quadriga {' '.join(words)}"
    run_steps(THREE, tmp_path, RECIPES, told.append)
    assert len(program.calls) == 4
    with pytest.raises(EvaluationError, match=r"a.json is of other settings: give another --runs"):
        run_steps([replace(THREE[0], argv=("info", "z"))], tmp_path, RECIPES, told.append)


SLOW = """
import pathlib, signal, sys
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path("saved").write_text("all"), sys.exit(3)))
pathlib.Path("begun").touch()
while True:
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_claim_lets_its_command_save(tmp_path: Path, number: int) -> None:
    """The command is asked to stop, and is waited for: nothing of it is left behind."""
    program = f"""
import signal, sys
from pathlib import Path
from quadriga.bench.claims import results
from quadriga.bench.claims.steps import _ended
from quadriga.cli import app
results.run_steps = lambda *_: _ended([sys.executable, "-c", {SLOW!r}], sys.stdout, sys.stderr)
app(["claims", "run", "combinations", "--runs", "r"])
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.DEVNULL) as claims:
        try:
            assert until((tmp_path / "begun").exists)
            claims.send_signal(number)
            assert claims.wait(HANG_S) not in (0, -number)
        finally:
            claims.kill()
    assert (tmp_path / "saved").read_text() == "all"


def test_the_file_of_a_run_is_its_recipe_with_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Program(monkeypatch)
    step = Step(
        name="vote-s2",
        argv=("train", "{out}/vote-s2.toml"),
        recipe="nano.toml",
        changes={"seed": 2, "model.aggregate": "vote", "data.corpora": ["{out}/c"], "router.z_loss": None},
        tokens=0.1,
    )
    run_steps([step], tmp_path, RECIPES, print)
    found = parse_toml((tmp_path / "vote-s2.toml").read_bytes(), RunConfig)
    assert (found.run, found.seed, found.model.aggregate) == (str(tmp_path / "runs/vote-s2"), 2, "vote")
    assert found.data.corpora == [str(tmp_path / "c")]
    (stage,) = found.data.stages
    assert stage.n_tokens == 73 * 8192, "a tenth of 6M in whole batches"
    assert (found.schedule.warmup_steps, found.checkpoint.every) == (5, 12)
    assert program.calls == [["train", f"{tmp_path}/vote-s2.toml"]]
    with pytest.raises(EvaluationError, match=r"cannot read .*no.toml.*Give the folder of this project's recipes"):
        run_steps([replace(step, name="x", recipe="no.toml")], tmp_path, RECIPES, print)


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.toml")), ids=lambda path: path.name)
def test_recipes_survive_being_written(path: Path) -> None:
    values = tomllib.loads(path.read_text())
    if any(isinstance(one, list) and one and isinstance(one[0], dict) for one in values.values()):
        pytest.skip("a list of tables at the top, which no training run has")
    assert tomllib.loads(toml(values)) == values


@pytest.mark.parametrize("one", CLAIMS, ids=lambda one: one.name)
def test_every_claims_training_files_are_valid(one: Claim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Program(monkeypatch)
    scale = Scale(seeds=2, share=0.05, threads=1, dtype="float32")
    run_steps(one.steps(scale), tmp_path / one.name, RECIPES, print)
    for path in (tmp_path / one.name).glob("*.toml"):
        found = parse_toml(path.read_bytes(), RunConfig)
        assert found.parallel.dtype == "float32" and str(found.seed) == path.stem.rpartition("-s")[2]
    assert all("{" not in word for words in program.calls for word in words)
    groups = {
        "mpt-compute": (2, 4),
        "mpt-parts": (6, 6),
        "moe-flops": (4, 2),
        "moe-flops-sizes": (18, 0),
        "fine-grained": (2, 2),
        "aggregators": (4, 2),
    }
    found = tuple(len(list((tmp_path / folder).glob("*.toml"))) for folder in (one.name, "shared"))
    assert found == groups.get(one.name, (0, 0))


def test_what_claims_share_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Program(monkeypatch)
    for name in ("moe-flops", "fine-grained", "aggregators"):
        run_steps(claim(name).steps(Scale(seeds=2)), tmp_path / name, RECIPES, print)
    words = [" ".join(words) for words in program.calls]
    assert len(set(words)) == len(words)
    runs = [Path(words[1]).relative_to(tmp_path).with_suffix("") for words in program.calls if words[0] == "train"]
    kinds = ["moe-flops/nano-dense", "moe-flops/nano-dense-2x", "shared/nano", "fine-grained/coarse"]
    kinds += ["aggregators/vote", "aggregators/fuse"]
    assert sorted(map(str, runs)) == sorted(f"{kind}-s{seed}" for kind in kinds for seed in (1, 2))
    corpora = [words[words.index("--out") + 1] for words in program.calls if words[:2] == ["data", "prepare"]]
    assert corpora == [str(tmp_path / "shared/corpora/mix-8192")]


# Values from runs ----------------------------------------------------------------------------------------------------


def finished(folder: Path, name: str, flops: float, loss: float, seconds_loss: float | None = None) -> None:
    """A run of two steps whose held-out losses are ``loss`` above and below in two domains."""
    lines: list[dict[str, Any]] = [
        {"step": n, "flops": flops / 2, "tokens": 100 * n, "tokens_per_s": 10.0 * n} for n in (1, 2)
    ]
    held = {"en": {"loss": loss - 1}, "zh": {"loss": loss + 1 if seconds_loss is None else seconds_loss}}
    (folder / "runs" / name).mkdir(parents=True)
    lines.append({"step": 2, "held_out": held})
    (folder / "runs" / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_flops_to_equal_loss_by_hand(tmp_path: Path) -> None:
    for seed, shift in ((1, 0.0), (2, 0.02)):
        finished(tmp_path, f"nano-dense-s{seed}", 1e14, 4.2 + shift)
        finished(tmp_path, f"nano-dense-2x-s{seed}", 2e14, 4.1 + shift)
    finished(tmp_path, "nano-s1", 1e14, 4.16)  # half way between the means 4.21 and 4.11
    finished(tmp_path, "nano-s2", 1e14, 4.00)  # better than both
    found = measures.flops_to_equal_loss(tmp_path)
    assert found.parts == {"nano-s1": pytest.approx(math.sqrt(2)), "nano-s2": pytest.approx(2.0)}
    mean, reach = (math.sqrt(2) + 2) / 2, 12.706 * (2 - math.sqrt(2)) / 2  # t of one degree; s / sqrt(2) of two values
    assert (found.value, found.low, found.high) == tuple(map(pytest.approx, (mean, mean - reach, mean + reach)))
    assert found.note == "only bounds, as the runs do not enclose the loss: nano-s2 >"


def test_bits_a_byte_compare_vocabularies(tmp_path: Path) -> None:
    for size, per_byte in ((4096, 0.5), (8192, 0.25)):
        rows = [{"split": "held_out", "domain": d, "tokens": 100 * per_byte, "text_bytes": 100} for d in ("en", "zh")]
        rows.append({"split": "train", "domain": "en", "tokens": 7, "text_bytes": 1})
        (tmp_path / f"corpus-{size}.json").write_text(json.dumps({"content": rows}))
    finished(tmp_path, "nano-mpt-s1", 1e14, 4.0)
    finished(tmp_path, "nano-mpt-4x-s1", 4e14, 3.0)
    finished(tmp_path, "nano-dbrx-s1", 1e14, 7.0)  # in bits a byte that of a loss of 3.5 in twice as many tokens
    found = measures.compute_to_equal_bits(tmp_path)
    assert found.value == pytest.approx(2.0)
    bits = 7.0 * 0.25 / math.log(2)
    assert f"nano-dbrx-s1 {bits:.3f}" in found.note


def test_parts_of_a_recipe_one_change_at_a_time(tmp_path: Path) -> None:
    for size, per_byte in ((4096, 0.5), (8192, 0.25)):
        rows = [{"split": "held_out", "domain": d, "tokens": 100 * per_byte, "text_bytes": 100} for d in ("en", "zh")]
        (tmp_path / f"corpus-{size}.json").write_text(json.dumps({"content": rows}))
    for seed in (1, 2):
        for name, loss in (("a", 4.0), ("b", 7.6), ("c", 7.0 + 0.2 * seed)):
            finished(tmp_path, f"{name}-s{seed}", 1e14, loss)
    found = measures.bits_by_change({"a": "nothing", "b": "vocabulary", "c": "optimiser"})(tmp_path)
    nats = {"vocabulary": 7.6 * 0.25 - 4.0 * 0.5, "optimiser": 0.25 * (7.3 - 7.6)}
    assert found.parts == {name: pytest.approx(value / math.log(2)) for name, value in nats.items()}
    assert found.value == found.parts["optimiser"] and found.note.startswith(
        "optimiser helps least; bits a byte: a 2.885"
    )
    assert found.low is not None and found.high is not None
    assert found.high - found.low == pytest.approx(2 * 12.706 * 0.25 * 0.1 / math.log(2))


def test_the_gain_of_several_sizes_and_its_trend(tmp_path: Path) -> None:
    for width, flops, mixture in ((4, 1e13, 4.11), (6, 1e14, 4.16), (8, 1e15, 4.11)):
        finished(tmp_path, f"dense-{width}-s1", flops, 4.21)
        finished(tmp_path, f"dense-2x-{width}-s1", 2 * flops, 4.11)
        finished(tmp_path, f"modern-{width}-s1", flops, mixture)
    found = measures.flops_by_size((4, 6, 8))(tmp_path)
    assert found.parts == {
        "width 4": pytest.approx(2.0), "width 6": pytest.approx(math.sqrt(2)), "width 8": pytest.approx(2.0)
    }  # fmt: skip
    assert (found.value, found.low, found.high) == (pytest.approx(2.0), None, None)
    assert found.note == "+0.00 for ten times the arithmetic" and len(found.curves) == 9


def test_the_sizes_of_a_claim_have_equal_work() -> None:
    by_width: dict[str, dict[str, int]] = {}
    for step in claim("moe-flops-sizes").steps(Scale(seeds=1)):
        if step.recipe is not None:
            kind, _, width = step.name.removesuffix("-s1").rpartition("-")
            values = tomllib.loads((RECIPES / step.recipe).read_text())["model"]
            values |= {key.removeprefix("model."): x for key, x in step.changes.items() if key.startswith("model.")}
            found = n_params(model_config(ModelSection(**values), 8192))
            by_width.setdefault(width, {})[kind] = found.active_without_input
    assert [*by_width] == ["96", "128", "192"]
    for width, active in by_width.items():
        assert active["modern"] == pytest.approx(active["dense"], rel=0.02), width
        assert active["dense-2x"] == pytest.approx(2 * active["dense"], rel=0.03), width


def test_variants_are_compared_seed_by_seed(tmp_path: Path) -> None:
    own, shared = tmp_path / "aggregators", tmp_path / "shared"
    for seed, base in ((1, 4.0), (2, 4.3)):
        finished(shared, f"nano-s{seed}", 1e14, base)
        finished(own, f"vote-s{seed}", 1e14, base - 0.02 * seed)
        finished(own, f"fuse-s{seed}", 1e14, base + 0.1)
    finished(shared, "nano-s3", 1e14, 9.0)  # of a claim that ran three seeds
    found = measures.loss_differences("vote", "fuse", than="nano")(own)
    assert found.parts == {"vote": pytest.approx(-0.03), "fuse": pytest.approx(0.1)}
    reach = 12.706 * 0.01
    assert (found.value, found.low, found.high) == tuple(map(pytest.approx, (-0.03, -0.03 - reach, -0.03 + reach)))
    assert found.note.startswith("vote less nano, ")
    assert found.curves["fuse-s2"] == [(1e14, 4.4)] and set(found.curves) == {
        *(f"{kind}-s{seed}" for kind in ("vote", "fuse") for seed in (1, 2)),
        *("nano-s1", "nano-s2", "nano-s3"),
    }


def test_the_interval_of_a_mean_by_hand() -> None:
    assert measures.interval([1.0, 2.0, 6.0]) == tuple(map(pytest.approx, (3 - 6.57294, 3 + 6.57294)))
    low, high = measures.interval([5.0, 7.0] * 40)  # more than the table has: the last of it
    assert low is not None and high is not None and high - low == pytest.approx(2 * 2.086 * math.sqrt(80 / 79 / 80))
    assert measures.interval([4.0]) == (None, None)


def test_an_unfinished_run_is_an_error(tmp_path: Path) -> None:
    finished(tmp_path, "nano-s1", 1e14, 4.0)
    path = tmp_path / "runs/nano-s1/metrics.jsonl"
    path.write_text(path.read_text() + json.dumps({"step": 3, "flops": 1.0, "tokens": 1, "tokens_per_s": 1.0}) + "\n")
    with pytest.raises(EvaluationError, match="the run is not at its end"):
        equal_loss.load(tmp_path / "runs/nano-s1")
    with pytest.raises(EvaluationError, match="must have runs named nano-dense-sN"):
        measures.flops_to_equal_loss(tmp_path)


def test_inference_takes_the_largest_batch_ratio(tmp_path: Path) -> None:
    head = "cpu,isa,threads,format,system,kind,n,spread,over_llama2_70b\n"
    rows = [
        "x,avx2,2,q4,DBRX,decode,1,0.1,1.9",
        "x,avx2,2,q4,DBRX,decode,4,0.2,2.1",
        "x,avx2,2,q4,Mixtral,decode,1,0,5",
    ]
    (tmp_path / "claim.csv").write_text(head + "\n".join(rows) + "\nx,avx2,2,q4,DBRX,prefill,128,0,9\n")
    found = measures.inference(tmp_path)
    assert (found.value, found.low, found.high) == tuple(map(pytest.approx, (2.1, 1.89, 2.31)))
    assert found.parts == {"batch 1": 1.9, "batch 4": 2.1}


def test_quality_from_results(tmp_path: Path) -> None:
    names = ("arc_challenge", "hellaswag_10", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k")
    figure = {"main": "acc", "groups": {"a": {"value": 0.2}}}
    tasks = {name: figure | {"figures": {"acc": {"value": 0.1 * i, "stderr": 0.05}}} for i, name in enumerate(names)}
    (tmp_path / "results.json").write_text(json.dumps({"tasks": tasks}))
    assert measures.table_mean(tmp_path).value == pytest.approx(25.0)
    one = measures.main_figure("mmlu")(tmp_path)
    assert (one.value, one.low, one.high, one.parts) == tuple(map(pytest.approx, (0.2, 0.1, 0.3, {"a": 0.2})))
    del tasks["mmlu"]
    (tmp_path / "results.json").write_text(json.dumps({"tasks": tasks}))
    with pytest.raises(EvaluationError, match="missing: mmlu"):
        measures.table_mean(tmp_path)


# Records and verdicts ------------------------------------------------------------------------------------------------

RECORD = Record(
    claim="inference",
    value=2.0,
    low=1.9,
    high=2.1,
    parts={"batch 1": 2.0},
    note="",
    scale="",
    machine="m",
    load="",
    version="0",
    commit="c",
    date="2026-01-02",
)


@pytest.mark.parametrize(
    ("at_least", "at_most", "expected"),
    [
        (1.9, None, "reproduced"),
        (1.95, None, "partly reproduced"),
        (2.05, None, "not reproduced"),
        (None, 2.1, "reproduced"),
        (1.0, 2.05, "partly reproduced"),
        (2.5, 3.0, "not reproduced"),
    ],
)
def test_verdicts(at_least: float | None, at_most: float | None, expected: str) -> None:
    one = replace(claim("inference"), at_least=at_least, at_most=at_most)
    assert results.verdict(one, RECORD) == expected
    assert results.verdict(one, None) == "not reproduced"


def test_one_run_reproduces_partly() -> None:
    alone = replace(RECORD, low=None, high=None)
    assert results.verdict(claim("inference"), alone) == "partly reproduced"
    assert results.verdict(claim("inference"), replace(alone, value=1.0)) == "not reproduced"
    assert results.shown(claim("inference"), alone) == "2 (one run: no interval) times"


def test_the_newest_record_is_shown(tmp_path: Path) -> None:
    one = claim("inference")
    shipped = results.newest(one, tmp_path)
    assert shipped is not None and shipped.date < "2027"
    (tmp_path / "inference").mkdir()
    own = tmp_path / "inference/result.json"
    for date, shown in (("2000-01-01", shipped), ("2100-01-01", replace(RECORD, date="2100-01-01"))):
        own.write_text(results.as_text(replace(RECORD, date=date)))
        assert results.newest(one, tmp_path) == shown
    own.write_text('{"value": 1}')
    with pytest.raises(EvaluationError, match=r"result.json is no record of a claim"):
        results.newest(one, tmp_path)


def test_a_claim_is_run_listed_and_recorded(tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["claims", "run", "combinations", "--runs", str(tmp_path)])
    assert said.exit_code == 0, said.output
    assert "published 65, here 65 times: reproduced" in said.output
    found = json.loads((tmp_path / "combinations/result.json").read_text())
    assert (found["value"], found["parts"]) == (65.0, {"ours": 1820.0, "2 of 8": 28.0})
    listed = CliRunner().invoke(app, ["claims", "list", "--runs", str(tmp_path), "--json"])
    by_name = {row["claim"]: row for row in json.loads(listed.output)["claims"]}
    assert by_name["combinations"]["verdict"] == "reproduced"
    assert (by_name["programming"]["here"], by_name["programming"]["verdict"]) == ("never run", "not reproduced")
    words = ["claims", "record", "combinations", str(tmp_path / "combinations"), "--into", str(tmp_path / "r")]
    recorded = CliRunner().invoke(app, [*words, "--machine", "another", "--commit", "abc", "--date", "2026-01-02"])
    assert recorded.exit_code == 0, recorded.output
    kept = json.loads((tmp_path / "r/combinations.json").read_text())
    assert (kept["machine"], kept["commit"], kept["date"]) == ("another", "abc", "2026-01-02")
    with pytest.raises(EvaluationError, match="there is no claim 'x': choose from parameters, "):
        registry.claim("x")


def test_the_judge_of_a_claim_is_part_of_its_command() -> None:
    (step,) = claim("conversation").steps(Scale(model="m", judge="http://x/v1", judge_model="gpt"))
    assert step.argv == (
        *("eval", "--model", "m", "--tasks", "mt_bench", "--judge", "http://x/v1", "--judge-model", "gpt"),
        *("--out", "{out}"),
    )


def test_every_claim_can_fail_and_has_commands() -> None:
    for one in CLAIMS:
        assert one.at_least is not None or one.at_most is not None, one.name
        assert one.steps(Scale()), one.name
    assert len({one.name for one in CLAIMS}) == len(CLAIMS)
    assert steps.toml({"a": 1, "b": {"c": [1.5, "x"]}}) == 'a = 1\n\n[b]\nc = [1.5, "x"]\n'


def test_a_record_with_curves_has_a_picture(tmp_path: Path) -> None:
    curves = {f"{kind}-s{seed}": [[1e14, 5.0], [2e14, 4.0 + seed]] for kind in ("nano", "vote") for seed in (1, 2)}
    drawn = replace(RECORD, curves=curves)
    picture.draw(drawn, tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    assert text.count("<!-- nano -->") == text.count("<!-- vote -->") == 1, "an entry for each kind, not each seed"
    assert picture.picture_of(claim("aggregators"), drawn) == "images/claim-aggregators.svg"
    assert picture.picture_of(claim("inference"), RECORD) == "images/claim.svg"
    assert picture.picture_of(claim("inference"), None) == picture.picture_of(claim("aggregators"), RECORD) == ""
    again = json.loads(results.as_text(drawn))
    assert Record(**again) == drawn


def test_pictures_of_the_page_are_there() -> None:
    for one in CLAIMS:
        where = picture.picture_of(one, results.newest(one))
        assert not where or (ROOT / "docs" / where).is_file(), f"quadriga claims page --write docs/claims.md: {where}"


def test_the_page_is_what_the_records_say() -> None:
    assert (ROOT / "docs/claims.md").read_text() == page(), (
        "write it again: quadriga claims page --write docs/claims.md"
    )
