"""Readers: every row once, however the input is cut and compressed; errors name bad input."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from quadriga.errors import ConfigError, CorpusError
from quadriga.train.corpus.readers import plan_chunks, read_chunk
from quadriga.train.corpus.recipe import Recipe, Source, TokenizerChoice
from tests.train.corpora import write_rows

ROWS = [{"text": f"row {i} " + "é" * (i % 7) * i, "kind": "ab"[i % 2]} for i in range(40)]


def _read(paths: list[str], chunk_bytes: int = 1 << 20, **source: Any) -> list[tuple[str, str]]:
    recipe = Recipe(sources=[Source(paths=paths, **source)], tokenizer=TokenizerChoice(train=300))
    chunks = plan_chunks(recipe, chunk_bytes)
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    return [(row.text, row.domain) for chunk in chunks for row in read_chunk(chunk, recipe.sources[0], {})]


EXPECTED = [(row["text"], row["kind"]) for row in ROWS]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 50, 300, 1000, 10**6])
def test_a_line_file_cut_anywhere_has_every_row_once(tmp_path: Path, chunk_bytes: int) -> None:
    file = write_rows(tmp_path / "a.jsonl", ROWS)
    assert _read([str(file)], chunk_bytes, domain_field="kind") == EXPECTED


def test_all_file_formats_give_the_same_rows(tmp_path: Path) -> None:
    plain = write_rows(tmp_path / "a.jsonl", ROWS)
    raw = plain.read_bytes()
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(raw[:900]) + zstandard.compress(raw[900:]))  # two frames
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(raw))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet", row_group_size=11)
    for name, chunk_bytes in (("b.jsonl.zst", 9), ("c.jsonl.gz", 9), ("d.parquet", 1), ("d.parquet", 10**6)):
        assert _read([str(tmp_path / name)], chunk_bytes, domain_field="kind") == EXPECTED, name


def test_folders_globs_and_plain_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/two.txt").write_text("\ufeffsecond")
    (tmp_path / "one.md").write_text("first")
    (tmp_path / "not.bin").write_bytes(b"\xff")
    both = [("first", "one"), ("second", "two")]
    assert _read([str(tmp_path)]) == both
    assert _read([f"{tmp_path}/**/*.txt", f"{tmp_path}/one.md"]) == both[::-1]
    monkeypatch.setenv("QUADRIGA_DATA", str(tmp_path))
    assert _read(["data:sub"], domain="d") == [("second", "d")]
    with pytest.raises(CorpusError, match=r"must lead to files ending in \.jsonl"):
        _read([str(tmp_path / "not.bin")])


def test_held_out_sources_come_first(tmp_path: Path) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", ROWS), write_rows(tmp_path / "b.jsonl", ROWS)
    sources = [Source(paths=[str(a)]), Source(paths=[str(b)], split="held_out")]
    chunks = plan_chunks(Recipe(sources=sources, tokenizer=TokenizerChoice(train=300)), 10**6)
    assert [chunk.source for chunk in chunks] == [1, 0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "byte 31: a line must be one JSON object"),
        ("[1]", "string field 'text'; got list"),
        ('{"body": "x", "kind": "a"}', "string field 'text'; got body, kind"),
        ('{"text": 3, "kind": "a"}', "string field 'text'"),
        ('{"text": "x"}', "string field 'kind'; got None"),
        ('{"text": "x", "kind": "../up"}', "a domain must have 1 to 64 letters"),
    ],
)
def test_bad_rows_are_named_or_counted(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"text": "good", "kind": "aa"}\n'[:30].rstrip("\n") + "\n" + line + "\n\n" + '{"text":"end","kind":"b"}'
    )
    with pytest.raises(CorpusError, match=message):
        _read([str(file)], domain_field="kind")
    dropped: dict[str, int] = {}
    source = Source(paths=[str(file)], domain_field="kind", bad_rows="drop")
    recipe = Recipe(sources=[source], tokenizer=TokenizerChoice(train=300))
    rows = [row for chunk in plan_chunks(recipe, 10**6) for row in read_chunk(chunk, source, dropped)]
    assert [(row.text, row.number) for row in rows] == [("good", 0), ("end", 2)] and dropped == {"bad row": 1}


def test_damaged_files_are_named(tmp_path: Path) -> None:
    raw = zstandard.compress(b'{"text": "x"}\n' * 50_000)
    (tmp_path / "a.jsonl.zst").write_bytes(raw[:40] + b"\x00" * 9 + raw[49:])
    (tmp_path / "b.jsonl.zst").write_bytes(b"not zstd at all")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 5000)[:-30])
    for name in ("a.jsonl.zst", "b.jsonl.zst", "c.parquet", "d.txt", "e.jsonl.gz"):
        with pytest.raises(CorpusError, match=name):
            _read([str(tmp_path / name)], domain="d")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "f.parquet")
    with pytest.raises(CorpusError, match="must have the columns text; got body"):
        _read([str(tmp_path / "f.parquet")])


def test_impossible_sources_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one file"):
        Source(paths=[])
    with pytest.raises(ConfigError, match="not both"):
        Source(paths=["a"], domain="a", domain_field="b")
    with pytest.raises(ConfigError, match="a domain must have"):
        Source(paths=["a"], domain="../a")
