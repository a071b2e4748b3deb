"""How far results may lie apart, derived from dtypes and lengths instead of guessed.

Rounding of a reduction of n terms in a format of unit roundoff u grows like u sqrt(n) for terms of random sign (Higham,
Accuracy and Stability of Numerical Algorithms, 3.1 and 4.2). A transformer rounds its residual stream a few times a
layer, and each of the ``ROUNDINGS`` adds an independent relative error u. What arrives at a layer with error e leaves it
twice, through the residual sum and through the branch; where the two agree in sign the variance doubles. L layers thus
give u sqrt(ROUNDINGS (1 + 2 + 4 + ... + 2^(L-1))). Logits are sums over D of such numbers.
"""

from __future__ import annotations

import math

import torch

ROUNDINGS = 20
"""Roundings to the working dtype that a layer leaves in the stream: two norms, q/k/v, rotation (two products and a
sum), scores, probabilities, their sum over values, wo, gate, its activation, up, their product, down, the experts' weight
and their sum, two residual sums."""


def logit_bound(dtype: torch.dtype, n_layers: int, logit_range: float, sigmas: float = 4.0) -> float:
    """Largest difference of one logit that rounding in ``dtype`` explains, against exact arithmetic.

    A relative error e of the stream moves a logit by about e times the logits' spread; the range of some thousand
    normally distributed logits is about seven standard deviations. ``sigmas`` covers the largest of them.
    """
    unit = torch.finfo(dtype).eps / 2
    return sigmas * unit * math.sqrt(ROUNDINGS * (2**n_layers - 1)) * logit_range / 7
