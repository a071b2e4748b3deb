"""What lies between the matrix products of a training step, each in one pass over memory.

On a processor, float32 and bfloat16 tensors go to ``kernels/cpu/csrc/training.cpp``; anything else, and everything
while a backend is forced (QUADRIGA_OPS=reference), is the plain torch statement that stands beside it. Arithmetic is
float32.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from quadriga import runtime
from quadriga.kernels import dispatch
from quadriga.kernels.cpu import library as cpu
from quadriga.kernels.reference import CLAMP, CLAMPED_SLOPE, activate, gated

_DTYPES = {torch.float32: cpu.FORMATS["float32"], torch.bfloat16: cpu.FORMATS["bfloat16"]}
_of_thread = threading.local()


def compiled(x: Tensor) -> bool:
    """True if the C++ kernels take tensors like this one."""
    return x.device.type == "cpu" and x.dtype in _DTYPES and dispatch.compiled()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums and probabilities are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _context() -> cpu.Context:
    """This thread's kernels, with as many threads as torch computes with."""
    threads = min(torch.get_num_threads(), runtime.MOST_THREADS)
    context: cpu.Context | None = getattr(_of_thread, "context", None)
    if context is None or context.threads != threads:
        context = _of_thread.context = cpu.Context(threads)
    return context


def gather_rows(x: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """out (n, D) = x[index]; all contiguous, index int64."""
    if not compiled(x):
        return torch.index_select(x, 0, index, out=out)
    context = _context()
    row_bytes = x.shape[1] * x.element_size()
    context.call(context.lib.qd_gather_rows, x.data_ptr(), row_bytes, index.data_ptr(), len(index), out.data_ptr())
    return out


def sum_rows(rows: Tensor, home: Tensor) -> Tensor:
    """(N, D): the sum of rows[home[n, j]] over j; rows (R, D), home (N, k) int64."""
    if not compiled(rows):
        return rows[home].sum(1)
    (n, k), d = home.shape, rows.shape[1]
    context, out = _context(), rows.new_empty(n, d)
    context.call(
        context.lib.qd_sum_rows, _DTYPES[rows.dtype], rows.data_ptr(), home.data_ptr(), n, k, d, out.data_ptr()
    )
    return out


def hidden_rows(gate: Tensor, up: Tensor, weights: Tensor, activation: str, out: Tensor) -> Tensor:
    """out (n, F) = activation(gate) * up * weights (n, 1); weights :func:`wide`."""
    if not compiled(gate):
        return torch.mul(gated(gate, up, activation), weights, out=out)
    context = _context()
    context.call(
        context.lib.qd_hidden, _DTYPES[gate.dtype], cpu.ACTIVATIONS[activation], gate.data_ptr(), up.data_ptr(),
        weights.data_ptr(), *gate.shape, out.data_ptr(),
    )  # fmt: skip
    return out


def hidden_rows_backward(
    gate: Tensor,
    up: Tensor,
    weights: Tensor,
    activation: str,
    dh: Tensor,
    hidden: Tensor,
    du: Tensor,
    d_weights: Tensor,
) -> Tensor:
    """From the gradient ``dh`` (n, F) of what :func:`hidden_rows` gave, the gradients of what went into it.

    ``dh`` is overwritten with the gate's gradient and returned; the hidden rows, computed again, are written to
    ``hidden``, the gradients of up and weights to ``du`` and ``d_weights`` (n, 1).
    """
    if not compiled(gate):
        hidden.copy_(gated(gate, up, activation))
        d_weights.copy_((dh.to(d_weights.dtype) * hidden).sum(1, keepdim=True))
        hidden.mul_(weights)
        dh.mul_(weights)
        if activation == "clamped_glu":
            by_gate, by_up = clamped_slopes(gate, up)
            torch.mul(by_up, dh, out=du)
            return dh.mul_(by_gate)
        torch.mul(activate(gate, activation), dh, out=du)
        return dh.copy_(activation_gradient(dh * up, gate, activation))
    context = _context()
    context.call(
        context.lib.qd_hidden_back, _DTYPES[gate.dtype], cpu.ACTIVATIONS[activation], gate.data_ptr(), up.data_ptr(),
        weights.data_ptr(), *gate.shape, dh.data_ptr(), hidden.data_ptr(), du.data_ptr(), d_weights.data_ptr(),
    )  # fmt: skip
    return dh


def clamped_slopes(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The slopes of ``clamped_glu`` by gate and by up: none beyond the limits."""
    g, u = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
    s = torch.sigmoid(CLAMPED_SLOPE * g)
    by_gate = (u + 1) * s * (1 + CLAMPED_SLOPE * g * (1 - s))
    return by_gate * (gate <= CLAMP), g * s * (up.abs() <= CLAMP)


def activation_gradient(d_out: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient of ``activate(x, activation)`` by x, times d_out."""
    aten = torch.ops.aten
    match activation:
        case "silu":
            gradient: Tensor = aten.silu_backward(d_out, x)
        case "gelu":
            gradient = aten.gelu_backward(d_out, x)
        case "gelu_tanh":
            gradient = aten.gelu_backward(d_out, x, approximate="tanh")
        case "relu":
            gradient = aten.threshold_backward(d_out, x, 0)
        case _:
            raise AssertionError(f"ModelConfig lets no activation {activation!r} through")
    return gradient


def softmax_between(scores: Tensor, lows: Tensor, offset: int, slopes: Tensor | None) -> Tensor:
    """Softmax, in place, of scores (K, Q, G, keys) over the keys [lows[q], offset + q] of each query; others become 0.

    Args:
        lows: (Q,) int64. offset: the key that query 0 stands at.
        slopes: (K G,) float32 of ALiBi, times (key - query) added to the scores; None: none.
    """
    n_kv_heads, n_queries, group, keys = scores.shape
    if compiled(scores):
        context = _context()
        context.call(
            context.lib.qd_attention_softmax, _DTYPES[scores.dtype], scores.data_ptr(), lows.data_ptr(), offset,
            n_kv_heads, n_queries, group, keys, None if slopes is None else slopes.data_ptr(),
        )  # fmt: skip
        return scores
    own = offset + torch.arange(n_queries, device=scores.device)[:, None, None]
    key = torch.arange(keys, device=scores.device)
    biased = scores.to(wide(scores.dtype))
    if slopes is not None:
        biased = biased + slopes.to(biased.dtype).view(n_kv_heads, 1, group, 1) * (key - own)
    biased = biased.masked_fill((key > own) | (key < lows[:, None, None]), float("-inf"))
    return scores.copy_(torch.softmax(biased, -1))


def softmax_between_backward(p: Tensor, dp: Tensor, lows: Tensor, offset: int) -> Tensor:
    """The gradient ``dp`` of what :func:`softmax_between` gave becomes, in place, that of the scores; returns it."""
    n_kv_heads, n_queries, group, keys = p.shape
    if not compiled(p):
        kept = wide(p.dtype)
        return dp.copy_(torch.ops.aten._softmax_backward_data(dp.to(kept), p.to(kept), -1, kept))
    context = _context()
    context.call(
        context.lib.qd_attention_softmax_back, _DTYPES[p.dtype], p.data_ptr(), dp.data_ptr(), lows.data_ptr(), offset,
        n_kv_heads, n_queries, group, keys,
    )  # fmt: skip
    return dp


def cross_entropy(logits: Tensor, targets: Tensor, logit_scale: float, *, gradient: bool) -> Tensor:
    """(n,) :func:`wide`: logsumexp(logit_scale * logits) - logit_scale * logits[target], of each row of logits (n, V).

    With ``gradient`` the logits become softmax - onehot: the gradient by the scaled logits.

    Raises:
        IndexError: a target that is no column.
    """
    if compiled(logits):
        lowest, highest = torch.aminmax(targets) if len(targets) else (0, 0)
        if lowest < 0 or highest >= logits.shape[1]:
            raise IndexError(f"targets reach from {int(lowest)} to {int(highest)}, of {logits.shape[1]} words")
        context, losses = _context(), torch.empty(len(targets))
        context.call(
            context.lib.qd_cross_entropy, _DTYPES[logits.dtype], logits.data_ptr(), targets.data_ptr(), *logits.shape,
            logit_scale, int(gradient), losses.data_ptr(),
        )  # fmt: skip
        return losses
    scaled = logits.to(wide(logits.dtype)) * logit_scale
    log_probs = torch.log_softmax(scaled, -1)
    if gradient:
        probs = log_probs.exp()
        probs.scatter_add_(1, targets[:, None], probs.new_full((len(targets), 1), -1.0))
        logits.copy_(probs)
    return -log_probs.gather(1, targets[:, None])[:, 0]
