"""A run's metrics on disk: metrics.jsonl with one JSON object per line. Others keep them too: ``train.trackers``.

    {"step": 12, "loss": 7.31, "norm": 1.2, ...}          each step; "experts": [[...], ...] every routing_every steps
    {"step": 200, "held_out": {"en": {...}}, "samples": {...}}
    {"step": 321, "event": "..."}

A resumed run removes the lines of steps that it will run again, so each step occurs once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quadriga.train.held_out import HeldOut
from quadriga.train.step_report import StepReport

_logger = logging.getLogger(__name__)

FILE = "metrics.jsonl"


class MetricsFile:
    """Writes metrics.jsonl; a ``Listener``.

    Args:
        folder: the run's folder.
            step: the run's next step; lines of this and later steps are removed.
            peak_flops: peak FLOP/s of all ranks together, for the MFU; None: no MFU.
            learning_rate: the peak rate.
            routing_every: steps between lines with expert counts.
    """

    def __init__(
        self, folder: Path, step: int, *, peak_flops: float | None, learning_rate: float, routing_every: int
    ) -> None:
        self.path = folder / FILE
        self.peak_flops, self.learning_rate, self.routing_every = peak_flops, learning_rate, routing_every
        self._waiting = b""
        self._failing = False
        self._keep_before(step)
        self._file = self.path.open("ab", buffering=0)

    def _keep_before(self, step: int) -> None:
        kept = [line for line in read(self.path) if _number(line) < step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self.path)

    def on_step(self, report: StepReport) -> None:
        """Append a line with the step's metrics."""
        line: dict[str, Any] = {
            "step": report.step,
            "loss": round(report.loss, 6),
            "norm": round(report.norm, 6),
            "learning_rate": report.rate * self.learning_rate,
            "tokens": report.tokens_seen,
            "tokens_per_s": round(report.tokens / report.seconds, 1),
            "seconds": round(report.seconds, 4),
            "flops": report.flops,
        }
        if self.peak_flops:
            line["mfu"] = round(report.flops / report.seconds / self.peak_flops, 4)
        line |= {name: round(value, 6) for name, value in report.extra.items()}
        if report.expert_counts is not None:
            line["busiest_expert"] = round(busiest(report), 3)
            if report.step % self.routing_every == 0:
                line["experts"] = report.expert_counts.long().tolist()
        if report.verdict is not None:
            line["left_out"] = report.verdict
        self._write(line)

    def on_evaluation(self, step: int, found: Mapping[str, HeldOut], samples: dict[str, str]) -> None:
        """Append a line with held-out losses, or rewards, and samples."""
        held_out = {domain: one.values() for domain, one in found.items()}
        self._write({"step": step, "held_out": held_out, "samples": samples})

    def on_event(self, step: int, text: str) -> None:
        """Append a line with an event's text."""
        self._write({"step": step, "event": text})

    def on_rollback(self, step: int) -> None:
        """Remove the lines of ``step`` and later steps, which will run again."""
        self._file.close()
        events = [line for line in read(self.path) if "event" in line and _number(line) >= step]
        self._keep_before(step)
        self._file = self.path.open("ab", buffering=0)
        for line in events:
            self._write({**line, "step": step})

    def _write(self, line: dict[str, Any]) -> None:
        self._waiting += (json.dumps(line, ensure_ascii=False) + "\n").encode()
        self._write_waiting()

    def _write_waiting(self) -> None:
        """Write what could not be written so far too; a full disk does not end the run, whose saves say more of it."""
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._failing = False
        except OSError as error:
            if not self._failing:
                _logger.warning("%s cannot be written, is tried again at the next step: %s", self.path, error.strerror)
            self._failing = True

    def close(self) -> None:
        """Close the file."""
        self._write_waiting()
        if self._waiting:
            _logger.warning("%d lines are missing from %s", self._waiting.count(b"\n"), self.path)
        self._file.close()


def _number(line: dict[str, Any]) -> int:
    """The step a line belongs to; an evaluation at step n belongs to step n - 1, after which it ran."""
    return int(line["step"]) - ("held_out" in line)


def busiest(report: StepReport) -> float:
    """The load of the busiest expert of any layer, as a multiple of an even share."""
    assert report.expert_counts is not None, "a model with experts"
    counts = report.expert_counts
    return float((counts.amax(1) / counts.mean(1).clamp(min=1e-9)).max())


def read(path: Path) -> list[dict[str, Any]]:
    """Read all lines of a metrics file; a last line cut short by a kill is left out."""
    found = []
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            found.append(value)
    return found
