r"""MATH (Hendrycks et al. 2021): 5,000 competition problems, and the 500 of them that Lightman et al. 2023 held out.

Prompt: the four examples of Lewkowycz et al. 2022 (Minerva), as in EleutherAI's harness. Two figures:

    strict      what stands in "Final Answer: The final answer is X. I hope it is correct."
    flexible    that, else the last \boxed{X}, else the text between the last two dollar signs, else the last number

Both compare by value (``evaluate.equivalence``), not by text.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from quadriga.errors import EvaluationError
from quadriga.evaluate.answer_spelling import closing
from quadriga.evaluate.data import Data, Row
from quadriga.evaluate.equivalence import equivalent
from quadriga.evaluate.items import AnswerItem, Item, Scores
from quadriga.evaluate.tasks.base import Task

SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra"),
    "precalculus",
)
_STRICT = re.compile(r"Final Answer: The final answer is(.*?)\.? I hope it is correct", re.DOTALL)

EXAMPLES = (
    (
        r"Find the domain of the expression  $\frac{\sqrt{x-2}}{\sqrt{5-x}}$.",
        r"The expressions inside each square root must be non-negative. Therefore, $x-2 \ge 0$, so $x\ge2$, and "
        r"$5 - x \ge 0$, so $x \le 5$. Also, the denominator cannot be equal to zero, so $5-x>0$, which gives $x<5$. "
        r"Therefore, the domain of the expression is $\boxed{[2,5)}$.",
        "[2,5)",
    ),
    (
        r"If $\det \mathbf{A} = 2$ and $\det \mathbf{B} = 12,$ then find $\det (\mathbf{A} \mathbf{B}).$",
        r"We have that $\det (\mathbf{A} \mathbf{B}) = (\det \mathbf{A})(\det \mathbf{B}) = (2)(12) = \boxed{24}.$",
        "24",
    ),
    (
        "Terrell usually lifts two 20-pound weights 12 times. If he uses two 15-pound weights instead, how many "
        "times must "
        "Terrell lift them in order to lift the same total weight?",
        r"If Terrell lifts two 20-pound weights 12 times, he lifts a total of $2\cdot 12\cdot20=480$ pounds of "
        r"weight.  If "
        r"he lifts two 15-pound weights instead for $n$ times, he will lift a total of $2\cdot15\cdot n=30n$ pounds of "
        "weight.  Equating this to 480 pounds, we can solve for $n$:\n\\begin{align*}\n30n&=480\\\\\n"
        r"\Rightarrow\qquad n&=480/30=\boxed{16}" + "\n\\end{align*}",
        "16",
    ),
    (
        "If the system of equations\n\n\\begin{align*}\n6x-4y&=a,\\\\\n6y-9x &=b.\n\\end{align*}has a solution $(x, "
        "y)$ "
        r"where $x$ and $y$ are both nonzero," + "\n" + r"find $\frac{a}{b},$ assuming $b$ is nonzero.",
        r"If we multiply the first equation by $-\frac{3}{2}$, we obtain"
        + "\n\n"
        + r"$$6y-9x=-\frac{3}{2}a.$$Since we "
        r"also know that $6y-9x=b$, we have"
        + "\n\n"
        + r"$$-\frac{3}{2}a=b\Rightarrow\frac{a}{b}=\boxed{-\frac{2}{3}}.$$",
        r"-\frac{2}{3}",
    ),
)
"""(problem, solution, final answer): the prompt of Lewkowycz et al. 2022, appendix D.2."""


def math_prompt(problem: str, shots: int) -> str:
    """The first examples with their solutions, then the problem."""
    worked = "".join(
        f"Problem:\n{asked}\n\nSolution: {solution}\nFinal Answer: The final answer is ${final}$. I hope it is "
        f"correct.\n\n"
        for asked, solution, final in EXAMPLES[:shots]
    )
    return f"{worked}Problem:\n{problem}\n\nSolution:"


def boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{}`` (or ``\fbox{}``) of a text; None if there is none that is closed."""
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if start < 0:
        return None
    opened = re.compile(r"\\f?box(?:ed)?(?:\{| ([^\s$]+))").match(text, start)
    if opened is None:
        return None
    if opened[1]:
        return opened[1]
    stop = closing(text, opened.end() - 1)
    return text[opened.end() : stop] if stop > 0 else None


def math_scores(gold: str, answer: str) -> Scores:
    """Grade an answer; see the module docstring."""
    strict, loose = _strict_answer(answer), _flexible_answer(answer)
    return {
        "strict": float(strict is not None and equivalent(strict, gold)),
        "flexible": float(loose is not None and equivalent(loose, gold)),
    }


def _strict_answer(answer: str) -> str | None:
    found = _STRICT.search(answer)
    return None if found is None else found[1].strip()


def _flexible_answer(answer: str) -> str | None:
    first = _strict_answer(answer) or boxed(answer)
    if first is not None:
        return first
    formulas = re.findall(r"\$([^$]+)\$", answer)
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?", answer)
    return formulas[-1] if formulas else (numbers[-1] if numbers else None)


def _items(rows: list[Row], group: str, shots: int) -> list[Item]:
    if shots > len(EXAMPLES):
        raise EvaluationError(f"MATH has {len(EXAMPLES)} published examples: lower --shots ({shots})")
    items = list[Item]()
    for row in rows:
        gold = boxed(row["solution"])
        if gold is None:
            raise EvaluationError(
                f"a solution of MATH must have its answer in \\boxed{{}}; got {row['solution']!r:.120}"
            )
        label = group or str(row.get("subject") or row.get("type") or f"level {row['level']}")
        items.append(AnswerItem(prompt=math_prompt(row["problem"], shots), grader=_grader(gold), group=label))
    return items


def _grader(gold: str) -> Callable[[str], Scores]:
    return lambda answer: math_scores(gold, answer)


def _math(data: Data, shots: int) -> list[Item]:
    return [item for subject in SUBJECTS for item in _items(data.rows(f"math/{subject}.jsonl"), subject, shots)]


def _math_500(data: Data, shots: int) -> list[Item]:
    return _items(data.rows("math/test_500.jsonl"), "", shots)


def _task(name: str, title: str, build: Callable[[Data, int], list[Item]], of: str) -> Task:
    return Task(
        name=name,
        version=2,
        title=title,
        protocol=f"{of}; the four examples of Lewkowycz et al. 2022 as in EleutherAI's harness 0.4.13 "
        f"(minerva_math), but "
        '1,024 tokens, and compared by value with our own rules. strict: after "Final Answer:"; flexible: also in a '
        "box.",
        kind="generate",
        shots=4,
        build=build,
        main="flexible",
        max_new_tokens=1024,
        stop=("Problem:",),
        by_group=name == "math",
    )


TASKS = (
    _task("math", "MATH", _math, "Hendrycks et al. 2021, the 5,000 problems of test"),
    _task("math_500", "MATH-500", _math_500, "The 500 problems of Lightman et al. 2023"),
)
