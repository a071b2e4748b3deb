"""How tokens hear of each other, and what a layer keeps of a sequence for it (``model/config.py`` draws the tree)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from quadriga.model.position_specs import AlibiSpec, FactorScaling, LongRopeScaling, RopeSpec, YarnScaling
from quadriga.model.spec_checks import require, require_number, require_positive


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """A normalisation with a learned weight and, where it is asked for, a bias that is added at the end.

    ``layer``: (x - mean) / sqrt(var + eps) * weight.  ``rms``: x / sqrt(mean(x^2) + eps) * weight.
    """

    kind: Literal["layer", "rms"]
    eps: float = 1e-5
    bias: bool = False
    """Phi-MoE."""
    plus_one: bool = False
    """The weight is stored less one, and 1 + weight multiplies (Qwen3-Next)."""

    def __post_init__(self) -> None:
        require(self.kind in ("layer", "rms"), f"norm.kind must be 'layer' or 'rms', got {self.kind!r}")
        require_number("norm", eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class QKNormSpec:
    """RMSNorm of q and of k after their projection, before clipping and rotation; each has a weight of its own."""

    over: Literal["head", "vector"]
    """head: every head by itself, one weight (d,) for all of them (Qwen3); vector: all of q, (H d,), and all of k,
    (K d,), before they are cut into heads (OLMoE)."""
    eps: float
    after_rotation: bool = False
    """True: q and k are rotated first (Hunyuan)."""
    plus_one: bool = False
    """The weights are stored less one (Qwen3-Next)."""

    def __post_init__(self) -> None:
        require(self.over in ("head", "vector"), f"qk_norm.over must be 'head' or 'vector', got {self.over!r}")
        require_number("qk_norm", eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class KVState:
    """What attention keeps of a sequence: a key and a value of ``dim`` numbers for every position, in paged blocks."""

    n_kv_heads: int
    head_dim: int

    @property
    def numbers_per_token(self) -> int:
        """Numbers one position adds: 2 K d."""
        return 2 * self.n_kv_heads * self.head_dim

    @property
    def numbers_per_sequence(self) -> int:
        """Numbers a sequence has whatever its length: none."""
        return 0


@dataclass(frozen=True, kw_only=True)
class RecurrentState:
    """What a recurrent mixer keeps of a sequence: arrays of float32 whose size does not depend on its length."""

    shapes: tuple[tuple[int, ...], ...]

    @property
    def numbers_per_token(self) -> int:
        """Numbers one position adds: none."""
        return 0

    @property
    def numbers_per_sequence(self) -> int:
        """Numbers a sequence has whatever its length."""
        return sum(math.prod(shape) for shape in self.shapes)


@dataclass(frozen=True, kw_only=True)
class LatentState:
    """What latent attention keeps of a sequence: for every position the normed latent and the one rotated key that all
    heads share, in paged blocks; there is nothing else, keys and values are products of the latent."""

    rank: int
    rope_dim: int

    @property
    def numbers_per_token(self) -> int:
        """Numbers one position adds."""
        return self.rank + self.rope_dim

    @property
    def numbers_per_sequence(self) -> int:
        """Numbers a sequence has whatever its length: none."""
        return 0


@dataclass(frozen=True, kw_only=True)
class NoState:
    """What a layer without a mixer keeps of a sequence: nothing."""

    @property
    def numbers_per_token(self) -> int:
        """None."""
        return 0

    @property
    def numbers_per_sequence(self) -> int:
        """None."""
        return 0


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
    output_gate: bool = False
    """What a head gives is multiplied by the sigmoid of as many gates, more rows of wqkv behind v (Qwen3-Next)."""
    v_norm_eps: float | None = None
    """RMSNorm of every head's v, without a weight (Gemma 4)."""
    keys_as_values: bool = False
    """v is k as it is projected, before k's norm and rotation: wqkv has no rows for v (Gemma 4)."""

    def __post_init__(self) -> None:
        require_positive("attn", n_heads=self.n_heads, n_kv_heads=self.n_kv_heads, head_dim=self.head_dim)
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"n_kv_heads must divide n_heads: got n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}. "
            "Check the number of key/value heads in config.json.",
        )
        require(self.head_dim % 2 == 0, f"head_dim must be even for rotary halves, got {self.head_dim}")
        for name in ("clip_qkv", "soft_cap", "scale", "v_norm_eps"):
            value = getattr(self, name)
            if value is not None:
                require_number("attn", **{name: value})
        if self.window is not None:
            require_positive("attn", window=self.window)
        if self.keys_as_values:
            require(not (self.qkv_bias or self.output_gate), "keys that are values as well have no bias and no gate")
        if isinstance(self.position, RopeSpec):
            self._check_rotation(self.position)

    def _check_rotation(self, rope: RopeSpec) -> None:
        n = rope.rotated(self.turning_dim)
        require(n <= self.head_dim, f"rope.dim must be at most head_dim {self.head_dim}, got {n}")
        lists: dict[str, tuple[float, ...]] = {}
        match rope.scaling:
            case LongRopeScaling(short_factors=short, long_factors=long):
                lists = {"short_factors": short, "long_factors": long}
            case FactorScaling(factors=factors):
                lists = {"factors": factors}
            case YarnScaling():
                require(rope.theta > 1, f"YaRN needs a rope theta above 1, got {rope.theta:g}")
        for name, values in lists.items():
            require(len(values) == n // 2, f"scaling.{name} must have {n // 2} numbers, one a pair; got {len(values)}")

    @property
    def turning_dim(self) -> int:
        """Numbers that the rotation counts its pairs in, before it takes a part of them (``RopeSpec.dim``)."""
        return self.head_dim

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
        """Rows of the packed projection wqkv, in the order all q, all k, all v, all gates."""
        kinds = 1 if self.keys_as_values else 2
        return self.q_dim + kinds * self.kv_dim + (self.q_dim if self.output_gate else 0)

    @property
    def score_scale(self) -> float:
        """The multiplier of q·k that is in force."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def attended_dim(self) -> int:
        """Numbers that meet one key: those of all queries, and of all results that its value is added to."""
        return 2 * self.q_dim

    @property
    def state(self) -> KVState | LatentState:
        """What this mixer keeps of a sequence between passes."""
        return KVState(n_kv_heads=self.n_kv_heads, head_dim=self.head_dim)


@dataclass(frozen=True, kw_only=True)
class LatentAttentionSpec(AttentionSpec):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) in its absorbed form.

    c = norm(W_KVa x)[:R], k_r = rotate(W_KVa x)[R:]                  what is cached: the key is (c, k_r), the value c
    q = W_Q x, or W_Qb norm(W_Qa x)                                    every head (nope_dim, rope_dim)
    query of a head = (W_Kb[h] q_nope, rotate(q_rope))                 R + rope_dim numbers
    o = W_O [W_Vb[h] (softmax(scale query . key) c)]

    So it is multi-query attention with one key of ``head_dim`` = kv_rank + rope_dim numbers, whose first kv_rank are
    the value: the sum over W_Kb that makes keys is done to the query, the one that makes values to the result. There
    is no second form to compute: prompts and single tokens have the same arithmetic.
    """

    n_kv_heads: int = 1
    head_dim: int = 0
    """kv_rank + rope_dim; 0 is replaced by it."""
    kv_rank: int
    """R, numbers of the latent (published: 512)."""
    q_rank: int | None
    """Numbers of the queries' own latent; None: queries are one projection of x (DeepSeek-V2-Lite)."""
    nope_dim: int
    """Numbers of a head that do not turn."""
    rope_dim: int
    """Numbers of a head that turn, behind the others; all heads share one key for them."""
    v_dim: int
    """Numbers of a head's result."""
    norm_eps: float = 1e-6
    """Of the norms of both latents; DeepSeek's own code and transformers have no key for it."""
    yarn_mscale: float = 0.0
    """m: under YaRN q . k is multiplied by (0.1 m ln(factor) + 1)^2 besides (``mscale_all_dim`` of config.json)."""

    def __post_init__(self) -> None:
        sizes = {"kv_rank": self.kv_rank, "nope_dim": self.nope_dim, "rope_dim": self.rope_dim, "v_dim": self.v_dim}
        require_positive("attn", n_heads=self.n_heads, **sizes)
        if self.q_rank is not None:
            require_positive("attn", q_rank=self.q_rank)
        # The CPU's kernels take whole tiles of every head; every published model has multiples of 64.
        for name, unit in (("kv_rank", 32), ("v_dim", 16)):
            require(sizes[name] % unit == 0, f"attn.{name} must be a multiple of {unit}, got {sizes[name]}")
        require(self.rope_dim % 2 == 0, f"attn.rope_dim must be even, got {self.rope_dim}")
        width = self.kv_rank + self.rope_dim
        require(self.head_dim in (0, width), f"head_dim must be kv_rank + rope_dim = {width}, got {self.head_dim}")
        object.__setattr__(self, "head_dim", width)
        require(self.n_kv_heads == 1, f"latent attention has one key a token, got n_kv_heads={self.n_kv_heads}")
        for name in (
            "clip_qkv",
            "soft_cap",
            "scale",
            "qk_norm",
            "qkv_bias",
            "out_bias",
            "window",
            "sinks",
            "v_norm_eps",
            "keys_as_values",
        ):
            require(getattr(self, name) in (None, False), f"latent attention has no {name}")
        require(isinstance(self.position, RopeSpec), "latent attention needs rotary positions")
        require_number("attn", norm_eps=self.norm_eps)
        require_number("attn", above=-1e-30, yarn_mscale=self.yarn_mscale)
        assert isinstance(self.position, RopeSpec), "seen above"
        require(self.position.dim is None, "rope_dim says how many numbers turn: rope.dim must be left out")
        yarn = isinstance(self.position.scaling, YarnScaling)
        require(yarn or not self.yarn_mscale, "yarn_mscale needs a rotation that is scaled by YaRN")
        self._check_rotation(self.position)

    @property
    def turning_dim(self) -> int:
        """Numbers that the rotation's pairs are counted in: see :class:`AttentionSpec`."""
        return self.rope_dim

    @property
    def qk_dim(self) -> int:
        """Numbers of a head's query as it is projected: nope_dim + rope_dim."""
        return self.nope_dim + self.rope_dim

    @property
    def attended_dim(self) -> int:
        """H (R + rope_dim) of queries, H R of results."""
        return self.n_heads * (self.head_dim + self.kv_rank)

    @property
    def score_scale(self) -> float:
        """1/sqrt(nope_dim + rope_dim), under YaRN times the square that ``yarn_mscale`` says."""
        plain: float = self.qk_dim**-0.5
        scaling = self.position.scaling if isinstance(self.position, RopeSpec) else None
        if not self.yarn_mscale or not isinstance(scaling, YarnScaling) or scaling.factor <= 1:
            return plain
        m = 0.1 * self.yarn_mscale * math.log(scaling.factor) + 1.0
        return plain * m * m

    @property
    def state(self) -> LatentState:
        """What this mixer keeps of a sequence between passes."""
        return LatentState(rank=self.kv_rank, rope_dim=self.rope_dim)


@dataclass(frozen=True, kw_only=True)
class ShortConvSpec:
    """LFM2's gated short convolution: w_out (c * conv(b * x)), where b, c and x are the thirds of w_in h.

    Every channel is convolved by itself: conv(y)[t] = sum over j of w[j] y[t - taps + 1 + j], zeros before the text.
    """

    width: int
    """Channels: rows of each third of w_in."""
    taps: int
    """Positions that are seen, a token's own included (LFM2: 3)."""

    def __post_init__(self) -> None:
        require_positive("conv", width=self.width, taps=self.taps)
        require(2 <= self.taps <= 16, f"conv.taps must be from 2 to 16, got {self.taps}")

    @property
    def state(self) -> RecurrentState:
        """What this mixer keeps of a sequence between passes: b * x of the last ``taps - 1`` positions."""
        return RecurrentState(shapes=((self.taps - 1, self.width),))


@dataclass(frozen=True, kw_only=True)
class DeltaNetSpec:
    """A gated DeltaNet (Yang et al. 2024, arXiv 2412.06464), as Qwen3-Next has it.

    q and k (G heads of d_k) and v (H heads of d_v) are convolved and go through silu; q and k are made of unit length,
    q times 1/sqrt(d_k). Every head of v has a matrix S (d_k, d_v), changed by each token and read by q:

        S = exp(-rate softplus(a + dt)) S;    S = S + k sigmoid(b) (v - k S);    out = w_out (norm(q S) * silu(z))
    """

    n_k_heads: int
    """G: heads of q and of k."""
    n_v_heads: int
    """H: heads of v, and of S."""
    k_dim: int
    v_dim: int
    taps: int
    """Positions that a convolution sees, a token's own included (Qwen3-Next: 4)."""
    eps: float
    """Of the norm of every head's output."""
    log_rate: bool = True
    """The rate is stored as its logarithm; False: negative (GGUF)."""
    tiled: bool = False
    """Head h of v has head h mod G of q and k (GGUF's qwen35); False: h // (H / G)."""

    def __post_init__(self) -> None:
        require_positive("delta", n_k_heads=self.n_k_heads, n_v_heads=self.n_v_heads, taps=self.taps)
        require_positive("delta", k_dim=self.k_dim, v_dim=self.v_dim)
        require_number("delta", eps=self.eps)
        require(2 <= self.taps <= 16, f"delta.taps must be from 2 to 16, got {self.taps}")
        require(
            self.n_v_heads % self.n_k_heads == 0,
            f"n_k_heads must divide n_v_heads: got n_v_heads={self.n_v_heads}, n_k_heads={self.n_k_heads}",
        )

    @property
    def qk_dim(self) -> int:
        """Numbers of q, and of k: G d_k."""
        return self.n_k_heads * self.k_dim

    @property
    def value_dim(self) -> int:
        """Numbers of v, and of z: H d_v."""
        return self.n_v_heads * self.v_dim

    @property
    def width(self) -> int:
        """Channels that are convolved: q, k and v."""
        return 2 * self.qk_dim + self.value_dim

    @property
    def state(self) -> RecurrentState:
        """What this mixer keeps of a sequence: what is convolved of the last ``taps - 1`` positions, and S."""
        return RecurrentState(shapes=((self.taps - 1, self.width), (self.n_v_heads, self.k_dim, self.v_dim)))


@dataclass(frozen=True, kw_only=True)
class Mamba2Spec:
    """A selective state-space model (Mamba-2: Dao and Gu 2024, arXiv 2405.21060), as Granite 4 and Nemotron-H have it.

    x (H heads of P) and B and C (G groups of N) are convolved and go through silu. Every head has a matrix S (N, P),
    which decays by a step of its own, takes up what B writes and is read by C of the head's group:

        t = softplus(a + dt);    S = exp(-rate t) S + B (t x);    y = C S + skip x;    out = w_out norm(y * silu(z))

    The norm is taken over the heads of each group together.
    """

    n_heads: int
    """H."""
    head_dim: int
    """P: numbers of a head's x, and of what it gives."""
    n_groups: int
    """G: groups of neighbouring heads that share B and C."""
    state_dim: int
    """N: numbers of B, and of C."""
    taps: int
    """Positions that a convolution sees, a token's own included."""
    eps: float
    """Of the norm before w_out."""
    conv_bias: bool = True
    """A bias on every convolved channel, before silu."""
    log_rate: bool = True
    """The rate is stored as its logarithm; False: negative (GGUF)."""

    def __post_init__(self) -> None:
        require_positive("mamba", n_heads=self.n_heads, head_dim=self.head_dim, n_groups=self.n_groups)
        require_positive("mamba", state_dim=self.state_dim, taps=self.taps)
        require_number("mamba", eps=self.eps)
        require(2 <= self.taps <= 16, f"mamba.taps must be from 2 to 16, got {self.taps}")
        require(
            self.n_heads % self.n_groups == 0,
            f"n_groups must divide n_heads: got n_heads={self.n_heads}, n_groups={self.n_groups}",
        )

    @property
    def inner_dim(self) -> int:
        """Numbers of x, of z and of y: H P."""
        return self.n_heads * self.head_dim

    @property
    def width(self) -> int:
        """Channels that are convolved: x, B and C."""
        return self.inner_dim + 2 * self.n_groups * self.state_dim

    @property
    def state(self) -> RecurrentState:
        """What this mixer keeps of a sequence: what is convolved of the last ``taps - 1`` positions, and S."""
        return RecurrentState(shapes=((self.taps - 1, self.width), (self.n_heads, self.state_dim, self.head_dim)))


RecurrentMixer = ShortConvSpec | DeltaNetSpec | Mamba2Spec
"""Mixers that keep a state of fixed size."""


@dataclass(frozen=True, kw_only=True)
class NoMixer:
    """No mixer, and no norm before one: a layer that is its feed-forward alone (Nemotron-H)."""

    @property
    def state(self) -> NoState:
        """What this mixer keeps of a sequence between passes."""
        return NoState()


Mixer = AttentionSpec | RecurrentMixer | NoMixer
