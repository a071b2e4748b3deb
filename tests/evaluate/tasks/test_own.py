"""Tasks that a TOML file describes: the same questions in three kinds of files give the same items."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from quadriga.errors import EvaluationError
from quadriga.evaluate.data import Data
from quadriga.evaluate.items import AnswerItem, ChoiceItem
from quadriga.evaluate.tasks import select
from quadriga.evaluate.tasks.own import described_task

EXAM = """
questions = "{file}"
pool = "pool.jsonl"
shots = 1
figure = "acc"
gold_is = "letter"
[fields]
query = "question"
choices = ["a", "b", "c"]
gold = "solution"
category = "subject"
[layout]
question = "Q: "
answer = "\\nA: "
example = "\\n\\n"
"""
ROWS = [
    {"question": "1 + 1?", "a": "1", "b": "2", "c": "3", "solution": "b", "subject": "sums"},
    {"question": "2 * 3?", "a": "6", "b": "5", "c": "", "solution": "A", "subject": "products"},
]
POOL = [{"question": "0 + 1?", "a": "0", "b": "0", "c": "1", "solution": "C", "subject": "sums"}]


def written(folder: Path, file: str, text: str = EXAM, rows: list[dict[str, str]] = ROWS) -> Path:
    """The description's path, its questions beside it."""
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in POOL))
    path = folder / file
    if file.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8-sig") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif file.endswith(".parquet"):
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "exam.toml").write_text(text.replace("{file}", file))
    return folder / "exam.toml"


@pytest.mark.parametrize("file", ["exam.csv", "exam.jsonl", "exam.parquet"])
def test_items_by_hand(tmp_path: Path, file: str) -> None:
    (task,) = select([str(written(tmp_path, file))])
    data = Data(tmp_path)
    first, second = task.items(data)
    assert isinstance(first, ChoiceItem) and isinstance(second, ChoiceItem)
    before = "Q: 0 + 1?\nA: 1\n\n"
    assert first.pairs == tuple((f"{before}Q: 1 + 1?", f"\nA: {n}") for n in (1, 2, 3))
    assert (first.gold, second.gold, first.group, second.group) == (1, 0, "sums", "products")
    assert second.pairs == tuple((f"{before}Q: 2 * 3?", f"\nA: {n}") for n in (6, 5)), (
        "an empty last column is no choice"
    )
    assert (task.main, task.shots, task.kind, task.by_group) == ("acc", 1, "likelihood", True)
    assert data.used.keys() == {"exam.toml", "pool.jsonl", file}


@pytest.mark.parametrize(("gold_is", "value"), [("index", "1"), ("number", "2"), ("letter", "b"), ("text", "2")])
def test_the_right_choice_is_told_in_four_ways(tmp_path: Path, gold_is: str, value: str) -> None:
    rows = [ROWS[0] | {"solution": value}]
    path = written(tmp_path, "exam.csv", EXAM.replace('"letter"', f'"{gold_is}"').replace("pool", "# pool"), rows)
    (item,) = described_task(path).items(Data(tmp_path), None, 0)
    assert isinstance(item, ChoiceItem) and item.gold == 1


def test_answers_are_written_where_rows_have_some(tmp_path: Path) -> None:
    text = 'questions = "q.jsonl"\n[fields]\ncontext = "ask"\nanswer = "say"\n'
    rows = [{"ask": "Capital of France?", "say": "Paris"}, {"ask": "Of Italy?", "say": "Rome"}]
    task = described_task(written(tmp_path, "q.jsonl", text, rows))
    first, _ = task.items(Data(tmp_path), None, 1)
    assert isinstance(first, AnswerItem) and (task.kind, task.main, task.by_group) == ("generate", "acc", False)
    assert first.prompt == "Of Italy? Rome\nCapital of France?" and first.grade(" Paris.")["acc"] == 1


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"acc"', '"f1"', "figure must be one of acc, acc_norm"),
        ("shots = 1", "shots = -1", "shots must be a number from 0"),
        ("shots = 1", "shoots = 1", "a key must be one of questions.*'shoots'"),
        ('query = "question"', 'query = "ask"', "row 1 must have the column 'ask' for query; it has question, a"),
        ('query = "question"', 'ask = "question"', "fields must be columns of some of query"),
        ('"letter"', '"text"', "row 1: gold must be the text of one of 3 choices, got 'b'"),
        ('"letter"', '"index"', "row 1: gold must be the index of one of 3 choices"),
        ("{file}", "exam.xls", "must be in a .jsonl, .csv or .parquet file"),
        ("{file}", "none.csv", "cannot read"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = written(tmp_path, "exam.csv", EXAM.replace(old, new))
    with pytest.raises(EvaluationError, match=says):
        described_task(path)


def test_more_shots_than_the_pool_has_are_refused(tmp_path: Path) -> None:
    task = described_task(written(tmp_path, "exam.csv"))
    with pytest.raises(EvaluationError, match="only 1 to draw from"):
        task.items(Data(tmp_path), None, 2)
