"""The ``ForwardContext`` of a training batch: positions, and attention within packed documents."""

from __future__ import annotations

from torch import Tensor

from quadriga.kernels import training
from quadriga.model.config import RecurrentState
from quadriga.nn.context import PackedContext, Scan, Scoring
from quadriga.train.batch import TrainingBatch


class DocumentContext:
    """A ``ForwardContext`` in which each token attends only to its own document.

    Attention runs in ``kernels.training.document_attention`` on a CPU; elsewhere, and where a layer has sinks, in
    torch's own operations, one call per document.
    """

    def __init__(self, batch: TrainingBatch) -> None:
        self.positions = batch.positions
        self.bounds: list[int] = batch.bounds.tolist()
        self._elsewhere = PackedContext(batch.bounds.diff().tolist(), batch.tokens.device)
        self._fused = batch.tokens.device.type == "cpu"

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """Attention within documents; shapes as in ``ForwardContext``."""
        if not self._fused or scoring.sinks is not None:
            return self._elsewhere.attend(layer, q, k, v, scoring)
        return training.document_attention(
            q,
            k,
            v,
            self.bounds,
            scale=scoring.scale,
            soft_cap=scoring.soft_cap,
            alibi_slopes=scoring.alibi_slopes,
            window=scoring.window,
        )

    def recur(self, layer: int, x: Tensor, state: RecurrentState, scan: Scan) -> Tensor:
        """A recurrent layer within documents; see ``ForwardContext``."""
        return self._elsewhere.recur(layer, x, state, scan)
