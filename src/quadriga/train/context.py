"""What the model's layers must know of a training batch: positions, and attention within packed documents."""

from __future__ import annotations

from torch import Tensor

from quadriga.kernels import training
from quadriga.nn.context import PackedContext, Scoring
from quadriga.train.batch import Batch


class DocumentContext:
    """A ``ForwardContext`` over the documents of a batch; see there.

    On a processor attention is ``kernels.training.document_attention``; elsewhere, and where a layer has sinks, torch's
    own operations, a document a call.
    """

    def __init__(self, batch: Batch) -> None:
        self.positions = batch.positions
        self.bounds: list[int] = batch.bounds.tolist()
        self._elsewhere = PackedContext(batch.bounds.diff().tolist(), batch.tokens.device)
        self._fused = batch.tokens.device.type == "cpu"

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """See ``ForwardContext``."""
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
