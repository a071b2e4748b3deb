"""Gemma 4 (Google, 2026), its text, dense (31B) and as a mixture (26B-A4B): five layers with a window to one without.

Layers that see all have wider and fewer heads, values that are the keys' own projection, and rotate the first quarter
of their pairs; q, k and v of every layer are normed by heads and scores are not scaled. Every branch has a norm on both
sides, the residual stream is multiplied by a number of each layer's own, and logits have a soft cap. In the mixture the
dense network stays beside the experts, which with their router read the stream through norms of their own. The parts
that read pictures and sound are left out by name; the small models (E2B, E4B), whose layers have embeddings of their
own and share keys and values, are refused. Sources: transformers 5.24.0 (configuration and modeling_gemma4), llama.cpp
(arch gemma4; conversion/gemma.py, src/models/gemma4.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from quadriga.errors import ConfigError
from quadriga.model.config import (
    AttentionSpec,
    DenseSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    ProportionalScaling,
    QKNormSpec,
    RopeSpec,
    countable,
)
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.gemma4_gguf import from_gguf, to_gguf
from quadriga.model.families.gemma4_layers import FULL, SLIDING, both_kinds, layers_of
from quadriga.model.families.gemma4_layouts import gguf_map, text_layout, whole_layout
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.llama2 import HF_TIED
from quadriga.model.families.rope_keys import FREQS

_OTHER_SENSES = frozenset(
    {
        *("vision_config", "audio_config", "vision_soft_tokens_per_image"),
        *("image_token_id", "audio_token_id", "video_token_id"),
        *("boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_id", "eoa_token_index"),
    }
)
IGNORED = PRETRAINED_KEYS | {"vocab_size_per_layer_input"}
"""The table of the layers' own embeddings, which the models that are read do not have."""


def _preset(
    *,
    d_model: int,
    n_layers: int,
    sliding: AttentionSpec,
    full_kv_heads: int,
    ffn: DenseSpec | MoESpec,
) -> ModelConfig:
    full = replace(
        sliding,
        n_kv_heads=full_kv_heads,
        head_dim=512,
        window=None,
        keys_as_values=True,
        position=RopeSpec(theta=1_000_000.0, scaling=ProportionalScaling(part=0.25)),
    )
    norm = NormSpec(kind="rms", eps=1e-6)
    return ModelConfig(
        family="gemma4",
        vocab_size=262_144,
        d_model=d_model,
        max_seq_len=262_144,
        layers=layers_of(norm, sliding, full, ffn, [i % 6 == 5 for i in range(n_layers)]),
        final_norm=norm,
        tied_embeddings=True,
        embedding_scale=d_model**0.5,
        logit_cap=30.0,
        bos_id=2,
        eos_ids=(1,),
        pad_id=0,
    )


def _sliding(n_heads: int, n_kv_heads: int) -> AttentionSpec:
    return AttentionSpec(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=256,
        position=RopeSpec(theta=10_000.0),
        scale=1.0,
        qk_norm=QKNormSpec(over="head", eps=1e-6),
        v_norm_eps=1e-6,
        window=1024,
    )


PRESETS = {
    "gemma-4-26b-a4b": _preset(
        d_model=2816,
        n_layers=30,
        sliding=_sliding(16, 8),
        full_kv_heads=2,
        ffn=MoESpec(
            d_ff=704,
            n_experts=128,
            top_k=8,
            activation="gelu_tanh",
            shared=DenseSpec(d_ff=2112, activation="gelu_tanh"),
            apart=True,
        ),
    ),
}


# config.json ---------------------------------------------------------------------------------------------------------


def from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read Gemma 4's config.json, of the whole model or of its text alone."""
    keys = _text_of(raw)
    for key, only in (("hidden_size_per_layer_input", 0), ("num_kv_shared_layers", 0), ("use_double_wide_mlp", False)):
        keys.must_be(key, only, None)
    keys.must_be("use_bidirectional_attention", None, "vision")  # pictures see each other's parts
    keys.must_be("hidden_activation", "gelu_pytorch_tanh")
    keys.must_be("attention_bias", False)
    n_layers = countable(keys.integer("num_hidden_layers"))
    attends = [one == FULL for one in keys.words("layer_types", (FULL, SLIDING), n_layers)]
    sliding, full = _attentions(keys, attends)
    norm, d_model = NormSpec(kind="rms", eps=keys.number("rms_norm_eps")), keys.integer("hidden_size")
    config = ModelConfig(
        family="gemma4",
        vocab_size=keys.integer("vocab_size"),
        d_model=d_model,
        max_seq_len=keys.integer("max_position_embeddings"),
        layers=layers_of(norm, sliding, full, _ffn(keys), attends),
        final_norm=norm,
        tied_embeddings=keys.flag("tie_word_embeddings"),
        embedding_scale=max(d_model, 1) ** 0.5,
        logit_cap=keys.number("final_logit_softcapping") if keys.given("final_logit_softcapping") else None,
        bos_id=keys.token_id("bos_token_id"),
        eos_ids=keys.token_ids("eos_token_id"),
        pad_id=keys.token_id("pad_token_id"),
    )
    keys.finish(IGNORED)
    return config


def _text_of(raw: Mapping[str, object]) -> Keys:
    """The keys of the text model: a section of the whole model's file, or a file of its own."""
    outer = Keys(raw, "config.json")
    if outer.text("model_type") != "gemma4":
        outer.must_be("model_type", "gemma4_text")
        return outer
    text = outer.section("text_config")
    text.must_be("model_type", "gemma4_text")
    outer.must_be("tie_word_embeddings", text.value("tie_word_embeddings"))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        outer.has(key)
    outer.finish(PRETRAINED_KEYS | _OTHER_SENSES)
    return text


def _attentions(keys: Keys, attends: Sequence[bool]) -> tuple[AttentionSpec, AttentionSpec]:
    """Attention with a window, and attention that sees all."""
    ropes = keys.section("rope_parameters")
    near, far = ropes.section(SLIDING), ropes.section(FULL)
    near.must_be("rope_type", "default")
    far.must_be("rope_type", "proportional")
    far.must_be("factor", 1)
    eps = keys.number("rms_norm_eps")
    sliding = AttentionSpec(
        n_heads=keys.integer("num_attention_heads"),
        n_kv_heads=keys.integer("num_key_value_heads"),
        head_dim=keys.integer("head_dim"),
        position=RopeSpec(theta=near.number("rope_theta")),
        scale=1.0,
        qk_norm=QKNormSpec(over="head", eps=eps),
        v_norm_eps=eps,
        window=keys.integer("sliding_window"),
    )
    same = keys.flag("attention_k_eq_v")
    head_dim, n_kv_heads = _global_heads(keys, attends)
    full = replace(
        sliding,
        n_kv_heads=n_kv_heads if same and n_kv_heads is not None else sliding.n_kv_heads,
        head_dim=head_dim,
        window=None,
        keys_as_values=same,
        position=RopeSpec(
            theta=far.number("rope_theta"), scaling=ProportionalScaling(part=far.number("partial_rotary_factor"))
        ),
    )
    near.finish(frozenset())
    far.finish(frozenset())
    ropes.finish(frozenset())
    return sliding, full


def _global_heads(keys: Keys, attends: Sequence[bool]) -> tuple[int, int | None]:
    """Size and number of the heads of keys where a layer sees all: two keys, or since transformers 5.2x a section with
    an entry for each such layer."""
    if not keys.given("per_layer_config"):
        count = keys.integer("num_global_key_value_heads") if keys.given("num_global_key_value_heads") else None
        return keys.integer("global_head_dim"), count
    section = keys.section("per_layer_config")
    wanted = {str(i) for i, full in enumerate(attends) if full}
    entries = [section.section(name) for name in section.names()]
    found = {
        (one.integer("head_dim"), one.integer("num_key_value_heads") if one.given("num_key_value_heads") else None)
        for one in entries
    }
    for one in entries:
        one.finish(frozenset())
    if set(section.names()) != wanted or len(found) != 1:
        raise ConfigError(
            "config.json: per_layer_config must say the same of every layer of full attention and nothing of the "
            f"others; got {sorted(section.names())[:8]} with {sorted(found, key=str)[:3]}"
        )
    head_dim, n_kv_heads = found.pop()
    keys.must_be("global_head_dim", head_dim)
    keys.must_be("num_global_key_value_heads", n_kv_heads, None)
    return head_dim, n_kv_heads


def _ffn(keys: Keys) -> DenseSpec | MoESpec:
    dense = DenseSpec(d_ff=keys.integer("intermediate_size"), activation="gelu_tanh")
    if not keys.flag("enable_moe_block"):
        for key in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            keys.has(key)
        return dense
    return MoESpec(
        d_ff=keys.integer("moe_intermediate_size"),
        n_experts=keys.integer("num_experts"),
        top_k=keys.integer("top_k_experts"),
        activation="gelu_tanh",
        shared=dense,
        apart=True,
    )


def to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json of the text alone, as transformers 5 reads it."""
    form = "Gemma 4's config.json"
    sliding, full = both_kinds(config, form)
    moe = sliding.moe
    network = of_kind(sliding.ffn if moe is None else moe.shared, DenseSpec, form)
    near, far = sliding.attention, full.attention
    near_rope, far_rope = (of_kind(one.position, RopeSpec, form) for one in (near, far))
    raw: dict[str, object] = {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": network.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": near.n_heads,
        "num_key_value_heads": near.n_kv_heads,
        "head_dim": near.head_dim,
        "global_head_dim": far.head_dim,
        "num_global_key_value_heads": far.n_kv_heads if far.keys_as_values else None,
        "attention_k_eq_v": far.keys_as_values,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": sliding.norm.eps,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": near_rope.theta},
            FULL: {
                "rope_type": "proportional",
                "rope_theta": far_rope.theta,
                "partial_rotary_factor": of_kind(far_rope.scaling, ProportionalScaling, form).part,
            },
        },
        "layer_types": [FULL if layer.attention.window is None else SLIDING for layer in config.layers],
        "sliding_window": near.window,
        "attention_bias": False,
        "final_logit_softcapping": config.logit_cap,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "use_bidirectional_attention": None,
        "enable_moe_block": moe is not None,
        "num_experts": None if moe is None else moe.n_experts,
        "top_k_experts": None if moe is None else moe.top_k,
        "moe_intermediate_size": None if moe is None else moe.d_ff,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
        "pad_token_id": config.pad_id,
        "use_cache": True,
    }
    must_read_back(config, from_hf(raw), form)
    return raw


def notes(raw: Mapping[str, object]) -> list[str]:
    """What is said of the parts that are left out."""
    said = []
    if raw.get("vision_config"):
        said.append("the part that reads pictures is left out; text is read as it is")
    if raw.get("audio_config"):
        said.append("the part that reads sound is left out")
    return said


FAMILY = Family(
    name="gemma4",
    presets=PRESETS,
    model_types=("gemma4", "gemma4_text"),
    config_from_hf=from_hf,
    config_to_hf=to_hf,
    layouts={"text": text_layout, "hf": whole_layout},
    gguf_archs=("gemma4",),
    config_from_gguf=from_gguf,
    config_to_gguf=to_gguf,
    gguf_map=gguf_map,
    ignored_tensors=(
        "model.vision_tower.*",
        "model.embed_vision.*",
        "model.audio_tower.*",
        "model.embed_audio.*",
        FREQS,  # read with the metadata
    ),
    notes=notes,
    tied_copies=HF_TIED,
)
