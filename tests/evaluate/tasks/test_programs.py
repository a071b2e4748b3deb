"""HumanEval+, MBPP+ and tasks with stdin: prompts, joined programs, and what passes in the sandbox."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from quadriga.errors import EvaluationError
from quadriga.evaluate.items import CodeItem
from quadriga.evaluate.sandbox import Sandbox, works
from quadriga.evaluate.tasks import TASKS
from quadriga.evaluate.tasks.programs import cases_of, stdin_program, stdin_prompt
from tests.evaluate.fakes import Unchecked, write

PLUS_TEST = """
import numpy as np

def check(candidate):
    for inp, exp in zip([[1.0], [4.0]], [1.0, 2.0]):
        assert np.allclose(candidate(*inp), exp, rtol=1e-07, atol=1e-6)
"""
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def root(x: float) -> float:\n    """The square root."""\n',
    "canonical_solution": "    return x ** 0.5\n",
    "entry_point": "root",
    "test": PLUS_TEST,
}
MBPP = {
    "task_id": 2,
    "prompt": "Write a function to double a number.",
    "code": "def double(x):\n    return 2 * x",
    "test_imports": ["import math"],
    "test_list": ["assert double(1) == 2", "assert double(2) == 4", "assert double(0) == 0"],
    "test": "import numpy as np\nfor i in range(99):\n    assert np.isclose(double(i), 2 * i), math.pi\n",
}


@pytest.fixture(scope="module")
def box() -> Sandbox:
    kind = next((kind for kind in ("bubblewrap", "unshare") if works(kind)), None)
    if kind is None:
        pytest.skip("neither bwrap nor unshare works here")
    return Sandbox(kind)


def code_items(name: str, folder: Path, shots: int | None = None) -> list[CodeItem]:
    return [item for item in TASKS[name].items(Unchecked(folder), None, shots) if isinstance(item, CodeItem)]


def test_plus_tasks(tmp_path: Path, box: Sandbox) -> None:
    write(tmp_path / "humaneval_plus/test.jsonl", [HUMANEVAL])
    write(tmp_path / "mbpp_plus/test.jsonl", [MBPP])
    worked = [{"task_id": i, "text": f"T{i}", "code": f"c{i}", "test_list": ["t"]} for i in (2, 3, 4)]
    write(tmp_path / "mbpp/mbpp.jsonl", worked)
    (one,) = code_items("humaneval_plus", tmp_path)
    (two,) = code_items("mbpp_plus", tmp_path, 1)
    assert one.prompt == HUMANEVAL["prompt"]
    assert two.prompt.startswith("You are an expert Python programmer, and here is your task: T2 Your code should pass")
    assert two.prompt.endswith(
        "[DONE]\n\nYou are an expert Python programmer, and here is your task: Write a function to double a number. "
        "Your code "
        "should pass these tests:\n\nassert double(1) == 2\nassert double(2) == 4\nassert double(0) == 0\n[BEGIN]\n"
    )
    only_listed = "def double(x):\n    return {0: 0, 1: 2, 2: 4}[x]"
    programs = [
        one.program(one.canonical),
        one.program("    return x\n"),
        two.program(two.canonical),
        two.program(only_listed),
    ]
    assert box.passes(programs, wall_s=30.0, packages=("numpy",)) == [True, False, True, False]
    assert box.passes(programs[:1]) == [False], "without the package"


def test_packages_are_those_that_are_installed() -> None:
    with pytest.raises(EvaluationError, match="import quadriga_no_such_package, which is not installed"):
        Sandbox("none", packages=("quadriga_no_such_package",))


def case(given: str, wanted: str, kind: str = "stdin") -> dict[str, str]:
    return {"input": given, "output": wanted, "testtype": kind}


CONTEST: dict[str, Any] = {
    "question_content": "Add two numbers.",
    "question_id": "q1",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([case("1 2\n", "3\n")]),
    "private_test_cases": json.dumps([case("2 2\n", "4.0")]),
    "metadata": "{}",
}
METHOD = CONTEST | {
    "starter_code": "class Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        ",
    "public_test_cases": [case("1\n[2, 3]", "6", "functional")],
    "private_test_cases": "[]",
    "metadata": json.dumps({"func_name": "add"}),
}


def test_the_prompt_of_a_contest() -> None:
    prompt = stdin_prompt(CONTEST)
    assert "### Question:\nAdd two numbers.\n\n### Format: Read the inputs from stdin" in prompt
    assert prompt.endswith(
        "```python\n# YOUR CODE HERE\n```\n\n### Answer: (use the provided format with backticks)\n\n"
    )
    assert f"```python\n{METHOD['starter_code']}\n```" in stdin_prompt(METHOD)


class Hostile:
    """Pickled, it is a call whose value would be a list of cases."""

    def __reduce__(self) -> tuple[Any, ...]:
        return str, ("[]",)


def test_private_cases_in_both_published_forms_and_nothing_else() -> None:
    hidden = json.dumps([case("5 5\n", "10")])
    packed = base64.b64encode(zlib.compress(pickle.dumps(hidden))).decode()
    assert cases_of(CONTEST | {"private_test_cases": packed}) == [case("1 2\n", "3\n"), case("5 5\n", "10")]
    hostile = base64.b64encode(zlib.compress(pickle.dumps(Hostile()))).decode()
    for bad in (hostile, "not base64!", packed[:-9]):
        with pytest.raises(
            EvaluationError, match=r"q1: private_test_cases must be JSON, or base64 of a compressed pickle"
        ):
            cases_of(CONTEST | {"private_test_cases": bad})


def test_contest_programs(box: Sandbox) -> None:
    stdin = {
        "print(sum(map(int, input().split())))": True,
        "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())), '\\n')\nsys.exit(0)": True,
        "```python\nif __name__ == '__main__':\n    print(eval('+'.join(input().split())))\n```": True,
        "import sys\nfor line in open(0): print(3)": False,
        "print(3)": False,
        "print('sum 3')": False,
        "raise SystemExit": False,
    }
    assert box.passes([stdin_program(CONTEST, code) for code in stdin]) == list(stdin.values())
    methods = {
        "class Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        return a + sum(b)": True,
        "def add(a, b):\n    return a + sum(b)": True,
        "class Solution:\n    def add(self, a, b):\n        return a": False,
    }
    assert box.passes([stdin_program(METHOD, code) for code in methods]) == list(methods.values())


def test_contest_items(tmp_path: Path) -> None:
    write(tmp_path / "livecodebench/test.jsonl", [CONTEST])
    (item,) = code_items("livecodebench", tmp_path)
    assert (item.group, item.prompt) == ("easy", stdin_prompt(CONTEST))
