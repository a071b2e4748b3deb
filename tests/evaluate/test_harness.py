"""Running tasks: batches, resuming, errors, figures, and the content of results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from quadriga.errors import EvaluationError
from quadriga.evaluate import report
from quadriga.evaluate.data import Data
from quadriga.evaluate.harness import Options, TaskResult, prompt_hash, run_task
from quadriga.evaluate.items import AnswerItem, ChoiceItem, CodeItem, Item, TextItem
from quadriga.evaluate.tasks.base import Kind, Task
from tests.evaluate.fakes import RuleModel, Said


def choices(n: int) -> list[Item]:
    """Item i is right if i is not a multiple of 3; two groups."""
    return [
        ChoiceItem(
            pairs=((f"q{i}", " yes"), (f"q{i}", " no")), gold=int(i % 3 == 0), group="even" if i % 2 == 0 else "odd"
        )
        for i in range(n)
    ]


def task(items: list[Item], kind: Kind = "likelihood", main: str = "acc", **more: object) -> Task:
    base = Task(
        name="toy",
        version=3,
        title="Toy",
        protocol="made up",
        kind=kind,
        shots=2,
        build=lambda data, shots: items,
        main=main,
    )
    return replace(base, **more)  # type: ignore[arg-type]


def yes(context: str, continuation: str) -> Said:
    return Said(-1.0 if continuation == " yes" else -2.0)


def run(one: Task, model: RuleModel, out: Path, options: Options | None = None, **more: object) -> TaskResult:
    return run_task(one, model, Data(out), out, options or Options(), **more)  # type: ignore[arg-type]


def test_scores_of_a_task(tmp_path: Path) -> None:
    model, seen = RuleModel(rule=yes), list[tuple[int, int, str]]()
    result = run(task(choices(150), by_group=True), model, tmp_path, progress=lambda *a: seen.append(a))
    assert result.main.value == 100 / 150
    assert result.groups["even"].value == pytest.approx(50 / 75)
    assert result.figures["acc_mean_of_groups"].value == pytest.approx(100 / 150)
    assert (result.n_items, result.n_whole, result.n_new, result.shots) == (150, 150, 150, 2)
    assert model.n_pairs == 300
    assert seen[0] == (0, 150, "toy")
    assert seen[-1] == (150, 150, "toy")


def test_each_item_is_graded_by_its_own_answers_and_each_group_by_its_own_items(tmp_path: Path) -> None:
    """Items of the even group are answered right, of the odd one wrong, so grading by other items' answers shows."""

    def rule(context: str, continuation: str) -> Said:
        i = int(context[1:])
        right = " yes" if i % 3 else " no"
        return Said(-1.0 if (continuation == right) == (i % 2 == 0) else -2.0)

    result = run(task(choices(30)), RuleModel(rule=rule), tmp_path)
    assert result.main.value == 0.5
    assert {name: figure.value for name, figure in result.groups.items()} == {"even": 1.0, "odd": 0.0}


def test_batches_sample_with_different_seeds(tmp_path: Path) -> None:
    """A batch of n prompts uses n consecutive seeds; the next batch starts after them."""
    items: list[Item] = [AnswerItem(prompt=f"q{i}", grader=lambda text: {"acc": 1.0}) for i in range(70)]
    model = RuleModel()
    run(task(items, "generate"), model, tmp_path, Options(seed=11))
    assert model.seeds == [11, 11 + 32, 11 + 64]


def test_a_killed_run_resumes_and_ends_with_the_same_results(tmp_path: Path) -> None:
    whole = run(task(choices(150)), RuleModel(rule=yes), tmp_path / "whole")
    killed = RuleModel(rule=yes, dies_after=200)
    with pytest.raises(KeyboardInterrupt):
        run(task(choices(150)), killed, tmp_path / "cut")
    later = RuleModel(rule=yes)
    result = run(task(choices(150)), later, tmp_path / "cut")
    assert later.n_pairs == 300 - 128, "one batch of 64 items had been kept"
    assert result.figures == whole.figures
    assert (tmp_path / "cut/items/toy.jsonl").read_text() == (tmp_path / "whole/items/toy.jsonl").read_text()


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_an_item_cut_off_by_a_crash_is_run_again(tmp_path: Path, cut: int) -> None:
    run(task(choices(5)), RuleModel(rule=yes), tmp_path)
    file = tmp_path / "items/toy.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    model = RuleModel(rule=yes)
    run(task(choices(5)), model, tmp_path)
    assert model.n_pairs == 2
    assert file.read_bytes() == whole


def test_a_larger_limit_resumes_from_a_smaller_one(tmp_path: Path) -> None:
    first = run(task(choices(20)), RuleModel(rule=yes), tmp_path, Options(limit=6))
    assert (first.n_items, first.n_whole) == (6, 20)
    model = RuleModel(rule=yes)
    assert run(task(choices(20)), model, tmp_path, Options(limit=10)).n_items == 10
    assert model.n_pairs == 8


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"version": 4}, "version"),
        ({"build": lambda data, shots: choices(6)}, "prompts"),
    ],
)
def test_results_for_other_settings_are_never_mixed(tmp_path: Path, change: dict[str, object], word: str) -> None:
    run(task(choices(5)), RuleModel(rule=yes), tmp_path)
    with pytest.raises(EvaluationError, match=f"changed: {word}"):
        run(task(choices(5), **change), RuleModel(rule=yes), tmp_path)


def test_another_model_or_number_of_shots_is_refused(tmp_path: Path) -> None:
    run(task(choices(5)), RuleModel(rule=yes), tmp_path)
    with pytest.raises(EvaluationError, match="changed: model"):
        run(task(choices(5)), RuleModel(rule=yes, identity={"model": "rule", "weights": "1"}), tmp_path)
    with pytest.raises(EvaluationError, match="changed: shots"):
        run(task(choices(5)), RuleModel(rule=yes), tmp_path, Options(shots=0))


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "items").mkdir()
    (tmp_path / "items/toy.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(EvaluationError, match="is not a results file"):
        run(task(choices(5)), RuleModel(), tmp_path)


def test_generated_answers_are_graded_and_kept(tmp_path: Path) -> None:
    items: list[Item] = [
        AnswerItem(prompt=f"p{i}", grader=lambda text, i=i: {"acc": float(text == f"p{i}!" and i != 1)})
        for i in range(3)
    ]
    result = run(task(items, kind="generate"), RuleModel(write=lambda prompt: prompt + "!"), tmp_path)
    assert result.main.value == pytest.approx(2 / 3)
    rows = [json.loads(line) for line in (tmp_path / "items/toy.jsonl").read_text().splitlines()[1:]]
    assert [row["answers"] for row in rows] == [["p0!"], ["p1!"], ["p2!"]]


class Longer:
    """A program runner under which programs of more than 5 characters pass."""

    def passes(self, programs: list[str], *, wall_s: float | None = None, packages: Sequence[str] = ()) -> list[bool]:
        return [len(program) > 5 for program in programs]


def test_programs_of_several_samples(tmp_path: Path) -> None:
    items: list[Item] = [CodeItem(prompt=p, program=lambda answer: answer) for p in ("long prompt", "no")]
    model = RuleModel(write=lambda prompt: prompt)
    code = task(items, kind="code", main="pass@1")
    with pytest.raises(EvaluationError, match="it needs a runner"):
        run(code, model, tmp_path)
    result = run(code, model, tmp_path, Options(samples=4, ks=(1, 3), seed=10), runner=Longer())
    assert {name: figure.value for name, figure in result.figures.items()} == {"pass@1": 0.5, "pass@3": 0.5}
    assert (model.n_prompts, model.seeds) == (8, [10])


@dataclass
class Noted:
    """A program runner that passes everything and writes down what it was asked for."""

    asked: list[tuple[int, float | None, Sequence[str]]] = field(default_factory=list)

    def passes(self, programs: list[str], *, wall_s: float | None = None, packages: Sequence[str] = ()) -> list[bool]:
        self.asked.append((len(programs), wall_s, packages))
        return [True] * len(programs)


def test_programs_have_seeds_of_their_own_and_the_task_s_time_and_packages(tmp_path: Path) -> None:
    items: list[Item] = [CodeItem(prompt=f"p{i}", program=lambda answer: answer) for i in range(20)]
    code = task(items, kind="code", main="pass@1", program_s=7.5, packages=("numpy",))
    model, runner = RuleModel(), Noted()
    run(code, model, tmp_path, Options(samples=3, seed=10), runner=runner)
    assert model.seeds == [10, 10 + 3 * 16], "those of the first batch's 48 programs are used"
    assert runner.asked == [(48, 7.5, ("numpy",)), (12, 7.5, ("numpy",))]
    for change in ({"seed": 11}, {"temperature": 0.5}, {"samples": 2}):
        with pytest.raises(EvaluationError, match=f"changed: {next(iter(change))}"):
            run(code, model, tmp_path, replace(Options(samples=3, seed=10), **change), runner=runner)  # type: ignore[arg-type]
    assert Options(samples=3, temperature=0.0).code_temperature == 0.0, "0 is a temperature too"


def test_verdicts_of_another_judge_are_other_results(tmp_path: Path) -> None:
    first, second = (RuleModel(identity={"model": name}) for name in ("judge one", "judge two"))
    judged = task(choices(2), judged=True)
    with pytest.raises(EvaluationError, match="is graded by a judge"):
        run(judged, RuleModel(rule=yes), tmp_path)
    run(judged, RuleModel(rule=yes), tmp_path, judge=first)
    with pytest.raises(EvaluationError, match="changed: judge"):
        run(judged, RuleModel(rule=yes), tmp_path, judge=second)


def test_texts_give_perplexities(tmp_path: Path) -> None:
    result = run(task([TextItem(text="ab cd ef")], kind="rolling", main="word_perplexity"), RuleModel(), tmp_path)
    assert result.main.value == pytest.approx(2.718281828 ** (4 / 3))


def test_options_are_checked() -> None:
    with pytest.raises(EvaluationError, match="--limit"):
        Options(limit=0)
    with pytest.raises(EvaluationError, match=r"from 1 to --samples \(2\); got 3"):
        Options(samples=2, ks=(3,))
    assert (
        Options().code_temperature,
        Options(samples=2).code_temperature,
        Options(samples=2, temperature=0.2).code_temperature,
    ) == (0.0, 0.8, 0.2)


def test_the_hash_changes_with_every_letter_of_every_prompt() -> None:
    one = [ChoiceItem(pairs=(("ab", "c"),), gold=0)]
    assert prompt_hash(one) != prompt_hash([ChoiceItem(pairs=(("a", "bc"),), gold=0)])
    assert prompt_hash(one) == prompt_hash([ChoiceItem(pairs=(("ab", "c"),), gold=1)])


def test_results_record_what_they_depend_on(tmp_path: Path) -> None:
    model = RuleModel(rule=yes)
    result = run(task(choices(9)), model, tmp_path, Options(limit=8))
    report.write(tmp_path, model, [result], "1.2.3")
    body = json.loads((tmp_path / "results.json").read_text())
    kept = body["tasks"]["toy"]
    assert (kept["version"], kept["shots"], kept["items"], kept["items_whole"]) == (3, 2, 8, 9)
    assert kept["prompt_hash"] == result.prompt_hash
    assert kept["figures"]["acc"]["value"] == 5 / 8
    assert body["model"] == {"model": "rule", "weights": "0", "name": "rule"}
    assert (body["program"]["version"], len(body["program"])) == ("1.2.3", 2)
    text = (tmp_path / "results.md").read_text()
    assert "| Toy | 2 | 8 of 9 | acc | 62.50 ± 18.30 % |" in text
    assert "made up" in text


def test_the_plot_has_bars_and_from_three_tasks_a_radar(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = RuleModel(rule=yes)
    results = [run(task(choices(9), name=f"toy{i}", title=f"Toy {i}"), model, tmp_path) for i in range(3)]
    report.picture(tmp_path / "three.svg", "rule", results)
    report.picture(tmp_path / "one.svg", "rule", results[:1])
    three, one = (tmp_path / "three.svg").read_text(), (tmp_path / "one.svg").read_text()
    assert len(three) > len(one) > 2000
    assert "Toy 2" in three or "Toy_2" in three or "<svg" in three
    text = run(task([TextItem(text="ab cd")], kind="rolling", main="word_perplexity", name="t"), model, tmp_path)
    with pytest.raises(EvaluationError, match="at least one task with an accuracy"):
        report.picture(tmp_path / "none.svg", "rule", [text])
