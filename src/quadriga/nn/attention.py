"""Grouped-query attention: one packed projection, norms of q and k, clipping, rotation, and the context's attend."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quadriga.kernels import ops
from quadriga.model.config import AlibiSpec, AttentionSpec, NormSpec, RopeSpec
from quadriga.model.positions import alibi_slopes
from quadriga.nn.context import ForwardContext, Scoring
from quadriga.nn.linear import Linear
from quadriga.nn.norm import Norm
from quadriga.nn.rope import Rotations


class Attention(nn.Module):
    """wqkv -> norm q and k -> clip -> rotate q and k -> attend -> [gate] -> wo; biases belong to the projections.

    Clipping comes before the rotation (DBRX) and after the norms (OLMoE), which Hunyuan takes after the rotation.
    """

    def __init__(self, d_model: int, spec: AttentionSpec, layer: int) -> None:
        super().__init__()
        self.spec = spec
        self.layer = layer
        self.wqkv = Linear(spec.qkv_dim, d_model, bias=spec.qkv_bias)
        self.wo = Linear(d_model, spec.q_dim, bias=spec.out_bias)
        self.sinks = nn.Parameter(torch.empty(spec.n_heads)) if spec.sinks else None
        self.q_norm = self.k_norm = None
        if spec.qk_norm is not None:
            by_head, norm = (
                spec.qk_norm.over == "head",
                NormSpec(kind="rms", eps=spec.qk_norm.eps, plus_one=spec.qk_norm.plus_one),
            )
            self.q_norm = Norm(spec.head_dim if by_head else spec.q_dim, norm)
            self.k_norm = Norm(spec.head_dim if by_head else spec.kv_dim, norm)
        self.slopes: Tensor | None = None
        """ALiBi's, one a head; None until the first pass, unless the layer has some heads of a larger one."""

    def forward(self, x: Tensor, context: ForwardContext, rotations: Rotations) -> Tensor:
        """x (N, D) -> (N, D)."""
        spec = self.spec
        late = spec.qk_norm is not None and spec.qk_norm.after_rotation
        gate = spec.q_dim if spec.output_gate else 0
        projected, gates = torch.split(self.wqkv(x), [spec.qkv_dim - gate, gate], dim=-1)
        if spec.keys_as_values:
            projected = torch.cat((projected, projected[:, spec.q_dim :]), dim=-1)
        qkv = projected if late else self._normed(projected)
        if spec.clip_qkv is not None:
            qkv = qkv.clamp(-spec.clip_qkv, spec.clip_qkv)
        heads = qkv.view(x.shape[0], -1, spec.head_dim)  # (N, H + 2K, d)
        qk, v = heads[:, : spec.n_heads + spec.n_kv_heads], heads[:, spec.n_heads + spec.n_kv_heads :]
        if isinstance(spec.position, RopeSpec):
            qk = self._rotated(qk, spec.position, rotations)
        if late:
            qk = self._normed(torch.cat((qk, v), dim=1).flatten(1)).view_as(heads)[:, : qk.shape[1]]
        q, k = qk[:, : spec.n_heads], qk[:, spec.n_heads :]
        if spec.v_norm_eps is not None:
            v = ops.norm(v, torch.ones_like(v[0, 0]), "rms", spec.v_norm_eps)
        attended = context.attend(self.layer, q, k, v, self._scoring_on(x.device))
        attended = attended.reshape(x.shape[0], -1)
        mixed: Tensor = self.wo(attended * gates.sigmoid() if spec.output_gate else attended)
        return mixed

    def _rotated(self, qk: Tensor, rope: RopeSpec, rotations: Rotations) -> Tensor:
        """(N, heads, d) with the first ``rope.rotated`` numbers of every head turned."""
        cos, sin = rotations.tables(rope, self.spec.head_dim)
        n = rope.rotated(self.spec.head_dim)
        if n == self.spec.head_dim:
            return ops.rope(qk, cos, sin)
        return torch.cat((ops.rope(qk[..., :n], cos, sin), qk[..., n:]), dim=-1)

    def _normed(self, qkv: Tensor) -> Tensor:
        """(N, H d + 2 K d) with q and k normed."""
        if self.q_norm is None or self.k_norm is None:
            return qkv
        spec = self.spec
        q, k, v = torch.split(qkv, [spec.q_dim, spec.kv_dim, spec.kv_dim], dim=-1)
        q, k = (
            norm(part.reshape(len(part), -1, len(norm.weight))).reshape(part.shape)
            for norm, part in ((self.q_norm, q), (self.k_norm, k))
        )
        return torch.cat((q, k, v), dim=-1)

    def _scoring_on(self, device: torch.device) -> Scoring:
        """How q·k becomes weights; slopes are made at the first pass: a model is built where nothing is computed."""
        if self.slopes is None and isinstance(self.spec.position, AlibiSpec):
            self.slopes = torch.from_numpy(alibi_slopes(self.spec.position, self.spec.n_heads))
        if self.slopes is not None:
            self.slopes = self.slopes.to(device)
        spec = self.spec
        return Scoring(spec.score_scale, spec.soft_cap, self.slopes, spec.window, self.sinks)
