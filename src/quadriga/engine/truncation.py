"""Which tokens a draw is between, and the draw: top-k, typical, top-p, min-p and XTC on weights, in NumPy.

The vocabulary is never sorted. What top-p keeps are the largest weights whose sum reaches its part of all: as many of
the largest as may be enough are selected, and only these are sorted (:func:`kept`). The result is that of a full,
stable sort: weights and sums are the same numbers, and equal weights keep the lower token id first.

A draw depends on the seed and the position in the answer alone: Philox (Salmon et al. 2011) keyed by the seed, counted
by the position.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ids = NDArray[np.int64]


def uniforms(seed: int, position: int) -> tuple[float, float]:
    """The two numbers in [0, 1), of 53 bits, that a seed has for a position: a token's draw, and whether XTC acts."""
    first, second = (np.random.Philox(key=seed, counter=position).random_raw(2) >> 11).tolist()
    return first * 2.0**-53, second * 2.0**-53


_BLOCK = 256


def pick(weights: Floats, at: float) -> int:
    """The index in whose part of the summed weights (N,) the place ``at``, in [0, 1), lies; one of weight 0 never.

    Sums are float64, and of blocks first: a running sum over a whole vocabulary takes as long as all the rest.
    """
    n_whole = len(weights) // _BLOCK * _BLOCK
    blocks = weights[:n_whole].reshape(-1, _BLOCK).sum(1, dtype=np.float64)
    ends = np.append(blocks, weights[n_whole:].sum(dtype=np.float64)).cumsum()
    place = at * ends[-1]
    block = _first_beyond(ends, place)
    before = ends[block - 1] if block else 0.0
    inside = np.append(before, weights[block * _BLOCK : (block + 1) * _BLOCK].astype(np.float64)).cumsum()[1:]
    return block * _BLOCK + _first_beyond(inside, place)


def _first_beyond(ends: Floats, place: float) -> int:
    """The first index whose running sum exceeds ``place``; where rounding leaves none, the first of the whole sum."""
    index = int(np.searchsorted(ends, place, side="right"))
    return index if index < len(ends) else int(np.searchsorted(ends, ends[-1]))


def keep_only(weights: Floats, ids: Ids | None) -> None:
    """All but these weigh nothing; None: all stay."""
    if ids is not None:
        stays = weights[ids]
        weights[:] = 0.0
        weights[ids] = stays


def typical(weights: Floats, logs: Floats, part: float) -> Ids:
    """The tokens of information nearest to the entropy, the nearest first, until they have ``part`` of all weights.

    Args:
        logs: of the weights; the difference from the entropy is ln w less the mean of ln w under the weights.
    """
    ids = np.flatnonzero(weights)
    w, total = weights[ids].astype(np.float64), weights.sum(dtype=np.float64)
    mean = np.float32((weights[ids] * logs[ids]).sum(dtype=np.float64) / total)
    order = np.argsort(np.abs(logs[ids] - mean), kind="stable")
    before = w[order].cumsum() - w[order]
    reached: Ids = ids[order[before < part * total]]
    return reached


def excluded(weights: Floats, threshold: float) -> Ids:
    """The tokens with at least ``threshold`` of all weights but the least likely of them, the last of equal ones."""
    likely = np.flatnonzero((weights > 0) & (weights >= threshold * weights.sum(dtype=np.float64)))
    return _ranked(weights, likely)[:-1]


def kept(weights: Floats, top_k: int, top_p: float, min_p: float) -> Ids | None:
    """The tokens that top-k, then top-p, then min-p leave; the best one stays.

    Args:
        weights: (V,), not negative: probabilities, or in proportion to them.

    Returns:
        Their ids, the largest weight first and the lower id first of equal ones; None where all stay.
    """
    if top_k == 0 and top_p == 1.0 and min_p == 0.0:
        return None
    if top_k:
        ids = top_ids(weights, min(top_k, len(weights)))
    elif top_p < 1.0:
        ids = _reaching(weights, top_p)
    else:
        ids = _ranked(weights, np.flatnonzero(weights >= min_p * weights.max()))
    ordered = weights[ids]
    if top_p < 1.0:
        sums = ordered.cumsum(dtype=np.float64)
        total = sums[-1] if top_k else weights.sum(dtype=np.float64)
        # A token stays where the better ones' sum is short of it; sums[:-1] is what lies before each but the first.
        ids = ids[: 1 + int(np.count_nonzero(sums[:-1] < top_p * total))]
        ordered = ordered[: len(ids)]
    if min_p > 0.0:
        ids = ids[: max(1, int(np.count_nonzero(ordered >= min_p * ordered[0])))]
    return ids


def top_ids(values: Floats, n: int) -> Ids:
    """Ids of the n largest of values (V,), the largest first and the lower id first of equal ones."""
    least = np.partition(values, len(values) - n)[len(values) - n]
    return _ranked(values, np.flatnonzero(values >= least))[:n]


_FIRST_SELECTED, _MORE = 128, 8


def _reaching(weights: Floats, top_p: float) -> Ids:
    """Ids, as :func:`kept` orders them, of more than enough of the largest weights to reach ``top_p`` of their sum."""
    total = float(weights.sum(dtype=np.float64))
    # All weights below this have less than (1 - top_p) of the sum together, so the others have more than top_p of it.
    # The margins, here and below, are far beyond what sums in float64 lose.
    least = max(0.0, 0.999 * (1.0 - top_p) - 1e-9) * total / len(weights)
    ids = np.flatnonzero(weights >= least)
    values = weights[ids]
    n = _FIRST_SELECTED
    while n < len(values):
        selected = np.partition(values, len(values) - n)[len(values) - n :]
        if selected.sum(dtype=np.float64) > top_p * 1.001 * total:
            ids = ids[values >= selected[0]]
            break
        n *= _MORE
    return _ranked(weights, ids)


def _ranked(values: Floats, ids: Ids) -> Ids:
    """Ids in rising order, as :func:`kept` orders them."""
    return ids[np.argsort(-values[ids], kind="stable")]
