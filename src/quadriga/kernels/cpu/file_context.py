"""The kernels for what reads and writes files: one context with all processors, or that there is none."""

from __future__ import annotations

import logging
from functools import lru_cache

from quadriga import runtime
from quadriga.errors import HardwareError
from quadriga.kernels.cpu import library as cpu

_log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def packing_context() -> cpu.Context:
    """Threads for packing and measuring: all of this process's processors."""
    return cpu.Context(min(runtime.cpu_count(), runtime.MOST_THREADS))


@lru_cache(maxsize=1)
def is_built() -> bool:
    """False, said once, where the library is missing: files can then still be read and written, slowly."""
    try:
        cpu.library()
    except HardwareError as error:
        _log.warning("Blocks go through NumPy, many times slower than through the CPU kernels: %s", error)
        return False
    return True
