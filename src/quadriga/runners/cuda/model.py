"""The Transformer on the kernels, over a cache on the device: one pass, from tokens to logits.

h = embed; x = norm(h)
per layer   x = norm(h += mixer(x)); x = norm(h += feed-forward(x))      the last norm is the model's
logits = head(x[rows])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quadriga.kernels.triton.attention_tokens import Meeting
from quadriga.kernels.triton.embedding import embed
from quadriga.kernels.triton.linear import linear
from quadriga.kernels.triton.norm import NormWeights, add_norm, norm
from quadriga.model.cache_layout import CacheLayout
from quadriga.model.config import (
    AttentionSpec,
    DeltaNetSpec,
    LatentAttentionSpec,
    LatentState,
    LayerSpec,
    ModelConfig,
    RecurrentState,
    ShortConvSpec,
)
from quadriga.nn.moe import RouterStats
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
)
from quadriga.runners.cuda.weights import DeviceWeights


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
    """Keys, values and recurrent states of a model, of what is computed in; states are float32."""

    def __init__(
        self,
        config: ModelConfig,
        cache: CacheLayout,
        n_blocks: int,
        n_slots: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout, self.n_blocks = cache, n_blocks
        self.keys: list[Tensor] = []
        self.values: list[Tensor | None] = []
        """None: the keys' first numbers, of latent attention; of a recurrent layer both are empty."""
        for layers in cache.slot_layers:
            mixer = config.layers[layers[0]].mixer
            assert len({config.layers[i].mixer.state for i in layers}) == 1, "layers that share a place are alike"
            heads = (mixer.n_kv_heads, mixer.head_dim) if isinstance(mixer, AttentionSpec) else (0, 0)
            keys = torch.zeros((n_blocks * BLOCK_TOKENS, *heads), dtype=dtype, device=device)
            self.keys.append(keys)
            self.values.append(None if isinstance(mixer.state, LatentState) else torch.zeros_like(keys))
        self.states: dict[int, list[Tensor]] = {}
        for i, layer in enumerate(config.layers):
            if isinstance(kept := layer.mixer.state, RecurrentState):
                shapes = [(n_slots, *shape) for shape in kept.shapes]
                self.states[i] = [torch.zeros(s, dtype=torch.float32, device=device) for s in shapes]

    @property
    def blocks(self) -> list[Tensor]:
        """Everything that lies in blocks."""
        return [*self.keys, *(values for values in self.values if values is not None)]


class DeviceModel:
    """A model's layers as launches.

    Args:
        most_tokens: single tokens of a pass at most.

    Raises:
        ConfigError: something that no kernel computes.
    """

    def __init__(self, config: ModelConfig, weights: DeviceWeights, cache: DeviceCache, most_tokens: int) -> None:
        require_kernels(config)
        self.config, self._weights = config, weights
        layers = [(layer, weights.below(f"layers.{i}.")) for i, layer in enumerate(config.layers)]
        attends = [
            attend_of(layer.mixer, own, config.max_seq_len)
            for layer, own in layers
            if isinstance(layer.mixer, AttentionSpec)
        ]
        self.tile_tokens = sorted({attend.tile_tokens for attend in attends})
        self._meeting = Meeting(attends, most_tokens, weights.device)
        self._rotations = Rotations(config.max_seq_len, weights.device)
        self._layers = [self._layer(i, layer, own, cache) for i, (layer, own) in enumerate(layers)]
        table = weights.matrix("embed.weight")
        assert not isinstance(table, tuple), "a table is of one format"
        self._table = table
        self._head = table if config.tied_embeddings else weights.matrix("lm_head.weight")
        self._head_bias = weights.numbers_or_none("lm_head.bias")
        self._final_norm = weights.norm("final_norm", config.final_norm)

    @torch.inference_mode()
    def compute(self, told: DevicePass) -> Computed:
        """One pass; keys, values and states are stored."""
        h = embed(told.tokens, self._table, self.config.embedding_scale, dtype=self._weights.dtype)
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

    def _layer(self, i: int, layer: LayerSpec, weights: DeviceWeights, cache: DeviceCache) -> _Layer:
        def norm_of(name: str, there: bool) -> NormWeights | None:
            return weights.norm(name, layer.norm) if there else None

        return _Layer(
            mixer=self._mixer(i, layer, weights, cache),
            feed_forward=feed_forward(layer, weights),
            scale=layer.residual_scale,
            attn_norm=norm_of("attn_norm", layer.pre_norms),
            ffn_norm=norm_of("ffn_norm", layer.pre_norms),
            attn_post_norm=norm_of("attn_post_norm", layer.post_norms),
            ffn_post_norm=norm_of("ffn_post_norm", layer.post_norms),
        )

    def _mixer(self, i: int, layer: LayerSpec, weights: DeviceWeights, cache: DeviceCache) -> Mixer:
        match layer.mixer:
            case ShortConvSpec() as conv:
                return SlottedConv(conv, weights, *cache.states[i])
            case DeltaNetSpec() as delta:
                return SlottedDeltaNet(delta, weights, *cache.states[i])
        slot, group, length = cache.layout.slots[i], cache.layout.groups[i], self.config.max_seq_len
        keys, values = cache.keys[slot], cache.values[slot]
        if isinstance(layer.mixer, LatentAttentionSpec):
            return PagedLatentAttention(layer.mixer, weights, length, keys, group, self._meeting, self._rotations)
        assert isinstance(layer.mixer, AttentionSpec) and values is not None, "require_kernels has refused others"
        return PagedAttention(layer.mixer, weights, length, keys, values, group, self._meeting, self._rotations)


def _first(h: Tensor, weights: NormWeights | None) -> Tensor:
    return h if weights is None else norm(h, weights)
