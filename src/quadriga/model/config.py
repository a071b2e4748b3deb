"""What a model is: a small tree of frozen specs, checked once when it is built.

    ModelConfig
    ├── layers      tuple of LayerSpec, one per layer; equal layers share one object (``uniform``)
    │   ├── mixer   AttentionSpec          heads, clipping, soft cap, scale
    │   │   ├── position   RopeSpec | AlibiSpec | None    how a token knows where it stands
    │   │   └── qk_norm    QKNormSpec | None              norms of q and k
    │   ├── ffn     DenseSpec | MoESpec    one feed-forward network, or a router over many
    │   └── norm    NormSpec               LayerNorm or RMSNorm, and its epsilon
    └── final_norm  NormSpec

Alternatives are types, not flags, so a wrong combination cannot be written down. A **mixer owns its state**: what it
keeps of a sequence between passes is its ``state`` (today ``KVState``, paged keys and values), and whoever counts bytes
or allocates a cache asks the mixers of the layers, never the model. Nothing here imports torch: ``quadriga info`` and
the planner work from these specs by arithmetic alone. Families (``model/families``) turn a checkpoint's own
configuration into a ModelConfig; nothing else in the project looks at ``family``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from quadriga.errors import ConfigError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
"""The non-linearity of a feed-forward network. ``gelu`` is the exact erf form, ``gelu_tanh`` jax's and GPT-2's."""

Aggregate = Literal["weighted_sum", "vote", "fuse"]
"""How the chosen experts' outputs become one vector; see ``nn.moe``."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_positive(where: str, **sizes: int) -> None:
    for name, size in sizes.items():
        is_int = isinstance(size, int) and not isinstance(size, bool)
        # 2^31 bounds every product below well inside what Python, torch and a file offset can hold.
        _require(is_int and 0 < size < 2**31, f"{where}.{name} must be a positive whole number, got {size!r}")


def _require_number(where: str, *, above: float = 0.0, **values: float) -> None:
    for name, value in values.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        _require(is_number and value > above, f"{where}.{name} must be a finite number above {above:g}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """A normalisation with a learned weight and no bias.

    ``layer``: (x - mean) / sqrt(var + eps) * weight.  ``rms``: x / sqrt(mean(x^2) + eps) * weight.
    """

    kind: Literal["layer", "rms"]
    eps: float = 1e-5

    def __post_init__(self) -> None:
        _require(self.kind in ("layer", "rms"), f"norm.kind must be 'layer' or 'rms', got {self.kind!r}")
        _require_number("norm", eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary positions in the half-rotation (NeoX) form over the whole head: angle = position * theta^(-2j/d)."""

    theta: float

    def __post_init__(self) -> None:
        _require_number("rope", theta=self.theta)


@dataclass(frozen=True, kw_only=True)
class AlibiSpec:
    """A linear bias slope_h * (key_position - query_position) on the attention scores (Press et al. 2022)."""

    max_bias: float = 8.0

    def __post_init__(self) -> None:
        _require_number("alibi", max_bias=self.max_bias)


@dataclass(frozen=True, kw_only=True)
class QKNormSpec:
    """RMSNorm of q and of k after their projection, before clipping and rotation; each has a weight of its own."""

    over: Literal["head", "vector"]
    """head: every head by itself, one weight (d,) for all of them (Qwen3); vector: all of q, (H d,), and all of k,
    (K d,), before they are cut into heads (OLMoE)."""
    eps: float

    def __post_init__(self) -> None:
        _require(self.over in ("head", "vector"), f"qk_norm.over must be 'head' or 'vector', got {self.over!r}")
        _require_number("qk_norm", eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class KVState:
    """What attention keeps of a sequence: a key and a value of ``dim`` numbers for every position, in paged blocks."""

    n_kv_heads: int
    head_dim: int

    @property
    def numbers_per_token(self) -> int:
        """Numbers one position adds: 2 K d."""
        return 2 * self.n_kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Grouped-query attention: ``n_heads`` queries share ``n_kv_heads`` keys and values, in consecutive groups."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    position: RopeSpec | AlibiSpec | None
    """None: the layer does not know positions."""
    clip_qkv: float | None = None
    """Clamp the projected q, k and v to [-clip_qkv, clip_qkv] before RoPE (DBRX: 8)."""
    soft_cap: float | None = None
    """Scores become soft_cap * tanh(scores / soft_cap) before the mask (Grok-1: 30)."""
    scale: float | None = None
    """Multiplier of q·k; None means 1/sqrt(head_dim)."""
    qk_norm: QKNormSpec | None = None

    def __post_init__(self) -> None:
        _require_positive("attn", n_heads=self.n_heads, n_kv_heads=self.n_kv_heads, head_dim=self.head_dim)
        _require(
            self.n_heads % self.n_kv_heads == 0,
            f"n_kv_heads must divide n_heads: got n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}. "
            "Check the number of key/value heads in config.json.",
        )
        _require(self.head_dim % 2 == 0, f"head_dim must be even for rotary halves, got {self.head_dim}")
        for name in ("clip_qkv", "soft_cap", "scale"):
            value = getattr(self, name)
            if value is not None:
                _require_number("attn", **{name: value})

    @property
    def q_dim(self) -> int:
        """Rows of the query projection: n_heads * head_dim."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Rows of the key (and of the value) projection: n_kv_heads * head_dim."""
        return self.n_kv_heads * self.head_dim

    @property
    def qkv_dim(self) -> int:
        """Rows of the packed projection wqkv, in the order all q, all k, all v."""
        return self.q_dim + 2 * self.kv_dim

    @property
    def score_scale(self) -> float:
        """The multiplier of q·k that is in force."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def state(self) -> KVState:
        """What this mixer keeps of a sequence between passes."""
        return KVState(n_kv_heads=self.n_kv_heads, head_dim=self.head_dim)


@dataclass(frozen=True, kw_only=True)
class DenseSpec:
    """One feed-forward network: gated, w_down(act(w_gate x) * w_up x), or plain, w_down(act(w_up x))."""

    d_ff: int
    activation: Activation
    gated: bool = True

    def __post_init__(self) -> None:
        _require_positive("ffn", d_ff=self.d_ff)
        _require_activation(self.activation)


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """A router over ``n_experts`` gated networks of which each token visits ``top_k``; dropless."""

    d_ff: int
    n_experts: int
    top_k: int
    activation: Activation
    normalize_p: float | None = 1.0
    """Divide the chosen weights by their p-norm; 1 makes them sum to one, None leaves the softmax values (Grok-1)."""
    aggregate: Aggregate = "weighted_sum"
    aux_loss_weight: float = 0.0
    """Strength of the load-balancing loss in the checkpoint's own convention; used by training only."""
    jitter_eps: float | None = None
    """Training only: the router's input (and nothing else) is multiplied by U(1-eps, 1+eps)."""

    def __post_init__(self) -> None:
        _require_positive("ffn", d_ff=self.d_ff, n_experts=self.n_experts, top_k=self.top_k)
        _require(
            self.top_k <= self.n_experts,
            f"top_k must not exceed n_experts: got top_k={self.top_k}, n_experts={self.n_experts}",
        )
        # Weight maps list every expert: a hostile config must not make it endless. Published models have up to 512.
        _require(self.n_experts <= 1024, f"n_experts must be at most 1024, got {self.n_experts}")
        _require_activation(self.activation)
        if self.normalize_p is not None:
            _require_number("ffn", normalize_p=self.normalize_p)
        _require(
            self.aggregate in ("weighted_sum", "vote", "fuse"),
            f"ffn.aggregate must be 'weighted_sum', 'vote' or 'fuse', got {self.aggregate!r}",
        )
        _require_number("ffn", above=-1e-30, aux_loss_weight=self.aux_loss_weight)
        if self.jitter_eps is not None:
            _require_number("ffn", above=-1e-30, jitter_eps=self.jitter_eps)


def _require_activation(activation: str) -> None:
    known = ("silu", "gelu", "gelu_tanh", "relu")
    _require(activation in known, f"activation must be one of {', '.join(known)}; got {activation!r}")


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer: h + r mixer(norm(h)), then h + r ffn(norm(h)), r the residual scale."""

    norm: NormSpec
    """Of both halves: a norm of its own before the mixer and before the feed-forward."""
    mixer: AttentionSpec
    ffn: DenseSpec | MoESpec
    post_norms: bool = False
    """True adds a norm after the mixer and after the feed-forward, inside the residual branch (Grok-1's sandwich)."""
    residual_scale: float = 1.0
    """What both branches are multiplied by before they are added (Granite: 0.22)."""

    def __post_init__(self) -> None:
        _require_number("layer", residual_scale=self.residual_scale)

    @property
    def moe(self) -> MoESpec | None:
        """The mixture of experts, where the layer has one."""
        return self.ffn if isinstance(self.ffn, MoESpec) else None


def uniform(layer: LayerSpec, n_layers: int) -> tuple[LayerSpec, ...]:
    """``n_layers`` layers of one kind.

    Raises:
        ConfigError: a number of layers that no model has.
    """
    _require_positive("model", n_layers=n_layers)
    # One config must not make a command allocate for minutes: real models have tens to hundreds of layers.
    _require(n_layers <= MAX_LAYERS, f"n_layers must be at most {MAX_LAYERS}, got {n_layers}")
    return (layer,) * n_layers


MAX_LAYERS = 10_000


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
    embedding_scale: float = 1.0
    """Embeddings are multiplied by this after the look-up (Grok-1: sqrt(d_model))."""
    logit_scale: float = 1.0
    """Logits are multiplied by this (Grok-1: 1/sqrt(3))."""
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    """Ids that end a generation; DBRX-instruct has two, <|endoftext|> and <|im_end|>."""
    pad_id: int | None = None

    def __post_init__(self) -> None:
        _require_positive(
            "model",
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            n_layers=self.n_layers,
            max_seq_len=self.max_seq_len,
        )
        _require(self.n_layers <= MAX_LAYERS, f"n_layers must be at most {MAX_LAYERS}, got {self.n_layers}")
        _require_number("model", embedding_scale=self.embedding_scale, logit_scale=self.logit_scale)

    @property
    def n_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @property
    def is_moe(self) -> bool:
        """True if any layer routes its tokens over experts."""
        return any(layer.moe is not None for layer in self.kinds())

    @property
    def moe_layers(self) -> tuple[tuple[int, MoESpec], ...]:
        """(index, experts) of every layer that has experts."""
        return tuple((i, layer.ffn) for i, layer in enumerate(self.layers) if isinstance(layer.ffn, MoESpec))

    def kinds(self) -> dict[LayerSpec, int]:
        """Each kind of layer, in order of first appearance, and how many layers are of it."""
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
        _require(len(kinds) == 1, f"{why} needs a model whose layers are all alike; this one has {len(kinds)} kinds")
        return self.layers[0]

    def only_moe(self, why: str) -> MoESpec:
        """The mixture of a model whose layers that have one are all alike in it.

        Raises:
            ConfigError: no layer has experts, or they differ.
        """
        kinds = dict.fromkeys(spec for _, spec in self.moe_layers)
        _require(bool(kinds), f"{why} needs a mixture of experts; this model is dense")
        _require(len(kinds) == 1, f"{why} needs one kind of mixture; this model has {len(kinds)}")
        return next(iter(kinds))

    def with_layers(self, change: Callable[[LayerSpec], LayerSpec]) -> ModelConfig:
        """This model with every layer changed; equal layers stay one object."""
        changed = {layer: change(layer) for layer in self.kinds()}
        return replace(self, layers=tuple(changed[layer] for layer in self.layers))

    def with_mixer(self, **fields: Any) -> ModelConfig:
        """This model with fields of every layer's mixer changed."""
        return self.with_layers(lambda layer: replace(layer, mixer=replace(layer.mixer, **fields)))

    def with_ffn(self, **fields: Any) -> ModelConfig:
        """This model with fields of every layer's feed-forward changed."""
        return self.with_layers(lambda layer: replace(layer, ffn=replace(layer.ffn, **fields)))

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
    mixer: AttentionSpec,
    ffn: DenseSpec | MoESpec,
    post_norms: bool = False,
    residual_scale: float = 1.0,
    **model: Any,
) -> ModelConfig:
    """A model of one kind of layer, whose last norm is like the layers'.

    Args:
        model: the other fields of :class:`ModelConfig`.
    """
    layer = LayerSpec(norm=norm, mixer=mixer, ffn=ffn, post_norms=post_norms, residual_scale=residual_scale)
    return ModelConfig(layers=uniform(layer, n_layers), final_norm=norm, **model)
