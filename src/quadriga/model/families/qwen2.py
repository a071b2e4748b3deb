"""Qwen2 and Qwen2.5 (Alibaba, from June 2024): LLaMA's block with a bias on q, k and v.

The small sizes tie their embeddings. A configuration may give the layers from ``max_window_layers`` on a window; every
published one says it is not used. Sources: transformers 4.57.6 and 5.24.0 (configuration_qwen2, modeling_qwen2),
llama.cpp (arch qwen2, whose rotary halves lie as in Hugging Face's files).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quadriga.errors import ConfigError
from quadriga.model.config import (
    AttentionSpec,
    DenseSpec,
    LayerSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
    countable,
    in_order,
    uniform_model,
)
from quadriga.model.families import gguf_keys, windows
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.llama2 import (
    GGUF_COMMON,
    GGUF_FFN,
    HF_TIED,
    common_from_gguf,
    common_from_hf,
    common_to_gguf,
    common_to_hf,
    hf_layout,
)
from quadriga.model.families.pieces import copies
from quadriga.model.weight_map import Piece, Shape

IGNORED = PRETRAINED_KEYS | {"use_mrope"}
"""use_mrope: a mark of the vision models' code; for text the positions are the usual ones."""


def _preset(
    *, d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, d_ff: int, tied: bool, vocab_size: int = 151_936
) -> ModelConfig:
    return uniform_model(
        family="qwen2",
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        max_seq_len=32_768,
        norm=NormSpec(kind="rms", eps=1e-6),
        mixer=AttentionSpec(
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=d_model // n_heads,
            position=RopeSpec(theta=1_000_000.0),
            qkv_bias=True,
        ),
        ffn=DenseSpec(d_ff=d_ff, activation="silu"),
        tied_embeddings=tied,
        bos_id=151_643,
        eos_ids=(151_645,),
    )


PRESETS = {
    "qwen2.5-0.5b": _preset(d_model=896, n_layers=24, n_heads=14, n_kv_heads=2, d_ff=4864, tied=True),
    "qwen2.5-1.5b": _preset(d_model=1536, n_layers=28, n_heads=12, n_kv_heads=2, d_ff=8960, tied=True),
    "qwen2.5-7b": _preset(
        d_model=3584, n_layers=28, n_heads=28, n_kv_heads=4, d_ff=18_944, tied=False, vocab_size=152_064
    ),
}


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a Qwen2 config.json, as transformers 4 or 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "qwen2")
    keys.must_be("hidden_act", "silu")
    ffn = DenseSpec(d_ff=keys.integer("intermediate_size"), activation="silu")
    common = common_from_hf(keys)
    n_layers = countable(common.pop("n_layers"))
    first = keys.integer("max_window_layers") if keys.given("max_window_layers") else None
    slides = None if first is None else lambda i: i >= first
    widths = windows.by_layer(keys, n_layers, common["max_seq_len"], slides)
    config = _with_windows(common, ffn, widths, keys.flag("tie_word_embeddings"))
    keys.finish(IGNORED)
    return config


def _with_windows(common: dict[str, Any], ffn: DenseSpec, widths: list[int | None], tied: bool) -> ModelConfig:
    norm, attention = common.pop("norm"), replace(common.pop("mixer"), qkv_bias=True)
    return ModelConfig(
        family="qwen2",
        layers=in_order(LayerSpec(norm=norm, mixer=replace(attention, window=width), ffn=ffn) for width in widths),
        final_norm=norm,
        tied_embeddings=tied,
        **common,
    )


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "Qwen2's config.json"
    of_kind(config.layers[0].ffn, DenseSpec, form)
    raw = common_to_hf(config, form) | windows.to_hf(config.layers)
    # The class takes the head's size from the other two, and q, k and v have a bias whatever a file says.
    del raw["head_dim"], raw["attention_bias"]
    raw |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_window_layers": config.n_layers}
    must_read_back(config, config_from_hf(raw), form)
    return raw


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``qwen2``."""
    keys = gguf_keys.architecture_keys(metadata, "qwen2")
    ffn = DenseSpec(d_ff=keys.integer("feed_forward_length"), activation="silu")
    config = uniform_model(family="qwen2", ffn=ffn, **common_from_gguf(keys, metadata, shapes))
    if not config.layers[0].attention.qkv_bias:
        raise ConfigError("a GGUF of arch qwen2 must have blk.0.attn_q.bias, and has none. Is the file complete?")
    keys.finish(gguf_keys.IGNORED)
    return config


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``qwen2``."""
    form = "GGUF arch qwen2"
    of_kind(config.only_layer(form).ffn, DenseSpec, form)
    metadata = common_to_gguf(config, form, "qwen2")
    gguf_keys.must_read_back(config, config_from_gguf, metadata, form)
    return metadata


def gguf_map(config: ModelConfig) -> list[Piece]:
    """Every tensor of arch ``qwen2``."""
    return copies(config, GGUF_COMMON | GGUF_FFN) + gguf_keys.projections(config, interleaved=False)


FAMILY = Family(
    name="qwen2",
    presets=PRESETS,
    model_types=("qwen2",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={"hf": hf_layout},
    gguf_archs=("qwen2",),
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_map=gguf_map,
    tied_copies=HF_TIED,
)
