"""Block formats of files to float32 by the CPU's kernels, on all processors: ``quant.codec.dequantize`` bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadriga.kernels.cpu.file_context import is_built, packing_context
from quadriga.kernels.cpu.packing import STORED, codebook_of
from quadriga.quant import codec
from quadriga.quant.formats import FORMATS


def dequantize_into(out: NDArray[np.float32], raw: Any, name: str) -> None:
    """Dequantise whole blocks.

    Args:
        out: float32, contiguous, of any shape; is filled with the blocks' numbers in their order.
        raw: the stored bytes (any contiguous buffer) of just so many blocks.
        name: a block format of ``quant.formats``.
    """
    stored, spec = np.frombuffer(raw, dtype=np.uint8), FORMATS[name]
    n_blocks = out.size // spec.block
    assert out.dtype == np.float32 and out.flags.c_contiguous and out.flags.writeable, "memory to fill"
    assert (out.size, stored.nbytes) == (n_blocks * spec.block, n_blocks * spec.nbytes), "whole blocks, as many numbers"
    if not is_built():
        out.reshape(-1)[:] = codec.dequantize(stored, name)
        return
    context, table = packing_context(), codebook_of(name)
    context.call(context.lib.qd_dequantize, STORED[name], stored.ctypes.data, n_blocks, table, out.ctypes.data)
