"""Qwen1.5-MoE and Qwen2-57B-A14B (Alibaba, February and June 2024): Qwen2's attention, small experts and a shared one.

The shared network's output is multiplied by the sigmoid of a linear form of the token. The chosen weights stay as the
softmax over all experts gave them (``norm_topk_prob`` false in every published file); single layers may be dense.
Sources: transformers 4.57.6 (configuration_qwen2_moe, modeling_qwen2_moe), llama.cpp (arch qwen2moe, whose layers are
all mixtures and whose chosen weights are never divided).
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
    RopeSpec,
    countable,
    uniform_model,
)
from quadriga.model.families import gguf_keys
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.llama2 import (
    GGUF_COMMON,
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
from quadriga.model.families.pieces import copies, single_rows
from quadriga.model.families.qwen3 import HF_ROUTER, hf5_experts, hf_experts, sparse_layers
from quadriga.model.weight_map import Piece, Shape

IGNORED = PRETRAINED_KEYS | {"max_window_layers", "sliding_window"}
"""Both say how wide the windows of some layers are, and ``use_sliding_window`` that there are none."""


def _preset(
    *, d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, max_seq_len: int, eos_id: int, ffn: MoESpec
) -> ModelConfig:
    return uniform_model(
        family="qwen2moe",
        vocab_size=151_936,
        d_model=d_model,
        n_layers=n_layers,
        max_seq_len=max_seq_len,
        norm=NormSpec(kind="rms", eps=1e-6),
        mixer=AttentionSpec(
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=128,
            position=RopeSpec(theta=1_000_000.0),
            qkv_bias=True,
        ),
        ffn=ffn,
        bos_id=151_643,
        eos_ids=(eos_id,),
    )


def _moe(*, d_ff: int, n_experts: int, top_k: int, shared: int) -> MoESpec:
    return MoESpec(
        d_ff=d_ff,
        n_experts=n_experts,
        top_k=top_k,
        activation="silu",
        normalize_p=None,
        aux_loss_weight=0.001,
        shared=DenseSpec(d_ff=shared, activation="silu"),
        shared_gate=True,
    )


PRESETS = {
    "qwen1.5-moe-a2.7b": _preset(
        d_model=2048,
        n_layers=24,
        n_heads=16,
        n_kv_heads=16,
        max_seq_len=8192,
        eos_id=151_643,
        ffn=_moe(d_ff=1408, n_experts=60, top_k=4, shared=5632),
    ),
    "qwen2-57b-a14b": _preset(
        d_model=3584,
        n_layers=28,
        n_heads=28,
        n_kv_heads=4,
        max_seq_len=131_072,
        eos_id=151_643,
        ffn=_moe(d_ff=2560, n_experts=64, top_k=8, shared=20_480),
    ),
}


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a Qwen2-MoE config.json, as transformers 4 or 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "qwen2_moe")
    keys.must_be("hidden_act", "silu")
    keys.must_be("use_sliding_window", False)
    # The published files are older than this key; the program of their time always added the biases.
    biased = keys.flag("qkv_bias") if keys.has("qkv_bias") else True
    keys.integer("num_key_value_heads")  # every published file has it, and the class's default is no other key's value
    common = {**common_from_hf(keys), "tied_embeddings": keys.flag("tie_word_embeddings")}
    n_layers = countable(common["n_layers"])
    if keys.given("layer_types"):
        keys.must_be("layer_types", ["full_attention"] * n_layers)
    moe = MoESpec(
        d_ff=keys.integer("moe_intermediate_size"),
        n_experts=keys.integer("num_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        activation="silu",
        normalize_p=1.0 if keys.flag("norm_topk_prob") else None,
        aux_loss_weight=keys.number("router_aux_loss_coef"),
        shared=DenseSpec(d_ff=keys.integer("shared_expert_intermediate_size"), activation="silu"),
        shared_gate=True,
    )
    dense = DenseSpec(d_ff=keys.integer("intermediate_size"), activation="silu")
    ffns = [moe if sparse else dense for sparse in sparse_layers(keys, n_layers)]
    config = with_networks("qwen2moe", common, ffns, qkv_bias=biased)
    keys.finish(IGNORED)
    return config


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "Qwen2-MoE's config.json"
    moe = config.only_moe(form)
    dense = [i for i, layer in enumerate(config.layers) if layer.moe is None]
    raw: dict[str, object] = {
        **common_to_hf(config, form),
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "use_sliding_window": False,
        "sliding_window": None,
        "qkv_bias": config.layers[0].attention.qkv_bias,
        # Where no layer is dense, nothing is of this width.
        "intermediate_size": config.layers[dense[0]].ffn.d_ff if dense else moe.d_ff * moe.top_k,
        "moe_intermediate_size": moe.d_ff,
        "shared_expert_intermediate_size": of_kind(moe.shared, DenseSpec, form).d_ff,
        "num_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.normalize_p is not None,
        "router_aux_loss_coef": moe.aux_loss_weight,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }
    # The class takes the head's size from the other two, and reads its own key of biases.
    del raw["head_dim"], raw["attention_bias"]
    must_read_back(config, config_from_hf(raw), form)
    return raw


_MLP = "model.layers.{i}.mlp."
HF_SHARED = {
    f"{_MLP}shared_expert.{part}_proj.weight": f"layers.{{i}}.moe.shared.w_{part}" for part in ("gate", "up", "down")
}
_SHARED_GATE = "layers.{i}.moe.shared_gate"


def _hf_common(config: ModelConfig) -> list[Piece]:
    rows = single_rows(config, {_MLP + "shared_expert_gate.weight": _SHARED_GATE})
    return copies(config, HF_COMMON | HF_FFN | HF_ROUTER | HF_SHARED) + hf_qkv(config) + rows


def hf_layout(config: ModelConfig) -> list[Piece]:
    """transformers 4, and every published checkpoint: a matrix per expert."""
    return _hf_common(config) + hf_experts(config)


def hf5_layout(config: ModelConfig) -> list[Piece]:
    """transformers 5 in memory: all experts in one tensor, gate above up."""
    return _hf_common(config) + hf5_experts(config)


def gguf_map(config: ModelConfig) -> list[Piece]:
    """Every tensor of arch ``qwen2moe``."""
    names = GGUF_COMMON | gguf_keys.ROUTER | gguf_keys.MERGED_EXPERTS | gguf_keys.SHARED_EXPERT
    gate = {"blk.{i}.ffn_gate_inp_shexp.weight": _SHARED_GATE}
    return copies(config, names | gate) + gguf_keys.projections(config, interleaved=False)


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``qwen2moe``."""
    keys = gguf_keys.architecture_keys(metadata, "qwen2moe")
    top_k, width = keys.integer("expert_used_count"), keys.integer("feed_forward_length")
    # llama.cpp: a missing width of experts is feed_forward_length / expert_used_count, a shared one the whole of it.
    experts_key, shared_key = "expert_feed_forward_length", "expert_shared_feed_forward_length"
    d_ff = keys.integer(experts_key) if keys.given(experts_key) else width // max(1, top_k)
    shared = keys.integer(shared_key) if keys.given(shared_key) else width
    moe = gguf_keys.plain_experts(
        keys, d_ff, normalised=False, normalize_p=None, shared=DenseSpec(d_ff=shared, activation="silu")
    )
    common = common_from_gguf(keys, metadata, shapes)
    config = with_networks("qwen2moe", common, [replace(moe, shared_gate=True)] * countable(common["n_layers"]))
    keys.finish(gguf_keys.IGNORED)
    return config


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``qwen2moe``."""
    form = "GGUF arch qwen2moe"
    if config.tied_embeddings:
        raise ConfigError(f"{form} cannot express this model: llama.cpp wants a head in it, this one's is the table")
    moe = of_kind(config.only_layer(form).ffn, MoESpec, form)
    metadata = {
        **common_to_gguf(config, form, "qwen2moe"),
        **gguf_keys.expert_keys(config, "qwen2moe"),
        "qwen2moe.expert_shared_feed_forward_length": of_kind(moe.shared, DenseSpec, form).d_ff,
    }
    gguf_keys.must_read_back(config, config_from_gguf, metadata, form)
    return metadata


FAMILY = Family(
    name="qwen2moe",
    presets=PRESETS,
    model_types=("qwen2_moe",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={"hf": hf_layout, "hf5": hf5_layout},
    gguf_archs=("qwen2moe",),
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_map=gguf_map,
    tied_copies=HF_TIED,
)
