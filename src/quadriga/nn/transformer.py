"""The one Transformer every family runs on: embed, blocks, norm, head, over N packed tokens.

    block:  h = h + scale * [post_norm] mixer([norm] h)       attention, or a recurrent layer
            h = h + scale * [post_norm] ffn([norm] h)         ffn is one network or a mixture of experts
                                                              (a layer may be one of the two lines alone)

The post norms exist only where the config asks for them (Grok-1's sandwich). Nothing here knows sequences, caches or
sampling: those live behind the ForwardContext. Parameter names and shapes are those of ``model.weight_map``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quadriga.model.config import (
    AttentionSpec,
    DeltaNetSpec,
    DenseSpec,
    LatentAttentionSpec,
    LayerSpec,
    Mamba2Spec,
    ModelConfig,
    MoESpec,
    NoMixer,
    ShortConvSpec,
)
from quadriga.model.weight_map import parameter_shapes
from quadriga.nn.attention import Attention
from quadriga.nn.context import ForwardContext
from quadriga.nn.delta_net import DeltaNet
from quadriga.nn.feedforward import FeedForward
from quadriga.nn.latent_attention import LatentAttention
from quadriga.nn.linear import Linear
from quadriga.nn.mamba import Mamba2
from quadriga.nn.moe import MoE, RouterStats
from quadriga.nn.norm import Norm
from quadriga.nn.rope import Rotations
from quadriga.nn.short_conv import ShortConv


class ModelOutput(NamedTuple):
    """Logits of the asked-for rows, and the routing of every layer if it was asked for."""

    logits: Tensor
    """(R, V) float32 (float64 for a float64 model)."""
    router_stats: list[RouterStats]
    """One per layer with experts, over all N tokens; empty for dense models and where not asked for."""


class Block(nn.Module):
    """One layer: mixer and feed-forward, each normed before, behind, or both, and added to the residual stream."""

    def __init__(self, d_model: int, spec: LayerSpec, layer: int) -> None:
        super().__init__()
        d = d_model
        self.residual_scale, self.mixes = spec.residual_scale, spec.mixes
        self.attn_norm = Norm(d, spec.norm) if spec.pre_norms and spec.mixes else nn.Identity()
        # One of them at most, under the name that its parameters have.
        self.attn: Attention | LatentAttention | None = None
        self.conv: ShortConv | None = None
        self.delta: DeltaNet | None = None
        self.mamba: Mamba2 | None = None
        match spec.mixer:
            case LatentAttentionSpec() as latent:
                self.attn = LatentAttention(d, latent, layer)
            case AttentionSpec() as attention:
                self.attn = Attention(d, attention, layer)
            case ShortConvSpec() as conv:
                self.conv = ShortConv(d, conv, layer)
            case DeltaNetSpec() as delta:
                self.delta = DeltaNet(d, delta, layer)
            case Mamba2Spec() as mamba:
                self.mamba = Mamba2(d, mamba, layer)
            case NoMixer():
                pass
        self.ffn_norm = Norm(d, spec.norm) if spec.pre_norms and spec.feeds else nn.Identity()
        self.attn_post_norm = Norm(d, spec.norm) if spec.post_norms and spec.mixes else None
        self.ffn_post_norm = Norm(d, spec.norm) if spec.post_norms and spec.feeds else None
        self.ffn = FeedForward(d, spec.ffn) if isinstance(spec.ffn, DenseSpec) else None
        self.moe = MoE(d, spec.ffn, spec.norm) if isinstance(spec.ffn, MoESpec) else None
        self.scale: Tensor | None
        self.register_buffer("scale", torch.empty(1) if spec.scaled else None)

    def forward(self, h: Tensor, context: ForwardContext, rotations: Rotations) -> tuple[Tensor, RouterStats | None]:
        """h (N, D) -> (h (N, D), this layer's routing or None)."""
        if self.mixes:
            h = self.added(h, self.mixed(self.attn_norm(h), context, rotations), self.attn_post_norm)
        m = self.ffn_norm(h)
        stats = None
        if self.moe is not None:
            f, stats = self.moe(m, h)
        elif self.ffn is not None:
            f = self.ffn(m)
        else:
            return h, None
        return self.scaled(self.added(h, f, self.ffn_post_norm)), stats

    def mixed(self, x: Tensor, context: ForwardContext, rotations: Rotations) -> Tensor:
        """What the mixer makes of the normed states: x (N, D) -> (N, D)."""
        if self.attn is not None:
            attended: Tensor = self.attn(x, context, rotations)
            return attended
        (recurrent,) = (mixer for mixer in (self.conv, self.delta, self.mamba) if mixer is not None)
        made: Tensor = recurrent(x, context)
        return made

    def added(self, h: Tensor, branch: Tensor, post_norm: Norm | None) -> Tensor:
        """The residual stream with what a branch made."""
        if post_norm is not None:
            branch = post_norm(branch)
        return h + (branch if self.residual_scale == 1 else branch * self.residual_scale)

    def scaled(self, h: Tensor) -> Tensor:
        """The residual stream as the layer leaves it."""
        return h if self.scale is None else h * self.scale


class Transformer(nn.Module):
    """A decoder-only language model built from a ModelConfig.

    Parameters are uninitialised: fill them with ``load_state_dict(..., assign=True)`` from a checkpoint or with
    :func:`random_parameters`. Build under ``torch.device("meta")`` to allocate nothing.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Linear(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config.d_model, spec, i) for i, spec in enumerate(config.layers))
        self.final_norm = Norm(config.d_model, config.final_norm)
        self.lm_head = None
        if not config.tied_embeddings:
            self.lm_head = Linear(config.vocab_size, config.d_model, bias=config.head_bias)

    @classmethod
    def from_parameters(cls, config: ModelConfig, parameters: Mapping[str, Tensor]) -> Transformer:
        """A model that uses ``parameters`` (named and shaped as ``parameter_shapes(config)``) without copying them."""
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(dict(parameters), assign=True)
        return model

    def forward(
        self, tokens: Tensor, context: ForwardContext, *, rows: Tensor | None = None, with_stats: bool = False
    ) -> ModelOutput:
        """One pass over N packed tokens.

        Args:
            tokens: (N,) int64 ids below vocab_size.
            context: where the tokens stand and what they attend to; a cache inside it is written.
            rows: (R,) int64 indices of the tokens whose logits are wanted; None means all N.
            with_stats: also return each layer's routing.
        """
        hidden, stats = self.hidden(tokens, context)
        return ModelOutput(self.head(hidden if rows is None else hidden[rows]), stats if with_stats else [])

    def hidden(self, tokens: Tensor, context: ForwardContext) -> tuple[Tensor, list[RouterStats]]:
        """tokens (N,) -> (final hidden states before the last norm (N, D), routing of each MoE layer)."""
        return self.through(self.embedded(tokens), context)

    def embedded(self, tokens: Tensor) -> Tensor:
        """tokens (N,) -> (N, D), what the first layer is given."""
        h = self.embed.look_up(tokens)
        return h if self.config.embedding_scale == 1.0 else h * self.config.embedding_scale

    def through(self, h: Tensor, context: ForwardContext) -> tuple[Tensor, list[RouterStats]]:
        """h (N, D) through the layers that are here: all, or a pipeline's stage of them; as :meth:`hidden` returns."""
        rotations = Rotations(context.positions, h.dtype, self.config.max_seq_len)
        stats: list[RouterStats] = []
        for layer in self.layers:
            if not isinstance(layer, Block):
                continue
            h, layer_stats = layer(h, context, rotations)
            if layer_stats is not None:
                stats.append(layer_stats)
        return h, stats

    def head(self, hidden: Tensor) -> Tensor:
        """(R, D) before the last norm -> logits (R, V), float32 (float64 for a float64 model)."""
        head = self.embed if self.lm_head is None else self.lm_head
        logits: Tensor = head(self.final_norm(hidden))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits if self.config.logit_scale == 1.0 else logits * self.config.logit_scale
        cap = self.config.logit_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def random_parameters(
    config: ModelConfig, *, seed: int = 0, std: float = 0.02, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Parameters for a model that was never trained: N(0, std), norms' weights 1, fuse 0. For tests and benchmarks."""
    generator = torch.Generator().manual_seed(seed)

    def fill(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype)
        if name.endswith("fuse.weight"):
            return torch.zeros(shape, dtype=dtype)
        return torch.empty(shape, dtype=dtype).normal_(0.0, std, generator=generator)

    return {name: fill(name, shape) for name, shape in parameter_shapes(config).items()}
