"""The Transformer on the kernels, over a cache on the device: one pass, from tokens to logits.

h = embed; x = norm(h)
per layer   x = norm(h += mixer(x)); x = norm(h += feed-forward(x))      the last norm is the model's
logits = head(x[rows])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quadriga.errors import ConfigError
from quadriga.kernels.triton.attention_tokens import Meeting
from quadriga.kernels.triton.embedding import embed
from quadriga.kernels.triton.linear import linear
from quadriga.kernels.triton.norm import NormWeights, add_norm, norm
from quadriga.model.cache_layout import CacheLayout
from quadriga.model.config import AttentionSpec, LatentState, RecurrentState
from quadriga.nn.attention import Attention
from quadriga.nn.latent_attention import LatentAttention
from quadriga.nn.moe import RouterStats
from quadriga.nn.norm import Norm
from quadriga.nn.transformer import Block, Transformer
from quadriga.quant.packed import BLOCK_TOKENS
from quadriga.runners.cuda.feed_forward import FeedForward, feed_forward
from quadriga.runners.cuda.inputs import DevicePass
from quadriga.runners.cuda.missing import require_kernels
from quadriga.runners.cuda.mixers import (
    Mixer,
    PagedAttention,
    PagedLatentAttention,
    Rotations,
    SlottedConv,
    SlottedDeltaNet,
    attend_of,
    norm_weights,
    plain,
)


@dataclass(frozen=True)
class Computed:
    """What a pass gives, on the device."""

    logits: Tensor
    """(R, V) float32"""
    hidden: Tensor
    """(N, D), after the final norm."""
    routing: list[RouterStats]
    """Per MoE layer."""


@dataclass(frozen=True, kw_only=True)
class _Layer:
    mixer: Mixer
    feed_forward: FeedForward
    scale: float
    attn_norm: NormWeights | None
    ffn_norm: NormWeights | None
    attn_post_norm: NormWeights | None
    ffn_post_norm: NormWeights | None


class DeviceCache:
    """Keys, values and recurrent states of a model, of the dtype and on the device of its weights."""

    def __init__(self, model: Transformer, cache: CacheLayout, n_blocks: int, n_slots: int) -> None:
        config, weight = model.config, plain(model.embed)
        self.layout, self.n_blocks = cache, n_blocks
        self.keys: list[Tensor] = []
        self.values: list[Tensor | None] = []
        """None: the keys' first numbers, of latent attention; of a recurrent layer both are empty."""
        for layers in cache.slot_layers:
            mixer = config.layers[layers[0]].mixer
            assert len({config.layers[i].mixer.state for i in layers}) == 1, "layers that share a place are alike"
            heads = (mixer.n_kv_heads, mixer.head_dim) if isinstance(mixer, AttentionSpec) else (0, 0)
            keys = torch.zeros((n_blocks * BLOCK_TOKENS, *heads), dtype=weight.dtype, device=weight.device)
            self.keys.append(keys)
            self.values.append(None if isinstance(mixer.state, LatentState) else torch.zeros_like(keys))
        self.states: dict[int, list[Tensor]] = {}
        for i, layer in enumerate(config.layers):
            if isinstance(kept := layer.mixer.state, RecurrentState):
                shapes = [(n_slots, *shape) for shape in kept.shapes]
                self.states[i] = [torch.zeros(s, dtype=torch.float32, device=weight.device) for s in shapes]

    @property
    def blocks(self) -> list[Tensor]:
        """Everything that lies in blocks."""
        return [*self.keys, *(values for values in self.values if values is not None)]


class DeviceModel:
    """A Transformer's layers as launches.

    Args:
        most_tokens: single tokens of a pass at most.

    Raises:
        ConfigError: something that no kernel computes.
    """

    def __init__(self, model: Transformer, cache: DeviceCache, most_tokens: int) -> None:
        self.config, weight = model.config, plain(model.embed)
        require_kernels(self.config)
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(f"the kernels for GPUs compute in float32, bfloat16 or float16; got {weight.dtype}")
        blocks = [block for block in model.layers if isinstance(block, Block)]
        attentions = [b.attn for b in blocks if isinstance(b.attn, (Attention, LatentAttention))]
        attends = [attend_of(a, self.config.max_seq_len) for a in attentions]
        self.tile_tokens = sorted({attend.tile_tokens for attend in attends})
        self._meeting = Meeting(attends, most_tokens, weight.device)
        self._rotations = Rotations(self.config.max_seq_len, weight.device)
        self._layers = [self._layer(i, block, cache) for i, block in enumerate(blocks)]
        self._table = weight
        head = model.embed if model.lm_head is None else model.lm_head
        self._head, self._head_bias = plain(head), None if head.bias is None else head.bias.detach()
        self._final_norm = norm_weights(model.final_norm)

    @torch.inference_mode()
    def compute(self, told: DevicePass) -> Computed:
        """One pass; keys, values and states are stored."""
        h = embed(told.tokens, self._table, self.config.embedding_scale)
        x = _first(h, self._layers[0].attn_norm)
        routing = []
        nexts = [layer.attn_norm for layer in self._layers[1:]] + [self._final_norm]
        for layer, following in zip(self._layers, nexts, strict=True):
            mixed = layer.mixer(x, told)
            x = add_norm(h, mixed, scale=layer.scale, post=layer.attn_post_norm, then=layer.ffn_norm)
            made, stats = layer.feed_forward(x)
            if stats is not None:
                routing.append(stats)
            x = add_norm(h, made, scale=layer.scale, post=layer.ffn_post_norm, then=following)
        logits = linear(
            x, self._head, self._head_bias, rows=told.rows, scale=self.config.logit_scale, dtype=torch.float32
        )
        return Computed(logits, x, routing)

    def _layer(self, i: int, block: Block, cache: DeviceCache) -> _Layer:
        return _Layer(
            mixer=self._mixer(i, block, cache),
            feed_forward=feed_forward(block),
            scale=block.residual_scale,
            attn_norm=_norm_or_none(block.attn_norm),
            ffn_norm=_norm_or_none(block.ffn_norm),
            attn_post_norm=_norm_or_none(block.attn_post_norm),
            ffn_post_norm=_norm_or_none(block.ffn_post_norm),
        )

    def _mixer(self, i: int, block: Block, cache: DeviceCache) -> Mixer:
        if block.conv is not None:
            return SlottedConv(block.conv, *cache.states[i])
        if block.delta is not None:
            return SlottedDeltaNet(block.delta, *cache.states[i])
        slot, group, length = cache.layout.slots[i], cache.layout.groups[i], self.config.max_seq_len
        keys, values = cache.keys[slot], cache.values[slot]
        if isinstance(block.attn, LatentAttention):
            return PagedLatentAttention(block.attn, length, keys, group, self._meeting, self._rotations)
        assert block.attn is not None and values is not None, "a block has one mixer"
        return PagedAttention(block.attn, length, keys, values, group, self._meeting, self._rotations)


def _norm_or_none(module: object) -> NormWeights | None:
    return norm_weights(module) if isinstance(module, Norm) else None


def _first(h: Tensor, weights: NormWeights | None) -> Tensor:
    return h if weights is None else norm(h, weights)
