"""The ``ForwardContext`` of a training batch: positions, and attention within packed documents.

on a CPU                         ``kernels.training.document_attention``, for all documents of a rank's rows
on a GPU, 16-bit numbers         torch's ``varlen_attn`` (Flash Attention), for all documents at once
sinks; on a GPU also soft caps,  torch's own operations, a call for each document
ALiBi, float32, uneven heads
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention import varlen

from quadriga.kernels import training
from quadriga.model.config import RecurrentState
from quadriga.nn.context import PackedContext, Scan, Scoring
from quadriga.train.batch import TrainingBatch
from quadriga.train.row_group import ALONE


class DocumentContext:
    """A ``ForwardContext`` in which each token attends only to its own document.

    Of rows that ranks share, the queries are those of this rank and of its neighbours that share heads; keys and values
    are gathered from the other context parts.
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
        self._cuts: dict[tuple[int, int], _Cuts] = {}
        self._elsewhere = PackedContext(batch.bounds.diff().tolist(), device) if batch.group is None else None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """Attention within documents; shapes as in ``ForwardContext``."""
        fused = self._fused and scoring.sinks is None
        k, v = self._gathered(k, v)
        parts = []
        for queries, (first, last) in zip(torch.split(q, [b - a for a, b in self._spans]), self._spans, strict=True):
            if fused:
                seen = (k[:last], v[:last], [bound for bound in self.bounds if bound < last] + [last])
                parts.append(
                    training.document_attention(
                        queries, *seen, scale=scoring.scale, soft_cap=scoring.soft_cap,
                        alibi_slopes=scoring.alibi_slopes, window=scoring.window, first=first,
                    )
                )  # fmt: skip
                continue
            attend = _at_once if _fits_varlen(queries, v, scoring) else _by_document
            parts.append(attend(queries, k, v, self._cut(first, last), scoring))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _cut(self, first: int, last: int) -> _Cuts:
        if (first, last) not in self._cuts:
            self._cuts[first, last] = _Cuts(self.bounds, first, last)
        return self._cuts[first, last]

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


class _Cuts:
    """The documents that the tokens from ``first`` to ``last`` are of, and which of their keys those see."""

    def __init__(self, bounds: Sequence[int], first: int, last: int) -> None:
        self.first = first
        self.pieces = [(a, max(a, first), min(b, last)) for a, b in pairwise(bounds) if max(a, first) < min(b, last)]
        """(beginning of the document, its first query, behind its last one), counted in the rows' tokens."""
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def keys(self) -> slice:
        """The keys of all these documents, which lie end to end."""
        return slice(self.pieces[0][0], self.pieces[-1][2])

    @property
    def longest(self) -> tuple[int, int]:
        """The most queries and the most keys of a document."""
        return max(c - b for _, b, c in self.pieces), max(c - a for a, _, c in self.pieces)

    def ends(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(documents + 1,) int32 each: where the documents' queries and keys begin, and where the last ones end."""
        if device not in self._on:
            lengths = torch.tensor([[c - b for _, b, c in self.pieces], [c - a for a, _, c in self.pieces]])
            both = torch.nn.functional.pad(lengths.cumsum(1), (1, 0)).int().to(device)
            self._on[device] = both[0], both[1]
        return self._on[device]


def _fits_varlen(q: Tensor, v: Tensor, scoring: Scoring) -> bool:
    """Whether Flash Attention computes this; the meta device stands for a GPU that does."""
    if q.device.type == "cpu" or (q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0)):
        return False
    plain = scoring.sinks is None and scoring.soft_cap is None and scoring.alibi_slopes is None
    even = q.shape[-1] == v.shape[-1] <= 256 and q.shape[-1] % 8 == 0
    return plain and even and q.dtype in (torch.bfloat16, torch.float16)


def _at_once(q: Tensor, k: Tensor, v: Tensor, cuts: _Cuts, scoring: Scoring) -> Tensor:
    """Attention of all documents' queries, in one call.

    A document's queries are its last tokens, as ``varlen_attn`` has it where there are fewer of them than keys.
    """
    left = -1 if scoring.window is None else scoring.window - 1  # tokens seen before oneself
    most_queries, most_keys = cuts.longest
    out = varlen.varlen_attn(
        q, k[cuts.keys], v[cuts.keys], *cuts.ends(q.device), most_queries, most_keys,
        scale=scoring.scale, window_size=(left, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor), "no more was asked for"
    return out


def _by_document(q: Tensor, k: Tensor, v: Tensor, cuts: _Cuts, scoring: Scoring) -> Tensor:
    """The same, one call for each document."""
    parts = []
    for begin, low, high in cuts.pieces:
        queries, keys, values = q[low - cuts.first : high - cuts.first], k[begin:high], v[begin:high]
        heads_first = (x.transpose(0, 1)[None] for x in (queries, keys, values))
        parts.append(scoring.attention(*heads_first)[0].transpose(0, 1))
    return torch.cat(parts)
