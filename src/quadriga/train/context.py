"""The ``ForwardContext`` of a training batch: positions, and attention within packed documents."""

from __future__ import annotations

from torch import Tensor

from quadriga.kernels import training
from quadriga.nn.context import PackedContext, Scoring
from quadriga.train.batch import TrainingBatch


class DocumentContext:
    """A ``ForwardContext`` in which each token attends only to its own document.

    Attention runs in ``kernels.training.document_attention`` on a CPU, and elsewhere in torch's fused kernel, one call
    per document.
    """

    def __init__(self, batch: TrainingBatch) -> None:
        self.positions = batch.positions
        self.bounds: list[int] = batch.bounds.tolist()
        self._elsewhere = None
        if batch.tokens.device.type != "cpu":
            self._elsewhere = PackedContext(batch.bounds.diff().tolist(), batch.tokens.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """Attention within documents; shapes as in ``ForwardContext``."""
        if self._elsewhere is not None:
            return self._elsewhere.attend(layer, q, k, v, scoring)
        return training.document_attention(
            q,
            k,
            v,
            self.bounds,
            scale=scoring.scale,
            soft_cap=scoring.soft_cap,
            alibi_slopes=scoring.alibi_slopes,
        )
