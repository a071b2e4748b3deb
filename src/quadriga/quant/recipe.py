"""Which weight gets which format under a budget of bytes: arithmetic on measured sensitivities, no tensors.

Every matrix has, for every format, an error: the share of its output's energy that rounding its weights turns into
noise, on calibration text, times the share of tokens that reach it. The recipe starts with the cheapest format
everywhere and spends the budget where a byte buys most. Per matrix only formats on the lower convex hull of
(bytes, error) are considered, which makes the greedy choice optimal up to the last step (Everett 1963).

An expert that few calibration tokens chose is known badly: its share counts as at least half of an even one.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from quadriga.errors import ConfigError


@dataclass(frozen=True)
class Candidate:
    """One way to store one matrix."""

    format: str
    nbytes: int
    error: float
    """Noise energy / signal energy of its output, times the share of tokens that reach it."""


def protected_share(tokens: int, total: int, n_experts: int) -> float:
    """The share of tokens an expert is weighted with: what was measured, at least half of an even share."""
    return max(tokens / total if total else 0.0, 0.5 / n_experts)


def choose(candidates: Mapping[str, list[Candidate]], budget: int) -> dict[str, str]:
    """A format for every matrix, total bytes within the budget.

    Raises:
        ConfigError: even the smallest formats do not fit.
    """
    hulls = {name: _hull(options) for name, options in candidates.items()}
    chosen = dict.fromkeys(hulls, 0)
    spent = sum(hull[0].nbytes for hull in hulls.values())
    if spent > budget:
        raise ConfigError(
            f"the budget is {budget / 1e9:.2f} GB, the smallest formats take {spent / 1e9:.2f} GB. Give at least that."
        )
    heap = [(-_gain(hull, 0), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        hull, at = hulls[name], chosen[name]
        extra = hull[at + 1].nbytes - hull[at].nbytes
        if spent + extra > budget:
            continue  # a smaller matrix may still fit
        spent += extra
        chosen[name] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(heap, (-_gain(hull, at + 1), name))
    return {name: hulls[name][at].format for name, at in chosen.items()}


def _gain(hull: list[Candidate], at: int) -> float:
    return (hull[at].error - hull[at + 1].error) / (hull[at + 1].nbytes - hull[at].nbytes)


def _hull(options: list[Candidate]) -> list[Candidate]:
    """The options from cheapest to best, without those that another or a mix of two beats."""
    kept: list[Candidate] = []
    for option in sorted(options, key=lambda c: (c.nbytes, c.error)):
        if kept and option.error >= kept[-1].error:
            continue
        kept.append(option)
        while len(kept) > 2 and _gain(kept, len(kept) - 3) <= _gain(kept, len(kept) - 2):
            del kept[-2]
    return kept
