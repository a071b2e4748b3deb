"""Forward and backward pass of experts with frozen weights and LoRA factors, one expert at a time.

    for each expert:  g = x Wg^T + s (x Ag^T) Bg^T,  u alike ─► h = act(g) * u * combine ─► y = h Wd^T + s (h Ad^T) Bd^T

The counterpart of ``expert_layer`` for LoRA on experts: rows stay in cache between an expert's products, frozen weights
get no gradient, the factors' gradients are products of width r, and of the tensors with N k rows only the two
pre-activations and the r-wide rows are saved. A frozen weight may be quantised; it is dequantised when needed, once in
the forward and once in the backward pass. Experts without tokens cost nothing; their factors get a gradient of 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quadriga.kernels.arrays import tensor
from quadriga.kernels.cpu.packing import Packed
from quadriga.kernels.ops import AdaptedPart
from quadriga.kernels.training import fused
from quadriga.kernels.training.expert_layer import ExpertSort

PARTS = ("w_gate", "w_up", "w_down")
"""Of networks without a gate, w_up is in its place and there is no second part."""


def adapted_experts(
    x: Tensor, routing_ids: Tensor, combine: Tensor, parts: Mapping[str, AdaptedPart], activation: str
) -> Tensor:
    """Experts with LoRA factors; arguments and result as specified in ``ops.adapted_experts``."""
    placed = parts if "w_gate" in parts else {"w_gate": parts["w_up"], "w_down": parts["w_down"]}
    flat = [factor for name in PARTS if name in placed for factor in (placed[name].a, placed[name].b)]
    out: Tensor = _AdaptedExperts.apply(x, routing_ids, combine, *flat, placed, activation)  # type: ignore[no-untyped-call]
    return out


def _in_order(parts: Mapping[str, AdaptedPart]) -> list[AdaptedPart]:
    return [parts[name] for name in PARTS if name in parts]


def _weight(part: AdaptedPart, expert: int, dtype: torch.dtype) -> Tensor:
    """One expert's frozen weight (out, in), dequantised if necessary."""
    one = part.frozen[expert]
    return tensor(one.unpack()).to(dtype) if isinstance(one, Packed) else one


class _AdaptedProduct:
    """The product with one adapted weight (gate, up or down) in the forward or the backward pass."""

    def __init__(self, part: AdaptedPart, narrow: Tensor | None, *, gradients: bool = False) -> None:
        self.part = part
        self.narrow = narrow
        """(N k, r): rows A^T, saved for the backward pass; None without factors."""
        self.d_a = torch.zeros_like(part.a) if gradients and part.a is not None else None
        self.d_b = torch.zeros_like(part.b) if gradients and part.b is not None else None

    def forward(self, e: int, span: slice, rows: Tensor, out: Tensor) -> Tensor:
        """out = rows W^T + s (rows A^T) B^T."""
        part = self.part
        torch.mm(rows, _weight(part, e, rows.dtype).t(), out=out)
        if part.a is not None and part.b is not None and self.narrow is not None:
            narrow = torch.mm(rows, part.a[e].t(), out=self.narrow[span])
            out.addmm_(narrow, part.b[e].t(), alpha=part.scale)
        return out

    def backward(
        self, e: int, span: slice, rows: Tensor | None, d_out: Tensor, d_rows: Tensor | None, *, add: bool
    ) -> None:
        """d_rows = (or +=) d_out (W + s B A); also accumulates the factors' gradients from ``rows``."""
        part = self.part
        if d_rows is not None:
            d_rows.addmm_(d_out, _weight(part, e, d_out.dtype), beta=float(add))
        if part.a is None or part.b is None or self.narrow is None:
            return
        assert rows is not None and self.d_a is not None and self.d_b is not None, "a part with factors"
        # The thin product is five times as fast computed as (r, out) as it is computed as (out, r).
        d_narrow = torch.mm(d_out, part.b[e].t().contiguous().t()).mul_(part.scale)
        torch.mm(d_narrow.t(), rows, out=self.d_a[e])
        torch.mul(torch.mm(self.narrow[span].t(), d_out).t(), part.scale, out=self.d_b[e])
        if d_rows is not None:
            d_rows.addmm_(d_narrow, part.a[e])


class _AdaptedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, routing_ids: Tensor, combine: Tensor, *rest: Any) -> Tensor:
        *factors, parts, activation = rest
        first = parts["w_gate"].frozen
        n_experts, d_ff = len(first), first[0].rows if isinstance(first[0], Packed) else first[0].shape[0]
        slots = ExpertSort(routing_ids, n_experts)
        x, weights = x.contiguous(), slots.sort(combine, fused.wide(x.dtype))
        n_rows, d = len(slots.tokens), x.shape[1]
        narrow = [None if a is None else x.new_empty(n_rows, a.shape[1]) for a in factors[::2]]
        gate_part, *up_parts, down_part = (
            _AdaptedProduct(part, rows) for part, rows in zip(_in_order(parts), narrow, strict=True)
        )
        gate, y = x.new_empty(n_rows, d_ff), x.new_empty(n_rows, d)
        up = torch.empty_like(gate) if up_parts else None
        work_rows, work_hidden = x.new_empty(slots.most, d), x.new_empty(slots.most, d_ff)
        for e, start, end in slots.ranges():
            span = slice(start, end)
            rows = fused.gather_rows(x, slots.tokens[span], work_rows[: end - start])
            g = gate_part.forward(e, span, rows, gate[span])
            u = None if up is None else up_parts[0].forward(e, span, rows, up[span])
            hidden = fused.hidden_rows(g, u, weights[span], activation, work_hidden[: end - start])
            down_part.forward(e, span, hidden, y[span])
        ctx.save_for_backward(x, weights, gate, up, *narrow, *factors)
        ctx.slots, ctx.parts, ctx.activation, ctx.combine_dtype = slots, parts, activation, combine.dtype
        return fused.sum_rows(y, slots.home)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate, up, *rest = ctx.saved_tensors
        n_parts = len(ctx.parts)
        narrow, a_and_b = rest[:n_parts], zip(rest[n_parts::2], rest[n_parts + 1 :: 2], strict=True)
        slots: ExpertSort = ctx.slots
        gate_part, *up_parts, down_part = (
            _AdaptedProduct(replace(part, a=a, b=b), rows, gradients=True)
            for part, (a, b), rows in zip(_in_order(ctx.parts), a_and_b, narrow, strict=True)
        )
        d_out, d_weights = d_out.contiguous(), torch.empty_like(weights)
        d, d_ff = x.shape[1], gate.shape[1]
        dx = x.new_empty(len(slots.tokens), d) if ctx.needs_input_grad[0] else None
        work_rows = x.new_empty(slots.most, d)
        work_dh, work_hidden, work_du = x.new_empty(3, slots.most, d_ff).unbind()
        for e, start, end in slots.ranges():
            span, n = slice(start, end), end - start
            taken, g, c = slots.tokens[span], gate[span], weights[span]
            u, du = (None, None) if up is None else (up[span], work_du[:n])
            dh, hidden = work_dh[:n], work_hidden[:n]
            if down_part.narrow is not None:
                fused.hidden_rows(g, u, c, ctx.activation, hidden)
            down_part.backward(e, span, hidden, fused.gather_rows(d_out, taken, work_rows[:n]), dh, add=False)
            dg = fused.hidden_rows_backward(g, u, c, ctx.activation, dh, hidden, du, d_weights[span])
            rows = None
            if any(part.d_a is not None for part in (gate_part, *up_parts)):
                rows = fused.gather_rows(x, taken, work_rows[:n])
            d_rows = None if dx is None else dx[span]
            gate_part.backward(e, span, rows, dg, d_rows, add=False)
            for part in up_parts:
                assert du is not None, "it has a gradient where it is"
                part.backward(e, span, rows, du, d_rows, add=True)
        d_combine = slots.unsort(d_weights, ctx.combine_dtype)
        gradients = [gradient for part in (gate_part, *up_parts, down_part) for gradient in (part.d_a, part.d_b)]
        return None if dx is None else fused.sum_rows(dx, slots.home), None, d_combine, *gradients, None, None
