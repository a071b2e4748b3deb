"""LayerNorm and RMSNorm. Modules here only hold parameters; ``transformer.random_parameters`` initialises them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quadriga.kernels import ops
from quadriga.model.config import NormSpec


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, with a bias where the spec has one; see ``ops.norm``."""

    def __init__(self, d_model: int, spec: NormSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.bias = nn.Parameter(torch.empty(d_model)) if spec.bias else None
        self.spec = spec

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 1 if self.spec.plus_one else self.weight
        return ops.norm(x, weight, self.spec.kind, self.spec.eps, self.bias)
