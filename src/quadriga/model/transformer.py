"""The one Transformer every family runs on: embed, blocks, norm, head, over N packed tokens.

    block:  h = h + [post_norm] attention(norm(h))
            h = h + [post_norm] ffn(norm(h))          ffn is one network or a mixture of experts

The post norms exist only where the config asks for them (Grok-1's sandwich). Nothing here knows sequences, caches or
sampling: those live behind the ForwardContext. Parameter names and shapes are those of ``model.weight_map``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quadriga.model.attention import Attention
from quadriga.model.config import AlibiSpec, DenseSpec, ModelConfig, MoESpec, RopeSpec
from quadriga.model.context import ForwardContext, Scoring
from quadriga.model.feedforward import FeedForward
from quadriga.model.layers import Matrix, Norm, alibi_slopes, rotary_tables
from quadriga.model.moe import MoE, RouterStats
from quadriga.model.weight_map import parameter_shapes


class ModelOutput(NamedTuple):
    """Logits of the asked-for rows, and the routing of every layer if it was asked for."""

    logits: Tensor
    """(R, V) float32 (float64 for a float64 model)."""
    router_stats: list[RouterStats]
    """One per layer, over all N tokens; empty for dense models and where not asked for."""


class Block(nn.Module):
    """One layer: attention and feed-forward, each normed before and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        d = config.d_model
        self.attn_norm = Norm(d, config.norm)
        self.attn = Attention(config, layer)
        self.ffn_norm = Norm(d, config.norm)
        self.attn_post_norm = Norm(d, config.norm) if config.post_norms else None
        self.ffn_post_norm = Norm(d, config.norm) if config.post_norms else None
        self.ffn = FeedForward(d, config.ffn) if isinstance(config.ffn, DenseSpec) else None
        self.moe = MoE(d, config.ffn) if isinstance(config.ffn, MoESpec) else None

    def forward(
        self, h: Tensor, context: ForwardContext, rotary: tuple[Tensor, Tensor] | None, scoring: Scoring
    ) -> tuple[Tensor, RouterStats | None]:
        """h (N, D) -> (h (N, D), this layer's routing or None)."""
        a = self.attn(self.attn_norm(h), context, rotary, scoring)
        h = h + (a if self.attn_post_norm is None else self.attn_post_norm(a))
        m = self.ffn_norm(h)
        stats = None
        if self.moe is not None:
            f, stats = self.moe(m)
        else:
            assert self.ffn is not None, "a block has one feed-forward or experts"
            f = self.ffn(m)
        h = h + (f if self.ffn_post_norm is None else self.ffn_post_norm(f))
        return h, stats


class Transformer(nn.Module):
    """A decoder-only language model built from a ModelConfig.

    Parameters are uninitialised: fill them with ``load_state_dict(..., assign=True)`` from a checkpoint or with
    :func:`random_parameters`. Build under ``torch.device("meta")`` to allocate nothing.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Matrix(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.final_norm = Norm(config.d_model, config.norm)
        self.lm_head = None if config.tied_embeddings else Matrix(config.vocab_size, config.d_model)
        self._scoring: Scoring | None = None

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
        h = self.embed.look_up(tokens)
        if self.config.embedding_scale != 1.0:
            h = h * self.config.embedding_scale
        rotary = None
        if isinstance(self.config.position, RopeSpec):
            rotary = rotary_tables(context.positions, self.config.position, self.config.attn.head_dim, h.dtype)
        scoring = self._scoring_on(h.device)
        stats: list[RouterStats] = []
        for layer in self.layers:
            h, layer_stats = layer(h, context, rotary, scoring)
            if layer_stats is not None:
                stats.append(layer_stats)
        return h, stats

    def head(self, hidden: Tensor) -> Tensor:
        """(R, D) before the last norm -> logits (R, V), float32 (float64 for a float64 model)."""
        head = self.embed if self.lm_head is None else self.lm_head
        logits: Tensor = head(self.final_norm(hidden))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if self.config.logit_scale == 1.0 else logits * self.config.logit_scale

    def _scoring_on(self, device: torch.device) -> Scoring:
        if self._scoring is None:
            self._scoring = self.scoring_of(self.config, device)
        return self._scoring

    @staticmethod
    def scoring_of(config: ModelConfig, device: torch.device | str = "cpu") -> Scoring:
        """How a model of this configuration turns q·k into scores."""
        slopes = None
        if isinstance(config.position, AlibiSpec):
            slopes = alibi_slopes(config.position, config.attn.n_heads).to(device)
        return Scoring(config.attn.score_scale, config.attn.soft_cap, slopes)


def random_parameters(
    config: ModelConfig, *, seed: int = 0, std: float = 0.02, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Parameters for a model that was never trained: N(0, std), norms 1, fuse 0. For tests and benchmarks."""
    generator = torch.Generator().manual_seed(seed)

    def fill(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype)
        if name.endswith("fuse.weight"):
            return torch.zeros(shape, dtype=dtype)
        return torch.empty(shape, dtype=dtype).normal_(0.0, std, generator=generator)

    return {name: fill(name, shape) for name, shape in parameter_shapes(config).items()}
