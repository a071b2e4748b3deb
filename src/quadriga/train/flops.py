"""Count a step's floating-point operations, from the lengths of its documents; on the host, no tensor is waited for."""

from __future__ import annotations

from collections.abc import Sequence

from quadriga.model import cost
from quadriga.model.config import AttentionSpec, ModelConfig, NoMixer
from quadriga.train.batch import TrainingBatch


def flops_of(config: ModelConfig, active: int, batches: Sequence[TrainingBatch]) -> float:
    """FLOPs of batches' documents, forward and backward: 3 x (2 x active parameters + attention) per token.

    Args:
        active: parameters that a token is multiplied with.
    """
    lengths: list[int] = [n for batch in batches for n in batch.bounds.diff().tolist()]
    n_tokens = sum(lengths)
    attention = 0.0
    for layer, n in config.kinds().items():
        if isinstance(layer.mixer, NoMixer):
            continue
        if not isinstance(layer.mixer, AttentionSpec):
            attention += n * n_tokens * float(cost.step_flops(layer.mixer))
            continue
        seen = sum(_keys_seen(length, layer.mixer.window) for length in lengths)
        attention += n * 2 * layer.mixer.attended_dim * float(seen)
    total: float = 3.0 * (2 * active * n_tokens + attention)
    return total


def _keys_seen(length: int, window: int | None) -> int:
    """Keys that all tokens of a document see together: 1 + 2 + ..., each at most ``window``."""
    grown = length if window is None else min(length, window)
    return grown * (grown + 1) // 2 + (length - grown) * grown
