"""Gemma 3 (Google, March 2025), its text: five layers with a window to one without, norms of every head's q and k.

The block is stated in :mod:`quadriga.model.families.gemma_blocks`. Layers with a window turn by a base of their own; in
the models that see pictures (4B and larger) the others' positions are divided by eight. Those models' files leave most
of the text's keys to the class's defaults (``class_defaults``); the parts that read pictures are left out by name.
Sources: transformers 4.57.6 and 5.24.0 (configuration and modeling_gemma3), llama.cpp (arch gemma3;
conversion/gemma.py, src/models/gemma3.cpp), whose layers with a window turn by 10000 where a file does not say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quadriga.model.config import (
    AttentionSpec,
    LinearScaling,
    ModelConfig,
    NormSpec,
    QKNormSpec,
    RopeSpec,
    countable,
)
from quadriga.model.families import class_defaults, gemma_blocks, gguf_keys
from quadriga.model.families.base import Family, MapBuilder, must_read_back, of_kind
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.llama2 import HF_TIED, common_from_gguf
from quadriga.model.families.pieces import WITHIN, under
from quadriga.model.families.rope_keys import rope_from_hf, rope_to_hf, ropes_by_kind
from quadriga.model.families.windows import kinds_of
from quadriga.model.weight_map import Shape

NAME, _TEXT = "gemma3", "gemma3_text"
_LARGEST = 62
"""Layers of the 27B model, by which llama.cpp knows its scale of scores."""
_PERIOD = 6
_PICTURES = frozenset(
    {
        *("vision_config", "mm_tokens_per_image", "image_token_index", "image_token_id"),
        *("boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id"),
    }
)
IGNORED = PRETRAINED_KEYS | {"_sliding_window_pattern"}
"""transformers' own note of the key without the line."""


def _preset(
    *, d_model: int, n_layers: int, heads: tuple[int, int, int], d_ff: int, window: int, small: bool, scalar: int = 256
) -> ModelConfig:
    eps = 1e-6
    plain = AttentionSpec(
        n_heads=heads[0],
        n_kv_heads=heads[1],
        head_dim=heads[2],
        position=RopeSpec(theta=1_000_000.0, scaling=None if small else LinearScaling(factor=8.0)),
        qk_norm=QKNormSpec(over="head", eps=eps, plus_one=True),
    )
    far = gguf_keys.with_scale(plain, scalar**-0.5)
    return gemma_blocks.model_of(
        NAME,
        replace(far, window=window, position=RopeSpec(theta=10_000.0)),
        far,
        gemma_blocks.every_nth_full(n_layers, _PERIOD),
        d_ff,
        NormSpec(kind="rms", eps=eps, plus_one=True),
        d_model=d_model,
        vocab_size=262_144 if small else 262_208,
        max_seq_len=32_768 if small else 131_072,
        tied_embeddings=True,
        bos_id=2,
        eos_ids=(1, 106),
        pad_id=0,
    )


PRESETS = {
    "gemma-3-270m": _preset(d_model=640, n_layers=18, heads=(4, 1, 256), d_ff=2048, window=512, small=True),
    "gemma-3-1b": _preset(d_model=1152, n_layers=26, heads=(4, 1, 256), d_ff=6912, window=512, small=True),
    "gemma-3-4b": _preset(d_model=2560, n_layers=34, heads=(8, 4, 256), d_ff=10_240, window=1024, small=False),
    "gemma-3-12b": _preset(d_model=3840, n_layers=48, heads=(16, 8, 256), d_ff=15_360, window=1024, small=False),
    "gemma-3-27b": _preset(
        d_model=5376, n_layers=62, heads=(32, 16, 128), d_ff=21_504, window=1024, small=False, scalar=168
    ),
}


# config.json ---------------------------------------------------------------------------------------------------------


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read Gemma 3's config.json, of the whole model or of its text alone."""
    keys = Keys(_text_of(raw)[0], "config.json")
    keys.must_be("model_type", _TEXT)
    n_layers, head_dim = countable(keys.integer("num_hidden_layers")), keys.integer("head_dim")
    common = gemma_blocks.common_from_hf(keys, keys.integer("hidden_size"))
    keys.must_be("attn_logit_softcapping", None)  # the class has the key, its program no cap
    eps = keys.number("rms_norm_eps")
    near, far = _ropes(keys, head_dim, common["max_seq_len"])
    plain = AttentionSpec(
        n_heads=keys.integer("num_attention_heads"),
        n_kv_heads=keys.integer("num_key_value_heads"),
        head_dim=head_dim,
        position=far,
        qk_norm=QKNormSpec(over="head", eps=eps, plus_one=True),
    )
    full = gguf_keys.with_scale(plain, max(1e-9, keys.number("query_pre_attn_scalar")) ** -0.5)
    period = keys.integer("sliding_window_pattern") if keys.given("sliding_window_pattern") else _PERIOD
    config = gemma_blocks.model_of(
        NAME,
        replace(full, position=near, window=keys.integer("sliding_window")),
        full,
        gemma_blocks.slides_from_hf(keys, n_layers, period),
        keys.integer("intermediate_size"),
        NormSpec(kind="rms", eps=eps, plus_one=True),
        **common,
    )
    keys.finish(IGNORED)
    return config


def _text_of(raw: Mapping[str, object]) -> tuple[Mapping[str, object], list[str]]:
    """The text's keys, of the whole model's file or of its own, with its class's defaults, and what these are."""
    outer = Keys(raw, "config.json")
    if outer.text("model_type") != NAME:
        return class_defaults.filled(raw)
    section = outer.mapping("text_config")
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    said = {key: outer.value(key) for key in (*ids, "tie_word_embeddings") if outer.has(key)}
    outer.finish(PRETRAINED_KEYS | _PICTURES)
    return class_defaults.filled({**said, **section})


def _ropes(keys: Keys, head_dim: int, max_seq_len: int) -> tuple[RopeSpec, RopeSpec]:
    """The rotation of layers with a window, and of those without: two keys, or in transformers 5 two sections."""
    if not keys.given("rope_parameters"):
        return RopeSpec(theta=keys.number("rope_local_base_freq")), rope_from_hf(keys, head_dim, max_seq_len)
    near, far = ropes_by_kind(keys, head_dim, max_seq_len)
    for key, rope in (("rope_theta", far), ("rope_local_base_freq", near)):
        keys.must_be(key, rope.theta)
    return near, far


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json of the text alone, as transformers 4.57.6 reads it."""
    form = "Gemma 3's config.json"
    near, far, _ = kinds_of(config, form)
    raw = {
        **gemma_blocks.common_to_hf(config, form),
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": _TEXT,
        **rope_to_hf(of_kind(far.position, RopeSpec, form), far.head_dim, form),
        "rope_local_base_freq": gemma_blocks.plain_rope(near, form),
    }
    must_read_back(config, config_from_hf(raw), form)
    return raw


def _under(prefix: str) -> MapBuilder:
    return lambda config: under(prefix, gemma_blocks.hf_map(config))


# GGUF ----------------------------------------------------------------------------------------------------------------


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``gemma3``."""
    keys = gguf_keys.architecture_keys(metadata, NAME)
    common = common_from_gguf(keys, metadata, shapes)
    n_layers, norm, mixer = countable(common.pop("n_layers")), common.pop("norm"), common.pop("mixer")
    keys.must_be("attention.sliding_window_pattern", _PERIOD)
    keys.must_be("final_logit_softcapping", 0)  # llama.cpp heeds it where no layer has a window alone
    local = gguf_keys.number(keys, "rope.freq_base_swa") if keys.given("rope.freq_base_swa") else 10_000.0
    scaled = gemma_blocks.stored_scale(mixer, common["d_model"], largest=n_layers == _LARGEST)
    far = replace(scaled, window=None, qk_norm=QKNormSpec(over="head", eps=norm.eps))
    config = gemma_blocks.model_of(
        NAME,
        replace(far, window=keys.integer("attention.sliding_window"), position=RopeSpec(theta=local)),
        far,
        gemma_blocks.every_nth_full(n_layers, _PERIOD),
        keys.integer("feed_forward_length"),
        norm,
        **common,
    )
    keys.finish(gguf_keys.IGNORED)
    return config


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``gemma3``, of a model in :func:`gemma_blocks.gguf_form`."""
    form = f"GGUF arch {NAME}"
    near, _, _ = kinds_of(config, form)
    written = gemma_blocks.to_gguf(config, NAME, form)
    written[f"{NAME}.rope.freq_base_swa"] = gemma_blocks.plain_rope(near, form)
    gguf_keys.must_read_back(config, config_from_gguf, written, form)
    return written


def notes(raw: Mapping[str, object]) -> list[str]:
    """What is said of the parts that are left out, and of keys that the text's own section leaves to its class."""
    said = ["the part that reads pictures is left out; text is read as it is"] if raw.get("vision_config") else []
    return said + (_text_of(raw)[1] if raw.get("model_type") == NAME else [])


FAMILY = Family(
    name=NAME,
    presets=PRESETS,
    model_types=(NAME, _TEXT),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={
        "text": gemma_blocks.hf_map,
        "hf": _under("language_model.model."),
        "hf5": _under(WITHIN),
    },
    gguf_archs=(NAME,),
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_form=gemma_blocks.gguf_form,
    hf_form=gemma_blocks.hf_form,
    gguf_map=gemma_blocks.gguf_map,
    ignored_tensors=tuple(
        f"{stem}{part}.*" for stem in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
    ),
    notes=notes,
    tied_copies=HF_TIED,
)
