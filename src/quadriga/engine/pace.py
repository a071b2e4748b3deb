"""How much of others' work may share a pass with the answers that are being spoken, by what passes have taken.

    pass:   t t t [t + prompts] t t t [t + prompts] ...          t: the fluent answers' own tokens
    time:   ─ ─ ─ ────────────── ─ ─ ─ ──────────────            on average at most STRETCH times as long as t alone

An answer waits for the whole pass that its token is in, so what else is in it is time that its reader waits: prompts,
texts to embed, and the many answers of a client who asks for many at once. All this is put into a pass only while its
share of the time is not used up: what it adds to passes may be STRETCH - 1 times what the fluent answers take alone.
Where it adds little (on a GPU, whose weights are read once for all tokens of a pass) it is in every pass; where every
token costs (a small model on a CPU) the passes between are the answers' own. And one pass that took more than STRETCH
times what the answers take alone is followed by at least OWN of their own, so that most tokens come sooner than that,
not only the mean.

Prompts come in pieces of 32, 64, 128, ... tokens, other answers in pieces of 1, 2, 4, ... rows: the largest that adds
no more than a short pause, but none so small that its tokens cost half as much again as in the best (the experts of a
large mixture are read for 32 tokens as for 512). Sizes that were not measured yet are tried, larger ones as long as
they are worth it. Where nobody speaks yet but several wait, pieces are longer, and cost at most a tenth more.

Time is measured, because nothing else says what a token costs on this machine, beside whatever else runs on it. Only
the order of the work depends on it, never a result.
"""

from __future__ import annotations

STRETCH = 3.0
"""The mean time between an answer's tokens, others' work included, as a multiple of its time alone."""

OWN = 2
"""Passes of fluent answers alone after one that took more than STRETCH times as long as they do: two of three."""

PAUSE_S = 0.1
"""A piece should add no more than this to a pass, or than twice what the pass takes without it."""

TURN_S = 0.25
"""Where nobody speaks yet, a pass of several requests should take no longer than this: who comes then waits for it."""

SMALLEST = 32
"""Tokens of a piece of a prompt: fewer take the kernels as long."""

_WORTH_IT = 0.8
"""A size whose tokens cost this much of what the next smaller one's cost makes the next larger one worth a try."""

_MOST_DEBT = 64
"""Others' work waits for at most so many passes of fluent answers."""

_WEIGHT = 0.2
"""Of the newest measurement in a running mean; more where the one before it is over 8 passes old."""

_FRESH_PASSES = 256
"""A measurement that is older is made again."""

_ALONE_PASSES = 48
"""So is what fluent answers take alone, which all else is measured by: at the latest after so many passes."""


class _Known:
    """Running means that are forgotten when they are old. Time is the number of the pass."""

    def __init__(self) -> None:
        self._means: dict[int, tuple[float, int]] = {}

    def add(self, key: int, value: float, now: int) -> None:
        """Something was measured."""
        mean = self.get(key, now)
        if mean is not None:
            weight = max(_WEIGHT, 1 - (1 - _WEIGHT) ** ((now - self._means[key][1]) / 8))
            value = mean + weight * (value - mean)
        self._means[key] = (value, now)

    def get(self, key: int, now: int, fresh: int = _FRESH_PASSES) -> float | None:
        """A mean, if it is fresh."""
        mean, at = self._means.get(key, (0.0, now - fresh))
        return mean if now - at < fresh else None

    def fresh(self, now: int) -> dict[int, float]:
        """All that is."""
        return {key: mean for key, (mean, at) in self._means.items() if now - at < _FRESH_PASSES}


class _Pieces:
    """Pieces of one kind of work: ``smallest``, twice, four times as many tokens, ...; what a token of each costs."""

    def __init__(self, smallest: int, most: int) -> None:
        self._smallest, self._most = smallest, most
        self._cost = _Known()
        """Size -> mean seconds that each of its tokens adds to a pass."""

    def record(self, n_tokens: int, seconds: float, now: int) -> None:
        """So many tokens have added so many seconds to a pass."""
        size = self._smallest
        while size < n_tokens:
            size *= 2
        if n_tokens > 3 * size // 4:  # else it says little of this size
            self._cost.add(size, max(1e-9, seconds) / n_tokens, now)

    def next(self, pause_s: float, dearer: float, now: int, known: float = 0.0) -> int:
        """The size of the next piece.

        Args:
            pause_s: how long it should take at most.
            dearer: how much more than the best its tokens may cost.
            known: what a token costs in a larger piece than any, if that is known.
        """
        costs = self._cost.fresh(now)
        # A token costs no less in a smaller piece than in a larger one: what says otherwise was measured by chance.
        least: dict[int, float] = {}
        dearest = known
        for size in sorted(costs, reverse=True):
            dearest = least[size] = max(dearest, costs[size])
        best = known or least.get(max(costs, default=0), 0.0)
        size = self._smallest
        while size < self._most and size in costs:  # else it is tried
            larger = least.get(2 * size)
            if least[size] <= dearer * best and 2 * size * (larger or least[size]) > pause_s:
                smaller = least.get(size // 2)
                untried = larger is None and (smaller is None or least[size] <= _WORTH_IT * smaller)
                return 2 * size if untried else size
            size *= 2
        return size


class Pace:
    """See the module docstring. Nothing here reads a clock: who runs the passes says how long they took."""

    def __init__(self, max_batch_tokens: int) -> None:
        self._alone = _Known()
        """Rows that decode -> mean seconds of a pass of nothing else."""
        self._prompts, self._rows = _Pieces(SMALLEST, max_batch_tokens), _Pieces(1, max_batch_tokens)
        self._credit = 0.0
        """Seconds that others' work may still add."""
        self._own = 0
        """Passes that the fluent answers have to themselves before others' work shares one again."""
        self._passes = 0

    def room(self, n_fluent: int) -> tuple[int, int]:
        """What may share the next pass with so many rows of fluent answers; 0: what others' prompts may share.

        Returns:
            (tokens of prompts, rows of other answers).
        """
        if not n_fluent:
            return self._prompts.next(TURN_S, 1.1, self._passes), 0
        alone = self._seconds(n_fluent, _ALONE_PASSES)
        if alone is None or self._credit < 0 or self._own:
            return 0, 0
        pause_s = max(PAUSE_S, 2 * alone)
        known = self._alone.fresh(self._passes)
        most = max(known)
        each = (known[most] - alone) / (most - n_fluent) if most > n_fluent else 0.0
        n_prompt = self._prompts.next(pause_s, 1.5, self._passes)
        return n_prompt, self._rows.next(pause_s, 1.5, self._passes, each)

    def record(self, n_fluent: int, n_rows: int, n_prompt: int, seconds: float) -> None:
        """A pass has run.

        Args:
            n_fluent: its rows of fluent answers.
            n_rows: all its rows that decode, these included.
            n_prompt: its tokens of prompts.
            seconds: what it took.
        """
        self._passes += 1
        rows = self._seconds(n_rows) if n_rows else 0.0
        if not n_prompt:
            self._alone.add(n_rows, seconds, self._passes)
        elif rows is not None:
            self._prompts.record(n_prompt, seconds - rows, self._passes)
        alone = self._seconds(n_fluent) if n_fluent else None
        if alone is None:
            return
        self._own = OWN if (n_rows > n_fluent or n_prompt) and seconds > STRETCH * alone else max(0, self._own - 1)
        others, added = n_rows - n_fluent, max(0.0, seconds - alone)
        if others and not n_prompt:
            self._rows.record(others, added, self._passes)
        # What was not used is not kept for later, nor is all of a pass that took long for another reason.
        share = (STRETCH - 1) * alone
        spent = added if others or n_prompt else 0.0
        self._credit = max(-_MOST_DEBT * share, min(share, self._credit + share - spent))

    def _seconds(self, n_rows: int, fresh: int = _FRESH_PASSES) -> float | None:
        """What a pass of so many rows takes, or of somewhat fewer where it is not known; None if nothing is known."""
        for n in range(n_rows, (n_rows - 1) // 2, -1):
            seconds = self._alone.get(n, self._passes, fresh)
            if seconds is not None:
                return seconds
        return None
