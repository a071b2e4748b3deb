"""A benchmark: a name, a published protocol, and a function from data to items.

Examples shown before a question ("shots") come from a pool. Where the published protocol draws them at random, they
are drawn as EleutherAI's harness does: one ``random.Random(1234)`` per task, advanced by each question in order; if the
pool is the test set, one more is drawn and the question itself is left out. So the prompts are identical to theirs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from quadriga.errors import EvaluationError
from quadriga.evaluate.data import Data
from quadriga.evaluate.items import Item
from quadriga.evaluate.model import LanguageModel

T = TypeVar("T")

Kind = Literal["likelihood", "rolling", "generate", "code", "talk"]
"""What a task requests from a model: log-probabilities of continuations or of whole texts, answers, programs, turns."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark.

    Attributes:
        version: incremented when prompts or grading change; results of different versions are not comparable.
            protocol: whose protocol it is, and how this task differs from it.
            shots: default number of examples before each question.
            build: (data, shots) -> items.
            main: the name of the figure shown in tables.
            chance: the score of guessing, for the Gauntlet.
            fixed_shots: the protocol fixes the prompts; another number of shots is refused.
    """

    name: str
    version: int
    title: str
    protocol: str
    kind: Kind
    shots: int
    build: Callable[[Data, int], list[Item]]
    main: str
    chance: float = 0.0
    fixed_shots: bool = False
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    by_group: bool = False
    """Also report the mean of the groups' means."""
    build_for: Callable[[Data, LanguageModel], list[Item]] | None = None
    """Used instead of ``build`` where the questions depend on the model's context length."""
    judged: bool = False
    """Graded by another model, the judge."""
    packages: tuple[str, ...] = ()
    """Packages of this Python that the programs of a coding task may import."""
    program_s: float = 10.0
    """Seconds that a program of a coding task has, with all of its tests."""

    def items(self, data: Data, model: LanguageModel | None = None, shots: int | None = None) -> list[Item]:
        """Build the questions, in the order of the data.

        Raises:
            EvaluationError: missing data, or a number of shots that the protocol does not allow.
        """
        k = self.shots if shots is None else shots
        if k < 0:
            raise EvaluationError(f"--shots must be 0 or more, got {k}")
        if self.fixed_shots and k != self.shots:
            raise EvaluationError(f"{self.name} has a fixed prompt ({self.shots} shots): leave --shots out for it")
        if self.build_for is not None:
            assert model is not None, "this task is made for a model"
            return self.build_for(data, model)
        return self.build(data, k)


class Shots:
    """Draws the examples for one question after another; see the module docstring."""

    def __init__(self, n: int, *, seed: int = 1234) -> None:
        self._n, self._random = n, random.Random(seed)

    def draw(self, pool: Sequence[T], without: T | None = None) -> list[T]:
        """Draw ``n`` examples for the next question, leaving out ``without`` (the question itself).

        Raises:
            EvaluationError: the pool is too small.
        """
        if self._n == 0:
            return []
        if len(pool) < self._n + (without is not None):
            raise EvaluationError(
                f"{self._n} shots need as many examples, but there are only {len(pool)} to draw from: lower --shots"
            )
        if without is None:
            return self._random.sample(pool, self._n)
        drawn = [one for one in self._random.sample(pool, self._n + 1) if one != without][: self._n]
        if len(drawn) < self._n:  # the question is in the pool more than once
            others = [one for one in pool if one != without]
            if len(others) < self._n:
                raise EvaluationError(
                    f"{self._n} shots need as many other questions, but only {len(others)} of {len(pool)} differ from "
                    "the one that is asked: lower --shots"
                )
            drawn = self._random.sample(others, self._n)
        return drawn
