"""DRY ("don't repeat yourself"): tokens that would go on with a repetition lose some of their logits.

    ... a b c d ... a b c       the last three tokens stood before d already: d loses multiplier * base^(3 - allowed)

As llama.cpp defines it (``llama_sampler_dry_apply`` of llama-sampler.cpp, after p-e-w's proposal for
text-generation-webui, #5677). Prompt and answer count alike. A repetition is followed back to the last breaker at most:
names, quotes and lines of a list may come again. ``csrc/dry.inl`` says the same in C++; tests hold the two together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

MOST_BREAKERS = 64
MOST_BYTES = 40
"""A breaker's, in UTF-8; llama.cpp cuts longer ones off."""
_MOST_REST = 20
"""Tokens of a breaker after the first, as llama.cpp has it."""
_LOG_LARGEST = 88.7228391
"""ln of the largest float32: powers stop short of it."""

BY_ITSELF, BEGINS = 1, 2


class Spells(Protocol):
    """What breakers need of a tokenizer."""

    n_vocab: int
    special_ids: dict[str, int]

    def is_token(self, token_id: int) -> bool:
        """True if a token has this id."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text."""
        ...

    def encode_continuation(self, text: str) -> list[int]:
        """The token ids of a text that continues another."""
        ...


class Breakers:
    """Where repetitions end, as token ids.

    Attributes:
        kinds: (V,) uint8: :data:`BY_ITSELF` where the token holds a breaker, :data:`BEGINS` where it is the first of a
            sequence of ``longer``.
        longer: sequences of at least two tokens.
        flat: the same for the kernels: the number of a sequence's tokens before them.
    """

    def __init__(self, vocab_size: int, alone: Iterable[int] = (), longer: Iterable[tuple[int, ...]] = ()) -> None:
        self.kinds = np.zeros(vocab_size, dtype=np.uint8)
        self.longer = tuple(dict.fromkeys(longer))
        self.kinds[np.fromiter(alone, np.int64)] |= BY_ITSELF
        self.kinds[[ids[0] for ids in self.longer]] |= BEGINS
        self.flat = np.array([n for ids in self.longer for n in (len(ids), *ids)], dtype=np.int32)


class Spellings:
    """The bytes of a whole vocabulary, to find breakers in: milliseconds, where a loop over its tokens takes a second.

    Args:
        vocab_size: rows of the head, V.
    """

    def __init__(self, tokenizer: Spells, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        n = min(tokenizer.n_vocab, vocab_size)
        words = [tokenizer.token_bytes(i) if tokenizer.is_token(i) else b"" for i in range(n)]
        for name, i in tokenizer.special_ids.items():  # llama.cpp looks for breakers in the names of control tokens
            if i < n:
                words[i] = name.encode()
        self._bytes = np.frombuffer(b"".join(words), dtype=np.uint8)
        self._ends = np.cumsum([len(word) for word in words])
        self._sizes = np.diff(self._ends, prepend=0)

    def breakers(self, texts: Iterable[str]) -> Breakers:
        """Texts as tokens: those that hold one, and those that end with the beginning of one, before its rest.

        A rest that would begin inside a character is left out: no text can be spelt from there.
        """
        alone: set[int] = set()
        longer: list[tuple[int, ...]] = []
        for text in texts:
            raw = text.encode()
            holding = set(self._holding(raw).tolist())
            alone |= holding
            for i in range(1, len(text)):
                heads = [head for head in self._ending(text[:i].encode()).tolist() if head not in holding]
                rest = self._tokenizer.encode_continuation(text[i:])[:_MOST_REST] if heads else []
                longer += [(head, *rest) for head in heads]
        return Breakers(self._vocab_size, sorted(alone), longer)

    def _holding(self, raw: bytes) -> NDArray[np.int64]:
        """Ids of the tokens that hold these bytes."""
        places = np.arange(len(self._bytes) - len(raw) + 1)
        for i, byte in enumerate(raw):
            places = places[self._bytes[places + i] == byte]
        ids = np.searchsorted(self._ends, places, side="right")
        found: NDArray[np.int64] = np.unique(ids[places + len(raw) <= self._ends[ids]])
        return found

    def _ending(self, raw: bytes) -> NDArray[np.int64]:
        """Ids of the tokens that end with these bytes."""
        ids = np.flatnonzero(self._sizes >= len(raw))
        for i, byte in enumerate(reversed(raw)):
            ids = ids[self._bytes[self._ends[ids] - 1 - i] == byte]
        return ids


class Dry:
    """The penalties of one answer; told of every token that is said.

    Args:
        last_n: how many of the last tokens are looked at; -1: all.
        prompt_ids: the tokens before the answer.
    """

    def __init__(
        self,
        multiplier: float,
        base: float,
        allowed_length: int,
        last_n: int,
        breakers: Breakers,
        prompt_ids: Sequence[int],
    ) -> None:
        self.multiplier, self.base, self.allowed_length, self.breakers = multiplier, base, allowed_length, breakers
        self._last_n = last_n
        self._n = len(prompt_ids)
        self._ids = np.zeros(self._n + 256, dtype=np.int32)
        self._ids[: self._n] = prompt_ids

    def add(self, token: int) -> None:
        """A token of the answer."""
        if self._n == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
        self._ids[self._n] = token
        self._n += 1

    def history(self) -> Ids:
        """The tokens that are looked at, the newest last; a view."""
        return self._ids[0 if self._last_n < 0 else max(0, self._n - self._last_n) : self._n]

    def penalties(self) -> tuple[Ids, NDArray[np.float32]]:
        """(ids, amounts): what is subtracted from the logits of which tokens, all different."""
        newest = self.history()[::-1]
        limit = self._since_breaker(newest) if len(newest) > self.allowed_length else -1
        if limit < self.allowed_length:
            return np.empty(0, np.int32), np.empty(0, np.float32)
        starts = np.arange(1, len(newest))
        lengths = np.zeros(len(newest), dtype=np.int64)  # of the repetition that ends before the last k tokens
        for length in range(1, limit + 1):
            starts = starts[starts + length <= len(newest)]
            starts = starts[newest[starts + length - 1] == newest[length - 1]]
            lengths[starts] = length
            if not len(starts):
                break
        ends = 1 + np.flatnonzero(lengths[1:] >= self.allowed_length)
        ids, which = np.unique(newest[ends - 1], return_inverse=True)
        longest = np.zeros(len(ids), dtype=np.int64)
        np.maximum.at(longest, which, lengths[ends])
        counts = self.breakers.kinds[ids] & BY_ITSELF == 0
        most = int(_LOG_LARGEST / math.log(self.base)) if self.base > 1.000001 else 0
        powers = (longest[counts] - self.allowed_length).tolist()
        amounts = [self.multiplier * self.base ** float(min(p, most) if most > 0 else p) for p in powers]
        return ids[counts], np.array(amounts, dtype=np.float64).astype(np.float32)

    def _since_breaker(self, newest: Ids) -> int:
        """How many tokens there are since the last breaker."""
        for i in np.flatnonzero(self.breakers.kinds[newest]).tolist():
            head, kind = int(newest[i]), int(self.breakers.kinds[newest[i]])
            rests = [0] if kind & BY_ITSELF else []
            for ids in self.breakers.longer:
                rest = len(ids) - 1
                if ids[0] == head and rest <= i and ids[1:] == tuple(newest[i - rest : i][::-1].tolist()):
                    rests.append(rest)
            if rests:
                return int(i - max(rests))
        return len(newest)
