"""Ranks that share rows: each has an equal part of their tokens, and they meet only in attention and dense networks.

    rows of a group (N tokens) = cp parts, of tp parts each, one after the other: part c * tp + t is this rank's

    tensor   t = 0 .. tp - 1   neighbours that share heads: inputs of a layer's half are gathered (N / cp tokens), each
                               rank computes its heads or columns, and what they project is summed and dealt out again
    context  c = 0 .. cp - 1   keys and values of all N tokens are gathered; queries stay where they are

A context part has two pieces of the rows, equally far from both ends: of 2 cp pieces, c and 2 cp - 1 - c. A token of a
long document sees all before it, so the end of a row is the most work and its beginning the least: two such pieces are
as much as any other two. (So does Llama 3's training: Dubey et al. 2024, section 3.3.2.)

Both collectives are of equal parts along the first dimension, and each is the other's backward pass. So a parameter
that is not cut (a norm, a router, an embedding) gets from each rank the gradient of that rank's tokens or heads, and
the sum over all ranks, which FSDP2 takes anyway, is the whole gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """This rank's neighbours; a group of one rank needs no process group."""

    n_tensor: int = 1
    n_context: int = 1
    part: int = 0
    """This rank's part of the rows, from 0 to n_tensor * n_context - 1."""
    tensor: dist.ProcessGroup | None = None
    context: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Ranks that share rows."""
        return self.n_tensor * self.n_context

    @property
    def tensor_part(self) -> int:
        """This rank's part of the heads."""
        return self.part % self.n_tensor

    def spans(self, n: int) -> tuple[tuple[int, int], ...]:
        """Which of the group's ``n`` tokens this context part has, in their order."""
        each, part = n // self.n_context, self.part // self.n_tensor
        if not self._in_two(n):
            return ((part * each, (part + 1) * each),)
        half = each // 2
        return ((part * half, (part + 1) * half), (n - (part + 1) * half, n - part * half))

    def _in_two(self, n: int) -> bool:
        """Whether context parts of ``n`` tokens have two pieces; an odd number of tokens stays one."""
        return self.n_context > 1 and n // self.n_context % 2 == 0

    def without_context(self) -> RowGroup:
        """The same neighbours where each context part has rows of its own."""
        return replace(self, n_context=1, part=self.tensor_part, context=None)

    def gathered(self, x: Tensor) -> Tensor:
        """x (N', ...) of all tensor parts, one after the other: (tp N', ...)."""
        return x if self.tensor is None else _applied(_Gather, x, self.tensor)

    def summed(self, x: Tensor) -> Tensor:
        """The sum of all tensor parts' x (tp N', ...), of which this rank keeps its own rows (N', ...)."""
        return x if self.tensor is None else _applied(_SumAndDeal, x, self.tensor)

    def portions(self, x: Tensor) -> tuple[Tensor, ...]:
        """Every tensor part's x, of this one's shape, in their order; without a gradient."""
        return (x,) if self.tensor is None else _gather(x[None], self.tensor).unbind()

    def whole_context(self, x: Tensor) -> Tensor:
        """x (N', ...) of all context parts, in the order of the rows: (cp N', ...)."""
        if self.context is None:
            return x
        found = _applied(_Gather, x, self.context)
        if not self._in_two(len(found)):
            return found
        pieces = found.reshape(self.n_context, 2, -1, *found.shape[1:])
        return torch.cat((pieces[:, 0].flatten(0, 1), pieces[:, 1].flip(0).flatten(0, 1)))


ALONE = RowGroup()
"""A rank that shares its rows with no other."""


def _applied(function: type[torch.autograd.Function], x: Tensor, group: dist.ProcessGroup) -> Tensor:
    made: Tensor = function.apply(x, group)  # type: ignore[no-untyped-call]
    return made


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(x.shape[0] * dist.get_world_size(group), *x.shape[1:])
    dist.all_gather_single(out, x.contiguous(), group=group)
    return out


def _sum_and_deal(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(x.shape[0] // dist.get_world_size(group), *x.shape[1:])
    dist.reduce_scatter_single(out, x.contiguous(), group=group)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _sum_and_deal(gradients[0], ctx.group), None


class _SumAndDeal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum_and_deal(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _gather(gradients[0], ctx.group), None
