"""Gemma 2 (Google, June 2024): windows in every second layer, soft caps on scores and on logits.

The block is stated in :mod:`quadriga.model.families.gemma_blocks`. Scores are divided by the root of
``query_pre_attn_scalar``, which only the largest model has apart from its heads' width. Sources: transformers 4.57.6
and 5.24.0 (configuration and modeling_gemma2; files from before ``layer_types`` have the pattern in the program),
llama.cpp (arch gemma2; conversion/gemma.py, src/models/gemma2.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quadriga.model.config import AttentionSpec, ModelConfig, NormSpec, RopeSpec, countable
from quadriga.model.families import gemma_blocks, gguf_keys
from quadriga.model.families.base import Family, must_read_back
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.llama2 import HF_TIED, common_from_gguf
from quadriga.model.families.rope_keys import rope_from_hf
from quadriga.model.families.windows import kinds_of
from quadriga.model.weight_map import Shape

NAME = "gemma2"
_LARGEST = 46
"""Layers of the 27B model, by which llama.cpp knows its scale of scores."""


def _preset(*, d_model: int, n_layers: int, heads: tuple[int, int, int], d_ff: int, scalar: int) -> ModelConfig:
    n_heads, n_kv_heads, head_dim = heads
    plain = AttentionSpec(
        n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, position=RopeSpec(theta=10_000.0), soft_cap=50.0
    )
    far = gguf_keys.with_scale(plain, scalar**-0.5)
    return gemma_blocks.model_of(
        NAME,
        replace(far, window=4096),
        far,
        gemma_blocks.every_nth_full(n_layers, 2),
        d_ff,
        NormSpec(kind="rms", eps=1e-6, plus_one=True),
        d_model=d_model,
        vocab_size=256_000,
        max_seq_len=8192,
        tied_embeddings=True,
        logit_cap=30.0,
        bos_id=2,
        eos_ids=(1,),
        pad_id=0,
    )


PRESETS = {
    "gemma-2-2b": _preset(d_model=2304, n_layers=26, heads=(8, 4, 256), d_ff=9216, scalar=256),
    "gemma-2-9b": _preset(d_model=3584, n_layers=42, heads=(16, 8, 256), d_ff=14_336, scalar=256),
    "gemma-2-27b": _preset(d_model=4608, n_layers=46, heads=(32, 16, 128), d_ff=36_864, scalar=144),
}


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a Gemma 2 config.json, as transformers 4 or 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", NAME)
    n_layers, head_dim = countable(keys.integer("num_hidden_layers")), keys.integer("head_dim")
    common = gemma_blocks.common_from_hf(keys, keys.integer("hidden_size"))
    plain = AttentionSpec(
        n_heads=keys.integer("num_attention_heads"),
        n_kv_heads=keys.integer("num_key_value_heads"),
        head_dim=head_dim,
        position=rope_from_hf(keys, head_dim, common["max_seq_len"]),
        soft_cap=gemma_blocks.cap_of(keys, "attn_logit_softcapping"),
    )
    far = gguf_keys.with_scale(plain, max(1e-9, keys.number("query_pre_attn_scalar")) ** -0.5)
    config = gemma_blocks.model_of(
        NAME,
        replace(far, window=keys.integer("sliding_window")),
        far,
        gemma_blocks.slides_from_hf(keys, n_layers, 2),
        keys.integer("intermediate_size"),
        NormSpec(kind="rms", eps=keys.number("rms_norm_eps"), plus_one=True),
        **common,
    )
    keys.finish(PRETRAINED_KEYS)
    return config


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "Gemma 2's config.json"
    _, far, _ = kinds_of(config, form)
    raw = {
        **gemma_blocks.common_to_hf(config, form),
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": NAME,
        "rope_theta": gemma_blocks.plain_rope(far, form),
    }
    must_read_back(config, config_from_hf(raw), form)
    return raw


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``gemma2``."""
    keys = gguf_keys.architecture_keys(metadata, NAME)
    common = common_from_gguf(keys, metadata, shapes)
    n_layers, norm, mixer = countable(common.pop("n_layers")), common.pop("norm"), common.pop("mixer")
    keys.must_be("attention.sliding_window_pattern", 2)
    # llama.cpp: what a file does not say is 50, 30 and 4096.
    caps = [
        gguf_keys.number(keys, key) if keys.given(key) else missing
        for key, missing in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))
    ]
    scaled = gemma_blocks.stored_scale(mixer, common["d_model"], largest=n_layers == _LARGEST)
    far = replace(scaled, window=None, soft_cap=caps[0])
    window = keys.integer("attention.sliding_window") if keys.given("attention.sliding_window") else 4096
    config = gemma_blocks.model_of(
        NAME,
        replace(far, window=window),
        far,
        gemma_blocks.every_nth_full(n_layers, 2),
        keys.integer("feed_forward_length"),
        norm,
        logit_cap=caps[1],
        **common,
    )
    keys.finish(gguf_keys.IGNORED)
    return config


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``gemma2``, of a model in :func:`gemma_blocks.gguf_form`."""
    form = f"GGUF arch {NAME}"
    _, far, _ = kinds_of(config, form)
    caps = {"attn_logit_softcapping": far.soft_cap, "final_logit_softcapping": config.logit_cap}
    written = gemma_blocks.to_gguf(config, NAME, form)
    written |= {f"{NAME}.{key}": cap for key, cap in caps.items() if cap is not None}
    gguf_keys.must_read_back(config, config_from_gguf, written, form)
    return written


FAMILY = Family(
    name=NAME,
    presets=PRESETS,
    model_types=(NAME,),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={"hf": gemma_blocks.hf_map},
    gguf_archs=(NAME,),
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_form=gemma_blocks.gguf_form,
    hf_form=gemma_blocks.hf_form,
    gguf_map=gemma_blocks.gguf_map,
    tied_copies=HF_TIED,
)
