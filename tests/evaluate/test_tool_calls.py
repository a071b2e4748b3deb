"""Function calls by their syntax tree: BFCL's rules, one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quadriga.evaluate.items import TalkItem
from quadriga.evaluate.tasks import TASKS
from quadriga.evaluate.tasks.tools import CALLED, NOT_CALLED, RELEVANT, is_call
from quadriga.evaluate.tool_calls import Call, parse_calls, wrong
from tests.evaluate.fakes import Unchecked, write


def function(name: str, **kinds: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in kinds.items()}
    return {"name": name, "parameters": {"properties": properties, "required": [next(iter(kinds))]}}


AREA = function("math.area", base="integer", unit="string", scale="float", tags="array", options="dict", flag="boolean")
ACCEPTED = {
    "math.area": {
        "base": [10],
        "unit": ["square meters", ""],
        "scale": [2.0, 2, ""],
        "tags": [["a", "b"], ""],
        "options": [{"mode": ["fast"], "depth": [1, ""]}, ""],
        "flag": [True, ""],
    }
}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("[math.area(base=10)]", True),
        (" math.area(base=10) ", True),
        ("'[math.area(base=10)]'", True),
        ("[math.area(base=10, unit='Square-Meters')]", True),
        ("[math.area(base=10, scale=2)]", True),
        ("[math.area(base=10, tags=['A', 'b '])]", True),
        ("[math.area(base=10, tags=('a', 'b'))]", True),
        ("[math.area(base=10, options={'mode': 'FAST'})]", True),
        ("[math.area(base=10, options={'mode': 'fast', 'depth': 1})]", True),
        ("[math.area(base=10, flag=True)]", True),
        ("[math.area(base='10')]", False),
        ("[math.area(base=10.0)]", False),
        ("[math.area(base=-10)]", False),
        ("[area(base=10)]", False),
        ("[math.area(unit='square meters')]", False),
        ("[math.area(base=10, unit='feet')]", False),
        ("[math.area(base=10, more=1)]", False),
        ("[math.area(base=10, tags=['b', 'a'])]", False),
        ("[math.area(base=10, options={'mode': 'fast', 'x': 1})]", False),
        ("[math.area(base=10, options={'depth': 1})]", False),
        ("[math.area(base=10, flag=1)]", False),
        ("[math.area(base=10), math.area(base=10)]", False),
        ("[math.area(base=__import__('os'))]", False),
        ("I would call math.area(base=10)", False),
        ("[]", False),
        ("", False),
    ],
)
def test_one_call(text: str, right: bool) -> None:
    assert (wrong(text, [AREA], [ACCEPTED]) == "") == right


def test_several_calls_in_any_order() -> None:
    two = [{"f": {"x": [1]}}, {"g": {"y": ["b"]}}]
    functions = [function("f", x="integer"), function("g", y="string")]
    assert wrong("[g(y='b'), f(x=1)]", functions, two) == ""
    assert wrong("[g(y='b'), f(x=2)]", functions, two) == "f must be called, got g"
    assert wrong("[f(x=1)]", functions, two) == "2 calls are right, got 1"
    twice = [{"f": {"x": [1]}}, {"f": {"x": [2]}}]
    assert wrong("[f(x=2), f(x=1)]", functions, twice) == ""
    assert wrong("[f(x=1), f(x=1)]", functions, twice) != ""
    assert wrong("[f(x=1), f(x=9)]", functions, [{"f": {"x": [1]}}, {"f": {"x": [1, 2]}}]) != ""


def test_text_is_parsed_and_never_run() -> None:
    assert parse_calls("[f(x=-1, y=[None, {'a': (1, 2.5)}], z=open('/etc/passwd'))]") == [
        Call("f", {"x": -1, "y": [None, {"a": [1, 2.5]}], "z": "open('/etc/passwd')"})
    ]
    assert is_call("f()") and not is_call("[]") and not is_call("There is no function.") and not is_call("[1]")
    with pytest.raises(ValueError, match="no Python expression"):
        parse_calls("(" * 5000)


def test_the_items_of_all_categories(tmp_path: Path) -> None:
    asked = {"id": "x_0", "question": [[{"role": "user", "content": "Area?"}]], "function": [AREA]}
    with_system = asked | {
        "question": [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Area?"}]]
    }
    for category in (*CALLED, *NOT_CALLED, *RELEVANT):
        write(tmp_path / f"bfcl/BFCL_v4_{category}.json", [with_system if category == "live_simple" else asked])
        if category in CALLED:
            answer = {"id": "x_0", "ground_truth": [ACCEPTED]}
            write(tmp_path / f"bfcl/possible_answer/BFCL_v4_{category}.json", [answer])
    found = {item.group: item for item in TASKS["bfcl"].items(Unchecked(tmp_path)) if isinstance(item, TalkItem)}
    assert len(found) == 11
    ((system, user),) = found["simple_python"].turns
    assert (system["role"], user) == ("system", {"role": "user", "content": "Area?"})
    assert system["content"].endswith(f"you can invoke.\n{json.dumps([AREA], indent=4)}\n")
    assert found["live_simple"].turns[0][0]["content"].endswith("\n\nBe kind.")
    call = "[math.area(base=10)]"
    scores = {name: item.grader([call], [])["acc"] for name, item in found.items()}
    assert {name for name, score in scores.items() if not score} == set(NOT_CALLED)
    assert found["irrelevance"].grader(["None of them fits."], []) == {"acc": 1.0}
    assert found["live_relevance"].grader(["None of them fits."], []) == {"acc": 0.0}
