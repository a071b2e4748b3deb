"""Mistral's dense models (Mistral AI, from September 2023): LLaMA's block, in the first release with a window.

7B v0.1 sees 4096 tokens back in every layer; v0.2, v0.3, Nemo and Small see everything. Nemo's heads are narrower than
the model over their number (128 against 160). Mistral's own folders (params.json) and GGUF files do not say that a
model is Mistral's and not LLaMA's: without a window they are read as ``llama2``, which computes the same. Sources:
transformers 4.57.6 and 5.24.0 (configuration_mistral), llama.cpp (arch llama, whose program heeds no window: files of
v0.1 agree up to 4096 tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quadriga.model.config import AttentionSpec, DenseSpec, ModelConfig, NormSpec, RopeSpec, uniform_model
from quadriga.model.families import llama2, windows
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.weight_map import Shape


def _preset(
    *,
    vocab_size: int = 32_768,
    d_model: int = 4096,
    n_layers: int = 32,
    max_seq_len: int = 32_768,
    theta: float = 1e6,
    window: int | None = None,
) -> ModelConfig:
    return uniform_model(
        family="mistral",
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        max_seq_len=max_seq_len,
        norm=NormSpec(kind="rms", eps=1e-5),
        mixer=AttentionSpec(n_heads=32, n_kv_heads=8, head_dim=128, window=window, position=RopeSpec(theta=theta)),
        ffn=DenseSpec(d_ff=14_336, activation="silu"),
        bos_id=1,
        eos_ids=(2,),
    )


PRESETS = {
    "mistral-7b-v0.1": _preset(vocab_size=32_000, theta=1e4, window=4096),
    "mistral-7b-v0.3": _preset(),
    "mistral-nemo-12b": _preset(vocab_size=131_072, d_model=5120, n_layers=40, max_seq_len=131_072),
}


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a Mistral config.json, as transformers 4 or 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "mistral")
    keys.must_be("hidden_act", "silu")
    keys.must_be("layer_types", None)  # with them it is Ministral, another class
    keys.number_or_null("sliding_window")  # its default is 4096, so null and absent are not the same
    config = uniform_model(
        family="mistral",
        ffn=DenseSpec(d_ff=keys.integer("intermediate_size"), activation="silu"),
        # MistralConfig's class default is untied, and early files leave the key out.
        tied_embeddings=keys.flag("tie_word_embeddings") if keys.has("tie_word_embeddings") else False,
        **llama2.common_from_hf(keys),
    )
    config = config.with_mixer(window=windows.for_all(keys, config.max_seq_len))
    keys.finish(PRETRAINED_KEYS)
    return config


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "Mistral's config.json"
    layer = config.only_layer(form)
    of_kind(layer.ffn, DenseSpec, form)
    raw = llama2.common_to_hf(config, form) | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": layer.attention.window,
    }
    must_read_back(config, config_from_hf(raw), form)
    return raw


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``llama`` as Mistral's."""
    return replace(llama2.config_from_gguf(metadata, shapes), family="mistral")


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``llama``."""
    return llama2.config_to_gguf(replace(config, family="llama2"))


FAMILY = Family(
    name="mistral",
    presets=PRESETS,
    model_types=("mistral",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={"hf": llama2.hf_layout, "meta": llama2.meta_layout},
    gguf_archs=("llama",),
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_map=llama2.gguf_map,
    counterpart="mixtral",
    ignored_tensors=llama2.FAMILY.ignored_tensors,
    tied_copies=llama2.FAMILY.tied_copies,
)
