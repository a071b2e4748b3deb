"""A stage of a pipeline: neighbouring layers on some ranks, which get hidden states and pass them on.

    stage 0: embed, layers ──(N, D)──► stage 1: layers ──► ... ──► last: layers, norm, head, loss

The model keeps its names: what other stages have is missing in it. Embeddings that are the head too are in the first
and in the last stage, which add up their gradients after each step's backward passes. Ranks of a stage read all rows
together, as the ranks of a run without a pipeline do; a rank's counterparts in the other stages read the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quadriga.nn.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where a rank is in the pipeline; by default there is none."""

    index: int = 0
    count: int = 1
    mixtures: range | None = None
    """Which of the model's layers with experts are here, counted among those; None: all."""
    n_mixtures: int = 0
    """Layers with experts of the whole model."""
    ranks: dist.ProcessGroup | None = None
    """The ranks of this stage; None: all."""
    line: dist.ProcessGroup | None = None
    """This rank's counterparts, one in each stage."""
    tied: bool = False
    """Whether the first and the last stage share a table."""

    @property
    def first(self) -> bool:
        """True in the stage that looks tokens up."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """True in the stage that has the head."""
        return self.index == self.count - 1

    @property
    def mixture_share(self) -> float:
        """The part of the model's layers with experts that is here."""
        return 1.0 if self.mixtures is None or not self.n_mixtures else len(self.mixtures) / self.n_mixtures

    @property
    def shares_table(self) -> bool:
        """True where this stage has the table that another one has too."""
        return self.tied and self.count > 1 and (self.first or self.last)

    def sum_with_twin(self, gradient: Tensor) -> None:
        """Add up a gradient of the shared table, in place, with the stage that has the table too.

        Both get the same bits: the sum of two numbers does not depend on their order. They begin with the same table,
        so it stays the same.
        """
        if not gradient.numel():
            return
        twin, other = self.count - 1 if self.first else 0, torch.empty_like(gradient)
        messages = [
            dist.P2POp(dist.isend, gradient.contiguous(), group=self.line, group_peer=twin),
            dist.P2POp(dist.irecv, other, group=self.line, group_peer=twin),
        ]
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        gradient.add_(other)

    def over_all_mixtures(self, values: Tensor) -> Tensor:
        """(L, ...) of all layers with experts, zero for those of other stages, from this stage's."""
        if self.mixtures is None:
            return values
        whole = values.new_zeros(self.n_mixtures, *values.shape[1:])
        whole[self.mixtures.start : self.mixtures.stop] = values
        return whole


def of_table(name: str) -> bool:
    """Whether a parameter is of the table of embeddings: its numbers, or an adapter's factors of them."""
    return name.startswith("embed.")


def keep_stage(model: Transformer, layers: range, *, first: bool, last: bool) -> None:
    """Remove from a model what other stages have; a table that is the head too is kept by the first and the last."""
    for i in range(len(model.layers)):
        if i not in layers:
            model.layers[i] = nn.Identity()
    if not (first or (last and model.lm_head is None)):
        model.embed = nn.Identity()  # type: ignore[assignment]
    if not last:
        model.final_norm = nn.Identity()  # type: ignore[assignment]
        model.lm_head = None
