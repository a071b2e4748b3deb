"""A mixture's networks: gate and up in one launch, down in one, the weighted sum in one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quadriga.kernels.reference import activate, gated
from quadriga.kernels.triton.combine import combine
from quadriga.kernels.triton.gradients import grouped_linear
from quadriga.kernels.triton.grouped import grouped_product
from quadriga.kernels.triton.router import Places, place
from quadriga.kernels.triton.weights import GroupedWeight, plain


@dataclass(frozen=True)
class ExpertNetworks:
    """gate and up (E, F, D) and down (E, D, F), of any format, and their biases (E, F), (E, F) and (E, D) or None."""

    gate: GroupedWeight | None
    """None: the networks are not gated."""
    up: GroupedWeight
    down: GroupedWeight
    activation: str
    b_gate: Tensor | None = None
    b_up: Tensor | None = None
    b_down: Tensor | None = None


def gated_product(x: Tensor, networks: ExpertNetworks, places: Places | None = None, top_k: int = 1) -> Tensor:
    """act(gate x) * up x of the chosen experts, or of the one that has all rows: (R, F) in x's dtype.

    One launch; where gate and up are of two formats, three, and their products are rounded in between. Without a gate
    act(up x), two launches.
    """
    starts, order = (None, None) if places is None else (places.starts, places.order)

    def times(weight: GroupedWeight, bias: Tensor | None, up: GroupedWeight | None = None) -> Tensor:
        activation, bias_up = (None, None) if up is None else (networks.activation, networks.b_up)
        return grouped_product(
            x, weight, up=up, activation=activation, bias=bias, bias_up=bias_up, starts=starts, order=order, top_k=top_k
        )

    if networks.gate is None:
        return activate(times(networks.up, networks.b_up), networks.activation)
    if networks.gate.format == networks.up.format:
        return times(networks.gate, networks.b_gate, networks.up)
    left = times(networks.gate, networks.b_gate)
    return gated(left, times(networks.up, networks.b_up), networks.activation)


def expert_rows(x: Tensor, places: Places, top_k: int, networks: ExpertNetworks) -> Tensor:
    """What every chosen expert makes of its tokens, by expert: x (N, D) -> (N k, D) in x's dtype, not yet summed."""
    hidden = gated_product(x, networks, places, top_k)
    return grouped_product(hidden, networks.down, bias=networks.b_down, starts=places.starts)


def run_experts(
    x: Tensor, places: Places, weights: Tensor, networks: ExpertNetworks, base: Tensor | None = None
) -> Tensor:
    """out[n] = base[n] + sum_j weights[n, j] y_{ids[n, j]}(x[n]), as ``ops.experts``; three launches.

    Args:
        x: (N, D). weights: (N, k) float32. base: (N, D).

    Returns:
        (N, D) in x's dtype. Each y is rounded to it; the sum is float32.
    """
    return combine(expert_rows(x, places, weights.shape[1], networks), places.home, weights, base)


def experts(
    x: Tensor,
    routing_ids: Tensor,
    combine: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
) -> Tensor:
    """``ops.experts``: three launches and the sort, or where a gradient is asked for the passes that have one."""
    places = place(routing_ids, len(w_up))
    given = (x, combine, w_gate, w_up, w_down)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return _with_gradients(x, places, combine, (w_gate, w_up, w_down), activation)
    gate = None if w_gate is None else plain(w_gate)
    networks = ExpertNetworks(gate, plain(w_up), plain(w_down), activation)
    return run_experts(x, places, combine.float(), networks)


def _with_gradients(
    x: Tensor, places: Places, combine: Tensor, weights: tuple[Tensor | None, Tensor, Tensor], activation: str
) -> Tensor:
    """Products by kernels that have gradients, what lies between them by torch."""
    gate, up, down = weights
    rows = x[places.order.long() // combine.shape[1]]
    counts = places.starts.diff()
    hidden = grouped_linear(rows, up, counts)
    if gate is None:
        hidden = activate(hidden, activation)
    else:
        hidden = gated(grouped_linear(rows, gate, counts), hidden, activation)
    slots = grouped_linear(hidden, down, counts)[places.home.long()]  # (N, k, D)
    return torch.bmm(combine.to(x.dtype)[:, None], slots).squeeze(1)
