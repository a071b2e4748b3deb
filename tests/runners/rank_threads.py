"""Ranks that are threads of one process: the links without torch.distributed, for tests of what ranks compute."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Barrier
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadriga.io.open import Checkpoint
from quadriga.model.rank_mesh import RankMesh
from quadriga.runners.make import make_ranked
from quadriga.runners.ranks import RankedModel, RankModel, follow
from tests.waiting import HANG_S


class Wires:
    """What the threads of a mesh share."""

    def __init__(self, mesh: RankMesh) -> None:
        self.mesh = mesh
        self.queues = {(a, b): SimpleQueue[Any]() for a in range(mesh.size) for b in range(mesh.size)}
        self.stages = [Barrier(mesh.group) for _ in range(mesh.pp)]
        self.parts: list[Any] = [None] * mesh.size
        self.all, self.told = Barrier(mesh.size), [""] * mesh.size
        self.n_meetings = 0


class ThreadLinks:
    """See ``runners.ranks.Links``."""

    def __init__(self, wires: Wires, rank: int) -> None:
        self.place, self._wires = wires.mesh.place(rank), wires

    def meet(self, parts: NDArray[np.float32]) -> None:
        place, wires = self.place, self._wires
        barrier, first = wires.stages[place.stage], place.stage * place.mesh.group
        wires.parts[place.rank] = parts[place.index].copy()
        wires.n_meetings += place.rank == 0
        barrier.wait(HANG_S)
        for index in range(place.mesh.group):
            parts[index] = wires.parts[first + index]
        barrier.wait(HANG_S)

    def send(self, values: NDArray[Any], to: int) -> None:
        self._wires.queues[self.place.rank, to].put(values.copy())

    def receive(self, out: NDArray[Any], source: int) -> None:
        got = self._wires.queues[source, self.place.rank].get(timeout=HANG_S)
        assert (got.shape, got.dtype) == (out.shape, out.dtype)
        out[...] = got

    def tell(self, message: NDArray[np.int32]) -> None:
        for rank in range(1, self.place.mesh.size):
            self.send(message, rank)

    def hear(self) -> NDArray[np.int32]:
        heard: NDArray[np.int32] = self._wires.queues[0, self.place.rank].get(timeout=HANG_S)
        return heard

    def compare(self, facts: str) -> list[str]:
        self._wires.told[self.place.rank] = facts
        self._wires.all.wait(HANG_S)
        told = list(self._wires.told)
        self._wires.all.wait(HANG_S)
        return told

    def close(self) -> None:
        pass

    def abandon(self, exit_code: int) -> None:
        pass


class RankThreads:
    """A model on the ranks of a mesh, each a thread; ``runner`` is rank 0's.

    Args:
        opened: the checkpoint of a rank.
        how: options of ``make_ranked``.
    """

    def __init__(self, opened: Callable[[int], Checkpoint], mesh: RankMesh, **how: Any) -> None:
        self.wires = Wires(mesh)
        self._pool = ThreadPoolExecutor(mesh.size)
        made = [self._pool.submit(self._make, opened, rank, how) for rank in range(mesh.size)]
        models = [future.result(HANG_S) for future in made]
        self.runner, others = models[0], models[1:]
        assert isinstance(self.runner, RankedModel)
        self.others: list[RankModel] = [one for one in others if isinstance(one, RankModel)]
        assert len(self.others) == mesh.size - 1
        self._following = [self._pool.submit(follow, one) for one in self.others]

    def _make(self, opened: Callable[[int], Checkpoint], rank: int, how: dict[str, Any]) -> RankedModel | RankModel:
        return make_ranked(opened(rank), ThreadLinks(self.wires, rank), threads=1, **how)

    def __enter__(self) -> RankThreads:
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.close()
        for future in self._following:
            future.result(HANG_S)
        self._pool.shutdown()
