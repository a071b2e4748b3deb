"""What a model is: a small tree of frozen specs, checked once when it is built.

    ModelConfig
    ├── layers      tuple of LayerSpec, one per layer; equal layers share one object (``uniform``)
    │   ├── mixer   AttentionSpec          heads, biases, clipping, soft cap, scale, window, sinks, gate
    │   │                                  or LatentAttentionSpec: heads over one latent a token (DeepSeek)
    │   │   ├── position   RopeSpec | AlibiSpec | None    how a token knows where it stands
    │   │   │   └── scaling    LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | FactorScaling |
    │   │   │                  ProportionalScaling | None
    │   │   └── qk_norm    QKNormSpec | None              norms of q and k
    │   │       | ShortConvSpec        a convolution over the last few positions, gated twice
    │   │       | DeltaNetSpec         a matrix a head, changed by the gated delta rule
    │   │       | Mamba2Spec           a matrix a head, which decays and is written to (Mamba-2)
    │   │       | NoMixer              nothing: the layer is its feed-forward alone (Nemotron-H)
    │   ├── ffn     DenseSpec | MoESpec    one feed-forward network, or a router over many
    │   │   │       | NoFeedForward        nothing: the layer is its mixer alone (Nemotron-H)
    │   │   └── shared     DenseSpec | None    of a mixture: the network that every token visits besides
    │   └── norm    NormSpec               LayerNorm or RMSNorm, and its epsilon
    └── final_norm  NormSpec

Alternatives are types, not flags, so a wrong combination cannot be written down. A **mixer owns its state**: what it
keeps of a sequence between passes is its ``state`` (``KVState``, paged keys and values; ``LatentState``, one paged
latent in place of both; ``RecurrentState``, a few arrays whatever its length), and whoever counts bytes or allocates a
cache asks the mixers of the layers, never the model. Nothing here imports torch: ``quadriga info`` and the planner work
from these specs by arithmetic alone. Families (``model/families``) turn a checkpoint's own configuration into a
ModelConfig; nothing else looks at ``family``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from quadriga.errors import ConfigError
from quadriga.model.ffn_specs import Activation, Aggregate, DenseSpec, FeedForwardSpec, MoESpec, NoFeedForward
from quadriga.model.mixer_specs import (
    AttentionSpec,
    DeltaNetSpec,
    KVState,
    LatentAttentionSpec,
    LatentState,
    Mamba2Spec,
    Mixer,
    NoMixer,
    NormSpec,
    NoState,
    QKNormSpec,
    RecurrentMixer,
    RecurrentState,
    ShortConvSpec,
)
from quadriga.model.position_specs import (
    AlibiSpec,
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)
from quadriga.model.spec_checks import require, require_number, require_positive

__all__ = [
    "MAX_LAYERS",
    "Activation",
    "Aggregate",
    "AlibiSpec",
    "AttentionSpec",
    "DeltaNetSpec",
    "DenseSpec",
    "FactorScaling",
    "FeedForwardSpec",
    "KVState",
    "LatentAttentionSpec",
    "LatentState",
    "LayerSpec",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "Mamba2Spec",
    "Mixer",
    "MoESpec",
    "ModelConfig",
    "NoFeedForward",
    "NoMixer",
    "NoState",
    "NormSpec",
    "ProportionalScaling",
    "QKNormSpec",
    "RecurrentMixer",
    "RecurrentState",
    "RopeScaling",
    "RopeSpec",
    "ShortConvSpec",
    "YarnScaling",
    "countable",
    "in_order",
    "uniform",
    "uniform_model",
]
"""The specs of a model, wherever they are written."""


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer: h + r mixer(norm(h)), then h + r ffn(norm(h)), r the residual scale; or r norm(mixer(h)), or both.

    One of the two may be none (``NoMixer``, ``NoFeedForward``), and then its norms are none either.
    """

    norm: NormSpec
    """Of all norms of the layer, each with weights of its own."""
    mixer: Mixer
    ffn: FeedForwardSpec
    post_norms: bool = False
    """True adds a norm after the mixer and after the feed-forward, inside the residual branch (Grok-1's sandwich)."""
    pre_norms: bool = True
    """False: mixer and feed-forward read the residual stream as it is (OLMo 2, with post_norms)."""
    residual_scale: float = 1.0
    """What both branches are multiplied by before they are added (Granite: 0.22)."""
    scaled: bool = False
    """The residual stream is multiplied by a number of the layer's own at its end, ``scale`` (Gemma 4)."""

    def __post_init__(self) -> None:
        require_number("layer", residual_scale=self.residual_scale)
        apart = self.moe is not None and self.moe.apart
        require(
            not apart or (self.pre_norms and self.norm.kind == "rms"), "experts apart need RMSNorms before branches"
        )
        require(self.mixes or self.feeds, "a layer must have a mixer, a feed-forward, or both")
        require(self.feeds or not self.scaled, "the residual stream is scaled behind a feed-forward, which is missing")
        require(self.pre_norms or self.post_norms, "a layer needs norms before its branches, behind them, or both")

    @property
    def mixes(self) -> bool:
        """True if the layer has a mixer, and the norms around it."""
        return not isinstance(self.mixer, NoMixer)

    @property
    def feeds(self) -> bool:
        """True if the layer has a feed-forward, and the norms around it."""
        return not isinstance(self.ffn, NoFeedForward)

    @property
    def moe(self) -> MoESpec | None:
        """The mixture of experts, where the layer has one."""
        return self.ffn if isinstance(self.ffn, MoESpec) else None

    @property
    def network(self) -> DenseSpec | MoESpec:
        """The layer's feed-forward.

        Raises:
            ConfigError: it has none.
        """
        if isinstance(self.ffn, NoFeedForward):
            raise ConfigError("this needs a layer with a feed-forward; it has none")
        return self.ffn

    @property
    def attention(self) -> AttentionSpec:
        """The layer's attention.

        Raises:
            ConfigError: its mixer is another.
        """
        if not isinstance(self.mixer, AttentionSpec):
            raise ConfigError(f"this needs a layer of attention; its mixer is a {type(self.mixer).__name__}")
        return self.mixer


def uniform(layer: LayerSpec, n_layers: int) -> tuple[LayerSpec, ...]:
    """``n_layers`` layers of one kind.

    Raises:
        ConfigError: a number of layers that no model has.
    """
    require_positive("model", n_layers=n_layers)
    # One config must not make a command allocate for minutes: real models have tens to hundreds of layers.
    require(n_layers <= MAX_LAYERS, f"n_layers must be at most {MAX_LAYERS}, got {n_layers}")
    return (layer,) * n_layers


def in_order(layers: Iterable[LayerSpec]) -> tuple[LayerSpec, ...]:
    """Layers that may differ, from the first to the last; equal ones become one object."""
    seen: dict[LayerSpec, LayerSpec] = {}
    return tuple(seen.setdefault(layer, layer) for layer in layers)


MAX_LAYERS = 10_000


def countable(n_layers: int) -> int:
    """``n_layers``, bounded so that a list may be made of it; ``ModelConfig`` refuses what is out of bounds."""
    return max(0, min(n_layers, MAX_LAYERS + 1))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer: embed, layers of mixer and feed-forward, norm, head.

    Sizes use the field's letters: D = d_model, V = vocab_size; of a layer H = mixer.n_heads, K = mixer.n_kv_heads,
    F = ffn.d_ff, E = ffn.n_experts, k = ffn.top_k.
    """

    family: str
    """Which row of ``model.families.FAMILIES`` can write this model back; nothing computes with it."""
    vocab_size: int
    d_model: int
    max_seq_len: int
    layers: tuple[LayerSpec, ...]
    """From the first to the last; see :func:`uniform`."""
    final_norm: NormSpec
    tied_embeddings: bool = False
    """True: the head is the embedding table and there is no ``lm_head`` parameter."""
    head_bias: bool = False
    """A bias on the head, ``lm_head.bias``, added before the logits are scaled (Phi-MoE)."""
    embedding_scale: float = 1.0
    """Embeddings are multiplied by this after the look-up (Grok-1: sqrt(d_model))."""
    logit_scale: float = 1.0
    """Logits are multiplied by this (Grok-1: 1/sqrt(3))."""
    logit_cap: float | None = None
    """Logits become logit_cap * tanh(logits / logit_cap) at last (Gemma: 30)."""
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    """Ids that end a generation; DBRX-instruct has two, <|endoftext|> and <|im_end|>."""
    pad_id: int | None = None

    def __post_init__(self) -> None:
        require_positive(
            "model",
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            n_layers=self.n_layers,
            max_seq_len=self.max_seq_len,
        )
        require(self.n_layers <= MAX_LAYERS, f"n_layers must be at most {MAX_LAYERS}, got {self.n_layers}")
        require_number("model", embedding_scale=self.embedding_scale, logit_scale=self.logit_scale)
        if self.logit_cap is not None:
            require_number("model", logit_cap=self.logit_cap)
        require(not (self.head_bias and self.tied_embeddings), "a head with a bias must be a matrix of its own")

    @property
    def n_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @property
    def is_moe(self) -> bool:
        """True if any layer routes its tokens over experts."""
        return any(layer.moe is not None for layer in self.kinds())

    @property
    def is_recurrent(self) -> bool:
        """True if any layer keeps a state whose size does not depend on the length of the text."""
        return any(isinstance(layer.mixer.state, RecurrentState) for layer in self.kinds())

    def first_attention(self) -> LayerSpec:
        """The first layer of attention.

        Raises:
            ConfigError: there is none.
        """
        for layer in self.kinds():
            if isinstance(layer.mixer, AttentionSpec):
                return layer
        raise ConfigError("a model must have a layer of attention; this one has none")

    @property
    def moe_layers(self) -> tuple[tuple[int, MoESpec], ...]:
        """(index, experts) of every layer that has experts."""
        return tuple((i, layer.ffn) for i, layer in enumerate(self.layers) if isinstance(layer.ffn, MoESpec))

    def __hash__(self) -> int:
        """Of what tells models apart: hashing all layers each time was most of a plan's work."""
        return hash((self.family, self.vocab_size, self.d_model, self.max_seq_len, len(self.layers), self.layers[0]))

    def kinds(self) -> dict[LayerSpec, int]:
        """Each kind of layer, in order of first appearance, and how many layers are of it."""
        return dict(self._kinds)

    @cached_property
    def _kinds(self) -> dict[LayerSpec, int]:
        objects: dict[int, int] = {}  # equal layers share an object: count those first, compare few
        for layer in self.layers:
            objects[id(layer)] = objects.get(id(layer), 0) + 1
        counts: dict[LayerSpec, int] = {}
        for layer in {id(layer): layer for layer in self.layers}.values():
            counts[layer] = counts.get(layer, 0) + objects[id(layer)]
        return counts

    def only_layer(self, why: str) -> LayerSpec:
        """The layer of a model whose layers are all alike.

        Args:
            why: what needs it, as the subject of the error.

        Raises:
            ConfigError: there are several kinds.
        """
        kinds = self.kinds()
        require(len(kinds) == 1, f"{why} needs a model whose layers are all alike; this one has {len(kinds)} kinds")
        return self.layers[0]

    def only_moe(self, why: str) -> MoESpec:
        """The mixture of a model whose layers that have one are all alike in it.

        Raises:
            ConfigError: no layer has experts, or they differ.
        """
        kinds = dict.fromkeys(spec for _, spec in self.moe_layers)
        require(bool(kinds), f"{why} needs a mixture of experts; this model is dense")
        require(len(kinds) == 1, f"{why} needs one kind of mixture; this model has {len(kinds)}")
        return next(iter(kinds))

    def with_layers(self, change: Callable[[LayerSpec], LayerSpec]) -> ModelConfig:
        """This model with every layer changed; equal layers stay one object."""
        changed = {layer: change(layer) for layer in self.kinds()}
        return replace(self, layers=tuple(changed[layer] for layer in self.layers))

    def with_mixer(self, **fields: Any) -> ModelConfig:
        """This model with fields of every attention changed; layers with another mixer stay."""
        return self.with_layers(
            lambda layer: (
                replace(layer, mixer=replace(layer.mixer, **fields))
                if isinstance(layer.mixer, AttentionSpec)
                else layer
            )
        )

    def with_ffn(self, **fields: Any) -> ModelConfig:
        """This model with fields of every feed-forward changed; layers without one stay."""
        return self.with_layers(
            lambda layer: replace(layer, ffn=replace(layer.ffn, **fields)) if layer.feeds else layer
        )

    def with_n_layers(self, n_layers: int) -> ModelConfig:
        """The same kind of model with another number of layers.

        Raises:
            ConfigError: its layers differ, so it is not clear which ones to take.
        """
        return replace(self, layers=uniform(self.only_layer("a change of depth"), n_layers))


def uniform_model(
    *,
    n_layers: int,
    norm: NormSpec,
    mixer: Mixer,
    ffn: FeedForwardSpec,
    post_norms: bool = False,
    pre_norms: bool = True,
    residual_scale: float = 1.0,
    **model: Any,
) -> ModelConfig:
    """A model of one kind of layer, whose last norm is like the layers'.

    Args:
        model: the other fields of :class:`ModelConfig`.
    """
    layer = LayerSpec(
        norm=norm, mixer=mixer, ffn=ffn, post_norms=post_norms, pre_norms=pre_norms, residual_scale=residual_scale
    )
    return ModelConfig(layers=uniform(layer, n_layers), final_norm=norm, **model)
