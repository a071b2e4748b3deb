"""The interface that evaluation needs from a model: texts in, log-probabilities and texts out.

``engine.text_model.TextModel`` implements it for a model in this process, ``evaluate.endpoints`` for models behind an
HTTP API. Tasks do not know which one they use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

Done = Callable[[int], None]
"""Progress callback: called with the number of requests just answered."""


def quietly(n: int) -> None:
    """A :data:`Done` that does nothing."""


Message = Mapping[str, str]
"""A turn of a conversation: role (system, user, assistant) and content."""


class Likelihood(Protocol):
    """How probable a text is under the model."""

    @property
    def logprob(self) -> float:
        """Natural logarithm of the probability of the whole text."""
        ...

    @property
    def greedy(self) -> bool:
        """True if each token was the most probable one at its position."""
        ...

    @property
    def n_tokens(self) -> int:
        """Number of tokens of the text."""
        ...


class LanguageModel(Protocol):
    """A model that scores and continues texts. All methods return results in the order of the requests."""

    @property
    def name(self) -> str:
        """The model's name as shown in tables."""
        ...

    @property
    def identity(self) -> Mapping[str, str]:
        """Everything that determines results (hash of the weights or address, formats, options); kept with them."""
        ...

    @property
    def context(self) -> int:
        """Context length: the most tokens that prompt and answer may have together."""
        ...

    def loglikelihoods(self, requests: Sequence[tuple[str, str]], *, done: Done = quietly) -> Sequence[Likelihood]:
        """Score (context, continuation) pairs: how probable each continuation is after its context.

        Raises:
            EvaluationError: not supported by this model (an API without log-probabilities).
        """
        ...

    def rolling(self, texts: Sequence[str], *, done: Done = quietly) -> Sequence[Likelihood]:
        """Score whole texts from their first token on, in windows of ``context`` tokens that do not overlap.

        Raises:
            EvaluationError: not supported by this model.
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
        """Continue each prompt. The answer ends before the first stop string. Prompt i samples with ``seed + i``."""
        ...

    def converse(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        done: Done = quietly,
    ) -> list[str]:
        """Give the assistant's next turn of each conversation. Conversation i samples with ``seed + i``.

        Raises:
            EvaluationError: not a chat model.
        """
        ...

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a text, for tasks that build prompts of a given length.

        Raises:
            EvaluationError: not supported by this model.
        """
        ...
