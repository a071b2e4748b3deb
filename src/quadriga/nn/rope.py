"""Rotary tables: cos and sin at the positions of one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from quadriga.model.config import RopeSpec
from quadriga.model.positions import Rotation, rotation


def rotary_tables(positions: Tensor, turning: Rotation, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, times the rotation's scale, computed in float32 and then cast to ``dtype``.

    Returns:
        two tensors (N, 1, pairs), ready to broadcast over heads.
    """
    frequencies = torch.from_numpy(turning.frequencies).to(positions.device)
    angles = positions[:, None].float() * frequencies  # (N, pairs)
    cos, sin = (table if turning.scale == 1 else table * turning.scale for table in (angles.cos(), angles.sin()))
    return cos.to(dtype)[:, None], sin.to(dtype)[:, None]


class Rotations:
    """cos and sin at the positions of one pass, computed once for each kind of rotation that its layers have.

    Args:
        max_seq_len: the model's; see ``model.positions.rotation``.
    """

    def __init__(self, positions: Tensor, dtype: torch.dtype, max_seq_len: int) -> None:
        self._positions, self._dtype, self._max_seq_len = positions, dtype, max_seq_len
        self._made: dict[tuple[RopeSpec, int], tuple[Tensor, Tensor]] = {}

    def tables(self, spec: RopeSpec, head_dim: int) -> tuple[Tensor, Tensor]:
        """See :func:`rotary_tables`."""
        if (spec, head_dim) not in self._made:
            turning = rotation(spec, head_dim, self._max_seq_len)
            self._made[spec, head_dim] = rotary_tables(self._positions, turning, self._dtype)
        return self._made[spec, head_dim]
