"""A user's own task: questions in JSONL, CSV or Parquet whose columns have any names, described by a TOML file.

    questions = "exam.csv"                     # beside this file; .jsonl, .csv or .parquet
    pool = "examples.jsonl"                    # where shots come from, with the same columns; else the questions
    shots = 5
    figure = "acc"                             # shown in tables; else acc_norm for choices, acc for the rest
    gold_is = "letter"                         # or index (from 0), number (from 1), text
    separator = ";"                            # of a CSV file's columns; else a comma

    [fields]                                   # a row format's field = the column, or the columns of a list
    query = "question"
    choices = ["a", "b", "c", "d"]
    gold = "solution"
    category = "subject"                       # each one's mean, and the mean of these, are reported

    [layout]                                   # around the parts of a prompt
    question = "Question: "
    answer = "\\nAnswer: "
    example = "\\n\\n"

A field that is not named is the column of its name, where there is one. Row formats: ``tasks/row_formats.py``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quadriga.errors import EvaluationError
from quadriga.evaluate.data import Data, Row, parquet_rows, read_rows
from quadriga.evaluate.items import Item
from quadriga.evaluate.tasks.base import Task
from quadriga.evaluate.tasks.gauntlet import Layout, items_of
from quadriga.evaluate.tasks.row_formats import row_format

FIELDS = (
    *("query", "choices", "gold", "context_options", "continuation", "context", "answer", "aliases"),
    *("chain_of_thought", "category"),
)
FIGURES = ("acc", "acc_norm", "acc_bytes", "acc_tokens")
GOLD_IS = ("index", "number", "letter", "text")


@dataclass(frozen=True, kw_only=True)
class Description:
    """What the TOML file says."""

    questions: Path
    pool: Path | None = None
    shots: int = 0
    figure: str | None = None
    gold_is: str = "index"
    separator: str = ","
    fields: Mapping[str, str | list[str]] = field(default_factory=dict)
    layout: Layout = field(default_factory=Layout)


def described_task(path: Path) -> Task:
    """The task that a TOML file describes; its files are read at once.

    Raises:
        EvaluationError: a file cannot be read, the description has an unknown key or value, or a row lacks a column.
    """
    described = _read(path)
    rows = [
        _row(raw, described, number)
        for number, raw in enumerate(_raw_rows(described.questions, described.separator), 1)
    ]
    pool: list[Row] | None = None
    if described.pool is not None:
        pool = [
            _row(raw, described, number) for number, raw in enumerate(_raw_rows(described.pool, described.separator), 1)
        ]
    if not rows:
        raise EvaluationError(f"{described.questions} must have at least one question, it has no rows")
    kind = row_format(rows[0])
    if described.figure not in (None, "acc") and kind not in ("choice", "schema"):
        raise EvaluationError(f"{path}: figure must be acc for {kind} rows, got {described.figure}")
    files = [path, described.questions, *([described.pool] if described.pool else [])]
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    def build(data: Data, shots: int) -> list[Item]:
        data.used.update(hashes)
        return items_of(rows, shots, described.layout, pool=pool)

    source = described.pool or described.questions
    return Task(
        name=path.name,
        version=1,
        title=path.stem,
        protocol=f"{described.questions.name} as {path.name} says, row format {kind}; shots from {source.name}.",
        kind="generate" if kind == "question" else "likelihood",
        shots=described.shots,
        build=build,
        main=described.figure or ("acc_norm" if kind == "choice" else "acc"),
        max_new_tokens=128,
        stop=("\n\n", "Question:"),
        by_group=any(row.get("category") for row in rows),
    )


def _read(path: Path) -> Description:
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"cannot read {path}: {error}") from None
    known = Description.__dataclass_fields__
    checks: list[tuple[str, bool, str]] = [
        ("questions", isinstance(given.get("questions"), str), "the file's name"),
        ("pool", isinstance(given.get("pool", ""), str), "a file's name"),
        ("shots", type(given.get("shots", 0)) is int and given.get("shots", 0) >= 0, "a number from 0"),
        ("figure", given.get("figure", "acc") in FIGURES, f"one of {', '.join(FIGURES)}"),
        ("gold_is", given.get("gold_is", "index") in GOLD_IS, f"one of {', '.join(GOLD_IS)}"),
        ("separator", _is_separator(given.get("separator", ",")), "one character"),
        ("fields", _is_fields(given.get("fields", {})), f"columns of some of {', '.join(FIELDS)}"),
        ("layout", _is_layout(given.get("layout", {})), "texts of some of question, answer, example"),
    ]
    checks += [(key, False, f"one of {', '.join(known)}") for key in given if key not in known]
    for key, good, wanted in checks:
        if not good:
            got = f"the key {key!r}" if key not in known else f"{given.get(key)!r:.80}"
            raise EvaluationError(f"{path}: {key if key in known else 'a key'} must be {wanted}; got {got}")
    for key in ("questions", "pool"):
        if key in given:
            given[key] = path.parent / given[key]
    return Description(**(given | {"layout": Layout(**given.get("layout", {}))}))


def _is_separator(given: Any) -> bool:
    return isinstance(given, str) and len(given) == 1 and given not in '"\r\n'


def _is_fields(given: Any) -> bool:
    if not isinstance(given, dict) or not given.keys() <= set(FIELDS):
        return False
    columns = [column for one in given.values() for column in (one if isinstance(one, list) else [one])]
    return all(isinstance(column, str) for column in columns)


def _is_layout(given: Any) -> bool:
    named = isinstance(given, dict) and given.keys() <= {"question", "answer", "example"}
    return named and all(isinstance(text, str) for text in given.values())


def _raw_rows(path: Path, separator: str) -> list[Row]:
    """The rows of a JSONL, CSV or Parquet file, by column."""
    if path.suffix == ".jsonl":
        return read_rows(path)
    try:
        if path.suffix == ".csv":
            return _csv_rows(path, separator)
        if path.suffix == ".parquet":
            return parquet_rows(path, str(path))
    except (OSError, ValueError, csv.Error) as error:
        raise EvaluationError(f"cannot read {path}: {error}") from None
    raise EvaluationError(f"questions must be in a .jsonl, .csv or .parquet file, got {path.name}")


def _csv_rows(path: Path, separator: str) -> list[Row]:
    """The rows of a CSV file whose first line names the columns.

    Raises:
        EvaluationError: two columns have one name, or a row has more fields than there are columns.
        csv.Error: a quotation mark is not closed.
    """
    text = path.read_text(encoding="utf-8-sig")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows, columns = [dict(row) for row in reader], list(reader.fieldnames or ())
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise EvaluationError(
            f"{path}: every column must have a name of its own; {', '.join(map(repr, twice))} are twice"
        )
    for number, row in enumerate(rows, 1):
        if None in row:
            raise EvaluationError(
                f"{path}, row {number} must have {len(columns)} fields, one for each column; it has "
                f"{len(columns) + len(row[None])}. A field with {separator!r} in it needs quotation marks."
            )
    return rows


def _row(raw: Row, described: Description, number: int) -> Row:
    """A row with the row format's names."""
    row: Row = {}
    for name in FIELDS:
        columns = described.fields.get(name)
        for column in [columns] if isinstance(columns, str) else columns or []:
            if column not in raw:
                raise EvaluationError(
                    f"row {number} must have the column {column!r} for {name}; it has {', '.join(raw)}{_other(raw)}"
                )
        if isinstance(columns, list):
            row[name] = _without_empty_end([raw[column] for column in columns])
        elif columns is not None or name in raw:
            row[name] = raw[columns or name]
    if "gold" in row:
        row["gold"] = _gold(row, described.gold_is, number)
    return {name: value for name, value in row.items() if value is not None}


def _other(raw: Row) -> str:
    """A hint for a CSV file that is read with the wrong separator."""
    found = [sign for sign in ";\t|" if len(raw) == 1 and sign in next(iter(raw))]
    return (
        f". Are its columns separated by {found[0]!r}? Then say so: separator = {json.dumps(found[0])}" if found else ""
    )


def _without_empty_end(values: Sequence[Any]) -> list[Any]:
    """Rows with fewer choices than columns leave the last ones empty."""
    kept = list(values)
    while kept and kept[-1] in (None, ""):
        kept.pop()
    return kept


def _gold(row: Row, gold_is: str, number: int) -> Any:
    """The index of the right choice; columns of numbers with gaps come as floats, which may be whole."""
    choices, given = row.get("choices") or row.get("context_options"), row["gold"]
    if not isinstance(choices, list | tuple):
        return given  # the check of the row format says what is wrong with the choices
    if isinstance(given, float) and given.is_integer():
        given = int(given)
    index = -1
    if gold_is == "text":
        texts = [str(one).strip() for one in choices]
        index = texts.index(str(given).strip()) if texts.count(str(given).strip()) == 1 else -1
    elif gold_is == "letter" and isinstance(given, str) and len(letter := given.strip(" ().").upper()) == 1:
        index = ord(letter) - ord("A")
    elif gold_is in ("index", "number") and str(given).strip().isdecimal():
        index = int(given) - (gold_is == "number")
    if not 0 <= index < len(choices):
        n = len(choices)
        raise EvaluationError(f"row {number}: gold must be the {gold_is} of one of {n} choices, got {given!r:.80}")
    return index
