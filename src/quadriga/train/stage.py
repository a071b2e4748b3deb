"""A stage of a pipeline: neighbouring layers on some ranks, which get hidden states and pass them on.

    stage 0: embed, layers ──(N, D)──► stage 1: layers ──► ... ──► last: layers, norm, head, loss

The model keeps its names: what other stages have is missing in it. Ranks of a stage read all rows together, as the
ranks of a run without a pipeline do; a rank's counterparts in the other stages read the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    def over_all_mixtures(self, values: Tensor) -> Tensor:
        """(L, ...) of all layers with experts, zero for those of other stages, from this stage's."""
        if self.mixtures is None:
            return values
        whole = values.new_zeros(self.n_mixtures, *values.shape[1:])
        whole[self.mixtures.start : self.mixtures.stop] = values
        return whole


def keep_stage(model: Transformer, layers: range, *, first: bool, last: bool) -> None:
    """Remove from a model what other stages have."""
    for i in range(len(model.layers)):
        if i not in layers:
            model.layers[i] = nn.Identity()
    if not first:
        model.embed = nn.Identity()  # type: ignore[assignment]
    if not last:
        model.final_norm = nn.Identity()  # type: ignore[assignment]
        model.lm_head = None
