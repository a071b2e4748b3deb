"""GLM-4.5 and 4.6 (Zhipu, from July 2025): LLaMA's block, half of every head rotated, DeepSeek-V3's mixture.

q, k and v have biases, the large ones a norm of every head's q and k besides. The first layers are dense. Checkpoints
end with a layer for multi-token prediction, which no answer depends on: it is left out by name, and ``info`` says so.
Sources: transformers 4.57.6 (configuration_glm4_moe, modeling_glm4_moe), llama.cpp (arch glm4moe, whose block_count has
the additional layer in it and whose rotary halves lie as in Hugging Face's files). Solar Open (transformers 5.24.0,
modular_solar_open) is the same with fewer parts, and becomes a GLM-4.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quadriga.model.config import (
    AttentionSpec,
    DenseSpec,
    LayerSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    QKNormSpec,
    RopeSpec,
    in_order,
)
from quadriga.model.families import deepseek_moe, gguf_keys
from quadriga.model.families.base import Family, MapBuilder, must_read_back
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.llama2 import (
    GGUF_COMMON,
    GGUF_FFN,
    HF_COMMON,
    HF_FFN,
    HF_TIED,
    common_from_gguf,
    common_from_hf,
    common_to_hf,
    hf_qkv,
    with_networks,
)
from quadriga.model.families.pieces import copies
from quadriga.model.families.qwen3 import GGUF_QK_NORMS, HF_QK_NORMS, hf5_experts, hf_experts
from quadriga.model.weight_map import Piece, Shape, source_shapes

_NORM = NormSpec(kind="rms", eps=1e-5)


def _preset(
    *, d_model: int, n_layers: int, n_dense: int, d_ff: int, moe: MoESpec, qk_norm: bool, max_seq_len: int
) -> ModelConfig:
    attention = AttentionSpec(
        n_heads=96,
        n_kv_heads=8,
        head_dim=128,
        position=RopeSpec(theta=1_000_000.0, dim=64),
        qkv_bias=True,
        qk_norm=QKNormSpec(over="head", eps=1e-5) if qk_norm else None,
    )
    dense = DenseSpec(d_ff=d_ff, activation="silu")
    return ModelConfig(
        family="glm4moe",
        vocab_size=151_552,
        d_model=d_model,
        max_seq_len=max_seq_len,
        layers=in_order(
            LayerSpec(norm=_NORM, mixer=attention, ffn=dense if i < n_dense else moe) for i in range(n_layers)
        ),
        final_norm=_NORM,
        eos_ids=(151_329, 151_336, 151_338),
        pad_id=151_329,
    )


def _moe(*, d_ff: int, n_experts: int, scale: float) -> MoESpec:
    return MoESpec(
        d_ff=d_ff,
        n_experts=n_experts,
        top_k=8,
        activation="silu",
        score="sigmoid",
        correction=True,
        normalize_eps=deepseek_moe.EPS,
        routed_scale=scale,
        shared=DenseSpec(d_ff=d_ff, activation="silu"),
    )


def _large(max_seq_len: int) -> ModelConfig:
    moe = _moe(d_ff=1536, n_experts=160, scale=2.5)
    return _preset(d_model=5120, n_layers=92, n_dense=3, d_ff=12_288, moe=moe, qk_norm=True, max_seq_len=max_seq_len)


PRESETS = {
    "glm-4.5-air": _preset(
        d_model=4096,
        n_layers=46,
        n_dense=1,
        d_ff=10_944,
        moe=_moe(d_ff=1408, n_experts=128, scale=1.0),
        qk_norm=False,
        max_seq_len=131_072,
    ),
    "glm-4.5": _large(131_072),
    "glm-4.6": _large(202_752),
}


PREDICTION_KEYS = ("num_nextn_predict_layers", "num_mtp_layers")
"""How many layers for multi-token prediction there are; the second name is transformers 5's."""


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a GLM-4.5 config.json, as transformers 4 or 5 writes it, or Solar Open's."""
    if raw.get("model_type") == _SOLAR:
        return config_from_hf(_of_solar(raw))
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "glm4_moe")
    keys.must_be("hidden_act", "silu")
    for key in PREDICTION_KEYS:
        keys.must_be(key, 0, 1, None)  # see ``left_out``
    keys.integer("head_dim"), keys.integer("num_key_value_heads")  # every published file has both
    common = common_from_hf(keys, biases=True, partial=True)
    common["tied_embeddings"] = keys.flag("tie_word_embeddings")
    config = _model(common, deepseek_moe.ffns_from_hf(keys, common["n_layers"]), keys.flag("use_qk_norm"))
    keys.finish(PRETRAINED_KEYS)
    return config


_SOLAR = "solar_open"


def _of_solar(raw: Mapping[str, object]) -> Mapping[str, object]:
    """Solar Open's config.json (Upstage, 2026) as GLM-4.5 would have it: no dense layers, norms of heads or halves.

    Raises:
        ConfigError: a key that asks for one of these.
    """
    keys = Keys(raw, "config.json")
    keys.must_be("use_qk_norm", False, None)
    keys.must_be("first_k_dense_replace", 0, None)
    keys.must_be("partial_rotary_factor", 1.0, None)
    rope = raw.get("rope_parameters")
    if isinstance(rope, Mapping):
        Keys(rope, "config.json: rope_parameters").must_be("partial_rotary_factor", 1.0, None)
    no_layer_s = {"intermediate_size": keys.value("intermediate_size") or 1}
    own = {"model_type": "glm4_moe", "use_qk_norm": False, "first_k_dense_replace": 0, "partial_rotary_factor": 1.0}
    return {**raw, **no_layer_s, **own}


def _model(common: dict[str, Any], ffns: list[DenseSpec | MoESpec], qk_norm: bool) -> ModelConfig:
    normed = QKNormSpec(over="head", eps=common["norm"].eps) if qk_norm else None
    # The output projection has no bias whatever a file says of attention.
    return with_networks("glm4moe", common, ffns, qk_norm=normed, out_bias=False)


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it, without the layer that is left out."""
    form = "GLM-4.5's config.json"
    raw: dict[str, object] = {
        "partial_rotary_factor": 1.0,
        **common_to_hf(config, form),
        **deepseek_moe.to_hf(config, form),
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "use_qk_norm": config.layers[0].attention.qk_norm is not None,
    }
    must_read_back(config, config_from_hf(raw), form)
    return raw


def _hf_common(config: ModelConfig) -> list[Piece]:
    return copies(config, HF_COMMON | HF_QK_NORMS | HF_FFN | deepseek_moe.HF_MIXTURE) + hf_qkv(config)


def hf_layout(config: ModelConfig) -> list[Piece]:
    """transformers 4, and every published checkpoint: a matrix per expert."""
    return _hf_common(config) + hf_experts(config)


def hf5_layout(config: ModelConfig) -> list[Piece]:
    """transformers 5 in memory: all experts in one tensor, gate above up."""
    return _hf_common(config) + hf5_experts(config)


_FFN_NORM = "layers.{i}.ffn_norm.weight"
_GGUF_NAMES = {
    **{source: target for source, target in GGUF_COMMON.items() if target != _FFN_NORM},
    "blk.{i}.post_attention_norm.weight": _FFN_NORM,
    **GGUF_FFN,
    **GGUF_QK_NORMS,
    **deepseek_moe.GGUF_MIXTURE,
}


def gguf_map(config: ModelConfig) -> list[Piece]:
    """Every tensor of arch ``glm4moe``."""
    return copies(config, _GGUF_NAMES) + gguf_keys.projections(config, interleaved=False)


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``glm4moe``."""
    keys = gguf_keys.architecture_keys(metadata, "glm4moe")
    keys.must_be("expert_gating_func", deepseek_moe.SIGMOID, 0)  # llama.cpp: none is the sigmoid in this arch
    keys.must_be("nextn_predict_layers", 0, 1)
    common = common_from_gguf(keys, metadata, shapes)
    n_more = keys.integer("nextn_predict_layers") if keys.has("nextn_predict_layers") else 0
    ffns = deepseek_moe.ffns_from_gguf(keys, common["n_layers"] - n_more)
    config = _model(common, ffns, "blk.0.attn_q_norm.weight" in shapes)
    keys.finish(gguf_keys.IGNORED)
    return config


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``glm4moe``, without the layer that is left out."""
    return deepseek_moe.config_to_gguf(config, "glm4moe", config_from_gguf)


_PREDICTION = (
    *(f"model.layers.0.{name}.weight" for name in ("eh_proj", "enorm", "hnorm", "embed_tokens")),
    *(f"model.layers.0.shared_head.{name}.weight" for name in ("norm", "head")),
    *(f"blk.0.nextn.{name}.weight" for name in ("eh_proj", "enorm", "hnorm", "embed_tokens")),
    *(f"blk.0.nextn.shared_head_{name}.weight" for name in ("norm", "head")),
)


def left_out(config: ModelConfig) -> frozenset[str]:
    """Tensors of the layer behind the last."""
    return layer_behind(config, hf_layout, gguf_map)


def layer_behind(config: ModelConfig, *maps: MapBuilder) -> frozenset[str]:
    """Tensors of a layer for multi-token prediction: one like the last, and what joins it to the model.

    Args:
        maps: the weight maps that name a layer's tensors.
    """
    last = replace(config, layers=config.layers[-1:])
    names = {*_PREDICTION, *(name for build in maps for name in source_shapes(build(last)))}
    layer = {name for name in names if name.startswith(("model.layers.0.", "blk.0."))}
    return frozenset(name.replace(".0.", f".{config.n_layers}.", 1) for name in layer)


def notes(raw: Mapping[str, object]) -> list[str]:
    """What is said of the layer for multi-token prediction."""
    of_gguf = (f"{raw.get('general.architecture')}.nextn_predict_layers",)
    if not any(raw.get(key) for key in (*PREDICTION_KEYS, *of_gguf)):
        return []
    return ["the layer behind the last, which predicts one token more (multi-token prediction), is left out"]


FAMILY = Family(
    name="glm4moe",
    presets=PRESETS,
    model_types=("glm4_moe", _SOLAR),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={"hf": hf_layout, "hf5": hf5_layout},
    gguf_archs=("glm4moe",),
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_map=gguf_map,
    left_out=left_out,
    notes=notes,
    tied_copies=HF_TIED,
)
