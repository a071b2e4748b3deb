"""Run benchmarks on a model.

    task ── items ──► batches ──► LanguageModel ──► item.grade ──► journal ──► figures

A batch is a run of neighbouring items, so items with a common prompt (a subject of MMLU, the choices of one question)
reach the model together, and it computes the common part once. Scores are written to the journal before the next batch
starts. Figures are computed from the journal only, so an interrupted run ends with the same figures as a complete one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from quadriga.errors import EvaluationError
from quadriga.evaluate.data import Data
from quadriga.evaluate.items import (
    AnswerItem,
    ChoiceItem,
    ClozeItem,
    CodeItem,
    Item,
    Scores,
    TalkItem,
    TextItem,
    TruthItem,
)
from quadriga.evaluate.journal import Journal
from quadriga.evaluate.model import LanguageModel
from quadriga.evaluate.statistics import Figure, figures, mean_of_groups
from quadriga.evaluate.talks import talk
from quadriga.evaluate.tasks.base import Task

Progress = Callable[[int, int, str], None]
"""Called with (items done, items in total, task name)."""

BATCH = {"likelihood": 64, "rolling": 4, "generate": 32, "code": 16, "talk": 16}
"""Items per batch by kind of task: enough to share prompts and fill passes, few enough to lose little in a crash."""


_Graded = tuple[Scores, dict[str, Any]]
"""An item's scores, and for the journal what led to them."""


class ProgramRunner(Protocol):
    """Runs programs; ``evaluate.sandbox.Sandbox`` is one."""

    def passes(
        self, programs: Sequence[str], *, wall_s: float | None = None, packages: Sequence[str] = ()
    ) -> list[bool]:
        """Run each program with ``packages`` for up to ``wall_s`` seconds; True for those that ran to their end."""
        ...


@dataclass(frozen=True, kw_only=True)
class Options:
    """How tasks are run, the same for all tasks of a run."""

    limit: int | None = None
    """Run only the first ``limit`` items of each task."""
    shots: int | None = None
    """Examples before each question; None: each task's own number."""
    samples: int = 1
    """Programs generated per coding question."""
    ks: tuple[int, ...] = (1,)
    """The values of k for which pass@k is reported."""
    temperature: float | None = None
    """For coding tasks. None: 0 for one sample, 0.8 for more (Chen et al. 2021)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise EvaluationError(f"--limit must be at least 1, got {self.limit}")
        if self.samples < 1 or any(not 1 <= k <= self.samples for k in self.ks):
            raise EvaluationError(
                f"--k must be from 1 to --samples ({self.samples}); got {', '.join(map(str, self.ks))}"
            )

    @property
    def code_temperature(self) -> float:
        """The temperature that coding tasks sample with."""
        return self.temperature if self.temperature is not None else (0.0 if self.samples == 1 else 0.8)


@dataclass(frozen=True)
class TaskResult:
    """The outcome of one task."""

    task: Task
    shots: int
    n_items: int
    n_whole: int
    """Items of the whole task; more than ``n_items`` if a limit was set."""
    figures: dict[str, Figure]
    groups: dict[str, Figure]
    """Group name -> the main figure over that group's items."""
    prompt_hash: str
    data: dict[str, str]
    sample: bool
    """True if a file was only a sample of this package: these are not all of the task's questions."""
    seconds: float
    """Duration of this run, which may have started with some items already in the journal."""
    n_new: int
    """Items answered in this run, not read from the journal."""

    @property
    def main(self) -> Figure:
        """The figure shown in tables."""
        return self.figures[self.task.main]


@dataclass
class _TaskRun:
    """A task being run: asks the model in batches and writes scores to the journal."""

    task: Task
    items: list[Item]
    journal: Journal
    options: Options
    model: LanguageModel
    runner: ProgramRunner | None
    judge: LanguageModel | None
    tell: Callable[[int], None] = field(default=lambda n: None)

    def run(self) -> int:
        """Answer every item that is not in the journal yet, and return how many there were."""
        waiting = [i for i in range(len(self.items)) if i not in self.journal.scores]
        self.tell(len(self.items) - len(waiting))
        size = BATCH[self.task.kind]
        for start in range(0, len(waiting), size):
            chosen = waiting[start : start + size]
            batch = [self.items[i] for i in chosen]
            graded = self._answer(batch, chosen[0])
            self.journal.add([(i, scores, log) for i, (scores, log) in zip(chosen, graded, strict=True)])
            self.tell(len(batch))
        return len(waiting)

    def _answer(self, batch: Sequence[Item], first: int) -> list[_Graded]:
        """For each item of a batch: its scores, and what led to them."""
        match self.task.kind:
            case "likelihood":
                return self._choose(batch)
            case "rolling":
                texts = [item for item in batch if isinstance(item, TextItem)]
                answers = self.model.rolling([item.text for item in texts])
                return [(item.grade(answer), {}) for item, answer in zip(texts, answers, strict=True)]
            case "generate":
                asked = [item for item in batch if isinstance(item, AnswerItem)]
                written = self._write([item.prompt for item in asked], 0.0, first)
                return [
                    (item.grade(text), {"prompt": item.prompt, "answers": [text]})
                    for item, text in zip(asked, written, strict=True)
                ]
            case "code":
                return self._code([item for item in batch if isinstance(item, CodeItem)], first)
            case "talk":
                talks = [item for item in batch if isinstance(item, TalkItem)]
                most = self.task.max_new_tokens
                return talk(self.model, self.judge, talks, max_new_tokens=most, seed=self.options.seed + first)

    def _choose(self, batch: Sequence[Item]) -> list[_Graded]:
        asked = [item for item in batch if isinstance(item, ChoiceItem | TruthItem | ClozeItem)]
        answers = self.model.loglikelihoods([pair for item in asked for pair in item.pairs])
        graded: list[_Graded] = []
        at = 0
        for item in asked:
            own = answers[at : at + len(item.pairs)]
            graded.append((item.grade(own), _log_of_choice(item, [answer.logprob for answer in own])))
            at += len(item.pairs)
        return graded

    def _write(self, prompts: Sequence[str], temperature: float, first: int) -> list[str]:
        seed = self.options.seed + first * self.options.samples
        task = self.task
        return self.model.generate(
            prompts, max_new_tokens=task.max_new_tokens, stop=task.stop, temperature=temperature, seed=seed
        )

    def _code(self, batch: Sequence[CodeItem], first: int) -> list[_Graded]:
        assert self.runner is not None, "checked before the first task"
        n = self.options.samples
        written = self._write([item.prompt for item in batch for _ in range(n)], self.options.code_temperature, first)
        programs = [item.program(written[j * n + k]) for j, item in enumerate(batch) for k in range(n)]
        passed = self.runner.passes(programs, wall_s=self.task.program_s, packages=self.task.packages)
        return [
            (
                {"passed": float(sum(passed[j * n : (j + 1) * n])), "n": float(n)},
                {"prompt": item.prompt, "answers": written[j * n : (j + 1) * n]},
            )
            for j, item in enumerate(batch)
        ]


def _log_of_choice(item: ChoiceItem | TruthItem | ClozeItem, logprobs: list[float]) -> dict[str, Any]:
    """What the model read, how likely each continuation was to it, which was likeliest, and which is right."""
    contexts = [context for context, _ in item.pairs]
    log: dict[str, Any] = {
        "prompt": contexts[0] if len(set(contexts)) == 1 else contexts,
        "continuations": [continuation for _, continuation in item.pairs],
        "logprobs": logprobs,
        "choice": logprobs.index(max(logprobs)),
    }
    if isinstance(item, ChoiceItem):
        log["gold"] = item.gold
    elif isinstance(item, TruthItem):
        log["gold"] = [i for i, true in enumerate(item.truths) if true]
    return log


def run_task(
    task: Task,
    model: LanguageModel,
    data: Data,
    out: Path,
    options: Options,
    *,
    runner: ProgramRunner | None = None,
    judge: LanguageModel | None = None,
    progress: Progress = lambda done, total, name: None,
) -> TaskResult:
    """Run one task, or the rest of it if ``out`` contains a journal of an earlier run.

    Args:
        out: folder for ``items/TASK.jsonl``.
        runner: runs generated programs; required by coding tasks.
        judge: grades answers; required by judged tasks.

    Raises:
        EvaluationError: missing data, a journal in ``out`` for different settings, a coding task without a runner, or
            a kind of request that this model does not support.
    """
    if task.kind == "code" and runner is None:
        raise EvaluationError(
            f"{task.name} runs programs that the model writes: it needs a runner (evaluate.sandbox.Sandbox), got None"
        )
    if task.judged and judge is None:
        raise EvaluationError(f"{task.name} is graded by a judge: give one with --judge (a model, or an API's address)")
    data.used, data.samples = {}, {}
    whole = task.items(data, model, options.shots)
    items = whole[: options.limit]
    shots = task.shots if options.shots is None else options.shots
    digest = prompt_hash(items)
    question: dict[str, Any] = {
        "task": task.name,
        "version": task.version,
        "shots": shots,
        "prompts": prompt_hash(whole),
        "data": data.used,
        "model": dict(model.identity),
    }
    if task.kind == "code":
        question |= {"samples": options.samples, "temperature": options.code_temperature, "seed": options.seed}
    if task.judged and judge is not None:
        question["judge"] = dict(judge.identity)
    journal = Journal(out / "items" / f"{task.name}.jsonl", question)
    done = 0

    def tell(n: int) -> None:
        nonlocal done
        done += n
        progress(done, len(items), task.name)

    started = time.perf_counter()
    n_new = _TaskRun(task, items, journal, options, model, runner, judge, tell).run()
    seconds = time.perf_counter() - started
    scores = [journal.scores[i] for i in range(len(items))]
    return TaskResult(
        task=task,
        shots=shots,
        n_items=len(items),
        n_whole=len(whole),
        figures=_figures(task, items, scores, options),
        groups=_groups(task, items, scores),
        prompt_hash=digest,
        data=dict(data.used),
        sample=bool(data.samples),
        seconds=seconds,
        n_new=n_new,
    )


def _figures(task: Task, items: Sequence[Item], scores: Sequence[Scores], options: Options) -> dict[str, Figure]:
    found = figures(scores, options.ks if task.kind == "code" else ())
    if task.by_group:
        by_group: dict[str, list[float]] = {}
        for item, one in zip(items, scores, strict=True):
            by_group.setdefault(item.group, []).append(one[task.main])
        found[f"{task.main}_mean_of_groups"] = mean_of_groups(by_group)
    return found


def _groups(task: Task, items: Sequence[Item], scores: Sequence[Scores]) -> dict[str, Figure]:
    by_group: dict[str, list[Scores]] = {}
    for item, one in zip(items, scores, strict=True):
        if item.group:
            by_group.setdefault(item.group, []).append(one)
    return {group: figures(some)[task.main] for group, some in by_group.items()}


def prompt_hash(items: Sequence[Item]) -> str:
    """A hash (16 hex digits) of all prompts and continuations, in order."""
    digest = hashlib.sha256()
    for item in items:
        match item:
            case ChoiceItem() | TruthItem() | ClozeItem():
                parts = [part for pair in item.pairs for part in pair]
            case TextItem():
                parts = [item.text]
            case AnswerItem() | CodeItem():
                parts = [item.prompt]
            case TalkItem():
                parts = [message["content"] for turn in item.turns for message in turn]
        for part in parts:
            raw = part.encode()
            digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:16]
