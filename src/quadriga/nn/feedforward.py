"""The dense feed-forward network, gated or plain."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quadriga.kernels import ops
from quadriga.model.config import DenseSpec
from quadriga.nn.linear import Weight, linear


class FeedForward(nn.Module):
    """w_down(act(w_gate x) * w_up x), or w_down(act(w_up x)) where the spec is not gated."""

    w_gate: Weight | None
    w_up: Weight
    w_down: Weight

    def __init__(self, d_model: int, spec: DenseSpec) -> None:
        super().__init__()
        self.activation = spec.activation
        self.w_gate = nn.Parameter(torch.empty(spec.d_ff, d_model)) if spec.gated else None
        self.w_up = nn.Parameter(torch.empty(spec.d_ff, d_model))
        self.w_down = nn.Parameter(torch.empty(d_model, spec.d_ff))

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        return linear(self.hidden(x), self.w_down)

    def hidden(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, F): what w_down is multiplied with."""
        up = linear(x, self.w_up)
        if self.w_gate is not None:
            return ops.gated(linear(x, self.w_gate), up, self.activation)
        return ops.activate(up, self.activation)
