"""Granite 3 (IBM, October 2024), dense and as mixtures: LLaMA's block with four constants.

    embeddings * embedding_multiplier      scores * attention_multiplier, in place of 1/sqrt(d)
    both branches * residual_multiplier    logits / logits_scaling

The mixtures (1B-A400M, 3B-A800M) have 32 or 40 experts, 8 chosen, whose weights are a softmax over the chosen logits:
the softmax over all divided by the sum of the chosen. Sources: transformers 4.57.6 and 5.x (configuration_granite,
modeling_granitemoe), llama.cpp b11434 (archs granite and granitemoe, rotary pairs side by side as in arch llama).
Some have a dense network beside the experts, of a width of its own (granitemoeshared; arch granitemoe with a shared
width).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quadriga.model.config import AttentionSpec, DenseSpec, ModelConfig, MoESpec, NormSpec, RopeSpec, uniform_model
from quadriga.model.families import gguf_keys
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
    gguf_qkv,
    hf_qkv,
)
from quadriga.model.families.pieces import copies, gate_up, shared_gate_up
from quadriga.model.families.rope_keys import FREQS
from quadriga.model.weight_map import Piece, Shape


def _moe_preset(
    *, d_model: int, n_layers: int, n_heads: int, n_experts: int, attention: float, logits: float
) -> ModelConfig:
    return uniform_model(
        family="granitemoe",
        vocab_size=49_155,
        d_model=d_model,
        n_layers=n_layers,
        max_seq_len=4096,
        norm=NormSpec(kind="rms", eps=1e-6),
        mixer=AttentionSpec(
            n_heads=n_heads, n_kv_heads=8, head_dim=64, scale=attention, position=RopeSpec(theta=10_000.0)
        ),
        ffn=MoESpec(d_ff=512, n_experts=n_experts, top_k=8, activation="silu"),
        residual_scale=0.22,
        embedding_scale=12.0,
        logit_scale=1 / logits,
        tied_embeddings=True,
        bos_id=0,
        eos_ids=(0,),
        pad_id=0,
    )


MOE_PRESETS = {
    "granite-3.0-1b-a400m": _moe_preset(
        d_model=1024, n_layers=24, n_heads=16, n_experts=32, attention=0.015625, logits=6.0
    ),
    "granite-3.0-3b-a800m": _moe_preset(
        d_model=1536, n_layers=32, n_heads=24, n_experts=40, attention=0.015625, logits=6.0
    ),
}


def dense_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a dense Granite's config.json, as transformers 4 or 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "granite")
    keys.must_be("mlp_bias", False)
    return _from_hf("granite", keys, DenseSpec(d_ff=keys.integer("intermediate_size"), activation="silu"))


def moe_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a Granite mixture's config.json, as transformers 4 or 5 writes it."""
    return _mixture_from_hf("granitemoe", Keys(raw, "config.json"), None)


def shared_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read the config.json of a Granite mixture with a shared network, as transformers 4 or 5 writes it."""
    keys = Keys(raw, "config.json")
    shared = DenseSpec(d_ff=keys.integer("shared_intermediate_size"), activation="silu")
    return _mixture_from_hf("granitemoeshared", keys, shared)


def _mixture_from_hf(family: str, keys: Keys, shared: DenseSpec | None) -> ModelConfig:
    keys.must_be("model_type", family)
    keys.must_be("position_embedding_type", "rope")  # transformers 4.57 writes it; Granite 4 has layers without
    return _from_hf(family, keys, mixture(keys, shared))


def mixture(keys: Keys, shared: DenseSpec | None) -> MoESpec:
    """The experts of a Granite's config.json, beside a network that every token visits or none."""
    return MoESpec(
        d_ff=keys.integer("intermediate_size"),
        n_experts=keys.integer("num_local_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        activation="silu",
        aux_loss_weight=keys.number("router_aux_loss_coef"),
        shared=shared,
    )


def _from_hf(family: str, keys: Keys, ffn: DenseSpec | MoESpec) -> ModelConfig:
    keys.must_be("hidden_act", "silu")
    common = common_from_hf(keys)
    attention = gguf_keys.with_scale(common["mixer"], keys.number("attention_multiplier"))
    config = uniform_model(
        family=family,
        ffn=ffn,
        residual_scale=keys.number("residual_multiplier"),
        embedding_scale=keys.number("embedding_multiplier"),
        logit_scale=inverse(keys, "logits_scaling"),
        tied_embeddings=keys.flag("tie_word_embeddings"),
        **{**common, "mixer": attention},
    )
    keys.finish(PRETRAINED_KEYS)
    return config


def inverse(keys: Keys, key: str) -> float:
    """1 / a number; 0, which no model divides by, becomes what the specs refuse."""
    value = keys.number(key)
    return 1 / value if value else 0.0


def blocks_to_hf(config: ModelConfig, form: str) -> dict[str, object]:
    """The keys that all Granites write, of a model whose layers are alike."""
    layer = config.only_layer(form)
    raw = {
        **common_to_hf(config, form),
        "attention_multiplier": layer.attention.score_scale,
        "residual_multiplier": layer.residual_scale,
        "embedding_multiplier": config.embedding_scale,
        "logits_scaling": logits_divisor(config),
    }
    del raw["head_dim"]  # the classes take it from the other sizes
    return raw


def logits_divisor(config: ModelConfig) -> float:
    """What logits are divided by, as it was written in decimal."""
    exact = 1 / config.logit_scale
    rounded = round(exact, 9)
    return rounded if rounded and 1 / rounded == config.logit_scale else exact


def dense_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "Granite's config.json"
    of_kind(config.only_layer(form).ffn, DenseSpec, form)
    own = {"architectures": ["GraniteForCausalLM"], "model_type": "granite", "mlp_bias": False}
    raw = {**blocks_to_hf(config, form), **own}
    must_read_back(config, dense_from_hf(raw), form)
    return raw


def moe_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "Granite-MoE's config.json"
    raw = {
        **_mixture_to_hf(config, form),
        "architectures": ["GraniteMoeForCausalLM"],
        "model_type": "granitemoe",
    }
    must_read_back(config, moe_from_hf(raw), form)
    return raw


def shared_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "Granite-MoE-shared's config.json"
    moe = of_kind(config.only_layer(form).ffn, MoESpec, form)
    raw = {
        **_mixture_to_hf(config, form),
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "model_type": "granitemoeshared",
        "shared_intermediate_size": of_kind(moe.shared, DenseSpec, form).d_ff,
    }
    must_read_back(config, shared_from_hf(raw), form)
    return raw


def _mixture_to_hf(config: ModelConfig, form: str) -> dict[str, object]:
    moe = of_kind(config.only_layer(form).ffn, MoESpec, form)
    return {**blocks_to_hf(config, form), **mixture_to_hf(moe)}


def mixture_to_hf(moe: MoESpec) -> dict[str, object]:
    """The keys of :func:`mixture`, but for those of widths."""
    return {
        "num_local_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": moe.aux_loss_weight,
    }


HF_MOE = "model.layers.{i}.block_sparse_moe."
HF_SHARED = "model.layers.{i}.shared_mlp."
HF_MIXTURE = {
    HF_MOE + "router.layer.weight": "layers.{i}.moe.router.weight",
    HF_MOE + "output_linear.weight": "layers.{i}.moe.w_down",
}


def _hf_dense(config: ModelConfig) -> list[Piece]:
    return copies(config, HF_COMMON | HF_FFN) + hf_qkv(config)


def _hf_moe(config: ModelConfig) -> list[Piece]:
    return copies(config, HF_COMMON | HF_MIXTURE) + hf_qkv(config) + gate_up(config, HF_MOE + "input_linear.weight")


def _hf_shared(config: ModelConfig) -> list[Piece]:
    down = {HF_SHARED + "output_linear.weight": "layers.{i}.moe.shared.w_down"}
    return _hf_moe(config) + copies(config, down) + shared_gate_up(config, HF_SHARED + "input_linear.weight")


def _gguf_shared(config: ModelConfig) -> list[Piece]:
    return _gguf_map(config) + copies(config, gguf_keys.SHARED_EXPERT)


def _gguf_map(config: ModelConfig) -> list[Piece]:
    names = GGUF_COMMON | GGUF_FFN | gguf_keys.ROUTER | gguf_keys.MERGED_EXPERTS
    return copies(config, names) + gguf_qkv(config)


def dense_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``granite``."""
    keys = gguf_keys.architecture_keys(metadata, "granite")
    ffn = DenseSpec(d_ff=keys.integer("feed_forward_length"), activation="silu")
    return _from_gguf("granite", keys, ffn, metadata, shapes)


def moe_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``granitemoe``; one with shared experts is another family's."""
    keys = gguf_keys.architecture_keys(metadata, "granitemoe")
    ffn = gguf_keys.plain_experts(keys, keys.integer("feed_forward_length"))
    return _from_gguf("granitemoe", keys, ffn, metadata, shapes)


def shared_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``granitemoe`` with a shared network."""
    keys = gguf_keys.architecture_keys(metadata, "granitemoe")
    shared = DenseSpec(d_ff=keys.integer("expert_shared_feed_forward_length"), activation="silu")
    ffn = gguf_keys.plain_experts(keys, keys.integer("feed_forward_length"), shared=shared)
    return _from_gguf("granitemoeshared", keys, ffn, metadata, shapes)


def _from_gguf(
    family: str,
    keys: Keys,
    ffn: DenseSpec | MoESpec,
    metadata: Mapping[str, object],
    shapes: Mapping[str, Shape],
) -> ModelConfig:
    scales = {name: stored_scale(keys, name) for name in ("residual_scale", "embedding_scale", "logit_scale")}
    common: dict[str, Any] = common_from_gguf(keys, metadata, shapes)
    config = uniform_model(
        family=family,
        ffn=ffn,
        residual_scale=scales["residual_scale"],
        embedding_scale=scales["embedding_scale"],
        logit_scale=1 / scales["logit_scale"],
        **common,
    )
    keys.finish(gguf_keys.IGNORED)
    return config


def stored_scale(keys: Keys, name: str) -> float:
    """A constant of a GGUF; 1 where it is missing or 0, as in llama.cpp."""
    return (gguf_keys.number(keys, name) if keys.given(name) else 1.0) or 1.0


def _to_gguf(config: ModelConfig, form: str, arch: str) -> dict[str, object]:
    layer = config.only_layer(form)
    return {
        **common_to_gguf(config, form, arch),
        f"{arch}.attention.scale": layer.attention.score_scale,
        f"{arch}.residual_scale": layer.residual_scale,
        f"{arch}.embedding_scale": config.embedding_scale,
        f"{arch}.logit_scale": logits_divisor(config),
    }


def dense_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``granite``."""
    form = "GGUF arch granite"
    of_kind(config.only_layer(form).ffn, DenseSpec, form)
    metadata = _to_gguf(config, form, "granite")
    gguf_keys.must_read_back(config, dense_from_gguf, metadata, form)
    return metadata


def moe_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``granitemoe``."""
    form = "GGUF arch granitemoe"
    metadata = {**_to_gguf(config, form, "granitemoe"), **gguf_keys.expert_keys(config, "granitemoe")}
    gguf_keys.must_read_back(config, moe_from_gguf, metadata, form)
    return metadata


def shared_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``granitemoe`` with a shared network."""
    form = "GGUF arch granitemoe"
    moe = of_kind(config.only_layer(form).ffn, MoESpec, form)
    metadata = {
        **_to_gguf(config, form, "granitemoe"),
        **gguf_keys.expert_keys(config, "granitemoe"),
        "granitemoe.expert_shared_feed_forward_length": of_kind(moe.shared, DenseSpec, form).d_ff,
    }
    gguf_keys.must_read_back(config, shared_from_gguf, metadata, form)
    return metadata


DENSE = Family(
    name="granite",
    presets={},
    model_types=("granite",),
    config_from_hf=dense_from_hf,
    config_to_hf=dense_to_hf,
    layouts={"hf": _hf_dense},
    gguf_archs=("granite",),
    config_from_gguf=dense_from_gguf,
    config_to_gguf=dense_to_gguf,
    gguf_map=_gguf_map,
    counterpart="granitemoe",
    ignored_tensors=(FREQS,),
    tied_copies=HF_TIED,
)
MIXTURE = Family(
    name="granitemoe",
    presets=MOE_PRESETS,
    model_types=("granitemoe",),
    config_from_hf=moe_from_hf,
    config_to_hf=moe_to_hf,
    layouts={"hf": _hf_moe},
    gguf_archs=("granitemoe",),
    config_from_gguf=moe_from_gguf,
    config_to_gguf=moe_to_gguf,
    gguf_map=_gguf_map,
    counterpart="granite",
    ignored_tensors=(FREQS,),
    tied_copies=HF_TIED,
)
SHARED = Family(
    name="granitemoeshared",
    presets={},
    model_types=("granitemoeshared",),
    config_from_hf=shared_from_hf,
    config_to_hf=shared_to_hf,
    layouts={"hf": _hf_shared},
    gguf_archs=("granitemoe",),
    config_from_gguf=shared_from_gguf,
    config_to_gguf=shared_to_gguf,
    gguf_map=_gguf_shared,
    ignored_tensors=(FREQS,),
    tied_copies=HF_TIED,
)
