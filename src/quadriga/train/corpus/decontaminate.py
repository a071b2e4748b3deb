"""Remove benchmark questions from training text: passages that share 13 consecutive words with a benchmark are cut out.

The method is GPT-3's (Brown et al. 2020, appendix C): a match and 200 characters on both sides are removed, the rest
becomes separate documents, and a document that would fall into many pieces is dropped. Benchmark strings of fewer than
13 words are not searched for, since they would match ordinary prose as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from quadriga.errors import CorpusError
from quadriga.train.corpus.readers import expand, resolve
from quadriga.train.corpus.recipe import Decontaminate
from quadriga.train.corpus.words import U64, Words, words

REFERENCES = (".jsonl", ".json", ".txt")


def reference_files(paths: list[str]) -> list[str]:
    """The benchmark files that a recipe's paths lead to."""
    return expand(paths, REFERENCES) if paths else []


def reference_ngrams(files: list[str], ngram: int) -> U64:
    """Sorted, distinct hashes of all word n-grams in the strings of the files.

    Raises:
        CorpusError: a file cannot be read.
    """
    found = [np.empty(0, dtype=np.uint64)]
    for file in files:
        grams = [words(text).ngrams(ngram) for text in _texts(file)]
        found.append(np.unique(np.concatenate(grams)) if grams else found[0])
    return np.unique(np.concatenate(found))


def _texts(path: str) -> Iterator[str]:
    file = resolve(path)
    try:
        if path.endswith(".txt"):
            yield file.read_text()
            return
        with file.open() as lines:
            rows = (
                [json.load(lines)] if path.endswith(".json") else (json.loads(line) for line in lines if line.strip())
            )
            for row in rows:
                yield from _strings(row)
    except (OSError, ValueError) as error:
        raise CorpusError(f"the benchmark file {path} cannot be read: {error}") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


class References:
    """The set of n-grams to search for. A bit table over the top 24 bits of the hashes rules out most look-ups."""

    _SHIFT = np.uint64(40)

    def __init__(self, grams: U64) -> None:
        self._grams = grams
        self._may_hold = np.zeros(1 << 24, dtype=bool)
        self._may_hold[grams >> self._SHIFT] = True

    def __len__(self) -> int:
        return len(self._grams)

    def find(self, grams: U64) -> Any:
        """Indices of the elements of ``grams`` that are in the set."""
        maybe = np.flatnonzero(self._may_hold[grams >> self._SHIFT])
        place = np.minimum(np.searchsorted(self._grams, grams[maybe]), max(0, len(self._grams) - 1))
        return maybe[self._grams[place] == grams[maybe]] if len(maybe) else maybe


@lru_cache(maxsize=1)
def load_references(path: Path) -> References:
    """Load the result of :func:`reference_ngrams` from a file; cached for a worker's next chunk."""
    return References(np.load(path))


def clean_pieces(text: str, found: Words, references: References, rules: Decontaminate) -> list[str] | None:
    """The text without matches: [text], the pieces between matches, or None if the document must be dropped."""
    hits = references.find(found.ngrams(rules.ngram))
    if len(hits) == 0:
        return [text]
    pieces, start = [], 0
    for first, last in _runs(
        found.starts[hits] - rules.margin_chars, found.ends[hits + rules.ngram - 1] + rules.margin_chars
    ):
        pieces.append(text[start : max(start, first)])
        start = last
    pieces.append(text[start:])
    kept = [piece.strip() for piece in pieces if len(piece.strip()) >= rules.min_chars]
    return kept if len(pieces) <= rules.max_pieces else None


def _runs(firsts: Any, lasts: Any) -> Iterator[tuple[int, int]]:
    """Merge overlapping ranges [first, last); both lists are ascending."""
    first, last = int(firsts[0]), int(lasts[0])
    for next_first, next_last in zip(firsts[1:].tolist(), lasts[1:].tolist(), strict=True):
        if next_first > last:
            yield first, last
            first = next_first
        last = max(last, next_last)
    yield first, last
