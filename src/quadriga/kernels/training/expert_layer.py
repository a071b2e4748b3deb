"""Forward and backward pass of the experts, one expert at a time.

    tokens sorted by expert ─► for each expert:  h = act(x Wg^T) * (x Wu^T) * combine ─► y = h Wd^T ─► sum of k rows

Of networks without a gate h = act(x Wu^T) * combine: their one product takes the gate's place (``fused.hidden_rows``).

On a CPU a loop over experts is faster than one grouped product: an expert's rows (1024 x 448 floats) stay in cache
between its products and the activation. No tensor of size (N k, D) is saved for the backward pass: inputs are gathered
again, the activation is recomputed, and only the two pre-activations are saved. The combine weight is applied to the
hidden row instead of the output row, so that its gradient is a dot product of rows already in cache (as in
Megatron-LM). Experts without tokens cost nothing and get a gradient of 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quadriga.kernels.training import fused


def experts(
    x: Tensor,
    routing_ids: Tensor,
    combine: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
) -> Tensor:
    """``ops.experts`` with a gradient that is fast on CPUs; same arguments, and the same result up to rounding."""
    first, second = (w_up, None) if w_gate is None else (w_gate, w_up)
    out: Tensor = _Experts.apply(x, routing_ids, combine, first, second, w_down, activation)  # type: ignore[no-untyped-call]
    return out


class ExpertSort:
    """The slots (token, chosen expert) sorted by expert, with the inverse permutation.

    Each expert's rows are padded to one of 16 counts per octave, because oneDNN compiles code for each new row count,
    which took as long as the product itself. A padding row is token 0 with weight 0.
    """

    def __init__(self, routing_ids: Tensor, n_experts: int) -> None:
        n_tokens, top_k = routing_ids.shape
        flat, device = routing_ids.reshape(-1), routing_ids.device
        # Keys of one byte: the radix sort makes one pass instead of eight.
        keys = flat.to(torch.uint8) if n_experts <= 256 else flat
        order = keys.argsort(stable=True)  # (N k,) slots, all of expert 0 first
        self.sizes: list[int] = torch.bincount(flat, minlength=n_experts).tolist()
        filled = [padded_rows(size) for size in self.sizes]
        self.starts = [0, *itertools.accumulate(filled)]
        self.most = max(filled)
        fill = torch.tensor([f - s for f, s in zip(filled, self.sizes, strict=True)], device=device)
        before = fill.cumsum(0) - fill  # padding rows before each expert's first row
        rows = torch.arange(len(order), device=device) + before[flat[order]]
        self.tokens = torch.zeros(self.starts[-1], dtype=order.dtype, device=device)
        self.tokens[rows] = order // top_k
        self.home = torch.empty_like(order)
        self.home[order] = rows
        self.home = self.home.view(n_tokens, top_k)  # row of token n's slot j in the sorted order

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """Yield (expert, first row, end row) for every expert with rows."""
        for expert, size in enumerate(self.sizes):
            if size:
                yield expert, self.starts[expert], self.starts[expert + 1]

    def idle(self) -> list[int]:
        """Experts without rows."""
        return [expert for expert, size in enumerate(self.sizes) if not size]

    def sort(self, combine: Tensor, dtype: torch.dtype) -> Tensor:
        """Sort one number per slot: (N, k) -> (rows, 1), with 0 in padding rows."""
        values = torch.zeros(len(self.tokens), 1, dtype=dtype, device=combine.device)
        values[self.home.view(-1), 0] = combine.to(dtype).reshape(-1)
        return values

    def unsort(self, sorted_values: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of :meth:`sort`: (rows, 1) -> (N, k)."""
        return sorted_values[:, 0][self.home].to(dtype)


def padded_rows(rows: int) -> int:
    """The padded row count: a multiple of 8, and from 128 on at most a sixteenth more than ``rows``."""
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
        w_up: Tensor | None,
        w_down: Tensor,
        activation: str,
    ) -> Tensor:
        slots = ExpertSort(routing_ids, w_gate.shape[0])
        x, weights = x.contiguous(), slots.sort(combine, fused.wide(x.dtype))
        (n_rows, d), d_ff = (len(slots.tokens), x.shape[1]), w_gate.shape[1]
        gate, y = x.new_empty(n_rows, d_ff), x.new_empty(n_rows, d)
        up = None if w_up is None else torch.empty_like(gate)
        work_rows, work_hidden = x.new_empty(slots.most, d), x.new_empty(slots.most, d_ff)
        for e, a, b in slots.ranges():
            rows = fused.gather_rows(x, slots.tokens[a:b], work_rows[: b - a])
            torch.mm(rows, w_gate[e].t(), out=gate[a:b])
            if w_up is not None and up is not None:
                torch.mm(rows, w_up[e].t(), out=up[a:b])
            ups = None if up is None else up[a:b]
            hidden = fused.hidden_rows(gate[a:b], ups, weights[a:b], activation, work_hidden[: b - a])
            torch.mm(hidden, w_down[e].t(), out=y[a:b])
        ctx.save_for_backward(x, weights, gate, up, w_gate, w_up, w_down)
        ctx.slots, ctx.activation, ctx.combine_dtype = slots, activation, combine.dtype
        return fused.sum_rows(y, slots.home)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate, up, w_gate, w_up, w_down = ctx.saved_tensors
        slots: ExpertSort = ctx.slots
        train_weights = any(ctx.needs_input_grad[3:6])
        d_gate_w, d_up_w, d_down_w = (
            torch.empty_like(w) if train_weights and w is not None else None for w in (w_gate, w_up, w_down)
        )
        d_out, d_weights = d_out.contiguous(), torch.empty_like(weights)
        d, d_ff = x.shape[1], gate.shape[1]
        dx = x.new_empty(len(slots.tokens), d)
        work_rows = x.new_empty(slots.most, d)
        work_dh, work_hidden, work_du = x.new_empty(3, slots.most, d_ff).unbind()
        for e, a, b in slots.ranges():
            taken, n = slots.tokens[a:b], b - a
            d_rows = fused.gather_rows(d_out, taken, work_rows[:n])
            dh, hidden = torch.mm(d_rows, w_down[e], out=work_dh[:n]), work_hidden[:n]
            ups, du = (None, None) if up is None else (up[a:b], work_du[:n])
            dg = fused.hidden_rows_backward(
                gate[a:b], ups, weights[a:b], ctx.activation, dh, hidden, du, d_weights[a:b]
            )
            torch.mm(dg, w_gate[e], out=dx[a:b])
            if du is not None:
                dx[a:b].addmm_(du, w_up[e])
            if train_weights:
                assert d_gate_w is not None and d_down_w is not None, "allocated above"
                torch.mm(d_rows.t(), hidden, out=d_down_w[e])
                rows = fused.gather_rows(x, taken, work_rows[:n])
                torch.mm(dg.t(), rows, out=d_gate_w[e])
                if du is not None and d_up_w is not None:
                    torch.mm(du.t(), rows, out=d_up_w[e])
        idle = torch.tensor(slots.idle(), dtype=torch.int64, device=x.device)
        for gradient in (d_gate_w, d_up_w, d_down_w):
            if gradient is not None:
                gradient.index_fill_(0, idle, 0)
        d_combine = slots.unsort(d_weights, ctx.combine_dtype)
        return fused.sum_rows(dx, slots.home), None, d_combine, d_gate_w, d_up_w, d_down_w, None
