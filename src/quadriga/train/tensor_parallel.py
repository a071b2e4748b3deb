"""Tensor parallelism: a rank keeps some heads of every attention layer, and some columns of every dense network.

    x (own tokens) ──gather──► its heads of the neighbours' tokens ──wo, its columns──► sum and deal ──► (own tokens)

As in Megatron-LM with sequence parallelism (Korthikanti et al. 2022): between the cut halves each rank has its own
tokens, so norms, routers, experts and the loss are those of data parallelism. Which rows and columns are whose is
:class:`RankShare`'s, as for ranks that answer; here every part is equal. A layer's own code runs unchanged on fewer
heads: what is around it are hooks. An adapter's factors are cut as the matrix is that they are added to.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.model.config import AlibiSpec, AttentionSpec
from quadriga.model.parallel_spec import head_dim_of
from quadriga.model.rank_mesh import RankMesh, RankPlace, Run, even_part
from quadriga.model.rank_share import RankShare
from quadriga.nn.attention import Attention
from quadriga.nn.linear import Linear, linear
from quadriga.nn.transformer import Block, Transformer
from quadriga.train.row_group import RowGroup
from quadriga.train.shards import Portion


class _EvenPlace(RankPlace):
    """A place whose parts are equal: ``ParallelSpec`` refuses what cannot be divided so."""

    def of_group(self, n: int, width: int = 1) -> Run:
        return even_part(n, self.mesh.group, self.index)


def _share(model: Transformer, group: RowGroup, part: int) -> RankShare:
    place = _EvenPlace(
        mesh=RankMesh(tp=group.n_tensor), rank=part, stage=0, index=part, expert_part=0, tensor_part=part
    )
    return RankShare(model.config, place)


def cut_heads(model: Transformer, group: RowGroup) -> dict[str, Portion]:
    """Leave a model only this rank's heads and columns, and let its layers gather and sum over the neighbours.

    Returns:
        the parameters that were cut, and which portion of them the model has now.
    """
    shares, portions = [_share(model, group, part) for part in range(group.n_tensor)], {}
    share = shares[group.tensor_part]
    for name, whole in list(model.named_parameters()):
        matrix, dim = _cut_along(name)
        if dim is None:
            continue
        spans = [_spans(one, matrix, dim) for one in shares]
        portions[name] = portion = Portion(dim, spans[group.tensor_part], whole.shape[dim], tuple(spans))
        owner, _, last = name.rpartition(".")
        part = nn.Parameter(portion.take(whole.detach()), requires_grad=whole.requires_grad)
        setattr(model.get_submodule(owner), last, part)
    for i, layer in enumerate(model.layers):
        if isinstance(layer, Block):
            _let_meet(layer, share, i, group)
    return portions


def _cut_along(name: str) -> tuple[str, int | None]:
    """The matrix that a parameter is or belongs to, and along which of its dimensions it is cut; None: it stays whole.

    Of W + s B A, B (out, r) has the rows of W and A (r, in) its columns; the other factor is whole, and its gradient
    the sum of the neighbours'.
    """
    for kind, own in ((".frozen", None), (".delta.b", 0), (".delta.a", 1)):
        if name.endswith(kind):
            matrix = name.removesuffix(kind)
            dim = head_dim_of(matrix)
            return matrix, dim if own in (None, dim) else None
    return name, head_dim_of(name)


def _spans(share: RankShare, name: str, dim: int) -> tuple[Run, ...]:
    selection = share.wanted[name][1]
    spans = selection.rows if dim == 0 else selection.cols
    assert spans is not None, "what head_dim_of names is cut"
    return spans


def _let_meet(block: Block, share: RankShare, layer: int, group: RowGroup) -> None:
    assert block.attn is not None, "ParallelSpec refuses recurrent layers"
    own = share.config.layers[layer].mixer
    assert isinstance(own, AttentionSpec), "ParallelSpec refuses recurrent layers"
    block.attn.spec = own
    if isinstance(block.attn, Attention) and isinstance(own.position, AlibiSpec):
        block.attn.slopes = torch.from_numpy(share.slopes(layer))
    wo = block.attn.wo
    if wo.bias is not None:
        wo.forward = partial(_with_part_of_bias, wo, group.n_tensor)  # type: ignore[method-assign]
    for half in (block.attn, block.ffn):
        if half is not None:
            half.register_forward_pre_hook(_Gathers(group))
            half.register_forward_hook(_Sums(group))


def _with_part_of_bias(projection: Linear, n_tensor: int, x: Tensor) -> Tensor:
    """What a projection gives of these heads, with so much of its bias that the neighbours' sum has it once."""
    assert projection.bias is not None, "asked for those that have one"
    return linear(x, projection.weight) + projection.bias / n_tensor


class _Gathers:
    """A hook before a half: its first argument becomes that of all neighbours' tokens."""

    def __init__(self, group: RowGroup) -> None:
        self.group = group

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.group.gathered(args[0]), *args[1:])


class _Sums:
    """A hook behind a half: its result is summed over the neighbours, and each keeps its own tokens."""

    def __init__(self, group: RowGroup) -> None:
        self.group = group

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return self.group.summed(out)
