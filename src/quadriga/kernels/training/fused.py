"""The operations between the matrix products of a training step, each fused to one pass over memory.

float32 and bfloat16 tensors on a CPU go to ``kernels/cpu/csrc/training.cpp``. Other tensors, and all tensors while a
backend is forced (QUADRIGA_OPS=reference), use the plain torch code in each function. Arithmetic is in float32.
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
    """True if the C++ kernels are used for tensors like this one."""
    return x.device.type == "cpu" and x.dtype in _DTYPES and dispatch.compiled()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and probabilities: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _context() -> cpu.Context:
    """This thread's kernel context, with as many threads as torch uses."""
    threads = min(torch.get_num_threads(), runtime.MOST_THREADS)
    context: cpu.Context | None = getattr(_of_thread, "context", None)
    if context is None or context.threads != threads:
        context = _of_thread.context = cpu.Context(threads)
    return context


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def gather_rows(x: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """out (n, D) = x[index]; all tensors contiguous, index int64. Returns ``out``."""
    if not compiled(x):
        return torch.index_select(x, 0, index, out=out)
    context = _context()
    row_bytes = x.shape[1] * x.element_size()
    context.call(context.lib.qd_gather_rows, x.data_ptr(), row_bytes, index.data_ptr(), len(index), out.data_ptr())
    return out


def sum_rows(rows: Tensor, home: Tensor) -> Tensor:
    """Sum of rows[home[n, j]] over j: (N, D); rows (R, D), home (N, k) int64."""
    if not compiled(rows):
        return rows[home].sum(1)
    (n, k), d = home.shape, rows.shape[1]
    context, out = _context(), rows.new_empty(n, d)
    context.call(
        context.lib.qd_sum_rows, _DTYPES[rows.dtype], rows.data_ptr(), home.data_ptr(), n, k, d, out.data_ptr()
    )
    return out


def hidden_rows(gate: Tensor, up: Tensor | None, weights: Tensor, activation: str, out: Tensor) -> Tensor:
    """out (n, F) = activation(gate) * up * weights; weights (n, 1) in the dtype :func:`wide`. Returns ``out``.

    Of a network without a gate its one product stands in the gate's place, and ``up`` is None: 1.
    """
    if not compiled(gate):
        plain = activate(gate, activation) if up is None else gated(gate, up, activation)
        return torch.mul(plain, weights, out=out)
    context = _context()
    context.call(
        context.lib.qd_hidden, _DTYPES[gate.dtype], cpu.ACTIVATIONS[activation], gate.data_ptr(), _pointer(up),
        weights.data_ptr(), *gate.shape, out.data_ptr(),
    )  # fmt: skip
    return out


def hidden_rows_backward(
    gate: Tensor,
    up: Tensor | None,
    weights: Tensor,
    activation: str,
    dh: Tensor,
    hidden: Tensor,
    du: Tensor | None,
    d_weights: Tensor,
) -> Tensor:
    """Backward of :func:`hidden_rows`, from the gradient ``dh`` (n, F) of its result.

    Overwrites ``dh`` with the gradient of gate and returns it; writes the recomputed result to ``hidden``, and the
    gradients of up and weights to ``du`` (n, F) and ``d_weights`` (n, 1). ``du`` is None where ``up`` is.
    """
    assert (up is None) == (du is None), "the gradient of what is not there has no place"
    if not compiled(gate):
        hidden.copy_(activate(gate, activation) if up is None else gated(gate, up, activation))
        d_weights.copy_((dh.to(d_weights.dtype) * hidden).sum(1, keepdim=True))
        hidden.mul_(weights)
        dh.mul_(weights)
        if up is None or du is None:
            return dh.copy_(activation_gradient(dh, gate, activation))
        if activation == "clamped_glu":
            by_gate, by_up = clamped_slopes(gate, up)
            torch.mul(by_up, dh, out=du)
            return dh.mul_(by_gate)
        torch.mul(activate(gate, activation), dh, out=du)
        return dh.copy_(activation_gradient(dh * up, gate, activation))
    context = _context()
    context.call(
        context.lib.qd_hidden_back, _DTYPES[gate.dtype], cpu.ACTIVATIONS[activation], gate.data_ptr(), _pointer(up),
        weights.data_ptr(), *gate.shape, dh.data_ptr(), hidden.data_ptr(), _pointer(du), d_weights.data_ptr(),
    )  # fmt: skip
    return dh


def clamped_slopes(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The slopes of ``clamped_glu`` by gate and by up: none beyond the limits."""
    g, u = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
    s = torch.sigmoid(CLAMPED_SLOPE * g)
    by_gate = (u + 1) * s * (1 + CLAMPED_SLOPE * g * (1 - s))
    return by_gate * (gate <= CLAMP), g * s * (up.abs() <= CLAMP)


def activation_gradient(d_out: Tensor, x: Tensor, activation: str) -> Tensor:
    """d_out times the derivative of ``activate(x, activation)`` with respect to x."""
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
        case "relu2":
            gradient = d_out * (2 * x.clamp(min=0))
        case _:
            raise AssertionError(f"ModelConfig refuses the activation {activation!r}")
    return gradient


def windowed_softmax(scores: Tensor, lows: Tensor, offset: int, slopes: Tensor | None) -> Tensor:
    """Softmax of scores (K, Q, G, keys) over each query's keys [lows[q], offset + q], in place; others become 0.

    Args:
        lows: (Q,) int64, the first key of each query's document.
        offset: index of the key at the position of query 0.
        slopes: (K G,) float32, ALiBi's; slope * (key - query) is added to the scores. None: no ALiBi.
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


def windowed_softmax_backward(p: Tensor, dp: Tensor, lows: Tensor, offset: int) -> Tensor:
    """Backward of :func:`windowed_softmax`: overwrites the gradient ``dp`` of ``p`` with that of the scores."""
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
    """Cross-entropy of each row of logits (n, V): logsumexp(logit_scale * z) - logit_scale * z[target].

    With ``gradient`` the logits are overwritten with softmax - onehot, the gradient with respect to the scaled logits.

    Returns:
        (n,) in the dtype :func:`wide`.

    Raises:
        IndexError: a target outside 0 .. V - 1.
    """
    if compiled(logits):
        lowest, highest = torch.aminmax(targets) if len(targets) else (0, 0)
        if lowest < 0 or highest >= logits.shape[1]:
            raise IndexError(f"targets must be from 0 to {logits.shape[1] - 1}, got {int(lowest)} to {int(highest)}")
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
