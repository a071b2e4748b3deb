"""Experts on disk, the recently used ones in memory: models larger than memory.

A layer's experts are read when its tokens choose them, several reads at once, into a cache of a stated size; the least
recently used ones make room. Attention, routers, embeddings and the head stay in memory: every token needs them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from quadriga.kernels.cpu import library as cpu
from quadriga.kernels.cpu.bindings import StoreCounts

Extent = tuple[str, int, int]
"""(file name, offset, bytes)."""


class StoreStats(NamedTuple):
    """What the store has done so far."""

    hits: int
    """Experts found in memory."""
    misses: int
    """Experts read from disk."""
    bytes_read: int
    bytes_held: int
    """Memory of the cache that is in use."""

    @property
    def hit_rate(self) -> float:
        """Share of expert visits that needed no disk; 0 before the first."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 0.0


class ExpertStore:
    """See the module docstring.

    Args:
        directory: where the files are.
        extents: [layer][expert][part]: gate (if the model has one), up, down; of a layer without experts empty.
        budget: bytes of memory for cached experts; at least one layer's experts are always held.
        readers: threads that read.

    Raises:
        HardwareError: the system has no memory or threads for it.
    """

    def __init__(
        self, directory: Path, extents: Sequence[Sequence[Sequence[Extent]]], *, budget: int, readers: int = 8
    ) -> None:
        self.handle: int | None = None
        self._files: dict[str, int] = {}
        experts = next(layer for layer in extents if layer)
        n_layers, n_experts, n_parts = len(extents), len(experts), len(experts[0])
        nothing: Sequence[Sequence[Extent]] = [[(experts[0][0][0], 0, 0)] * n_parts] * n_experts
        flat = [extent for layer in extents for expert in layer or nothing for extent in expert]
        self._files = {name: os.open(directory / name, os.O_RDONLY) for name in {e[0] for e in flat}}
        count = len(flat)
        files = (ctypes.c_int32 * count)(*(self._files[e[0]] for e in flat))
        offsets = (ctypes.c_int64 * count)(*(e[1] for e in flat))
        sizes = (ctypes.c_int64 * count)(*(e[2] for e in flat))
        self._lib, handle = cpu.library(), ctypes.c_void_p()
        extents_of = (n_layers, n_experts, n_parts, files, offsets, sizes)
        cpu.call(self._lib.qd_store_create, *extents_of, budget, readers, ctypes.byref(handle))
        self.handle = handle.value

    def stats(self) -> StoreStats:
        """Counters since the store was made."""
        counts = StoreCounts()
        cpu.call(self._lib.qd_store_stats, self.handle, counts)
        return StoreStats(counts.hits, counts.misses, counts.bytes_read, counts.bytes_held)

    def close(self) -> None:
        """Release memory, threads and files."""
        handle, self.handle = self.handle, None
        if handle:
            self._lib.qd_store_destroy(handle, None)
        files, self._files = self._files, {}
        for fd in files.values():
            os.close(fd)

    def __del__(self) -> None:
        self.close()
