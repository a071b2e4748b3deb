"""From one row of logits to one token, in the order SamplingParams documents.

    logits -> penalties, DRY, bias -> / temperature -> softmax -> top-k -> typical -> top-p -> min-p -> XTC -> one draw

Log-probabilities are reported from the untouched logits: they are the model's own opinion, not the sampler's. Rows of
the head that no token stands for (:class:`Unused`) are never chosen and never listed, whatever the model says of them.
Whatever the parameters, the arithmetic stays finite: finite logits always give a token that may be chosen.

On a CPU the kernels choose for all rows of a pass at once (``kernels.cpu.sampling``; :meth:`Sampler.ask` and
:meth:`Sampler.take` are this side of it). :meth:`Sampler.sample` is the same in NumPy: what that is held to, and what
chooses where a model runs on torch.

The vocabulary is never sorted. What top-p keeps are the largest weights whose sum reaches its part of all: as many of
the largest as may be enough are selected, and only these are sorted (:func:`kept`). The result is that of a full,
stable sort: weights and sums are the same numbers, and equal weights keep the lower token id first.

A draw depends on the seed and the position in the answer alone: Philox (Salmon et al. 2011) keyed by the seed, counted
by the position. Versions before drew from torch's generator, so a seed gave other draws there.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quadriga.engine.dry import Breakers, Dry
from quadriga.engine.permitted import Permitted
from quadriga.engine.request import SamplingParams
from quadriga.errors import RequestError
from quadriga.kernels.cpu.sampling import RowSettings, Sampled

Floats = NDArray[np.floating]
Ids = NDArray[np.int64]

GREEDY_BELOW = 1e-5
"""A lower temperature is greedy, as vLLM has it: a draw would differ only among logits that are nearer than that."""

_NOT_FINITE = (
    "the model's logits are not finite: weights with NaN or Inf, or a dtype too narrow for this model. "
    "Run `quadriga models verify`, or load with dtype='float32'."
)
_NOTHING_ALLOWED = "the grammar has come to a place where no token of this vocabulary may follow"
_NOTHING_PERMITTED = "allowed_token_ids and bad_words leave no token that may follow; allow more"


class Sample(NamedTuple):
    """One chosen token."""

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]


class Unused:
    """Rows of a head that no token stands for: found once per model, left out of every choice.

    Attributes:
        ids: as a set.
        index: in order.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        self.ids = frozenset(ids)
        self.index = np.array(sorted(self.ids), dtype=np.int32)

    def __bool__(self) -> bool:
        return bool(self.ids)


NONE_UNUSED = Unused(())


class Said:
    """The different tokens of prompt and answer, and how often each is in the answer: what penalties look at."""

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self._place = {token: i for i, token in enumerate(dict.fromkeys(prompt_ids))}
        self.n = len(self._place)
        room = self.n + 256
        self.ids, self.counts = np.zeros(room, dtype=np.int32), np.zeros(room, dtype=np.int32)
        """The first ``n`` are in use."""
        self.ids[: self.n] = list(self._place)

    def add(self, token: int) -> None:
        """A token of the answer."""
        place = self._place.setdefault(token, self.n)
        if place == self.n:
            if self.n == len(self.ids):
                self.ids, self.counts = (np.concatenate([x, np.zeros_like(x)]) for x in (self.ids, self.counts))
            self.ids[place], self.n = token, self.n + 1
        self.counts[place] += 1


class Sampler:
    """Chooses the tokens of one answer: has its seed and remembers what was said so far.

    Args:
        prompt_ids: what the repetition penalty counts as seen.
        vocab_size: rows of the head.
        unused: those among them that are never chosen.
        ends: tokens that are not chosen before the answer has ``min_new_tokens``.
        bad: sequences of tokens that spell the parameters' bad words.
        breakers: tokens that spell the parameters' sequence breakers; None: there are none.

    Raises:
        RequestError: a bias, stop id or allowed id outside the vocabulary, or a bias on or permission of an id that no
            token has.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: list[int],
        vocab_size: int,
        unused: Unused = NONE_UNUSED,
        ends: Iterable[int] = (),
        bad: Sequence[tuple[int, ...]] = (),
        breakers: Breakers | None = None,
    ) -> None:
        given = (*params.logit_bias, *params.stop_ids, *params.allowed_token_ids)
        outside = [token for token in given if token >= vocab_size]
        if outside:
            raise RequestError(f"token ids must be below the vocabulary's {vocab_size}, got {outside[:8]}")
        for name in ("logit_bias", "allowed_token_ids"):
            holes = [token for token in getattr(params, name) if token in unused.ids]
            if holes:
                raise RequestError(
                    f"{name} must name tokens: no token of this vocabulary has the ids {holes[:8]}. Leave them out; "
                    "they are never chosen."
                )
        self._permitted: Permitted | None = None
        if params.allowed_token_ids or bad:
            self._permitted = Permitted(params.allowed_token_ids, bad, vocab_size)
        self.n_top = vocab_size if params.logprobs < 0 else min(params.logprobs, vocab_size)
        """So many of the most probable tokens are listed."""
        self.params = params
        self._unused = unused
        self._ends = Unused(i for i in ends if i < vocab_size) if params.min_new_tokens else NONE_UNUSED
        self._too_early = Unused({*unused.ids, *self._ends.ids}) if self._ends else unused
        """What is never chosen before the answer is long enough."""
        self._seed = secrets.randbits(63) if params.seed is None else params.seed
        self._n_drawn = 0
        self._said: Said | None = None
        """Where it matters."""
        if params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
            self._said = Said(prompt_ids if params.repetition_penalty != 1.0 else ())
        self._dry: Dry | None = None
        if params.repeats_cost:
            self._dry = Dry(
                params.dry_multiplier,
                params.dry_base,
                params.dry_allowed_length,
                params.dry_penalty_last_n,
                Breakers(vocab_size) if breakers is None else breakers,
                prompt_ids,
            )
        self._settings: RowSettings | None = None

    def ask(self, allowed: NDArray[np.bool_] | None = None) -> RowSettings:
        """What the kernels need to choose the token that :meth:`take` gets; ``allowed`` as for :meth:`sample`."""
        params = self.params
        allowed = self._rules(allowed)
        if self._settings is None:
            self._settings = RowSettings(
                unused=self._unused.index,
                early=self._ends.index,
                moves=params.logit_bias,
                temperature=0.0 if params.temperature < GREEDY_BELOW else params.temperature,
                repetition_penalty=params.repetition_penalty,
                presence_penalty=params.presence_penalty,
                frequency_penalty=params.frequency_penalty,
                top_k=params.top_k,
                top_p=params.top_p,
                min_p=params.min_p,
                typical_p=params.typical_p,
                xtc_probability=params.xtc_probability,
                xtc_threshold=params.xtc_threshold,
                dry_multiplier=params.dry_multiplier,
                dry_base=params.dry_base,
                dry_allowed_length=params.dry_allowed_length,
                breaks=None if self._dry is None else self._dry.breakers.kinds,
                breakers=None if self._dry is None else self._dry.breakers.flat,
                n_top=self.n_top,
                seed=self._seed,
            )
        self._settings.set(self._n_drawn, early=self._n_drawn < params.min_new_tokens, allowed=allowed)
        if self._said is not None:
            self._settings.said(self._said.ids, self._said.counts, self._said.n)
        if self._dry is not None:
            self._settings.repeats(self._dry.history())
        return self._settings

    def take(
        self,
        chosen: Sampled,
        logits: Floats,
        *,
        constrained: bool = False,
        instead: Callable[[int], int] | None = None,
    ) -> Sample:
        """Count a token as said that the kernels chose from logits (V,).

        Args:
            constrained: they were told what is allowed.
            instead: as for :meth:`sample`.

        Raises:
            RequestError: as :meth:`sample`.
        """
        require_finite([chosen.log_sum])
        if chosen.token_id < 0:
            if constrained:
                raise RequestError(_NOTHING_ALLOWED)
            require_finite([-math.inf])
        top = tuple((token, logit - chosen.log_sum) for token, logit in chosen.top)
        token = chosen.token_id if instead is None else instead(chosen.token_id)
        # The row may be on a device, and reading one number of it means waiting for all.
        logit = chosen.logit if token == chosen.token_id else float(logits[token])
        return self._count(token, logit - chosen.log_sum, top)

    def sample(
        self,
        logits: Floats,
        best: int | None = None,
        log_sum: float | None = None,
        allowed: NDArray[np.bool_] | None = None,
        instead: Callable[[int], int] | None = None,
    ) -> Sample:
        """Choose a token from logits (V,) float32 and count it as said.

        Args:
            best, log_sum: index of the first largest logit and log(sum(exp)), where they are known already.
            allowed: (V,) bool, the tokens that may be chosen; None allows all.
            instead: the token to take in place of the one that was chosen.

        Raises:
            RequestError: the logits are not finite, so the weights or the computation are broken; nothing is allowed.
        """
        params = self.params
        allowed = self._rules(allowed)
        log_normaliser = float(log_sum_exp(logits)) if log_sum is None else log_sum
        require_finite([log_normaliser])
        with np.errstate(over="ignore", under="ignore"):
            adjusted, greedy = self._adjust(logits), params.temperature < GREEDY_BELOW
            never = self._too_early if self._n_drawn < params.min_new_tokens else self._unused
            if greedy and adjusted is logits and allowed is None and best is not None and best not in never.ids:
                token = best
            else:
                candidates = self._candidates(adjusted, allowed, never)
                token = int(candidates.argmax()) if greedy else self._draw(candidates)
                require_finite([float(candidates[token])])
        if instead is not None:
            token = instead(token)
        top: tuple[tuple[int, float], ...] = ()
        if self.n_top:
            top = top_logprobs(logits[None], [log_normaliser], self.n_top, self._unused)[0]
        # In double precision: two finite float32 may be further apart than float32 reaches.
        return self._count(token, float(logits[token]) - log_normaliser, top)

    def _rules(self, allowed: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
        """``allowed`` without what the answer's own parameters forbid."""
        if self._permitted is None:
            return allowed
        mask = self._permitted.mask()
        if not mask.any():
            raise RequestError(_NOTHING_PERMITTED)
        return mask if allowed is None else mask & allowed

    def _count(self, token: int, logprob: float, top: tuple[tuple[int, float], ...]) -> Sample:
        """A token is said; the chosen one is among the alternatives that are listed."""
        self._n_drawn += 1
        if self._permitted is not None:
            self._permitted.add(token)
        if self._said is not None:
            self._said.add(token)
        if self._dry is not None:
            self._dry.add(token)
        if top and all(other != token for other, _ in top):
            top = (*top, (token, logprob))
        return Sample(token, logprob, top)

    def _candidates(self, adjusted: Floats, allowed: NDArray[np.bool_] | None, never: Unused) -> Floats:
        """The logits with -inf wherever nothing may be chosen."""
        if allowed is None:
            return _without(adjusted, never)
        if never:
            within = allowed.copy()
            within[never.index] = False
            # A grammar that is at its end has only end tokens left: the answer is complete, however short.
            if not within.any() and never is not self._unused:
                within = allowed.copy()
                within[self._unused.index] = False
            allowed = within
        if not allowed.any():
            raise RequestError(_NOTHING_ALLOWED)
        return np.where(allowed, adjusted, adjusted.dtype.type(-np.inf))

    def _draw(self, candidates: Floats) -> int:
        params = self.params
        best = candidates.max()
        require_finite([float(best)])
        logs = candidates - best  # before the quotient, which may be beyond float32
        logs *= np.float32(1.0 / params.temperature)
        weights = np.exp(logs)
        top_k = params.top_k
        if params.typical_p < 1.0:
            _keep(weights, kept(weights, top_k, 1.0, 0.0))
            _keep(weights, typical(weights, logs, params.typical_p))
            top_k = 0
        _keep(weights, kept(weights, top_k, params.top_p, params.min_p))
        at, second = uniforms(self._seed, self._n_drawn)
        if second < params.xtc_probability:
            weights[excluded(weights, params.xtc_threshold)] = 0.0
        return pick(weights, at)

    def _adjust(self, logits: Floats) -> Floats:
        params = self.params
        adjusted = logits
        said = self._said
        if said is not None and params.repetition_penalty != 1.0:
            ids = said.ids[: said.n]
            seen = logits[ids]
            penalised = np.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
            adjusted = _changed(adjusted, ids, penalised)
        if said is not None and (params.presence_penalty or params.frequency_penalty):
            answered = np.flatnonzero(said.counts[: said.n])
            ids, counts = said.ids[answered], said.counts[answered].astype(np.float64)
            penalty = (params.presence_penalty + params.frequency_penalty * counts).astype(logits.dtype)
            adjusted = _changed(adjusted, ids, adjusted[ids] - penalty)
        if self._dry is not None:
            repeating, amounts = self._dry.penalties()
            adjusted = _changed(adjusted, repeating, adjusted[repeating] - amounts)
        if params.logit_bias:
            ids = np.array(list(params.logit_bias))
            bias = np.array(list(params.logit_bias.values()), dtype=logits.dtype)
            adjusted = _changed(adjusted, ids, adjusted[ids] + bias)
        return adjusted


def require_finite(log_sums: Sequence[float]) -> None:
    """Refuse rows of logits by their log(sum(exp)).

    Raises:
        RequestError: one of them is not finite, so a logit is not.
    """
    if not all(map(math.isfinite, log_sums)):
        raise RequestError(_NOT_FINITE)


def log_sum_exp(logits: Floats) -> Floats:
    """log(sum(exp)) over the last axis; not finite where a logit is NaN or +inf."""
    with np.errstate(all="ignore"):
        best = logits.max(-1, keepdims=True)
        return np.asarray(np.log(np.exp(logits - best).sum(-1)) + best[..., 0])


def top_logprobs(
    logits: Floats, log_sums: Sequence[float], n: int, unused: Unused = NONE_UNUSED
) -> list[tuple[tuple[int, float], ...]]:
    """Of every row of logits (R, V): its n most probable tokens, best first, with their log-probabilities.

    Args:
        log_sums: of every row, log(sum(exp)).
        n: at least 1; a vocabulary of fewer tokens gives all it has. Of equal logits the lower id comes first.
    """
    rows = []
    for row, log_sum in zip(logits, log_sums, strict=True):
        ids = top_ids(_without(row, unused), min(n, len(row) - len(unused.ids)))
        rows.append(tuple((i, float(row[i]) - log_sum) for i in ids.tolist()))
    return rows


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


def _keep(weights: Floats, ids: Ids | None) -> None:
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


def _without(logits: Floats, unused: Unused) -> Floats:
    """A row with -inf at the rows that no token stands for."""
    if not unused:
        return logits
    out = logits.copy()
    out[unused.index] = -np.inf
    return out


def _changed(logits: Floats, ids: NDArray[np.integer], values: Floats) -> Floats:
    """A row with other logits at some ids, within what its dtype can hold.

    A penalty or bias on a huge logit gives a huge one, not an infinite one.
    """
    bound = np.finfo(logits.dtype).max
    out = logits.copy()
    out[ids] = values.clip(-bound, bound)
    return out
