"""Tasks that another model grades: MT-Bench (Zheng et al. 2023), and questions of facts (SimpleQA, Wei et al. 2024).

MT-Bench's questions, reference answers and the judge's prompts are the published files: 80 questions of two turns, each
answer rated from 1 to 10 by a judge that sees the conversation so far; mathematics, reasoning and coding with a
reference. SimpleQA's judge is asked in this module's words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from quadriga.errors import EvaluationError
from quadriga.evaluate.data import Data, Row
from quadriga.evaluate.items import Item, Scores, TalkItem
from quadriga.evaluate.model import Message
from quadriga.evaluate.tasks.base import Task

# MT-Bench ------------------------------------------------------------------------------------------------------------

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Of the answers by category; 0 for the others, as in FastChat."""
WITH_REFERENCE = ("math", "reasoning", "coding")


def rating(verdict: str) -> float | None:
    """The number in double (else single) square brackets; None if there is none from 1 to 10."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", verdict) or re.search(r"\[(\d+\.?\d*)\]", verdict)
    value = None if found is None else float(found[1])
    return value if value is not None and 1 <= value <= 10 else None


def mt_bench_scores(verdicts: Sequence[str]) -> Scores:
    """score: the ratings of both turns; a verdict without a rating counts as unrated, not as a rating."""
    ratings = [rating(verdict) for verdict in verdicts]
    known = [one for one in ratings if one is not None]
    first, second = ratings
    return {
        "score_count": sum(known),
        "score_n": float(len(known)),
        "first_turn_count": first or 0.0,
        "first_n": float(first is not None),
        "second_turn_count": second or 0.0,
        "second_n": float(second is not None),
        "unrated": (len(ratings) - len(known)) / len(ratings),
    }


def filled(template: str, **values: str) -> str:
    """A template with its names replaced; braces in the values stay."""
    return re.sub(r"\{(\w+)\}", lambda found: values[found[1]], template)


def mt_bench_asks(
    row: Row, reference: Sequence[str], prompts: dict[str, Row]
) -> Callable[[Sequence[str]], list[list[Message]]]:
    """What the judge is asked of both turns' answers, for a row and its reference answers (empty: none)."""
    kind = "single-math-v1" if reference else "single-v1"

    def asks(answers: Sequence[str]) -> list[list[Message]]:
        first, second = prompts[kind], prompts[f"{kind}-multi-turn"]
        known = {f"ref_answer_{i}": text for i, text in enumerate(reference, 1)}
        one = {"question": row["turns"][0], "answer": answers[0]} | known
        two = {f"question_{i}": text for i, text in enumerate(row["turns"], 1)}
        two |= {f"answer_{i}": text for i, text in enumerate(answers, 1)} | known
        return [
            [
                {"role": "system", "content": prompt["system_prompt"]},
                {"role": "user", "content": filled(prompt["prompt_template"], **values)},
            ]
            for prompt, values in ((first, one), (second, two))
        ]

    return asks


def _mt_bench(data: Data, shots: int) -> list[Item]:
    prompts = {row["name"]: row for row in data.rows("mt_bench/judge_prompts.jsonl")}
    references = {row["question_id"]: row for row in data.rows("mt_bench/reference_answer/gpt-4.jsonl")}
    items = list[Item]()
    for row in data.rows("mt_bench/question.jsonl"):
        known: Sequence[str] = ()
        if row["category"] in WITH_REFERENCE:
            known = references[row["question_id"]]["choices"][0]["turns"]
        items.append(
            TalkItem(
                turns=tuple(({"role": "user", "content": text},) for text in row["turns"]),
                grader=lambda answers, verdicts: mt_bench_scores(verdicts),
                asks=mt_bench_asks(row, known, prompts),
                temperature=TEMPERATURES.get(row["category"], 0.0),
                group=row["category"],
            )
        )
    return items


# SimpleQA ------------------------------------------------------------------------------------------------------------

SIMPLEQA_JUDGE = """Compare an answer to a short factual question with the reference answer.

Question: {question}
Reference answer: {reference}
Answer to grade: {answer}

Grade it as one of:
CORRECT: the answer contains everything the reference says and contradicts nothing of it. Another wording, more \
detail, a hedge ("I think") and small differences of spelling are fine; a number must agree to the reference's last \
digit.
INCORRECT: some statement of the answer contradicts the reference, even if it is hedged.
NOT_ATTEMPTED: the answer does not give what was asked and contradicts nothing, for example "I do not know".

Reply with one word: CORRECT, INCORRECT or NOT_ATTEMPTED."""
_GRADES = {"CORRECT": "correct", "INCORRECT": "incorrect", "NOT_CORRECT": "incorrect", "NOT_ATTEMPTED": "not_attempted"}


def simpleqa_scores(verdict: str) -> Scores:
    """The grade that the verdict names; one that names none, or several, is ungraded.

    attempted_right: right answers over those that were attempted.
    """
    words = re.findall(r"\b(NOT[_ ]ATTEMPTED|NOT[_ ]CORRECT|INCORRECT|CORRECT)\b", verdict.upper())
    named = {_GRADES[word.replace(" ", "_")] for word in words}
    grade = named.pop() if len(named) == 1 else ""
    scores = {name: float(name == grade) for name in ("correct", "incorrect", "not_attempted")}
    tried = scores["correct"] + scores["incorrect"]
    return scores | {"ungraded": float(not grade), "attempted_right_count": scores["correct"], "attempted_n": tried}


def _simpleqa(data: Data, shots: int) -> list[Item]:
    items = list[Item]()
    for row in data.rows("simpleqa/simple_qa_test_set.csv"):
        if not row.get("problem") or not row.get("answer"):
            raise EvaluationError(f"simple_qa_test_set.csv must have problem and answer in every row, got {row!r:.200}")
        turn = ({"role": "user", "content": row["problem"]},)
        items.append(TalkItem(turns=(turn,), grader=_simpleqa_grader, asks=_simpleqa_asks(row)))
    return items


def _simpleqa_grader(answers: Sequence[str], verdicts: Sequence[str]) -> Scores:
    return simpleqa_scores(verdicts[0])


def _simpleqa_asks(row: Row) -> Callable[[Sequence[str]], list[list[Message]]]:
    def asks(answers: Sequence[str]) -> list[list[Message]]:
        values = {"question": row["problem"], "reference": row["answer"], "answer": answers[0]}
        return [[{"role": "user", "content": filled(SIMPLEQA_JUDGE, **values)}]]

    return asks


TASKS = (
    Task(
        name="mt_bench",
        version=1,
        title="MT-Bench",
        protocol="Zheng et al. 2023: FastChat's 80 questions of two turns, its temperatures, 1,024 tokens, its "
        "judge's prompts and "
        "references; the mean of 160 ratings from 1 to 10. Which judge it was is part of the figure.",
        kind="talk",
        shots=0,
        build=_mt_bench,
        main="score",
        fixed_shots=True,
        max_new_tokens=1024,
        judged=True,
    ),
    Task(
        name="simpleqa",
        version=2,
        title="SimpleQA",
        protocol="Wei et al. 2024: the question as a user's message, 256 tokens, greedy; a judge says correct, "
        "incorrect or not "
        "attempted, asked in our own words.",
        kind="talk",
        shots=0,
        build=_simpleqa,
        main="correct",
        fixed_shots=True,
        max_new_tokens=256,
        judged=True,
    ),
)
