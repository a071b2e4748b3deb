"""From one row of logits to one token, in the order SamplingParams documents.

    logits -> penalties, bias -> / temperature -> softmax -> top-k -> top-p -> min-p -> one draw

Log-probabilities are reported from the untouched logits: they are the model's own opinion, not the sampler's. Rows of
the head that no token stands for (:class:`Unused`) are never chosen and never listed, whatever the model says of them.
Whatever the parameters, the arithmetic stays finite: finite logits always give a token that may be chosen.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quadriga.engine.request import SamplingParams
from quadriga.errors import RequestError

GREEDY_BELOW = 1e-5
"""A lower temperature is greedy, as vLLM has it: a draw would differ only among logits that are nearer than that."""

_NOT_FINITE = (
    "the model's logits are not finite: weights with NaN or Inf, or a dtype too narrow for this model. "
    "Run `quadriga models verify`, or load with dtype='float32'."
)


class Sample(NamedTuple):
    """One chosen token."""

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]


class Unused:
    """Rows of a head that no token stands for: found once per model, left out of every choice.

    Attributes:
        ids: as a set.
        index: as an int64 tensor, in order.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        self.ids = frozenset(ids)
        self.index = torch.tensor(sorted(self.ids), dtype=torch.int64)

    def __bool__(self) -> bool:
        return bool(self.ids)


NONE_UNUSED = Unused(())


class Sampler:
    """Chooses the tokens of one answer: owns its random generator and remembers what was said so far.

    Args:
        prompt_ids: what the repetition penalty counts as seen.
        vocab_size: rows of the head.
        unused: those among them that are never chosen.

    Raises:
        RequestError: a bias or stop id outside the vocabulary, or a bias on an id that no token has.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: list[int], vocab_size: int, unused: Unused = NONE_UNUSED
    ) -> None:
        outside = [token for token in (*params.logit_bias, *params.stop_ids) if token >= vocab_size]
        if outside:
            raise RequestError(f"token ids must be below the vocabulary's {vocab_size}, got {outside[:8]}")
        holes = [token for token in params.logit_bias if token in unused.ids]
        if holes:
            raise RequestError(
                f"logit_bias must name tokens: no token of this vocabulary has the ids {holes[:8]}. Leave them out; "
                "they are never chosen."
            )
        self.params = params
        self._unused = unused
        self._generator = torch.Generator().manual_seed(secrets.randbits(63) if params.seed is None else params.seed)
        self._answer: Counter[int] = Counter()
        self._seen = set(prompt_ids)

    def sample(
        self, logits: Tensor, best: int | None = None, log_sum: float | None = None, allowed: Tensor | None = None
    ) -> Sample:
        """Choose a token from logits (V,) float32 and count it as said.

        Args:
            best, log_sum: index of the first largest logit and log(sum(exp)), where they are known already.
            allowed: (V,) bool, the tokens that may be chosen; None allows all.

        Raises:
            RequestError: the logits are not finite, so the weights or the computation are broken; nothing is allowed.
        """
        params = self.params
        logits = logits.cpu()
        log_normaliser = float(logits.logsumexp(0)) if log_sum is None else log_sum
        require_finite([log_normaliser])
        adjusted, greedy = self._adjust(logits), params.temperature < GREEDY_BELOW
        if greedy and adjusted is logits and allowed is None and best is not None and best not in self._unused.ids:
            token = best
        else:
            candidates = self._candidates(adjusted, allowed)
            token = int(candidates.argmax()) if greedy else self._draw(candidates)
            require_finite([float(candidates[token])])
        self._answer[token] += 1
        self._seen.add(token)
        top: tuple[tuple[int, float], ...] = ()
        if params.logprobs:
            top = top_logprobs(logits[None], [log_normaliser], params.logprobs, self._unused)[0]
        # In double precision: two finite float32 may be further apart than float32 reaches.
        return Sample(token, float(logits[token]) - log_normaliser, top)

    def _candidates(self, adjusted: Tensor, allowed: Tensor | None) -> Tensor:
        """The logits with -inf wherever nothing may be chosen."""
        if allowed is None:
            return adjusted.index_fill(0, self._unused.index, -math.inf) if self._unused else adjusted
        if self._unused:
            allowed = allowed.index_fill(0, self._unused.index, False)
        if not allowed.any():
            raise RequestError("the grammar has come to a place where no token of this vocabulary may follow")
        return adjusted.masked_fill(~allowed, -math.inf)

    def _draw(self, candidates: Tensor) -> int:
        params = self.params
        probs = (candidates / params.temperature).softmax(0)
        if not math.isfinite(float(probs[0])):  # a quotient beyond float32 makes all of them NaN
            probs = ((candidates - candidates.max()) / params.temperature).softmax(0)
        kept = truncate(probs, params.top_k, params.top_p, params.min_p)
        return int(torch.multinomial(kept, 1, generator=self._generator))

    def _adjust(self, logits: Tensor) -> Tensor:
        params = self.params
        adjusted = logits
        if params.repetition_penalty != 1.0 and self._seen:
            ids = torch.tensor(sorted(self._seen))
            seen = logits[ids]
            penalised = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
            adjusted = adjusted.index_copy(0, ids, _bounded(penalised))
        if (params.presence_penalty or params.frequency_penalty) and self._answer:
            ids = torch.tensor(list(self._answer))
            counts = torch.tensor(list(self._answer.values()), dtype=logits.dtype)
            penalty = params.presence_penalty + params.frequency_penalty * counts
            adjusted = adjusted.index_copy(0, ids, _bounded(adjusted[ids] - penalty))
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias))
            bias = torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype)
            adjusted = adjusted.index_copy(0, ids, _bounded(adjusted[ids] + bias))
        return adjusted


def require_finite(log_sums: Sequence[float]) -> None:
    """Refuse rows of logits by their log(sum(exp)).

    Raises:
        RequestError: one of them is not finite, so a logit is not.
    """
    if not all(map(math.isfinite, log_sums)):
        raise RequestError(_NOT_FINITE)


def top_logprobs(
    logits: Tensor, log_sums: Sequence[float], n: int, unused: Unused = NONE_UNUSED
) -> list[tuple[tuple[int, float], ...]]:
    """Of every row of logits (R, V): its n most probable tokens, best first, with their log-probabilities.

    Args:
        log_sums: of every row, log(sum(exp)).
        n: at least 1; a vocabulary of fewer tokens gives all it has.
    """
    ranked = logits.index_fill(1, unused.index, -math.inf) if unused else logits
    values, ids = ranked.topk(min(n, logits.shape[1] - len(unused.ids)))
    logprobs = values.double() - torch.tensor(log_sums, dtype=torch.float64)[:, None]
    return [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), logprobs.tolist(), strict=True)]


def _bounded(logits: Tensor) -> Tensor:
    """Within what the dtype can hold: a penalty or bias on a huge logit gives a huge one, not an infinite one."""
    largest = torch.finfo(logits.dtype).max
    return logits.clamp(-largest, largest)


def truncate(probs: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Zero the tokens that top-k, then top-p, then min-p exclude; (V,) -> (V,), unnormalised. The best one stays.

    Equal probabilities keep the lower token id first.
    """
    if top_k == 0 and top_p == 1.0 and min_p == 0.0:
        return probs
    ordered, ids = probs.sort(descending=True, stable=True)
    if top_k:
        ordered[top_k:] = 0
    if top_p < 1.0:
        before = ordered.cumsum(0) - ordered  # mass of the better tokens
        ordered[1:][before[1:] >= top_p * ordered.sum()] = 0
    if min_p > 0.0:
        ordered[ordered < min_p * ordered[0]] = 0
    return torch.zeros_like(probs).index_copy(0, ids, ordered)
