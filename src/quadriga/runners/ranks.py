"""A model that several ranks share, driven by one of them. Torch-free: how messages travel is :class:`Links`' affair.

    rank 0: engine ─► RankedModel.forward ─► the pass as one message ─► all others: follow()
                                                  │
             stage 0 runs its layers ─ hidden (N, D) ─► stage 1 ─ ... ─► last stage: each rank its rows of the head
                within a stage all meet at the end of every branch         │
    rank 0: logits (R, V), hidden, routing, counts  ◄──────────────────────┘

Every rank has the whole of a pass (tokens, tables, slots) and its own part of keys and values under the same block
numbers. What a branch's parts add up to is added in the order of ranks on all of them, so a mesh gives the same bits
whatever shares the batch; another mesh adds in another order, and agrees as rounding allows.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quadriga.errors import EngineError, RequestError
from quadriga.kernels.cpu.expert_store import ExpertStore
from quadriga.kernels.cpu.packing import Parameter
from quadriga.kernels.cpu.sampling import Logits, TokenSampler
from quadriga.kernels.pass_batch import PassBatch
from quadriga.model.cache_layout import CacheLayout, cache_layout
from quadriga.model.config import ModelConfig
from quadriga.model.rank_mesh import RankPlace
from quadriga.model.rank_share import RankShare
from quadriga.runners.base import Adapters, Floats, LayerRouting, PassResult
from quadriga.runners.compiled import CompiledModel, distribution

Ints = NDArray[np.int32]
_PASS, _COPY, _END = 0, 1, 2
"""What a message asks for."""
_END_WAIT_S = 5.0
"""How long the end waits for a pass under way; then the others learn of it by the connection."""


class Links(Protocol):
    """How ranks reach each other. Every method raises EngineError, naming who is gone, if a rank is."""

    place: RankPlace

    def meet(self, parts: Floats) -> None:
        """Of parts (ranks of the stage, N, D) the own one is there; put the others' in their places."""
        ...

    def send(self, values: NDArray[Any], to: int) -> None:
        """Send an array to a rank that receives one like it."""
        ...

    def receive(self, out: NDArray[Any], source: int) -> None:
        """Fill an array with what a rank sends."""
        ...

    def tell(self, message: Ints) -> None:
        """From rank 0 to all others."""
        ...

    def hear(self) -> Ints:
        """What rank 0 tells, however long it takes."""
        ...

    def compare(self, facts: str) -> list[str]:
        """Each rank's text about itself, in their order."""
        ...

    def close(self) -> None:
        """The work is done: part in order."""
        ...

    def abandon(self, exit_code: int) -> None:
        """This rank cannot go on, and says why itself: it will end with this code, and by that the others."""
        ...


@dataclass(frozen=True)
class Wanted:
    """What a pass is to give beside logits."""

    hidden: bool = False
    routing: bool = False


class RankModel:
    """What one rank does in a pass.

    Args:
        share: what it has of the model.
        parameters: of ``share.config``; see ``io.rank_parameters``.
        how: the other arguments of :class:`CompiledModel`.
    """

    def __init__(self, share: RankShare, parameters: Mapping[str, Parameter], links: Links, **how: Any) -> None:
        self.share, self.place, self.links = share, share.place, links
        meeting = _Meeting(links) if self.place.mesh.group > 1 else None
        self.local = CompiledModel(share.config, parameters, cache=share.cache, share=share, meeting=meeting, **how)

    def run(self, batch: PassBatch, wanted: Wanted) -> PassResult:
        """This rank's part of a pass: its rows of the logits, if it is in the last stage."""
        place, n = self.place, len(batch.tokens)
        stream = self.local.program.stream[:n]
        if not place.first:
            self.links.receive(stream, place.rank - place.mesh.group)
        result = self.local.forward(
            batch, hidden=wanted.hidden and place.last and place.index == 0, routing=wanted.routing and place.index == 0
        )
        if not place.last:
            self.links.send(stream, place.rank + place.mesh.group)
        return result

    def report(self, result: PassResult) -> None:
        """Send rank 0 what it needs of this rank's result; see :meth:`RankedModel._collect`."""
        place = self.place
        if place.last:
            self.links.send(np.asarray(result.logits), 0)
        if result.hidden is not None:
            self.links.send(result.hidden, 0)
        if place.index == 0 and self.share.config.is_moe:
            self.links.send(np.concatenate(self.local.expert_load()), 0)
            for layer in result.routing or ():
                for values in (layer.expert_ids, layer.expert_weights, layer.logits):
                    self.links.send(np.ascontiguousarray(values), 0)


class _Meeting:
    """A stage's ranks, as the program needs them."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self.index, self.size = links.place.index, links.place.mesh.group

    def meet(self, parts: Floats) -> None:
        """See ``kernels.cpu.program.Meeting``."""
        self._links.meet(parts)


def follow(model: RankModel) -> None:
    """What every rank but the first does: take part in passes until rank 0 says that there will be no more.

    Raises:
        EngineError: a rank is gone.
    """
    while True:
        message = model.links.hear()
        if message[0] == _END:
            model.links.close()
            return
        if message[0] == _COPY:
            model.local.copy_blocks([(int(a), int(b)) for a, b in message[1:].reshape(-1, 2)])
        else:
            model.report(model.run(*unpack_pass(message)))


_ARRAYS = ("tokens", "positions", "starts", "tables", "table_starts", "rows", "before", "after")


def pack_pass(batch: PassBatch, wanted: Wanted) -> Ints:
    """A pass as one message: what it is, how long each array is (-1: None), how many tables, the arrays."""
    arrays = [getattr(batch, name) for name in _ARRAYS]
    head = [_PASS, wanted.hidden, wanted.routing, np.atleast_2d(batch.tables).shape[0]]
    head += [-1 if array is None else array.size for array in arrays]
    return np.concatenate([np.array(head, np.int32), *(a.reshape(-1) for a in arrays if a is not None)], dtype=np.int32)


def unpack_pass(message: Ints) -> tuple[PassBatch, Wanted]:
    """The inverse of :func:`pack_pass`."""
    _, hidden, routing, n_groups, *sizes = message[: 4 + len(_ARRAYS)].tolist()
    cuts = accumulate((max(0, size) for size in sizes), initial=4 + len(_ARRAYS))
    arrays = [
        None if size < 0 else np.ascontiguousarray(message[a:b])
        for size, (a, b) in zip(sizes, pairwise(cuts), strict=True)
    ]
    fields: dict[str, Any] = dict(zip(_ARRAYS, arrays, strict=True))
    fields["tables"] = fields["tables"].reshape(n_groups, -1)
    return PassBatch(**fields), Wanted(bool(hidden), bool(routing))


class RankedModel:
    """The whole model as a :class:`Runner`, on rank 0.

    Args:
        own: rank 0's part.
        bytes_of_all: of weights, keys and values, and recurrent states, of all ranks together.
    """

    def __init__(self, own: RankModel, bytes_of_all: tuple[int, int, int]) -> None:
        self.own, self._links = own, own.links
        self.config: ModelConfig = own.share.whole
        self.cache: CacheLayout = cache_layout(self.config)
        self.n_blocks, self.n_slots = own.local.n_blocks, own.local.n_slots
        self._weight_bytes, self.kv_bytes, self.state_bytes = bytes_of_all
        self.store: ExpertStore | None = None
        self.can_steer = False
        self.row_sampler: TokenSampler | None = own.local.row_sampler
        self._load = [np.zeros(spec.n_experts, dtype=np.int64) for _, spec in self.config.moe_layers]
        self._turn = threading.Lock()
        self._ended = False

    @property
    def adapter_names(self) -> list[str]:
        """There are none."""
        return []

    def adapters(self) -> Adapters:
        """See :class:`Runner`.

        Raises:
            RequestError: always.
        """
        raise RequestError(
            "adapters chosen per request do not run on several ranks. Fold the adapter in: quadriga adapter merge "
            "MODEL ADAPTER OUT --format q8"
        )

    def forward(
        self, batch: PassBatch, *, adapters: Sequence[int] | None = None, hidden: bool = False, routing: bool = False
    ) -> PassResult:
        """See :class:`Runner`.

        Raises:
            EngineError: a rank is gone; nothing can be computed any more.
        """
        assert adapters is None, "there are none: adapters() refuses"
        assert batch.steering is None, "can_steer says so"
        wanted = Wanted(hidden, routing)
        with self._turn:
            if self._ended:
                raise EngineError("the ranks have parted; load the model again")
            self._links.tell(pack_pass(batch, wanted))
            return self._collect(self.own.run(batch, wanted), batch, wanted)

    def _collect(self, own: PassResult, batch: PassBatch, wanted: Wanted) -> PassResult:
        """What all ranks made of a pass, in the order in which :meth:`RankModel.report` sends it."""
        mesh, config = self.own.place.mesh, self.config
        first_of_last = mesh.size - mesh.group
        logits = np.empty((len(batch.rows), config.vocab_size), dtype=np.float32)
        states = own.hidden
        routing = own.routing or []
        loads = self.own.local.expert_load()
        for rank in range(first_of_last, mesh.size):
            place = mesh.place(rank)
            first, last = place.head_rows(config.vocab_size)
            if rank == 0:
                logits[:, first:last] = own.logits
                continue
            part = np.empty((len(batch.rows), last - first), dtype=np.float32)
            self._links.receive(part, rank)
            logits[:, first:last] = part
            if rank == first_of_last and wanted.hidden:
                states = np.empty((len(batch.tokens), config.d_model), dtype=np.float32)
                self._links.receive(states, rank)
        for stage in range(1, mesh.pp):
            stage_loads, stage_routing = self._of_stage(mesh.place(stage * mesh.group), len(batch.tokens), wanted)
            loads, routing = loads + stage_loads, routing + stage_routing
        self._load = loads
        return PassResult(logits, states, routing if wanted.routing else None)

    def _of_stage(self, place: RankPlace, n: int, wanted: Wanted) -> tuple[list[NDArray[np.int64]], list[LayerRouting]]:
        """Counts and routing of a later stage's layers, from its first rank."""
        layers = place.layers(self.config)
        specs = [spec for i, spec in self.config.moe_layers if i in layers]
        if not specs:
            return [], []
        counts = np.empty(sum(spec.n_experts for spec in specs), dtype=np.int64)
        self._links.receive(counts, place.rank)
        cuts = list(accumulate(spec.n_experts for spec in specs))
        routing = []
        for spec in specs if wanted.routing else ():
            ids = np.empty((n, spec.top_k), dtype=np.int64)
            weights, logits = (np.empty((n, width), dtype=np.float32) for width in (spec.top_k, spec.n_experts))
            for values in (ids, weights, logits):
                self._links.receive(values, place.rank)
            routing.append(LayerRouting(ids, weights, distribution(logits, spec.score), logits))
        return np.split(counts, cuts[:-1]), routing

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See :class:`Runner`."""
        with self._turn:
            self._links.tell(np.array([_COPY, *(n for pair in pairs for n in pair)], dtype=np.int32))
            self.own.local.copy_blocks(pairs)

    def row_stats(self, logits: Logits) -> tuple[list[int], list[float]]:
        """See :class:`Runner`."""
        return self.own.local.row_stats(logits)

    def weights(self) -> tuple[str, int]:
        """See :class:`Runner`; the bytes are those of all ranks."""
        return self.own.local.weights()[0], self._weight_bytes

    def expert_load(self) -> list[NDArray[np.int64]]:
        """See :class:`Runner`: as of the end of the last pass."""
        return [load.copy() for load in self._load]

    def close(self) -> None:
        """Tell the others that there will be no more passes."""
        if not self._turn.acquire(timeout=_END_WAIT_S):
            return
        try:
            if not self._ended:
                self._ended = True
                with contextlib.suppress(EngineError):  # a rank is gone: there is nobody to part from
                    self._links.tell(np.array([_END], dtype=np.int32))
                self._links.close()
        finally:
            self._turn.release()
