"""Coding tasks with more tests: HumanEval+ and MBPP+ (Liu et al. 2023), and tasks that read stdin (LiveCodeBench's).

    HumanEval+   the prompt continued; ``test`` has check(candidate) over hundreds of inputs
    MBPP+        the task and its tests in the prompt; ``test`` is a program of assertions
    stdin        a statement in words; a program that reads stdin and prints, or a method that is called

The plus tests import NumPy, so these tasks need a sandbox in which it can be imported (``Task.packages``).
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from collections.abc import Callable
from typing import Any

from quadriga.errors import EvaluationError
from quadriga.evaluate.data import Data, Row
from quadriga.evaluate.items import CodeItem, Item
from quadriga.evaluate.tasks.base import Task
from quadriga.evaluate.tasks.generated import HUMANEVAL_STOPS, code_of, humaneval_program, mbpp_prompt

# HumanEval+ and MBPP+ ------------------------------------------------------------------------------------------------


def _plus_files(folder: str) -> tuple[str, str, str]:
    return f"{folder}/test-00000-of-00001.parquet", f"{folder}/test.parquet", f"{folder}/test.jsonl"


def _humaneval_plus(data: Data, shots: int) -> list[Item]:
    rows = data.rows(data.first_of(*_plus_files("humaneval_plus")))
    return [
        CodeItem(prompt=row["prompt"], program=_humaneval_assembler(row), canonical=row["canonical_solution"])
        for row in rows
    ]


def _humaneval_assembler(row: Row) -> Callable[[str], str]:
    return lambda answer: humaneval_program(row, answer)


def mbpp_plus_program(row: Row, answer: str) -> str:
    """Join the answer and the published program of tests."""
    return "\n".join([code_of(answer), *row["test_imports"], row["test"], ""])


def _mbpp_plus(data: Data, shots: int) -> list[Item]:
    worked = {row["task_id"]: row for row in data.rows("mbpp/mbpp.jsonl")}
    before = "".join(mbpp_prompt(worked[i], worked[i]["code"]) for i in (2, 3, 4)[:shots])
    rows = data.rows(data.first_of(*_plus_files("mbpp_plus")))
    return [
        CodeItem(
            prompt=before + mbpp_prompt(row | {"text": row["prompt"]}),
            program=_mbpp_assembler(row),
            canonical=row["code"],
        )
        for row in rows
    ]


def _mbpp_assembler(row: Row) -> Callable[[str], str]:
    return lambda answer: mbpp_plus_program(row, answer)


# Programs that read stdin --------------------------------------------------------------------------------------------

_SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests."
)
_WITH_STDIN = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT."
)
_WITH_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)

_DRIVER = """
import io as _io, json as _json, sys as _sys
_sys.setrecursionlimit(50_000)


def _lines(text):
    return [line.strip() for line in text.strip().split("\\n")]


def _numbers(line):
    from decimal import Decimal, InvalidOperation
    try:
        return [Decimal(word) for word in line.split()]
    except InvalidOperation:
        return None


def _same_output(ours, theirs):
    ours, theirs = _lines(ours), _lines(theirs)
    return len(ours) == len(theirs) and all(
        one == two or (_numbers(one) is not None and _numbers(one) == _numbers(two)) for one, two in zip(ours, theirs)
    )


class _Stdin(_io.TextIOWrapper):
    def __init__(self, text):
        super().__init__(_io.BytesIO(text.encode()), encoding="utf-8")


def _printed(code, text):
    kept = _sys.stdin, _sys.stdout
    written = _io.TextIOWrapper(_io.BytesIO(), encoding="utf-8")
    _sys.stdin, _sys.stdout = _Stdin(text), written
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit:
        pass
    finally:
        _sys.stdin, _sys.stdout = kept
    written.flush()
    return written.buffer.getvalue().decode()


def _called(code, name, text):
    room = {"__name__": "solution"}
    for module in ("typing", "collections", "math", "itertools", "heapq", "functools", "bisect"):
        exec(f"from {module} import *\\nimport {module}", room)
    room["re"] = __import__("re")
    exec(code, room)
    function = getattr(room["Solution"](), name) if "Solution" in room else room[name]
    found = function(*[_json.loads(line) for line in text.split("\\n") if line.strip()])
    return _json.loads(_json.dumps(found))


_code = compile(SOLUTION, "solution.py", "exec")
for _case in CASES:
    if NAME is None:
        assert _same_output(_printed(_code, _case["input"]), _case["output"]), "another output"
    else:
        assert _called(_code, NAME, _case["input"]) == _json.loads(_case["output"]), "another result"
"""


def stdin_prompt(row: Row) -> str:
    """The prompt of LiveCodeBench (Jain et al. 2024) for chat models, as one message."""
    starter = row.get("starter_code") or ""
    how, fence = (_WITH_STARTER, starter) if starter else (_WITH_STDIN, "# YOUR CODE HERE")
    return (
        f"{_SYSTEM}\n\n### Question:\n{row['question_content']}\n\n### Format: {how}\n```python\n{fence}\n```\n\n"
        "### Answer: (use the provided format with backticks)\n\n"
    )


def cases_of(row: Row) -> list[dict[str, str]]:
    """The public and private cases of a row: {input, output, testtype}.

    Raises:
        EvaluationError: the private cases are in neither published form, JSON or base64 of a compressed pickle of JSON.
    """
    cases = list(_case_list(row["public_test_cases"]))
    private = row.get("private_test_cases") or "[]"
    try:
        return [*cases, *_case_list(private)]
    except ValueError:
        pass
    try:
        text = _TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(private)))).load()
        return [*cases, *_case_list(text)]
    except (ValueError, zlib.error, pickle.UnpicklingError, EOFError, TypeError) as error:
        raise EvaluationError(
            f"{row.get('question_id')}: private_test_cases must be JSON, or base64 of a compressed pickle of it "
            f"({error})"
        ) from None


class _TextOnly(pickle.Unpickler):
    """Reads a pickled text and nothing else: a pickle that names a class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _case_list(text: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return json.loads(text) if isinstance(text, str) else text


def stdin_program(row: Row, answer: str) -> str:
    """The answer's code, run on every case in the same process: stdin and stdout replaced, or its method called."""
    cases = cases_of(row)
    name: str | None = None
    if cases and cases[0].get("testtype") == "functional":
        metadata = row.get("metadata") or "{}"
        name = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name")
    kept = [{"input": case["input"], "output": case["output"]} for case in cases]
    return f"SOLUTION = {code_of(answer)!r}\nNAME = {name!r}\nCASES = {kept!r}\n{_DRIVER}"


def _stdin(data: Data, shots: int) -> list[Item]:
    return [
        CodeItem(prompt=stdin_prompt(row), program=_stdin_assembler(row), group=str(row.get("difficulty") or ""))
        for row in data.rows(data.first_of("livecodebench/test.jsonl", "livecodebench/test.parquet"))
    ]


def _stdin_assembler(row: Row) -> Callable[[str], str]:
    return lambda answer: stdin_program(row, answer)


TASKS = (
    Task(
        name="humaneval_plus",
        version=1,
        title="HumanEval+",
        protocol="HumanEval's prompts and stops with the tests of Liu et al. 2023 (EvalPlus), as in EleutherAI's "
        "harness "
        "0.4.13; unbiased pass@k; 30 s for a program.",
        kind="code",
        shots=0,
        build=_humaneval_plus,
        main="pass@1",
        fixed_shots=True,
        max_new_tokens=1024,
        stop=HUMANEVAL_STOPS,
        packages=("numpy",),
        program_s=30.0,
    ),
    Task(
        name="mbpp_plus",
        version=1,
        title="MBPP+",
        protocol="MBPP's prompt over the 378 tasks of EvalPlus as in EleutherAI's harness 0.4.13, but graded by all "
        "of the "
        "published tests, not by the first three; unbiased pass@k; 30 s for a program.",
        kind="code",
        shots=3,
        build=_mbpp_plus,
        main="pass@1",
        max_new_tokens=512,
        stop=("[DONE]",),
        packages=("numpy",),
        program_s=30.0,
    ),
    Task(
        name="livecodebench",
        version=1,
        title="LiveCodeBench",
        protocol="Jain et al. 2024, code generation: the published prompt as one message, public and private cases, "
        "a line of "
        "output equal as text or as numbers. All cases of a program in one process and 60 s, not 6 s each.",
        kind="code",
        shots=0,
        build=_stdin,
        main="pass@1",
        fixed_shots=True,
        max_new_tokens=2048,
        program_s=60.0,
    ),
)
