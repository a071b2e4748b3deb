"""The numbers behind positions: rotary frequencies and ALiBi slopes, one statement for torch and for the kernels.

Both are computed in float64 and rounded once to float32, so that they are the same wherever they are computed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quadriga.model.config import AlibiSpec, RopeSpec


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> NDArray[np.float32]:
    """theta^(-2j/d) for j < d/2: what a position is multiplied by to become an angle; (d/2,) float32."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    return (spec.theta**-exponents).astype(np.float32)


def alibi_slopes(spec: AlibiSpec, n_heads: int) -> NDArray[np.float32]:
    """The per-head slopes 2^(-max_bias * i / n), n the next power of two; (H,) float32.

    Where n_heads is no power of two, heads take the odd-numbered slopes first, then the even-numbered ones (Press et
    al. 2022, appendix; mosaicml/llm-foundry does the same).
    """
    n = 1 << (n_heads - 1).bit_length()
    slopes = np.exp2(-spec.max_bias / n * np.arange(1, n + 1, dtype=np.float64))
    if n != n_heads:
        slopes = np.concatenate((slopes[1::2], slopes[::2]))[:n_heads]
    return slopes.astype(np.float32)
