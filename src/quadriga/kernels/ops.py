"""The operations a model is made of: one typed signature each, whose docstring is the specification.

Shape letters, the same in Python and C++:

    B batch          T tokens of one sequence     N packed tokens of several sequences
    D d_model        H query heads                K key/value heads       d head_dim
    F d_ff           E experts                    k experts a token       V vocabulary
    S cached positions

A backend is a module with the same function names. :mod:`quadriga.kernels.dispatch` picks one by the first tensor's
device; ``ops.use("reference")`` and QUADRIGA_OPS=reference force plain torch, which is the truth the others are tested
against. All ops are pure: they return new tensors and change none. All have gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from quadriga.kernels.dispatch import available, backend_for, use

if TYPE_CHECKING:
    from torch import Tensor

    from quadriga.kernels.cpu.packing import Packed

__all__ = [
    "AdaptedPart",
    "Choice",
    "Routing",
    "activate",
    "adapted_experts",
    "attention",
    "available",
    "causal_conv",
    "delta_rule",
    "experts",
    "gated",
    "grouped_linear",
    "norm",
    "rope",
    "route",
    "state_space",
    "use",
]


class Routing(NamedTuple):
    """What a router decided for N tokens."""

    expert_ids: Tensor
    """(N, k) int64, in the order they were chosen in; of equal ones the lower id first."""
    expert_weights: Tensor
    """(N, k) float32, what each chosen expert's output is multiplied by."""
    probs: Tensor
    """(N, E) float32, a distribution over the experts: their softmax, or sigmoid scores divided by their sum."""
    logits: Tensor
    """(N, E) float32, what the scores were taken of."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How logits become scores, scores a choice, and the scores of the chosen their weights."""

    top_k: int
    score: str = "softmax"
    """softmax over all experts, each one's sigmoid, or sparse_mixer; see ``MoESpec``."""
    normalize_p: float | None = 1.0
    """weight = score / max(p-norm of the chosen scores + normalize_eps, normalize_min) * scale; None: score * scale."""
    normalize_eps: float = 0.0
    normalize_min: float = 0.0
    scale: float = 1.0
    n_groups: int = 1
    """Groups of neighbours, of which only the top_k_groups best are chosen from."""
    top_k_groups: int = 1
    group_worth: str = "two_best"
    """How good a group is: its two best scores together, or its "best" one."""
    near: float = 0.0
    """Of a sparse mixer, ``2 * MoESpec.mixer_eps``."""


@dataclass(frozen=True)
class AdaptedPart:
    """One of an expert's three matrices: frozen (E, out, in), numbers or packed, and its factors if it has any."""

    frozen: Tensor | Sequence[Packed]
    a: Tensor | None = None
    """(E, r, in)"""
    b: Tensor | None = None
    """(E, out, r)"""
    scale: float = 1.0


def norm(x: Tensor, weight: Tensor, kind: str, eps: float, bias: Tensor | None = None) -> Tensor:
    """LayerNorm ("layer") or RMSNorm ("rms") over the last axis with a weight, and a bias added at the end if given.

    Statistics are float32 whatever the dtype of ``x`` (float64 stays float64).

    Args:
        x: (N, D). weight, bias: (D,) of the same dtype.

    Returns:
        (N, D) in x's dtype.
    """
    out: Tensor = backend_for(x).norm(x, weight, kind, eps, bias)
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of every head: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

    Args:
        x: (N, heads, d).
        cos, sin: (N, 1, d/2) in x's dtype, computed in float32 from the positions.

    Returns:
        (N, heads, d) in x's dtype.
    """
    out: Tensor = backend_for(x).rope(x, cos, sin)
    return out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    q_positions: Tensor | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention; key j sits at position j, query head h reads key head h // (H/K).

    score = scale * q.k;  score = soft_cap * tanh(score / soft_cap) if given;  score += slope_h * (j - position) if
    given;  keys with j > position, and with j <= position - window if given, are masked;  softmax in float32, in whose
    sum exp(sink_h) takes part if given;  times v.

    Args:
        q: (B, H, T, d). k: (B, K, S, d). v: (B, K, S, e), e usually d.
        q_positions: (B, T) int64 position of each query; None means the T queries are the last of the S positions.
        alibi_slopes: (H,) float32. sinks: (H,).

    Returns:
        (B, H, T, e) in q's dtype. Rows whose position is negative (padding) are finite and meaningless.
    """
    out: Tensor = backend_for(q).attention(
        q,
        k,
        v,
        scale=scale,
        q_positions=q_positions,
        soft_cap=soft_cap,
        alibi_slopes=alibi_slopes,
        window=window,
        sinks=sinks,
    )
    return out


def causal_conv(x: Tensor, taps: Tensor, before: Tensor) -> Tensor:
    """Convolve every channel of one sequence with its own taps: out[t, c] = sum_j taps[c, j] x[t - L + 1 + j, c].

    Args:
        x: (T, C). taps: (C, L).
        before: (L - 1, C), what precedes x; zeros at a text's beginning.

    Returns:
        (T, C) in x's dtype.
    """
    out: Tensor = backend_for(x).causal_conv(x, taps, before)
    return out


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The gated delta rule of one sequence, token after token (Yang et al. 2024, arXiv 2412.06464, equation 10).

    With u = x / sqrt(x x + 1e-6) for q and k:  S = exp(log_decay) S,  S = S + u_k beta (v - u_k S),
    out = u_q S / sqrt(d_k).

    Args:
        q, k: (T, H, d_k). v: (T, H, d_v).
        log_decay, beta: (T, H) in the state's dtype.
        state: (H, d_k, d_v), float32 (float64 for a float64 model).

    Returns:
        (out (T, H, d_v) in the state's dtype, the state after the last token).
    """
    out: tuple[Tensor, Tensor] = backend_for(q).delta_rule(q, k, v, log_decay, beta, state)
    return out


def state_space(
    x: Tensor, b: Tensor, c: Tensor, step: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence of Mamba-2 over one sequence (Dao and Gu 2024, arXiv 2405.21060, section 2).

    S = exp(log_decay) S + b (step x),  out = c S, for every head with the b and c of its group.

    Args:
        x: (T, H, P). b, c: (T, G, N); head h has group h // (H / G).
        step, log_decay: (T, H) in the state's dtype; no decay is above 0.
        state: (H, N, P), float32 (float64 for a float64 model).

    Returns:
        (out (T, H, P) in the state's dtype, the state after the last token).
    """
    out: tuple[Tensor, Tensor] = backend_for(x).state_space(x, b, c, step, log_decay, state)
    return out


def route(
    x: Tensor, weight: Tensor, how: Choice, *, bias: Tensor | None = None, correction: Tensor | None = None
) -> Routing:
    """Choose experts by the scores of x W^T (+ bias): see :class:`Choice`.

    With a ``correction`` (a model's own, or training's loss-free balancing), the k highest of score + correction are
    chosen; their weights and everything else come from the scores alone. DeepSeek-V3 (2.1.2) closes the other groups
    with -infinity, and so is it here; transformers puts 0 in their place, which is the same while scores are positive.

    Everything is float32 whatever the dtype of ``x`` (float64 stays float64): in bf16, near ties flip and the model
    becomes another one (SPEC of DBRX: float32 softmax; see docs/architecture.md).

    Args:
        x: (N, D). weight: (E, D). bias, correction: (E,), or (N, E) where each token has its own.
    """
    out: Routing = backend_for(x).route(x, weight, how, bias, correction)
    return out


def experts(
    x: Tensor,
    routing_ids: Tensor,
    combine: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
) -> Tensor:
    """Dropless expert networks and their weighted sum: out[n] = sum_j combine[n, j] * y_{ids[n, j]}(x[n]).

    y_e(x) = w_down_e ( act(w_gate_e x) * (w_up_e x) ), or without w_gate w_down_e act(w_up_e x). Slots are added in the
    order j = 0..k-1, so the sum does not depend on what else is in the batch. Experts without tokens cost nothing and
    get a zero gradient.

    Args:
        x: (N, D). routing_ids: (N, k) int64. combine: (N, k) float32.
        w_gate, w_up: (E, F, D); w_gate None: the networks are not gated. w_down: (E, D, F). All in x's dtype.

    Returns:
        (N, D) in x's dtype.
    """
    out: Tensor = backend_for(x).experts(x, routing_ids, combine, w_gate, w_up, w_down, activation)
    return out


def adapted_experts(
    x: Tensor, routing_ids: Tensor, combine: Tensor, parts: Mapping[str, AdaptedPart], activation: str
) -> Tensor:
    """:func:`experts` over frozen weights, each matrix W with s B A beside it where it has factors.

    Args:
        x: (N, D). routing_ids: (N, k) int64. combine: (N, k).
        parts: w_gate (of gated networks), w_up and w_down, factors in x's dtype.

    Returns:
        (N, D) in x's dtype. Gradients reach x, combine and the factors; those of an expert without tokens are zero.
    """
    out: Tensor = backend_for(x).adapted_experts(x, routing_ids, combine, parts, activation)
    return out


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows of expert e times weight[e]^T, for rows that are sorted by expert.

    Args:
        rows: (R, in). weight: (E, out, in) of the same dtype. counts: (E,) int64, rows of each expert; they sum to R.

    Returns:
        (R, out) in the rows' dtype. An expert without rows gets a gradient of zero.
    """
    out: Tensor = backend_for(rows).grouped_linear(rows, weight, counts)
    return out


def activate(x: Tensor, activation: str) -> Tensor:
    """Elementwise non-linearity by name: silu, gelu (erf), gelu_tanh, relu, relu2 (its square)."""
    out: Tensor = backend_for(x).activate(x, activation)
    return out


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """What gate and up of a gated network make: activation(gate) * up, or the ``clamped_glu`` of both.

    clamped_glu: (u + 1) g sigmoid(1.702 g) with g = min(gate, 7) and u = up within [-7, 7] (gpt-oss).
    """
    out: Tensor = backend_for(gate).gated(gate, up, activation)
    return out
