"""DBRX (Databricks, March 2024) and its smaller relatives: fine-grained experts, clipped q/k/v, LayerNorm without bias.

Sources: databricks/dbrx@a3200393 (config.json, modeling), mosaicml/llm-foundry@8c8dd48f (eval yamls of the presets),
transformers 4.57.6 (the correct port), gguf 0.19.0 and llama.cpp b11434 (GGUF).

The same weights are in circulation in many layouts, told apart by tensor names and shapes alone:

    experts     fused          ffn.experts.mlp.w1|v1|w2 (E*F, D); w2 is each expert's down projection transposed
                split          ffn.experts.{e}.w1|v1|w2.weight, as nn.Linear: w2 (D, F)
                split-stored   the same names, w2 (F, D) as in the fused file
                mlp-split...   the same two under ffn.experts.mlp.{e}
    attention   (nothing)      Wqkv
                -qkv           q_proj, k_proj, v_proj
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from quadriga.model.config import AttentionSpec, ModelConfig, MoESpec, NormSpec, RopeSpec, uniform_model
from quadriga.model.families import gguf_keys
from quadriga.model.families.base import Family, MapBuilder, must_read_back, of_kind
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys, equal_heads
from quadriga.model.families.pieces import copies, experts, flat_experts, qkv
from quadriga.model.weight_map import Piece, Shape

NORM = NormSpec(kind="layer", eps=1e-5)
"""Fixed in the official code; no configuration has a key for it."""

IGNORED = PRETRAINED_KEYS | {
    "router_aux_loss_coef",  # a copy of ffn_config.moe_loss_weight, which is read
}
SUB_IGNORED = PRETRAINED_KEYS | {
    # Re-saved checkpoints carry a whole PretrainedConfig dump inside attn_config and ffn_config; these three are the
    # class's defaults there (tie_word_embeddings is even true) and say nothing about this model.
    "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
    "hidden_size", "num_key_value_heads",  # LLM Foundry's copies of d_model and kv_n_heads
}  # fmt: skip


_NOT_ITS_OWN = {"rope_theta": 10_000.0, "rope_type": "default"}
"""What transformers 5 writes beside attn_config's rope_theta, whatever that is: a default of its own."""


def _config(*, d_model: int, n_heads: int, n_layers: int, max_seq_len: int) -> ModelConfig:
    """A member of the family: d_ff is 1.75 d_model, 16 experts of which 4 work, heads of 128, 8 key/value heads."""
    return uniform_model(
        family="dbrx",
        vocab_size=100_352,
        d_model=d_model,
        n_layers=n_layers,
        max_seq_len=max_seq_len,
        norm=NORM,
        mixer=AttentionSpec(
            n_heads=n_heads, n_kv_heads=8, head_dim=128, position=RopeSpec(theta=500_000.0), clip_qkv=8.0
        ),
        ffn=MoESpec(
            d_ff=d_model * 7 // 4,
            n_experts=16,
            top_k=4,
            activation="silu",
            aux_loss_weight=0.05,
            jitter_eps=0.0,
        ),
        bos_id=100_257,  # <|endoftext|>
        eos_ids=(100_257, 100_279),  # <|endoftext|>, <|im_end|>
        pad_id=100_277,  # <|pad|>
    )


PRESETS = {
    "dbrx-132b": _config(d_model=6144, n_heads=48, n_layers=40, max_seq_len=32_768),
    "dbrx-73b": _config(d_model=5120, n_heads=40, n_layers=32, max_seq_len=4096),
    "dbrx-35b": _config(d_model=4096, n_heads=32, n_layers=24, max_seq_len=4096),
    "dbrx-18b": _config(d_model=3072, n_heads=24, n_layers=22, max_seq_len=4096),
    "dbrx-9b": _config(d_model=2048, n_heads=16, n_layers=24, max_seq_len=4096),
    # The depths of the two research models were not published; these meet both published counts (SPEC 2.2).
    "moe-b": _config(d_model=3072, n_heads=24, n_layers=28, max_seq_len=4096),
    "moe-a": _config(d_model=2048, n_heads=16, n_layers=20, max_seq_len=4096),
}


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read DBRX's config.json; its rope_theta is in attn_config, whatever transformers 5 writes elsewhere."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "dbrx")
    keys.must_be("tie_word_embeddings", False)
    d_model, n_heads = keys.integer("d_model"), keys.integer("n_heads")
    attn, ffn = keys.section("attn_config"), keys.section("ffn_config")
    config = uniform_model(
        family="dbrx",
        vocab_size=keys.integer("vocab_size"),
        d_model=d_model,
        n_layers=keys.integer("n_layers"),
        max_seq_len=keys.integer("max_seq_len"),
        norm=NORM,
        mixer=AttentionSpec(
            n_heads=n_heads,
            n_kv_heads=attn.integer("kv_n_heads"),
            head_dim=equal_heads(d_model, n_heads),
            position=RopeSpec(theta=attn.number("rope_theta")),
            clip_qkv=attn.number_or_null("clip_qkv"),
        ),
        ffn=MoESpec(
            d_ff=ffn.integer("ffn_hidden_size"),
            n_experts=ffn.integer("moe_num_experts"),
            top_k=ffn.integer("moe_top_k"),
            activation="silu",
            normalize_p=_normalize_p(ffn),
            aux_loss_weight=ffn.number("moe_loss_weight"),
            jitter_eps=ffn.number_or_null("moe_jitter_eps"),
        ),
        bos_id=keys.token_id("bos_token_id"),
        eos_ids=keys.token_ids("eos_token_id"),
        pad_id=keys.token_id("pad_token_id"),
    )
    if keys.value("rope_parameters") != _NOT_ITS_OWN:
        keys.must_be("rope_parameters", {"rope_theta": attn.number("rope_theta"), "rope_type": "default"}, None)
    keys.must_be("num_key_value_heads", attn.integer("kv_n_heads"))  # transformers writes this copy of kv_n_heads
    for section in (attn, ffn):
        section.must_be("model_type", "", "dbrx")
    # The release leaves the activation out; it is silu, with no further arguments.
    ffn.must_be("ffn_act_fn", {"name": "silu"}, None)
    ffn.must_be("uniform_expert_assignment", False)
    attn.finish(SUB_IGNORED)
    ffn.finish(SUB_IGNORED)
    keys.finish(IGNORED)
    return config


def notes(raw: Mapping[str, object]) -> list[str]:
    """What is said of a second rotary base in the file."""
    attn = raw.get("attn_config")
    own = attn.get("rope_theta") if isinstance(attn, Mapping) else None
    if raw.get("rope_parameters") != _NOT_ITS_OWN or own == _NOT_ITS_OWN["rope_theta"]:
        return []
    return [f"the rotary base is attn_config's, {own}; the 10000 in rope_parameters is a default of transformers 5"]


def _normalize_p(ffn: Keys) -> float | None:
    if not ffn.has("moe_normalize_expert_weights"):
        return 1.0  # the release leaves it out and relies on the class's 1 (configuration_dbrx.py)
    # A null or a zero switches the division off: the reference tests the value's truth.
    return ffn.number_or_null("moe_normalize_expert_weights") or None


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "DBRX's config.json"
    layer = config.only_layer(form)
    attn, ffn = layer.attention, of_kind(layer.ffn, MoESpec, form)
    rope = of_kind(attn.position, RopeSpec, form)
    raw: dict[str, object] = {
        "architectures": ["DbrxForCausalLM"],
        "model_type": "dbrx",
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "n_heads": attn.n_heads,
        "n_layers": config.n_layers,
        "max_seq_len": config.max_seq_len,
        "attn_config": {"clip_qkv": attn.clip_qkv, "kv_n_heads": attn.n_kv_heads, "rope_theta": rope.theta},
        "ffn_config": {
            "ffn_act_fn": {"name": ffn.activation},
            "ffn_hidden_size": ffn.d_ff,
            "moe_num_experts": ffn.n_experts,
            "moe_top_k": ffn.top_k,
            "moe_normalize_expert_weights": ffn.normalize_p,
            "moe_loss_weight": ffn.aux_loss_weight,
            "moe_jitter_eps": ffn.jitter_eps,
        },
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
        "pad_token_id": config.pad_id,
        "use_cache": True,
    }
    must_read_back(config, config_from_hf(raw), form)
    return raw


_BLOCK = "transformer.blocks.{i}."
_ATTN = _BLOCK + "norm_attn_norm.attn."
_COPIES = {
    "transformer.wte.weight": "embed.weight",
    _BLOCK + "norm_attn_norm.norm_1.weight": "layers.{i}.attn_norm.weight",
    _ATTN + "out_proj.weight": "layers.{i}.attn.wo.weight",
    _BLOCK + "norm_attn_norm.norm_2.weight": "layers.{i}.ffn_norm.weight",
    _BLOCK + "ffn.router.layer.weight": "layers.{i}.moe.router.weight",
    "transformer.norm_f.weight": "final_norm.weight",
    "lm_head.weight": "lm_head.weight",
}


def _fused_experts(config: ModelConfig) -> list[Piece]:
    mlp = _BLOCK + "ffn.experts.mlp."
    return [
        *flat_experts(config, "w_gate", mlp + "w1"),
        *flat_experts(config, "w_up", mlp + "v1"),
        *flat_experts(config, "w_down", mlp + "w2", transpose=True),
    ]


def _split_experts(config: ModelConfig, *, root: str, stored: bool) -> list[Piece]:
    one = _BLOCK + root + "{e}."
    return [
        *experts(config, "w_gate", one + "w1.weight"),
        *experts(config, "w_up", one + "v1.weight"),
        *experts(config, "w_down", one + "w2.weight", transpose=stored),
    ]


def _fused_qkv(config: ModelConfig) -> list[Piece]:
    return copies(config, {_ATTN + "Wqkv.weight": "layers.{i}.attn.wqkv.weight"})


def _split_qkv(config: ModelConfig) -> list[Piece]:
    return qkv(config, _ATTN + "q_proj.weight", _ATTN + "k_proj.weight", _ATTN + "v_proj.weight")


def _layout(config: ModelConfig, *, attention: MapBuilder, moe: MapBuilder) -> list[Piece]:
    return copies(config, _COPIES) + attention(config) + moe(config)


_EXPERTS: dict[str, MapBuilder] = {
    "fused": _fused_experts,
    "split": partial(_split_experts, root="ffn.experts.", stored=False),
    "split-stored": partial(_split_experts, root="ffn.experts.", stored=True),
    "mlp-split": partial(_split_experts, root="ffn.experts.mlp.", stored=False),
    "mlp-split-stored": partial(_split_experts, root="ffn.experts.mlp.", stored=True),
}
LAYOUTS: dict[str, MapBuilder] = {
    name + suffix: partial(_layout, attention=attention, moe=moe)
    for name, moe in _EXPERTS.items()
    for suffix, attention in (("", _fused_qkv), ("-qkv", _split_qkv))
}


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read GGUF arch ``dbrx``: clamp and theta must be there; the expert weights are always renormalised."""
    keys = gguf_keys.architecture_keys(metadata, "dbrx")
    d_model = keys.integer("embedding_length")
    ffn = gguf_keys.plain_experts(keys, keys.integer("feed_forward_length"))
    keys.number("rope.freq_base")  # required here: llama.cpp's fallback of 10000 is wrong for every DBRX
    config = uniform_model(
        family="dbrx",
        vocab_size=gguf_keys.vocabulary_size(keys, shapes),
        d_model=d_model,
        n_layers=keys.integer("block_count"),
        max_seq_len=keys.integer("context_length"),
        norm=NormSpec(kind="layer", eps=gguf_keys.number(keys, "attention.layer_norm_epsilon")),
        mixer=gguf_keys.attention(
            keys,
            d_model,
            RopeSpec(theta=gguf_keys.rope_theta(keys)),
            clip_qkv=gguf_keys.number(keys, "attention.clamp_kqv") or None,  # 0 means no clamp to llama.cpp
        ),
        ffn=ffn,
        **gguf_keys.token_ids(metadata),
    )
    keys.finish(gguf_keys.IGNORED)
    return config


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of GGUF arch ``dbrx``; training-only settings have no place there."""
    form = "GGUF arch dbrx"
    layer = config.only_layer(form)
    ffn, rope = of_kind(layer.ffn, MoESpec, form), of_kind(layer.attention.position, RopeSpec, form)
    metadata = {
        **gguf_keys.common_keys(config, "dbrx"),
        "dbrx.rope.freq_base": rope.theta,
        # llama.cpp demands the key.
        "dbrx.attention.clamp_kqv": layer.attention.clip_qkv or 0.0,
        "dbrx.expert_count": ffn.n_experts,
        "dbrx.expert_used_count": ffn.top_k,
    }
    gguf_keys.must_read_back(config, config_from_gguf, metadata, form)
    return metadata


GGUF_NAMES = {
    gguf_keys.TOKEN_EMBEDDING: "embed.weight",
    "blk.{i}.attn_norm.weight": "layers.{i}.attn_norm.weight",
    "blk.{i}.attn_qkv.weight": "layers.{i}.attn.wqkv.weight",
    "blk.{i}.attn_output.weight": "layers.{i}.attn.wo.weight",
    "blk.{i}.attn_output_norm.weight": "layers.{i}.ffn_norm.weight",
    **gguf_keys.ROUTER,
    **gguf_keys.MERGED_EXPERTS,
    "output_norm.weight": "final_norm.weight",
    gguf_keys.OUTPUT: "lm_head.weight",
}
"""Tensor names as in gguf 0.19.0; in torch's axis order every one of them has our shape. No rotary permutation:
llama.cpp runs DBRX with NeoX (half) rotation."""


FAMILY = Family(
    name="dbrx",
    presets=PRESETS,
    model_types=("dbrx",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts=LAYOUTS,
    gguf_archs=("dbrx",),
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_map=partial(copies, names=GGUF_NAMES),
    notes=notes,
)
