"""No test depends on the clock: what ``tests/waiting.py`` promises, held for every other file of the tests."""

from __future__ import annotations

import ast
import math
from pathlib import Path

TESTS = Path(__file__).parent

CLOCKS = {"sleep", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time", "thread_time"}
CLOCKS |= {"wait_for_timeout", "time_ns"}
"""Functions that let time pass or say how much has."""

WAITS = {"timeout", "settimeout", "set_default_timeout", "wait_for", "deadline", "wait", "join", "result", "acquire"}
"""Functions and keywords that bound a wait."""


def faults_of(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, name) of every clock that is called and every wait with a short bound."""
    faults = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        bounds = [(name, node.args[0])] if node.args else []
        bounds += [(k.arg, k.value) for k in node.keywords if k.arg]
        short = [n for n, value in bounds if n in WAITS and _seconds(value) < 60]
        clock = name in CLOCKS and not (node.args and _seconds(node.args[0]) == 0)  # sleep(0) lets others run
        faults += [(node.lineno, n) for n in ([name] if clock else []) + short]
    return faults


def _seconds(value: ast.expr) -> float:
    given = value.value if isinstance(value, ast.Constant) else None
    return given if isinstance(given, (int, float)) and not isinstance(given, bool) else math.inf


def programs_of(tree: ast.AST) -> list[ast.AST]:
    """Python programs that a test keeps as text."""
    programs = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "import " in node.value:
            try:
                programs.append(ast.parse(node.value))
            except SyntaxError:
                continue
    return programs


def test_no_test_looks_at_a_clock_or_waits_for_one() -> None:
    faults = []
    for path in sorted(TESTS.rglob("*.py")):
        file = path.relative_to(TESTS).as_posix()
        if file in ("waiting.py", "mutants/run.py"):  # the second is no test: it reports how long it took
            continue
        tree = ast.parse(path.read_text())
        for part in (tree, *programs_of(tree)):
            faults += [f"{file}:{line}: {name}" for line, name in faults_of(part)]
    assert faults == [], "wait for an event instead, and bound the wait by tests.waiting.HANG_S"
