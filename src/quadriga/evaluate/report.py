"""The results of a run as a JSON file, a table and a plot.

The JSON records everything a figure depends on: the model and the hash of its weights; each task's version, protocol,
shots, and the hashes of its prompts and data; the version and commit of this program.
"""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quadriga import runtime
from quadriga.errors import EvaluationError
from quadriga.evaluate.harness import TaskResult
from quadriga.evaluate.model import LanguageModel
from quadriga.evaluate.statistics import Figure
from quadriga.evaluate.tasks.gauntlet import CATEGORIES, GauntletScore, gauntlet_score

_LOWER_IS_BETTER = "perplexity"
POINTS = ("score", "first_turn", "second_turn")
"""Figures from 1 to 10 (MT-Bench), not shares."""


def as_json(model: LanguageModel, results: Sequence[TaskResult], version: str) -> dict[str, Any]:
    """The content of results.json, as plain JSON values."""
    gauntlet = _gauntlet(results)
    return {
        "program": {"version": version, "commit": commit()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": dict(model.identity) | {"name": model.name},
        "tasks": {result.task.name: _task(result) for result in results},
        **({} if gauntlet is None else {"gauntlet": _gauntlet_json(gauntlet)}),
    }


def _task(result: TaskResult) -> dict[str, Any]:
    task = result.task
    return {
        "title": task.title,
        "version": task.version,
        "protocol": task.protocol,
        "shots": result.shots,
        "items": result.n_items,
        "items_whole": result.n_whole,
        "sample": result.sample,
        "main": task.main,
        "figures": {name: _figure(figure) for name, figure in result.figures.items()},
        "groups": {name: _figure(figure) for name, figure in result.groups.items()},
        "prompt_hash": result.prompt_hash,
        "data": result.data,
        "seconds": round(result.seconds, 2),
        "items_this_run": result.n_new,
    }


def _figure(figure: Figure) -> dict[str, float | None]:
    return {"value": figure.value, "stderr": figure.stderr}


def _gauntlet(results: Sequence[TaskResult]) -> GauntletScore | None:
    names = {
        result.task.name.removeprefix("gauntlet_"): result for result in results if "gauntlet_" in result.task.name
    }
    if not names:
        return None
    accuracies = {}
    for name, result in names.items():
        grouped = result.figures.get(f"{result.task.main}_mean_of_groups")
        accuracies[name] = (grouped or result.main).value
    return gauntlet_score(accuracies)


def _gauntlet_json(score: GauntletScore) -> dict[str, Any]:
    return {
        "tasks": score.tasks,
        "categories": score.categories,
        "core_average": score.core_average,
        "missing": {category: list(names) for category, names in score.missing.items()},
        "means_of_tasks_present": score.partial,
    }


def table(results: Sequence[TaskResult]) -> list[tuple[str, ...]]:
    """Rows (task, shots, items, figure, value ± standard error); each task's main figure comes first."""
    rows: list[tuple[str, ...]] = [("task", "shots", "items", "figure", "value")]
    for result in results:
        names = [result.task.main, *(n for n in result.figures if n != result.task.main)]
        whole = "" if result.n_items == result.n_whole else f" of {result.n_whole}"
        whole += " (sample)" if result.sample else ""
        for i, name in enumerate(names):
            head = (result.task.title, str(result.shots), f"{result.n_items}{whole}") if i == 0 else ("", "", "")
            rows.append((*head, name, shown(name, result.figures[name])))
    score = _gauntlet(results)
    if score is not None:
        for category in CATEGORIES:
            if category in score.categories:
                rows.append((f"Gauntlet: {category}", "", "", "score", f"{100 * score.categories[category]:.1f} %"))
            else:
                absent = ", ".join(score.missing[category])
                rows.append((f"Gauntlet: {category}", "", "", "score", f"none: {absent} not run"))
        core = "none: tasks are missing" if score.core_average is None else f"{100 * score.core_average:.1f} %"
        rows.append(("Gauntlet: core average", "", "", "score", core))
    return rows


def shown(name: str, figure: Figure) -> str:
    """Format a figure for display: accuracies in percent, perplexities, bits per byte and points as they are."""
    percent = _LOWER_IS_BETTER not in name and name not in ("bits_per_byte", *POINTS)
    scale, unit = (100.0, " %") if percent else (1.0, "")
    error = "" if figure.stderr is None else f" ± {scale * figure.stderr:.2f}"
    return f"{scale * figure.value:.2f}{error}{unit}"


def as_markdown(model: LanguageModel, results: Sequence[TaskResult], version: str) -> str:
    """The table in Markdown, with the model's identity and the protocols."""
    rows = table(results)
    lines = [f"# {model.name}", ""]
    lines += ["| " + " | ".join(row) + " |" for row in rows[:1]] + ["|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(row) + " |" for row in rows[1:]]
    lines += ["", *(f"- {key}: {value}" for key, value in sorted(model.identity.items()))]
    lines += [f"- program: quadriga {version}, commit {commit()}", "", "## Protocols", ""]
    lines += [
        f"- {r.task.title} (version {r.task.version}, prompts {r.prompt_hash}): {r.task.protocol}" for r in results
    ]
    return "\n".join(lines) + "\n"


def write(out: Path, model: LanguageModel, results: Sequence[TaskResult], version: str) -> None:
    """Write results.json and results.md into ``out``; ``version`` is this program's."""
    (out / "results.json").write_text(json.dumps(as_json(model, results, version), indent=1, ensure_ascii=False) + "\n")
    (out / "results.md").write_text(as_markdown(model, results, version))


def picture(path: Path, name: str, results: Sequence[TaskResult]) -> None:
    """Plot the accuracies as bars with standard errors, and as a radar chart if there are at least three tasks.

    Raises:
        EvaluationError: matplotlib is not installed, or no task has an accuracy.
    """
    plt = pyplot()
    shares = [r for r in results if _LOWER_IS_BETTER not in r.task.main and r.task.main not in POINTS]
    if not shares:
        raise EvaluationError("a plot needs at least one task with an accuracy; all of these are scored by perplexity")
    radar = len(shares) >= 3
    width = 11 if radar else 6.5
    figure = plt.figure(figsize=(width, max(2.2, 0.42 * len(shares) + 1.2)), constrained_layout=True)
    bars = figure.add_subplot(1, 2 if radar else 1, 1)
    values = [100 * r.main.value for r in shares]
    errors = [100 * (r.main.stderr or 0.0) for r in shares]
    places = range(len(shares))
    bars.barh(places, values, xerr=errors, color="#1b6ca8", ecolor="#555", height=0.7)
    for place, r in zip(places, shares, strict=True):
        if r.task.chance:
            bars.plot([100 * r.task.chance] * 2, [place - 0.4, place + 0.4], color="#d98e04", lw=2)
    bars.set_yticks(places, [f"{r.task.title} ({r.shots})" for r in shares], fontsize=8)
    bars.invert_yaxis()
    bars.set_xlim(0, 100)
    bars.set_xlabel("%; orange: guessing", fontsize=8)
    bars.set_title(name, fontsize=10)
    bars.spines[["top", "right"]].set_visible(False)
    if radar:
        _radar(figure.add_subplot(1, 2, 2, projection="polar"), [r.task.title for r in shares], {name: values})
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _radar(axis: Any, labels: Sequence[str], columns: dict[str, Sequence[float]]) -> None:
    from math import pi

    angles = [2 * pi * i / len(labels) for i in range(len(labels))]
    for name, values in columns.items():
        axis.plot([*angles, angles[0]], [*values, values[0]], label=name, color="#1b6ca8")
        axis.fill(angles, values, alpha=0.15, color="#1b6ca8")
    axis.set_xticks(angles, labels, fontsize=7)
    axis.set_ylim(0, 100)


def pyplot() -> Any:
    """Import matplotlib.pyplot with the backend that draws to files only.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise EvaluationError(f"plots need matplotlib: {runtime.install_hint('eval')}") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "quadriga"
    import matplotlib.pyplot as plt

    return plt


def commit() -> str:
    """The git commit of the running checkout, or "release" for an installed package."""
    git = ["git", "-C", str(Path(__file__).parent)]
    tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=False)
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    return head.stdout.strip() if tracked.returncode == 0 and head.returncode == 0 else "release"
