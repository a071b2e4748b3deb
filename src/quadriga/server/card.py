"""What lists say of a model, whether it is loaded or only could be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga.model import cost
from quadriga.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Card:
    """One model."""

    name: str
    config: ModelConfig
    created: int
    """Seconds since 1970: of its loading, or of its file."""
    template: str | None
    """Its chat template."""
    format: str
    """What most of its weights are stored as."""
    nbytes: int
    """Of its weights."""
    path: Path | None
    """Its folder or file; None where it was made in memory."""

    def facts(self) -> dict[str, Any]:
        """What the chat page, and ``quadriga ps``, want to know."""
        config = self.config
        count, experts = cost.n_params(config), [spec for _, spec in config.moe_layers]
        return {
            "family": config.family,
            "n_parameters": count.total,
            "n_active_parameters": count.active,
            "n_layers": config.n_layers,
            "n_experts": max((spec.n_experts for spec in experts), default=0),
            "top_k": max((spec.top_k for spec in experts), default=0),
            "context_length": config.max_seq_len,
            "chat": self.template is not None,
        }
