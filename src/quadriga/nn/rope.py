"""Rotary tables: cos and sin at the positions of one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from quadriga.model.config import RopeSpec
from quadriga.model.positions import inverse_frequencies


def rotary_tables(positions: Tensor, spec: RopeSpec, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2j/d), j < d/2, computed in float32 and then cast to ``dtype``.

    Returns:
        two tensors (N, 1, head_dim / 2), ready to broadcast over heads.
    """
    frequencies = torch.from_numpy(inverse_frequencies(spec, head_dim)).to(positions.device)
    angles = positions[:, None].float() * frequencies  # (N, d/2)
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


class Rotations:
    """cos and sin at the positions of one pass, computed once for each kind of rotation that its layers have."""

    def __init__(self, positions: Tensor, dtype: torch.dtype) -> None:
        self._positions, self._dtype = positions, dtype
        self._made: dict[tuple[RopeSpec, int], tuple[Tensor, Tensor]] = {}

    def tables(self, spec: RopeSpec, head_dim: int) -> tuple[Tensor, Tensor]:
        """See :func:`rotary_tables`."""
        if (spec, head_dim) not in self._made:
            self._made[spec, head_dim] = rotary_tables(self._positions, spec, head_dim, self._dtype)
        return self._made[spec, head_dim]
