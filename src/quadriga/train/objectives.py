"""Tuning objectives on preferences, DPO and ORPO, and what they share with GRPO (``train.grpo``): log-probabilities.

    logp(a)  sum of the log-probabilities of an answer's tokens            r  the reference: the model before tuning
    DPO      -log sigmoid(beta [(logp(c) - logp_r(c)) - (logp(j) - logp_r(j))])          c chosen, j rejected
    ORPO     -mean logp(c) - lambda log sigmoid(log odds(c) - log odds(j)),   odds = p / (1 - p), p = exp(mean logp)

Each returns a sum over pairs, which the trainer divides by their number: ``ExampleSource`` gives the targets of a group
a total weight of 1. Sources: Rafailov et al. 2023 (arXiv 2305.18290), Hong et al. 2024 (arXiv 2403.07691).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quadriga.kernels import training
from quadriga.nn.linear import Factors
from quadriga.nn.transformer import Transformer
from quadriga.train.batch import IGNORE, TrainingBatch
from quadriga.train.losses import final_hidden, head_weight
from quadriga.train.parallel import ModelWithLoss

CHOSEN, REJECTED = 0, 1
"""Domain indices of a pair's two documents; in a row, chosen comes before rejected."""


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn from logits, which decides what their probabilities are."""

    temperature: float = 1.0
    never: tuple[int, ...] = ()
    """Ids that are never drawn, sorted: they take no part in the softmax, and no target may be one."""


def token_logprobs(model: Transformer, batch: TrainingBatch, drawing: Drawing | None = None) -> Tensor:
    """Log-probability of every target (N,), 0 at IGNORE. Logits are computed for a few hundred tokens at a time."""
    hidden, _ = final_hidden(model, batch)
    weight, targets = head_weight(model), batch.targets
    drawing = drawing or Drawing()
    if drawing.never:
        drawn = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        drawn[torch.tensor(drawing.never, device=weight.device)] = False
        row_of = drawn.cumsum(0) - 1
        targets = torch.where(targets == IGNORE, IGNORE, row_of[targets.clamp(min=0)])
        weight = weight[drawn]
    scale, cap = model.config.logit_scale, model.config.logit_cap
    if cap is not None:
        return -training.capped_losses(
            hidden, weight, targets, cap=cap, logit_scale=scale, temperature=drawing.temperature
        )
    return -training.token_losses(hidden, weight, targets, logit_scale=scale / drawing.temperature)


def per_document(values: Tensor, batch: TrainingBatch) -> Tensor:
    """Sum values over each document: (N,) -> (documents,)."""
    lengths = batch.bounds.diff().long().to(values.device)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths)
    return torch.zeros(len(lengths), dtype=values.dtype, device=values.device).index_add(0, document, values)


def pairs(values: Tensor, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
    """Split per-document values into (chosen, rejected), (pairs,) each."""
    domains = batch.domains.to(values.device)
    return values[domains == CHOSEN], values[domains == REJECTED]


@contextlib.contextmanager
def without_adapter(model: Transformer) -> Iterator[None]:
    """Switch the adapter off inside the block, by setting its scales to 0."""
    factors = [module for module in model.modules() if isinstance(module, Factors)]
    scales = [one.scale for one in factors]
    for one in factors:
        one.scale = 0.0
    try:
        yield
    finally:
        for one, scale in zip(factors, scales, strict=True):
            one.scale = scale


class _LogProbabilities:
    """Used in place of an objective: returns :func:`token_logprobs`."""

    def __init__(self, drawing: Drawing | None) -> None:
        self.drawing = drawing

    def __call__(self, model: Transformer, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return token_logprobs(model, batch, self.drawing), {}


class Reference:
    """Log-probabilities under the model before tuning.

    Args:
        frozen: a frozen copy of that model, as a module of its own where it is sharded over ranks; None: the model
            without its adapter.
    """

    def __init__(self, frozen: Transformer | ModelWithLoss | None) -> None:
        self.frozen = frozen

    @torch.no_grad()
    def __call__(self, model: Transformer, batch: TrainingBatch, drawing: Drawing | None = None) -> Tensor:
        """The reference's :func:`token_logprobs` (N,), without gradient."""
        if isinstance(self.frozen, ModelWithLoss):
            self.frozen.objective = _LogProbabilities(drawing)
            found: Tensor = self.frozen(batch)[0]
            return found
        if self.frozen is not None:
            return token_logprobs(self.frozen, batch, drawing)
        training_now = model.training
        model.eval()  # no dropout in the reference
        try:
            with without_adapter(model):
                return token_logprobs(model, batch, drawing)
        finally:
            model.train(training_now)


class DPO:
    """Direct preference optimisation (formula in the module docstring); an ``Objective``."""

    def __init__(self, reference: Reference, beta: float) -> None:
        self.reference, self.beta = reference, beta

    def __call__(self, model: Transformer, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over pairs, and metrics."""
        chosen, rejected = pairs(per_document(token_logprobs(model, batch), batch), batch)
        chosen_r, rejected_r = pairs(per_document(self.reference(model, batch), batch), batch)
        margin = (chosen - chosen_r) - (rejected - rejected_r)
        loss = -F.logsigmoid(self.beta * margin).sum()
        return loss, {
            "loss": loss.detach(),
            "accuracy": (margin > 0).sum().float(),
            "margin": margin.detach().sum(),
        }


class ORPO:
    """Odds-ratio preference optimisation; needs no reference model. An ``Objective``."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, model: Transformer, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over pairs, and metrics."""
        counts = per_document((batch.targets != IGNORE).float(), batch).clamp(min=1)
        chosen, rejected = pairs(per_document(token_logprobs(model, batch), batch) / counts, batch)
        ratio = _log_odds(chosen) - _log_odds(rejected)
        loss = (-chosen - self.weight * F.logsigmoid(ratio)).sum()
        return loss, {
            "loss": loss.detach(),
            "accuracy": (ratio > 0).sum().float(),
            "nll": -chosen.detach().sum(),
        }


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) for p = exp(logp) < 1, accurate for p near 1."""
    below = logp.clamp(max=-1e-6)
    return below - torch.log(-torch.expm1(below))
