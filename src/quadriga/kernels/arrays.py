"""NumPy arrays as torch tensors and back, bfloat16 included: between files and kernels, and the model in torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from quadriga.quant.dtypes import DTYPES, Array, name_of


def tensor(values: Array) -> Tensor:
    """An array as a tensor of the same numbers and dtype, sharing its memory where it is contiguous and writable."""
    values = np.ascontiguousarray(values).reshape(values.shape)
    if not values.flags.writeable:
        values = values.copy()
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def array(values: Tensor) -> Array:
    """A tensor on the host as an array that shares its memory."""
    values = values.detach().cpu().contiguous()
    if values.dtype == torch.bfloat16:
        return values.view(torch.uint16).numpy().view(DTYPES["bfloat16"])
    return values.numpy()


def arrays(parameters: Mapping[str, Tensor]) -> dict[str, Array]:
    """Named tensors as arrays."""
    return {name: array(values) for name, values in parameters.items()}


def torch_dtype(dtype: np.dtype[np.generic]) -> torch.dtype:
    """torch's dtype of the same name."""
    found = getattr(torch, name_of(dtype))
    assert isinstance(found, torch.dtype)
    return found
