"""The one way a Triton kernel is started, and the means to note launches instead of running them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor

from quadriga.errors import HardwareError

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Kernels run in Triton's interpreter, on the host. Fixed when the kernels are imported, as triton fixes it."""


@dataclass(frozen=True)
class Launch:
    """One start of a kernel."""

    kernel: Any
    """The function under ``@triton.jit``."""
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    """Tensors, numbers and None, in the kernel's order, up to its first constant."""
    constants: dict[str, Any]
    """The kernel's tl.constexpr parameters."""
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """The kernel's name."""
        name: str = self.kernel.__name__
        return name


_recorder: ContextVar[list[Launch] | None] = ContextVar("_recorder", default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Note every launch inside the block, in order. Those with tensors on the meta device are only noted."""
    launches: list[Launch] = []
    token = _recorder.set(launches)
    try:
        yield launches
    finally:
        _recorder.reset(token)


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 2, **constants: Any
) -> None:
    """Run ``kernel`` once for every point of ``grid``, after what was launched before on the same device.

    Args:
        arguments: tensors, numbers and None, in the kernel's order.
        warps: groups of 32 threads a program.
        stages: how deep loads of a loop are pipelined.
        constants: the kernel's tl.constexpr parameters.

    Raises:
        HardwareError: tensors on the host without the interpreter, or on a GPU with it.
    """
    if 0 in grid:
        return
    recorder = _recorder.get()
    if recorder is not None:
        recorder.append(Launch(kernel, grid, arguments, constants, warps, stages))
    device = next(a.device.type for a in arguments if isinstance(a, Tensor))
    if device == "meta":
        assert recorder is not None, "tensors without numbers are for recording()"
        return
    if (device == "cpu") != INTERPRETED:
        raise HardwareError(
            f"Triton's kernels were imported to be {'interpreted' if INTERPRETED else 'compiled for a GPU'}, and these "
            f"tensors are on {device}. "
            + ("Unset TRITON_INTERPRET." if INTERPRETED else "On a machine without a GPU, set TRITON_INTERPRET=1.")
        )
    kernel[grid](*arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True, **constants)
