"""What evaluation needs of a model: texts in, log-probabilities and texts out.

``engine.text_model.TextModel`` is one (a model in this process); ``evaluate.endpoints`` has the others (models behind
an HTTP interface). A task never knows which it talks to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

Done = Callable[[int], None]
"""Called with the number of requests that have just been answered."""


def quietly(n: int) -> None:
    """A :data:`Done` that shows nothing."""


class Likelihood(Protocol):
    """How probable a text was."""

    @property
    def logprob(self) -> float:
        """Natural-log probability of all its tokens together."""
        ...

    @property
    def greedy(self) -> bool:
        """Each token was the most probable one."""
        ...

    @property
    def n_tokens(self) -> int:
        """Tokens it has."""
        ...


class LanguageModel(Protocol):
    """Answers in the order of the requests."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def identity(self) -> Mapping[str, str]:
        """What results are kept with: the hash of its weights or the address, formats, options."""
        ...

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        ...

    def loglikelihoods(self, requests: Sequence[tuple[str, str]], *, done: Done = quietly) -> Sequence[Likelihood]:
        """How probable each continuation is after its context.

        Raises:
            EvaluationError: the model cannot say (an endpoint without log-probabilities).
        """
        ...

    def rolling(self, texts: Sequence[str], *, done: Done = quietly) -> Sequence[Likelihood]:
        """How probable each whole text is, from its first token on, in windows as long as the context.

        Raises:
            EvaluationError: the model cannot say.
        """
        ...

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int | None = None,
        done: Done = quietly,
    ) -> list[str]:
        """Continue each prompt; a stop string is not part of the answer. Prompt i samples with ``seed + i``."""
        ...

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, for tasks that ask for a length.

        Raises:
            EvaluationError: the model cannot say.
        """
        ...
