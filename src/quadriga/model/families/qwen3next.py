"""Qwen3-Next (Alibaba, September 2025), Qwen3.5 and Qwen3.6 (2026), mixtures and dense: three layers of four are gated
DeltaNets, the fourth is attention whose output is gated; norms are stored less one.

Qwen3-Next keeps q, k, v and z of each head of keys together in one matrix, Qwen3.5 q, k, v of all heads in one and z
in another. Vision and the layers for multi-token prediction of Qwen3.5's checkpoints are left out by name; for text
their rotary sections are ordinary rotation. Sources: transformers 4.57.6 (modeling_qwen3_next) and 5.24.0
(modeling_qwen3_5_moe, modeling_qwen3_5), llama.cpp (archs qwen3next, qwen35moe, qwen35; conversion/qwen.py). GGUF files
have norms plus one, the negative rate in place of its logarithm and, in qwen35 and qwen35moe, heads of v in another
order: they are read as they are, and a conversion to or from them restates the numbers (``io.restate``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quadriga.errors import ConfigError
from quadriga.model.config import (
    AttentionSpec,
    DeltaNetSpec,
    DenseSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    RopeSpec,
    countable,
    uniform,
)
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.llama2 import (
    HF_TIED,
    common_from_hf,
    common_to_hf,
)
from quadriga.model.families.qwen3 import sparse_layers
from quadriga.model.families.qwen3next_gguf import (
    dense_from_gguf,
    dense_to_gguf,
    gguf_form,
    hf_form,
    moe_from_gguf,
    moe_to_gguf,
    next_from_gguf,
    next_to_gguf,
)
from quadriga.model.families.qwen3next_layers import Ffns, delta_of, model_of
from quadriga.model.families.qwen3next_layouts import (
    gguf_map,
    left_out,
    next5_layout,
    next_gguf_map,
    next_layout,
    text5_layout,
    text_layout,
    whole_layout,
    whole_split_layout,
)
from quadriga.model.families.rope_keys import without_pictures

FULL, LINEAR = "full_attention", "linear_attention"

_PREDICTION = frozenset({"mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"})
_VISION = frozenset(
    {
        "vision_config",
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
        "language_model_only",
    }
)
IGNORED = PRETRAINED_KEYS | _PREDICTION | {"full_attention_interval", "mamba_ssm_dtype"}
"""What layer_types was made from; the dtype of a state, which is float32 here; the layers that are left out."""


def _preset(
    family: str,
    ffns: Ffns,
    *,
    d_model: int,
    n_heads: int,
    vocab_size: int,
    n_v_heads: int,
    tied: bool = False,
    ids: tuple[int | None, tuple[int, ...]] = (None, ()),
) -> ModelConfig:
    common = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "max_seq_len": 262_144,
        "norm": NormSpec(kind="rms", eps=1e-6, plus_one=True),
        "mixer": AttentionSpec(
            n_heads=n_heads, n_kv_heads=2, head_dim=256, position=RopeSpec(theta=10_000_000.0, dim=64)
        ),
        "tied_embeddings": tied,
        "bos_id": ids[0],
        "eos_ids": ids[1],
    }
    delta = DeltaNetSpec(n_k_heads=16, n_v_heads=n_v_heads, k_dim=128, v_dim=128, taps=4, eps=1e-6)
    return model_of(family, common, ffns, [i % 4 == 3 for i in range(len(ffns))], delta)


def _moe(n_experts: int, top_k: int) -> MoESpec:
    return MoESpec(
        d_ff=512,
        n_experts=n_experts,
        top_k=top_k,
        activation="silu",
        aux_loss_weight=0.001,
        shared=DenseSpec(d_ff=512, activation="silu"),
        shared_gate=True,
    )


NEXT_PRESETS = {
    "qwen3-next-80b-a3b": _preset(
        "qwen3next",
        [_moe(512, 10)] * 48,
        d_model=2048,
        n_heads=16,
        vocab_size=151_936,
        n_v_heads=32,
        ids=(151_643, (151_645,)),
    )
}
MOE_PRESETS = {
    name: _preset(
        "qwen35moe",
        [_moe(256, 8)] * 40,
        d_model=2048,
        n_heads=16,
        vocab_size=248_320,
        n_v_heads=32,
        ids=(None, (248_044,)),
    )
    for name in ("qwen3.5-35b-a3b", "qwen3.6-35b-a3b")
}
DENSE_PRESETS = {
    "qwen3.5-0.8b": _preset(
        "qwen35",
        [DenseSpec(d_ff=3584, activation="silu")] * 24,
        d_model=1024,
        n_heads=8,
        vocab_size=248_320,
        n_v_heads=16,
        tied=True,
        ids=(None, (248_044,)),
    )
}


# config.json ---------------------------------------------------------------------------------------------------------


def next_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read Qwen3-Next's config.json, as transformers 4 or 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "qwen3_next")
    n_layers = countable(keys.integer("num_hidden_layers"))
    moe = _moe_from_hf(keys, normalised=keys.flag("norm_topk_prob"))
    dense = DenseSpec(d_ff=keys.integer("intermediate_size"), activation="silu")
    ffns = [moe if sparse else dense for sparse in sparse_layers(keys, n_layers)]
    return _from_hf("qwen3next", keys, ffns)


def moe_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read Qwen3.5-MoE's config.json, of the whole model or of its text alone."""
    keys = _text_of(raw, "qwen3_5_moe")
    keys.must_be("mlp_only_layers", [])
    ffns = [_moe_from_hf(keys, normalised=True)] * countable(keys.integer("num_hidden_layers"))
    return _from_hf("qwen35moe", keys, ffns)


def dense_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a dense Qwen3.5's config.json, of the whole model or of its text alone."""
    keys = _text_of(raw, "qwen3_5")
    keys.must_be("mlp_only_layers", [])
    dense = DenseSpec(d_ff=keys.integer("intermediate_size"), activation="silu")
    return _from_hf("qwen35", keys, [dense] * countable(keys.integer("num_hidden_layers")))


def _text_of(raw: Mapping[str, object], model_type: str) -> Keys:
    """The keys of the text model: a section of the whole model's file, or a file of its own."""
    outer = Keys(raw, "config.json")
    where, text = "config.json", raw
    if outer.text("model_type") == model_type:
        where, text = "config.json: text_config", outer.mapping("text_config")
        tied = Keys(text, where).value("tie_word_embeddings")
        outer.must_be("tie_word_embeddings", tied)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            outer.has(key)
        outer.finish(PRETRAINED_KEYS | _VISION)
    keys = Keys(without_pictures(text, "rope_parameters"), where)
    keys.must_be("model_type", model_type + "_text")
    keys.must_be("output_gate_type", "swish")
    return keys


def _moe_from_hf(keys: Keys, *, normalised: bool) -> MoESpec:
    loss = keys.number("router_aux_loss_coef") if keys.has("router_aux_loss_coef") else 0.001
    return MoESpec(
        d_ff=keys.integer("moe_intermediate_size"),
        n_experts=keys.integer("num_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        activation="silu",
        normalize_p=1.0 if normalised else None,
        aux_loss_weight=loss,
        shared=DenseSpec(d_ff=keys.integer("shared_expert_intermediate_size"), activation="silu"),
        shared_gate=True,
    )


def _from_hf(family: str, keys: Keys, ffns: Ffns) -> ModelConfig:
    keys.must_be("hidden_act", "silu")
    keys.must_be("attn_output_gate", True)
    keys.integer("head_dim"), keys.integer("num_key_value_heads")  # every published file has both
    common = common_from_hf(keys, partial=True)
    common |= {"tied_embeddings": keys.flag("tie_word_embeddings"), "norm": replace(common["norm"], plus_one=True)}
    delta = DeltaNetSpec(
        n_k_heads=keys.integer("linear_num_key_heads"),
        n_v_heads=keys.integer("linear_num_value_heads"),
        k_dim=keys.integer("linear_key_head_dim"),
        v_dim=keys.integer("linear_value_head_dim"),
        taps=keys.integer("linear_conv_kernel_dim"),
        eps=common["norm"].eps,
    )
    config = model_of(family, common, ffns, _attends(keys, len(ffns)), delta)
    keys.finish(IGNORED)
    return config


def _attends(keys: Keys, n_layers: int) -> list[bool]:
    """Which layers are attention: by ``layer_types``, or every ``full_attention_interval``-th."""
    if not keys.given("layer_types"):
        every = keys.integer("full_attention_interval")
        if every < 1:
            raise ConfigError(f"config.json: full_attention_interval must be 1 or more, got {every}")
        return [(i + 1) % every == 0 for i in range(n_layers)]
    return [one == FULL for one in keys.words("layer_types", (FULL, LINEAR), n_layers)]


def _to_hf(config: ModelConfig, form: str) -> dict[str, object]:
    alike = replace(config, layers=uniform(config.first_attention(), config.n_layers))
    delta = delta_of(config, form)
    return {
        "partial_rotary_factor": 1.0,
        **common_to_hf(alike, form),
        "layer_types": [FULL if isinstance(layer.mixer, AttentionSpec) else LINEAR for layer in config.layers],
        "linear_conv_kernel_dim": delta.taps,
        "linear_key_head_dim": delta.k_dim,
        "linear_num_key_heads": delta.n_k_heads,
        "linear_num_value_heads": delta.n_v_heads,
        "linear_value_head_dim": delta.v_dim,
    }


def _moe_to_hf(moe: MoESpec, form: str) -> dict[str, object]:
    return {
        "moe_intermediate_size": moe.d_ff,
        "num_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": moe.aux_loss_weight,
        "shared_expert_intermediate_size": of_kind(moe.shared, DenseSpec, form).d_ff,
    }


def next_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "Qwen3-Next's config.json"
    moe = config.only_moe(form)
    dense = [i for i, layer in enumerate(config.layers) if layer.moe is None]
    raw = {
        **_to_hf(config, form),
        **_moe_to_hf(moe, form),
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        # Where no layer is dense, nothing is of this width.
        "intermediate_size": config.layers[dense[0]].ffn.d_ff if dense else moe.d_ff * moe.top_k,
        "norm_topk_prob": moe.normalize_p is not None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }
    must_read_back(config, next_from_hf(raw), form)
    return raw


def _text_to_hf(config: ModelConfig, form: str) -> dict[str, object]:
    """The keys of a Qwen3.5's text alone, as transformers 5 reads them."""
    raw = _to_hf(config, form)
    rope = {"rope_type": "default", "rope_theta": raw.pop("rope_theta")}
    if raw.pop("rope_scaling") is not None:
        raise ConfigError(f"{form} cannot express this model: its rotation is scaled")
    return {**raw, "rope_parameters": {**rope, "partial_rotary_factor": raw["partial_rotary_factor"]}}


def moe_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json of the text alone, as transformers 5 reads it."""
    form = "Qwen3.5-MoE's config.json"
    raw = {
        **_text_to_hf(config, form),
        **_moe_to_hf(config.only_moe(form), form),
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
    }
    del raw["intermediate_size"]
    must_read_back(config, moe_from_hf(raw), form)
    return raw


def dense_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json of the text alone, as transformers 5 reads it."""
    form = "Qwen3.5's config.json"
    raw = {
        **_text_to_hf(config, form),
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
    }
    must_read_back(config, dense_from_hf(raw), form)
    return raw


ARCHS = ("qwen3next", "qwen35moe", "qwen35")
LEFT_OUT = ("model.visual.*", "mtp.*")


def notes(raw: Mapping[str, object]) -> list[str]:
    """What is said of the parts that are left out."""
    section = raw.get("text_config")
    text = section if isinstance(section, Mapping) else raw
    said = []
    if raw.get("vision_config"):
        said.append("the part that reads pictures is left out; text is read as it is")
    if text.get("mtp_num_hidden_layers") or any(raw.get(f"{arch}.nextn_predict_layers") for arch in ARCHS):
        said.append("the layer behind the last, which predicts one token more (multi-token prediction), is left out")
    return said


NEXT = Family(
    name="qwen3next",
    presets=NEXT_PRESETS,
    model_types=("qwen3_next",),
    config_from_hf=next_from_hf,
    config_to_hf=next_to_hf,
    layouts={"hf": next_layout, "hf5": next5_layout},
    gguf_archs=("qwen3next",),
    config_from_gguf=next_from_gguf,
    config_to_gguf=next_to_gguf,
    gguf_form=gguf_form,
    hf_form=hf_form,
    gguf_map=next_gguf_map,
    ignored_tensors=LEFT_OUT,
    notes=notes,
    tied_copies=HF_TIED,
)
MIXTURE = Family(
    name="qwen35moe",
    presets=MOE_PRESETS,
    model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
    config_from_hf=moe_from_hf,
    config_to_hf=moe_to_hf,
    layouts={"text": text_layout, "text5": text5_layout, "hf": whole_layout, "hf-split": whole_split_layout},
    gguf_archs=("qwen35moe",),
    config_from_gguf=moe_from_gguf,
    config_to_gguf=moe_to_gguf,
    gguf_form=gguf_form,
    hf_form=hf_form,
    gguf_map=gguf_map,
    ignored_tensors=LEFT_OUT,
    left_out=left_out,
    notes=notes,
    tied_copies=HF_TIED,
)
DENSE = Family(
    name="qwen35",
    presets=DENSE_PRESETS,
    model_types=("qwen3_5", "qwen3_5_text"),
    config_from_hf=dense_from_hf,
    config_to_hf=dense_to_hf,
    layouts={"text": text_layout, "hf": whole_layout},
    gguf_archs=("qwen35",),
    config_from_gguf=dense_from_gguf,
    config_to_gguf=dense_to_gguf,
    gguf_form=gguf_form,
    hf_form=hf_form,
    gguf_map=gguf_map,
    ignored_tensors=LEFT_OUT,
    left_out=left_out,
    notes=notes,
    tied_copies=HF_TIED,
)
