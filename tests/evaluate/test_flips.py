"""Two runs item by item: what flipped, by hand; the paired test against its definition."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from quadriga.errors import EvaluationError
from quadriga.evaluate import flips, report
from quadriga.evaluate.data import Data
from quadriga.evaluate.harness import Options, run_task
from quadriga.evaluate.items import AnswerItem, ChoiceItem, Item, TextItem, TruthItem
from quadriga.evaluate.tasks.base import Task
from tests.evaluate.fakes import RuleModel, Said
from tests.evaluate.test_harness import choices, task, yes


def ran(out: Path, model: RuleModel, one: Task, limit: int | None = None) -> Path:
    """A finished run in ``out``."""
    report.write(out, model, [run_task(one, model, Data(out), out, Options(limit=limit))], "0")
    return out


def no_to(*wanted: int) -> Callable[[str, str], Said]:
    """Says yes, but no to these questions."""
    return lambda context, continuation: Said(-1.0 if (continuation == " no") == (int(context[1:]) in wanted) else -2.5)


def test_flips_and_means_by_hand(tmp_path: Path) -> None:
    a = ran(tmp_path / "a", RuleModel(rule=yes), task(choices(12)))  # wrong in 0, 3, 6, 9
    b = ran(tmp_path / "b", RuleModel(rule=no_to(0, 3, 6, 1)), task(choices(12)))  # wrong in 9 and 1
    (found,) = flips.compare(a, b)
    assert [(flip.index, flip.difference) for flip in found.flips] == [(0, 1.0), (1, -1.0), (3, 1.0), (6, 1.0)]
    assert (found.n, found.a, found.b, found.a_better, found.b_better) == (12, 8 / 12, 10 / 12, 1, 3)
    assert found.difference.value == pytest.approx(2 / 12)
    variance = (3 * (1 - 1 / 6) ** 2 + (-1 - 1 / 6) ** 2 + 8 * (1 / 6) ** 2) / 11
    assert found.difference.stderr == pytest.approx((variance / 12) ** 0.5)
    assert found.p == 2 * 5 / 16 and found.same_prompts
    first = found.flips[0]
    assert first.b["choice"] == first.b["gold"] == 1 and first.a["choice"] == 0
    assert (first.a["prompt"], first.a["continuations"], first.a["logprobs"]) == ("q0", [" yes", " no"], [-1.0, -2.0])
    assert flips.listed([found])[2] == ("toy", "1", "A", "yes", "no", "q1")
    assert flips.summary([found])[1][:3] == ("toy", "acc", "12")
    assert json.loads(json.dumps(flips.as_json(found)))["flips"][0]["b"]["logprobs"] == [-2.5, -1.0]


@pytest.mark.parametrize(("fewer", "more"), [(0, 0), (0, 5), (1, 3), (2, 2), (3, 1), (4, 6)])
def test_the_sign_test_counts_all_splits_at_least_as_uneven(fewer: int, more: int) -> None:
    n = fewer + more
    uneven = [sum(signs) for signs in product((0, 1), repeat=n) if abs(2 * sum(signs) - n) >= abs(more - fewer)]
    assert flips.sign_test(fewer, more) == pytest.approx(len(uneven) / 2**n)


def test_items_of_both_runs_only_are_compared(tmp_path: Path) -> None:
    a = ran(tmp_path / "a", RuleModel(rule=yes), task(choices(12)), limit=5)
    b = ran(tmp_path / "b", RuleModel(rule=no_to(0, 9)), task(choices(12)))
    (found,) = flips.compare(a, b)
    assert found.n == 5 and [flip.index for flip in found.flips] == [0]


def test_written_answers_and_texts_are_compared_too(tmp_path: Path) -> None:
    items: list[Item] = [
        AnswerItem(prompt=f"write {i}", grader=lambda text: {"acc": float(text == "right")}) for i in range(2)
    ]
    one = task(items, "generate")
    a = ran(tmp_path / "a", RuleModel(write=lambda prompt: "right"), one)
    b = ran(tmp_path / "b", RuleModel(write=lambda prompt: "wrong" if "1" in prompt else "right"), one)
    (found,) = flips.compare(a, b)
    assert flips.listed([found])[1:] == [("toy", "1", "A", "right", "wrong", "write 1")]
    texts: list[Item] = [TextItem(text="some words"), TextItem(text="more of them")]
    one = task(texts, "rolling", "word_perplexity")
    (found,) = flips.compare(ran(tmp_path / "c", RuleModel(), one), ran(tmp_path / "d", RuleModel(), one))
    assert (found.score, found.p, found.flips, found.difference.value) == ("logprob", 1.0, (), 0.0)


def test_several_truths_are_logged(tmp_path: Path) -> None:
    items: list[Item] = [TruthItem(context="q", continuations=(" a", " bb", " c"), truths=(True, False, True))]
    out = ran(tmp_path / "a", RuleModel(), task(items, main="mc2"))
    row = json.loads((out / "items/toy.jsonl").read_text().splitlines()[1])
    assert (row["gold"], row["logprobs"], row["choice"]) == ([0, 2], [-2.0, -3.0, -2.0], 0)


def test_runs_that_cannot_be_paired_are_refused(tmp_path: Path) -> None:
    a = ran(tmp_path / "a", RuleModel(rule=yes), task(choices(4)))
    newer = ran(tmp_path / "b", RuleModel(rule=yes), task(choices(4), version=4))
    with pytest.raises(EvaluationError, match="another version"):
        flips.compare(a, newer)
    other = ran(tmp_path / "c", RuleModel(rule=yes), task(choices(4), name="other"))
    with pytest.raises(EvaluationError, match="no task in common"):
        flips.compare(a, other)
    with pytest.raises(EvaluationError, match="no folder of `quadriga eval`"):
        flips.compare(a, tmp_path / "nowhere")
    asked: list[Item] = [
        replace(item, pairs=tuple((f"{q} indeed", said) for q, said in item.pairs))
        for item in choices(4)
        if isinstance(item, ChoiceItem)
    ]
    assert not flips.compare(a, ran(tmp_path / "d", RuleModel(rule=yes), task(asked)))[0].same_prompts
    of_other_data = ran(tmp_path / "e", RuleModel(rule=yes), task(choices(4)))
    log = of_other_data / "items" / "toy.jsonl"
    head, rest = log.read_text().split("\n", 1)
    said = json.loads(head)
    said["question"]["data"] = {"toy/test.jsonl": "another hash"}
    log.write_text(json.dumps(said) + "\n" + rest)
    with pytest.raises(EvaluationError, match="another data"):
        flips.compare(a, of_other_data)


@pytest.mark.parametrize(
    "line",
    [
        '{"i": 1}',
        '{"i": 1, "scores": null}',
        '{"i": 1, "scores": {}}',
        '{"i": 1, "scores": {"other": 1}}',
        '{"i": 1, "scores": {"acc": "x"}}',
        '{"i": 0.5, "scores": {"acc": 1}}',
        "[1]",
        "\0\0",
        "",
    ],
)
def test_damaged_logs_are_refused_by_name(tmp_path: Path, line: str) -> None:
    a, b = ran(tmp_path / "a", RuleModel(rule=yes), task(choices(3))), tmp_path / "b"
    ran(b, RuleModel(rule=yes), task(choices(3)))
    path = b / "items" / "toy.jsonl"
    head, first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([head, first, line, *rest]) + "\n")
    with pytest.raises(EvaluationError, match=r"no folder of `quadriga eval` with results.json and items"):
        flips.compare(a, b)
    with pytest.raises(EvaluationError, match="not a results file"):
        ran(b, RuleModel(rule=yes), task(choices(3)))


def test_a_last_line_that_a_crash_cut_off_does_not_count(tmp_path: Path) -> None:
    a, b = ran(tmp_path / "a", RuleModel(rule=yes), task(choices(3))), tmp_path / "b"
    path = ran(b, RuleModel(rule=yes), task(choices(3))) / "items" / "toy.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    (found,) = flips.compare(a, b)
    assert found.n == 2
