"""A text as 64-bit hashes of its words, computed in NumPy for a whole text at a time; the basis of all filters.

    words      sequences of letters, digits and marks, in lower case; single characters in scripts without spaces
    hash       of a word: sum of h(c_i) P^i over its characters, modulo 2^64, then mixed
    n-gram     sum of hash(w_i) C_i, then mixed

The sums are computed as prefix sums, without a Python loop over words; modulo 2^64 with odd P they are exact and
invertible. Hashes are the same on every machine, so they can be stored and compared between runs.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

_KNOWN = 0x33480  # letters are below; above are tags, variation selectors and private-use characters
_P = 0x9E3779B97F4A7C15
_WORD, _SINGLE = 1, 2
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "YI ")
"""Prefixes of the Unicode names of characters that count as words by themselves."""


@dataclass(frozen=True)
class Words:
    """The words of a text: word i is text[starts[i]:ends[i]]."""

    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    hashes: U64
    n_letters: int
    """Number of characters in words."""

    def __len__(self) -> int:
        return len(self.hashes)

    def ngrams(self, n: int) -> U64:
        """Hash of each sequence of ``n`` words; empty if the text has fewer."""
        count = len(self.hashes) - n + 1
        if count <= 0:
            return np.empty(0, dtype=np.uint64)
        total = np.zeros(count, dtype=np.uint64)
        for i in range(n):
            total += self.hashes[i : i + count] * _constant(i)
        return mix(total)


def words(text: str) -> Words:
    """Split ``text`` into words; lone surrogates are separators."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    kinds, folded = _tables()
    known = np.minimum(points, _KNOWN - 1)
    kind = kinds[known]
    inside = kind > 0
    before = np.concatenate((np.zeros(1, dtype=kind.dtype), kind[:-1])) if len(kind) else kind
    opens = inside & ((before == 0) | (kind == _SINGLE) | (before == _SINGLE))
    starts = np.flatnonzero(opens)
    closes = np.empty_like(inside)
    if len(inside):
        closes[:-1] = inside[:-1] & (~inside[1:] | opens[1:])
        closes[-1] = inside[-1]
    ends = np.flatnonzero(closes) + 1
    powers, inverses = _powers(1 << max(12, len(points).bit_length()))
    summed = np.empty(len(points) + 1, dtype=np.uint64)
    summed[0] = 0
    np.cumsum(folded[known] * powers[: len(points)], out=summed[1:])
    hashes = mix((summed[ends] - summed[starts]) * inverses[starts])
    return Words(starts, ends, hashes, int(inside.sum()))


def mix(values: U64) -> U64:
    """SplitMix64's finaliser: a bijection in which every output bit depends on every input bit."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=1)
def _tables() -> tuple[npt.NDArray[np.uint8], U64]:
    """(kind of each character, hash of its lower case)."""
    kinds = np.zeros(_KNOWN, dtype=np.uint8)
    lower = np.arange(_KNOWN, dtype=np.uint64)
    for point in range(_KNOWN):
        character = chr(point)
        if unicodedata.category(character)[0] in "LNM":
            kinds[point] = _WORD
            if point >= 0xE00 and unicodedata.name(character, "").startswith(_UNSPACED):
                kinds[point] = _SINGLE
            small = character.lower()
            if len(small) == 1:
                lower[point] = ord(small)
    return kinds, mix(lower + np.uint64(_P))


_CACHE: dict[int, tuple[U64, U64]] = {}


def _powers(n: int) -> tuple[U64, U64]:
    """P^i and P^-i modulo 2^64 for i < n, a power of two; cached for the next text."""
    if n not in _CACHE:
        _CACHE.clear()
        bases = np.array([_P, pow(_P, -1, 1 << 64)], dtype=np.uint64)
        table = np.repeat(bases[:, None], n, axis=1)
        table[:, 0] = 1
        table = table.cumprod(axis=1, dtype=np.uint64)
        _CACHE[n] = (table[0], table[1])
    return _CACHE[n]


@lru_cache(maxsize=64)
def _constant(i: int) -> np.uint64:
    return np.uint64(int(mix(np.array([i + 1], dtype=np.uint64))[0]) | 1)
