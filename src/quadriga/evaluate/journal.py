"""Per-item results on disk, so that a killed run resumes where it stopped.

    OUT/items/TASK.jsonl       line 1: the settings (task, version, shots, hash of all prompts, data, model)
                               then one line per item, e.g. {"i": 17, "scores": {...}, "prompt": "...",
                               "logprobs": [-3.2, -1.5], "choice": 1, "gold": 1} or {..., "answers": ["..."]}

Lines are appended and synced one batch at a time. A line cut off by a crash is dropped on opening. A file whose first
line has different settings is refused, so results of two settings are never mixed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quadriga.errors import EvaluationError
from quadriga.evaluate.items import Scores


def read_journal(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """The settings of a results file, and its rows by item index; of two rows of an item the later one.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: there is none, or it is no results file; say so in the
            caller's words.
    """
    return _parsed(_whole_lines(path.read_bytes()))


def _whole_lines(content: bytes) -> list[bytes]:
    """Without a last line that a crash cut off. Not text's splitlines: answers may hold U+2028 and its kin."""
    return content[: content.rfind(b"\n") + 1].splitlines()


def _parsed(lines: Sequence[bytes]) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    head, *rows = (json.loads(line) for line in lines)
    found: dict[int, dict[str, Any]] = {}
    for number, row in enumerate(rows, 2):
        if type(row["i"]) is not int or row["i"] < 0:
            raise ValueError(f"line {number}: i must be an item's index, got {row['i']!r}")
        found[row["i"]] = row | {"scores": {name: float(value) for name, value in row["scores"].items()}}
        if found[row["i"]]["scores"].keys() != rows[0]["scores"].keys() or not row["scores"]:
            raise ValueError(f"line {number}: its scores must be those of line 2, got {', '.join(row['scores'])}")
    return dict(head["question"]), found


class Journal:
    """The results file of one task; ``scores`` maps item index -> scores.

    Args:
        path: the file; created with its folder if missing.
        question: the settings that determine the results, as plain JSON values.

    Raises:
        EvaluationError: the file has results for different settings, or cannot be written.
    """

    def __init__(self, path: Path, question: Mapping[str, Any]) -> None:
        self.path, self.scores = path, dict[int, Scores]()
        self._question = json.loads(json.dumps(question))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise EvaluationError(
                f"cannot write results to {path.parent}: {error.strerror}. Choose another --out."
            ) from None

    def _open(self) -> None:
        whole = self.path.read_bytes() if self.path.exists() else b""
        lines = _whole_lines(whole)
        if not lines:
            self._write([{"question": self._question}], "wb")
            return
        with self.path.open("r+b") as file:
            file.truncate(whole.rfind(b"\n") + 1)
        try:
            asked, rows = _parsed(lines)
            self.scores = {i: row["scores"] for i, row in rows.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise EvaluationError(
                f"{self.path} is not a results file of `quadriga eval`: remove it, or choose another --out"
            ) from None
        if asked != self._question:
            changed = [key for key in self._question if asked.get(key) != self._question[key]] or ["its format"]
            raise EvaluationError(
                f"{self.path} has results for different settings (changed: {', '.join(changed)}). Choose another "
                "--out, or start over with --restart."
            )

    def add(self, rows: Sequence[tuple[int, Scores, Mapping[str, Any]]]) -> None:
        """Append the (index, scores, what led to them) of a batch and sync the file."""
        kept = []
        for i, scores, log in rows:
            self.scores[i] = scores
            kept.append({"i": i, "scores": scores} | dict(log))
        self._write(kept, "ab")

    def _write(self, rows: Sequence[Mapping[str, Any]], mode: str) -> None:
        with self.path.open(mode) as file:
            file.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
