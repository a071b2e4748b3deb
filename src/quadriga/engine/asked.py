"""What callers hand to the offline API, held to what it must be before anything runs.

Python lets anything through: bytes are whole numbers too, a text is an iterable of letters, a dict of settings has no
``temperature``. Taken as they come, such values give answers to something that nobody asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from quadriga.engine.request import SamplingParams, seed_of
from quadriga.errors import RequestError, TemplateError
from quadriga.model.steering import ExpertFactor

Message = Mapping[str, str]
"""One turn: {"role": "system" | "user" | "assistant", "content": text}."""

TokenIds = Sequence[int] | NDArray[np.integer[Any]]
"""Of one sequence. What NumPy reads as whole numbers will do, a tensor on the CPU too."""

T = TypeVar("T")


def several(given: Iterable[T], what: str) -> Iterable[T]:
    """``given``, unless it is one text (that is an iterable of texts too, of a letter each) or one of something else.

    Raises:
        RequestError: it is.
    """
    if isinstance(given, (str, bytes)):
        raise RequestError(f"{what} must be several, e.g. a list; got the text {given[:40]!r}. Put it into a list.")
    try:
        iter(given)
    except TypeError:
        raise RequestError(f"{what} must be several, e.g. a list; got {given!r:.80}") from None
    return given


def pairs(given: Iterable[tuple[TokenIds, TokenIds]]) -> list[tuple[TokenIds, TokenIds]]:
    """Contexts and their continuations.

    Raises:
        RequestError: something that is no pair of lists.
    """
    found = list(several(given, "pairs"))
    for one in found:
        if not isinstance(one, (list, tuple)) or len(one) != 2:
            raise RequestError(f"each of the pairs must be (context ids, continuation ids), got {one!r:.80}")
    return found


def sampling(params: SamplingParams | None) -> SamplingParams:
    """``params``, or the defaults where there are none.

    Raises:
        RequestError: it is something else.
    """
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise RequestError(f"params must be SamplingParams(...) or None, got {params!r:.80}")
    return params


def each_sampling(params: SamplingParams | Sequence[SamplingParams] | None, n_prompts: int) -> list[SamplingParams]:
    """``params`` for every prompt.

    Raises:
        RequestError: they are something else, or as many as there are no prompts.
    """
    if not isinstance(params, (list, tuple)):
        return [sampling(params)] * n_prompts  # type: ignore[arg-type]  # other sequences are refused there
    if len(params) != n_prompts:
        raise RequestError(f"{n_prompts} prompts need as many params, got {len(params)}")
    return [sampling(one) for one in params]


def of_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """``params`` for one of several answers to a prompt, counted from 0."""
    return params if params.seed is None or not choice else replace(params, seed=seed_of(params.seed, choice))


def adapter_name(name: str | None) -> str | None:
    """``name``.

    Raises:
        RequestError: it is neither a text nor None.
    """
    if name is not None and not isinstance(name, str):
        raise RequestError(f"an adapter is asked for by its name, a text; got {name!r:.80}")
    return name


def factors(steering: Iterable[ExpertFactor]) -> tuple[ExpertFactor, ...]:
    """``steering``.

    Raises:
        RequestError: it is something else.
    """
    found = tuple(several(steering, "steering"))
    if not all(isinstance(one, ExpertFactor) for one in found):
        raise RequestError(f"steering must be of ExpertFactor(...), got {found!r:.80}")
    return found


def turns(messages: str | Sequence[Message]) -> list[Message]:
    """A conversation, of which a text is the user's only message.

    Raises:
        TemplateError: it is neither.
    """
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, (list, tuple)):
        raise TemplateError(f"messages must be a text or a list of messages, got {messages!r:.80}")
    return list(messages)


def token_ids(given: TokenIds, vocab_size: int, most: int) -> list[int]:
    """The ids of one sequence.

    Args:
        vocab_size: they are below it.
        most: there are no more of them.

    Raises:
        RequestError: none, too many, or something that is no id.
    """
    # Before an array is made of them: of millions it takes a while, in which no other thread can run.
    if isinstance(given, (list, tuple, range)):
        _check_count(len(given), most)
    try:
        ids = np.asarray(given)
    except (ValueError, TypeError, OverflowError):  # rows of several lengths
        raise RequestError(f"a prompt must be text or a list of token ids, got {given!r:.80}") from None
    if ids.ndim != 1:
        raise RequestError(f"a prompt must be text or a list of token ids, got {given!r:.80}")
    if ids.size == 0:
        raise RequestError("a prompt needs at least one token")
    if ids.dtype.kind not in "iu":  # beyond 64 bits, or something else than whole numbers
        raise RequestError(f"token ids must be whole numbers from 0 to {vocab_size - 1}, got {given!r:.80}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise RequestError(f"token ids must be from 0 to {vocab_size - 1}, got {int(ids.min())} to {int(ids.max())}")
    _check_count(len(ids), most)
    checked: list[int] = ids.tolist()
    return checked


def _check_count(n_tokens: int, most: int) -> None:
    if n_tokens > most:
        raise RequestError(f"{n_tokens} tokens exceed the model's context of {most}")
