"""Expert parallelism: each rank of a group holds some of the experts, and tokens are sent to them.

    sort slots by expert ─► counts to every rank ─► rows to the ranks of their experts (all-to-all)
        ─► the rank's own experts compute ─► rows back ─► weighted sum of each token's k rows

As in MegaBlocks and torchtitan. The host waits only for the counts, once a layer and pass. Pieces may have any size
including 0, so ranks without tokens or with idle experts need no special case, and no token is dropped. The layer does
not know about ranks: it is given :class:`AllToAllExperts` as its ``dispatch``, and of each weight its own experts'
part, be it plain, packed or with an adapter's factors (:func:`spread`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from quadriga.kernels.reference import tally
from quadriga.nn.linear import Adapted, LowRank, Part, Quantised, Weight
from quadriga.nn.moe import ExpertWeights, MoE, here, n_experts

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def spread(moe: MoE, mesh: DeviceMesh) -> None:
    """Leave each rank of a one-dimensional mesh its own consecutive experts of a layer, in place."""
    for name in ("w_gate", "w_up", "w_down") if moe.spec.gated else ("w_up", "w_down"):
        for owner, part in _held(moe, name):
            value = getattr(owner, part)
            if isinstance(value, Quantised):
                own = len(value.stack()) // mesh.size()
                first = mesh.get_local_rank() * own
                value.packed = list(value.stack()[first : first + own])
                continue
            local = distribute_tensor(value.detach(), mesh, [Shard(0)], src_data_rank=None)
            setattr(owner, part, nn.Parameter(local, requires_grad=value.requires_grad))
    moe.dispatch = AllToAllExperts(mesh.get_group())


def _held(owner: nn.Module, name: str) -> Iterator[tuple[nn.Module, str]]:
    """(module, attribute) of every tensor or packed stack that a weight of any kind is made of."""
    weight = getattr(owner, name)
    if not isinstance(weight, Adapted):
        yield owner, name
        return
    yield from ((weight, "frozen"), (weight.delta, "a"), (weight.delta, "b"))


def _own(weight: Weight) -> Weight:
    """What this rank has of a weight that :func:`spread` divided."""
    match weight:
        case Adapted():
            frozen, delta = _own(weight.frozen), weight.delta
            assert isinstance(delta, LowRank), "training has one pair of factors, no bank of adapters"
            assert not isinstance(frozen, Adapted), "a frozen weight has no adapter"
            return Adapted(frozen, Part(delta, _local(delta.a), _local(delta.b)))
        case Quantised():
            return weight
    return _local(weight)


def _local(x: Tensor) -> Tensor:
    part: Tensor = x.to_local() if isinstance(x, DTensor) else x
    return part


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
        gate = None if weights.gate is None else _own(weights.gate)
        local = ExpertWeights(gate, _own(weights.up), _own(weights.down))
        own = n_experts(local.up)
        n_tokens, top_k = routing_ids.shape
        flat = routing_ids.reshape(-1)
        order = flat.argsort(stable=True)
        sent_ids = flat[order]
        to_send = tally(sent_ids // own, self.size)
        to_get = torch.empty_like(to_send)
        dist.all_to_all_single(to_get, to_send, group=self.group)
        out_sizes, in_sizes = torch.stack((to_get, to_send)).tolist()
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
