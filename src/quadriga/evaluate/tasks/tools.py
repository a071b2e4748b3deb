"""Function calling: BFCL's single-turn questions for Python, the calls compared by their syntax tree."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from quadriga.evaluate.data import Data, Row
from quadriga.evaluate.items import Item, Scores, TalkItem
from quadriga.evaluate.model import Message
from quadriga.evaluate.tasks.base import Task
from quadriga.evaluate.tool_calls import parse_calls, wrong

CALLED = (
    *("simple_python", "multiple", "parallel", "parallel_multiple", "live_simple", "live_multiple", "live_parallel"),
    "live_parallel_multiple",
)
NOT_CALLED = ("irrelevance", "live_irrelevance")
"""None of the functions fits: right is an answer that is no call."""
RELEVANT = ("live_relevance",)
"""Some call is right, whatever its arguments."""

SYSTEM = (
    "You are an expert in composing functions.You are given a question and a set of possible functions. Based on the "
    "question, you will need to make one or more function/tool calls to achieve the purpose. If none of the "
    "functions can "
    "be used, point it out. If the given question lacks the parameters required by the function, also point it out.\n\n"
    "You should only return the function calls in your response.\n\nIf you decide to invoke any of the function(s), "
    "you "
    "MUST put it in the format of [func_name1(params_name1=params_value1, params_name2=params_value2...), "
    "func_name2(params)].  You SHOULD NOT include any other text in the response.\n\nAt each turn, you should try your "
    "best to complete the tasks requested by the user within the current turn. Continue to output functions to call "
    "until "
    "you have fulfilled the user's request to the best of your ability. Once you have no more functions to call, the "
    "system will consider the current turn complete and proceed to the next turn or task.\n\nHere is a list of "
    "functions "
    "in json format that you can invoke.\n{functions}\n"
)
"""BFCL v4's prompt for models that are not given functions by their interface."""


def opening(row: Row) -> tuple[Message, ...]:
    """The messages before the answer: the functions come first in the system's message."""
    asked = [dict(one) for one in row["question"][0]]
    system = SYSTEM.replace("{functions}", json.dumps(row["function"], indent=4))
    if asked[0]["role"] == "system":
        asked[0]["content"] = f"{system}\n\n{asked[0]['content']}"
        return tuple(asked)
    return ({"role": "system", "content": system}, *asked)


def called(functions: Sequence[dict[str, Any]], accepted: Sequence[dict[str, Any]], answer: str) -> Scores:
    """acc: the answer's calls are the accepted ones."""
    return {"acc": float(not wrong(answer, functions, accepted))}


def is_call(answer: str) -> bool:
    """True if an answer has at least one call."""
    try:
        return bool(parse_calls(answer))
    except ValueError:
        return False


def _grader(row: Row, accepted: Row | None, category: str) -> Callable[[Sequence[str], Sequence[str]], Scores]:
    if accepted is not None:
        truth = accepted["ground_truth"]
        return lambda answers, verdicts: called(row["function"], truth, answers[0])
    wanted = category in RELEVANT
    return lambda answers, verdicts: {"acc": float(is_call(answers[0]) == wanted)}


def _bfcl(data: Data, shots: int) -> list[Item]:
    items = list[Item]()
    for category in (*CALLED, *NOT_CALLED, *RELEVANT):
        accepted: dict[str, Row] = {}
        if category in CALLED:
            accepted = {row["id"]: row for row in data.rows(f"bfcl/possible_answer/BFCL_v4_{category}.json")}
        for row in data.rows(f"bfcl/BFCL_v4_{category}.json"):
            grader = _grader(row, accepted.get(row["id"]) if accepted else None, category)
            items.append(TalkItem(turns=(opening(row),), grader=grader, group=category))
    return items


TASKS = (
    Task(
        name="bfcl",
        version=1,
        title="BFCL",
        protocol="Berkeley Function Calling Leaderboard v4, single turn, Python, functions in the prompt, greedy: "
        "calls compared "
        "by syntax tree, types and accepted values; irrelevance: no call; mean over questions and over 11 categories.",
        kind="talk",
        shots=0,
        build=_bfcl,
        main="acc",
        fixed_shots=True,
        max_new_tokens=512,
        by_group=True,
    ),
)
