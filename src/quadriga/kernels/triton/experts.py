"""A mixture's networks: gate and up in one launch, down in one, the weighted sum in one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quadriga.kernels.reference import gated
from quadriga.kernels.triton.combine import combine
from quadriga.kernels.triton.gradients import grouped_linear
from quadriga.kernels.triton.grouped import grouped_product
from quadriga.kernels.triton.router import Places, place
from quadriga.kernels.triton.weights import GroupedWeight, plain


@dataclass(frozen=True)
class ExpertNetworks:
    """gate and up (E, F, D) and down (E, D, F), of any format, and their biases (E, F), (E, F) and (E, D) or None."""

    gate: GroupedWeight
    up: GroupedWeight
    down: GroupedWeight
    activation: str
    b_gate: Tensor | None = None
    b_up: Tensor | None = None
    b_down: Tensor | None = None


def run_experts(
    x: Tensor, places: Places, weights: Tensor, networks: ExpertNetworks, base: Tensor | None = None
) -> Tensor:
    """out[n] = base[n] + sum_j weights[n, j] y_{ids[n, j]}(x[n]), as ``ops.experts``; three launches.

    Args:
        x: (N, D). weights: (N, k) float32. base: (N, D).

    Returns:
        (N, D) in x's dtype. Each y is rounded to it; the sum is float32.
    """
    top_k = weights.shape[1]
    hidden = grouped_product(
        x, networks.gate, up=networks.up, activation=networks.activation, bias=networks.b_gate, bias_up=networks.b_up,
        starts=places.starts, order=places.order, top_k=top_k,
    )  # fmt: skip
    rows = grouped_product(hidden, networks.down, bias=networks.b_down, starts=places.starts)
    return combine(rows, places.home, weights, base)


def experts(
    x: Tensor,
    routing_ids: Tensor,
    combine: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
) -> Tensor:
    """``ops.experts``: three launches and the sort, or where a gradient is asked for the passes that have one."""
    places = place(routing_ids, len(w_gate))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, combine, w_gate, w_up, w_down)):
        return _with_gradients(x, places, combine, (w_gate, w_up, w_down), activation)
    networks = ExpertNetworks(plain(w_gate), plain(w_up), plain(w_down), activation)
    return run_experts(x, places, combine.float(), networks)


def _with_gradients(
    x: Tensor, places: Places, combine: Tensor, weights: tuple[Tensor, Tensor, Tensor], activation: str
) -> Tensor:
    """Products by kernels that have gradients, what lies between them by torch."""
    gate, up, down = weights
    rows = x[places.order.long() // combine.shape[1]]
    counts = places.starts.diff()
    hidden = gated(grouped_linear(rows, gate, counts), grouped_linear(rows, up, counts), activation)
    slots = grouped_linear(hidden, down, counts)[places.home.long()]  # (N, k, D)
    return torch.bmm(combine.to(x.dtype)[:, None], slots).squeeze(1)
