"""What is computed behind everything else, lines of batches above all, and how it moves all the same.

    line 1, 2, 3, ... of the background ──one at a time, while there is anything else──► a request of the usual priority
             └── the others: when nobody else wants the place

Strictly behind, a batch would stand still for as long as the server is busy. So one sequence of it, whoever asked for
it, has its turns and keeps its place like anybody's request until it is done; then the next one does: of those that run
the oldest, else of those that wait the first in line (by turns of clients). It is still in no pass that the answers of
others would have to themselves (``engine.fluent``).
"""

from __future__ import annotations

from collections.abc import Sequence

from quadriga.engine.sequences import BACKGROUND, Running
from quadriga.engine.turns import Turns


class Background:
    """How many sequences are behind everything else, and the one that is not any more.

    Args:
        waiting: the scheduler's queue.
    """

    def __init__(self, waiting: Turns[Running]) -> None:
        self._waiting = waiting
        self._n = 0
        self._lifted: Running | None = None

    def add(self, sequence: Running) -> None:
        """A sequence has been asked for, of whatever priority."""
        self._n += sequence.in_background

    def end(self, sequence: Running) -> None:
        """It is over."""
        self._n -= sequence.in_background
        if self._lifted is sequence:
            self._lifted = None

    def lift(self, running: Sequence[Running], n_alive: int) -> None:
        """Before a pass: one goes on with the usual priority, if there is anything else and none does so yet."""
        if self._lifted is not None or not self._n or self._n == n_alive:
            return
        behind = [s for s in running if s.in_background]
        line = min(behind, key=lambda s: s.arrival) if behind else self._waiting.first_of(BACKGROUND)
        if line is None:
            return  # it has no place and waits for its token, which is chosen beside the passes
        waits = line.state == "waiting"
        if waits:
            self._waiting.take(line)
        self._waiting.done(line)
        line.priority = 0
        self._n -= 1
        self._lifted = line
        self._waiting.add(line)
        if not waits:
            self._waiting.take(line)

    def check(self, alive: Sequence[Running]) -> None:
        """Assert that what is behind is counted."""
        assert self._n == sum(s.in_background for s in alive), "the background is counted"
