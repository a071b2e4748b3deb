"""Recipes and files as a careless user has them: each fault is one line, and no rule is ignored in silence."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quadriga.errors import ConfigError, CorpusError
from quadriga.train.corpus.executors import LocalExecutor
from quadriga.train.corpus.pipeline import prepare
from quadriga.train.corpus.readers import plan_chunks, read_chunk
from quadriga.train.corpus.recipe import Recipe, Source, TokenizerChoice, from_table
from tests.train.corpora import prose, recipe, write_rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"domains": {"a": {"languages": ["english"]}}},
            "languages must be codes such as en, zh or yue, got 'english'",
        ),
        ({"domains": {"a": {"min_language_score": float("nan")}}}, "min_language_score must be from 0 to 1, got nan"),
        ({"defaults": {"prose": {"max_symbols": float("nan")}}}, "defaults.prose.max_symbols must be a finite number"),
        ({"defaults": {"prose": {"mean_word_length": [9.0, 2.0]}}}, r"must be \(least, most\), got 9, 2"),
        ({"duplicates": {"min_similarity": float("nan")}}, "min_similarity must be above 0, at most 1, got nan"),
        ({"duplicates": {"min_similarity": 1.5}}, "min_similarity must be above 0, at most 1, got 1.5"),
        ({"decontaminate": {"ngram": 0}}, "decontaminate.ngram must be at least 1, got 0"),
        ({"decontaminate": {"margin_chars": -5}}, "decontaminate.margin_chars must be at least 0, got -5"),
        ({"decontaminate": {"max_pieces": 0}}, "decontaminate.max_pieces must be at least 1, got 0"),
        ({"tokenizer": {"train": 300, "train_bytes": 0}}, "tokenizer.train_bytes must be at least 1, got 0"),
        ({"max_chars": 0}, "max_chars must be at least 1, got 0"),
    ],
)
def test_limits_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    table = {"sources": [{"paths": ["x"]}], "tokenizer": {"train": 300}}
    from_table(table, Recipe, "r.toml")
    with pytest.raises(ConfigError, match=f"r.toml: .*{message}"):
        from_table(table | changes, Recipe, "r.toml")


def test_a_text_that_is_not_utf8_in_parquet_is_a_bad_row(tmp_path: Path) -> None:
    good = [f"text {i}" for i in range(7)]
    raw = [text.encode() for text in good[:3]] + [b"\xff\xfe"] + [text.encode() for text in good[3:]]
    ends = [0, *(sum(map(len, raw[: i + 1])) for i in range(len(raw)))]
    offsets = b"".join(end.to_bytes(4, "little") for end in ends)
    column = pa.StringArray.from_buffers(len(raw), pa.py_buffer(offsets), pa.py_buffer(b"".join(raw)))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    source = Source(paths=[str(tmp_path / "a.parquet")], domain="en", bad_rows="drop")
    (chunk,) = plan_chunks(Recipe(sources=[source], tokenizer=TokenizerChoice(train=300)), 1 << 20)
    dropped: dict[str, int] = {}
    assert [row.text for row in read_chunk(chunk, source, dropped)] == good
    assert dropped == {"bad row": 1}
    with pytest.raises(CorpusError, match=r"a.parquet, row 3 of row groups 0 to 0: text must be UTF-8"):
        list(read_chunk(chunk, Source(paths=source.paths, domain="en"), {}))


def test_a_text_of_another_type_is_named(tmp_path: Path) -> None:
    source = Source(paths=[str(write_rows(tmp_path / "a.jsonl", [{"text": 5}]))])
    (chunk,) = plan_chunks(Recipe(sources=[source], tokenizer=TokenizerChoice(train=300)), 1 << 20)
    with pytest.raises(CorpusError, match="in the string field 'text'; got a value of type int"):
        list(read_chunk(chunk, source, {}))


def test_nothing_left_and_rules_of_nobody_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    short = write_rows(tmp_path / "short.jsonl", [{"text": "too short", "domain": "en"}])
    with pytest.raises(CorpusError, match=r"nothing is left of the text: every document was dropped.*min_words': 1"):
        prepare(recipe(short), tmp_path / "none", LocalExecutor(1), chunk_bytes=4000)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": prose(i), "domain": "en"} for i in range(9)])
    rules = {"en": {"kind": "prose"}, "ne": {"kind": "any"}}
    with caplog.at_level(logging.WARNING):
        prepare(recipe(rows, domains=rules), tmp_path / "some", LocalExecutor(1), chunk_bytes=4000)
    assert "the recipe's rules for domain 'ne' are unused: the rows have en" in caplog.text
    assert json.loads((tmp_path / "some/manifest.json").read_text())["shards"]
