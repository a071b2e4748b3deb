"""The ``ForwardContext`` of a training batch: positions, and attention within packed documents."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from quadriga.kernels import training
from quadriga.model.config import RecurrentState
from quadriga.nn.context import PackedContext, Scan, Scoring
from quadriga.train.batch import TrainingBatch
from quadriga.train.row_group import ALONE


class DocumentContext:
    """A ``ForwardContext`` in which each token attends only to its own document.

    Attention runs in ``kernels.training.document_attention`` on a CPU; elsewhere, and where a layer has sinks, in
    torch's own operations, one call per document. Of rows that ranks share, the queries are those of this rank and of
    its neighbours that share heads; keys and values are gathered from the other context parts.
    """

    def __init__(self, batch: TrainingBatch) -> None:
        device = batch.tokens.device
        self.bounds: list[int] = batch.bounds.tolist()
        self._fused = device.type == "cpu"
        self._group = ALONE if batch.group is None else batch.group
        self._spans = self._group.spans(self.bounds[-1])
        self.positions = batch.positions
        if self._group.n_tensor > 1:
            self.positions = _positions(batch.bounds, self._spans).to(device)
        self._elsewhere = PackedContext(batch.bounds.diff().tolist(), device) if batch.group is None else None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """Attention within documents; shapes as in ``ForwardContext``."""
        fused = self._fused and scoring.sinks is None
        if not fused and self._elsewhere is not None:
            return self._elsewhere.attend(layer, q, k, v, scoring)
        k, v = self._gathered(k, v)
        parts = []
        for queries, (first, last) in zip(torch.split(q, [b - a for a, b in self._spans]), self._spans, strict=True):
            seen = (k[:last], v[:last], [bound for bound in self.bounds if bound < last] + [last])
            if fused:
                parts.append(
                    training.document_attention(
                        queries, *seen, scale=scoring.scale, soft_cap=scoring.soft_cap,
                        alibi_slopes=scoring.alibi_slopes, window=scoring.window, first=first,
                    )
                )  # fmt: skip
            else:
                parts.append(_by_document(queries, *seen, first, scoring))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _gathered(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all context parts, in one message."""
        if self._group.context is None:
            return k, v
        both = self._group.whole_context(torch.cat((k.flatten(1), v.flatten(1)), dim=1))
        keys, values = torch.split(both, [k[0].numel(), v[0].numel()], dim=1)
        return keys.reshape(-1, *k.shape[1:]), values.reshape(-1, *v.shape[1:])

    def recur(self, layer: int, x: Tensor, state: RecurrentState, scan: Scan) -> Tensor:
        """A recurrent layer within documents; see ``ForwardContext``."""
        assert self._elsewhere is not None, "ParallelSpec refuses recurrent layers where ranks share rows"
        return self._elsewhere.recur(layer, x, state, scan)


def _positions(bounds: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Positions of the tokens of these spans, each counted from its document's start."""
    starts = torch.repeat_interleave(bounds[:-1].long(), bounds.diff().long())
    return torch.cat([torch.arange(a, b) - starts[a:b] for a, b in spans])


def _by_document(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], first: int, scoring: Scoring) -> Tensor:
    """Attention of the tokens from ``first`` on, one call for each document that they are of."""
    parts = []
    for begin, end in pairwise(bounds):
        low, high = max(begin, first), min(end, first + len(q))
        if low < high:
            queries, keys, values = q[low - first : high - first], k[begin:high], v[begin:high]
            heads_first = (x.transpose(0, 1)[None] for x in (queries, keys, values))
            parts.append(scoring.attention(*heads_first)[0].transpose(0, 1))
    return torch.cat(parts)
