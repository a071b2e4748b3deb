"""One layer's forward pass that shows every matrix at work: what came to it, and what it made of that.

Layers are loaded one at a time, with float32 weights; everything here has gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quadriga.io.open import Checkpoint
from quadriga.kernels import ops
from quadriga.kernels.arrays import tensor
from quadriga.model.config import ModelConfig
from quadriga.model.weight_map import parameter_shapes
from quadriga.nn.context import PackedContext
from quadriga.nn.feedforward import FeedForward
from quadriga.nn.linear import Linear, Weight, linear, whole
from quadriga.nn.moe import MoE
from quadriga.nn.rope import Rotations
from quadriga.nn.transformer import Block


@dataclass(frozen=True)
class Met:
    """A matrix at work."""

    name: str
    """The parameter's, an expert's with its number: layers.3.moe.w_up/5."""
    weight: Tensor
    """(rows, columns)"""
    inputs: Tensor
    """(n, columns)"""
    output: Tensor
    """(n, rows), without a bias; of a matrix a head (n, heads, rows of a head)."""
    prior: Tensor | None = None
    """(m, columns) what came to the whole layer, of an expert whose inputs are some of that."""


@dataclass(frozen=True)
class Routed:
    """What a layer's experts did."""

    visits: list[int]
    """Tokens of each expert."""
    outputs: list[float]
    """Of each, routing weight * L2 norm of its output, summed over its tokens."""


See = Callable[[Met], None]


def embed(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """Embed tokens, (N,) -> (N, D) float32, reading only the rows of the table that are needed."""
    view, config = checkpoint.parameters, checkpoint.config
    # In order, so that every stored part is read once; copied, so that none stays in memory.
    distinct = sorted(set(tokens.tolist()))
    rows = [tensor(view.read("embed.weight", ((t, t + 1), (0, config.d_model)))).float().clone() for t in distinct]
    return torch.cat(rows)[torch.searchsorted(torch.tensor(distinct), tokens)] * config.embedding_scale


def load_block(checkpoint: Checkpoint, config: ModelConfig, index: int) -> Block:
    """Load one layer, with float32 weights that need no gradient."""
    with torch.device("meta"):
        block = Block(config.d_model, config.layers[index], index)
    prefix = f"layers.{index}."
    names = [name for name in parameter_shapes(config) if name.startswith(prefix)]
    values = {name.removeprefix(prefix): tensor(checkpoint.parameters.read(name)).float() for name in names}
    block.load_state_dict(values, assign=True)
    return block.eval().requires_grad_(requires_grad=False)


def through(
    block: Block, index: int, h: Tensor, context: PackedContext, rotations: Rotations, see: See
) -> tuple[Tensor, Routed | None]:
    """h (N, D) after the layer, and what its experts did; ``see`` is shown every matrix, in the order of its use."""
    prefix = f"layers.{index}."
    if block.mixes:
        h = block.added(h, _mixed(block, prefix, block.attn_norm(h), context, rotations, see), block.attn_post_norm)
    x, routed = block.ffn_norm(h), None
    if block.ffn is not None:
        f = _dense(block.ffn, prefix + "ffn.", x, see)
    elif block.moe is not None:
        f, routed = _experts(block.moe, prefix + "moe.", x, h, see)
    else:
        return h, None
    return block.scaled(block.added(h, f, block.ffn_post_norm)), routed


def _mixed(block: Block, prefix: str, x: Tensor, context: PackedContext, rotations: Rotations, see: See) -> Tensor:
    mixer = next(name for name in ("attn", "conv", "delta", "mamba") if getattr(block, name) is not None)

    def watch(name: str, module: Linear) -> torch.utils.hooks.RemovableHandle:
        def seen(_: Linear, inputs: tuple[Tensor], output: Tensor) -> None:
            see(Met(f"{prefix}{mixer}.{name}.weight", whole(module.weight), inputs[0].flatten(0, -2), output))

        return module.register_forward_hook(seen)

    children = block.get_submodule(mixer).named_children()
    hooks = [watch(name, module) for name, module in children if isinstance(module, Linear)]
    try:
        return block.mixed(x, context, rotations)
    finally:
        for hook in hooks:
            hook.remove()


def _dense(ffn: FeedForward, prefix: str, x: Tensor, see: See) -> Tensor:
    """A network that every token visits."""

    def times(name: str, weight: Weight, inputs: Tensor) -> Tensor:
        output = linear(inputs, weight)
        see(Met(prefix + name, whole(weight), inputs, output))
        return output

    if ffn.w_gate is None:
        hidden = ops.activate(times("w_up", ffn.w_up, x), ffn.activation)
    else:
        hidden = ops.gated(times("w_gate", ffn.w_gate, x), times("w_up", ffn.w_up, x), ffn.activation)
    return times("w_down", ffn.w_down, hidden)


def _experts(moe: MoE, prefix: str, x: Tensor, h: Tensor, see: See) -> tuple[Tensor, Routed]:
    spec = moe.spec
    own, judged = moe.reads(x, h)
    ids, weights, _, _ = moe.router(judged)
    combine = moe.aggregation_weights(ids, weights)
    shared = None if moe.shared is None else _dense(moe.shared, prefix + "shared.", x, see)
    names = ("w_gate", "w_up", "w_down") if spec.gated else ("w_up", "w_down")
    stacks = {name: whole(getattr(moe, name)) for name in names}
    biases = {"w_gate": moe.b_gate, "w_up": moe.b_up, "w_down": moe.b_down}
    out, visits, outputs = torch.zeros_like(x), [], []
    for expert in range(spec.n_experts):
        token, slot = (ids == expert).nonzero(as_tuple=True)

        def times(name: str, inputs: Tensor, prior: Tensor | None = None, expert: int = expert) -> Tensor:
            weight, bias = stacks[name][expert], biases[name]
            output = inputs @ weight.T
            see(Met(f"{prefix}{name}/{expert}", weight, inputs, output, prior))
            return output if bias is None else output + bias[expert]

        rows = own[token]
        if spec.gated:
            hidden = ops.gated(times("w_gate", rows, own), times("w_up", rows, own), spec.activation)
        else:
            hidden = ops.activate(times("w_up", rows, own), spec.activation)
        weighted = times("w_down", hidden) * combine[token, slot, None].to(x.dtype)
        visits.append(len(token))
        outputs.append(float(weighted.detach().norm(dim=-1).sum()))
        out = out.index_add(0, token, weighted)
    return moe.joined(out, shared, x), Routed(visits, outputs)
