"""The seams of training: what a batch is, where batches come from, what is minimised.

    BatchSource.rows(step, first, last) ──► Batch ──► Objective(model, batch) ──► (summed loss, metrics)

A source is a pure function of the step and the rows asked for. So a run's position in its data is one integer, the
step; a resumed run reads exactly what an uninterrupted one would; and any number of ranks may share a global batch,
each asking for its own rows. Nothing here reads files: ``loader`` does, ``memory_source`` holds texts in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quadriga.nn.transformer import Transformer

IGNORE = -100
"""The target of a token that is not to be predicted: the last of a document, a prompt, padding."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of packed documents: N = rows * seq_len tokens.

    Every token lies in a document and no document crosses a row. A document none of whose targets is to be predicted
    is padding: it counts in no loss, and routers' statistics leave it out.
    """

    tokens: Tensor
    """(N,) int64."""
    targets: Tensor
    """(N,) int64, the token that follows, or IGNORE where no loss is taken."""
    positions: Tensor
    """(N,) int64, restarting at 0 with each document."""
    bounds: Tensor
    """(documents + 1,) int32: document i is tokens [bounds[i], bounds[i + 1])."""
    domains: Tensor
    """(documents,) int16 index into the source's domain names."""
    weights: Tensor | None = None
    """(N,) float32 weight of each target in the loss; None: 1."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device. Bounds stay where they are: attention plans on the host."""
        return Batch(
            tokens=self.tokens.to(device),
            targets=self.targets.to(device),
            positions=self.positions.to(device),
            bounds=self.bounds,
            domains=self.domains,
            weights=None if self.weights is None else self.weights.to(device),
        )

    def target_weight(self) -> float:
        """What a mean loss divides by: the sum of the weights of all targets."""
        wanted = self.targets != IGNORE
        return float(wanted.sum() if self.weights is None else self.weights[wanted].double().sum())

    def real(self) -> Tensor:
        """(N,) bool on the tokens' device: True outside padding documents."""
        lengths = self.bounds.diff().long().to(self.tokens.device)
        document = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        wanted = torch.zeros(len(lengths), dtype=torch.bool, device=lengths.device)
        wanted[document[self.targets != IGNORE]] = True
        return wanted[document]


class BatchSource(Protocol):
    """Training data as a function of the optimiser step."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, which ``Batch.domains`` counts from 0."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of the data and of everything that decides their order; a resumed run must find the same."""
        ...

    def n_rows(self, step: int) -> int:
        """Rows of the whole batch of an optimiser step, over all ranks."""
        ...

    def seq_len(self, step: int) -> int:
        """Tokens of each of its rows."""
        ...

    def rows(self, step: int, first: int, last: int) -> Batch:
        """Rows [first, last) of it: a pure function of its arguments."""
        ...


class Objective(Protocol):
    """What is minimised: the next token (``losses``), or what tuning replaces it with."""

    def __call__(self, model: Transformer, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Run the model on a batch.

        Returns:
            the loss *summed* over the batch with a gradient: the trainer divides by ``target_weight`` of the whole
            batch of all ranks; and detached tensors, most of them scalars, to sum over micro-steps and ranks for the
            log. ``loss`` (summed, without what only regularises) must be among them; ``expert_counts`` (L, E) may be.
        """
        ...
