"""The numbers behind positions: rotary frequencies and ALiBi slopes, one statement for torch and for the kernels.

Both are computed in float64 and rounded once to float32, so that they are the same wherever they are computed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quadriga.model.config import (
    AlibiSpec,
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    RopeSpec,
    YarnScaling,
)

Wide = NDArray[np.float64]


class Rotation(NamedTuple):
    """How fast every pair of a head's numbers turns, and what cos and sin are multiplied by."""

    frequencies: NDArray[np.float32]
    """(pairs,): what a position is multiplied by to become an angle."""
    scale: float
    """1 but for YaRN and LongRoPE."""


def rotation(spec: RopeSpec, head_dim: int, max_seq_len: int) -> Rotation:
    """theta^(-2j/dim) for every pair j, bent as ``spec.scaling`` says.

    Args:
        max_seq_len: the model's, by which LongRoPE's factors are chosen; see ``LongRopeScaling``.
    """
    dim = spec.rotated(head_dim)
    plain: Wide = spec.theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    scale = 1.0
    match spec.scaling:
        case None:
            bent = plain
        case LinearScaling(factor=factor):
            bent = plain / factor
        case FactorScaling(factors=factors):
            bent = plain / np.array(factors)
        case ProportionalScaling(part=part):
            bent = np.where(np.arange(len(plain)) < int(part * dim // 2), plain, 0.0)
        case Llama3Scaling() as llama3:
            bent = _llama3(plain, llama3)
        case YarnScaling() as yarn:
            bent, scale = _yarn(plain, yarn, spec.theta), yarn.attention_factor
        case LongRopeScaling() as long:
            beyond = max_seq_len > long.original_max_seq_len
            bent = plain / np.array(long.long_factors if beyond else long.short_factors)
            scale = long.long_scale if beyond else long.short_scale
    return Rotation(bent.astype(np.float32), scale)


def _llama3(plain: Wide, spec: Llama3Scaling) -> Wide:
    turns = spec.original_max_seq_len * plain / (2 * math.pi)  # within the original context
    share = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    kept = np.clip(share, 0.0, 1.0)
    bent: Wide = (1 - kept) * plain / spec.factor + kept * plain
    return bent


def _yarn(plain: Wide, spec: YarnScaling, theta: float) -> Wide:
    """The ramp runs over the pairs' numbers, between those that turn beta_fast and beta_slow times."""
    dim = 2 * len(plain)

    def pair_of(turns: float) -> float:
        return dim * math.log(spec.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(spec.beta_fast), pair_of(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    divided = np.clip((np.arange(len(plain)) - low) / (high - low), 0.0, 1.0)
    bent: Wide = plain / spec.factor * divided + plain * (1 - divided)
    return bent


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
