"""Conversations, judges and pairs: MT-Bench and SimpleQA over a recorded interface, and two runs compared by a judge."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from quadriga.cli import app
from quadriga.errors import EvaluationError
from quadriga.evaluate import flips, pairwise, report
from quadriga.evaluate.data import Data
from quadriga.evaluate.endpoints import connect
from quadriga.evaluate.harness import Options, TaskResult, run_task
from quadriga.evaluate.items import TalkItem
from quadriga.evaluate.pairwise import pair_scores, winner
from quadriga.evaluate.talks import converse, judged
from quadriga.evaluate.tasks import TASKS
from quadriga.evaluate.tasks.judged import filled, mt_bench_scores, rating, simpleqa_scores
from tests.evaluate.fakes import RuleModel, Unchecked, write

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write {a} line.", "Shorter."]},
    {"question_id": 111, "category": "math", "turns": ["1 + 1?", "And 2 + 2?"]},
]
REFERENCES = [{"question_id": 111, "choices": [{"index": 0, "turns": ["Two.", "Four."]}]}]
PROMPTS = [
    {"name": "single-v1", "system_prompt": "S1", "prompt_template": "Q {question} A {answer}"},
    {"name": "single-v1-multi-turn", "system_prompt": "S2", "prompt_template": "{question_2} {answer_1}|{answer_2}"},
    {"name": "single-math-v1", "system_prompt": "S3", "prompt_template": "Q {question} R {ref_answer_1} A {answer}"},
    {"name": "single-math-v1-multi-turn", "system_prompt": "S4", "prompt_template": "R {ref_answer_2} A {answer_2}"},
    {"name": "pair-v2", "system_prompt": "P", "prompt_template": "{question}: {answer_a} or {answer_b}"},
    {
        "name": "pair-v2-multi-turn",
        "system_prompt": "P",
        "prompt_template": "{question_2}: {answer_a_2} or {answer_b_2}",
    },
]


@pytest.fixture
def bench(tmp_path: Path) -> Data:
    write(tmp_path / "bench/mt_bench/question.jsonl", QUESTIONS)
    write(tmp_path / "bench/mt_bench/reference_answer/gpt-4.jsonl", REFERENCES)
    write(tmp_path / "bench/mt_bench/judge_prompts.jsonl", PROMPTS)
    write(
        tmp_path / "bench/simpleqa/simple_qa_test_set.csv", [{"metadata": "", "problem": "Capital?", "answer": "Oslo"}]
    )
    return Unchecked(tmp_path / "bench")


class Recorded:
    """An interface that answers from a record: what it was asked, as system and last user message, to what it said."""

    def __init__(self, record: dict[str, str]) -> None:
        self.record, self.bodies = record, list[dict[str, Any]]()

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        system = "".join(one["content"] + " / " for one in body["messages"] if one["role"] == "system")
        said = self.record[system + body["messages"][-1]["content"]]
        return httpx2.Response(200, json={"choices": [{"message": {"content": said}}]})

    def endpoint(self, name: str) -> Any:
        return connect("https://api.test/v1", model=name, chat=True, parallel=1, transport=httpx2.MockTransport(self))


ANSWERS = {"Write {a} line.": "One {line}.", "Shorter.": "One.", "1 + 1?": "2", "And 2 + 2?": "5"}
VERDICTS = {
    "S1 / Q Write {a} line. A One {line}.": "Good. Rating: [[8]]",
    "S2 / Shorter. One {line}.|One.": "Fine. [[7.5]]",
    "S3 / Q 1 + 1? R Two. A 2": "[[10]]",
    "S4 / R Four. A 5": "I cannot say.",
}


def run(task: str, model: Any, judge: Any, data: Data, out: Path) -> TaskResult:
    return run_task(TASKS[task], model, data, out, Options(seed=5), judge=judge)


def test_mt_bench_over_a_recorded_interface(bench: Data, tmp_path: Path) -> None:
    speaker, grader = Recorded(ANSWERS), Recorded(VERDICTS)
    result = run("mt_bench", speaker.endpoint("m"), grader.endpoint("j"), bench, tmp_path / "out")
    values = {name: figure.value for name, figure in result.figures.items()}
    assert values == {"score": 25.5 / 3, "first_turn": 9.0, "second_turn": 7.5, "unrated": 1 / 4}
    assert report.shown("score", result.main).startswith("8.50")
    second = next(body for body in speaker.bodies if body["messages"][-1]["content"] == "Shorter.")
    assert [one["role"] for one in second["messages"]] == ["user", "assistant", "user"]
    assert (second["temperature"], second["max_tokens"]) == (0.7, 1024)
    assert {body["temperature"] for body in grader.bodies} == {0.0}
    head, *rows = map(json.loads, (tmp_path / "out/items/mt_bench.jsonl").read_text().splitlines())
    assert head["question"]["judge"] == {"model": "j", "address": "https://api.test/v1", "api": "openai chat"}
    assert rows[0]["answers"] == ["One {line}.", "One."]
    # The record is enough: nobody is asked again, and the verdicts give the scores.
    again = run("mt_bench", Recorded({}).endpoint("m"), Recorded({}).endpoint("j"), bench, tmp_path / "out")
    assert again.figures == result.figures
    assert [mt_bench_scores(row["verdicts"]) for row in rows] == [row["scores"] for row in rows]
    with pytest.raises(EvaluationError, match="changed: judge"):
        run("mt_bench", Recorded({}).endpoint("m"), Recorded({}).endpoint("other"), bench, tmp_path / "out")
    with pytest.raises(EvaluationError, match=r"mt_bench is graded by a judge: give one with --judge"):
        run("mt_bench", Recorded({}).endpoint("m"), None, bench, tmp_path / "out")


def test_simpleqa(bench: Data, tmp_path: Path) -> None:
    judge = RuleModel(
        write=lambda text: "CORRECT" if "Reference answer: Oslo\nAnswer to grade: in Oslo" in text else "?"
    )
    result = run("simpleqa", RuleModel(write=lambda text: "in Oslo"), judge, bench, tmp_path)
    values = {name: figure.value for name, figure in result.figures.items()}
    assert values == {"correct": 1.0, "incorrect": 0.0, "not_attempted": 0.0, "ungraded": 0.0, "attempted_right": 1.0}


@pytest.mark.parametrize(
    ("verdict", "grade"),
    [
        ("INCORRECT", "incorrect"),
        ("**Correct**", "correct"),
        ("Not attempted.", "not_attempted"),
        ("NOT_ATTEMPTED", "not_attempted"),
        ("Hm", "ungraded"),
        ("This is not correct.", "incorrect"),
        ("CORRECT? No: INCORRECT", "ungraded"),
        ("Correct, it is CORRECT", "correct"),
    ],
)
def test_simpleqa_verdicts(verdict: str, grade: str) -> None:
    scores = simpleqa_scores(verdict)
    assert [name for name in ("correct", "incorrect", "not_attempted", "ungraded") if scores[name]] == [grade]
    assert scores["attempted_n"] == float(grade in ("correct", "incorrect"))


@pytest.mark.parametrize(
    ("verdict", "number"),
    [("Rating: [[7]]", 7.0), ("[3] then [[4.5]]", 4.5), ("[9]", 9.0), ("[[11]]", None), ("[[0]]", None), ("8", None)],
)
def test_ratings(verdict: str, number: float | None) -> None:
    assert rating(verdict) == number


def test_scores_of_nobody_are_not_a_number() -> None:
    from quadriga.evaluate.statistics import figures

    found = figures([mt_bench_scores(["", ""]), mt_bench_scores(["", ""])])
    assert math.isnan(found["score"].value) and found["unrated"].value == 1.0
    one = figures([mt_bench_scores(["", ""]), mt_bench_scores(["[[4]]", "[[6]]"])])["score"]
    assert (one.value, one.stderr) == (5.0, None)


def test_templates_leave_braces_of_the_values() -> None:
    assert filled("{a} {b}", a="{b}", b="{}") == "{b} {}"


def test_conversations_of_unequal_length_and_their_seeds() -> None:
    def item(*turns: str, temperature: float = 0.0) -> TalkItem:
        return TalkItem(
            turns=tuple(({"role": "user", "content": text},) for text in turns),
            grader=lambda answers, verdicts: {},
            temperature=temperature,
        )

    model = RuleModel(write=lambda text: f"<{text.count('user:')}>")
    items = [item("a", "b"), item("c"), item("d", "e", temperature=0.5)]
    assert converse(model, items, max_new_tokens=9, seed=3) == [["<1>", "<2>"], ["<1>"], ["<1>", "<2>"]]
    assert list(zip(model.temperatures, model.seeds, strict=True)) == [
        *((0.0, 3), (0.5, 3), (0.0, 1_000_006), (0.5, 1_000_006)),
    ]
    assert judged(None, items, [[], [], []]) == [[], [], []]


# Pairs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("[[B]]", "[[A]]", ("win", 1.0)),
        ("[[A]]", "[[B]]", ("loss", 1.0)),
        ("[[A]]", "[[A]]", ("tie", 0.0)),
        ("[[C]]", "[[C]]", ("tie", 1.0)),
        ("[[B]]", "[[C]]", ("tie", 0.0)),
        ("none", "none", ("tie", 0.0)),
    ],
)
def test_an_answer_wins_only_from_both_places(first: str, second: str, expected: tuple[str, float]) -> None:
    scores = pair_scores([first, second])
    assert ([name for name in ("win", "loss", "tie") if scores[name]], scores["consistent"]) == (
        [expected[0]],
        expected[1],
    )
    assert winner("[[C]] or [[A]]") == "C"


def runs(folder: Path, **answers: list[list[str]]) -> list[Path]:
    """Folders with recorded answers to three questions."""
    found = []
    for name, said in answers.items():
        (folder / name / "items").mkdir(parents=True)
        rows: list[dict[str, Any]] = [{"question": {"prompts": "h", "model": name, "version": 1, "data": {}}}]
        for i, one in enumerate(said):
            scores = {"score_count": float(len(one[0])), "score_n": 2.0}
            rows.append({"i": i, "scores": scores, "prompt": [f"q{i}", f"r{i}"][: len(one)], "answers": one})
        (folder / name / "items/mt_bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / name / "results.json").write_text(json.dumps({"tasks": {"mt_bench": {"main": "score"}}}))
        found.append(folder / name)
    return found


def test_pairs_are_judged_in_both_orders_once(bench: Data, tmp_path: Path) -> None:
    a, b = runs(tmp_path, a=[["x", "bad"], ["x", "same"], ["only"]], b=[["x", "good"], ["x", "same"], ["other"]])

    def verdict(text: str) -> str:
        shown = text.rpartition(": ")[2].split(" or ")
        return "[[A]]" if "good" in shown[0] or shown[0] == shown[1] else "[[B]]" if "good" in shown[1] else "[[C]]"

    judge = RuleModel(write=verdict)
    found = pairwise.compare(a, b, "mt_bench", judge, bench, tmp_path / "out")
    assert (found.n, found.wins, found.ties, found.losses, found.p) == (3, 1, 2, 0, 1.0)
    assert (found.share.value, found.consistent) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert judge.n_prompts == 6
    assert pairwise.compare(a, b, "mt_bench", judge, bench, tmp_path / "out") == found
    assert judge.n_prompts == 6, "read from the journal"
    with pytest.raises(EvaluationError, match="changed: judge"):
        pairwise.compare(a, b, "mt_bench", RuleModel(identity={"model": "x"}), bench, tmp_path / "out")
    path = b / "items/mt_bench.jsonl"
    path.write_text(path.read_text().replace('"h"', '"other"', 1))
    with pytest.raises(EvaluationError, match="were asked other questions"):
        pairwise.compare(a, b, "mt_bench", judge, bench, tmp_path / "again")
    with pytest.raises(
        EvaluationError, match=r"mt_bench.jsonl cannot be read: .* Run `quadriga eval --tasks mt_bench`"
    ):
        pairwise.compare(a, tmp_path / "none", "mt_bench", judge, bench, tmp_path / "again")


def test_only_questions_that_both_runs_answered_are_judged(bench: Data, tmp_path: Path) -> None:
    a, b = runs(tmp_path, a=[["x"], ["y"], ["z"]], b=[["u"], ["v"]])
    judge = RuleModel(write=lambda text: "[[C]]")
    assert pairwise.compare(a, b, "mt_bench", judge, bench, tmp_path / "out").n == 2
    assert pairwise.compare(b, a, "mt_bench", judge, bench, tmp_path / "back").n == 2
    assert judge.n_prompts == 8


def test_runs_with_points_are_compared_too(tmp_path: Path) -> None:
    a, b = runs(tmp_path, a=[["four", "x"]], b=[["sixsix", "x"]])
    (one,) = flips.compare(a, b)
    assert (one.score, one.a, one.b, one.b_better) == ("score_count", 2.0, 3.0, 1)


def test_judges_are_asked_for_where_they_are_needed() -> None:
    said = CliRunner().invoke(app, ["judge", "a", "b"])
    assert isinstance(said.exception, EvaluationError) and "give one with --judge" in str(said.exception)
    said = CliRunner().invoke(app, ["eval", "--tasks", "copa", "--judge", "x"])
    assert "no task among --tasks is graded by a judge" in str(said.exception)
    said = CliRunner().invoke(app, ["eval", "--tasks", "copa", "--judge-model", "x"])
    assert "Give --judge ADDRESS too" in str(said.exception)
