"""The model families, and how to find one: by preset name, by config.json, by GGUF metadata.

A family is a :class:`~quadriga.model.families.base.Family`: presets, config translation, weight maps. To add one, write
a module beside these and add its row to FAMILIES. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace

from quadriga.errors import ConfigError
from quadriga.model.config import ModelConfig
from quadriga.model.families import (
    class_defaults,
    dbrx,
    deepseek,
    dots1,
    ernie45moe,
    flex_olmo,
    gemma2,
    gemma3,
    gemma4,
    glm4moe,
    gpt_oss,
    granite,
    granite_hybrid,
    granite_swa,
    grok1,
    hunyuan,
    lfm2,
    llama2,
    mellum,
    minimax,
    mistral,
    mixtral,
    mpt,
    nemotron_h,
    olmo2,
    olmoe,
    phimoe,
    qwen2,
    qwen2moe,
    qwen3,
    qwen3next,
    refused,
    smollm3,
)
from quadriga.model.families.base import Family
from quadriga.model.families.keys import Keys
from quadriga.model.weight_map import Shape

FAMILIES: dict[str, Family] = {
    "dbrx": dbrx.FAMILY,
    "mixtral": mixtral.FAMILY,
    "grok1": grok1.FAMILY,
    "llama2": llama2.FAMILY,
    "mpt": mpt.FAMILY,
    "qwen3": qwen3.DENSE,
    "qwen3moe": qwen3.MIXTURE,
    "olmoe": olmoe.FAMILY,
    "granite": granite.DENSE,
    "granitemoe": granite.MIXTURE,
    "granitemoeshared": granite.SHARED,
    "granitehybrid": granite_hybrid.FAMILY,
    "granite_swa": granite_swa.DENSE,
    "granitemoe_swa": granite_swa.MIXTURE,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "smollm3": smollm3.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
    "glm4moe": glm4moe.FAMILY,
    "qwen2moe": qwen2moe.FAMILY,
    "dots1": dots1.FAMILY,
    "ernie4_5-moe": ernie45moe.FAMILY,
    "hunyuan-moe": hunyuan.FAMILY,
    "minimax-m2": minimax.FAMILY,
    "lfm2": lfm2.DENSE,
    "lfm2moe": lfm2.MIXTURE,
    "qwen3next": qwen3next.NEXT,
    "qwen35moe": qwen3next.MIXTURE,
    "qwen35": qwen3next.DENSE,
    "olmo2": olmo2.FAMILY,
    "flex_olmo": flex_olmo.FAMILY,
    "phimoe": phimoe.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3": gemma3.FAMILY,
    "gemma4": gemma4.FAMILY,
    "nemotron_h": nemotron_h.FAMILY,
    "mellum": mellum.FAMILY,
    "deepseek_v2": deepseek.V2,
    "deepseek_v3": deepseek.V3,
    "glm4_moe_lite": deepseek.GLM,
}

PRESETS: dict[str, ModelConfig] = {
    name: config for family in FAMILIES.values() for name, config in family.presets.items()
}
"""Every published size by name."""

_BY_MODEL_TYPE = {model_type: family for family in FAMILIES.values() for model_type in family.model_types}
_GGUF_ARCHS = sorted({arch for family in FAMILIES.values() for arch in family.gguf_archs})


def preset(name: str) -> ModelConfig:
    """The configuration of a published size.

    Raises:
        ConfigError: no such preset; the message names the nearest one.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name[:80].lower(), PRESETS, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"no preset is called {name[:80]!r}.{hint} Presets: {', '.join(PRESETS)}")


def family_of(config: ModelConfig) -> Family:
    """The family that can write ``config`` back.

    Raises:
        ConfigError: ``config.family`` is none of FAMILIES.
    """
    if config.family not in FAMILIES:
        raise ConfigError(f"family must be one of {', '.join(FAMILIES)}; got {config.family!r}")
    return FAMILIES[config.family]


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Translate a parsed config.json; see :func:`read_hf`."""
    return read_hf(raw)[0]


def read_hf(raw: Mapping[str, object]) -> tuple[ModelConfig, list[str]]:
    """Translate a parsed config.json, and say what it left to the class's defaults (``class_defaults``).

    Raises:
        ConfigError: the model type is not supported, or a key is missing, unknown, of the wrong type, or asks for
            something that Quadriga does not compute.
    """
    model_type = Keys(raw, "config.json").text("model_type")
    if model_type not in _BY_MODEL_TYPE:
        raise ConfigError(
            f"config.json: model_type must be one of {', '.join(_BY_MODEL_TYPE)}; got {model_type[:80]!r}. "
            f"Quadriga runs these families only.{refused.reason(model_type)}"
        )
    full, notes = class_defaults.filled(raw)
    family = _BY_MODEL_TYPE[model_type]
    return family.config_from_hf(full), notes + family.notes(full)


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Translate a GGUF header; see :func:`read_gguf`."""
    return read_gguf(metadata, shapes)[0]


def read_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> tuple[ModelConfig, list[str]]:
    """Translate a GGUF header, and say what of it is left out.

    Args:
        metadata: the key/value pairs.
        shapes: tensor name -> shape in torch's order (slowest axis first).

    Raises:
        ConfigError: as :func:`config_from_hf`.
    """
    arch = Keys(metadata, "GGUF metadata").text("general.architecture")
    if (kind := metadata.get("general.type", "model")) != "model":
        raise ConfigError(
            f"this GGUF file must hold a model, got general.type {str(kind)[:80]!r}. Give the model it goes with."
        )
    if arch == "llama":
        # One architecture, three families: it does not say whose model it is. Experts are Mixtral's, and of the two
        # dense ones only Mistral's config.json can express a window.
        family = llama2.FAMILY
        if metadata.get("llama.expert_count"):
            family = mixtral.FAMILY
        elif metadata.get("llama.attention.sliding_window"):
            family = mistral.FAMILY
    elif arch == "granitemoe" and metadata.get("granitemoe.expert_shared_feed_forward_length"):
        family = granite.SHARED  # one architecture, two families again
    elif arch == "deepseek2":
        family = deepseek.family_of_gguf(metadata, shapes)
    elif arch in _GGUF_ARCHS:
        family = next(family for family in FAMILIES.values() if arch in family.gguf_archs)
    else:
        raise ConfigError(
            f"general.architecture must be one of {', '.join(_GGUF_ARCHS)}; got {arch[:80]!r}."
            f"{refused.gguf_reason(arch)}"
        )
    assert family.config_from_gguf is not None, "a family with GGUF architectures reads GGUF"
    return family.config_from_gguf(metadata, shapes), family.notes(metadata)


def with_generation_config(config: ModelConfig, raw: Mapping[str, object]) -> ModelConfig:
    """``config`` with the token ids of a parsed generation_config.json, which knows more end tokens than config.json.

    DBRX-instruct's config.json has none, its generation_config.json has <|endoftext|> and <|im_end|>. Sampling settings
    in the file are left alone: they belong to a request.

    Raises:
        ConfigError: a token id is no whole number.
    """
    keys = Keys(raw, "generation_config.json")
    return replace(
        config,
        bos_id=keys.token_id("bos_token_id") if keys.given("bos_token_id") else config.bos_id,
        eos_ids=keys.token_ids("eos_token_id") or config.eos_ids,
        pad_id=keys.token_id("pad_token_id") if keys.given("pad_token_id") else config.pad_id,
    )
