"""From one row of logits to one token, in the order SamplingParams documents.

    logits -> penalties, DRY, bias -> / temperature -> softmax -> top-k -> typical -> top-p -> min-p -> XTC -> one draw

Log-probabilities are reported from the untouched logits: they are the model's own opinion, not the sampler's. Rows of
the head that no token stands for (:class:`Unused`) are never chosen and never listed, whatever the model says of them.
Whatever the parameters, the arithmetic stays finite: finite logits always give a token that may be chosen.

On a CPU the kernels choose for all rows of a pass at once (``kernels.cpu.sampling``; :meth:`Sampler.ask` and
:meth:`Sampler.take` are this side of it). :meth:`Sampler.sample` is the same in NumPy: what that is held to, and what
chooses where a model runs on torch.
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
from quadriga.engine.truncation import Floats, excluded, keep_only, kept, pick, top_ids, typical, uniforms
from quadriga.errors import RequestError
from quadriga.kernels.cpu.sampling import RowSettings, Sampled

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
        if not math.isfinite(chosen.log_sum):
            raise RequestError(_NOT_FINITE)
        if chosen.token_id < 0:
            raise RequestError(_NOTHING_ALLOWED if constrained else _NOT_FINITE)
        top = tuple([(token, logit - chosen.log_sum) for token, logit in chosen.top]) if chosen.top else ()
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
            keep_only(weights, kept(weights, top_k, 1.0, 0.0))
            keep_only(weights, typical(weights, logs, params.typical_p))
            top_k = 0
        keep_only(weights, kept(weights, top_k, params.top_p, params.min_p))
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
