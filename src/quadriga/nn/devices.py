"""torch's threads, dtypes and devices, and the one switch of its arithmetic that is used."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator

import torch

from quadriga import runtime
from quadriga.errors import ConfigError, HardwareError

_ROWS_FOR_ONEDNN = 4


def set_threads(threads: int | None) -> int:
    """Let torch use ``threads`` threads, or all processors of this process if None. Returns the number in force.

    Raises:
        ConfigError: not a whole number from 1 to MOST_THREADS.
    """
    count = runtime.n_threads(threads)
    torch.set_num_threads(count)
    return count


@contextlib.contextmanager
def quick_float32(rows: int) -> Iterator[None]:
    """Let float32 matrix products of several ``rows`` go to oneDNN on CPUs where it computes in true float32.

    torch sends float32 products to MKL; through oneDNN SmolLM2's prefill was 7 % faster on an AVX-512 EPYC. The switch,
    "medium" precision, permits bf16 arithmetic, which oneDNN uses only on processors with AMX: there, and on processors
    that are not x86, nothing is changed. A single row is left alone too: vector products were slower through it.
    """
    safe = platform.machine() in ("x86_64", "AMD64") and runtime.cpu_flags() and "amx_bf16" not in runtime.cpu_flags()
    if not safe or rows < _ROWS_FOR_ONEDNN:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def resolve_dtype(name: str, device: str = "cpu") -> torch.dtype:
    """A torch dtype from its name; "auto" is float32 on a CPU and bfloat16 elsewhere.

    Raises:
        ConfigError: the name is not one of DTYPES, their short forms, or "auto".
    """
    if name == "auto":
        name = "float32" if device == "cpu" else "bfloat16"
    name = runtime.DTYPE_ALIASES.get(name, name)
    if name not in runtime.DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(runtime.DTYPES)} or auto, got {name!r}")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def free_bytes(device: torch.device) -> int | None:
    """Bytes of an accelerator's memory that nobody has; None: the device is the host."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def resolve_device(name: str) -> torch.device:
    """A torch device that exists on this machine; "auto" takes the first CUDA device, else the CPU.

    Raises:
        HardwareError: the device is not there.
        ConfigError: the name is not a device.
    """
    runtime.check_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise HardwareError(
            f"device {name!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices. Use device='cpu'."
        )
    return device
