"""What a step of training tells those who show and record a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The results of one step, over the global batch."""

    step: int
    loss: float
    """Mean over targets, without balance loss and other regularisation."""
    norm: float
    """Gradient norm before clipping."""
    rate: float
    """Learning rate as a fraction of its peak."""
    tokens: int
    """Tokens of this step on all ranks; of grpo those of the answers that were learned from."""
    tokens_seen: int
    flops: float
    """FLOPs of this step on all ranks: three times those of the forward pass."""
    seconds: float
    verdict: str | None
    """Why the update was skipped; None: it was applied."""
    extra: dict[str, float] = field(default_factory=dict)
    """The objective's other scalar metrics, as means over targets."""
    expert_counts: Tensor | None = None
    """(L, E) tokens per expert over the global batch; None for dense models."""


class Listener(Protocol):
    """Receives the run's events, on rank 0 only."""

    def on_step(self, report: StepReport) -> None: ...
    def on_event(self, step: int, text: str) -> None: ...
    def on_rollback(self, step: int) -> None: ...
