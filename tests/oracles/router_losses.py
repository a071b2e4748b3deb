"""The routers' losses with naive loops, from probabilities or logits alone (SPEC 1.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


def hf_balance(layers: Sequence[Array], top_k: int) -> float:
    """transformers: E sum_j sum_e f[j, e] P[e] over the rows of all layers together; ``layers`` holds (T, E) each."""
    rows = np.concatenate(layers)
    n_experts = rows.shape[1]
    share = np.zeros((top_k, n_experts))
    for row in rows:
        for j, e in enumerate(np.argsort(-row, kind="stable")[:top_k]):
            share[j, e] += 1 / len(rows)
    loss = 0.0
    for j in range(top_k):
        for e in range(n_experts):
            loss += n_experts * share[j, e] * rows[:, e].mean()
    return loss


def megablocks_balance(layers: Sequence[Array], top_k: int) -> float:
    """MegaBlocks: E / (L T k) sum over layers of counts . mean probabilities."""
    loss = 0.0
    for rows in layers:
        n_tokens, n_experts = rows.shape
        counts = np.zeros(n_experts)
        for row in rows:
            for e in np.argsort(-row, kind="stable")[:top_k]:
                counts[e] += 1
        loss += n_experts / (len(layers) * n_tokens * top_k) * float(counts @ rows.mean(axis=0))
    return loss


def z_loss(layers: Sequence[Array]) -> float:
    """Per layer the mean over tokens of log(sum(exp(logits)))^2, summed over layers."""
    loss = 0.0
    for rows in layers:
        for row in rows:
            loss += math.log(sum(math.exp(x) for x in row)) ** 2 / len(rows)
    return loss
