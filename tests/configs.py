"""Small changes to a model's configuration, for tests that vary one thing at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quadriga.model.config import (
    DeltaNetSpec,
    DenseSpec,
    LinearScaling,
    Mamba2Spec,
    ModelConfig,
    NoFeedForward,
    NoMixer,
    ProportionalScaling,
    QKNormSpec,
    RopeSpec,
    ShortConvSpec,
    YarnScaling,
    in_order,
    uniform,
)


def first_dense(config: ModelConfig, d_ff: int = 72) -> ModelConfig:
    """``config`` with one gated network of width ``d_ff`` in its first layer."""
    dense = replace(config.layers[0], ffn=DenseSpec(d_ff=d_ff, activation="silu"))
    return replace(config, layers=in_order((dense, *config.layers[1:])))


def with_convolutions(config: ModelConfig) -> ModelConfig:
    """``config`` with short convolutions in place of all but the second layer's attention."""
    conv = ShortConvSpec(width=config.d_model, taps=3)
    layers = (layer if i == 1 else replace(layer, mixer=conv) for i, layer in enumerate(config.layers))
    return replace(config, layers=in_order(layers))


def with_delta_rules(config: ModelConfig, k_dim: int = 12, v_dim: int = 18) -> ModelConfig:
    """``config`` as Qwen3-Next would have it: norms less one, gated attention in every second layer, else delta rules."""
    norm = replace(config.final_norm, plus_one=True)
    delta = DeltaNetSpec(n_k_heads=2, n_v_heads=6, k_dim=k_dim, v_dim=v_dim, taps=4, eps=norm.eps)
    attention = replace(
        config.layers[0].attention,
        output_gate=True,
        qk_norm=QKNormSpec(over="head", eps=norm.eps, plus_one=True),
    )
    layers = (replace(layer, norm=norm, mixer=attention if i % 2 else delta) for i, layer in enumerate(config.layers))
    return replace(config, layers=in_order(layers), final_norm=norm)


def with_state_spaces(config: ModelConfig, n_groups: int = 2, conv_bias: bool = True) -> ModelConfig:
    """``config`` as Granite 4 would have it: state-space layers in place of all but the second layer's attention."""
    mamba = Mamba2Spec(
        n_heads=8, head_dim=12, n_groups=n_groups, state_dim=14, taps=4, eps=config.final_norm.eps, conv_bias=conv_bias
    )
    layers = (layer if i == 1 else replace(layer, mixer=mamba) for i, layer in enumerate(config.layers))
    return replace(config, layers=in_order(layers))


def with_single_branches(config: ModelConfig, n_groups: int = 2) -> ModelConfig:
    """``config`` as Nemotron-H would have it: a state-space layer, its network, its attention, and so on by turns."""
    layer, hybrid = config.layers[0], with_state_spaces(config, n_groups).layers[0]
    turn = (
        replace(hybrid, ffn=NoFeedForward()),
        replace(layer, mixer=NoMixer()),
        replace(layer, mixer=replace(layer.attention, position=None), ffn=NoFeedForward()),
    )
    return replace(config, layers=in_order(turn[i % 3] for i in range(config.n_layers)))


def with_near_layers(config: ModelConfig) -> ModelConfig:
    """``config`` as Mellum would have it: windows and plain frequencies in all but the second layer."""
    rope = config.layers[0].attention.position
    assert isinstance(rope, RopeSpec)
    yarn = YarnScaling(factor=4.0, original_max_seq_len=16, attention_factor=1.1386294361119891)
    far = replace(config.layers[0].attention, qk_norm=QKNormSpec(over="head", eps=config.final_norm.eps))
    near = replace(far, window=7, position=replace(rope, scaling=None))
    far = replace(far, position=replace(rope, scaling=yarn))
    layers = (replace(layer, mixer=far if i == 1 else near) for i, layer in enumerate(config.layers))
    return replace(config, layers=in_order(layers))


def between_norms(config: ModelConfig, period: int) -> ModelConfig:
    """``config`` as Gemma 2 (period 2) or 3 would have it: norms less one on both sides, every ``period``-th layer sees all."""
    norm = replace(config.final_norm, plus_one=True)
    plain = config.layers[0].attention
    if period == 2:
        far = replace(plain, soft_cap=50.0)
        near = replace(far, window=7)
    else:
        far = replace(plain, qk_norm=QKNormSpec(over="head", eps=norm.eps, plus_one=True))
        near = replace(far, window=7, position=RopeSpec(theta=777.0))
        far = replace(far, position=RopeSpec(theta=5e3, scaling=LinearScaling(factor=4.0)))
    layers = (
        replace(layer, norm=norm, mixer=far if (i + 1) % period == 0 else near, post_norms=True)
        for i, layer in enumerate(config.layers)
    )
    cap = 30.0 if period == 2 else None
    scale = config.d_model**0.5
    return replace(
        config, layers=in_order(layers), final_norm=norm, tied_embeddings=True, embedding_scale=scale, logit_cap=cap
    )


def with_windows(config: ModelConfig) -> ModelConfig:
    """``config`` as Gemma 4 would have it: windows in all but the second layer, which has wider heads that are values too."""
    near = replace(
        config.layers[0].attention,
        scale=1.0,
        qk_norm=QKNormSpec(over="head", eps=config.final_norm.eps),
        v_norm_eps=config.final_norm.eps,
        window=7,
    )
    turning = RopeSpec(theta=5e3, scaling=ProportionalScaling(part=0.6))
    far = replace(near, n_kv_heads=3, head_dim=20, window=None, keys_as_values=True, position=turning)
    layers = (
        replace(layer, mixer=far if i == 1 else near, post_norms=True, scaled=True)
        for i, layer in enumerate(config.layers)
    )
    return replace(
        config, layers=in_order(layers), tied_embeddings=True, embedding_scale=config.d_model**0.5, logit_cap=30.0
    )


def with_sinks(config: ModelConfig) -> ModelConfig:
    """``config`` as Granite Swash would have it: sinks, windows in the middle layers, others without positions."""
    attn = replace(config.layers[0].attention, scale=0.3, sinks=True)
    layers = [
        replace(layer, mixer=replace(attn, window=7) if 0 < i < 3 else replace(attn, position=None), residual_scale=0.6)
        for i, layer in enumerate(config.layers)
    ]
    return replace(config, layers=in_order(layers), embedding_scale=3.0, logit_scale=0.5)


def changed(config: ModelConfig, **fields: Any) -> ModelConfig:
    """``config`` with fields of its layers (norm, mixer, ffn, post_norms, residual_scale), of itself, or its position or depth changed.

    A new norm becomes the last norm too, as every family so far has it.
    """
    layer = config.layers[0]
    n_layers = fields.pop("n_layers", config.n_layers)
    if "norm" in fields:
        fields["final_norm"] = fields["norm"]
    if "position" in fields:
        fields["mixer"] = replace(fields.get("mixer", layer.mixer), position=fields.pop("position"))
    own = {
        name: fields.pop(name)
        for name in ("norm", "mixer", "ffn", "post_norms", "pre_norms", "residual_scale")
        if name in fields
    }
    return replace(config, layers=uniform(replace(layer, **own), n_layers), **fields)
