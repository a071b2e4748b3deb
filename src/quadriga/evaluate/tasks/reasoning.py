"""BIG-Bench Hard (Suzgun et al. 2022): 27 tasks, with the authors' own three worked examples each.

A file of examples begins with a line for those who gather corpora, then a dashed line; what follows is the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from quadriga.errors import EvaluationError
from quadriga.evaluate.data import Data
from quadriga.evaluate.items import AnswerItem, Item, Scores
from quadriga.evaluate.tasks.base import Task

NAMES = (
    *("boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages"),
    *("formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects"),
    *("logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation"),
    *("multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table"),
    *("reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks"),
    *("sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects"),
    *(
        "tracking_shuffled_objects_seven_objects",
        "tracking_shuffled_objects_three_objects",
        "web_of_lies",
        "word_sorting",
    ),
)
_ANSWER = re.compile(r"(?<=the answer is )(.*)(?=.)")
_STEP = "A: Let's think step by step.\n"


def worked_examples(text: str, shots: int, name: str) -> str:
    """The description and the first examples of a published prompt, with a blank line after each.

    Raises:
        EvaluationError: not that format, or fewer examples.
    """
    body = text.partition("-----\n")[2].strip()
    description, *examples = re.split(r"\n\n(?=Q: )", body)
    if not body or len(examples) < shots:
        raise EvaluationError(
            f"bbh/cot-prompts/{name}.txt must have {shots} examples after a line -----, got {len(examples)}"
        )
    return "".join(f"{part}\n\n" for part in (description, *examples[:shots]))


def bbh_scores(target: str, answer: str) -> Scores:
    """acc: what stands between the first "the answer is " and the end of its line (one sign less) is the target."""
    found = _ANSWER.search(answer)
    return {"acc": float(found is not None and found[1].strip() == target)}


def _bbh(data: Data, shots: int) -> list[Item]:
    items = list[Item]()
    for name in NAMES:
        head = worked_examples(data.text(f"bbh/cot-prompts/{name}.txt"), shots, name)
        for row in data.examples(f"bbh/bbh/{name}.json"):
            prompt = f"{head}Q: {row['input']}\n{_STEP}"
            items.append(AnswerItem(prompt=prompt, grader=_grader(row["target"]), group=name))
    return items


def _grader(target: str) -> Callable[[str], Scores]:
    return lambda answer: bbh_scores(target, answer)


TASKS = (
    Task(
        name="bbh",
        version=1,
        title="BIG-Bench Hard",
        protocol="Suzgun et al. 2022 with three worked examples, as in EleutherAI's harness 0.4.13 "
        "(bbh_cot_fewshot): greedy, "
        '1,024 tokens, what follows "the answer is "; mean over questions and over tasks.',
        kind="generate",
        shots=3,
        build=_bbh,
        main="acc",
        max_new_tokens=1024,
        stop=("</s>", "Q", "\n\n"),
        by_group=True,
    ),
)
