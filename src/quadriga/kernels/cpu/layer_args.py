"""What a :class:`~quadriga.kernels.cpu.program.Program` is told of a layer: weights, sizes, where its state lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quadriga.kernels.cpu.packing import Packed

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class NormArgs:
    """A norm's weight (D,) float32, kind ("layer" or "rms") and epsilon, and its bias (D,) float32 if it has one."""

    weight: Floats
    kind: str
    eps: float
    bias: Floats | None = None


@dataclass(frozen=True, kw_only=True)
class LatentArgs:
    """What latent attention has besides: see ``LatentAttentionSpec``; R = kv_rank."""

    kv_rank: int
    rope_dim: int
    nope_dim: int
    v_dim: int
    wq_a: Packed | None
    """(Q, D); None: ``AttentionArgs.wqkv`` takes the normed state itself."""
    q_a_norm: NormArgs | None
    wkv_a: Packed
    """(R + rope_dim, D)"""
    kv_a_norm: NormArgs
    wk_b: Packed
    """(H R, nope_dim)"""
    wv_b: Packed
    """(H v_dim, R)"""


@dataclass(frozen=True, kw_only=True)
class AttentionArgs:
    """Everything ``Program.attention`` needs of one layer; see ``ops.attention`` for the mathematics."""

    norm: NormArgs | None
    post_norm: NormArgs | None
    wqkv: Sequence[Packed]
    """Pieces of its rows: one, or several where a file stores q, k and v in different formats. Of latent attention the
    queries' projection alone, (H (nope_dim + rope_dim), D or Q)."""
    wo: Packed
    n_heads: int
    n_kv_heads: int
    head_dim: int
    q_norm: NormArgs | None
    """Of every head (d,), or of all of q together (H d,): its weight says which."""
    k_norm: NormArgs | None
    clip: float | None
    residual_scale: float
    score_scale: float
    soft_cap: float | None
    inverse_frequencies: Floats | None
    """(pairs,) float32, of the first numbers of every head; None where positions are not rotary."""
    alibi_slopes: Floats | None
    """(H,) float32."""
    kv: NDArray[np.uint8]
    """This layer's blocks, zeroed: ``n_blocks`` times ``kv_stride`` bytes."""
    kv_stride: int
    """Bytes from one block to the next: ``quant.packed``'s kv_block_bytes or latent_block_bytes, or more."""
    kv_format: str
    qkv_bias: Floats | None = None
    out_bias: Floats | None = None
    sinks: Floats | None = None
    """(H,) float32."""
    window: int | None = None
    output_gate: bool = False
    keys_as_values: bool = False
    v_norm: NormArgs | None = None
    """(d,)"""
    cache_group: int = 0
    """Whose block table the layer's keys and values are found by."""
    rotary_scale: float = 1.0
    norm_after_rotation: bool = False
    latent: LatentArgs | None = None


@dataclass(frozen=True, kw_only=True)
class ShortConvArgs:
    """Everything ``Program.short_conv`` needs of one layer; see ``model.config.ShortConvSpec``."""

    norm: NormArgs
    post_norm: NormArgs | None
    w_in: Packed
    w_out: Packed
    taps: Floats
    """(W, L)"""
    residual_scale: float
    state: Floats
    """(slots, numbers of a state)"""


@dataclass(frozen=True, kw_only=True)
class DeltaNetArgs:
    """Everything ``Program.delta_net`` needs of one layer; see ``model.config.DeltaNetSpec``."""

    norm: NormArgs
    post_norm: NormArgs | None
    w_in: Packed
    w_ba: Packed
    w_out: Packed
    taps: Floats
    """(2 G d_k + H d_v, L)"""
    rate: Floats
    """(H,), positive."""
    dt: Floats
    head_norm: NormArgs
    """(d_v,)"""
    n_k_heads: int
    n_v_heads: int
    k_dim: int
    v_dim: int
    tiled: bool
    residual_scale: float
    state: Floats
    """(slots, numbers of a state)"""


@dataclass(frozen=True, kw_only=True)
class Mamba2Args:
    """Everything ``Program.mamba2`` needs of one layer; see ``model.config.Mamba2Spec``."""

    norm: NormArgs
    post_norm: NormArgs | None
    w_in: Packed
    w_dt: Packed
    w_out: Packed
    taps: Floats
    """(H P + 2 G N, L)"""
    conv_bias: Floats | None
    rate: Floats
    """(H,), positive."""
    dt: Floats
    skip: Floats
    group_norm: NormArgs
    """(H P,)"""
    n_heads: int
    n_groups: int
    state_dim: int
    head_dim: int
    residual_scale: float
    state: Floats
    """(slots, numbers of a state)"""


@dataclass(frozen=True, kw_only=True)
class ChoiceArgs:
    """How a router's logits become a choice and weights; see ``ops.Choice``."""

    score: str = "softmax"
    n_groups: int = 1
    top_k_groups: int = 1
    group_worth: str = "two_best"
    normalize_eps: float = 0.0
    normalize_min: float = 0.0
    scale: float = 1.0
    near: float = 0.0
    """Of a sparse mixer, ``2 * MoESpec.mixer_eps``."""
    bias: Floats | None = None
    """(E,) added to the logits."""
    correction: Floats | None = None
    """(E,) added to the scores for the choice alone."""


@dataclass(frozen=True, kw_only=True)
class SharedArgs:
    """The network of a mixture that every token visits."""

    gate: Packed | None
    up: Packed
    down: Packed
    activation: str
    weight: Packed | None
    """(1, D) float32: the sigmoid of its product with x weighs the output; None: 1."""


@dataclass(frozen=True, kw_only=True)
class ApartArgs:
    """Norms of a mixture whose router and experts read the residual stream; see ``MoESpec.apart``."""

    router_norm: NormArgs
    """Its weight is the router's scale / sqrt(D)."""
    expert_norm: NormArgs
    expert_post_norm: NormArgs
    shared_post_norm: NormArgs
    expert_scale: Floats
    """(E,)"""


@dataclass(frozen=True, kw_only=True)
class FFNArgs:
    """Everything ``Program.ffn`` needs of one layer. A dense network is one expert without a router."""

    norm: NormArgs | None
    post_norm: NormArgs | None
    router: Packed | None
    gate: Sequence[Packed] | None
    up: Sequence[Packed]
    down: Sequence[Packed]
    top_k: int
    activation: str
    aggregate: str
    normalize_p: float | None
    residual_scale: float
    fuse: Floats | None
    layer: int
    store: int | None = None
    """Handle of an ``ops.expert_store.ExpertStore``, where experts are on disk."""
    choice: ChoiceArgs = ChoiceArgs()
    biases: tuple[Floats, Floats, Floats] | None = None
    """Of gate and up (E, F) and down (E, D) of the experts."""
    shared: SharedArgs | None = None
    apart: ApartArgs | None = None
    stream_scale: float = 1.0
    """What the residual stream is multiplied by at last."""
