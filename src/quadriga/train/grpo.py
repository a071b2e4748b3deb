"""Group relative policy optimisation: answers that are worth more than others to the same question become likelier.

    A      (reward - mean of its group) / (deviation of its group)         a group: the answers to one question
    ratio  p(token) now / p(token) when it was sampled                     both of softmax(z / T), over drawn tokens
    loss   -min(A ratio, A clip(ratio, 1 - low, 1 + high)) + beta KL       mean over an answer's tokens, then a group

While answers are as the model samples them every ratio is 1; several updates on the same answers move it, and the clip
keeps them from going far. The loss is summed over questions, which the trainer divides by their number. Sources: Shao
et al. 2024 (arXiv 2402.03300); the wider upper clip: Yu et al. 2025 (arXiv 2503.14476).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quadriga.nn.transformer import Transformer
from quadriga.train.batch import IGNORE, TrainingBatch
from quadriga.train.objectives import Drawing, Reference, per_document, token_logprobs


@dataclass(frozen=True, kw_only=True)
class AnswerBatch(TrainingBatch):
    """Questions with sampled answers, one document each; targets on the answers."""

    advantages: Tensor
    """(documents,) float32."""
    n_questions: int
    n_samples: int
    """Answers that were sampled to each question; those that teach nothing may be left out of the documents."""
    totals: dict[str, Tensor] = field(default_factory=dict)
    """What is reported of the samples, summed over questions."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """(N,) log-probabilities that stay the same over all updates on these answers, once they were computed."""

    def to(self, device: torch.device) -> AnswerBatch:
        """See ``TrainingBatch.to``."""
        plain = TrainingBatch.to(self, device)
        return replace(
            self, tokens=plain.tokens, targets=plain.targets, positions=plain.positions,
            advantages=self.advantages.to(device),
        )  # fmt: skip

    def target_weight(self) -> float:
        """The number of questions."""
        return float(self.n_questions)


def answer_batch(
    documents: Sequence[tuple[Sequence[int], Sequence[int]]],
    advantages: Sequence[float],
    *,
    n_questions: int,
    n_samples: int,
    totals: dict[str, Tensor] | None = None,
) -> AnswerBatch:
    """Concatenate (question ids, answer ids), with targets on the answers only."""
    ids: list[int] = []
    targets: list[int] = []
    bounds = [0]
    for question, answer in documents:
        ids += [*question, *answer]
        targets += [IGNORE] * (len(question) - 1) + [*answer, IGNORE]
        bounds.append(len(ids))
    limits = torch.tensor(bounds)
    return AnswerBatch(
        tokens=torch.tensor(ids),
        targets=torch.tensor(targets),
        positions=torch.arange(len(ids)) - torch.repeat_interleave(limits[:-1], limits.diff()),
        bounds=limits.int(),
        domains=torch.zeros(len(documents), dtype=torch.int16),
        advantages=torch.tensor(advantages, dtype=torch.float32),
        n_questions=n_questions,
        n_samples=n_samples,
        totals=totals or {},
    )


class GRPO:
    """The loss of an :class:`AnswerBatch`; an ``Objective``.

    Args:
        reference: the model before tuning.
        drawing: how the answers were drawn.
        kl_weight: beta; with 0 the reference is not computed.
        clip: (low, high): how far the ratio counts below and above 1.
    """

    def __init__(
        self, reference: Reference, drawing: Drawing, *, kl_weight: float, clip: tuple[float, float] = (0.2, 0.2)
    ) -> None:
        self.reference, self.drawing, self.kl_weight, self.clip = reference, drawing, kl_weight, clip

    def __call__(self, model: Transformer, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over questions, each the mean over its samples; and metrics."""
        assert isinstance(batch, AnswerBatch), "what was sampled"
        logp = token_logprobs(model, batch, self.drawing)
        before = batch.kept.setdefault("sampled", logp.detach())
        wanted = batch.targets != IGNORE
        counts = per_document(wanted.float(), batch).clamp(min=1)
        advantages = self._of_tokens(batch)
        ratio = torch.exp(logp - before)
        clipped = ratio.clamp(1 - self.clip[0], 1 + self.clip[1])
        gain = torch.minimum(ratio * advantages, clipped * advantages)
        each = -per_document(gain * wanted, batch) / counts
        beyond = ((gain < ratio * advantages) & wanted).float()
        found = {"clipped": (per_document(beyond, batch) / counts).sum()}
        if self.kl_weight:
            if "reference" not in batch.kept:
                batch.kept["reference"] = self.reference(model, batch, self.drawing)
            behind = batch.kept["reference"] - logp
            # Schulman's k3 estimator, which is never negative.
            kl = per_document(torch.exp(behind) - behind - 1, batch) / counts
            each = each + self.kl_weight * kl
            found["kl"] = kl.detach().sum()
        loss = each.sum() / batch.n_samples
        metrics = {name: value / batch.n_samples for name, value in found.items()}
        return loss, {"loss": loss.detach(), **metrics, **batch.totals}

    @staticmethod
    def _of_tokens(batch: AnswerBatch) -> Tensor:
        """(N,): the advantage of each token's answer."""
        lengths = batch.bounds.diff().long().to(batch.advantages.device)
        return torch.repeat_interleave(batch.advantages, lengths)
