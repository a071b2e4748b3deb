"""Choose a format for every matrix under a budget of bytes, from errors measured on calibration text.

Every matrix has an error for every format: what rounding it costs in nats of divergence a token, so that errors of
different matrices add up. The choice starts with the smallest format everywhere and spends the budget
where a byte reduces the error most. Per matrix only formats on the lower convex hull of (bytes, error) are considered,
so the greedy choice is optimal up to the last step (Everett 1963).

For an expert that few calibration tokens chose, the measured fraction is unreliable: at least half the mean is assumed.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from quadriga.errors import ConfigError


@dataclass(frozen=True)
class Candidate:
    """One format for one matrix, with its size and error."""

    format: str
    nbytes: int
    error: float
    """What it costs: nats of divergence a token (``edits.sensitivity``)."""


def protected_share(tokens: int, total: int, n_experts: int) -> float:
    """The fraction of tokens used as an expert's weight: as measured, but at least half of an equal share."""
    return max(tokens / total if total else 0.0, 0.5 / n_experts)


def choose(candidates: Mapping[str, list[Candidate]], budget: int, fixed: int = 0) -> dict[str, str]:
    """Choose a format for every matrix so that the total size is within the budget (in bytes).

    Args:
        candidates: matrix -> its formats.
        fixed: bytes of all that has no choice.

    Raises:
        ConfigError: even the smallest formats do not fit.
    """
    hulls = {name: _hull(options) for name, options in candidates.items()}
    chosen = dict.fromkeys(hulls, 0)
    spent = fixed + sum(hull[0].nbytes for hull in hulls.values())
    if spent > budget:
        raise ConfigError(
            f"the budget must be at least {spent / 1e9:.4g} GB, the size in the smallest formats; got "
            f"{budget / 1e9:.4g} GB"
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
    """The options on the lower convex hull of (bytes, error), smallest first."""
    kept: list[Candidate] = []
    for option in sorted(options, key=lambda c: (c.nbytes, c.error)):
        if kept and option.error >= kept[-1].error:
            continue
        kept.append(option)
        while len(kept) > 2 and _gain(kept, len(kept) - 3) <= _gain(kept, len(kept) - 2):
            del kept[-2]
    return kept
