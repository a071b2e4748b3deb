"""DeepSeek-V2, V3 and R1, Kimi-K2 and GLM-4.7-Flash: latent attention, and mixtures with shared networks.

    deepseek_v2     softmax over all experts, weights as they are times a factor; V2 chooses in the best groups, each
                    as good as its best expert; V2-Lite has no groups and no latent for queries
    deepseek_v3     sigmoid scores with a correction, groups as good as their two best (R1 too; kimi_k2: one group)
    glm4_moe_lite   V3's block in one group

V3, R1 and GLM-4.7-Flash end with a layer for multi-token prediction, which no answer depends on: it is left out by
name, and ``info`` says so. GGUF has one architecture, deepseek2, for all of them; scores tell V2's from the others, and
GLM's vocabulary GLM's, as in llama.cpp. There groups are as good as their two best experts, V2's too: such a file is
read as DeepSeek made the model, by the best one.
Sources: transformers 4.57.6 and 5.24.0 (modeling_deepseek_v2, modeling_deepseek_v3, modeling_glm4_moe_lite), llama.cpp
(src/models/deepseek2.cpp), the published config.json files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from quadriga.errors import ConfigError
from quadriga.model.config import (
    DenseSpec,
    LatentAttentionSpec,
    LayerSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    RopeSpec,
    YarnScaling,
    in_order,
)
from quadriga.model.families import deepseek_moe, gguf_keys, latent
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.glm4moe import PREDICTION_KEYS, layer_behind, notes
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.llama2 import GGUF_COMMON, GGUF_FFN, HF_COMMON, HF_FFN, HF_TIED
from quadriga.model.families.pieces import copies
from quadriga.model.families.qwen3 import hf5_experts, hf_experts
from quadriga.model.weight_map import Piece, Shape

_V2: dict[str, Any] = {
    "score": "softmax",
    "correction": False,
    "normalize_p": None,
    "normalize_eps": 0.0,
    "group_worth": "best",
}
"""What DeepSeek-V2's mixtures have other than V3's."""
_V3_CHOICE: dict[str, Any] = {"score": "sigmoid", "correction": True, "normalize_eps": deepseek_moe.EPS}
IGNORED = PRETRAINED_KEYS | {"aux_loss_alpha", "seq_aux", "ep_size"}
"""Settings of the training's balance loss, and how many processes a program spread the experts over."""
GLM_VOCABULARY = 154_880


def _yarn(factor: float) -> YarnScaling:
    return YarnScaling(factor=factor, original_max_seq_len=4096, attention_factor=1.0)


def _attention(
    *, n_heads: int, q_rank: int | None, rope: RopeSpec, mscale: float = 0.0, **dims: int
) -> LatentAttentionSpec:
    sizes: dict[str, Any] = {"nope_dim": 128, "rope_dim": 64, "v_dim": 128} | dims
    return LatentAttentionSpec(n_heads=n_heads, kv_rank=512, q_rank=q_rank, position=rope, yarn_mscale=mscale, **sizes)


def _moe(*, d_ff: int, n_experts: int, top_k: int, n_shared: int, **fields: Any) -> MoESpec:
    return MoESpec(
        d_ff=d_ff,
        n_experts=n_experts,
        top_k=top_k,
        activation="silu",
        shared=DenseSpec(d_ff=n_shared * d_ff, activation="silu"),
        **_V3_CHOICE | fields,
    )


def _preset(
    family: str,
    *,
    mixer: LatentAttentionSpec,
    moe: MoESpec,
    n_layers: int,
    n_dense: int,
    d_ff: int,
    eps: float,
    **model: Any,
) -> ModelConfig:
    norm, dense = NormSpec(kind="rms", eps=eps), DenseSpec(d_ff=d_ff, activation="silu")
    layers = in_order(LayerSpec(norm=norm, mixer=mixer, ffn=dense if i < n_dense else moe) for i in range(n_layers))
    return ModelConfig(family=family, layers=layers, final_norm=norm, **model)


_ROPE = RopeSpec(theta=10_000.0, scaling=_yarn(40.0))
_V2_TOKENS = {"vocab_size": 102_400, "max_seq_len": 163_840, "bos_id": 100_000, "eos_ids": (100_001,)}
_V3 = _preset(
    "deepseek_v3",
    mixer=_attention(n_heads=128, q_rank=1536, rope=_ROPE, mscale=1.0),
    moe=_moe(d_ff=2048, n_experts=256, top_k=8, n_shared=1, n_groups=8, top_k_groups=4, routed_scale=2.5),
    n_layers=61,
    n_dense=3,
    d_ff=18_432,
    eps=1e-6,
    d_model=7168,
    vocab_size=129_280,
    max_seq_len=163_840,
    bos_id=0,
    eos_ids=(1,),
)
V2_PRESETS = {
    "deepseek-v2-lite": _preset(
        "deepseek_v2",
        mixer=_attention(n_heads=16, q_rank=None, rope=_ROPE, mscale=0.707),
        moe=_moe(d_ff=1408, n_experts=64, top_k=6, n_shared=2, **_V2),
        n_layers=27,
        n_dense=1,
        d_ff=10_944,
        eps=1e-6,
        d_model=2048,
        **_V2_TOKENS,
    ),
    "deepseek-v2": _preset(
        "deepseek_v2",
        mixer=_attention(n_heads=128, q_rank=1536, rope=_ROPE, mscale=1.0),
        moe=_moe(d_ff=1536, n_experts=160, top_k=6, n_shared=2, n_groups=8, top_k_groups=3, routed_scale=16.0, **_V2),
        n_layers=60,
        n_dense=1,
        d_ff=12_288,
        eps=1e-6,
        d_model=5120,
        **_V2_TOKENS,
    ),
}
V3_PRESETS = {
    "deepseek-v3": _V3,
    "deepseek-r1": _V3,
    "kimi-k2": _preset(
        "deepseek_v3",
        mixer=_attention(
            n_heads=64,
            q_rank=1536,
            rope=RopeSpec(theta=50_000.0, scaling=replace(_yarn(32.0), beta_fast=1.0)),
            mscale=1.0,
        ),
        moe=_moe(d_ff=2048, n_experts=384, top_k=8, n_shared=1, routed_scale=2.827),
        n_layers=61,
        n_dense=1,
        d_ff=18_432,
        eps=1e-6,
        d_model=7168,
        vocab_size=163_840,
        max_seq_len=131_072,
        bos_id=163_584,
        eos_ids=(163_585,),
    ),
}
GLM_PRESETS = {
    "glm-4.7-flash": _preset(
        "glm4_moe_lite",
        mixer=_attention(n_heads=20, q_rank=768, rope=RopeSpec(theta=1_000_000.0), nope_dim=192, v_dim=256),
        moe=_moe(d_ff=1536, n_experts=64, top_k=4, n_shared=1, routed_scale=1.8),
        n_layers=47,
        n_dense=1,
        d_ff=10_240,
        eps=1e-5,
        d_model=2048,
        vocab_size=GLM_VOCABULARY,
        max_seq_len=202_752,
        eos_ids=(154_820, 154_827, 154_829),
        pad_id=154_820,
    )
}

# config.json ---------------------------------------------------------------------------------------------------------


def _model(family: str, keys: Keys, ffns: list[DenseSpec | MoESpec]) -> ModelConfig:
    keys.must_be("hidden_act", "silu")
    keys.must_be("mlp_bias", False)
    keys.must_be("moe_layer_freq", 1)
    norm, mixer = NormSpec(kind="rms", eps=keys.number("rms_norm_eps")), latent.mixer_from_hf(keys)
    config = ModelConfig(
        family=family,
        vocab_size=keys.integer("vocab_size"),
        d_model=keys.integer("hidden_size"),
        max_seq_len=keys.integer("max_position_embeddings"),
        layers=in_order(LayerSpec(norm=norm, mixer=mixer, ffn=ffn) for ffn in ffns),
        final_norm=norm,
        tied_embeddings=keys.flag("tie_word_embeddings"),
        bos_id=keys.token_id("bos_token_id"),
        eos_ids=keys.token_ids("eos_token_id"),
        pad_id=keys.token_id("pad_token_id"),
    )
    keys.finish(IGNORED)
    return config


def v2_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a DeepSeek-V2 config.json, as DeepSeek or transformers 4 or 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "deepseek_v2")
    keys.must_be("scoring_func", "softmax")
    # DeepSeek's own code divides by the sum in place of the factor, transformers multiplies all the same.
    keys.must_be("norm_topk_prob", False)
    method = keys.text("topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        raise ConfigError(f"config.json: topk_method must be greedy or group_limited_greedy, got {method[:40]!r}")
    one = {"n_groups": 1, "top_k_groups": 1} if method == "greedy" else {}
    ffns = deepseek_moe.ffns_from_hf(keys, keys.integer("num_hidden_layers"), **_V2, **one)
    return _model("deepseek_v2", keys, ffns)


def v3_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a DeepSeek-V3 or Kimi-K2 config.json."""
    return _sigmoid_from_hf("deepseek_v3", ("deepseek_v3", "kimi_k2"), Keys(raw, "config.json"))


def glm_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a GLM-4.7-Flash config.json; transformers 5 writes kinds of layers in place of how many are dense."""
    keys = Keys(raw, "config.json")
    if not keys.given("mlp_layer_types"):
        return _sigmoid_from_hf("glm4_moe_lite", ("glm4_moe_lite",), keys)
    n_layers, kinds = keys.integer("num_hidden_layers"), keys.value("mlp_layer_types")
    n_dense = kinds.count("dense") if isinstance(kinds, list) else 0
    keys.must_be("mlp_layer_types", ["dense"] * n_dense + ["sparse"] * (min(n_layers, 10_001) - n_dense))
    keys.must_be("first_k_dense_replace", n_dense)
    return _sigmoid_from_hf(
        "glm4_moe_lite", ("glm4_moe_lite",), Keys({**raw, "first_k_dense_replace": n_dense}, "config.json")
    )


def _sigmoid_from_hf(family: str, types: tuple[str, ...], keys: Keys) -> ModelConfig:
    keys.must_be("model_type", *types)
    keys.must_be("scoring_func", "sigmoid")
    keys.must_be("topk_method", "noaux_tc")
    keys.value("mlp_layer_types")  # compared with first_k_dense_replace by the caller
    for key in PREDICTION_KEYS:
        keys.must_be(key, 0, 1, None)  # see ``left_out``
    return _model(family, keys, deepseek_moe.ffns_from_hf(keys, keys.integer("num_hidden_layers")))


def _to_hf(
    config: ModelConfig, form: str, read: Callable[[Mapping[str, object]], ModelConfig], **own: Any
) -> dict[str, object]:
    mixer = of_kind(config.layers[0].attention, LatentAttentionSpec, form)
    raw: dict[str, object] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        **latent.mixer_to_hf(mixer, form),
        **deepseek_moe.to_hf(config, form),
        "hidden_act": config.layers[0].network.activation,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.final_norm.eps,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
        "pad_token_id": config.pad_id,
        "use_cache": True,
        **own,
    }
    must_read_back(config, read(raw), form)
    return raw


def v2_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "DeepSeek-V2's config.json"
    method = "greedy" if config.only_moe(form).n_groups == 1 else "group_limited_greedy"
    own = {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "scoring_func": "softmax"}
    return _to_hf(config, form, v2_from_hf, topk_method=method, **own)


def v3_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it, without the layer that is left out."""
    own = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_nextn_predict_layers": 0}
    return _to_hf(
        config, "DeepSeek-V3's config.json", v3_from_hf, scoring_func="sigmoid", topk_method="noaux_tc", **own
    )


def glm_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 5 reads it, without the layer that is left out."""
    n_dense = deepseek_moe.first_dense(config)
    own = {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "mlp_layer_types": ["dense"] * n_dense + ["sparse"] * (config.n_layers - n_dense),
        "num_nextn_predict_layers": 0,
    }
    return _to_hf(config, "GLM-4.7-Flash's config.json", glm_from_hf, **own)


# GGUF ----------------------------------------------------------------------------------------------------------------


def _from_gguf(
    family: str, metadata: Mapping[str, object], shapes: Mapping[str, Shape], gating: tuple[int, ...], **mixture: Any
) -> ModelConfig:
    keys = gguf_keys.architecture_keys(metadata, "deepseek2")
    keys.must_be("expert_gating_func", *gating)
    keys.must_be("nextn_predict_layers", 0, 1)
    n_more = keys.integer("nextn_predict_layers") if keys.given("nextn_predict_layers") else 0
    n_layers, max_seq_len = keys.integer("block_count") - n_more, keys.integer("context_length")
    norm = NormSpec(kind="rms", eps=gguf_keys.number(keys, "attention.layer_norm_rms_epsilon"))
    mixer = latent.mixer_from_gguf(keys, metadata, shapes, max_seq_len)
    ffns = deepseek_moe.ffns_from_gguf(keys, n_layers, groups=True, **mixture)
    config = ModelConfig(
        family=family,
        vocab_size=gguf_keys.vocabulary_size(keys, shapes),
        d_model=keys.integer("embedding_length"),
        max_seq_len=max_seq_len,
        layers=in_order(LayerSpec(norm=norm, mixer=mixer, ffn=ffn) for ffn in ffns),
        final_norm=norm,
        tied_embeddings=gguf_keys.OUTPUT not in shapes,
        **gguf_keys.token_ids(metadata),
    )
    keys.finish(gguf_keys.IGNORED)
    return config


def v2_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of DeepSeek-V2: of softmax scores, which llama.cpp takes where a file says nothing."""
    return _from_gguf("deepseek_v2", metadata, shapes, (deepseek_moe.SOFTMAX, 0), **_V2)


def v3_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of DeepSeek-V3 or Kimi-K2."""
    return _from_gguf("deepseek_v3", metadata, shapes, (deepseek_moe.SIGMOID,))


def glm_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of GLM-4.7-Flash, whose first files say nothing of scores."""
    return _from_gguf("glm4_moe_lite", metadata, shapes, (deepseek_moe.SIGMOID, 0))


def family_of_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> Family:
    """Whose model a GGUF of arch ``deepseek2`` is: the file names none of them."""
    gating = metadata.get("deepseek2.expert_gating_func")
    if shapes.get(gguf_keys.TOKEN_EMBEDDING, (0,))[0] == GLM_VOCABULARY and gating in (None, 0, deepseek_moe.SIGMOID):
        return GLM
    return V3 if gating == deepseek_moe.SIGMOID else V2


def _to_gguf(
    config: ModelConfig, read: Callable[[Mapping[str, object], Mapping[str, Shape]], ModelConfig]
) -> dict[str, object]:
    arch = "deepseek2"
    form, moe = f"GGUF arch {arch}", config.only_moe(f"GGUF arch {arch}")
    like = deepseek_moe.like_its_mixtures(config)
    metadata = {
        **gguf_keys.common_keys(like, arch),
        **latent.mixer_to_gguf(of_kind(like.layers[0].attention, LatentAttentionSpec, form), arch),
        **deepseek_moe.to_gguf(config, arch),
    }
    if moe.n_groups > 1:
        metadata |= {f"{arch}.expert_group_count": moe.n_groups, f"{arch}.expert_group_used_count": moe.top_k_groups}
    gguf_keys.must_read_back(config, read, metadata, form)
    return metadata


# Weights -------------------------------------------------------------------------------------------------------------


def _hf_common(config: ModelConfig) -> list[Piece]:
    return copies(config, HF_COMMON | HF_FFN | deepseek_moe.HF_MIXTURE) + latent.hf_attention(config)


def hf_layout(config: ModelConfig) -> list[Piece]:
    """transformers 4, and every published checkpoint: a matrix per expert."""
    return _hf_common(config) + hf_experts(config)


def hf5_layout(config: ModelConfig) -> list[Piece]:
    """transformers 5 in memory: all experts in one tensor, gate above up."""
    return _hf_common(config) + hf5_experts(config)


def gguf_map(config: ModelConfig) -> list[Piece]:
    """Every tensor of arch ``deepseek2``, as llama.cpp writes it since April 2025."""
    names = GGUF_COMMON | GGUF_FFN | deepseek_moe.GGUF_MIXTURE
    return copies(config, names) + latent.gguf_attention(config, joined=False)


def gguf_joined_map(config: ModelConfig) -> list[Piece]:
    """The same before: W_Kb and W_Vb are one matrix."""
    names = GGUF_COMMON | GGUF_FFN | deepseek_moe.GGUF_MIXTURE
    return copies(config, names) + latent.gguf_attention(config, joined=True)


def left_out(config: ModelConfig) -> frozenset[str]:
    """Tensors of the layer behind the last."""
    return layer_behind(config, hf_layout, gguf_map)


_COMMON: dict[str, Any] = {
    "layouts": {"hf": hf_layout, "hf5": hf5_layout},
    "gguf_archs": ("deepseek2",),
    "gguf_map": gguf_map,
    "gguf_joined_map": gguf_joined_map,
    "left_out": left_out,
    "notes": notes,
    # ik_llama.cpp writes it beside the two tensors that it is made of, GGUF's and old transformers' buffers follow.
    "ignored_tensors": ("blk.*.attn_kv_b.weight", "model.layers.*.self_attn.rotary_emb.inv_freq"),
    "tied_copies": HF_TIED,
}
V2 = Family(
    name="deepseek_v2",
    presets=V2_PRESETS,
    model_types=("deepseek_v2",),
    config_from_hf=v2_from_hf,
    config_to_hf=v2_to_hf,
    config_from_gguf=v2_from_gguf,
    config_to_gguf=lambda config: _to_gguf(config, v2_from_gguf),
    **_COMMON,
)
V3 = Family(
    name="deepseek_v3",
    presets=V3_PRESETS,
    model_types=("deepseek_v3", "kimi_k2"),
    config_from_hf=v3_from_hf,
    config_to_hf=v3_to_hf,
    config_from_gguf=v3_from_gguf,
    config_to_gguf=lambda config: _to_gguf(config, v3_from_gguf),
    **_COMMON,
)
GLM = Family(
    name="glm4_moe_lite",
    presets=GLM_PRESETS,
    model_types=("glm4_moe_lite",),
    config_from_hf=glm_from_hf,
    config_to_hf=glm_to_hf,
    config_from_gguf=glm_from_gguf,
    config_to_gguf=lambda config: _to_gguf(config, glm_from_gguf),
    **_COMMON,
)
