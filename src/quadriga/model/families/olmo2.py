"""OLMo 2 and 3 (Ai2, November 2024 and 2025): LLaMA's pieces with norms behind attention and network, none before.

    h = h + norm(attention(h)),  h = h + norm(ffn(h));  q and k are normed over all heads together

OLMo 3 has a window in three of four layers, which rotate by the plain frequencies; YaRN bends the other layers' alone.
A model without windows and scaling is written as ``olmo2``, any other as ``olmo3``. Sources: transformers 4.57.6
(configuration and modeling of olmo2 and olmo3), llama.cpp (arch olmo2 for both, every fourth layer without a window,
which its program fixes; rotary halves lie as in Hugging Face's files).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quadriga.errors import ConfigError
from quadriga.model.config import (
    AttentionSpec,
    DenseSpec,
    LayerSpec,
    ModelConfig,
    NormSpec,
    QKNormSpec,
    RopeSpec,
    YarnScaling,
    countable,
    in_order,
    uniform,
)
from quadriga.model.families import gguf_keys, windows
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.llama2 import (
    GGUF_COMMON,
    GGUF_FFN,
    HF_COMMON,
    HF_FFN,
    HF_TIED,
    common_from_gguf,
    common_from_hf,
    common_to_gguf,
    common_to_hf,
    hf_qkv,
)
from quadriga.model.families.pieces import copies
from quadriga.model.families.qwen3 import GGUF_QK_NORMS, HF_QK_NORMS
from quadriga.model.families.rope_keys import usual_attention_factor
from quadriga.model.weight_map import Piece, Shape

_STEP = 4


def every_fourth_full(n_layers: int) -> list[bool]:
    """Which layers have a window in the published OLMo 3, and in llama.cpp."""
    return [(i + 1) % _STEP != 0 for i in range(n_layers)]


def _layers(layer: LayerSpec, slides: Sequence[bool], window: int | None) -> tuple[LayerSpec, ...]:
    """Layers of which some have a window and plain frequencies; ``layer`` is one of the others."""
    rope = of_kind(layer.attention.position, RopeSpec, "OLMo")
    mixer = replace(layer.attention, window=None)
    sliding = replace(mixer, window=window, position=replace(rope, scaling=None))
    return in_order(replace(layer, mixer=sliding if slid else mixer) for slid in slides)


def _preset(
    d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, d_ff: int, *, third: bool = False
) -> ModelConfig:
    norm = NormSpec(kind="rms", eps=1e-6)
    yarn = YarnScaling(factor=8.0, original_max_seq_len=8192, attention_factor=usual_attention_factor(8.0))
    layer = LayerSpec(
        norm=norm,
        mixer=AttentionSpec(
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=128,
            position=RopeSpec(theta=500_000.0, scaling=yarn if third else None),
            qk_norm=QKNormSpec(over="vector", eps=norm.eps),
        ),
        ffn=DenseSpec(d_ff=d_ff, activation="silu"),
        pre_norms=False,
        post_norms=True,
    )
    slides = every_fourth_full(n_layers) if third else [False] * n_layers
    return ModelConfig(
        family="olmo2",
        vocab_size=100_278 if third else 100_352,
        d_model=d_model,
        max_seq_len=65_536 if third else 4096,
        layers=_layers(layer, slides, 4096),
        final_norm=norm,
        eos_ids=(100_257,),
        pad_id=100_277,
    )


PRESETS = {
    "olmo2-1b": _preset(2048, 16, 16, 16, 8192),
    "olmo2-7b": _preset(4096, 32, 32, 32, 11_008),
    "olmo2-13b": _preset(5120, 40, 40, 40, 13_824),
    "olmo2-32b": _preset(5120, 64, 40, 8, 27_648),
    "olmo3-7b": _preset(4096, 32, 32, 32, 11_008, third=True),
    "olmo3-32b": _preset(5120, 64, 40, 8, 27_648, third=True),
}


def _model(common: dict[str, Any], ffn: DenseSpec, slides: Sequence[bool], tied: bool) -> ModelConfig:
    norm, mixer = common.pop("norm"), common.pop("mixer")
    window, mixer = mixer.window, replace(mixer, qk_norm=QKNormSpec(over="vector", eps=norm.eps))
    layer = LayerSpec(norm=norm, mixer=mixer, ffn=ffn, pre_norms=False, post_norms=True)
    layers = _layers(layer, slides, window)
    return ModelConfig(family="olmo2", layers=layers, final_norm=norm, tied_embeddings=tied, **common)


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read an OLMo 2 or 3 config.json, as transformers 4 or 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "olmo2", "olmo3")
    keys.must_be("hidden_act", "silu")
    keys.integer("num_key_value_heads")  # every published file has it
    ffn = DenseSpec(d_ff=keys.integer("intermediate_size"), activation="silu")
    common = common_from_hf(keys, biases=True)
    n_layers = countable(common.pop("n_layers"))
    slides = [False] * n_layers
    if keys.text("model_type") == "olmo3":
        if not keys.has("layer_types"):  # the class has a pattern of its own
            keys.integers("layer_types")
        slides = windows.sliding_layers(keys, n_layers)
        keys.number_or_null("sliding_window")  # its default is 4096, so null and absent are not the same
        common["mixer"] = replace(common["mixer"], window=windows.for_all(keys, common["max_seq_len"]))
    config = _model(common, ffn, slides, keys.flag("tie_word_embeddings"))
    keys.finish(PRETRAINED_KEYS)
    return config


def _as_written(config: ModelConfig, form: str) -> tuple[ModelConfig, list[bool], int | None]:
    """The model with all layers like those that see all; which have a window or plain frequencies; and the window."""
    ropes = [of_kind(layer.attention.position, RopeSpec, form) for layer in config.layers]
    scaled = any(rope.scaling is not None for rope in ropes)
    sizes = [layer.attention.window for layer in config.layers]
    pairs = zip(sizes, ropes, strict=True)
    slides = [size is not None or (scaled and rope.scaling is None) for size, rope in pairs]
    if all(slides) and slides:
        raise ConfigError(f"{form} cannot express this model: all of its layers have a window")
    full = config.layers[slides.index(False)]
    of_kind(full.ffn, DenseSpec, form)
    # A window as long as the context is none, and its layer may still rotate by plain frequencies.
    window = next((size for size in sizes if size is not None), config.max_seq_len) if any(slides) else None
    return replace(config, layers=uniform(full, config.n_layers)), slides, window


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "OLMo's config.json"
    written, slides, window = _as_written(config, form)
    rope = of_kind(written.layers[0].attention.position, RopeSpec, form)
    raw: dict[str, object] = {
        **common_to_hf(written, form),
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
    }
    if any(slides) or rope.scaling is not None:
        raw |= {
            "architectures": ["Olmo3ForCausalLM"],
            "model_type": "olmo3",
            "sliding_window": window,
            "layer_types": [windows.SLIDING if slid else windows.FULL for slid in slides],
        }
    must_read_back(config, config_from_hf(raw), form)
    return raw


_LAYER = "model.layers.{i}."


def without_pre_norms(names: Mapping[str, str]) -> dict[str, str]:
    """A table of tensors without those of norms that a layer does not have."""
    return {
        name: target for name, target in names.items() if not target.endswith(("attn_norm.weight", "ffn_norm.weight"))
    }


HF_POST_NORMS = {
    _LAYER + "post_attention_layernorm.weight": "layers.{i}.attn_post_norm.weight",
    _LAYER + "post_feedforward_layernorm.weight": "layers.{i}.ffn_post_norm.weight",
}


def hf_attention(config: ModelConfig) -> list[Piece]:
    """Everything but networks, as transformers names it."""
    return copies(config, without_pre_norms(HF_COMMON) | HF_QK_NORMS | HF_POST_NORMS) + hf_qkv(config)


def hf_layout(config: ModelConfig) -> list[Piece]:
    """Every tensor as transformers names it."""
    return hf_attention(config) + copies(config, HF_FFN)


_GGUF = without_pre_norms(GGUF_COMMON) | GGUF_QK_NORMS | {
    "blk.{i}.post_attention_norm.weight": "layers.{i}.attn_post_norm.weight",
    "blk.{i}.post_ffw_norm.weight": "layers.{i}.ffn_post_norm.weight",
}  # fmt: skip


def gguf_map(config: ModelConfig) -> list[Piece]:
    """Every tensor of arch ``olmo2``."""
    return copies(config, _GGUF | GGUF_FFN) + gguf_keys.projections(config, interleaved=False)


_PATTERN = "olmo2.attention.sliding_window_pattern"


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``olmo2``."""
    said = {key: value for key, value in metadata.items() if key != _PATTERN}
    keys = gguf_keys.architecture_keys(said, "olmo2")
    ffn = DenseSpec(d_ff=keys.integer("feed_forward_length"), activation="silu")
    common = common_from_gguf(keys, metadata, shapes)
    n_layers = countable(common.pop("n_layers"))
    # llama.cpp: a window of 0 is none; any other is that of three layers of four, whatever the pattern says.
    windowed = keys.given("attention.sliding_window") and keys.integer("attention.sliding_window") > 0
    slides = every_fourth_full(n_layers) if windowed else [False] * n_layers
    if windowed and _PATTERN in metadata and metadata[_PATTERN] != slides:
        raise ConfigError(
            f"GGUF {_PATTERN} must name three layers of four, as llama.cpp computes, got {str(metadata[_PATTERN])[:80]}"
        )
    tied = common.pop("tied_embeddings")
    config = _model(common, ffn, slides, tied)
    keys.finish(gguf_keys.IGNORED)
    return config


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``olmo2``.

    Raises:
        ConfigError: other layers than three of four have a window.
    """
    form = "GGUF arch olmo2"
    written, _, window = _as_written(config, form)
    metadata = common_to_gguf(written.with_mixer(window=window), form, "olmo2")
    gguf_keys.must_read_back(config, config_from_gguf, metadata, form)
    return metadata


FAMILY = Family(
    name="olmo2",
    presets=PRESETS,
    model_types=("olmo2", "olmo3"),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={"hf": hf_layout},
    gguf_archs=("olmo2",),
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_map=gguf_map,
    counterpart="flex_olmo",
    tied_copies=HF_TIED,
)
