"""A model's parameters where its kernels read them, by the names of ``model.weight_map.parameter_shapes``.

A matrix is numbers, or planes of a quantised format (``kernels.triton.weights``), or runs of rows of several formats;
what else there is, vectors and the matrices that stay wide, is numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from quadriga.errors import ConfigError
from quadriga.kernels.triton.linear import Matrix
from quadriga.kernels.triton.norm import NormWeights
from quadriga.kernels.triton.weights import GroupedWeight
from quadriga.kernels.triton.weights import plain as as_grouped
from quadriga.model.config import NormSpec

COMPUTED = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels compute in."""


class DeviceWeights:
    """The parameters of a model, or of what is named below a prefix of it.

    Args:
        parameters: name -> numbers, or planes of one matrix (1, N, K) or of a layer's experts (E, N, K), or runs of
            rows of a projection. Vectors, routers and biases may be of any float dtype.
        dtype: what states are computed in, and what the plain matrices they are multiplied with are of; None: the
            embedding table's.
        prefix: put before every name that is asked for.

    Raises:
        ConfigError: a dtype that the kernels do not compute in.
    """

    def __init__(self, parameters: Mapping[str, Matrix], dtype: torch.dtype | None = None, *, prefix: str = "") -> None:
        table = parameters["embed.weight"]
        assert not isinstance(table, tuple), "a table is of one format"
        self.device = (table.codes if isinstance(table, GroupedWeight) else table).device
        if dtype is None:
            assert isinstance(table, Tensor), "a table of planes does not say what is computed in"
            dtype = table.dtype
        if dtype not in COMPUTED:
            raise ConfigError(f"the kernels for GPUs compute in float32, bfloat16 or float16; got {dtype}")
        self.dtype = dtype
        self._parameters, self._prefix = parameters, prefix

    def below(self, prefix: str) -> DeviceWeights:
        """Those whose names begin with ``prefix``, without it."""
        return DeviceWeights(self._parameters, self.dtype, prefix=self._prefix + prefix)

    def matrix(self, name: str) -> Matrix:
        """What ``linear`` multiplies with: (N, K)."""
        weight = self._parameters[self._prefix + name]
        return weight.detach() if isinstance(weight, Tensor) else weight

    def experts(self, name: str) -> GroupedWeight:
        """The matrices of a layer's experts (E, N, K); a single matrix as that of one expert, which has all rows."""
        weight = self.matrix(name)
        if not isinstance(weight, Tensor):
            assert isinstance(weight, GroupedWeight), "only a projection has runs of rows"
            return weight
        return as_grouped(weight if weight.ndim == 3 else weight[None])

    def numbers(self, name: str) -> Tensor:
        """A parameter that is never packed."""
        weight = self.matrix(name)
        assert isinstance(weight, Tensor), f"{self._prefix}{name} is numbers"
        return weight

    def numbers_or_none(self, name: str) -> Tensor | None:
        """A vector that not every model has."""
        return self.numbers(name) if self._prefix + name in self._parameters else None

    def norm(self, name: str, spec: NormSpec) -> NormWeights:
        """A norm's numbers as they multiply; ``name`` without .weight."""
        weight = self.numbers(f"{name}.weight")
        bias = self.numbers_or_none(f"{name}.bias")
        return NormWeights(weight + 1 if spec.plus_one else weight, spec.kind, spec.eps, bias)

    def sizes(self) -> Counter[str]:
        """Bytes in every format, or dtype of numbers, of the whole model."""
        n_bytes: Counter[str] = Counter()
        for weight in self._parameters.values():
            for part in weight if isinstance(weight, tuple) else (weight,):
                form = part.format if isinstance(part, GroupedWeight) else str(part.dtype).removeprefix("torch.")
                n_bytes[form] += part.nbytes
        return n_bytes
