"""The list of wrong changes fits the code: every fragment is there once, every named test exists.

That each change is noticed is what ``make mutate`` shows; here is only what costs nothing.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.kept import ROOT, Mutant, load, rooms

MUTANTS = [mutant for room in rooms() for mutant in load(room)]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.room}: {mutant.name}")
def test_it_still_applies(mutant: Mutant) -> None:
    changed = mutant.applied()
    assert changed != (ROOT / mutant.file).read_text()
    if not mutant.compiled:
        ast.parse(changed)
    for test in mutant.tests:
        path, *names = test.split("::")
        assert path.startswith("tests/") and (ROOT / path).is_file(), f"{path} is not there"
        if names:
            assert names[0] in functions(ROOT / path), f"{path} has no {names[0]}"


def functions(path: Path) -> set[str]:
    """The test functions of a file."""
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_the_list_reaches_every_room_of_the_code() -> None:
    assert len(MUTANTS) >= 60 and all(mutant.tests for mutant in MUTANTS)
    twice = [name for name, n in Counter((m.room, m.name) for m in MUTANTS).items() if n > 1]
    assert twice == []
    packages = {mutant.file.removeprefix("src/quadriga/").partition("/")[0] for mutant in MUTANTS}
    assert {
        "edits",
        "engine",
        "evaluate",
        "io",
        "kernels",
        "model",
        "nn",
        "quant",
        "runners",
        "server",
        "text",
        "train",
    } <= packages
