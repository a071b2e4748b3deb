"""The dense feed-forward network, gated or plain."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quadriga import ops
from quadriga.model.config import DenseSpec


class FeedForward(nn.Module):
    """w_down(act(w_gate x) * w_up x), or w_down(act(w_up x)) where the spec is not gated."""

    def __init__(self, d_model: int, spec: DenseSpec) -> None:
        super().__init__()
        self.activation = spec.activation
        self.w_gate = nn.Parameter(torch.empty(spec.d_ff, d_model)) if spec.gated else None
        self.w_up = nn.Parameter(torch.empty(spec.d_ff, d_model))
        self.w_down = nn.Parameter(torch.empty(d_model, spec.d_ff))

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        hidden = F.linear(x, self.w_up)
        if self.w_gate is not None:
            hidden = ops.activate(F.linear(x, self.w_gate), self.activation) * hidden
        else:
            hidden = ops.activate(hidden, self.activation)
        return F.linear(hidden, self.w_down)
