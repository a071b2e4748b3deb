"""Arrays on a device that become NumPy's where somebody reads them: logits, which the sampler needs on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]


class DeviceArray:
    """Rows of float32 on a device, a ``kernels.cpu.sampling.Logits``. Nobody changes them.

    Attributes:
        tensor: where they are.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._host: Floats | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """As an array's."""
        return tuple(self.tensor.shape)

    def __len__(self) -> int:
        return len(self.tensor)

    def host(self) -> Floats:
        """The array; the first time this waits for the device."""
        if self._host is None:
            self._host = self.tensor.cpu().numpy()
        return self._host

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        values = self.host() if dtype is None else self.host().astype(dtype, copy=False)
        return values.copy() if copy else values

    def __getitem__(self, key: Any) -> Any:
        """A row stays on the device; anything else is read."""
        if isinstance(key, (int, np.integer)) and self.tensor.ndim == 2 and self._host is None:
            return DeviceArray(self.tensor[int(key)])
        return self.host()[key]

    def copy(self) -> Floats:
        """On the host, for whoever changes it."""
        return self.host().copy()
