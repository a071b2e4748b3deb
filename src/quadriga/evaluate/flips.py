"""Two runs of the same tasks, item by item: what flipped, and whether that may be chance.

Both runs answered the same questions, so their difference is tested on pairs: of the items that came out differently,
in how many each run was better, by the exact sign test (McNemar's, where scores are right or wrong). Its p is the
probability of a split at least as uneven if both runs were equally good.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

from quadriga.errors import EvaluationError
from quadriga.evaluate.journal import read_journal
from quadriga.evaluate.statistics import Figure, mean


@dataclass(frozen=True)
class Flip:
    """An item whose score differs; what each run logged of it, as in the journal."""

    index: int
    a: Mapping[str, Any]
    b: Mapping[str, Any]
    difference: float
    """B's score less A's."""


@dataclass(frozen=True)
class Paired:
    """Two runs of one task over the items that both answered."""

    task: str
    score: str
    """Which score is compared, larger being better."""
    n: int
    a: float
    b: float
    """Mean scores."""
    difference: Figure
    """Of the means, B less A, with the standard error of paired differences."""
    p: float
    flips: tuple[Flip, ...]
    same_prompts: bool
    """False: the runs had other prompts for the same questions, e.g. another number of shots."""

    @property
    def a_better(self) -> int:
        """Items on which A was better."""
        return sum(flip.difference < 0 for flip in self.flips)

    @property
    def b_better(self) -> int:
        """Items on which B was better."""
        return len(self.flips) - self.a_better


def sign_test(fewer: int, more: int) -> float:
    """Two-sided exact p of a split of ``fewer`` to ``more`` where both are equally likely; 1 for none."""
    n = fewer + more
    return min(1.0, 2 * sum(comb(n, k) for k in range(min(fewer, more) + 1)) / (1 << n))


def compare(a: Path, b: Path) -> list[Paired]:
    """Compare two folders that ``quadriga eval`` wrote, task by task.

    Raises:
        EvaluationError: a folder has no items; no task is in both; the two have another version or other data of a
            task, so that its items are not the same questions.
    """
    first, second = _journals(a), _journals(b)
    both = [name for name in first if name in second]
    if not both:
        raise EvaluationError(
            f"the runs have no task in common: {a} has {', '.join(first)}, {b} has {', '.join(second)}"
        )
    return [_paired(name, first[name], second[name]) for name in both]


@dataclass(frozen=True)
class _Run:
    question: Mapping[str, Any]
    rows: Mapping[int, Mapping[str, Any]]
    main: str


def _journals(folder: Path) -> dict[str, _Run]:
    try:
        tasks = json.loads((folder / "results.json").read_text())["tasks"]
        mains = {name: str(task["main"]) for name, task in tasks.items()}
        runs = {}
        for name, main in mains.items():
            question, rows = read_journal(folder / "items" / f"{name}.jsonl")
            runs[name] = _Run(question, rows, main)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{folder} is no folder of `quadriga eval` with results.json and items: {error}. Give the run's --out."
        ) from None
    return runs


def _paired(task: str, a: _Run, b: _Run) -> Paired:
    for name in ("version", "data"):
        if a.question.get(name) != b.question.get(name):
            raise EvaluationError(
                f"{task}: the runs have another {name}, so their items are not the same questions. Run both again."
            )
    shared = sorted(a.rows.keys() & b.rows.keys())
    if not shared:
        raise EvaluationError(f"{task}: the runs have no item in common")
    if a.rows[shared[0]]["scores"].keys() != b.rows[shared[0]]["scores"].keys():
        raise EvaluationError(f"{task}: the runs have other scores of their items. Run both again with one version.")
    score = _score_name(a.main, a.rows[shared[0]]["scores"])
    ours = [_score(a.rows[i]["scores"], score) for i in shared]
    theirs = [_score(b.rows[i]["scores"], score) for i in shared]
    differences = [y - x for x, y in zip(ours, theirs, strict=True)]
    flips = tuple(Flip(i, a.rows[i], b.rows[i], d) for i, d in zip(shared, differences, strict=True) if d)
    worse = sum(flip.difference < 0 for flip in flips)
    return Paired(
        task=task,
        score=score,
        n=len(shared),
        a=mean(ours).value,
        b=mean(theirs).value,
        difference=mean(differences),
        p=sign_test(worse, len(flips) - worse),
        flips=flips,
        same_prompts=a.question.get("prompts") == b.question.get("prompts"),
    )


def _score_name(main: str, scores: Mapping[str, float]) -> str:
    """The task's main figure where items have it; else what it is computed from."""
    own = main.removesuffix("_mean_of_groups")
    return next(name for name in (main, own, f"{own}_count", "passed", "logprob") if name in scores)


def _score(scores: Mapping[str, float], name: str) -> float:
    if name.endswith("_count"):
        return scores[name] / max(1.0, scores[f"{name.partition('_')[0]}_n"])
    return scores["passed"] / scores["n"] if name == "passed" else scores[name]


def summary(found: list[Paired]) -> list[tuple[str, ...]]:
    """A heading and a row for each task."""
    rows: list[tuple[str, ...]] = [("task", "score", "items", "A", "B", "B - A", "A better", "B better", "p")]
    for one in found:
        error = "" if one.difference.stderr is None else f" ± {one.difference.stderr:.4f}"
        difference = f"{one.difference.value:+.4f}{error}"
        better = (str(one.a_better), str(one.b_better))
        rows.append(
            (one.task, one.score, str(one.n), f"{one.a:.4f}", f"{one.b:.4f}", difference, *better, f"{one.p:.3g}")
        )
    return rows


def listed(found: list[Paired]) -> list[tuple[str, ...]]:
    """A heading and a row for each item that flipped: what each run chose or wrote, and the prompt's end."""
    rows: list[tuple[str, ...]] = [("task", "item", "better", "A", "B", "prompt's end")]
    for one in found:
        for flip in one.flips:
            prompt = flip.a.get("prompt", "")
            text = prompt if isinstance(prompt, str) else prompt[-1]
            better = "A" if flip.difference < 0 else "B"
            rows.append((one.task, str(flip.index), better, _said(flip.a), _said(flip.b), _short(text, at_end=True)))
    return rows


def as_json(one: Paired) -> dict[str, Any]:
    """Everything, as plain JSON values; each flip with both runs' rows of the journal."""
    return {
        "task": one.task,
        "score": one.score,
        "items": one.n,
        "a": one.a,
        "b": one.b,
        "difference": {"value": one.difference.value, "stderr": one.difference.stderr},
        "a_better": one.a_better,
        "b_better": one.b_better,
        "p": one.p,
        "same_prompts": one.same_prompts,
        "flips": [{"i": flip.index, "a": dict(flip.a), "b": dict(flip.b)} for flip in one.flips],
    }


def _said(row: Mapping[str, Any]) -> str:
    """What a run chose or wrote."""
    if row.get("answers"):
        return _short(row["answers"][0])
    if "continuations" in row and len(row["continuations"]) > 1:
        return _short(row["continuations"][row["choice"]])
    return " ".join(f"{name}={value:g}" for name, value in row["scores"].items())


def _short(text: str, *, at_end: bool = False) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else "…" + line[-59:] if at_end else line[:59] + "…"
