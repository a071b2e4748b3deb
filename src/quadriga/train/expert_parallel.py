"""Expert parallelism: each rank of a group holds some of the experts, and tokens are sent to them.

    sort slots by expert ─► counts to every rank ─► rows to the ranks of their experts (all-to-all)
        ─► the rank's own experts compute ─► rows back ─► weighted sum of each token's k rows

As in MegaBlocks and torchtitan. The host waits only for the counts, once per layer. Pieces may have any size including
0, so ranks without tokens or with idle experts need no special case, and no token is dropped. The layer does not know
about ranks: it is given :class:`AllToAllExperts` as its ``dispatch``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from quadriga.nn.moe import ExpertWeights, here, n_experts


class AllToAllExperts:
    """An ``ExpertDispatch`` over a group of ranks, each of which holds E / size consecutive experts.

    Args:
        group: the ranks that the experts are divided among.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)

    def __call__(
        self, x: Tensor, routing_ids: Tensor, combine: Tensor, weights: ExpertWeights, activation: str
    ) -> Tensor:
        """Compute the experts' weighted sum as in ``ExpertDispatch``; ``weights`` are this rank's (E / size, ...)."""
        assert weights.b_up is None, "the layout of ranks refuses experts with biases"
        gate, up, down = (w.to_local() if isinstance(w, DTensor) else w for w in weights.matrices)
        local = ExpertWeights(gate, up, down)
        own = n_experts(local.gate)
        n_tokens, top_k = routing_ids.shape
        flat = routing_ids.reshape(-1)
        order = flat.argsort(stable=True)
        sent_ids = flat[order]
        to_send = torch.bincount(sent_ids // own, minlength=self.size)
        to_get = torch.empty_like(to_send)
        dist.all_to_all_single(to_get, to_send, group=self.group)
        out_sizes, in_sizes = to_get.tolist(), to_send.tolist()
        rows = _travel(x[order // top_k], out_sizes, in_sizes, self.group)
        ids = torch.empty(sum(out_sizes), dtype=sent_ids.dtype, device=x.device)
        dist.all_to_all_single(ids, sent_ids % own, out_sizes, in_sizes, group=self.group)
        ones = torch.ones(len(ids), 1, dtype=combine.dtype, device=x.device)
        done = here(rows, ids[:, None], ones, local, activation)
        back = _travel(done, in_sizes, out_sizes, self.group)
        home = torch.empty_like(order)
        home[order] = torch.arange(len(order), device=x.device)
        slots = F.embedding(home, back).view(n_tokens, top_k, -1)
        return torch.einsum("nkd,nk->nd", slots, combine.to(x.dtype))


def _travel(rows: Tensor, out_sizes: list[int], in_sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived: Tensor = _AllToAll.apply(rows, out_sizes, in_sizes, group)  # type: ignore[no-untyped-call]
    return arrived


class _AllToAll(torch.autograd.Function):
    """Send rows to other ranks; the backward pass sends the gradients back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, out_sizes: list[int], in_sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = (in_sizes, out_sizes), group
        return _exchange(rows, out_sizes, in_sizes, group)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        out_sizes, in_sizes = ctx.sizes
        return _exchange(d_out, out_sizes, in_sizes, ctx.group), None, None, None


def _exchange(rows: Tensor, out_sizes: list[int], in_sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    got = rows.new_empty(sum(out_sizes), rows.shape[1])
    dist.all_to_all_single(got, rows.contiguous(), out_sizes, in_sizes, group=group)
    return got
