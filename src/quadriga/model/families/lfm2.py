"""LFM2 (Liquid AI, July 2025 on), dense and as a mixture: short convolutions, every third to fifth layer attention.

A layer's first half is a gated convolution over three positions or attention with a norm on every head's q and k; its
second half a gated network, and in the mixtures behind the first layers 32 experts, 4 of them chosen by sigmoid scores
with a correction, their weights divided by their sum plus 1e-6. Sources: transformers 4.57.6 (modeling_lfm2) and 5.24.0
(modeling_lfm2_moe), llama.cpp (archs lfm2 and lfm2moe, conversion/lfm2.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quadriga.errors import ConfigError
from quadriga.model.config import (
    AttentionSpec,
    DenseSpec,
    LayerSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    QKNormSpec,
    RopeSpec,
    ShortConvSpec,
    countable,
    in_order,
    uniform,
)
from quadriga.model.families import deepseek_moe, gguf_keys
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.llama2 import (
    GGUF_COMMON,
    GGUF_FFN,
    HF_TIED,
    attention_from_hf,
    common_from_gguf,
    common_to_gguf,
    common_to_hf,
)
from quadriga.model.families.pieces import copies, experts, gate_up, qkv
from quadriga.model.families.qwen3 import GGUF_QK_NORMS
from quadriga.model.weight_map import Piece, Shape

EPS = 1e-6
"""Added to the sum of the chosen scores; a constant of the program."""
IGNORED = PRETRAINED_KEYS | {
    "block_mlp_init_scale",
    "block_out_init_scale",
    "block_use_xavier_init",
    "conv_use_xavier_init",
}
"""How the weights were drawn before training."""

Ffns = Sequence[DenseSpec | MoESpec]


def _model(family: str, common: Mapping[str, Any], ffns: Ffns, attends: Sequence[bool], taps: int) -> ModelConfig:
    """LFM2's layers; ``common`` as of LLaMA, with ``tied_embeddings``."""
    rest = {key: value for key, value in common.items() if key not in ("norm", "mixer", "n_layers")}
    norm = common["norm"]
    attention = replace(common["mixer"], qk_norm=QKNormSpec(over="head", eps=norm.eps))
    convolution = ShortConvSpec(width=common["d_model"], taps=taps)
    layers = in_order(
        LayerSpec(norm=norm, mixer=attention if attends_ else convolution, ffn=ffn)
        for attends_, ffn in zip(attends, ffns, strict=True)
    )
    return ModelConfig(family=family, layers=layers, final_norm=norm, **rest)


def _preset(
    *,
    d_model: int,
    ffns: Ffns,
    attention_layers: Sequence[int],
    family: str = "lfm2",
    vocab_size: int = 65_536,
    theta: float = 1_000_000.0,
    ids: tuple[int, int, int] = (1, 7, 0),
) -> ModelConfig:
    common = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "max_seq_len": 128_000,
        "norm": NormSpec(kind="rms", eps=1e-5),
        "mixer": AttentionSpec(n_heads=d_model // 64, n_kv_heads=8, head_dim=64, position=RopeSpec(theta=theta)),
        "tied_embeddings": True,
        "bos_id": ids[0],
        "eos_ids": (ids[1],),
        "pad_id": ids[2],
    }
    return _model(family, common, ffns, [i in attention_layers for i in range(len(ffns))], 3)


def _dense(d_model: int, d_ff: int, n_layers: int = 16, at: Sequence[int] = (2, 5, 8, 10, 12, 14)) -> ModelConfig:
    return _preset(d_model=d_model, ffns=[DenseSpec(d_ff=d_ff, activation="silu")] * n_layers, attention_layers=at)


_MOE = MoESpec(
    d_ff=1792,
    n_experts=32,
    top_k=4,
    activation="silu",
    score="sigmoid",
    correction=True,
    normalize_eps=EPS,
)


def _mixture(vocab_size: int, theta: float, ids: tuple[int, int, int]) -> ModelConfig:
    return _preset(
        d_model=2048,
        ffns=[DenseSpec(d_ff=7168, activation="silu")] * 2 + [_MOE] * 22,
        attention_layers=(2, 6, 10, 14, 18, 21),
        family="lfm2moe",
        vocab_size=vocab_size,
        theta=theta,
        ids=ids,
    )


DENSE_PRESETS = {
    "lfm2-350m": _dense(1024, 4608),
    "lfm2-700m": _dense(1536, 6912),
    "lfm2-1.2b": _dense(2048, 8192),
    "lfm2-2.6b": _dense(2048, 10_752, 30, (2, 5, 9, 13, 17, 21, 24, 27)),
}
MOE_PRESETS = {"lfm2-8b-a1b": _mixture(65_536, 1_000_000.0, (1, 7, 0))}


# config.json ---------------------------------------------------------------------------------------------------------


def dense_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read LFM2's config.json: the makers' own keys, or those of transformers 4 or 5."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "lfm2")
    keys.must_be("block_use_swiglu", True)
    keys.must_be("use_pos_enc", True)
    # transformers: the makers' own key is the one that counts where both are given.
    width = keys.integer("block_ff_dim") if keys.given("block_ff_dim") else keys.integer("intermediate_size")
    keys.has("intermediate_size")
    ffn = DenseSpec(d_ff=_adjusted(keys, width), activation="silu")
    common, attends = _common_from_hf(keys, by_index=True)
    for same in ("block_dim", "conv_dim", "conv_dim_out"):
        keys.must_be(same, common["d_model"])
    keys.must_be("num_heads", common["mixer"].n_heads)
    keys.must_be("block_norm_eps", common["norm"].eps)
    config = _model("lfm2", common, [ffn] * len(attends), attends, keys.integer("conv_L_cache"))
    keys.finish(IGNORED)
    return config


def _adjusted(keys: Keys, width: int) -> int:
    """The feed-forward width that the keys of its rounding make of the one that is written."""
    if not keys.flag("block_auto_adjust_ff_dim"):
        keys.has("block_ffn_dim_multiplier"), keys.has("block_multiple_of")  # without a say then
        return width
    factor, multiple = keys.number_or_null("block_ffn_dim_multiplier"), keys.integer("block_multiple_of")
    if not 0 < width < 2**31:  # a size out of bounds is for the specs to refuse
        return width
    if multiple < 1 or not (factor is None or 0 < factor < 1e6):
        raise ConfigError(
            f"config.json: block_multiple_of must be 1 or more and block_ffn_dim_multiplier above 0; got {multiple} "
            f"and {factor}"
        )
    width = int(2 * width / 3)
    return width if factor is None else multiple * -(-int(factor * width) // multiple)


def moe_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read LFM2-MoE's config.json, as transformers 4 or 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "lfm2_moe")
    moe = MoESpec(
        d_ff=keys.integer("moe_intermediate_size"),
        n_experts=keys.integer("num_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        activation="silu",
        score="sigmoid",
        correction=keys.flag("use_expert_bias"),
        normalize_p=1.0 if keys.flag("norm_topk_prob") else None,
        normalize_eps=EPS,
        routed_scale=keys.number("routed_scaling_factor"),
    )
    dense = DenseSpec(d_ff=keys.integer("intermediate_size"), activation="silu")
    first = keys.integer("num_dense_layers")
    common, attends = _common_from_hf(keys, by_index=False)
    ffns = [dense if i < first else moe for i in range(len(attends))]
    config = _model("lfm2moe", common, ffns, attends, keys.integer("conv_L_cache"))
    keys.finish(IGNORED)
    return config


def _common_from_hf(keys: Keys, *, by_index: bool) -> tuple[dict[str, Any], list[bool]]:
    """LLaMA's common fields, and which layers are attention; ``by_index``: see :func:`_attends`."""
    keys.must_be("conv_bias", False)
    n_layers = countable(keys.integer("num_hidden_layers"))
    keys.integer("num_key_value_heads")  # every published file has it, and the class's default is no other key's value
    attention = attention_from_hf(keys)
    if isinstance(attention.position, RopeSpec):
        keys.must_be("theta", attention.position.theta)
    # The class's default is tied, and transformers leaves out what is; the makers' key has another name.
    names = [name for name in ("tie_embedding", "tie_word_embeddings") if keys.has(name)]
    tied = keys.flag(names[0]) if names else True
    for name in names:
        keys.must_be(name, tied)
    common = {
        "vocab_size": keys.integer("vocab_size"),
        "d_model": keys.integer("hidden_size"),
        "max_seq_len": keys.integer("max_position_embeddings"),
        "norm": NormSpec(kind="rms", eps=keys.number("norm_eps")),
        "mixer": attention,
        "tied_embeddings": tied,
        "bos_id": keys.token_id("bos_token_id"),
        "eos_ids": keys.token_ids("eos_token_id"),
        "pad_id": keys.token_id("pad_token_id"),
    }
    return common, _attends(keys, n_layers, by_index=by_index)


def _attends(keys: Keys, n_layers: int, *, by_index: bool) -> list[bool]:
    """Which layers are attention: by ``layer_types``, or (``by_index``, LFM2's first files) by ``full_attn_idxs``."""
    at = keys.integers("full_attn_idxs") if by_index and keys.given("full_attn_idxs") else ()
    if at and not keys.given("layer_types"):
        return [i in at for i in range(n_layers)]
    return [one == "full_attention" for one in keys.words("layer_types", ("full_attention", "conv"), n_layers)]


def _attending(config: ModelConfig) -> ModelConfig:
    """A model whose layers are all like its first attention: what the keys that all share are written from."""
    return replace(config, layers=uniform(config.first_attention(), config.n_layers))


def _taps(config: ModelConfig, form: str) -> int:
    """Taps of the convolutions, which must be as wide as the model."""
    for layer in config.kinds():
        if not isinstance(layer.mixer, AttentionSpec):
            return of_kind(layer.mixer, ShortConvSpec, form).taps
    raise ConfigError(f"{form} cannot express this model: it has no short convolution")


def _to_hf(config: ModelConfig, form: str) -> dict[str, object]:
    raw = common_to_hf(_attending(config), form)
    eps = raw.pop("rms_norm_eps")
    for key in ("head_dim", "hidden_act", "attention_bias"):  # constants of the classes, or made of other sizes
        del raw[key]
    raw |= {
        "norm_eps": eps,
        "conv_bias": False,
        "conv_L_cache": _taps(config, form),
        "layer_types": [
            "full_attention" if isinstance(layer.mixer, AttentionSpec) else "conv" for layer in config.layers
        ],
    }
    return raw


def dense_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "LFM2's config.json"
    raw = {
        **_to_hf(config, form),
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": "lfm2",
        "block_auto_adjust_ff_dim": False,
    }
    must_read_back(config, dense_from_hf(raw), form)
    return raw


def moe_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 5 reads it."""
    form = "LFM2-MoE's config.json"
    moe = config.only_moe(form)
    first = deepseek_moe.first_dense(config)
    raw = {
        **_to_hf(config, form),
        "architectures": ["Lfm2MoeForCausalLM"],
        "model_type": "lfm2_moe",
        # Where no layer is dense, nothing is of this width.
        "intermediate_size": config.layers[0].ffn.d_ff if first else moe.d_ff * moe.top_k,
        "moe_intermediate_size": moe.d_ff,
        "num_dense_layers": first,
        "num_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.normalize_p is not None,
        "routed_scaling_factor": moe.routed_scale,
        "use_expert_bias": moe.correction,
    }
    must_read_back(config, moe_from_hf(raw), form)
    return raw


# Weights -------------------------------------------------------------------------------------------------------------

_LAYER, _OURS = "model.layers.{i}.", "layers.{i}."
_HF_NAMES = {
    "model.embed_tokens.weight": "embed.weight",
    _LAYER + "operator_norm.weight": _OURS + "attn_norm.weight",
    _LAYER + "self_attn.out_proj.weight": _OURS + "attn.wo.weight",
    _LAYER + "self_attn.q_layernorm.weight": _OURS + "attn.q_norm.weight",
    _LAYER + "self_attn.k_layernorm.weight": _OURS + "attn.k_norm.weight",
    _LAYER + "conv.in_proj.weight": _OURS + "conv.w_in.weight",
    _LAYER + "conv.out_proj.weight": _OURS + "conv.w_out.weight",
    _LAYER + "ffn_norm.weight": _OURS + "ffn_norm.weight",
    _LAYER + "feed_forward.w1.weight": _OURS + "ffn.w_gate",
    _LAYER + "feed_forward.w3.weight": _OURS + "ffn.w_up",
    _LAYER + "feed_forward.w2.weight": _OURS + "ffn.w_down",
    _LAYER + "feed_forward.gate.weight": _OURS + "moe.router.weight",
    _LAYER + "feed_forward.expert_bias": _OURS + "moe.router.correction",
    "model.embedding_norm.weight": "final_norm.weight",
    "lm_head.weight": "lm_head.weight",
}


def taps_of_conv1d(config: ModelConfig, source: str, target: str) -> list[Piece]:
    """Pieces for the taps of every channel as torch's Conv1d keeps them: (C, 1, L) for (C, L)."""
    return [
        replace(
            piece,
            source_shape=(piece.target_shape[0], 1, piece.target_shape[1]),
            view=piece.target_shape,
        )
        for piece in copies(config, {source: target})
    ]


def _hf_common(config: ModelConfig) -> list[Piece]:
    q, k, v = (f"{_LAYER}self_attn.{part}_proj.weight" for part in "qkv")
    taps = taps_of_conv1d(config, _LAYER + "conv.conv.weight", _OURS + "conv.taps")
    return copies(config, _HF_NAMES) + taps + qkv(config, q, k, v)


def hf_layout(config: ModelConfig) -> list[Piece]:
    """Every published checkpoint: a matrix per expert."""
    name = _LAYER + "feed_forward.experts.{e}."
    return [
        *_hf_common(config),
        *experts(config, "w_gate", name + "w1.weight"),
        *experts(config, "w_up", name + "w3.weight"),
        *experts(config, "w_down", name + "w2.weight"),
    ]


def hf5_layout(config: ModelConfig) -> list[Piece]:
    """transformers 5 in memory: all experts in one tensor, gate above up."""
    down = {_LAYER + "feed_forward.experts.down_proj": _OURS + "moe.w_down"}
    return [
        *_hf_common(config),
        *copies(config, down),
        *gate_up(config, _LAYER + "feed_forward.experts.gate_up_proj"),
    ]


# GGUF ----------------------------------------------------------------------------------------------------------------

_GGUF_NAMES = {
    **{source: target for source, target in GGUF_COMMON.items() if target != "final_norm.weight"},
    "token_embd_norm.weight": "final_norm.weight",  # llama.cpp's name for it in these architectures
    **GGUF_FFN,
    **GGUF_QK_NORMS,
    **gguf_keys.ROUTER,
    **gguf_keys.MERGED_EXPERTS,
    **deepseek_moe.GGUF_CORRECTION,
    "blk.{i}.shortconv.conv.weight": _OURS + "conv.taps",
    "blk.{i}.shortconv.in_proj.weight": _OURS + "conv.w_in.weight",
    "blk.{i}.shortconv.out_proj.weight": _OURS + "conv.w_out.weight",
}


def gguf_map(config: ModelConfig) -> list[Piece]:
    """llama.cpp's names of both archs."""
    return copies(config, _GGUF_NAMES) + gguf_keys.projections(config, interleaved=False)


def _from_gguf(
    arch: str, metadata: Mapping[str, object], shapes: Mapping[str, Shape]
) -> tuple[Keys, dict[str, Any], list[bool]]:
    """The keys, LLaMA's common fields, and which layers are attention: those with heads for keys and values."""
    plain, attends = gguf_keys.by_heads(metadata, arch, "a convolution")
    keys = gguf_keys.architecture_keys(plain, arch)
    return keys, common_from_gguf(keys, metadata, shapes), attends


def dense_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``lfm2``."""
    keys, common, attends = _from_gguf("lfm2", metadata, shapes)
    ffn = DenseSpec(d_ff=keys.integer("feed_forward_length"), activation="silu")
    config = _model("lfm2", common, [ffn] * len(attends), attends, keys.integer("shortconv.l_cache"))
    keys.finish(gguf_keys.IGNORED)
    return config


def moe_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``lfm2moe``: llama.cpp divides the chosen weights by their sum and scales them by nothing."""
    keys, common, attends = _from_gguf("lfm2moe", metadata, shapes)
    keys.must_be("expert_gating_func", deepseek_moe.SIGMOID)
    keys.must_be("expert_weights_norm", True)
    keys.must_be("expert_weights_scale", 1, 0)
    moe = MoESpec(
        d_ff=keys.integer("expert_feed_forward_length"),
        n_experts=keys.integer("expert_count"),
        top_k=keys.integer("expert_used_count"),
        activation="silu",
        score="sigmoid",
        correction=True,
        normalize_eps=EPS,
    )
    dense = DenseSpec(d_ff=keys.integer("feed_forward_length"), activation="silu")
    first = keys.integer("leading_dense_block_count") if keys.given("leading_dense_block_count") else 0
    ffns = [dense if i < first else moe for i in range(len(attends))]
    config = _model("lfm2moe", common, ffns, attends, keys.integer("shortconv.l_cache"))
    keys.finish(gguf_keys.IGNORED)
    return config


def _to_gguf(config: ModelConfig, form: str, arch: str) -> dict[str, object]:
    heads = [layer.mixer.n_kv_heads if isinstance(layer.mixer, AttentionSpec) else 0 for layer in config.layers]
    return {
        **common_to_gguf(_attending(config), form, arch),
        f"{arch}.attention.head_count_kv": heads,
        f"{arch}.shortconv.l_cache": _taps(config, form),
    }


def dense_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``lfm2``."""
    form = "GGUF arch lfm2"
    metadata = _to_gguf(config, form, "lfm2")
    gguf_keys.must_read_back(config, dense_from_gguf, metadata, form)
    return metadata


def moe_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``lfm2moe``."""
    form, arch = "GGUF arch lfm2moe", "lfm2moe"
    moe, first = config.only_moe(form), deepseek_moe.first_dense(config)
    metadata = {
        **_to_gguf(config, form, arch),
        f"{arch}.feed_forward_length": config.layers[0].ffn.d_ff if first else moe.d_ff * moe.top_k,
        f"{arch}.leading_dense_block_count": first,
        f"{arch}.expert_count": moe.n_experts,
        f"{arch}.expert_used_count": moe.top_k,
        f"{arch}.expert_feed_forward_length": moe.d_ff,
        f"{arch}.expert_gating_func": deepseek_moe.SIGMOID,
    }
    gguf_keys.must_read_back(config, moe_from_gguf, metadata, form)
    return metadata


DENSE = Family(
    name="lfm2",
    presets=DENSE_PRESETS,
    model_types=("lfm2",),
    config_from_hf=dense_from_hf,
    config_to_hf=dense_to_hf,
    layouts={"hf": hf_layout},
    gguf_archs=("lfm2",),
    config_from_gguf=dense_from_gguf,
    config_to_gguf=dense_to_gguf,
    gguf_map=gguf_map,
    tied_copies=HF_TIED,
)
MIXTURE = Family(
    name="lfm2moe",
    presets=MOE_PRESETS,
    model_types=("lfm2_moe",),
    config_from_hf=moe_from_hf,
    config_to_hf=moe_to_hf,
    layouts={"hf": hf_layout, "hf5": hf5_layout},
    gguf_archs=("lfm2moe",),
    config_from_gguf=moe_from_gguf,
    config_to_gguf=moe_to_gguf,
    gguf_map=gguf_map,
    tied_copies=HF_TIED,
)
