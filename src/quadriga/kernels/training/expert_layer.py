"""The experts' forward and backward pass, one expert at a time.

    tokens sorted by expert ─► for each expert:  h = act(x Wg^T) * (x Wu^T) * combine ─► y = h Wd^T ─► sum of k rows

A loop over experts beats one grouped product on a processor: an expert's rows (1024 x 448 floats) stay in cache between
its products and the activation, and nothing of size (N k, D) is kept for the backward pass: inputs are gathered again,
the activation is computed again, the two pre-activations are all that is saved. The combine weight is applied to the
hidden row, not to the output row, so its gradient is a dot product of what is at hand (Megatron-LM does the same).
Experts without tokens cost nothing and get a gradient of zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quadriga.kernels.training import between


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
    """Which rows go to which expert: slots sorted by expert, and the way back.

    Every expert's rows are filled up to one of 16 counts an octave: oneDNN compiles a product's code for each count of
    rows it has not seen, which took as long as the product itself. A row that fills up is token 0 with weight 0.
    """

    def __init__(self, routing_ids: Tensor, n_experts: int) -> None:
        n_tokens, top_k = routing_ids.shape
        flat, device = routing_ids.reshape(-1), routing_ids.device
        # One byte a key: the sort is a radix pass over 1 byte instead of 8.
        keys = flat.to(torch.uint8) if n_experts <= 256 else flat
        order = keys.argsort(stable=True)  # (N k,) slots, all of expert 0 first
        self.sizes: list[int] = torch.bincount(flat, minlength=n_experts).tolist()
        filled = [filled_up(size) for size in self.sizes]
        self.starts = [0, *itertools.accumulate(filled)]
        self.most = max(filled)
        fill = torch.tensor([f - s for f, s in zip(filled, self.sizes, strict=True)], device=device)
        before = fill.cumsum(0) - fill  # rows that fill up, before each expert's first
        rows = torch.arange(len(order), device=device) + before[flat[order]]
        self.tokens = torch.zeros(self.starts[-1], dtype=order.dtype, device=device)
        self.tokens[rows] = order // top_k
        self.home = torch.empty_like(order)
        self.home[order] = rows
        self.home = self.home.view(n_tokens, top_k)  # where token n's slot j lies in the sorted order

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """(expert, first row, last row) of every expert that has rows."""
        for expert, size in enumerate(self.sizes):
            if size:
                yield expert, self.starts[expert], self.starts[expert + 1]

    def idle(self) -> list[int]:
        """Experts that have no rows."""
        return [expert for expert, size in enumerate(self.sizes) if not size]

    def sort(self, combine: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, k) a number a slot -> (rows, 1) in sorted order, 0 where a row only fills up."""
        values = torch.zeros(len(self.tokens), 1, dtype=dtype, device=combine.device)
        values[self.home.view(-1), 0] = combine.to(dtype).reshape(-1)
        return values

    def unsort(self, sorted_values: Tensor, dtype: torch.dtype) -> Tensor:
        """The way back: (rows, 1) in sorted order -> (N, k)."""
        return sorted_values[:, 0][self.home].to(dtype)


def filled_up(rows: int) -> int:
    """The next count of rows that is worth compiling for: a multiple of 8, at most a sixteenth more from 128 on."""
    step = max(8, 1 << rows.bit_length() >> 5)
    return -(-rows // step) * step


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
        x, weights = x.contiguous(), plan.sort(combine, between.wide(x.dtype))
        (n_rows, d), d_ff = (len(plan.tokens), x.shape[1]), w_gate.shape[1]
        gate, up, y = x.new_empty(n_rows, d_ff), x.new_empty(n_rows, d_ff), x.new_empty(n_rows, d)
        work_rows, work_hidden = x.new_empty(plan.most, d), x.new_empty(plan.most, d_ff)
        for e, a, b in plan.ranges():
            rows = between.gather_rows(x, plan.tokens[a:b], work_rows[: b - a])
            torch.mm(rows, w_gate[e].t(), out=gate[a:b])
            torch.mm(rows, w_up[e].t(), out=up[a:b])
            hidden = between.hidden_rows(gate[a:b], up[a:b], weights[a:b], activation, work_hidden[: b - a])
            torch.mm(hidden, w_down[e].t(), out=y[a:b])
        ctx.save_for_backward(x, weights, gate, up, w_gate, w_up, w_down)
        ctx.plan, ctx.activation, ctx.combine_dtype = plan, activation, combine.dtype
        return between.sum_rows(y, plan.home)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate, up, w_gate, w_up, w_down = ctx.saved_tensors
        plan: Plan = ctx.plan
        train_weights = any(ctx.needs_input_grad[3:6])
        d_gate_w, d_up_w, d_down_w = (torch.empty_like(w) if train_weights else None for w in (w_gate, w_up, w_down))
        d_out, d_weights = d_out.contiguous(), torch.empty_like(weights)
        d, d_ff = x.shape[1], gate.shape[1]
        dx = x.new_empty(len(plan.tokens), d)
        work_rows = x.new_empty(plan.most, d)
        work_dh, work_hidden, work_du = x.new_empty(3, plan.most, d_ff).unbind()
        for e, a, b in plan.ranges():
            taken, n = plan.tokens[a:b], b - a
            d_rows = between.gather_rows(d_out, taken, work_rows[:n])
            dh, hidden, du = torch.mm(d_rows, w_down[e], out=work_dh[:n]), work_hidden[:n], work_du[:n]
            dg = between.hidden_rows_backward(
                gate[a:b], up[a:b], weights[a:b], ctx.activation, dh, hidden, du, d_weights[a:b]
            )
            torch.mm(dg, w_gate[e], out=dx[a:b])
            dx[a:b].addmm_(du, w_up[e])
            if train_weights:
                assert d_gate_w is not None and d_up_w is not None and d_down_w is not None, "allocated above"
                torch.mm(d_rows.t(), hidden, out=d_down_w[e])
                rows = between.gather_rows(x, taken, work_rows[:n])
                torch.mm(dg.t(), rows, out=d_gate_w[e])
                torch.mm(du.t(), rows, out=d_up_w[e])
        idle = torch.tensor(plan.idle(), dtype=torch.int64, device=x.device)
        for gradient in (d_gate_w, d_up_w, d_down_w):
            if gradient is not None:
                gradient.index_fill_(0, idle, 0)
        d_combine = plan.unsort(d_weights, ctx.combine_dtype)
        return between.sum_rows(dx, plan.home), None, d_combine, d_gate_w, d_up_w, d_down_w, None
