"""MATH: the prompt, what counts as an answer, and the groups."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quadriga.errors import EvaluationError
from quadriga.evaluate.items import AnswerItem
from quadriga.evaluate.tasks import TASKS
from quadriga.evaluate.tasks.mathematics import SUBJECTS, boxed, math_prompt, math_scores
from tests.evaluate.fakes import Unchecked


def test_the_prompt_has_the_published_examples() -> None:
    prompt = math_prompt("What is $1+1$?", 2)
    assert prompt.startswith(
        "Problem:\nFind the domain of the expression  $\\frac{\\sqrt{x-2}}{\\sqrt{5-x}}$.\n\nSolution: The "
    )
    assert (
        "is $\\boxed{[2,5)}$.\nFinal Answer: The final answer is $[2,5)$. I hope it is correct.\n\nProblem:\nIf"
        in prompt
    )
    assert prompt.endswith("is $24$. I hope it is correct.\n\nProblem:\nWhat is $1+1$?\n\nSolution:")
    assert math_prompt("x", 4).count("Problem:") == 5


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so $\boxed{\frac{1}{2}}$ or \boxed{3}.", "3"),
        (r"\fbox{\sqrt{2}}", r"\sqrt{2}"),
        (r"\boxed 7$.", "7"),
        (r"\boxed{1", None),
        ("7", None),
    ],
)
def test_the_last_box(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        (r"Final Answer: The final answer is $\frac{1}{2}$. I hope it is correct.", 1, 1),
        (r"Final Answer: The final answer is $0.50$. I hope it is correct. \boxed{3}", 1, 1),
        (r"Final Answer: The final answer is $2$. I hope it is correct. \boxed{1/2}", 0, 0),
        (r"Therefore \boxed{\frac12}", 0, 1),
        ("$3$, no, it is $1/2$", 0, 1),
        ("It is 1/2", 0, 1),
        ("It is 1/3", 0, 0),
        ("", 0, 0),
    ],
)
def test_grading(answer: str, strict: int, flexible: int) -> None:
    assert math_scores(r"\frac{1}{2}", answer) == {"strict": float(strict), "flexible": float(flexible)}


def test_items(tmp_path: Path) -> None:
    (tmp_path / "math").mkdir()
    for subject in SUBJECTS:
        row = {"problem": f"{subject}?", "solution": r"It is $\boxed{5}$.", "level": "Level 3", "type": subject}
        (tmp_path / f"math/{subject}.jsonl").write_text(json.dumps(row) + "\n")
    rows = [{"problem": "P?", "solution": r"\boxed{(1,2)}", "level": 4, "type": None}]
    (tmp_path / "math/test_500.jsonl").write_text(json.dumps(rows[0]) + "\n")
    whole = TASKS["math"].items(Unchecked(tmp_path), None, 0)
    assert [item.group for item in whole] == list(SUBJECTS)
    (one,) = TASKS["math_500"].items(Unchecked(tmp_path), None, 0)
    assert isinstance(one, AnswerItem)
    assert (one.prompt, one.group) == ("Problem:\nP?\n\nSolution:", "level 4")
    assert one.grade(r"\boxed{(1,\frac{4}{2})}") == {"strict": 0.0, "flexible": 1.0}
    with pytest.raises(EvaluationError, match="MATH has 4 published examples"):
        TASKS["math_500"].items(Unchecked(tmp_path), None, 5)
    (tmp_path / "math/test_500.jsonl").write_text(json.dumps(rows[0] | {"solution": "5"}) + "\n")
    with pytest.raises(EvaluationError, match="must have its answer in"):
        TASKS["math_500"].items(Unchecked(tmp_path))
