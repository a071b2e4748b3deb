"""Random tensors of the tests, the same at every call."""

from __future__ import annotations

import torch
from torch import Tensor


def drawn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ints(*values: int) -> Tensor:
    """int32, as the kernels take them."""
    return torch.tensor(values, dtype=torch.int32)
