"""What this machine can do at most: reading memory, and dot products in registers. Measured, never looked up."""

from __future__ import annotations

import ctypes
from functools import lru_cache

from quadriga.kernels.cpu import library as cpu
from quadriga.kernels.cpu.packing import Bytes, allocate

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
    rate = ctypes.c_double()
    context.call(context.lib.qd_read_bandwidth, memory.ctypes.data, memory.nbytes, 1, ctypes.byref(rate))
    return rate.value


def peak_ops_per_s(context: cpu.Context, form: str) -> float:
    """Operations (a multiplication and an addition are two) a second of the format's dot product, all threads."""
    rate = ctypes.c_double()
    context.call(context.lib.qd_peak, cpu.FORMATS[form], 200_000, ctypes.byref(rate))
    return rate.value
