"""This machine's limits, always measured: memory read bandwidth, and dot products in registers."""

from __future__ import annotations

import ctypes
from functools import lru_cache

from quadriga.kernels.cpu import library as cpu
from quadriga.kernels.cpu.packing import Bytes, allocate

_BYTES = 1 << 29
"""Bytes to read; larger than any cache."""


@lru_cache(maxsize=1)
def _memory() -> Bytes:
    memory = allocate(_BYTES)
    memory[:] = 1
    return memory


def read_bytes_per_s(context: cpu.Context) -> float:
    """Read bandwidth of all the context's threads together in bytes per second, streaming half a gigabyte once."""
    memory = _memory()
    rate = ctypes.c_double()
    context.call(context.lib.qd_read_bandwidth, memory.ctypes.data, memory.nbytes, 1, ctypes.byref(rate))
    return rate.value


def peak_ops_per_s(context: cpu.Context, packed_format: str) -> float:
    """Peak of the format's dot product on all threads, in operations per second (a multiply-add counts as two)."""
    rate = ctypes.c_double()
    context.call(context.lib.qd_peak, cpu.FORMATS[packed_format], 200_000, ctypes.byref(rate))
    return rate.value
