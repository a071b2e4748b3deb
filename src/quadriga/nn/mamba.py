"""Mamba-2: a matrix a head, which decays, is written to and read by each token; see :class:`Mamba2Spec`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quadriga.kernels import ops
from quadriga.model.config import Mamba2Spec, NormSpec
from quadriga.nn.context import ForwardContext
from quadriga.nn.linear import Linear
from quadriga.nn.norm import Norm


class Mamba2(nn.Module):
    """w_in, w_dt -> convolve, silu -> recurrence, skip -> times silu(z) -> norm of every group -> w_out.

    Sources: arXiv 2405.21060, transformers 4.57.6 and 5.24.0 (modeling_granitemoehybrid; only the second norms groups).
    """

    def __init__(self, d_model: int, spec: Mamba2Spec, layer: int) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        self.w_in = Linear(spec.inner_dim + spec.width, d_model)
        self.w_dt = Linear(spec.n_heads, d_model)
        self.taps = nn.Parameter(torch.empty(spec.width, spec.taps))
        self.conv_bias = nn.Parameter(torch.empty(spec.width)) if spec.conv_bias else None
        self.rate = nn.Parameter(torch.empty(spec.n_heads))
        self.dt = nn.Parameter(torch.empty(spec.n_heads))
        self.skip = nn.Parameter(torch.empty(spec.n_heads))
        self.norm = Norm(spec.inner_dim, NormSpec(kind="rms", eps=spec.eps))
        self.w_out = Linear(d_model, spec.inner_dim)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """x (N, D) -> (N, D)."""
        spec = self.spec
        z, convolved = torch.split(self.w_in(x), [spec.inner_dim, spec.width], dim=-1)
        rows = torch.cat((convolved, self.w_dt(x)), dim=-1)
        out = context.recur(self.layer, rows, spec.state, self._scan)
        mixed: Tensor = self.w_out(self._normed(out * F.silu(z.to(out.dtype))).to(x.dtype) * self.norm.weight)
        return mixed

    def _normed(self, y: Tensor) -> Tensor:
        """Each group of heads by itself, without the weight: (N, H P) -> (N, H P)."""
        groups = y.reshape(len(y), self.spec.n_groups, -1)
        return ops.norm(groups, torch.ones_like(groups[0, 0]), "rms", self.spec.eps).reshape(y.shape)

    def _scan(self, rows: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        spec, (before, matrix) = self.spec, state
        convolved, a = torch.split(rows, [spec.width, spec.n_heads], dim=-1)
        after = torch.cat((before, convolved.to(before.dtype)))[-(spec.taps - 1) :]
        made = ops.causal_conv(convolved, self.taps, before)
        made = F.silu(made if self.conv_bias is None else made + self.conv_bias.to(made.dtype))
        group = spec.n_groups * spec.state_dim
        x, b, c = torch.split(made, [spec.inner_dim, group, group], dim=-1)
        x = x.view(len(rows), spec.n_heads, spec.head_dim)
        b, c = (t.view(len(rows), spec.n_groups, spec.state_dim) for t in (b, c))
        wide = matrix.dtype
        step = F.softplus(a.to(wide) + self.dt.to(wide))
        rate = self.rate.to(wide).exp() if spec.log_rate else -self.rate.to(wide)
        out, matrix = ops.state_space(x, b, c, step, -rate * step, matrix)
        out = out + self.skip.to(wide)[:, None] * x.to(wide)
        return out.flatten(1), (after, matrix)
