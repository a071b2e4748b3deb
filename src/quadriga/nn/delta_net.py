"""Gated DeltaNet: a matrix a head, changed by each token and read by a query; see :class:`DeltaNetSpec`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quadriga.kernels import ops
from quadriga.model.config import DeltaNetSpec, NormSpec
from quadriga.nn.context import ForwardContext
from quadriga.nn.linear import Linear
from quadriga.nn.norm import Norm


class DeltaNet(nn.Module):
    """w_in, w_ba -> convolve, silu -> delta rule -> norm of every head times silu(z) -> w_out.

    Sources: arXiv 2412.06464 (equation 10), transformers 4.57.6, modeling_qwen3_next (``Qwen3NextGatedDeltaNet``).
    """

    def __init__(self, d_model: int, spec: DeltaNetSpec, layer: int) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        self.w_in = Linear(spec.width + spec.value_dim, d_model)
        self.w_ba = Linear(2 * spec.n_v_heads, d_model)
        self.taps = nn.Parameter(torch.empty(spec.width, spec.taps))
        self.rate = nn.Parameter(torch.empty(spec.n_v_heads))
        self.dt = nn.Parameter(torch.empty(spec.n_v_heads))
        self.norm = Norm(spec.v_dim, NormSpec(kind="rms", eps=spec.eps))
        self.w_out = Linear(d_model, spec.value_dim)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """x (N, D) -> (N, D)."""
        spec = self.spec
        convolved, z = torch.split(self.w_in(x), [spec.width, spec.value_dim], dim=-1)
        b, a = self.w_ba(x).chunk(2, dim=-1)
        rows = torch.cat((convolved, b, a), dim=-1)
        out = context.recur(self.layer, rows, spec.state, self._scan).reshape(-1, spec.v_dim)
        gated = self.norm(out.to(x.dtype)) * F.silu(z.reshape(-1, spec.v_dim))
        mixed: Tensor = self.w_out(gated.view(len(x), -1))
        return mixed

    def _scan(self, rows: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        spec, (before, matrix) = self.spec, state
        x, b, a = torch.split(rows, [spec.width, spec.n_v_heads, spec.n_v_heads], dim=-1)
        after = torch.cat((before, x.to(before.dtype)))[-(spec.taps - 1) :]
        made = F.silu(ops.causal_conv(x, self.taps, before))
        q, k, v = torch.split(made, [spec.qk_dim, spec.qk_dim, spec.value_dim], dim=-1)
        q, k = (self._to_value_heads(t.view(len(x), spec.n_k_heads, spec.k_dim)) for t in (q, k))
        wide = matrix.dtype
        rate = self.rate.to(wide).exp() if spec.log_rate else -self.rate.to(wide)
        out, matrix = ops.delta_rule(
            q,
            k,
            v.view(len(x), spec.n_v_heads, spec.v_dim),
            -rate * F.softplus(a.to(wide) + self.dt.to(wide)),
            b.to(wide).sigmoid(),
            matrix,
        )
        return out, (after, matrix)

    def _to_value_heads(self, t: Tensor) -> Tensor:
        """(T, G, d) -> (T, H, d): the head of q or k that each head of v has."""
        times = self.spec.n_v_heads // self.spec.n_k_heads
        return t.repeat(1, times, 1) if self.spec.tiled else t.repeat_interleave(times, dim=1)
