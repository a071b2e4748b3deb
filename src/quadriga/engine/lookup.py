"""Prompt-lookup drafts: what followed the last time these words were said is a good guess at what follows now.

No second model: the guess is the continuation of the longest recent match of the last 3, then 2 tokens. The engine
checks all guesses in one pass and keeps those the model itself would have chosen, so only the time changes (Saxena
2023; also `prompt_lookup_num_tokens` in transformers).
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST, _SHORTEST = 3, 2


class Lookup:
    """Finds earlier occurrences of a sequence's last tokens. Grows with the sequence: each token is indexed once."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> index after its latest occurrence
        self._indexed = 0

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to ``most`` tokens that followed the latest earlier occurrence of the last ones; may be empty."""
        # An n-gram is indexed when a token follows it, so the last ones of the sequence never match themselves.
        for end in range(max(self._indexed, _SHORTEST), len(tokens)):
            for length in range(_SHORTEST, _LONGEST + 1):
                if end >= length:
                    self._ends[tuple(tokens[end - length : end])] = end
        self._indexed = len(tokens)
        for length in range(_LONGEST, _SHORTEST - 1, -1):
            found = self._ends.get(tuple(tokens[-length:])) if len(tokens) > length else None
            if found is not None:
                return list(tokens[found : found + most])
        return []
