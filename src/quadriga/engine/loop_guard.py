"""Notices an answer that says the same thing over and over, which small models end in."""

from __future__ import annotations

MAX_PERIOD = 64
"""Tokens of what is repeated, at most."""
COPIES = 5
TOKENS = 128
"""A loop is so many copies behind each other, of so many tokens together at least: a list of zeros is none."""


class LoopGuard:
    """Fed an answer token by token.

    Args:
        copies: how often the same tokens must stand behind each other.
        tokens: how many tokens that must be in all.
    """

    def __init__(self, *, copies: int = COPIES, tokens: int = TOKENS) -> None:
        self._copies, self._tokens = copies, tokens
        self._last: list[int] = []
        self._runs = [0] * MAX_PERIOD
        """Of every period p: how many of the last tokens equal the one p before them."""

    def push(self, token_id: int) -> bool:
        """True once the answer goes in circles."""
        last, loops = self._last, False
        for period in range(1, min(len(last), MAX_PERIOD) + 1):
            run = self._runs[period - 1] + 1 if last[-period] == token_id else 0
            self._runs[period - 1] = run
            loops = loops or run + period >= max(self._copies * period, self._tokens)
        last.append(token_id)
        del last[:-MAX_PERIOD]
        return loops
