"""LFM2's gated short convolution: w_out (c * conv(b * x)), where b, c and x are the thirds of w_in h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quadriga.kernels import ops
from quadriga.model.config import ShortConvSpec
from quadriga.nn.context import ForwardContext
from quadriga.nn.linear import Linear


class ShortConv(nn.Module):
    """See :class:`ShortConvSpec`. Source: transformers 4.57.6, modeling_lfm2 (``Lfm2ShortConv``)."""

    def __init__(self, d_model: int, spec: ShortConvSpec, layer: int) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        self.w_in = Linear(3 * spec.width, d_model)
        self.taps = nn.Parameter(torch.empty(spec.width, spec.taps))
        self.w_out = Linear(d_model, spec.width)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """x (N, D) -> (N, D)."""
        b, c, values = self.w_in(x).chunk(3, dim=-1)
        mixed: Tensor = self.w_out(c * context.recur(self.layer, b * values, self.spec.state, self._scan))
        return mixed

    def _scan(self, x: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        (before,) = state
        after = torch.cat((before, x.to(before.dtype)))[-(self.spec.taps - 1) :]
        return ops.causal_conv(x, self.taps, before), (after,)
