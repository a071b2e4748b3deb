"""Metadata of GGUF files of Qwen3-Next and Qwen3.5, and the form that their numbers have there.

Sources: see :mod:`quadriga.model.families.qwen3next`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from quadriga.errors import ConfigError
from quadriga.model.config import (
    AttentionSpec,
    DeltaNetSpec,
    DenseSpec,
    LayerSpec,
    ModelConfig,
    MoESpec,
    RopeSpec,
    countable,
    uniform,
)
from quadriga.model.families import gguf_keys
from quadriga.model.families.base import of_kind
from quadriga.model.families.llama2 import (
    common_from_gguf,
    common_to_gguf,
)
from quadriga.model.families.qwen3next_layers import delta_of, model_of
from quadriga.model.weight_map import Shape


def next_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``qwen3next``."""
    return _from_gguf("qwen3next", "qwen3next", metadata, shapes)


def moe_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``qwen35moe``."""
    return _from_gguf("qwen35moe", "qwen35moe", metadata, shapes)


def dense_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``qwen35``."""
    return _from_gguf("qwen35", "qwen35", metadata, shapes)


def _from_gguf(family: str, arch: str, metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    # Sections of a head that turn with height and width of pictures; for text they turn alike.
    plain_text = {key: value for key, value in metadata.items() if key != f"{arch}.rope.dimension_sections"}
    keys = gguf_keys.architecture_keys(plain_text, arch)
    common = common_from_gguf(keys, metadata, shapes)
    n_more = keys.integer("nextn_predict_layers") if keys.has("nextn_predict_layers") else 0
    n_layers = countable(common["n_layers"] - n_more)
    ffn: DenseSpec | MoESpec
    if arch == "qwen35":
        ffn = DenseSpec(d_ff=keys.integer("feed_forward_length"), activation="silu")
    else:
        keys.has("feed_forward_length")
        d_ff, shared = keys.integer("expert_feed_forward_length"), keys.integer("expert_shared_feed_forward_length")
        plain = gguf_keys.plain_experts(keys, d_ff, shared=DenseSpec(d_ff=shared, activation="silu"))
        ffn = replace(plain, shared_gate=True)
    n_v_heads, inner = keys.integer("ssm.time_step_rank"), keys.integer("ssm.inner_size")
    if n_v_heads < 1 or inner % n_v_heads:
        raise ConfigError(f"GGUF ssm.inner_size must be a multiple of ssm.time_step_rank, got {inner} and {n_v_heads}")
    delta = DeltaNetSpec(
        n_k_heads=keys.integer("ssm.group_count"),
        n_v_heads=n_v_heads,
        k_dim=keys.integer("ssm.state_size"),
        v_dim=inner // n_v_heads,
        taps=keys.integer("ssm.conv_kernel"),
        eps=common["norm"].eps,
        log_rate=False,
        tiled=arch != "qwen3next",
    )
    # llama.cpp: every fourth layer is attention where a file does not say.
    every = keys.integer("full_attention_interval") if keys.has("full_attention_interval") else 4
    if every < 1:
        raise ConfigError(f"GGUF full_attention_interval must be 1 or more, got {every}")
    config = model_of(family, common, [ffn] * n_layers, [(i + 1) % every == 0 for i in range(n_layers)], delta)
    keys.finish(gguf_keys.IGNORED)
    return config


def _restated(config: ModelConfig, *, gguf: bool) -> ModelConfig:
    """The same model with its numbers as GGUF files keep them, or as Hugging Face directories do."""

    def change(layer: LayerSpec) -> LayerSpec:
        mixer = layer.mixer
        if isinstance(mixer, DeltaNetSpec):
            mixer = replace(mixer, log_rate=not gguf, tiled=gguf and config.family != "qwen3next")
        elif isinstance(mixer, AttentionSpec) and mixer.qk_norm is not None:
            mixer = replace(mixer, qk_norm=replace(mixer.qk_norm, plus_one=not gguf))
        return replace(layer, mixer=mixer, norm=replace(layer.norm, plus_one=not gguf))

    return replace(config.with_layers(change), final_norm=replace(config.final_norm, plus_one=not gguf))


def gguf_form(config: ModelConfig) -> ModelConfig:
    """Norms plus one, negative rates and, in Qwen3.5's archs, heads of v by turns."""
    return _restated(config, gguf=True)


def hf_form(config: ModelConfig) -> ModelConfig:
    """Norms less one, logarithms of rates, heads of v by their head of k."""
    return _restated(config, gguf=False)


def next_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``qwen3next``, of a model in :func:`gguf_form`."""
    return _to_gguf(config, "qwen3next", next_from_gguf)


def moe_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``qwen35moe``, of a model in :func:`gguf_form`."""
    return _to_gguf(config, "qwen35moe", moe_from_gguf)


def dense_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``qwen35``, of a model in :func:`gguf_form`."""
    return _to_gguf(config, "qwen35", dense_from_gguf)


def _to_gguf(
    config: ModelConfig, arch: str, read: Callable[[Mapping[str, object], Mapping[str, Shape]], ModelConfig]
) -> dict[str, object]:
    form = f"GGUF arch {arch}"
    first, delta = config.first_attention(), delta_of(config, form)
    alike = replace(config, layers=uniform(first, config.n_layers))
    written = {
        **common_to_gguf(alike, form, arch),
        f"{arch}.full_attention_interval": config.layers.index(first) + 1,
        f"{arch}.ssm.conv_kernel": delta.taps,
        f"{arch}.ssm.state_size": delta.k_dim,
        f"{arch}.ssm.group_count": delta.n_k_heads,
        f"{arch}.ssm.time_step_rank": delta.n_v_heads,
        f"{arch}.ssm.inner_size": delta.value_dim,
    }
    if arch != "qwen35":
        moe = config.only_moe(form)
        written |= gguf_keys.expert_keys(alike, arch)
        written[f"{arch}.expert_shared_feed_forward_length"] = of_kind(moe.shared, DenseSpec, form).d_ff
    if arch != "qwen3next":  # llama.cpp asks for them; for text any that take in all pairs do
        attn = first.attention
        pairs = (of_kind(attn.position, RopeSpec, form).dim or attn.head_dim) // 2
        written[f"{arch}.rope.dimension_sections"] = [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3, 0]
    gguf_keys.must_read_back(config, read, written, form)
    return written
