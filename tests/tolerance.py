"""How far results may lie apart, derived from dtypes and lengths instead of guessed.

One rounding to a format of unit roundoff u leaves a relative error of at most u, spread evenly: u / sqrt(3) in the root
mean square. A sum of n products is accumulated wider, with unit roundoff a, and n roundings of random sign leave
a sqrt(n / 3) (Higham, Accuracy and Stability of Numerical Algorithms, 2.8). So one layer adds to the stream's relative
variance

    c = ROUNDINGS u^2 / 3  +  sum over its reductions n of  a^2 n / 3

and passes on what came in, multiplied by GROWTH = 3. A branch that reads a stream with relative error e is off by e
through every factor that depends on it: attention by the values (e^2) and by the scores, products of q and k, which at a
score of about 1 move the probabilities by sqrt(2) e (2 e^2); a gated network by gate and up (2 e^2). Branch and stream
of like size then carry (1 + 3) / 2 and (1 + 2) / 2 times e^2, together 3. L layers give c (1 + 3 + 9 + ... + 3^(L-1)).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quadriga.model.config import DeltaNetSpec, LatentAttentionSpec, ModelConfig

ROUNDINGS = 20
"""Results that a layer rounds to the working dtype: two norms, q/k/v, rotation (two products and a sum), scores,
probabilities, their sum over values, wo, gate, its activation, up, their product, down, the experts' weight and their sum,
two residual sums, one more for the head's share."""

GROWTH = 3
"""How a layer multiplies the relative variance that reaches it; see above."""


TAIL = 8
"""How far above the bound a single token may be. Scores of the golden models have a root mean square of 2 to 5 and reach
22: a token whose attention wavers between two keys of such scores magnifies the stream's error by their size. The worst
token measured is at 4.7 (mixtral, float16)."""


KERNEL_ROUNDINGS = 15
"""The same for the CPU's kernels, which compute in float32 and round only what meets a matrix (before q/k/v, wo, gate and
up, down, head) or what is stored in the cache (q, k, v, the probabilities): five, each with three times the variance of a
normal number's. Numbers that are quantised in groups share the step of the largest, and what meets down is a product of
two: its group's largest lies twice as many deviations out. (Measured: 1.5 of the bound with 5.)"""


def kernel_roundings(config: ModelConfig) -> int:
    """KERNEL_ROUNDINGS, with those of latent attention: what meets W_Kb, W_Vb and, where there is one, W_Qb."""
    mixer = config.layers[0].mixer
    if not isinstance(mixer, LatentAttentionSpec):
        return KERNEL_ROUNDINGS
    return KERNEL_ROUNDINGS // 5 * (7 if mixer.q_rank is None else 8)


def relative_error(dtype: torch.dtype, config: ModelConfig, n_keys: int, roundings: int = ROUNDINGS) -> float:
    """Root mean square error of a typical token's logits that rounding in ``dtype`` explains.

    Args:
        roundings: results that each layer rounds.

    Returns:
        the error in units of the logits' standard deviation.
    """
    unit = torch.finfo(dtype).eps / 2
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    layer = config.first_attention()  # of tests' models, all alike; recurrent layers round as often and add up less
    attn = layer.attention
    d, q_dim = config.d_model, attn.q_dim
    width = max(kind.ffn.d_ff for kind in config.kinds())
    reductions = (d, d, attn.head_dim, n_keys, q_dim, d, width)  # norms, qkv, q.k, p.v, wo, up, down
    if any(isinstance(kind.mixer, DeltaNetSpec) for kind in config.kinds()):
        roundings += 8  # what is convolved, its silu, q, k and v of unit length, what S gives, silu(z), their product
    per_layer = (roundings * unit**2 + sum(reductions) * wide**2) / 3
    n_layers = math.ceil(sum(kind.mixes + kind.feeds for kind in config.layers) / 2)  # of two branches
    return math.sqrt(per_layer * sum(GROWTH**i for i in range(n_layers)))


def faults(rows: Tensor, lag: float, bound: float, tail: float = TAIL) -> list[str]:
    """What is wrong with a result: nothing, if every row is as near as rounding explains and every choice a near tie.

    Args:
        rows: error of every row, in units of the logits' standard deviation.
        lag: how much less probable the worst choice of an expert was than it should be, in units of the probabilities'
            standard deviation; see ``tests.nn.routing``.
        bound: from :func:`relative_error`.
        tail: how far above it a single row, or a choice, may be.
    """
    found = []
    if not float(rows.median()) <= bound:
        found.append(f"the typical row is off by {float(rows.median()):.2e}, bound {bound:.2e}")
    if not float(rows.max()) <= tail * bound:
        found.append(f"row {int(rows.argmax())} is off by {float(rows.max()):.2e}, bound {tail * bound:.2e}")
    if not lag <= tail * bound:
        found.append(f"an expert was chosen that lags behind by {lag:.2e}, bound {tail * bound:.2e}")
    return found
