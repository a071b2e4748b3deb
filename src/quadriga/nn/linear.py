"""The two places where a model's weights are used: ``linear`` (one matrix) and ``grouped_linear`` (one an expert).

    Weight = Tensor           plain: numbers, trained or frozen
           | Quantised        frozen, packed blocks, unpacked where they are used and never kept      (QLoRA's base)
           | Adapted          frozen, plain or quantised, with low-rank factors: W + s B A

A module that owns a weight keeps it under its canonical name whatever kind it is (``attn.wqkv.weight``,
``moe.w_gate``); :func:`hold` changes the kind in place. Nothing else in the model asks what kind a weight is. W + s B A
is never built where rows are multiplied: that costs a product as large as a full fine-tuning's for every weight, and is
why peft is slow on experts (its ``target_parameters`` materialises the sum). Sources: Hu et al. 2021 (arXiv
2106.09685), Dettmers et al. 2023 (arXiv 2305.14314).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quadriga.errors import HardwareError
from quadriga.kernels import ops
from quadriga.kernels.arrays import tensor
from quadriga.kernels.cpu.packing import Packed
from quadriga.nn.device_packed import DevicePacked


class Delta(Protocol):
    """What an adapter adds to a weight: one pair of factors, or a bank of them, each token with its own."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y + s B A x: x (N, in), y (N, out)."""
        ...

    def grouped(self, rows: Tensor, y: Tensor, counts: Tensor, tokens: Tensor) -> Tensor:
        """The same for rows sorted by expert; ``tokens`` (R,) says whose rows they are."""
        ...

    def looked_up(self, ids: Tensor, rows: Tensor) -> Tensor:
        """The same for rows of a table: rows (N, columns) + s B[ids] A."""
        ...

    def variants(self) -> list[tuple[Tensor | None, Tensor]]:
        """(tokens, s B A) of every group of tokens that has one of its own; tokens None: all of them."""
        ...


class LowRank:
    """What an adapter adds to a weight by two factors: a ([E,] r, in), b ([E,] out, r). A ``Delta``.

    A base of :class:`Factors`, which owns them as parameters, and a view of another's: of one rank's experts, say.

    Args:
        scale: what B A x is multiplied by.
        dropout: share of A's inputs that training drops.
    """

    a: Tensor
    b: Tensor
    scale: float
    dropout: float
    training: bool

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """See :class:`Delta`."""
        return torch.addmm(y, F.linear(self._dropped(x), self.a.to(x.dtype)), self.b.to(x.dtype).T, alpha=self.scale)

    def grouped(self, rows: Tensor, y: Tensor, counts: Tensor, tokens: Tensor) -> Tensor:
        """See :class:`Delta`."""
        narrow = ops.grouped_linear(self._dropped(rows), self.a.to(rows.dtype), counts)
        return y + self.scale * ops.grouped_linear(narrow, self.b.to(rows.dtype), counts)

    def looked_up(self, ids: Tensor, rows: Tensor) -> Tensor:
        """See :class:`Delta`."""
        narrow = F.embedding(ids, self.b).to(rows.dtype)
        return torch.addmm(rows, narrow, self.a.to(rows.dtype), alpha=self.scale)

    def variants(self) -> list[tuple[Tensor | None, Tensor]]:
        """See :class:`Delta`."""
        return [(None, self.delta())]

    def delta(self) -> Tensor:
        """What the adapter adds to the weight: s B A, ([E,] out, in)."""
        return self.scale * (self.b @ self.a)

    @property
    def drops_now(self) -> bool:
        """True if inputs are dropped in this pass."""
        return bool(self.dropout) and self.training

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Factors(LowRank, nn.Module):
    """:class:`LowRank` with factors that are parameters of its own."""

    def __init__(self, a: Tensor, b: Tensor, *, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout = scale, dropout


class Part(LowRank):
    """:class:`LowRank` over parts of another's factors, with their gradients."""

    def __init__(self, whole: LowRank, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b
        self.scale, self.dropout, self.training = whole.scale, whole.dropout, whole.training


Blocks = Packed | DevicePacked
"""One packed matrix: for the CPU's kernels, or on another device."""


def numbers(blocks: Blocks) -> Tensor:
    """A packed matrix as float32 (out, in), where it lies."""
    return tensor(blocks.unpack()) if isinstance(blocks, Packed) else blocks.unpack()


class Quantised(nn.Module):
    """A frozen matrix as packed blocks, or a list of them, one an expert. No parameters: it stays where it was put."""

    def __init__(self, packed: Blocks | list[Blocks]) -> None:
        super().__init__()
        self.packed = packed

    def one(self) -> Blocks:
        """The matrix of a weight that is one."""
        assert not isinstance(self.packed, list), "one matrix"
        return self.packed

    def stack(self) -> Sequence[Blocks]:
        """The matrices of a weight that has one an expert."""
        assert isinstance(self.packed, list), "one matrix an expert"
        return self.packed


class Adapted(nn.Module):
    """A frozen weight and what an adapter adds to it."""

    def __init__(self, frozen: Tensor | Quantised, delta: nn.Module | LowRank) -> None:
        super().__init__()
        if isinstance(frozen, Tensor):
            self.frozen: Any = frozen if isinstance(frozen, nn.Parameter) else nn.Parameter(frozen, requires_grad=False)
        else:
            self.frozen = frozen
        self.delta: Any = delta


Weight = Tensor | Quantised | Adapted


def hold(owner: nn.Module, name: str, weight: Weight | nn.Parameter) -> None:
    """Let ``owner`` keep ``weight`` under ``name``, whatever kind it kept there before."""
    if hasattr(owner, name):
        delattr(owner, name)
    setattr(owner, name, weight.train(owner.training) if isinstance(weight, nn.Module) else weight)


def adapt(owner: nn.Module, name: str, delta: nn.Module) -> None:
    """Put an adapter on a weight; one that it had gives way."""
    held = getattr(owner, name)
    hold(owner, name, Adapted(held.frozen if isinstance(held, Adapted) else held, delta))


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x W^T, with what an adapter adds: (N, in) -> (N, out).

    Raises:
        HardwareError: packed blocks and an input that is not on the host.
    """
    match weight:
        case Adapted():
            y: Tensor = weight.delta(x, linear(x, weight.frozen))
            return y
        case Quantised():
            return _packed_linear(x, weight.one())
    return F.linear(x, weight)


def grouped_linear(rows: Tensor, weight: Weight, counts: Tensor, tokens: Tensor) -> Tensor:
    """Rows of expert e times W[e]^T, with what an adapter adds, for rows sorted by expert.

    Args:
        rows: (R, in). counts: (E,) int64, rows of each expert. tokens: (R,) int64, the token each row belongs to.

    Returns:
        (R, out).

    Raises:
        HardwareError: as :func:`linear`.
    """
    match weight:
        case Adapted():
            y: Tensor = weight.delta.grouped(rows, grouped_linear(rows, weight.frozen, counts, tokens), counts, tokens)
            return y
        case Quantised():
            parts = zip(torch.split(rows, counts.tolist()), weight.stack(), strict=True)
            made = [_packed_linear(part, packed) for part, packed in parts if len(part)]
            # One of several ranks may have no rows: the gradient's way back must be there all the same.
            return torch.cat(made or [_packed_linear(rows, weight.stack()[0])])
    return ops.grouped_linear(rows, weight, counts)


def look_up(ids: Tensor, table: Weight) -> Tensor:
    """Rows of a table: ids (N,) -> (N, columns)."""
    if isinstance(table, Adapted):
        rows: Tensor = table.delta.looked_up(ids, look_up(ids, table.frozen))
        return rows
    assert isinstance(table, Tensor), "tables of embeddings stay plain"
    return F.embedding(ids, table)


def whole(weight: Weight) -> Tensor:
    """The weight as one matrix (out, in), its adapter folded in; for a router, merging, or a loss over the head."""
    match weight:
        case Adapted():
            frozen = whole(weight.frozen)
            ((tokens, delta),) = weight.delta.variants()
            assert tokens is None, "where every token has its own adapter there is no one weight"
            folded: Tensor = frozen + delta.to(frozen.dtype)
            return folded
        case Quantised():
            return numbers(weight.one())
    return weight


def variants(weight: Weight) -> list[tuple[Tensor | None, Tensor]]:
    """(tokens, matrix) of every group of tokens whose matrix is its own, the one of all others (tokens None) first."""
    if not isinstance(weight, Adapted):
        return [(None, whole(weight))]
    frozen = whole(weight.frozen)
    own = [(tokens, frozen + delta.to(frozen.dtype)) for tokens, delta in weight.delta.variants()]
    return own if own and own[0][0] is None else [(None, frozen), *own]


class Linear(nn.Module):
    """One weight (rows, columns), of any kind, and a bias (rows,) if asked for: a linear map, or a table of embeddings.

    It only holds: ``transformer.random_parameters`` initialises. torch's own Linear and Embedding do so when they are
    built, which on the meta device imports torch's compiler: 1.7 s of every load.
    """

    weight: Weight

    def __init__(self, rows: int, columns: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b: (N, columns) -> (N, rows)."""
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows of the table: ids (N,) -> (N, columns)."""
        return look_up(ids, self.weight)


class _PackedLinear(torch.autograd.Function):
    """x W^T where W is unpacked when needed, forwards and backwards, and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Blocks) -> Tensor:
        ctx.packed = packed
        return F.linear(x, numbers(packed).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        return gradient @ numbers(ctx.packed).to(gradient.dtype), None


def _packed_linear(x: Tensor, packed: Blocks) -> Tensor:
    if isinstance(packed, Packed) and x.device.type != "cpu":
        raise HardwareError(f"packed weights are unpacked by the CPU's kernels; the input is on {x.device}")
    out: Tensor = _PackedLinear.apply(x, packed)  # type: ignore[no-untyped-call]
    return out
