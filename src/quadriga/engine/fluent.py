"""Whose answers are in every pass: those of whoever has asked for few. Values in, values out.

    priority 0     client "a"  1 answer                       ─► in every pass
    priority 1000  client "b"  128 answers, of which 20 run   ─► as there is room

Among priorities first, then among clients, and where there is one client among its requests, rows are *fluent* that
belong to whoever has the fewest answers alive, running or waiting, or up to twice as many. Equals so are all in every
pass, a crowd leaves room to the few beside it, and a higher priority, which begins first, slows down nobody who speaks
already. What was asked for in the background is never fluent beside any other answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from quadriga.engine.sequences import Running


def _priority(sequence: Running) -> Hashable:
    return "priority", sequence.priority


def _client(sequence: Running) -> Hashable:
    return "client", sequence.client


def _request(sequence: Running) -> Hashable:
    return "request", sequence.client, sequence.group


class Asked:
    """How many answers are alive of every priority, client and request; texts to embed are no answers, and those of the
    background are not counted."""

    def __init__(self) -> None:
        self._counts: Counter[Hashable] = Counter()

    def add(self, sequence: Running) -> None:
        """It has been asked for."""
        self._counts.update(_names(sequence))

    def end(self, sequence: Running) -> None:
        """It is over."""
        for name in _names(sequence):
            self._counts[name] -= 1
            if not self._counts[name]:
                del self._counts[name]

    def fluent(self, rows: Sequence[Running]) -> set[Running]:
        """The rows that are in every pass, of those that decode."""
        rows = [s for s in rows if not s.unhurried] or rows
        rows = self._fewest(rows, _priority)
        return set(self._fewest(rows, _client if len({s.client for s in rows}) > 1 else _request))

    def check(self, alive: Sequence[Running]) -> None:
        """Assert that what is alive is counted, and nothing else."""
        assert self._counts == Counter(name for s in alive for name in _names(s)), "answers are counted"

    def _fewest(self, rows: Sequence[Running], name_of: Callable[[Running], Hashable]) -> Sequence[Running]:
        """The rows of whoever has the fewest answers, or up to twice as many."""
        if len(rows) < 2:
            return rows
        counts = [self._counts[name_of(s)] for s in rows]
        few = 2 * min(counts)
        return [s for s, n in zip(rows, counts, strict=True) if n <= few]


def _names(sequence: Running) -> list[Hashable]:
    """What a sequence is counted under."""
    if sequence.embeds or sequence.unhurried:
        return []
    return [_priority(sequence), _client(sequence), _request(sequence)]
