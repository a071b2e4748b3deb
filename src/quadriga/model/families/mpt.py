"""MPT (MosaicML, May 2023): ALiBi instead of positions, a plain GELU network, LayerNorm without bias, tied embeddings.

Sources: mosaicml/llm-foundry@8c8dd48f, transformers 4.57.6 (configuration_mpt, modeling_mpt), gguf 0.19.0 and
llama.cpp b11434. ``learned_pos_emb`` is true in the released configs and means nothing there: with ALiBi on, no such
table exists. transformers 4.57.6 never looks at ``alibi_bias_max`` and ``expansion_ratio`` and computes with 8 and 4;
LLM Foundry, whose models these are, obeys them, and so do we.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from quadriga.model.config import AlibiSpec, AttentionSpec, DenseSpec, ModelConfig, NormSpec, uniform_model
from quadriga.model.families import gguf_keys
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys, equal_heads
from quadriga.model.families.pieces import copies
from quadriga.model.weight_map import Shape

IGNORED = PRETRAINED_KEYS | {
    "learned_pos_emb",  # without effect under ALiBi, which must be on
    "embedding_fraction",  # scales the gradient of the embedding, not its value
    "verbose", "fc_type", "loss_fn", "use_pad_tok_in_ffn",
}  # fmt: skip
SUB_IGNORED = PRETRAINED_KEYS | {
    # A re-saved attn_config carries a whole PretrainedConfig dump; these are the class's defaults there.
    "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
    # Tells training how documents share a row; a prompt is one document.
    "attn_uses_sequence_id",
}  # fmt: skip

PRESETS = {
    "mpt-7b": uniform_model(
        family="mpt",
        vocab_size=50_432,
        d_model=4096,
        n_layers=32,
        max_seq_len=2048,
        norm=NormSpec(kind="layer", eps=1e-5),
        mixer=AttentionSpec(n_heads=32, n_kv_heads=32, head_dim=128, position=AlibiSpec(max_bias=8.0)),
        ffn=DenseSpec(d_ff=16_384, activation="gelu", gated=False),
        tied_embeddings=True,
        bos_id=0,
        eos_ids=(0,),
    )
}


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read MPT's config.json, from the hub's first files or from transformers."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "mpt")
    keys.must_be("no_bias", True)
    keys.must_be("logit_scale", None)
    keys.must_be("norm_type", "low_precision_layernorm", "layernorm")  # the first is the second in a lower precision
    d_model, n_heads = keys.integer("d_model"), keys.integer("n_heads")
    attn = keys.section("attn_config")
    config = uniform_model(
        family="mpt",
        vocab_size=keys.integer("vocab_size"),
        d_model=d_model,
        n_layers=keys.integer("n_layers"),
        max_seq_len=keys.integer("max_seq_len"),
        # The hub's first files have no epsilon: torch.nn.LayerNorm's 1e-5 was in force.
        norm=NormSpec(kind="layer", eps=keys.number("layer_norm_epsilon") if keys.has("layer_norm_epsilon") else 1e-5),
        mixer=AttentionSpec(
            n_heads=n_heads,
            n_kv_heads=n_heads,
            head_dim=equal_heads(d_model, n_heads),
            position=AlibiSpec(max_bias=attn.number("alibi_bias_max")),
            clip_qkv=attn.number_or_null("clip_qkv"),
            scale=attn.number_or_null("softmax_scale"),
        ),
        ffn=DenseSpec(d_ff=_d_ff(keys, d_model), activation="gelu", gated=False),
        # PretrainedConfig's class default is tied, and released files leave the key out.
        tied_embeddings=keys.flag("tie_word_embeddings") if keys.has("tie_word_embeddings") else True,
        bos_id=keys.token_id("bos_token_id"),
        eos_ids=keys.token_ids("eos_token_id"),
        pad_id=keys.token_id("pad_token_id"),
    )
    attn.must_be("model_type", "", "mpt")
    attn.must_be("attn_type", "multihead_attention")
    attn.must_be("kv_n_heads", n_heads)
    if not attn.flag("alibi"):
        attn.must_be("alibi", True)  # without ALiBi the model has a learned position table
    attn.must_be("prefix_lm", False)
    attn.must_be("qk_ln", False)
    attn.must_be("qk_gn", False)
    attn.must_be("rope", False)
    attn.must_be("sliding_window_size", -1)
    attn.finish(SUB_IGNORED)
    keys.finish(IGNORED)
    return config


def _d_ff(keys: Keys, d_model: int) -> int:
    if keys.given("ffn_config"):
        ffn = keys.section("ffn_config")
        ffn.must_be("ffn_type", "mptmlp")
        ffn.must_be("ffn_act_fn", None, {"name": "gelu"}, {"name": "gelu", "approximate": "none"})
        ffn.must_be("ffn_hidden_size", None)
        ffn.finish(frozenset({"fc_type"}))
    return keys.integer("expansion_ratio") * d_model


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "MPT's config.json"
    layer = config.only_layer(form)
    attn, ffn = layer.attention, of_kind(layer.ffn, DenseSpec, form)
    alibi = of_kind(attn.position, AlibiSpec, form)
    raw: dict[str, object] = {
        "architectures": ["MptForCausalLM"],
        "model_type": "mpt",
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "n_heads": attn.n_heads,
        "n_layers": config.n_layers,
        "expansion_ratio": ffn.d_ff // config.d_model,
        "max_seq_len": config.max_seq_len,
        "layer_norm_epsilon": layer.norm.eps,
        "norm_type": "low_precision_layernorm",
        "no_bias": True,
        "learned_pos_emb": False,
        "logit_scale": None,
        "attn_config": {
            "attn_type": "multihead_attention",
            "alibi": True,
            "alibi_bias_max": _whole(alibi.max_bias),
            "clip_qkv": attn.clip_qkv,
            "softmax_scale": attn.scale,
            "prefix_lm": False,
            "qk_ln": False,
        },
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
        "pad_token_id": config.pad_id,
        "use_cache": True,
    }
    must_read_back(config, config_from_hf(raw), form)
    return raw


def _whole(value: float) -> float | int:
    return int(value) if value.is_integer() else value  # released configs say 8, not 8.0


_BLOCK = "transformer.blocks.{i}."
_NAMES = {
    "transformer.wte.weight": "embed.weight",
    _BLOCK + "norm_1.weight": "layers.{i}.attn_norm.weight",
    _BLOCK + "attn.Wqkv.weight": "layers.{i}.attn.wqkv.weight",
    _BLOCK + "attn.out_proj.weight": "layers.{i}.attn.wo.weight",
    _BLOCK + "norm_2.weight": "layers.{i}.ffn_norm.weight",
    _BLOCK + "ffn.up_proj.weight": "layers.{i}.ffn.w_up",
    _BLOCK + "ffn.down_proj.weight": "layers.{i}.ffn.w_down",
    "transformer.norm_f.weight": "final_norm.weight",
    "lm_head.weight": "lm_head.weight",
}


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read GGUF arch ``mpt``. The network's GELU is the exact one the model was trained with; llama.cpp's is tanh's."""
    gguf_keys.refuse_tensors(shapes, {"position_embd.weight": "a learned position table"})
    keys = gguf_keys.architecture_keys(metadata, "mpt")
    d_model = keys.integer("embedding_length")
    # llama.cpp: no clamp_kqv, or 0, means no clamp.
    clip = gguf_keys.number(keys, "attention.clamp_kqv") if keys.given("attention.clamp_kqv") else 0.0
    config = uniform_model(
        family="mpt",
        vocab_size=gguf_keys.vocabulary_size(keys, shapes),
        d_model=d_model,
        n_layers=keys.integer("block_count"),
        max_seq_len=keys.integer("context_length"),
        norm=NormSpec(kind="layer", eps=gguf_keys.number(keys, "attention.layer_norm_epsilon")),
        mixer=gguf_keys.attention(
            keys,
            d_model,
            AlibiSpec(max_bias=gguf_keys.number(keys, "attention.max_alibi_bias")),
            clip_qkv=clip or None,
        ),
        ffn=DenseSpec(d_ff=keys.integer("feed_forward_length"), activation="gelu", gated=False),
        # A GGUF without a head uses the embedding table; llama.cpp's early converter wrote the table twice.
        tied_embeddings=gguf_keys.OUTPUT not in shapes,
        **gguf_keys.token_ids(metadata),
    )
    keys.finish(gguf_keys.IGNORED)
    return config


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of GGUF arch ``mpt``."""
    form = "GGUF arch mpt"
    layer = config.only_layer(form)
    of_kind(layer.ffn, DenseSpec, form)
    alibi = of_kind(layer.attention.position, AlibiSpec, form)
    metadata = {**gguf_keys.common_keys(config, "mpt"), "mpt.attention.max_alibi_bias": alibi.max_bias}
    if layer.attention.clip_qkv is not None:
        metadata["mpt.attention.clamp_kqv"] = layer.attention.clip_qkv
    gguf_keys.must_read_back(config, config_from_gguf, metadata, form)
    return metadata


_GGUF_NAMES = {
    gguf_keys.TOKEN_EMBEDDING: "embed.weight",
    "blk.{i}.attn_norm.weight": "layers.{i}.attn_norm.weight",
    "blk.{i}.attn_qkv.weight": "layers.{i}.attn.wqkv.weight",
    "blk.{i}.attn_output.weight": "layers.{i}.attn.wo.weight",
    "blk.{i}.ffn_norm.weight": "layers.{i}.ffn_norm.weight",
    "blk.{i}.ffn_up.weight": "layers.{i}.ffn.w_up",
    "blk.{i}.ffn_down.weight": "layers.{i}.ffn.w_down",
    "output_norm.weight": "final_norm.weight",
    gguf_keys.OUTPUT: "lm_head.weight",
}

FAMILY = Family(
    name="mpt",
    presets=PRESETS,
    model_types=("mpt",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={"hf": partial(copies, names=_NAMES)},
    gguf_archs=("mpt",),
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_map=partial(copies, names=_GGUF_NAMES),
    tied_copies={"lm_head.weight": "transformer.wte.weight"},
)
