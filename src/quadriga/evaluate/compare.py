"""A published table beside results measured here, in separate columns.

A measured number is in the column ``measured: MODEL``, in the row of the published benchmark whose protocol is closest
to its task's. Shots, item counts and other differences between the two are listed in the notes below the table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga.errors import EvaluationError
from quadriga.evaluate.published import TABLES, Benchmark, Table
from quadriga.evaluate.report import POINTS, pyplot


@dataclass(frozen=True)
class Cell:
    """A measured value and its standard error, in percent; ``note`` says how it was measured."""

    value: float
    stderr: float | None
    note: str


@dataclass(frozen=True)
class MeasuredModel:
    """The contents of one results.json: the model's name and a cell per task."""

    name: str
    cells: dict[str, Cell]
    """By task name."""


@dataclass(frozen=True)
class Comparison:
    """A published table and the results to show beside it."""

    table: Table
    measured: tuple[MeasuredModel, ...]

    def cell(self, benchmark: Benchmark, one: MeasuredModel) -> Cell | None:
        """The measured value for a benchmark, from the first of ``benchmark.tasks`` that was run; None if none was."""
        return next((one.cells[task] for task in benchmark.tasks if task in one.cells), None)


def read(path: Path) -> MeasuredModel:
    """Read a results.json written by ``quadriga eval``; ``path`` is the file or its folder. Perplexities are left out.

    Raises:
        EvaluationError: the file cannot be read or has another format.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        body: Any = json.loads(file.read_text())
        cells = {}
        for name, task in body["tasks"].items():
            figure = task["figures"][task["main"]]
            part = "" if task["items"] == task["items_whole"] else f", {task['items']} of {task['items_whole']} items"
            part += ", a sample" if task.get("sample") else ""
            scale = 1 if task["main"] in POINTS else 100
            error = None if figure["stderr"] is None else scale * figure["stderr"]
            if "perplexity" not in task["main"]:
                note = f"{task['title']}, {task['shots']} shots, {task['main']}{part}"
                cells[name] = Cell(scale * figure["value"], error, note)
        core = body.get("gauntlet", {}).get("core_average")
        if core is not None:
            cells["gauntlet"] = Cell(100 * core, None, "core average of five categories")
        return MeasuredModel(str(body["model"]["name"]), cells)
    except OSError as error:
        raise EvaluationError(
            f"cannot read {file}: {error.strerror}. Run `quadriga eval --out {path}` first."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{file} must be a results.json written by `quadriga eval`; reading it failed with "
            f"{type(error).__name__}: {error}"
        ) from None


def compare(key: str, paths: Sequence[Path]) -> Comparison:
    """Put results beside a published table.

    Args:
        key: name of the table, a key of ``TABLES``.
        paths: results.json files or their folders.

    Raises:
        EvaluationError: unknown table, or a file that is not a results.json.
    """
    if key not in TABLES:
        raise EvaluationError(f"the table must be one of {', '.join(TABLES)}; got {key!r}")
    return Comparison(TABLES[key], tuple(read(path) for path in paths))


def rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """The header, then one row per benchmark; a cell is empty where nothing was published or measured."""
    table = comparison.table
    head = ("benchmark", *(f"published: {c}" for c in table.columns))
    found: list[tuple[str, ...]] = [(*head, *(f"measured: {m.name}" for m in comparison.measured))]
    for benchmark in table.benchmarks:
        cells = [_published(benchmark, column) for column in table.columns]
        for one in comparison.measured:
            cell = comparison.cell(benchmark, one)
            error = "" if cell is None or cell.stderr is None else f" ± {cell.stderr:.1f}"
            cells.append("" if cell is None else f"{cell.value:.1f}{error}")
        found.append((benchmark.name, *cells))
    return found


def _published(benchmark: Benchmark, column: str) -> str:
    value = benchmark.values.get(column)
    mark = "*" if column in benchmark.notes else ""
    return mark if value is None else f"{value:g}{mark}"


def notes(comparison: Comparison) -> list[str]:
    """The table's source, and each benchmark's protocol and exceptions; one string per line of text."""
    lines = [f"published: {comparison.table.source}"]
    for benchmark in comparison.table.benchmarks:
        lines.append(f"{benchmark.name}: {benchmark.protocol}")
        lines += [f"  * {column}: {note}" for column, note in benchmark.notes.items()]
        for one in comparison.measured:
            cell = comparison.cell(benchmark, one)
            if cell is not None:
                lines.append(f"  measured, {one.name}: {cell.note}")
    return lines


def as_markdown(comparison: Comparison) -> str:
    """The table and its notes in Markdown."""
    head, *body = rows(comparison)
    lines = [f"# {comparison.table.title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    lines += ["", *(f"- {line.strip()}" for line in notes(comparison))]
    return "\n".join(lines).replace("*", "\\*") + "\n"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The table, its notes and the measured values as plain JSON values."""
    return {
        "table": comparison.table.key,
        "source": comparison.table.source,
        "benchmarks": [
            {
                "name": benchmark.name,
                "protocol": benchmark.protocol,
                "published": dict(benchmark.values),
                "notes": dict(benchmark.notes),
                "measured": {
                    one.name: {"value": cell.value, "stderr": cell.stderr, "note": cell.note}
                    for one in comparison.measured
                    if (cell := comparison.cell(benchmark, one)) is not None
                },
            }
            for benchmark in comparison.table.benchmarks
        ],
    }


_COLOURS = (
    "#1b6ca8",
    "#8a8f98",
    "#b5b9c0",
    "#c98b6b",
    "#e0b79f",
    "#7a4fa3",
    "#5b8c5a",
    "#a6c3a5",
    "#c9b458",
    "#6d6d6d",
)


def picture(path: Path, comparison: Comparison) -> None:
    """Draw a bar chart: published values as solid bars, measured ones hatched.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    plt = pyplot()
    table = comparison.table
    shown = [b for b in table.benchmarks if "points" not in b.protocol]
    n = len(table.columns) + len(comparison.measured)
    figure, axis = plt.subplots(figsize=(max(8.0, 1.3 * len(shown)), 4), constrained_layout=True)
    width = 0.85 / n
    for i, column in enumerate(table.columns):
        known = [(place, b.values[column]) for place, b in enumerate(shown) if column in b.values]
        places = [place + (i - (n - 1) / 2) * width for place, _ in known]
        axis.bar(places, [v for _, v in known], width, label=f"published: {column}", color=_COLOURS[i % len(_COLOURS)])
    for j, one in enumerate(comparison.measured):
        cells = [(place, cell) for place, b in enumerate(shown) if (cell := comparison.cell(b, one)) is not None]
        places = [place + (len(table.columns) + j - (n - 1) / 2) * width for place, _ in cells]
        values, errors = [cell.value for _, cell in cells], [cell.stderr or 0.0 for _, cell in cells]
        style = {"color": "white", "edgecolor": "#b03a2e", "hatch": "////"[: 2 + j % 3], "ecolor": "#555"}
        axis.bar(places, values, width, yerr=errors, label=f"measured: {one.name}", **style)
    axis.set_xticks(range(len(shown)), [b.name for b in shown], fontsize=8, rotation=20, ha="right")
    axis.set_ylim(0, 100)
    axis.set_ylabel("%")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.22))
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
