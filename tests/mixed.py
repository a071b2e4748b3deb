"""A model whose layers differ in everything a layer can differ in: heads, positions, feed-forward, mixture, norms."""

from __future__ import annotations

from quadriga.model.config import (
    AlibiSpec,
    AttentionSpec,
    DenseSpec,
    LayerSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    RopeSpec,
)

_NORM = NormSpec(kind="rms", eps=1e-6)
_ROPE = AttentionSpec(n_heads=6, n_kv_heads=2, head_dim=8, position=RopeSpec(theta=1e4))
_DENSE = LayerSpec(norm=_NORM, mixer=_ROPE, ffn=DenseSpec(d_ff=112, activation="silu"))
_MOE = LayerSpec(
    norm=_NORM,
    mixer=AttentionSpec(n_heads=4, n_kv_heads=1, head_dim=16, position=RopeSpec(theta=5e5), clip_qkv=0.7),
    ffn=MoESpec(d_ff=80, n_experts=5, top_k=3, activation="silu"),
)
_SANDWICH = LayerSpec(
    norm=NormSpec(kind="layer", eps=1e-5),
    mixer=AttentionSpec(n_heads=6, n_kv_heads=3, head_dim=8, position=AlibiSpec(max_bias=6.0), soft_cap=2.0),
    ffn=MoESpec(d_ff=72, n_experts=7, top_k=2, activation="gelu_tanh", normalize_p=None),
    post_norms=True,
)
_PLAIN = LayerSpec(
    norm=_NORM,
    mixer=AttentionSpec(n_heads=6, n_kv_heads=6, head_dim=10, position=None, scale=0.2),
    ffn=DenseSpec(d_ff=96, activation="gelu", gated=False),
)

_SIGMOID = LayerSpec(
    norm=_NORM,
    mixer=_ROPE,
    ffn=MoESpec(
        d_ff=88,
        n_experts=6,
        top_k=2,
        activation="silu",
        score="sigmoid",
        correction=True,
        n_groups=3,
        top_k_groups=2,
        normalize_eps=1e-3,
        routed_scale=1.7,
        shared=DenseSpec(d_ff=104, activation="gelu"),
    ),
)
_BIASED = LayerSpec(
    norm=_NORM,
    mixer=_ROPE,
    ffn=MoESpec(
        d_ff=72,
        n_experts=7,
        top_k=3,
        activation="clamped_glu",
        router_bias=True,
        expert_bias=True,
        normalize_min=0.9,
        shared=DenseSpec(d_ff=40, activation="silu"),
        shared_gate=True,
    ),
)

PIECES = ModelConfig(
    family="test",
    vocab_size=97,
    d_model=48,
    max_seq_len=160,
    layers=(_DENSE, _SIGMOID, _BIASED),
    final_norm=_NORM,
)
"""What a mixture can be made of beyond a softmax over experts: scores, corrections, groups, biases, shared networks."""

MIXED = ModelConfig(
    family="test",
    vocab_size=97,
    d_model=48,
    max_seq_len=160,
    layers=(_DENSE, _MOE, _MOE, _SANDWICH, _PLAIN),
    final_norm=NormSpec(kind="layer", eps=1e-4),
)
