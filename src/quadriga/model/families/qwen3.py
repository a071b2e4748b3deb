"""Qwen3 (Alibaba, April 2025), dense and as mixtures: LLaMA's block with a norm on every head's q and k.

The mixtures (Qwen3-30B-A3B, Qwen3-Coder, Qwen3-235B) have 128 small experts, 8 chosen, and no dense network beside
them; a configuration may leave single layers dense (``mlp_only_layers``, ``decoder_sparse_step``). The chosen weights
are divided by their sum where ``norm_topk_prob`` says so, which every published one does. Sources: transformers 4.57.6
and 5.x (configuration_qwen3, modeling_qwen3_moe), llama.cpp b11434 (archs qwen3 and qwen3moe, whose chosen weights
always sum to one).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quadriga.errors import ConfigError
from quadriga.model.config import (
    AttentionSpec,
    DenseSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    QKNormSpec,
    RopeSpec,
    countable,
    uniform_model,
)
from quadriga.model.families import gguf_keys, qwen3_vl
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
    hf_qkv,
    with_networks,
)
from quadriga.model.families.pieces import WITHIN, copies, experts, gate_up, under
from quadriga.model.weight_map import Piece, Shape

IGNORED = PRETRAINED_KEYS | {"max_window_layers", "sliding_window"}
"""Both say how wide the windows of some layers are, and ``use_sliding_window`` that there are none."""
_VL, _VL_MOE = "qwen3_vl", "qwen3_vl_moe"


def _config(
    family: str, ffn: DenseSpec | MoESpec, *, d_model: int, n_layers: int, n_heads: int, n_kv_heads: int
) -> ModelConfig:
    attention = AttentionSpec(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=128,
        position=RopeSpec(theta=1_000_000.0),
        qk_norm=QKNormSpec(over="head", eps=1e-6),
    )
    return uniform_model(
        family=family,
        vocab_size=151_936,
        d_model=d_model,
        n_layers=n_layers,
        max_seq_len=40_960,
        norm=NormSpec(kind="rms", eps=1e-6),
        mixer=attention,
        ffn=ffn,
        bos_id=151_643,
        eos_ids=(151_645,),
    )


def _moe(d_ff: int) -> MoESpec:
    return MoESpec(d_ff=d_ff, n_experts=128, top_k=8, activation="silu", aux_loss_weight=0.001)


DENSE_PRESETS = {
    "qwen3-8b": _config(
        "qwen3", DenseSpec(d_ff=12_288, activation="silu"), d_model=4096, n_layers=36, n_heads=32, n_kv_heads=8
    ),
}
MOE_PRESETS = {
    "qwen3-30b-a3b": _config("qwen3moe", _moe(768), d_model=2048, n_layers=48, n_heads=32, n_kv_heads=4),
    "qwen3-235b-a22b": _config("qwen3moe", _moe(1536), d_model=4096, n_layers=94, n_heads=64, n_kv_heads=4),
}


def dense_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a dense Qwen3's config.json, as transformers 4 or 5 writes it, or Qwen3-VL's."""
    if raw.get("model_type") == _VL:
        return dense_from_hf(qwen3_vl.text_of(raw, _VL))
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "qwen3")
    n_layers = keys.integer("num_hidden_layers")
    dense = DenseSpec(d_ff=keys.integer("intermediate_size"), activation="silu")
    return _from_hf("qwen3", keys, [dense] * countable(n_layers))


def moe_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a Qwen3-MoE's config.json, as transformers 4 or 5 writes it, or Qwen3-VL-MoE's."""
    if raw.get("model_type") == _VL_MOE:
        return moe_from_hf(qwen3_vl.text_of(raw, _VL_MOE))
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "qwen3_moe")
    # transformers 5 writes Mixtral's name for it.
    renamed = keys.given("num_local_experts") and not keys.given("num_experts")
    n_layers = keys.integer("num_hidden_layers")
    n_experts = keys.integer("num_local_experts" if renamed else "num_experts")
    keys.must_be("num_local_experts", n_experts, None)
    moe = MoESpec(
        d_ff=keys.integer("moe_intermediate_size"),
        n_experts=n_experts,
        top_k=keys.integer("num_experts_per_tok"),
        activation="silu",
        normalize_p=1.0 if keys.flag("norm_topk_prob") else None,
        aux_loss_weight=keys.number("router_aux_loss_coef"),
    )
    dense = DenseSpec(d_ff=keys.integer("intermediate_size"), activation="silu")
    keys.integers("mlp_only_layers")  # Qwen3's files all have it
    ffns = [moe if sparse else dense for sparse in sparse_layers(keys, countable(n_layers))]
    return _from_hf("qwen3moe", keys, ffns)


def sparse_layers(keys: Keys, n_layers: int) -> list[bool]:
    """Which layers are mixtures: every ``decoder_sparse_step``-th that is not among ``mlp_only_layers``.

    Qwen2-MoE's files are older than the second key, and then no layer is among them.
    """
    step = keys.integer("decoder_sparse_step")
    only = keys.integers("mlp_only_layers") if keys.has("mlp_only_layers") else ()
    if step < 1:
        raise ConfigError(f"config.json: decoder_sparse_step must be 1 or more, got {step}")
    return [i not in only and (i + 1) % step == 0 for i in range(n_layers)]


def _from_hf(family: str, keys: Keys, ffns: list[DenseSpec] | list[DenseSpec | MoESpec]) -> ModelConfig:
    keys.must_be("hidden_act", "silu")
    keys.must_be("use_sliding_window", False)
    if keys.given("layer_types"):
        keys.must_be("layer_types", ["full_attention"] * len(ffns))
    # Their defaults are no other key's value, as LLaMA's are (128 and 32, or 4): every published file writes them.
    keys.integer("head_dim"), keys.integer("num_key_value_heads")
    common = {**common_from_hf(keys), "tied_embeddings": keys.flag("tie_word_embeddings")}
    config = with_networks(family, common, ffns, qk_norm=QKNormSpec(over="head", eps=common["norm"].eps))
    keys.finish(IGNORED)
    return config


def dense_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "Qwen3's config.json"
    raw = {**common_to_hf(config, form), "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **_FULL}
    of_kind(config.only_layer(form).ffn, DenseSpec, form)
    must_read_back(config, dense_from_hf(raw), form)
    return raw


def moe_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "Qwen3-MoE's config.json"
    moe = config.only_moe(form)
    dense = [i for i, layer in enumerate(config.layers) if layer.moe is None]
    raw: dict[str, object] = {
        **common_to_hf(config, form),
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **_FULL,
        # Where no layer is dense, nothing is of this width.
        "intermediate_size": config.layers[dense[0]].ffn.d_ff if dense else moe.d_ff * moe.top_k,
        "moe_intermediate_size": moe.d_ff,
        "num_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.normalize_p is not None,
        "router_aux_loss_coef": moe.aux_loss_weight,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }
    must_read_back(config, moe_from_hf(raw), form)
    return raw


_FULL: dict[str, object] = {
    "use_sliding_window": False,
    "sliding_window": None,
}

_LAYER = "model.layers.{i}."
HF_QK_NORMS = {f"{_LAYER}self_attn.{part}_norm.weight": f"layers.{{i}}.attn.{part}_norm.weight" for part in ("q", "k")}
GGUF_QK_NORMS = {f"blk.{{i}}.attn_{part}_norm.weight": f"layers.{{i}}.attn.{part}_norm.weight" for part in ("q", "k")}
HF_ROUTER = {_LAYER + "mlp.gate.weight": "layers.{i}.moe.router.weight"}


def hf_attention(config: ModelConfig) -> list[Piece]:
    """Everything but feed-forwards, as transformers names it."""
    return copies(config, HF_COMMON | HF_QK_NORMS) + hf_qkv(config)


def gguf_attention(config: ModelConfig) -> list[Piece]:
    """Everything but feed-forwards, as llama.cpp names it; rotary halves are left as they are in these archs."""
    return copies(config, GGUF_COMMON | GGUF_QK_NORMS) + gguf_keys.projections(config, interleaved=False)


def hf_layout(config: ModelConfig) -> list[Piece]:
    """transformers 4, and every published checkpoint: a matrix per expert."""
    return hf_attention(config) + copies(config, HF_FFN | HF_ROUTER) + hf_experts(config)


def hf5_layout(config: ModelConfig) -> list[Piece]:
    """transformers 5 in memory: all experts in one tensor, gate above up."""
    return hf_attention(config) + copies(config, HF_FFN | HF_ROUTER) + hf5_experts(config)


def vl_layout(config: ModelConfig) -> list[Piece]:
    """Qwen3-VL as published."""
    return under(WITHIN, hf_attention(config) + copies(config, HF_FFN | HF_ROUTER) + qwen3_vl.experts(config))


def vl5_layout(config: ModelConfig) -> list[Piece]:
    """Qwen3-VL's mixtures as transformers 5 saves them."""
    return under(WITHIN, hf5_layout(config))


def hf_experts(config: ModelConfig) -> list[Piece]:
    """A matrix per expert, as transformers 4 names them in most mixtures."""
    name = _LAYER + "mlp.experts.{e}."
    return [
        *experts(config, "w_gate", name + "gate_proj.weight"),
        *experts(config, "w_up", name + "up_proj.weight"),
        *experts(config, "w_down", name + "down_proj.weight"),
    ]


def hf5_experts(config: ModelConfig) -> list[Piece]:
    """All experts of a layer in two tensors, as transformers 5 names them."""
    down = {_LAYER + "mlp.experts.down_proj": "layers.{i}.moe.w_down"}
    return copies(config, down) + gate_up(config, _LAYER + "mlp.experts.gate_up_proj")


def gguf_map(config: ModelConfig) -> list[Piece]:
    """llama.cpp's names of both archs."""
    return gguf_attention(config) + copies(config, GGUF_FFN | gguf_keys.ROUTER | gguf_keys.MERGED_EXPERTS)


def dense_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``qwen3``, or ``qwen3vl``."""
    keys = qwen3_vl.gguf_keys_of(metadata, "qwen3")
    ffn = DenseSpec(d_ff=keys.integer("feed_forward_length"), activation="silu")
    return _from_gguf("qwen3", keys, ffn, metadata, shapes)


def moe_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``qwen3moe``, or ``qwen3vlmoe``."""
    keys = qwen3_vl.gguf_keys_of(metadata, "qwen3moe")
    top_k, width = keys.integer("expert_used_count"), keys.integer("feed_forward_length")
    # llama.cpp: no expert_feed_forward_length means feed_forward_length / expert_used_count.
    named = keys.given("expert_feed_forward_length") and keys.integer("expert_feed_forward_length")
    d_ff = named or width // max(1, top_k)
    return _from_gguf("qwen3moe", keys, gguf_keys.plain_experts(keys, d_ff), metadata, shapes)


def _from_gguf(
    family: str,
    keys: Keys,
    ffn: DenseSpec | MoESpec,
    metadata: Mapping[str, object],
    shapes: Mapping[str, Shape],
) -> ModelConfig:
    common = common_from_gguf(keys, metadata, shapes)
    qk_norm = QKNormSpec(over="head", eps=common["norm"].eps)
    config = uniform_model(family=family, ffn=ffn, **{**common, "mixer": replace(common["mixer"], qk_norm=qk_norm)})
    keys.finish(gguf_keys.IGNORED)
    return config


def dense_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``qwen3``."""
    form = "GGUF arch qwen3"
    of_kind(config.only_layer(form).ffn, DenseSpec, form)
    metadata = common_to_gguf(config, form, "qwen3")
    gguf_keys.must_read_back(config, dense_from_gguf, metadata, form)
    return metadata


def moe_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``qwen3moe``."""
    form = "GGUF arch qwen3moe"
    metadata = {
        **common_to_gguf(config, form, "qwen3moe"),
        **gguf_keys.expert_keys(config, "qwen3moe"),
    }
    gguf_keys.must_read_back(config, moe_from_gguf, metadata, form)
    return metadata


DENSE = Family(
    name="qwen3",
    presets=DENSE_PRESETS,
    model_types=("qwen3", _VL),
    config_from_hf=dense_from_hf,
    config_to_hf=dense_to_hf,
    layouts={"hf": lambda config: hf_attention(config) + copies(config, HF_FFN), "vl": vl_layout},
    read_only=qwen3_vl.READ_ONLY,
    gguf_archs=("qwen3", "qwen3vl"),
    config_from_gguf=dense_from_gguf,
    config_to_gguf=dense_to_gguf,
    gguf_map=gguf_map,
    counterpart="qwen3moe",
    ignored_tensors=(qwen3_vl.PICTURES,),
    notes=qwen3_vl.notes,
    tied_copies=HF_TIED,
)
MIXTURE = Family(
    name="qwen3moe",
    presets=MOE_PRESETS,
    model_types=("qwen3_moe", _VL_MOE),
    config_from_hf=moe_from_hf,
    config_to_hf=moe_to_hf,
    layouts={"hf": hf_layout, "hf5": hf5_layout, "vl": vl_layout, "vl5": vl5_layout},
    read_only=qwen3_vl.READ_ONLY,
    gguf_archs=("qwen3moe", "qwen3vlmoe"),
    config_from_gguf=moe_from_gguf,
    config_to_gguf=moe_to_gguf,
    gguf_map=gguf_map,
    counterpart="qwen3",
    ignored_tensors=(qwen3_vl.PICTURES,),
    notes=qwen3_vl.notes,
    tied_copies=HF_TIED,
)
