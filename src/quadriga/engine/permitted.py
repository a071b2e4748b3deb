"""What an answer's own rules leave of the vocabulary: ``allowed_token_ids`` and ``bad_words`` of its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Encodes(Protocol):
    """What bad words need of a tokenizer."""

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The token ids of a text."""
        ...


def bad_sequences(words: Iterable[str], tokenizer: Encodes) -> list[tuple[int, ...]]:
    """The tokens that spell each word, at the start of a text and after a space; each sequence once."""
    texts = [text for word in words for text in (word, " " + word)]
    return list(dict.fromkeys(tuple(tokenizer.encode(text)) for text in texts))


class Permitted:
    """The tokens that may come next in one answer; told of every token that is said.

    Args:
        allowed: the only ids that may be chosen; empty: all.
        bad: sequences of which the last token may not follow the others, in the answer.
        vocab_size: rows of the head, V.
    """

    def __init__(self, allowed: Sequence[int], bad: Sequence[tuple[int, ...]], vocab_size: int) -> None:
        self._always = np.full(vocab_size, not allowed)
        self._always[list(allowed)] = True
        self._always[[ids[0] for ids in bad if len(ids) == 1]] = False
        self._longer = [ids for ids in bad if len(ids) > 1]
        self._n_kept = max((len(ids) - 1 for ids in self._longer), default=0)
        self._last: tuple[int, ...] = ()

    def mask(self) -> NDArray[np.bool_]:
        """(V,): the tokens that may come next."""
        banned = [ids[-1] for ids in self._longer if self._last[-(len(ids) - 1) :] == ids[:-1]]
        if not banned:
            return self._always
        mask = self._always.copy()
        mask[banned] = False
        return mask

    def add(self, token: int) -> None:
        """A token of the answer."""
        if self._n_kept:
            self._last = (*self._last, token)[-self._n_kept :]
