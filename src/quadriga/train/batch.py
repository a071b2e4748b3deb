"""The interfaces of training: a batch, a source of batches, and an objective.

    BatchSource.rows(step, first, last) ──► TrainingBatch ──► Objective(model, batch) ──► (summed loss, metrics)

A source is a pure function of the step and the rows requested. So a run's position in its data is one integer, the
step; a resumed run reads exactly the data of an uninterrupted one; and any number of ranks can share a global batch by
requesting different rows. Implementations: ``loader`` (files), ``memory_source`` (lists), ``packing`` (examples).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from quadriga.nn.moe import RouterStats
from quadriga.nn.transformer import Transformer
from quadriga.train.row_group import RowGroup
from quadriga.train.stage import Stage

IGNORE = -100
"""Target value that takes no loss: after the last token of a document, in prompts, in padding."""


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """Rows of packed documents: N = rows * seq_len tokens.

    Every token belongs to a document, and no document crosses a row. A document whose targets are all IGNORE is
    padding: it takes no loss and is left out of the routers' statistics.
    """

    tokens: Tensor
    """(N,) int64."""
    targets: Tensor
    """(N,) int64: the next token, or IGNORE where no loss is taken."""
    positions: Tensor
    """(N,) int64, restarting at 0 with each document."""
    bounds: Tensor
    """(documents + 1,) int32: document i is tokens [bounds[i], bounds[i + 1])."""
    domains: Tensor
    """(documents,) int16 index into the source's domain names."""
    weights: Tensor | None = None
    """(N,) float32: weight of each target in the loss; None: all 1."""
    group: RowGroup | None = None
    """The ranks that share these rows: each has a part of the tokens, while ``bounds`` and ``domains`` are of all
    documents of the group. None: no rank shares them."""
    outside_padding: Tensor | None = None
    """(N,) bool, known of a part, which may lack a document's targets; None: ``targets`` tell."""
    with_target: Tensor | None = None
    """(M,) int64 indices of the tokens whose target is not IGNORE; None until the batch goes to its device."""
    summed_weight: float | None = None
    """Of all targets; None until then."""

    stage: Stage | None = None
    """The stage of a pipeline that computes on it; None: there is no pipeline."""
    entry: Tensor | None = None
    """(N, D): what the previous stage made of the tokens; None: this one is the first."""

    def part(self, group: RowGroup) -> TrainingBatch:
        """This rank's part of rows that a group shares; their tokens must be a multiple of the group's size."""
        n, rest = divmod(len(self.tokens), group.size)
        assert not rest, "the trainer asked for rows that can be divided"
        of_context = torch.cat([torch.arange(*span) for span in group.spans(len(self.tokens))])
        own = of_context[group.tensor_part * n : (group.tensor_part + 1) * n]
        return replace(
            self,
            tokens=self.tokens[own],
            targets=self.targets[own],
            positions=self.positions[own],
            weights=None if self.weights is None else self.weights[own],
            group=group,
            outside_padding=self.real()[own],
        )

    def copied(self, group: RowGroup) -> TrainingBatch:
        """The same rows on every rank of a group, which computes them as if each rank's were others."""
        n, copies = len(self.tokens), range(group.n_tensor)
        bounds = torch.cat([self.bounds[:1], *(self.bounds[1:] + copy * n for copy in copies)])
        return replace(
            self,
            bounds=bounds,
            domains=self.domains.repeat(group.n_tensor),
            group=group.without_context(),
            outside_padding=self.real(),
        )

    def to(self, device: torch.device) -> TrainingBatch:
        """Copy to another device, except ``bounds``, which attention reads on the host.

        What depends on the targets' values is worked out before: a device would have to be waited for.
        """
        kept, real = self.targets_at(), self.real()
        return replace(
            self,
            with_target=kept.to(device),
            summed_weight=self.target_weight(),
            outside_padding=real.to(device),
            tokens=self.tokens.to(device),
            targets=self.targets.to(device),
            positions=self.positions.to(device),
            weights=None if self.weights is None else self.weights.to(device),
        )

    def target_weight(self) -> float:
        """Sum of the weights of all targets: the divisor of the mean loss."""
        if self.summed_weight is not None:
            return self.summed_weight
        wanted = self.targets != IGNORE
        return float(wanted.sum() if self.weights is None else self.weights[wanted].double().sum())

    def targets_at(self) -> Tensor:
        """(M,) int64 indices of the tokens whose target is not IGNORE."""
        return (self.targets != IGNORE).nonzero()[:, 0] if self.with_target is None else self.with_target

    def real(self) -> Tensor:
        """(N,) bool on the tokens' device: True outside padding documents."""
        if self.outside_padding is not None:
            return self.outside_padding
        lengths = self.bounds.diff().long().to(self.tokens.device)
        document = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        wanted = torch.zeros(len(lengths), dtype=torch.bool, device=lengths.device)
        wanted[document[self.targets != IGNORE]] = True
        return wanted[document]


class BatchSource(Protocol):
    """Training data as a pure function of the optimiser step."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains; ``TrainingBatch.domains`` has indices into them."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of the data and of everything that determines their order; must be unchanged when a run resumes."""
        ...

    def n_rows(self, step: int) -> int:
        """Rows of the global batch (all ranks) at an optimiser step."""
        ...

    def seq_len(self, step: int) -> int:
        """Tokens per row of that batch."""
        ...

    def rows(self, step: int, first: int, last: int) -> TrainingBatch:
        """Rows [first, last) of the global batch at ``step``; the same arguments always give the same rows."""
        ...


@runtime_checkable
class StagedObjective(Protocol):
    """What an objective needs besides to be computed in a pipeline, whose last stage alone calls it as it is."""

    def on_the_way(self, stats: Sequence[RouterStats], batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """What a stage without the head adds to the summed loss, and its metrics."""
        ...


class Objective(Protocol):
    """The training objective: next-token prediction (``losses``) or a tuning objective (``objectives``)."""

    def __call__(self, model: Transformer, batch: TrainingBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Run the model on a batch and compute the loss.

        Returns:
            (loss, metrics). The loss has a gradient and is *summed* over the batch: the trainer divides by the
            ``target_weight`` of the global batch. Metrics are detached tensors, which the trainer sums over micro-steps
            and ranks: ``loss`` (summed, without regularisation terms) is required, ``expert_counts`` (L, E) optional.
        """
        ...
