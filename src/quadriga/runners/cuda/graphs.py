"""Passes of single tokens, captured once for each size of batch and replayed: a CUDA graph a bucket.

A batch is filled up to the next bucket; places that nobody has write nothing and compute what nobody reads. Tensors
that a captured pass makes lie in memory of its own, the same at every replay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quadriga.kernels.pass_batch import PassBatch
from quadriga.runners.cuda.inputs import DevicePass, StaticPass
from quadriga.runners.cuda.model import Computed

Compute = Callable[[DevicePass], Computed]
Replay = Callable[[], Computed]
Capture = Callable[[Callable[[], Computed]], Replay]
"""Takes a pass over tensors that stay, returns what runs it again."""

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Sizes that are captured; larger batches are computed without a graph."""


def no_capture(run: Callable[[], Computed]) -> Replay:
    """On a host the pass is simply computed again."""
    return run


class CudaCapture:
    """Captures on a CUDA device; all graphs share one pool of memory, for they never run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Computed]) -> Replay:
        """Compute once beside the others, so that kernels are compiled and nothing is loaded lazily, then capture."""
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            made = run()

        def replay() -> Computed:
            graph.replay()
            return made

        return replay


class DecodeGraphs:
    """One captured pass for each bucket, made when it is first met.

    Args:
        compute: a pass.
        static: makes the inputs of a bucket, which write nothing until they are filled.
        most: no batch is larger.
    """

    def __init__(self, compute: Compute, static: Callable[[int], StaticPass], capture: Capture, most: int) -> None:
        self._compute, self._static, self._capture = compute, static, capture
        self.buckets = [n for n in BUCKETS if n < 2 * most]
        self._made: dict[int, tuple[StaticPass, Replay]] = {}

    def bucket(self, n: int) -> int | None:
        """The least size that has room for n tokens; None: no graph has."""
        return next((size for size in self.buckets if size >= n), None)

    def run(self, batch: PassBatch) -> Computed:
        """Compute a pass of single tokens; the results' first rows are its own, until the next run."""
        size = self.bucket(len(batch.tokens))
        assert size is not None, "asked before"
        if size not in self._made:
            static = self._static(size)
            self._made[size] = static, self._capture(lambda: self._compute(static.inputs))
        static, replay = self._made[size]
        static.fill(batch)
        return replay()
