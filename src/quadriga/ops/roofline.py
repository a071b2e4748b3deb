"""What this machine can do at most: reading memory, and dot products in registers. Measured, never looked up."""

from __future__ import annotations

from functools import lru_cache

from quadriga.ops import cpu
from quadriga.ops.packing import Bytes, allocate
from quadriga.quant.packed import PACKED

_BYTES = 1 << 29
"""Larger than any cache."""


@lru_cache(maxsize=1)
def _memory() -> Bytes:
    memory = allocate(_BYTES)
    memory[:] = 1
    return memory


def read_bytes_per_s(context: cpu.Context) -> float:
    """Bytes a second that the context's threads read together, streaming half a gigabyte once."""
    memory = _memory()
    return float(context.lib.qd_read_bandwidth(context.handle, memory.ctypes.data, memory.nbytes, 1))


def peak_ops_per_s(context: cpu.Context, form: str) -> float:
    """Operations (a multiplication and an addition are two) a second of the format's dot product, all threads."""
    return float(context.lib.qd_peak(context.handle, PACKED[form].code, 200_000))
