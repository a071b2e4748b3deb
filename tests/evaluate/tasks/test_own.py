"""Tasks that a TOML file describes: the same questions in three kinds of files give the same items."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from quadriga.errors import EvaluationError
from quadriga.evaluate.data import Data, Row
from quadriga.evaluate.items import AnswerItem, ChoiceItem
from quadriga.evaluate.tasks import select
from quadriga.evaluate.tasks.gauntlet import own_task
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


@pytest.mark.parametrize(
    ("gold_is", "value"),
    [("index", "1"), ("number", "2"), ("letter", "b"), ("letter", "(B)"), ("text", "2"), ("text", " 2 ")],
)
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
        ("shots = 1", 'separator = ";;"', "separator must be one character"),
        ("shots = 1", 'separator = ";"', "row 1 must have the column 'question' for query"),
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


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("question;a;b;c;solution;subject\nx;1;2;3;A;s\n", r"""separated by ';'\? Then say so: separator = ";\""""),
        ("question,a,b,c,solution,solution\nx,1,2,3,A,B\n", "a name of its own; 'solution'"),
        ("question,a,b,c,solution,subject\nx,1,000,2,3,A,s\n", "row 1 must have 6 fields.*it has 7"),
        ('question,a,b,c,solution,subject\n"x,1,2,3,A,s\n', "unexpected end of data"),
        ("question,a,b,c,solution,subject\nx,1,,3,A,s\n", r"row 1: choices must be .* got \['1', '', '3'\]"),
    ],
)
def test_csv_files_that_would_be_read_wrongly(tmp_path: Path, text: str, says: str) -> None:
    path = written(tmp_path, "exam.csv")
    (tmp_path / "exam.csv").write_text(text)
    with pytest.raises(EvaluationError, match=says):
        described_task(path).items(Data(tmp_path))


def test_another_separator(tmp_path: Path) -> None:
    path = written(tmp_path, "exam.csv", 'separator = ";"\n' + EXAM)
    (tmp_path / "exam.csv").write_text('question;a;b;c;solution;subject\n"x;\ny";1,5;2;3;b;s\n')
    (item,) = described_task(path).items(Data(tmp_path), None, 0)
    assert isinstance(item, ChoiceItem) and item.gold == 1
    assert item.pairs == tuple(("Q: x;\ny", f"\nA: {n}") for n in ("1,5", "2", "3"))


ONE = {"query": "q", "choices": ["a", "b"], "gold": 1}
SCHEMA = {"context_options": ["he", "she"], "continuation": "ran", "gold": 0}
ASKED = {"context": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (ONE | {"choices": "ab"}, "row 1: choices must be a list of two or more texts.*got 'ab'"),
        (ONE | {"choices": {"text": ["a"], "label": ["A"]}}, "choices must be a list"),
        (ONE | {"choices": ["a", None]}, "choices must be a list"),
        (ONE | {"choices": ["a", " "]}, "none of them empty"),
        (ONE | {"choices": ["a"], "gold": 0}, "two or more"),
        (ONE | {"gold": True}, r"gold must be the index of a choice \(0 to 1\), got True"),
        (ONE | {"gold": 2}, "got 2. A TOML file can say"),
        (ONE | {"gold": "b"}, "got 'b'"),
        (ONE | {"query": ["q"]}, "query must be a text"),
        (ONE | {"query": "\ud800"}, "query must be a text"),
        (SCHEMA | {"gold": "0"}, "gold must be the index of a choice"),
        (SCHEMA | {"gold": -1}, "gold must be the index of a choice"),
        (SCHEMA | {"context_options": "ab"}, "context_options must be a list"),
        (ASKED | {"answer": ""}, "answer must be a text that is not empty"),
        (ASKED | {"aliases": "yes"}, "aliases must be a list of texts"),
        (ASKED | {"category": ["x"]}, "category must be a text"),
        ({"context": "q", "continuation": "\n"}, "continuation must be a text that is not empty"),
    ],
)
def test_rows_that_are_not_what_their_format_says_are_refused(tmp_path: Path, row: Row, says: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(EvaluationError, match=says):
        own_task(path).items(Data(tmp_path))


def test_fields_that_are_null_or_whole_numbers(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [ONE | {"choices": [10, 7], "category": None}, ASKED | {"answer": 12, "aliases": None}]
    for row in rows:
        path.write_text("\ufeff" + json.dumps(row) + "\n", encoding="utf-8")
        (item,) = own_task(path).items(Data(tmp_path))
        assert item.group == ""
        if isinstance(item, ChoiceItem):
            assert item.pairs == (("q", " 10"), ("q", " 7"))
        else:
            assert isinstance(item, AnswerItem) and item.grade(" 12 apples") == {"acc": 1.0}


def test_a_row_of_the_pool_is_checked_too(tmp_path: Path) -> None:
    path = written(tmp_path, "exam.csv")
    (tmp_path / "pool.jsonl").write_text(json.dumps(POOL[0] | {"b": ""}) + "\n")
    with pytest.raises(EvaluationError, match="row 1 of the pool: choices must be"):
        described_task(path).items(Data(tmp_path))


@pytest.mark.parametrize(("answer", "right", "wrong"), [("+", " +, I think", "-"), ("The", " the article", "article")])
def test_answers_of_which_normalising_leaves_nothing(tmp_path: Path, answer: str, right: str, wrong: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(ASKED | {"answer": answer}) + "\n")
    (item,) = own_task(path).items(Data(tmp_path))
    assert isinstance(item, AnswerItem)
    assert item.grade(right) == {"acc": 1.0} and item.grade(wrong) == {"acc": 0.0}


def test_a_changed_right_answer_is_another_file(tmp_path: Path) -> None:
    path, hashes = tmp_path / "mine.jsonl", []
    for gold in (0, 1):
        path.write_text(json.dumps(ONE | {"gold": gold}) + "\n")
        data = Data(tmp_path)
        own_task(path).items(data)
        hashes.append(data.used["mine.jsonl"])
    assert hashes[0] != hashes[1], "scores of the one are not those of the other"


def test_questions_that_are_all_the_same_cannot_be_their_own_shots(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(3 * (json.dumps(ONE) + "\n"))
    with pytest.raises(EvaluationError, match="only 0 of 3 differ from the one that is asked"):
        own_task(path).items(Data(tmp_path), None, 1)
