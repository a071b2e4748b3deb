"""IFEval: 541 prompts, each with one to three instructions that a program can check (``evaluate.instructions``).

strict    the answer as it is
loose     the best of eight variants, without first or last line and without asterisks
prompt    all instructions of a prompt are followed
inst      the share of all instructions that are followed
"""

from __future__ import annotations

from collections.abc import Callable

from quadriga.errors import EvaluationError
from quadriga.evaluate.data import Data, Row
from quadriga.evaluate.instructions import CHECKS, follows, loose_variants
from quadriga.evaluate.items import AnswerItem, Item, Scores
from quadriga.evaluate.tasks.base import Task


def ifeval_scores(row: Row, answer: str) -> Scores:
    """Grade an answer. The counts of instructions become shares over all prompts (``statistics.figures``)."""
    asked = list(zip(row["instruction_id_list"], row["kwargs"], strict=True))
    variants = loose_variants(answer)
    strict = [follows(name, arguments, answer) for name, arguments in asked]
    loose = [any(follows(name, arguments, text) for text in variants) for name, arguments in asked]
    return {
        "prompt_strict": float(all(strict)),
        "prompt_loose": float(all(loose)),
        "inst_strict_count": float(sum(strict)),
        "inst_loose_count": float(sum(loose)),
        "inst_n": float(len(asked)),
    }


def _ifeval(data: Data, shots: int) -> list[Item]:
    items = list[Item]()
    for number, row in enumerate(data.rows("ifeval/input_data.jsonl"), 1):
        unknown = [name for name in row["instruction_id_list"] if name not in CHECKS]
        if unknown or len(row["kwargs"]) != len(row["instruction_id_list"]):
            raise EvaluationError(
                f"ifeval/input_data.jsonl, row {number}: every instruction must be one of IFEval's with its arguments; "
                f"got {row['instruction_id_list']} with {len(row['kwargs'])} arguments"
            )
        items.append(AnswerItem(prompt=row["prompt"], grader=_grader(row)))
    return items


def _grader(row: Row) -> Callable[[str], Scores]:
    return lambda answer: ifeval_scores(row, answer)


TASKS = (
    Task(
        name="ifeval",
        version=1,
        title="IFEval",
        protocol="Zhou et al. 2023 as in EleutherAI's harness 0.4.13: the prompt as it is, 1,280 tokens, greedy; "
        "strict "
        "and loose, by prompt and by instruction. Sentences are split by our own rule, languages told by fastText's "
        "model.",
        kind="generate",
        shots=0,
        build=_ifeval,
        main="prompt_strict",
        fixed_shots=True,
        max_new_tokens=1280,
    ),
)
