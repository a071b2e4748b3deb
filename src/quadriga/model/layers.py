"""The small parts: matrices, normalisation, rotary tables, ALiBi slopes.

Modules here only hold parameters; none initialises them (``transformer.random_parameters`` does). torch's own Linear
and Embedding do when they are built, which on the meta device imports torch's compiler: 1.7 s of every load.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quadriga import ops
from quadriga.model.config import AlibiSpec, NormSpec, RopeSpec


class Matrix(nn.Module):
    """A weight (rows, columns): a linear map without bias, or a table of embeddings."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))

    def forward(self, x: Tensor) -> Tensor:
        """x W^T: (..., columns) -> (..., rows)."""
        return F.linear(x, self.weight)

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows of the table: ids (N,) -> (N, columns)."""
        return F.embedding(ids, self.weight)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, weight only; see ``ops.norm``."""

    def __init__(self, d_model: int, spec: NormSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.spec = spec

    def forward(self, x: Tensor) -> Tensor:
        return ops.norm(x, self.weight, self.spec.kind, self.spec.eps)


def rotary_tables(positions: Tensor, spec: RopeSpec, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2j/d), j < d/2, computed in float32 and then cast to ``dtype``.

    Returns:
        two tensors (N, 1, head_dim / 2), ready to broadcast over heads.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[:, None].float() * (1.0 / spec.theta**exponents)  # (N, d/2)
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def alibi_slopes(spec: AlibiSpec, n_heads: int) -> Tensor:
    """The per-head slopes 2^(-max_bias * i / n), n the next power of two; (H,) float32.

    Where n_heads is no power of two, heads take the odd-numbered slopes first, then the even-numbered ones (Press et
    al. 2022, appendix; mosaicml/llm-foundry does the same).
    """
    n = 1 << (n_heads - 1).bit_length()
    slopes = torch.exp2(-spec.max_bias / n * torch.arange(1, n + 1, dtype=torch.float32))
    if n != n_heads:
        slopes = torch.cat((slopes[1::2], slopes[::2]))[:n_heads]
    return slopes
