"""Grouped-query attention: one packed projection, clipping, rotation, and the context's attend."""

from __future__ import annotations

from torch import Tensor, nn

from quadriga import ops
from quadriga.model.config import ModelConfig
from quadriga.model.context import ForwardContext, Scoring
from quadriga.model.layers import Matrix


class Attention(nn.Module):
    """wqkv -> clip -> rotate q and k -> attend -> wo. Clipping comes before the rotation (DBRX)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.spec = config.attn
        self.layer = layer
        self.wqkv = Matrix(self.spec.qkv_dim, config.d_model)
        self.wo = Matrix(config.d_model, self.spec.q_dim)

    def forward(
        self, x: Tensor, context: ForwardContext, rotary: tuple[Tensor, Tensor] | None, scoring: Scoring
    ) -> Tensor:
        """x (N, D) -> (N, D); ``rotary`` is None for models without rotary positions."""
        spec = self.spec
        qkv = self.wqkv(x)
        if spec.clip_qkv is not None:
            qkv = qkv.clamp(-spec.clip_qkv, spec.clip_qkv)
        heads = qkv.view(x.shape[0], -1, spec.head_dim)  # (N, H + 2K, d)
        qk, v = heads.split((spec.n_heads + spec.n_kv_heads, spec.n_kv_heads), dim=1)
        if rotary is not None:
            qk = ops.rope(qk, *rotary)
        q, k = qk.split((spec.n_heads, spec.n_kv_heads), dim=1)
        mixed: Tensor = self.wo(context.attend(self.layer, q, k, v, scoring).reshape(x.shape[0], -1))
        return mixed
