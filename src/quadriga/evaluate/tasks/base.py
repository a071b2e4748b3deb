"""What a benchmark is: a name, a published protocol, and a function from data to items.

Examples shown before a question ("shots") come from a pool. Where the published protocol draws them at random, the
draw is EleutherAI's: one ``random.Random(1234)`` for the task, advanced by every question in order; if the pool is the
test set itself, one more is drawn and the question itself is left out. So prompts equal theirs, letter by letter.
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

Kind = Literal["likelihood", "rolling", "generate", "code"]
"""What a task asks of a model: log-probabilities of continuations, of whole texts, answers, or programs."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark.

    Attributes:
        version: rises when prompts or grading change; results of different versions do not compare.
        protocol: whose protocol it is, and where this one departs from it.
        shots: examples before each question, by default.
        build: (data, shots) -> items. Tasks whose length matters take it from ``context``.
        main: the figure that tables show.
        chance: what guessing scores, for the Gauntlet.
        fixed_shots: the protocol's prompts are whole; other shots are refused.
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
    """The mean of the groups' means is a figure too."""
    build_for: Callable[[Data, LanguageModel], list[Item]] | None = None
    """Where the questions depend on the model's context: instead of ``build``."""

    def items(self, data: Data, model: LanguageModel | None = None, shots: int | None = None) -> list[Item]:
        """The questions, in the data's order.

        Raises:
            EvaluationError: missing data, or shots that this protocol does not have.
        """
        k = self.shots if shots is None else shots
        if k < 0:
            raise EvaluationError(f"shots must be 0 or more, got {k}")
        if self.fixed_shots and k != self.shots:
            raise EvaluationError(f"{self.name} has a fixed prompt ({self.shots} shots): leave --shots out for it")
        if self.build_for is not None:
            assert model is not None, "this task is made for a model"
            return self.build_for(data, model)
        return self.build(data, k)


class Shots:
    """Examples drawn from a pool; see the module docstring."""

    def __init__(self, n: int, *, seed: int = 1234) -> None:
        self._n, self._random = n, random.Random(seed)

    def draw(self, pool: Sequence[T], without: T | None = None) -> list[T]:
        """The next question's examples.

        Raises:
            EvaluationError: the pool is too small.
        """
        if self._n == 0:
            return []
        if len(pool) < self._n + (without is not None):
            raise EvaluationError(
                f"{self._n} shots were asked for, but there are only {len(pool)} examples to draw from"
            )
        if without is None:
            return self._random.sample(pool, self._n)
        drawn = [one for one in self._random.sample(pool, self._n + 1) if one != without][: self._n]
        if len(drawn) < self._n:  # the question is in the pool more than once
            drawn = self._random.sample([one for one in pool if one != without], self._n)
        return drawn
