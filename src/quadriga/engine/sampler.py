"""From one row of logits to one token, in the order SamplingParams documents.

    logits -> penalties, bias -> / temperature -> softmax -> top-k -> top-p -> min-p -> one draw

Log-probabilities are reported from the untouched logits: they are the model's own opinion, not the sampler's.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from quadriga.engine.request import SamplingParams
from quadriga.errors import RequestError


class Sample(NamedTuple):
    """One chosen token."""

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one answer: owns its random generator and remembers what was said so far."""

    def __init__(self, params: SamplingParams, prompt_ids: list[int], vocab_size: int) -> None:
        outside = [token for token in (*params.logit_bias, *params.stop_ids) if token >= vocab_size]
        if outside:
            raise RequestError(f"token ids must be below the vocabulary's {vocab_size}, got {outside[:8]}")
        self.params = params
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
        if not math.isfinite(log_normaliser):
            raise RequestError(
                "the model's logits are not finite: weights with NaN or Inf, or a dtype too narrow for this model. "
                "Run `quadriga models verify`, or load with dtype='float32'."
            )
        adjusted = self._adjust(logits)
        if allowed is not None:
            if not allowed.any():
                raise RequestError("the grammar has come to a place where no token of this vocabulary may follow")
            adjusted = adjusted.masked_fill(~allowed, -math.inf)
        if params.temperature == 0:
            token = best if best is not None and adjusted is logits else int(adjusted.argmax())
        else:
            probs = truncate((adjusted / params.temperature).softmax(0), params.top_k, params.top_p, params.min_p)
            token = int(torch.multinomial(probs, 1, generator=self._generator))
        self._answer[token] += 1
        self._seen.add(token)
        top: tuple[tuple[int, float], ...] = ()
        if params.logprobs:
            values, ids = logits.topk(params.logprobs)
            top = tuple(zip(ids.tolist(), (values - log_normaliser).tolist(), strict=True))
        return Sample(token, float(logits[token] - log_normaliser), top)

    def _adjust(self, logits: Tensor) -> Tensor:
        params = self.params
        adjusted = logits
        if params.repetition_penalty != 1.0 and self._seen:
            ids = torch.tensor(sorted(self._seen))
            seen = logits[ids]
            penalised = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
            adjusted = adjusted.index_copy(0, ids, penalised)
        if (params.presence_penalty or params.frequency_penalty) and self._answer:
            ids = torch.tensor(list(self._answer))
            counts = torch.tensor(list(self._answer.values()), dtype=logits.dtype)
            adjusted = adjusted.index_add(0, ids, -(params.presence_penalty + params.frequency_penalty * counts))
        if params.logit_bias:
            bias = torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype)
            adjusted = adjusted.index_add(0, torch.tensor(list(params.logit_bias)), bias)
        return adjusted


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
        ordered[before >= top_p * ordered.sum()] = 0
    if min_p > 0.0:
        ordered[ordered < min_p * ordered[0]] = 0
    return torch.zeros_like(probs).index_copy(0, ids, ordered)
