"""Records of claims: what was measured, when, on what, and what it says about the claim.

The newest of two is shown: OUT/NAME/result.json of a run here, and the record that comes with this package.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from quadriga import __version__, runtime
from quadriga.bench.claims.measures import Measured
from quadriga.bench.claims.registry import CLAIMS, Claim, Scale
from quadriga.bench.claims.steps import Tell, run_steps, write
from quadriga.errors import EvaluationError
from quadriga.evaluate.report import commit

FILE = "result.json"
Verdict = Literal["reproduced", "partly reproduced", "not reproduced"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """A measured claim; what a record's file holds."""

    claim: str
    value: float
    low: float | None
    high: float | None
    parts: dict[str, float]
    note: str
    scale: str
    machine: str
    load: str
    version: str
    commit: str
    date: str
    curves: dict[str, list[list[float]]] = field(default_factory=dict)


def verdict(claim: Claim, record: Record | None) -> Verdict:
    """reproduced: the value and its whole interval are within the bar; partly: the value is, and not its interval."""
    if record is None or not _within(claim, record.value):
        return "not reproduced"
    ends = (record.low, record.high)
    return "reproduced" if all(end is not None and _within(claim, end) for end in ends) else "partly reproduced"


def _within(claim: Claim, value: float) -> bool:
    above = claim.at_least is None or value >= claim.at_least
    return above and (claim.at_most is None or value <= claim.at_most)


def run(claim: Claim, scale: Scale, out: Path, recipes: Path, tell: Tell) -> Record:
    """Run a claim's steps, or the rest of them, and write its record.

    Raises:
        EvaluationError: a missing recipe, a folder of other settings, or a step whose files have no result.
        QuadrigaError: a command failed.
    """
    folder = out / claim.name
    load = f"{os.getloadavg()[0]:.1f} processes running at the start"
    run_steps(claim.steps(scale), folder, recipes, tell)
    measured = claim.measure(folder)
    found = record(claim, measured, scale=described(claim, scale), machine=machine(), load=load)
    write(folder / FILE, as_text(found))  # a kill leaves no half of a record
    return found


def described(claim: Claim, scale: Scale) -> str:
    """What of a scale matters for a claim, in words."""
    steps = claim.steps(scale)
    if any(step.recipe for step in steps):
        length = "" if scale.share == 1 else f", {scale.share:.3g} of the recipes' tokens"
        return f"{scale.seeds} seed{'s' if scale.seeds > 1 else ''}{length}, {scale.dtype}"
    return scale.model if any("{out}" in step.argv and "eval" in step.argv for step in steps) else ""


def record(
    claim: Claim,
    measured: Measured,
    *,
    scale: str,
    machine: str,
    load: str,
    of_commit: str | None = None,
    date: str | None = None,
) -> Record:
    """A record of what was measured; now and by this program, unless a commit and a date are given."""
    return Record(
        claim=claim.name,
        value=measured.value,
        low=measured.low,
        high=measured.high,
        parts=measured.parts,
        note=measured.note,
        scale=scale,
        machine=machine,
        load=load,
        version=__version__,
        commit=of_commit or commit(),
        date=date or datetime.datetime.now(datetime.UTC).date().isoformat(),
        curves={name: [list(point) for point in points] for name, points in measured.curves.items()},
    )


def machine() -> str:
    """The processor and how many of it this process has."""
    return f"{runtime.cpu_name()}, {runtime.cpu_count()} cores"


def as_text(one: Record) -> str:
    """A record's file: JSON, a line for each key."""
    lines = (f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in vars(one).items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def newest(claim: Claim, out: Path | None = None) -> Record | None:
    """The newest record of a claim; None where it was never run.

    Args:
        out: the folder of the claims' runs here; None: only the record that comes with this package.

    Raises:
        EvaluationError: a record is damaged.
    """
    found = [_read(path, text) for path, text in _files(claim, out)]
    return max(found, key=lambda one: one.date, default=None)


def _files(claim: Claim, out: Path | None) -> list[tuple[str, str]]:
    shipped = files("quadriga.bench.claims").joinpath("recorded", f"{claim.name}.json")
    places = [shipped] if out is None else [out / claim.name / FILE, shipped]
    return [(str(path), path.read_text()) for path in places if path.is_file()]


def _read(path: str, text: str) -> Record:
    try:
        values: dict[str, Any] = json.loads(text)
        return Record(**values)
    except (ValueError, TypeError) as error:
        raise EvaluationError(f"{path} is no record of a claim: {error}. Remove it, or run the claim again.") from None


def shown(claim: Claim, one: Record | None) -> str:
    """The value with its spread and unit."""
    if one is None:
        return "never run"
    if one.low is None or one.high is None:
        spread = " (one run: no interval)"
    else:
        spread = "" if one.low == one.high else f" ({one.low:.3g} to {one.high:.3g})"
    return f"{one.value:.4g}{spread} {claim.unit}".strip()


def rows(out: Path, claims: Sequence[Claim] = CLAIMS) -> list[tuple[str, ...]]:
    """The header, then one row a claim: name, what it says, published, here, verdict, date, command."""
    found: list[tuple[str, ...]] = [("claim", "says", "published", "here", "verdict", "date", "command")]
    for one in claims:
        last = newest(one, out)
        date = "" if last is None else last.date
        command = f"quadriga claims run {one.name}"
        found.append((one.name, one.says, one.published, shown(one, last), verdict(one, last), date, command))
    return found
