"""Find benchmark files and check that they are the published ones.

    --data-dir, else QUADRIGA_DATA/bench, else what `quadriga data fetch` brought, else the samples of this package

Every file is checked against its hash before any row is used, so that two people's figures are about the same
questions. A figure over a sample says so.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quadriga import runtime
from quadriga.errors import EvaluationError
from quadriga.hub import data_sets
from quadriga.hub.data_sets import Sample

Row = dict[str, Any]
_SET = "bench/"
"""Benchmarks are the files of ``hub.data_sets`` with this beginning."""


def hashes() -> dict[str, str]:
    """File name -> sha256 of its published content."""
    return {path.removeprefix(_SET): sha256 for path, sha256 in data_sets.hashes().items() if path.startswith(_SET)}


class Data:
    """Reads and checks benchmark files.

    Args:
        folder: where the files are; default: the places listed in the module docstring. A folder that is given is not
            completed from samples: they would be part of a figure that looks whole.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.samples: dict[str, Sample] = {}
        """File -> the sample that was read in its place."""
        self.used: dict[str, str] = {}
        """File -> sha256 of everything read so far; goes into results.json."""

    def bytes(self, name: str) -> bytes:
        """Read a file and check its hash.

        Raises:
            EvaluationError: the file is not found, or is not the published one.
        """
        path, sample = self._find(name)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise EvaluationError(f"cannot read {path}: {error.strerror}") from None
        digest = hashlib.sha256(raw).hexdigest()
        expected = hashes().get(name) if sample is None else sample.sha256
        if expected is not None and digest != expected:
            raise EvaluationError(
                f"{path} is not the published file: its sha256 is {digest[:16]}..., it must be {expected[:16]}.... "
                "Download it again; to evaluate on your own questions, give the file's path as a task."
            )
        self.used[name if sample is None else f"{name} (sample)"] = digest
        return raw

    def _find(self, name: str) -> tuple[Path, Sample | None]:
        if self.folder is not None and (self.folder / name).is_file():
            return self.folder / name, None
        found = data_sets.find(f"{_SET}{name}")
        if found is not None and (self.folder is None or found.sample is None):
            if found.sample is not None:
                self.samples[name] = found.sample
            return found.path, found.sample
        where = "" if self.folder is None else f" in {self.folder}, nor fetched"
        raise EvaluationError(f"{name} is not here{where}. {data_sets.how_to_get(_SET + name)}")

    def path(self, name: str) -> Path:
        """Where a file lies, once it is checked.

        Raises:
            EvaluationError: as ``bytes``.
        """
        self.bytes(name)
        return self._find(name)[0].resolve()

    def rows(self, name: str) -> list[Row]:
        """Read the objects of a JSONL file, or the rows of a CSV or Parquet file."""
        if name.endswith(".parquet"):
            return parquet_rows(io.BytesIO(self.bytes(name)), name)
        text = self.bytes(name).decode("utf-8-sig")
        if name.endswith(".csv"):
            return [dict(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
        return list(_objects(text, name))

    def first_of(self, *names: str) -> str:
        """The first of several names that is here, for data that is published in several formats.

        Raises:
            EvaluationError: none is here; the message is about the first.
        """
        return next((name for name in names if self.has(name)), names[0])

    def has(self, name: str) -> bool:
        """True if a file is here, whole or as a sample."""
        try:
            self._find(name)
        except EvaluationError:
            return False
        return True

    def examples(self, name: str) -> list[Row]:
        """Read the objects of the list ``examples`` in a JSON file.

        Raises:
            EvaluationError: the file has another content.
        """
        try:
            rows: list[Row] = json.loads(self.bytes(name))["examples"]
        except (ValueError, KeyError, TypeError):
            raise EvaluationError(f"{name} must be a JSON object with a list named examples") from None
        return rows

    def text(self, name: str) -> str:
        """Read a UTF-8 text file."""
        return self.bytes(name).decode()


def parquet_rows(source: Path | io.BytesIO, name: str) -> list[Row]:
    """Read the rows of a Parquet file.

    Raises:
        EvaluationError: it is none, or pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise EvaluationError(f"reading Parquet needs pyarrow: {runtime.install_hint('train')}") from None
    try:
        rows: list[Row] = pq.read_table(source).to_pylist()
    except pa.ArrowInvalid as error:
        raise EvaluationError(f"{name} is no Parquet file: {error}") from None
    return rows


def read_rows(path: Path) -> list[Row]:
    """Read the objects of a user's own JSONL file; no hash is checked.

    Raises:
        EvaluationError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
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
