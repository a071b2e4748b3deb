"""Conversations with a model, turn by turn, and the judge's verdicts on them.

    turns of many items together:   messages 1 ─► answers 1 ─► messages 2 ─► answers 2 ─► judge ─► scores

A judge is any ``LanguageModel`` that can converse. What it was asked and what it said are kept with the results, so
that a figure can be computed again from the record without asking anyone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quadriga.errors import EvaluationError
from quadriga.evaluate.items import Scores, TalkItem
from quadriga.evaluate.model import LanguageModel, Message

VERDICT_TOKENS = 2048
"""The most that a judge writes, as in MT-Bench."""


def talk(
    model: LanguageModel, judge: LanguageModel | None, items: Sequence[TalkItem], *, max_new_tokens: int, seed: int
) -> list[tuple[Scores, dict[str, Any]]]:
    """Hold the items' conversations, have them judged, and return each one's scores and what led to them."""
    spoken = converse(model, items, max_new_tokens=max_new_tokens, seed=seed)
    verdicts = judged(judge, items, spoken)
    return [
        (
            item.grader(answers, said),
            {"prompt": [message["content"] for turn in item.turns for message in turn], "answers": answers}
            | ({} if item.asks is None else {"verdicts": said}),
        )
        for item, answers, said in zip(items, spoken, verdicts, strict=True)
    ]


def converse(model: LanguageModel, items: Sequence[TalkItem], *, max_new_tokens: int, seed: int) -> list[list[str]]:
    """The model's answers to each item's turns."""
    answers: list[list[str]] = [[] for _ in items]
    histories: list[list[Message]] = [[] for _ in items]
    for turn in range(max((len(item.turns) for item in items), default=0)):
        for temperature in sorted({item.temperature for item in items}):
            now = [i for i, item in enumerate(items) if len(item.turns) > turn and item.temperature == temperature]
            for i in now:
                histories[i] += items[i].turns[turn]
            asked = [histories[i] for i in now]
            own_seed = seed + turn * 1_000_003
            said = model.converse(asked, max_new_tokens=max_new_tokens, temperature=temperature, seed=own_seed)
            for i, text in zip(now, said, strict=True):
                answers[i].append(text)
                histories[i].append({"role": "assistant", "content": text})
    return answers


def judged(judge: LanguageModel | None, items: Sequence[TalkItem], answers: Sequence[Sequence[str]]) -> list[list[str]]:
    """The judge's verdicts on each item's answers; none for items that need no judge.

    Raises:
        EvaluationError: there is no judge, and an item needs one.
    """
    asked = [[] if item.asks is None else list(item.asks(said)) for item, said in zip(items, answers, strict=True)]
    flat = [conversation for one in asked for conversation in one]
    if not flat:
        return [[] for _ in items]
    if judge is None:
        raise EvaluationError("these answers are graded by a judge: give one with --judge")
    verdicts = iter(judge.converse(flat, max_new_tokens=VERDICT_TOKENS))
    return [[next(verdicts) for _ in one] for one in asked]
