"""LLaMA-2 (Meta, July 2023) and the many dense models of its shape: RMSNorm, rotary positions, SwiGLU.

SmolLM2 and LLaMA-3 are this family too, with or without scaled rotary frequencies (``rope_keys``), and so are models
with a bias on their attention's projections; Mistral's are ``mistral``. Sources: transformers 4.57.6 and 5.x
(configuration_llama), meta-llama/llama (tensor names), gguf 0.19.0 and llama.cpp b11434.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from quadriga.model.config import (
    AttentionSpec,
    DenseSpec,
    LayerSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    RopeSpec,
    in_order,
    uniform_model,
)
from quadriga.model.families import gguf_keys
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys, equal_heads
from quadriga.model.families.pieces import copies, qkv
from quadriga.model.families.rope_keys import FREQS, rope_from_gguf, rope_from_hf, rope_to_gguf, rope_to_hf
from quadriga.model.weight_map import Piece, Shape

IGNORED = PRETRAINED_KEYS


def _config(*, d_model: int, n_heads: int, n_kv_heads: int, n_layers: int, d_ff: int) -> ModelConfig:
    return uniform_model(
        family="llama2",
        vocab_size=32_000,
        d_model=d_model,
        n_layers=n_layers,
        max_seq_len=4096,
        norm=NormSpec(kind="rms", eps=1e-5),
        mixer=AttentionSpec(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=128, position=RopeSpec(theta=10_000.0)),
        ffn=DenseSpec(d_ff=d_ff, activation="silu"),
        bos_id=1,
        eos_ids=(2,),
    )


PRESETS = {
    "llama2-7b": _config(d_model=4096, n_heads=32, n_kv_heads=32, n_layers=32, d_ff=11_008),
    "llama2-13b": _config(d_model=5120, n_heads=40, n_kv_heads=40, n_layers=40, d_ff=13_824),
    "llama2-70b": _config(d_model=8192, n_heads=64, n_kv_heads=8, n_layers=80, d_ff=28_672),
}


def attention_from_hf(keys: Keys, *, biases: bool = False, partial: bool = False) -> AttentionSpec:
    """Heads and rotation as LLaMA's and Mixtral's config.json name them.

    Args:
        biases: whether the family's program heeds ``attention_bias``; where not, it must be false.
        partial: whether the family's program turns a part of a head; see ``rope_from_hf``.
    """
    d_model, n_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    # LLaMA-1's files have no num_key_value_heads: every query head has its own (configuration_llama.py).
    n_kv_heads = keys.integer("num_key_value_heads") if keys.given("num_key_value_heads") else n_heads
    # head_dim is written since transformers 4.46; before, and where it is null, the heads share d_model.
    head_dim = keys.integer("head_dim") if keys.given("head_dim") else equal_heads(d_model, n_heads)
    biased = False
    if biases:
        biased = keys.given("attention_bias") and keys.flag("attention_bias")  # on q, k, v and o
    keys.must_be("attention_bias", biased)
    return AttentionSpec(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        position=rope_from_hf(keys, head_dim, keys.integer("max_position_embeddings"), partial=partial),
        qkv_bias=biased,
        out_bias=biased,
    )


def common_from_hf(keys: Keys, *, biases: bool = False, partial: bool = False) -> dict[str, Any]:
    """Every field of a config.json of LLaMA's shape but family, feed-forward and tied embeddings.

    Args:
        biases, partial: see :func:`attention_from_hf`.
    """
    return {
        "vocab_size": keys.integer("vocab_size"),
        "d_model": keys.integer("hidden_size"),
        "n_layers": keys.integer("num_hidden_layers"),
        "max_seq_len": keys.integer("max_position_embeddings"),
        "norm": NormSpec(kind="rms", eps=keys.number("rms_norm_eps")),
        "mixer": attention_from_hf(keys, biases=biases, partial=partial),
        "bos_id": keys.token_id("bos_token_id"),
        "eos_ids": keys.token_ids("eos_token_id"),
        "pad_id": keys.token_id("pad_token_id"),
    }


def with_networks(
    family: str, common: Mapping[str, Any], ffns: Iterable[DenseSpec | MoESpec], **attention: Any
) -> ModelConfig:
    """LLaMA's block with a feed-forward for each layer.

    Args:
        common: of :func:`common_from_hf` or :func:`common_from_gguf`, with ``tied_embeddings``.
        attention: fields of the attention that differ from LLaMA's.
    """
    rest = {key: value for key, value in common.items() if key not in ("norm", "mixer", "n_layers")}
    norm, mixer = common["norm"], replace(common["mixer"], **attention)
    layers = in_order(LayerSpec(norm=norm, mixer=mixer, ffn=ffn) for ffn in ffns)
    return ModelConfig(family=family, layers=layers, final_norm=norm, **rest)


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a LLaMA config.json, as transformers 4 or 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "llama")
    keys.must_be("hidden_act", "silu")
    keys.must_be("mlp_bias", False)
    keys.must_be("rope_interleaved", False)
    config = uniform_model(
        family="llama2",
        ffn=DenseSpec(d_ff=keys.integer("intermediate_size"), activation="silu"),
        # LlamaConfig's class default is untied, and early files leave the key out.
        tied_embeddings=keys.flag("tie_word_embeddings") if keys.has("tie_word_embeddings") else False,
        **common_from_hf(keys, biases=True),
    )
    keys.finish(IGNORED)
    return config


def common_to_hf(config: ModelConfig, form: str) -> dict[str, object]:
    """The keys that config.json files of LLaMA's shape share; of layers that differ, the first one's."""
    layer = config.layers[0]
    attn, rope = layer.attention, of_kind(layer.attention.position, RopeSpec, form)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": layer.ffn.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": attn.n_heads,
        "num_key_value_heads": attn.n_kv_heads,
        "head_dim": attn.head_dim,
        "hidden_act": layer.network.activation,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": layer.norm.eps,
        **rope_to_hf(rope, attn.head_dim, form),
        "attention_bias": attn.qkv_bias,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
        "pad_token_id": config.pad_id,
        "use_cache": True,
    }


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "LLaMA's config.json"
    of_kind(config.only_layer(form).ffn, DenseSpec, form)
    raw: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **common_to_hf(config, form),
        "mlp_bias": False,
    }
    must_read_back(config, config_from_hf(raw), form)
    return raw


_LAYER = "model.layers.{i}."
HF_COMMON = {
    "model.embed_tokens.weight": "embed.weight",
    _LAYER + "input_layernorm.weight": "layers.{i}.attn_norm.weight",
    _LAYER + "self_attn.o_proj.weight": "layers.{i}.attn.wo.weight",
    _LAYER + "self_attn.o_proj.bias": "layers.{i}.attn.wo.bias",
    _LAYER + "post_attention_layernorm.weight": "layers.{i}.ffn_norm.weight",
    "model.norm.weight": "final_norm.weight",
    "lm_head.weight": "lm_head.weight",
}
"""Tensors that LLaMA and Mixtral name alike."""

HF_TIED = {"lm_head.weight": "model.embed_tokens.weight"}
"""Of tied models: the head that some writers store all the same, and the table it repeats."""
META_TIED = {"output.weight": "tok_embeddings.weight"}

HF_FFN = {
    _LAYER + "mlp.gate_proj.weight": "layers.{i}.ffn.w_gate",
    _LAYER + "mlp.up_proj.weight": "layers.{i}.ffn.w_up",
    _LAYER + "mlp.down_proj.weight": "layers.{i}.ffn.w_down",
}

META_COMMON = {
    "tok_embeddings.weight": "embed.weight",
    "layers.{i}.attention_norm.weight": "layers.{i}.attn_norm.weight",
    "layers.{i}.attention.wo.weight": "layers.{i}.attn.wo.weight",
    "layers.{i}.ffn_norm.weight": "layers.{i}.ffn_norm.weight",
    "norm.weight": "final_norm.weight",
    "output.weight": "lm_head.weight",
}
"""Tensors that Meta's and Mistral's own files name alike."""

_META_FFN = {
    "layers.{i}.feed_forward.w1.weight": "layers.{i}.ffn.w_gate",
    "layers.{i}.feed_forward.w3.weight": "layers.{i}.ffn.w_up",
    "layers.{i}.feed_forward.w2.weight": "layers.{i}.ffn.w_down",
}

GGUF_COMMON = {
    gguf_keys.TOKEN_EMBEDDING: "embed.weight",
    "blk.{i}.attn_norm.weight": "layers.{i}.attn_norm.weight",
    "blk.{i}.attn_output.weight": "layers.{i}.attn.wo.weight",
    "blk.{i}.attn_output.bias": "layers.{i}.attn.wo.bias",
    "blk.{i}.ffn_norm.weight": "layers.{i}.ffn_norm.weight",
    "output_norm.weight": "final_norm.weight",
    gguf_keys.OUTPUT: "lm_head.weight",
}
"""Tensors that dense and expert models of GGUF arch ``llama`` share."""

GGUF_BIASED = frozenset({"llama", "qwen2", "smollm3", "gpt-oss"})
"""Architectures of this shape in which llama.cpp adds biases to q, k, v and o where the file has them."""
GGUF_QKV_BIASED = frozenset({"glm4moe", "qwen2moe"})
"""Those in which it adds them to q, k and v alone."""
GGUF_PARTIAL = frozenset({"glm4moe", "minimax-m2", "qwen3next", "qwen35moe", "qwen35"})
"""Those in which ``rope.dimension_count`` may be a part of a head."""

GGUF_FFN = {
    "blk.{i}.ffn_gate.weight": "layers.{i}.ffn.w_gate",
    "blk.{i}.ffn_up.weight": "layers.{i}.ffn.w_up",
    "blk.{i}.ffn_down.weight": "layers.{i}.ffn.w_down",
}


def hf_qkv(config: ModelConfig) -> list[Piece]:
    """q_proj, k_proj and v_proj in halves, as transformers rotates them."""
    q, k, v = (f"{_LAYER}self_attn.{p}_proj.weight" for p in "qkv")
    return qkv(config, q, k, v)


def meta_qkv(config: ModelConfig) -> list[Piece]:
    """wq, wk and wv of Meta's and Mistral's own files, whose rotary pairs lie side by side."""
    q, k, v = (f"layers.{{i}}.attention.w{p}.weight" for p in "qkv")
    return qkv(config, q, k, v, interleaved=True)


def gguf_qkv(config: ModelConfig) -> list[Piece]:
    """attn_q, attn_k and attn_v of arch ``llama``: the converter puts rotary pairs side by side for llama.cpp."""
    return gguf_keys.projections(config, interleaved=True)


def hf_layout(config: ModelConfig) -> list[Piece]:
    """Every tensor of a dense model as transformers names it."""
    return copies(config, HF_COMMON) + hf_qkv(config) + copies(config, HF_FFN)


def meta_layout(config: ModelConfig) -> list[Piece]:
    """Every tensor of a dense model as Meta and Mistral name it."""
    return copies(config, META_COMMON) + meta_qkv(config) + copies(config, _META_FFN)


def gguf_map(config: ModelConfig) -> list[Piece]:
    """Every tensor of a dense model of arch ``llama``."""
    return copies(config, GGUF_COMMON) + gguf_qkv(config) + copies(config, GGUF_FFN)


def common_from_gguf(keys: Keys, metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Every field of a ``llama`` GGUF but family and feed-forward."""
    max_seq_len, arch = keys.integer("context_length"), str(metadata.get("general.architecture"))
    d_model = keys.integer("embedding_length")
    rope = rope_from_gguf(keys, arch, metadata, shapes, max_seq_len)
    attn = gguf_keys.attention(keys, d_model, rope, partial=arch in GGUF_PARTIAL)
    # llama.cpp: a window of 0 is no window; one as long as the context hides nothing.
    if keys.given("attention.sliding_window") and 0 < keys.integer("attention.sliding_window") < max_seq_len:
        attn = replace(attn, window=keys.integer("attention.sliding_window"))
    if arch in GGUF_BIASED | GGUF_QKV_BIASED:
        q, out = (f"blk.0.attn_{name}.bias" in shapes for name in ("q", "output"))
        attn = replace(attn, qkv_bias=q, out_bias=out and arch in GGUF_BIASED)
    if keys.given("attention.scale") and keys.number("attention.scale") != 0:  # llama.cpp: 0 means 1/sqrt(head_dim)
        attn = gguf_keys.with_scale(attn, gguf_keys.number(keys, "attention.scale"))
    return {
        "vocab_size": gguf_keys.vocabulary_size(keys, shapes),
        "d_model": d_model,
        "n_layers": keys.integer("block_count"),
        "max_seq_len": max_seq_len,
        "norm": NormSpec(kind="rms", eps=gguf_keys.number(keys, "attention.layer_norm_rms_epsilon")),
        "mixer": attn,
        # A GGUF without a head uses the embedding table.
        "tied_embeddings": gguf_keys.OUTPUT not in shapes,
        **gguf_keys.token_ids(metadata),
    }


def common_to_gguf(config: ModelConfig, form: str, arch: str = "llama") -> dict[str, object]:
    """Every key of a GGUF of LLaMA's shape but those of experts."""
    attn = config.only_layer(form).attention
    rope, head_dim = of_kind(attn.position, RopeSpec, form), attn.head_dim
    written = {
        **gguf_keys.common_keys(config, arch),
        **rope_to_gguf(rope, head_dim, arch),
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
    }
    if attn.window is not None:
        written[f"{arch}.attention.sliding_window"] = attn.window
    return written


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a dense GGUF of arch ``llama``."""
    keys = gguf_keys.architecture_keys(metadata, "llama")
    keys.must_be("expert_count", 0)
    keys.must_be("expert_used_count", 0)
    config = uniform_model(
        family="llama2",
        ffn=DenseSpec(d_ff=keys.integer("feed_forward_length"), activation="silu"),
        **common_from_gguf(keys, metadata, shapes),
    )
    keys.finish(gguf_keys.IGNORED)
    return config


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a dense GGUF of arch ``llama``."""
    form = "GGUF arch llama"
    of_kind(config.only_layer(form).ffn, DenseSpec, form)
    metadata = common_to_gguf(config, form)
    gguf_keys.must_read_back(config, config_from_gguf, metadata, form)
    return metadata


FAMILY = Family(
    name="llama2",
    presets=PRESETS,
    model_types=("llama",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={"hf": hf_layout, "meta": meta_layout},
    gguf_archs=("llama",),
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_map=gguf_map,
    counterpart="mixtral",
    ignored_tensors=(
        "model.layers.*.self_attn.rotary_emb.inv_freq",  # old transformers stored the buffer; it follows from theta
        "rope.freqs",  # the same buffer in Meta's files
        FREQS,  # read with the metadata
    ),
    tied_copies={**HF_TIED, **META_TIED},
)
