"""Two runs' recorded answers to the same questions, compared by a judge that sees each pair in both orders.

    question, A's answer, B's answer ─► verdict 1 ─┐
    question, B's answer, A's answer ─► verdict 2 ─┴─► the same winner twice wins; everything else is a tie

Judges prefer the first of two answers more often than they should (Zheng et al. 2023, section 3.3): an answer wins only
if it does from both places. The prompts are MT-Bench's for pairs, without its reference answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga.errors import EvaluationError
from quadriga.evaluate.data import Data, Row
from quadriga.evaluate.flips import sign_test
from quadriga.evaluate.items import Scores
from quadriga.evaluate.journal import Journal, read_journal
from quadriga.evaluate.model import LanguageModel, Message
from quadriga.evaluate.statistics import Figure, mean
from quadriga.evaluate.talks import VERDICT_TOKENS
from quadriga.evaluate.tasks.judged import filled

BATCH = 16


@dataclass(frozen=True)
class Pairs:
    """A finished comparison: how often B won, tied and lost against A.

    Attributes:
        share: B's wins and half of its ties, with its standard error.
        consistent: the share of pairs whose two verdicts named the same winner, or a tie twice.
        p: of the exact sign test over wins and losses.
    """

    n: int
    wins: int
    ties: int
    losses: int
    share: Figure
    consistent: float
    p: float


def winner(verdict: str) -> str:
    """A, B or C (a tie) in double square brackets, the first that is there; empty if there is none."""
    found = {name: verdict.find(f"[[{name}]]") for name in "ABC"}
    known = {name: place for name, place in found.items() if place >= 0}
    return min(known, key=lambda name: known[name], default="")


def pair_scores(verdicts: Sequence[str]) -> Scores:
    """Scores of B: the first verdict saw A first, the second B first."""
    first, second = winner(verdicts[0]), winner(verdicts[1])
    swapped = {"A": "B", "B": "A"}.get(second, second)
    won, lost = first == swapped == "B", first == swapped == "A"
    return {
        "win": float(won),
        "loss": float(lost),
        "tie": float(not won and not lost),
        "consistent": float(first == swapped != ""),
    }


def compare(
    a: Path,
    b: Path,
    task: str,
    judge: LanguageModel,
    data: Data,
    out: Path,
    *,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Pairs:
    """Compare two folders of ``quadriga eval`` on a task whose answers they hold, or go on with it.

    Args:
        out: folder for ``pairs/TASK.jsonl``.

    Raises:
        EvaluationError: a folder has no answers of the task, or the runs were asked other questions.
    """
    (asked, first), (also, second) = _answers(a, task), _answers(b, task)
    if asked.get("prompts") != also.get("prompts"):
        raise EvaluationError(f"{task}: the two runs were asked other questions. Run both with the same settings.")
    both = sorted(first.keys() & second.keys())
    prompts = {row["name"]: row for row in data.rows("mt_bench/judge_prompts.jsonl")}
    question = {"task": task, "a": asked, "b": also, "judge": dict(judge.identity), "data": data.used}
    journal = Journal(out / "pairs" / f"{task}.jsonl", question)
    waiting = [i for i in both if i not in journal.scores]
    done = len(both) - len(waiting)
    progress(done, len(both), task)
    for start in range(0, len(waiting), BATCH):
        chosen = waiting[start : start + BATCH]
        conversations = [one for i in chosen for one in _both_orders(first[i], second[i], prompts)]
        said = judge.converse(conversations, max_new_tokens=VERDICT_TOKENS)
        verdicts = [said[2 * n : 2 * n + 2] for n in range(len(chosen))]
        journal.add([(i, pair_scores(two), {"verdicts": two}) for i, two in zip(chosen, verdicts, strict=True)])
        done += len(chosen)
        progress(done, len(both), task)
    return _summed([journal.scores[i] for i in both])


def _answers(folder: Path, task: str) -> tuple[dict[str, Any], dict[int, Mapping[str, Any]]]:
    path = folder / "items" / f"{task}.jsonl"
    try:
        question, rows = read_journal(path)
        found: dict[int, Mapping[str, Any]] = {i: row for i, row in rows.items() if row.get("answers")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(f"{path} cannot be read: {error}. Run `quadriga eval --tasks {task}` first.") from None
    if not found:
        raise EvaluationError(f"{path} has no answers: {task} is not a task that generates")
    return question, found


def _both_orders(
    a: Mapping[str, Any], b: Mapping[str, Any], prompts: Mapping[str, Row]
) -> tuple[list[Message], list[Message]]:
    questions = a["prompt"] if isinstance(a["prompt"], list) else [a["prompt"]]
    return (
        _asked(questions, a["answers"], b["answers"], prompts),
        _asked(questions, b["answers"], a["answers"], prompts),
    )


def _asked(
    questions: Sequence[str], first: Sequence[str], second: Sequence[str], prompts: Mapping[str, Row]
) -> list[Message]:
    values = {"question": questions[-1], "answer_a": first[0], "answer_b": second[0]}
    kind = "pair-v2"
    if len(first) > 1:
        kind = "pair-v2-multi-turn"
        for i in (1, 2):
            values |= {f"question_{i}": questions[i - 1], f"answer_a_{i}": first[i - 1], f"answer_b_{i}": second[i - 1]}
    prompt = prompts[kind]
    return [
        {"role": "system", "content": prompt["system_prompt"]},
        {"role": "user", "content": filled(prompt["prompt_template"], **values)},
    ]


def _summed(scores: Sequence[Scores]) -> Pairs:
    wins, losses = (int(sum(one[name] for one in scores)) for name in ("win", "loss"))
    return Pairs(
        n=len(scores),
        wins=wins,
        ties=len(scores) - wins - losses,
        losses=losses,
        share=mean([one["win"] + one["tie"] / 2 for one in scores]),
        consistent=mean([one["consistent"] for one in scores]).value,
        p=sign_test(min(wins, losses), max(wins, losses)),
    )
