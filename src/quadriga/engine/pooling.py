"""One vector of a text's hidden states, whatever passes they were computed in.

    states of positions 0..511 ─ sum ─┐
    states of positions 512..1023 ────┼─► total ─► / its length
    ...                               ┘

Sums depend on where they are cut, so they are cut at multiples of :data:`SUM_TOKENS` positions and nowhere else: how a
text was cut into passes, and who shared them, changes no bit.
"""

from __future__ import annotations

import numpy as np

from quadriga.runners.base import Floats

SUM_TOKENS = 512


class Pooling:
    """A text on its way through passes.

    Args:
        d_model: numbers of a state.
    """

    def __init__(self, d_model: int) -> None:
        self._total: Floats = np.zeros(d_model, dtype=np.float32)
        self._parts: list[Floats] = []  # of the sum that is not complete
        self._n = 0

    def add(self, start: int, states: Floats) -> None:
        """The next positions' states (n, D) float32. Position 0 begins anew."""
        if start == 0:
            self._total, self._parts, self._n = np.zeros_like(self._total), [], 0
        assert start == self._n, "states come in order"
        while len(states):
            room = SUM_TOKENS - self._n % SUM_TOKENS
            part, states = states[:room], states[room:]
            self._n += len(part)
            if len(part) == room:
                self._total += np.concatenate([*self._parts, part]).sum(0)
                self._parts = []
            else:
                self._parts.append(part.copy())

    def vector(self) -> Floats:
        """(D,) float32 of length 1; NaN where the states were not finite. After the last position."""
        total = self._total + np.concatenate(self._parts).sum(0) if self._parts else self._total
        vector: Floats = total / np.maximum(np.sqrt(np.square(total).sum()), np.float32(1e-12))
        return vector
