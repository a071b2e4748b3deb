"""Mistakes that a model can be made with by its configuration alone: what a test of parity is worth is what it can see.

Every backend's golden test must fail for every one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from quadriga.model.config import AlibiSpec, DeltaNetSpec, Mamba2Spec, ModelConfig, QKNormSpec, RopeSpec, ShortConvSpec
from quadriga.model.weight_map import parameter_shapes
from tests.configs import changed


def rope_with(config: ModelConfig, **fields: object) -> RopeSpec:
    """The first layer's rotary positions with fields of their scaling changed."""
    rope = config.layers[0].mixer.position
    assert isinstance(rope, RopeSpec) and rope.scaling is not None
    return replace(rope, scaling=replace(rope.scaling, **fields))


def mixtures_with(config: ModelConfig, **fields: object) -> ModelConfig:
    """The model with fields of its mixtures changed; dense layers stay."""
    return config.with_layers(
        lambda layer: layer if layer.moe is None else replace(layer, ffn=replace(layer.moe, **fields))
    )


def convolutions_with(config: ModelConfig, **fields: Any) -> ModelConfig:
    """The model with fields of its short convolutions changed; of a smaller number of taps the first ones stay."""
    return config.with_layers(
        lambda layer: (
            replace(layer, mixer=replace(layer.mixer, **fields)) if isinstance(layer.mixer, ShortConvSpec) else layer
        )
    )


def delta_rules_with(config: ModelConfig, **fields: Any) -> ModelConfig:
    """The model with fields of its gated delta rules changed."""
    return config.with_layers(
        lambda layer: (
            replace(layer, mixer=replace(layer.mixer, **fields)) if isinstance(layer.mixer, DeltaNetSpec) else layer
        )
    )


def state_spaces_with(config: ModelConfig, **fields: Any) -> ModelConfig:
    """The model with fields of its state-space layers changed."""
    return config.with_layers(
        lambda layer: (
            replace(layer, mixer=replace(layer.mixer, **fields)) if isinstance(layer.mixer, Mamba2Spec) else layer
        )
    )


def full_layers_with(config: ModelConfig, **fields: Any) -> ModelConfig:
    """The model with fields of its attention changed where a layer sees all."""
    return config.with_layers(
        lambda layer: layer if layer.attention.window else replace(layer, mixer=replace(layer.attention, **fields))
    )


def near_layers_with(config: ModelConfig, **fields: Any) -> ModelConfig:
    """The model with fields of its attention changed where a layer has a window."""
    return config.with_layers(
        lambda layer: replace(layer, mixer=replace(layer.attention, **fields)) if layer.attention.window else layer
    )


def without_plus_one(config: ModelConfig) -> ModelConfig:
    """The model whose layers' norms multiply by what is stored."""
    return config.with_layers(lambda layer: replace(layer, norm=replace(layer.norm, plus_one=False)))


def left_to(config: ModelConfig, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that a model has in which something was left out, or norms were moved from behind to before."""
    moved = {name.replace("_post_norm", "_norm"): value for name, value in parameters.items()}
    values = {**moved, **parameters}
    return {
        name: values[name][tuple(map(slice, shape))] if name.endswith((".taps", "wqkv.weight")) else values[name]
        for name, shape in parameter_shapes(config).items()
    }


MUTATIONS: dict[str, tuple[str, Callable[[ModelConfig], ModelConfig]]] = {
    "rope theta 10000, as transformers 5.15-5.23 loads DBRX": (
        "dbrx",
        lambda c: c.with_mixer(position=RopeSpec(theta=10_000.0)),
    ),
    "no clipping": ("dbrx", lambda c: c.with_mixer(clip_qkv=None)),
    "weights not renormalised": ("dbrx", lambda c: c.with_ffn(normalize_p=None)),
    "weights of norm 2": ("dbrx", lambda c: c.with_ffn(normalize_p=2.0)),
    "one expert fewer": ("mixtral", lambda c: c.with_ffn(top_k=2)),
    "vote": ("mixtral", lambda c: c.with_ffn(aggregate="vote")),
    "layer norm for rms norm": ("llama", lambda c: changed(c, norm=replace(c.final_norm, kind="layer"))),
    "epsilon 3e-5": ("llama", lambda c: changed(c, norm=replace(c.final_norm, eps=3e-5))),
    "scores of twice the scale": ("llama-tied", lambda c: c.with_mixer(scale=2 * 8**-0.5)),
    "frequencies not scaled": ("llama3", lambda c: c.with_mixer(position=RopeSpec(theta=500.0))),
    "bands of another context": (
        "llama3",
        lambda c: c.with_mixer(position=rope_with(c, original_max_seq_len=20)),
    ),
    "yarn without its attention factor": (
        "llama-yarn",
        lambda c: c.with_mixer(position=rope_with(c, attention_factor=1.0)),
    ),
    "yarn by another factor": ("llama-yarn", lambda c: c.with_mixer(position=rope_with(c, factor=3.0))),
    "linear scaling by another factor": ("llama-linear", lambda c: c.with_mixer(position=rope_with(c, factor=2.0))),
    "no window": ("mistral", lambda c: c.with_mixer(window=None)),
    "a window one key wider": ("mistral", lambda c: c.with_mixer(window=8)),
    "a window in every layer": ("qwen2", lambda c: c.with_mixer(window=7)),
    "every layer rotates": ("smollm3", lambda c: c.with_mixer(position=RopeSpec(theta=5000.0))),
    "q and k normed with another epsilon": ("qwen3", lambda c: c.with_mixer(qk_norm=QKNormSpec(over="head", eps=0.01))),
    "chosen weights renormalised": ("olmoe", lambda c: c.with_ffn(normalize_p=1.0)),
    "no clipping after the norms": ("olmoe", lambda c: c.with_mixer(clip_qkv=None)),
    "branches added whole": ("granitemoe", lambda c: changed(c, residual_scale=1.0)),
    "the shared network's activation": (
        "granitemoeshared",
        lambda c: c.with_ffn(shared=replace(c.only_moe("this").shared, activation="gelu")),  # type: ignore[type-var]
    ),
    "whole heads rotated": ("glm4moe", lambda c: c.with_mixer(position=RopeSpec(theta=10_000.0))),
    "no bias on q, k and v": ("glm4moe", lambda c: c.with_mixer(qkv_bias=False)),
    "no norms of q and k": ("glm4moe", lambda c: c.with_mixer(qk_norm=None)),
    "no correction of the scores": ("glm4moe", lambda c: mixtures_with(c, correction=False)),
    "scores of a softmax": ("glm4moe", lambda c: mixtures_with(c, score="softmax")),
    "sigmoid scores not divided by their sum": ("glm4moe", lambda c: mixtures_with(c, normalize_p=None)),
    "weights not scaled": ("glm4moe", lambda c: mixtures_with(c, routed_scale=1.0)),
    "no shared network": ("glm4moe", lambda c: mixtures_with(c, shared=None)),
    "the shared network at full weight": ("qwen2moe", lambda c: mixtures_with(c, shared_gate=False)),
    "no gated shared network": ("qwen2moe", lambda c: mixtures_with(c, shared=None, shared_gate=False)),
    "qwen2moe's weights renormalised": ("qwen2moe", lambda c: mixtures_with(c, normalize_p=1.0)),
    "dots1 without biases": ("dots1", lambda c: c.with_mixer(qkv_bias=False)),
    "no bias on the output": ("dots1", lambda c: c.with_mixer(out_bias=False)),
    "dots1 without norms of q and k": ("dots1", lambda c: c.with_mixer(qk_norm=None)),
    "no correction of probabilities": ("ernie4_5-moe", lambda c: mixtures_with(c, correction=False)),
    "probabilities not divided by their sum": ("ernie4_5-moe", lambda c: mixtures_with(c, normalize_p=None)),
    "ernie without its shared experts": ("ernie4_5-moe", lambda c: mixtures_with(c, shared=None)),
    "minimax's heads rotated whole": ("minimax-m2", lambda c: c.with_mixer(position=RopeSpec(theta=10_000.0))),
    "minimax without norms of q and k": ("minimax-m2", lambda c: c.with_mixer(qk_norm=None)),
    "minimax without its correction": ("minimax-m2", lambda c: c.with_ffn(correction=False)),
    "minimax's scores as they are": ("minimax-m2", lambda c: c.with_ffn(normalize_p=None)),
    "norms before the rotation": (
        "hunyuan-moe",
        lambda c: c.with_mixer(qk_norm=replace(c.layers[0].mixer.qk_norm, after_rotation=False)),  # type: ignore[type-var]
    ),
    "the base not stretched": ("hunyuan-moe", lambda c: c.with_mixer(position=RopeSpec(theta=100.0))),
    "hunyuan without its shared network": ("hunyuan-moe", lambda c: c.with_ffn(shared=None)),
    "scores of the usual scale": ("granite", lambda c: c.with_mixer(scale=None)),
    "no window in gpt-oss": ("gpt-oss", lambda c: c.with_mixer(window=None)),
    "a window in every layer of gpt-oss": ("gpt-oss", lambda c: c.with_mixer(window=7)),
    "windows in the other layers": ("gpt-oss", lambda c: replace(c, layers=c.layers[1:] + c.layers[:1])),
    "yarn's ramp rounded": ("gpt-oss", lambda c: c.with_mixer(position=rope_with(c, truncate=True))),
    "yarn without its attention factor in gpt-oss": (
        "gpt-oss",
        lambda c: c.with_mixer(position=rope_with(c, attention_factor=1.0)),
    ),
    "yarn's usual turns": ("gpt-oss", lambda c: c.with_mixer(position=rope_with(c, beta_fast=32.0, beta_slow=1.0))),
    "a plain gated unit": ("gpt-oss", lambda c: c.with_ffn(activation="silu")),
    "a softmax over all experts": ("gpt-oss", lambda c: c.with_ffn(normalize_p=None)),
    "norms before, not behind": ("olmo2", lambda c: changed(c, pre_norms=True, post_norms=False)),
    "norms before as well": ("flex_olmo", lambda c: changed(c, pre_norms=True)),
    "no norms of q and k in olmo": ("olmo2", lambda c: c.with_mixer(qk_norm=None)),
    "no window in olmo": ("olmo3", lambda c: c.with_mixer(window=None)),
    "layers with a window scaled too": (
        "olmo3",
        lambda c: c.with_mixer(position=c.layers[1].mixer.position),
    ),
    "no layer scaled": ("olmo3", lambda c: c.with_mixer(position=c.layers[0].mixer.position)),
    "one expert fewer in flex_olmo": ("flex_olmo", lambda c: c.with_ffn(top_k=2)),
    "a softmax's two best": ("phimoe", lambda c: c.with_ffn(score="softmax", mixer_eps=None)),
    "the mixer's reach halved": ("phimoe", lambda c: c.with_ffn(mixer_eps=0.15)),
    "layer norms without biases": (
        "phimoe",
        lambda c: changed(c, norm=replace(c.final_norm, bias=False)),
    ),
    "the head without its bias": ("phimoe", lambda c: replace(c, head_bias=False)),
    "longrope's shorter list": ("phimoe", lambda c: replace(c, max_seq_len=8)),
    "longrope without its stretch": ("phimoe", lambda c: c.with_mixer(position=rope_with(c, long_scale=1.0))),
    "groups of DeepSeek-V2 by their two best": ("deepseek-v2", lambda c: mixtures_with(c, group_worth="two_best")),
    "DeepSeek-V2 without groups": ("deepseek-v2", lambda c: mixtures_with(c, n_groups=1, top_k_groups=1)),
    "DeepSeek-V2's weights divided by their sum": ("deepseek-v2", lambda c: mixtures_with(c, normalize_p=1.0)),
    "DeepSeek-V2's weights without their factor": ("deepseek-v2", lambda c: mixtures_with(c, routed_scale=1.0)),
    "yarn of DeepSeek-V2 without its attention factor": (
        "deepseek-v2",
        lambda c: c.with_mixer(position=rope_with(c, attention_factor=1.0)),
    ),
    "the softmax scale without yarn's square": ("deepseek-v2-lite", lambda c: c.with_mixer(yarn_mscale=0.0)),
    "DeepSeek-V2-Lite without its shared networks": ("deepseek-v2-lite", lambda c: mixtures_with(c, shared=None)),
    "DeepSeek-V3's softmax scale without yarn's square": ("deepseek-v3", lambda c: c.with_mixer(yarn_mscale=0.0)),
    "DeepSeek-V3's rotation without its own length": (
        "deepseek-v3",
        lambda c: c.with_mixer(position=rope_with(c, attention_factor=1.0)),
    ),
    "latents normed with another epsilon": ("deepseek-v3", lambda c: c.with_mixer(norm_eps=0.01)),
    "groups of DeepSeek-V3 by their best": ("deepseek-v3", lambda c: mixtures_with(c, group_worth="best")),
    "DeepSeek-V3 without groups": ("deepseek-v3", lambda c: mixtures_with(c, n_groups=1, top_k_groups=1)),
    "DeepSeek-V3 without its correction": ("deepseek-v3", lambda c: mixtures_with(c, correction=False)),
    "latents that turn by another base": ("glm4_moe_lite", lambda c: c.with_mixer(position=RopeSpec(theta=10_000.0))),
    "GLM-4.7-Flash without its shared networks": ("glm4_moe_lite", lambda c: mixtures_with(c, shared=None)),
    "one tap fewer": ("lfm2", lambda c: convolutions_with(c, taps=2)),
    "no norms of q and k in lfm2": ("lfm2", lambda c: c.with_mixer(qk_norm=None)),
    "lfm2's weights not scaled": ("lfm2moe", lambda c: mixtures_with(c, routed_scale=1.0)),
    "lfm2 without its correction": ("lfm2moe", lambda c: mixtures_with(c, correction=False)),
    "no gates on attention's output": (
        "qwen3next",
        lambda c: c.with_mixer(output_gate=False),
    ),
    "norms not plus one": ("qwen3next", lambda c: without_plus_one(c)),
    "norms of q and k not plus one": (
        "qwen3next",
        lambda c: c.with_mixer(qk_norm=QKNormSpec(over="head", eps=c.final_norm.eps)),
    ),
    "rates that are no logarithms": ("qwen3next", lambda c: delta_rules_with(c, log_rate=False)),
    "heads of values in another order": ("qwen3next", lambda c: delta_rules_with(c, tiled=True)),
    "three taps of four": ("qwen35moe", lambda c: delta_rules_with(c, taps=3)),
    "qwen3.5 without its shared network": ("qwen35moe", lambda c: mixtures_with(c, shared=None, shared_gate=False)),
    "positions where there are none": ("granitehybrid", lambda c: c.with_mixer(position=RopeSpec(theta=1000.0))),
    "no positions where there are some": ("granitehybrid-dense", lambda c: c.with_mixer(position=None)),
    "granite 4's scores of another scale": ("granitehybrid", lambda c: c.with_mixer(scale=1.0)),
    "granite 4's branches added whole": (
        "granitehybrid",
        lambda c: c.with_layers(lambda layer: replace(layer, residual_scale=1.0)),
    ),
    "granite 4 without its shared network": ("granitehybrid", lambda c: mixtures_with(c, shared=None)),
    "granite 4's weights not divided by their sum": ("granitehybrid", lambda c: mixtures_with(c, normalize_p=None)),
    "no bias behind a convolution": ("granitehybrid", lambda c: state_spaces_with(c, conv_bias=False)),
    "a state's rates that are no logarithms": ("granitehybrid", lambda c: state_spaces_with(c, log_rate=False)),
    "three taps of a state-space layer": ("granitehybrid-dense", lambda c: state_spaces_with(c, taps=3)),
    "one group of heads for two": (
        "granitehybrid-groups",
        lambda c: state_spaces_with(c, n_groups=1, state_dim=28),
    ),
    "gemma 2's scores of the usual scale": ("gemma2", lambda c: c.with_mixer(scale=None)),
    "gemma 2's scores not capped": ("gemma2", lambda c: c.with_mixer(soft_cap=None)),
    "gemma 2's logits not capped": ("gemma2", lambda c: replace(c, logit_cap=None)),
    "gemma 2's norms not less one": ("gemma2", without_plus_one),
    "gemma 2's windows in every layer": ("gemma2", lambda c: c.with_mixer(window=7)),
    "gemma 2 without norms behind its branches": (
        "gemma2",
        lambda c: c.with_layers(lambda layer: replace(layer, post_norms=False)),
    ),
    "gemma 3's windows turn by the other base": (
        "gemma3",
        lambda c: near_layers_with(c, position=RopeSpec(theta=5000.0)),
    ),
    "gemma 3's positions not divided": ("gemma3", lambda c: full_layers_with(c, position=RopeSpec(theta=5000.0))),
    "gemma 3's norms of q and k not less one": (
        "gemma3",
        lambda c: c.with_mixer(qk_norm=QKNormSpec(over="head", eps=1e-5)),
    ),
    "gemma 3 with exact gelu": ("gemma3", lambda c: c.with_ffn(activation="gelu")),
    "mellum's windows one key wider": ("mellum", lambda c: near_layers_with(c, window=8)),
    "mellum's windows scaled too": (
        "mellum",
        lambda c: near_layers_with(c, position=c.layers[1].attention.position),
    ),
    "no norms of q and k in mellum": ("mellum", lambda c: c.with_mixer(qk_norm=None)),
    "mellum's weights not divided by their sum": ("mellum", lambda c: c.with_ffn(normalize_p=None)),
    "granite's windows one key wider": ("granitemoe_swa", lambda c: near_layers_with(c, window=8)),
    "granite's layers all turn": (
        "granitemoe_swa",
        lambda c: full_layers_with(c, position=c.layers[1].attention.position),
    ),
    "granite's layers turn by one base": (
        "granitemoe_swa",
        lambda c: near_layers_with(c, position=c.layers[1].attention.position),
    ),
    "granite without sinks": ("granitemoe_swa", lambda c: c.with_mixer(sinks=False)),
    "granite's dense layers turn by one base": (
        "granite_swa",
        lambda c: near_layers_with(c, position=c.layers[0].attention.position),
    ),
    "granite's dense layers without windows": ("granite_swa", lambda c: c.with_mixer(window=None)),
    "granite's dense layers without sinks": ("granite_swa", lambda c: c.with_mixer(sinks=False)),
    "solar's weights not scaled": ("solar_open", lambda c: mixtures_with(c, routed_scale=1.0)),
    "solar's choice without groups": ("solar_open", lambda c: mixtures_with(c, n_groups=1, top_k_groups=1)),
    "solar's choice without its correction": ("solar_open", lambda c: mixtures_with(c, correction=False)),
    "half of solar's heads turn": (
        "solar_open",
        lambda c: c.with_mixer(position=RopeSpec(theta=1000.0, dim=4)),
    ),
    "qwen3-vl turns by another base": ("qwen3_vl", lambda c: c.with_mixer(position=RopeSpec(theta=10_000.0))),
    "no norms of q and k in qwen3-vl": ("qwen3_vl", lambda c: c.with_mixer(qk_norm=None)),
    "qwen3-vl's weights not divided by their sum": ("qwen3_vl_moe", lambda c: mixtures_with(c, normalize_p=None)),
    "networks whose activation is not squared": ("nemotron_h-dense", lambda c: c.with_ffn(activation="relu")),
    "experts whose activation is not squared": ("nemotron_h", lambda c: mixtures_with(c, activation="relu")),
    "nemotron without its shared network": ("nemotron_h", lambda c: mixtures_with(c, shared=None)),
    "nemotron's weights not scaled": ("nemotron_h", lambda c: mixtures_with(c, routed_scale=1.0)),
    "nemotron's choice without its correction": ("nemotron_h", lambda c: mixtures_with(c, correction=False)),
    "nemotron's attention turns": ("nemotron_h", lambda c: c.with_mixer(position=RopeSpec(theta=1000.0))),
    "no norms of values": ("gemma4", lambda c: c.with_mixer(v_norm_eps=None)),
    "gemma's scores of the usual scale": ("gemma4", lambda c: c.with_mixer(scale=None)),
    "no norms of q and k in gemma": ("gemma4", lambda c: c.with_mixer(qk_norm=None)),
    "whole heads turn": ("gemma4", lambda c: full_layers_with(c, position=RopeSpec(theta=5000.0))),
    "the first numbers of a head turn": (
        "gemma4",
        lambda c: full_layers_with(c, position=RopeSpec(theta=5000.0, dim=12)),
    ),
    "windows of gemma one key wider": (
        "gemma4",
        lambda c: c.with_layers(
            lambda layer: (
                layer if layer.attention.window is None else replace(layer, mixer=replace(layer.attention, window=8))
            )
        ),
    ),
    "the stream not scaled": ("gemma4", lambda c: c.with_layers(lambda layer: replace(layer, scaled=False))),
    "no norms behind gemma's branches": (
        "gemma4",
        lambda c: c.with_layers(lambda layer: replace(layer, post_norms=False)),
    ),
    "router and experts read what the network reads": ("gemma4", lambda c: mixtures_with(c, apart=False)),
    "logits not capped": ("gemma4", lambda c: replace(c, logit_cap=None)),
    "gemma's embeddings not scaled": ("gemma4", lambda c: replace(c, embedding_scale=1.0)),
    "tanh gelu": ("mpt", lambda c: c.with_ffn(activation="gelu_tanh")),
    "alibi bias 6": ("mpt", lambda c: c.with_mixer(position=AlibiSpec(max_bias=6.0))),
    "no clipping in mpt": ("mpt-clipped", lambda c: c.with_mixer(clip_qkv=None)),
    "exact gelu": ("grok1", lambda c: c.with_ffn(activation="gelu")),
    "no soft cap": ("grok1", lambda c: c.with_mixer(soft_cap=None)),
    "logits not scaled": ("grok1", lambda c: replace(c, logit_scale=1.0)),
    "embeddings not scaled": ("grok1", lambda c: replace(c, embedding_scale=1.0)),
}
FINER_THAN_BF16 = {
    "granite's layers turn by one base",
    "granite's dense layers turn by one base",
    "qwen3-vl's weights not divided by their sum",
    "groups of DeepSeek-V2 by their two best",
    "latents normed with another epsilon",
    "epsilon 3e-5",
    "q and k normed with another epsilon",
    "tanh gelu",
    "exact gelu",
    "no soft cap",
    "whole heads turn",
    "gemma 3 with exact gelu",
    "layers with a window scaled too",
    "longrope without its stretch",
}
"""Mistakes smaller than bf16's own rounding: only float32 can show them."""
