"""The experts' forward and backward pass, one expert at a time.

    tokens sorted by expert ─► for each expert:  h = act(x Wg^T) * (x Wu^T) * combine ─► y = h Wd^T ─► sum of k rows

A loop over experts beats one grouped product on a processor: an expert's rows (1024 x 448 floats) stay in cache between
its products and the activation, and nothing of size (N k, D) is kept for the backward pass: inputs are gathered again,
the activation is computed again, the two pre-activations are all that is saved. The combine weight is applied to the
hidden row, not to the output row, so its gradient is a dot product of what is at hand (Megatron-LM does the same).
Experts without tokens cost nothing and get a gradient of zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from quadriga.ops.reference import activate


def experts(
    x: Tensor,
    routing_ids: Tensor,
    combine: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
) -> Tensor:
    """``ops.experts`` with a gradient that is cheap on a processor; same arguments, same result to rounding."""
    out: Tensor = _Experts.apply(x, routing_ids, combine, w_gate, w_up, w_down, activation)  # type: ignore[no-untyped-call]
    return out


class Plan:
    """Which rows go to which expert: slots sorted by expert, and the way back."""

    def __init__(self, routing_ids: Tensor, n_experts: int) -> None:
        n_tokens, top_k = routing_ids.shape
        flat = routing_ids.reshape(-1)
        # One byte a key: the sort is a radix pass over 1 byte instead of 8.
        keys = flat.to(torch.uint8) if n_experts <= 256 else flat
        order = keys.argsort(stable=True)  # (N k,) slots, all of expert 0 first
        self.slots = order
        self.tokens = order // top_k
        self.home = torch.empty_like(order)
        self.home[order] = torch.arange(len(order), device=order.device)
        self.home = self.home.view(n_tokens, top_k)  # where token n's slot j lies in the sorted order
        self.sizes: list[int] = torch.bincount(flat, minlength=n_experts).tolist()

    def ranges(self) -> list[tuple[int, int, int]]:
        """(expert, first row, last row) of every expert that has rows."""
        found, start = [], 0
        for expert, size in enumerate(self.sizes):
            if size:
                found.append((expert, start, start + size))
            start += size
        return found

    def sort(self, combine: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, k) a number a slot -> (N k, 1) in sorted order."""
        return combine.to(dtype).reshape(-1)[self.slots][:, None]

    def unsort(self, sorted_values: Tensor, dtype: torch.dtype) -> Tensor:
        """The way back: (N k, 1) in sorted order -> (N, k)."""
        values = torch.empty_like(sorted_values[:, 0])
        values[self.slots] = sorted_values[:, 0]
        return values.view(self.home.shape).to(dtype)

    def sum_slots(self, rows: Tensor) -> Tensor:
        """(N k, D) in sorted order -> (N, D): each token's k rows added up, in the order of its slots."""
        if rows.dtype in (torch.float32, torch.float64):
            return F.embedding_bag(self.home, rows, mode="sum")  # gathers and adds in one pass
        return rows[self.home].sum(1)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        routing_ids: Tensor,
        combine: Tensor,
        w_gate: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        activation: str,
    ) -> Tensor:
        plan = Plan(routing_ids, w_gate.shape[0])
        weights = plan.sort(combine, x.dtype)
        shape = (len(plan.tokens), w_gate.shape[1])
        gate, up = x.new_empty(shape), x.new_empty(shape)
        y = x.new_empty(shape[0], x.shape[1])
        for e, a, b in plan.ranges():
            rows = x[plan.tokens[a:b]]
            torch.mm(rows, w_gate[e].t(), out=gate[a:b])
            torch.mm(rows, w_up[e].t(), out=up[a:b])
            hidden = activate(gate[a:b], activation).mul_(up[a:b]).mul_(weights[a:b])
            torch.mm(hidden, w_down[e].t(), out=y[a:b])
        ctx.save_for_backward(x, weights, gate, up, w_gate, w_up, w_down)
        ctx.plan, ctx.activation, ctx.combine_dtype = plan, activation, combine.dtype
        return plan.sum_slots(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate, up, w_gate, w_up, w_down = ctx.saved_tensors
        plan: Plan = ctx.plan
        train_weights = any(ctx.needs_input_grad[3:6])
        d_gate_w, d_up_w, d_down_w = (torch.zeros_like(w) if train_weights else None for w in (w_gate, w_up, w_down))
        d_weights = torch.empty_like(weights)
        dx = torch.empty(len(plan.tokens), x.shape[1], dtype=x.dtype, device=x.device)
        for e, a, b in plan.ranges():
            taken = plan.tokens[a:b]
            d_rows = d_out[taken]
            g, u, c = gate[a:b], up[a:b], weights[a:b]
            act = activate(g, ctx.activation)
            plain = act * u  # the hidden row before its combine weight
            dh = d_rows @ w_down[e]
            d_weights[a:b] = torch.linalg.vecdot(dh, plain)[:, None]
            dh.mul_(c)
            du = act.mul_(dh)
            dg = activation_gradient(dh.mul_(u), g, ctx.activation)
            torch.mm(dg, w_gate[e], out=dx[a:b])
            dx[a:b].addmm_(du, w_up[e])
            if train_weights:
                assert d_gate_w is not None and d_up_w is not None and d_down_w is not None, "allocated above"
                rows = x[taken]
                torch.mm(d_rows.t(), plain.mul_(c), out=d_down_w[e])
                torch.mm(dg.t(), rows, out=d_gate_w[e])
                torch.mm(du.t(), rows, out=d_up_w[e])
        d_combine = plan.unsort(d_weights, ctx.combine_dtype)
        return plan.sum_slots(dx), None, d_combine, d_gate_w, d_up_w, d_down_w, None


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
