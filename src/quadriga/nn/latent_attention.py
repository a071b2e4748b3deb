"""Multi-head latent attention in its absorbed form: one cached latent a token is key and value of every head.

    x ──wq, or wq_a ─ norm ─ wq_b──► heads (nope, rope) ──wk_b──► query (R + rope) ┐
    x ──wkv_a──► norm(latent) (R), rotated key (rope) ──────────────────────────► attend ──wv_b──► wo

The sum over W_Kb that would make a head's keys of the latents is done to its query instead, the sum over W_Vb that
would make values to its result: see ``LatentAttentionSpec``. Training, prompts and single tokens share this one form.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quadriga.kernels import ops
from quadriga.model.config import LatentAttentionSpec, NormSpec, RopeSpec
from quadriga.nn.context import ForwardContext, Scoring
from quadriga.nn.linear import Linear, whole
from quadriga.nn.norm import Norm
from quadriga.nn.rope import Rotations


class HeadLinear(Linear):
    """A matrix a head, all below each other: every head's numbers times its own rows."""

    def forward(self, x: Tensor) -> Tensor:
        """x (N, H, columns) -> (N, H, rows / H)."""
        weight = whole(self.weight).to(x.dtype)
        return torch.einsum("nhi,hoi->nho", x, weight.view(x.shape[1], -1, weight.shape[-1]))


class LatentAttention(nn.Module):
    """The mixer of DeepSeek-V2 and V3; parameters as in ``model.weight_map``."""

    def __init__(self, d_model: int, spec: LatentAttentionSpec, layer: int) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        rows, norm = spec.n_heads * spec.qk_dim, NormSpec(kind="rms", eps=spec.norm_eps)
        self.wq = self.wq_a = self.wq_b = self.q_a_norm = None
        if spec.q_rank is None:
            self.wq = Linear(rows, d_model)
        else:
            self.wq_a, self.q_a_norm = Linear(spec.q_rank, d_model), Norm(spec.q_rank, norm)
            self.wq_b = Linear(rows, spec.q_rank)
        self.wkv_a = Linear(spec.head_dim, d_model)
        self.kv_a_norm = Norm(spec.kv_rank, norm)
        self.wk_b = HeadLinear(spec.n_heads * spec.kv_rank, spec.nope_dim)
        self.wv_b = HeadLinear(spec.n_heads * spec.v_dim, spec.kv_rank)
        self.wo = Linear(d_model, spec.n_heads * spec.v_dim)

    def forward(self, x: Tensor, context: ForwardContext, rotations: Rotations) -> Tensor:
        """x (N, D) -> (N, D)."""
        spec = self.spec
        assert isinstance(spec.position, RopeSpec), "the spec requires it"
        cos, sin = rotations.tables(spec.position, spec.rope_dim)
        plain, turning = torch.split(self._queries(x), [spec.nope_dim, spec.rope_dim], dim=-1)
        latent, key = torch.split(self.wkv_a(x), [spec.kv_rank, spec.rope_dim], dim=-1)
        latent = self.kv_a_norm(latent)[:, None]  # (N, 1, R)
        query = torch.cat((self.wk_b(plain), ops.rope(turning, cos, sin)), dim=-1)
        keys = torch.cat((latent, ops.rope(key[:, None], cos, sin)), dim=-1)
        attended = context.attend(self.layer, query, keys, latent, Scoring(spec.score_scale))
        mixed: Tensor = self.wo(self.wv_b(attended).flatten(1))
        return mixed

    def _queries(self, x: Tensor) -> Tensor:
        """(N, H, nope_dim + rope_dim)."""
        if self.wq is not None:
            rows = self.wq(x)
        else:
            assert self.wq_a is not None and self.q_a_norm is not None and self.wq_b is not None
            rows = self.wq_b(self.q_a_norm(self.wq_a(x)))
        heads: Tensor = rows.view(len(x), self.spec.n_heads, -1)
        return heads
