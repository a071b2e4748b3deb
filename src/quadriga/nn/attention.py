"""Grouped-query attention: one packed projection, clipping, rotation, and the context's attend."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quadriga.kernels import ops
from quadriga.model.config import AlibiSpec, AttentionSpec, RopeSpec
from quadriga.model.positions import alibi_slopes
from quadriga.nn.context import ForwardContext, Scoring
from quadriga.nn.linear import Linear
from quadriga.nn.rope import Rotations


class Attention(nn.Module):
    """wqkv -> clip -> rotate q and k -> attend -> wo. Clipping comes before the rotation (DBRX)."""

    def __init__(self, d_model: int, spec: AttentionSpec, layer: int) -> None:
        super().__init__()
        self.spec = spec
        self.layer = layer
        self.wqkv = Linear(spec.qkv_dim, d_model)
        self.wo = Linear(d_model, spec.q_dim)
        self._scoring: Scoring | None = None

    def forward(self, x: Tensor, context: ForwardContext, rotations: Rotations) -> Tensor:
        """x (N, D) -> (N, D)."""
        spec = self.spec
        qkv = self.wqkv(x)
        if spec.clip_qkv is not None:
            qkv = qkv.clamp(-spec.clip_qkv, spec.clip_qkv)
        heads = qkv.view(x.shape[0], -1, spec.head_dim)  # (N, H + 2K, d)
        qk, v = heads.split((spec.n_heads + spec.n_kv_heads, spec.n_kv_heads), dim=1)
        if isinstance(spec.position, RopeSpec):
            qk = ops.rope(qk, *rotations.tables(spec.position, spec.head_dim))
        q, k = qk.split((spec.n_heads, spec.n_kv_heads), dim=1)
        attended = context.attend(self.layer, q, k, v, self._scoring_on(x.device))
        mixed: Tensor = self.wo(attended.reshape(x.shape[0], -1))
        return mixed

    def _scoring_on(self, device: torch.device) -> Scoring:
        """How q·k becomes scores; made at the first pass, for a model is built where nothing is computed."""
        if self._scoring is None:
            slopes = None
            if isinstance(self.spec.position, AlibiSpec):
                slopes = torch.from_numpy(alibi_slopes(self.spec.position, self.spec.n_heads)).to(device)
            self._scoring = Scoring(self.spec.score_scale, self.spec.soft_cap, slopes)
        return self._scoring
