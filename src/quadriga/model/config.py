"""What a model is: a small tree of frozen specs, checked once when it is built.

    ModelConfig
    ├── layers      tuple of LayerSpec, one per layer; equal layers share one object (``uniform``)
    │   ├── mixer   AttentionSpec          heads, biases, clipping, soft cap, scale, window, sinks
    │   │   ├── position   RopeSpec | AlibiSpec | None    how a token knows where it stands
    │   │   │   └── scaling    LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | FactorScaling | None
    │   │   └── qk_norm    QKNormSpec | None              norms of q and k
    │   ├── ffn     DenseSpec | MoESpec    one feed-forward network, or a router over many
    │   │   └── shared     DenseSpec | None    of a mixture: the network that every token visits besides
    │   └── norm    NormSpec               LayerNorm or RMSNorm, and its epsilon
    └── final_norm  NormSpec

Alternatives are types, not flags, so a wrong combination cannot be written down. A **mixer owns its state**: what it
keeps of a sequence between passes is its ``state`` (today ``KVState``, paged keys and values), and
whoever counts bytes or allocates a cache asks the mixers of the layers, never the model. Nothing here imports torch:
``quadriga info`` and the planner work from these specs by arithmetic alone. Families (``model/families``) turn a
checkpoint's own configuration into a ModelConfig; nothing else in the project looks at ``family``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from quadriga.errors import ConfigError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "clamped_glu"]
"""The non-linearity of a feed-forward network. ``gelu`` is the exact erf form, ``gelu_tanh`` jax's and GPT-2's.
``clamped_glu`` is a gated unit as a whole, gpt-oss's: (u + 1) g sigmoid(1.702 g), g = min(gate, 7), u = up in +-7."""

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
    """A normalisation with a learned weight and, where it is asked for, a bias that is added at the end.

    ``layer``: (x - mean) / sqrt(var + eps) * weight.  ``rms``: x / sqrt(mean(x^2) + eps) * weight.
    """

    kind: Literal["layer", "rms"]
    eps: float = 1e-5
    bias: bool = False
    """Phi-MoE."""

    def __post_init__(self) -> None:
        _require(self.kind in ("layer", "rms"), f"norm.kind must be 'layer' or 'rms', got {self.kind!r}")
        _require_number("norm", eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every frequency divided by ``factor`` (position interpolation, Chen et al. 2023)."""

    factor: float

    def __post_init__(self) -> None:
        _require_number("scaling", factor=self.factor)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """LLaMA-3.1's bands: low frequencies divided by ``factor``, high ones as they are, between them a mixture.

    A frequency is high that turns more than ``high_freq_factor`` times within the original context, low one that turns
    less than ``low_freq_factor`` times.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        _require_positive("scaling", original_max_seq_len=self.original_max_seq_len)
        _require_number("scaling", factor=self.factor, low_freq_factor=self.low_freq_factor)
        _require_number("scaling", high_freq_factor=self.high_freq_factor)
        _require(
            self.low_freq_factor < self.high_freq_factor,
            f"scaling.low_freq_factor must be below high_freq_factor, got {self.low_freq_factor:g} and "
            f"{self.high_freq_factor:g}",
        )


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, section 3.2): from ``beta_fast`` turns in the original context on frequencies stay, below
    ``beta_slow`` they are divided by ``factor``, with a linear ramp over the pairs between; cos and sin are multiplied
    by ``attention_factor``.
    """

    factor: float
    original_max_seq_len: int
    attention_factor: float
    """What is in force, not what a file leaves out: usually 0.1 ln(factor) + 1."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether the ends of the ramp are rounded outwards to whole pairs (gpt-oss: not)."""

    def __post_init__(self) -> None:
        _require_positive("scaling", original_max_seq_len=self.original_max_seq_len)
        _require_number("scaling", factor=self.factor, attention_factor=self.attention_factor)
        _require_number("scaling", beta_fast=self.beta_fast, beta_slow=self.beta_slow)


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (Ding et al. 2024): every frequency divided by a factor of its own, from one of two lists.

    Which list is one decision for a model, made by its ``max_seq_len``: the long one where that exceeds
    ``original_max_seq_len``. transformers decides anew in every pass by the longest sequence in it, so that an answer
    depends on who shares its batch, and keys already cached keep the other list's angles. Deciding by the context that
    a model is opened for is llama.cpp's and vLLM's rule; a text below the original length is then read with the long
    factors, unless ``max_seq_len`` is set to the original length.
    """

    short_factors: tuple[float, ...]
    """One for each pair that turns."""
    long_factors: tuple[float, ...]
    original_max_seq_len: int
    short_scale: float
    """cos and sin are multiplied by it where the short factors are in force."""
    long_scale: float

    def __post_init__(self) -> None:
        _require_positive("scaling", original_max_seq_len=self.original_max_seq_len)
        _require_number("scaling", short_scale=self.short_scale, long_scale=self.long_scale)
        for name in ("short_factors", "long_factors"):
            _freeze_factors(self, name)


@dataclass(frozen=True, kw_only=True)
class FactorScaling:
    """Every frequency divided by a number of its own, as GGUF's ``rope_freqs`` keeps them."""

    factors: tuple[float, ...]
    """One for each pair that turns."""

    def __post_init__(self) -> None:
        _freeze_factors(self, "factors")


def _freeze_factors(spec: object, name: str) -> None:
    """Check a list of factors, and keep it as a tuple: JSON has only lists."""
    values = getattr(spec, name)
    _require(isinstance(values, (list, tuple)) and bool(values), f"scaling.{name} must be numbers, one for each pair")
    for value in values:
        _require_number("scaling", **{name: value})
    object.__setattr__(spec, name, tuple(float(value) for value in values))


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | FactorScaling
"""How rotary frequencies are bent towards a longer context. ``dynamic`` has no type: its frequencies change with the
length of the text, so that cached keys would have to be computed again at every token."""


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary positions in the half-rotation (NeoX) form: angle = position * theta^(-2j/dim), bent by ``scaling``.

    Checkpoints whose rotary pairs lie side by side (Meta, ERNIE, DeepSeek) have the rows of q and k put into halves by
    their weight map (``Piece.rotary_heads``), which leaves every score as it was; there is no second form to compute.
    """

    theta: float
    dim: int | None = None
    """How many of a head's numbers turn, the first ones; None: all of them."""
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        _require_number("rope", theta=self.theta)
        if self.dim is not None:
            _require_positive("rope", dim=self.dim)
            _require(self.dim % 2 == 0, f"rope.dim must be even, got {self.dim}")

    def rotated(self, head_dim: int) -> int:
        """How many numbers of a head turn."""
        return head_dim if self.dim is None else self.dim


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
    after_rotation: bool = False
    """True: q and k are rotated first (Hunyuan)."""

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
    qkv_bias: bool = False
    """A bias on q, k and v, ``attn.wqkv.bias`` (Qwen2)."""
    out_bias: bool = False
    """A bias on the output projection, ``attn.wo.bias``."""
    window: int | None = None
    """A query at position p sees keys from p - window + 1 on (Mistral 7B v0.1: 4096); None: from the first."""
    sinks: bool = False
    """Every head has a learned logit, ``attn.sinks``, that takes part in the softmax and has no value (gpt-oss)."""

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
        if self.window is not None:
            _require_positive("attn", window=self.window)
        if isinstance(self.position, RopeSpec):
            self._check_rotation(self.position)

    def _check_rotation(self, rope: RopeSpec) -> None:
        n = rope.rotated(self.head_dim)
        _require(n <= self.head_dim, f"rope.dim must be at most head_dim {self.head_dim}, got {n}")
        lists: dict[str, tuple[float, ...]] = {}
        match rope.scaling:
            case LongRopeScaling(short_factors=short, long_factors=long):
                lists = {"short_factors": short, "long_factors": long}
            case FactorScaling(factors=factors):
                lists = {"factors": factors}
            case YarnScaling():
                _require(rope.theta > 1, f"YaRN needs a rope theta above 1, got {rope.theta:g}")
        for name, values in lists.items():
            _require(len(values) == n // 2, f"scaling.{name} must have {n // 2} numbers, one a pair; got {len(values)}")

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
        _require(self.gated or self.activation != "clamped_glu", "the activation clamped_glu needs a gated network")


Score = Literal["softmax", "sigmoid", "sparse_mixer"]
"""How logits become scores: each against all others, each by itself (DeepSeek-V3), or each of the two best against
those that are near it (``sparse_mixer``: Phi-3.5-MoE, Liu et al. 2023)."""


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """A router over ``n_experts`` gated networks of which each token visits ``top_k``; dropless.

    score   = softmax(logits) or sigmoid(logits)               logits = W x, plus a bias with ``router_bias``
    choice  = the top_k of score (+ correction), within the best ``top_k_groups`` of ``n_groups`` groups
    weight  = score of the chosen, divided by their norm, times ``routed_scale``
    out     = sum of weight * expert(x)  (+ shared(x), with ``shared_gate`` times sigmoid(w x))

    With ``sparse_mixer`` the two greatest logits are chosen. The first one's weight is its softmax over the experts
    with (best - logit) <= 2 ``mixer_eps`` max(|logit|, best), the second one's the same over all but the first.

    A softmax over the chosen logits alone (Mixtral, gpt-oss) is ``softmax`` with ``normalize_p`` 1: the sum over all
    experts cancels.
    """

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
    score: Score = "softmax"
    normalize_eps: float = 0.0
    """Added to the norm before dividing by it (DeepSeek: 1e-20, LFM2: 1e-6)."""
    normalize_min: float = 0.0
    """The least that is divided by (ERNIE: 1e-12)."""
    routed_scale: float = 1.0
    """What the chosen weights are multiplied by at last."""
    mixer_eps: float | None = None
    """How near logits must be to count beside a chosen one, as a share of them; for ``sparse_mixer`` alone."""
    correction: bool = False
    """True: a bias on the scores for the choice alone, stored with the model and trained by no gradient."""
    n_groups: int = 1
    """The experts in this many groups of neighbours, of which only the best ``top_k_groups`` are chosen from; a group
    is as good as the sum of its two best scores (DeepSeek-V3)."""
    top_k_groups: int = 1
    router_bias: bool = False
    """True: a bias on the router's logits."""
    expert_bias: bool = False
    """True: biases on gate, up and down of every routed expert."""
    shared: DenseSpec | None = None
    """A gated network beside the routed ones; several shared experts are one of their widths together."""
    shared_gate: bool = False
    """True: the shared network's output is multiplied by the sigmoid of a linear form of x (Qwen2-MoE)."""

    def __post_init__(self) -> None:
        sizes = {"d_ff": self.d_ff, "n_experts": self.n_experts, "top_k": self.top_k}
        _require_positive("ffn", **sizes, n_groups=self.n_groups, top_k_groups=self.top_k_groups)
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
        self._check_choice()

    def _check_choice(self) -> None:
        known = ("softmax", "sigmoid", "sparse_mixer")
        _require(self.score in known, f"ffn.score must be one of {', '.join(known)}; got {self.score!r}")
        if self.score == "sparse_mixer":
            _require(
                self.top_k == 2 and self.normalize_p is None and not self.correction and self.n_groups == 1,
                "a sparse mixer chooses two experts of all, by their logits, and does not divide their weights: it "
                "needs top_k 2, normalize_p None, no correction and one group",
            )
            _require(self.mixer_eps is not None, "a sparse mixer needs mixer_eps")
            _require_number("ffn", mixer_eps=self.mixer_eps or 0.0)
        else:
            _require(self.mixer_eps is None, "mixer_eps is a sparse mixer's alone")
        _require_number("ffn", above=-1e-30, normalize_eps=self.normalize_eps, normalize_min=self.normalize_min)
        _require_number("ffn", routed_scale=self.routed_scale)
        size = self.n_experts // self.n_groups
        _require(
            self.n_groups == 1 or (self.n_experts % self.n_groups == 0 and size >= 2),
            f"n_groups must part the experts into equal groups of two or more: got n_experts={self.n_experts}, "
            f"n_groups={self.n_groups}",
        )
        _require(
            self.top_k_groups <= self.n_groups and self.top_k <= self.top_k_groups * size,
            f"the chosen groups must exist and hold top_k experts: got n_groups={self.n_groups} of {size} experts, "
            f"top_k_groups={self.top_k_groups}, top_k={self.top_k}",
        )
        _require(self.shared is None or self.shared.gated, "the shared network of a mixture must be gated")
        _require(self.shared is not None or not self.shared_gate, "shared_gate needs a shared network")


def _require_activation(activation: str) -> None:
    known = ("silu", "gelu", "gelu_tanh", "relu", "clamped_glu")
    _require(activation in known, f"activation must be one of {', '.join(known)}; got {activation!r}")


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer: h + r mixer(norm(h)), then h + r ffn(norm(h)), r the residual scale; or r norm(mixer(h)), or both."""

    norm: NormSpec
    """Of all norms of the layer, each with weights of its own."""
    mixer: AttentionSpec
    ffn: DenseSpec | MoESpec
    post_norms: bool = False
    """True adds a norm after the mixer and after the feed-forward, inside the residual branch (Grok-1's sandwich)."""
    pre_norms: bool = True
    """False: mixer and feed-forward read the residual stream as it is (OLMo 2, with post_norms)."""
    residual_scale: float = 1.0
    """What both branches are multiplied by before they are added (Granite: 0.22)."""

    def __post_init__(self) -> None:
        _require_number("layer", residual_scale=self.residual_scale)
        _require(self.pre_norms or self.post_norms, "a layer needs norms before its branches, behind them, or both")

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
        _require(not (self.head_bias and self.tied_embeddings), "a head with a bias must be a matrix of its own")

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
