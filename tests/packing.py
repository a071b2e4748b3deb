"""Packing for tests that think in tensors."""

from __future__ import annotations

from torch import Tensor

from quadriga.kernels import arrays
from quadriga.kernels.cpu import packing
from quadriga.kernels.cpu.library import Context
from quadriga.kernels.cpu.packing import Packed


def pack(values: Tensor, form: str, *, importance: Tensor | None = None) -> Packed:
    """``packing.pack`` of a tensor."""
    weights = None if importance is None else arrays.array(importance)
    return packing.pack(arrays.array(values), form, importance=weights)


def unpack(packed: Packed, first: int = 0, n: int | None = None) -> Tensor:
    """The numbers of a packed matrix as a tensor."""
    return arrays.tensor(packed.unpack(first, n))


def linear(packed: Packed, x: Tensor, context: Context | None = None) -> Tensor:
    """``packing.linear`` of tensors."""
    return arrays.tensor(packing.linear(packed, arrays.array(x), context))
