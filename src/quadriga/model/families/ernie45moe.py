"""ERNIE 4.5 mixtures (Baidu, June 2025): rotary pairs side by side, a softmax router with a correction, shared experts.

Experts are chosen by their probability plus a stored correction, kept as one row (1, E); the chosen probabilities are
divided by their sum, at least ``moe_norm_min``. The first layers are dense. Checkpoints of the base models hold blocks
for multi-token prediction besides, which no answer depends on: they are left out by name. Sources: transformers 4.57.6
and 5.24.0 (configuration_ernie4_5_moe, modeling_ernie4_5_moe), llama.cpp (arch ernie4_5-moe, which turns pairs side by
side as well, so that the rows stay where they are).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quadriga.errors import ConfigError
from quadriga.model.config import (
    AttentionSpec,
    DenseSpec,
    LayerSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    RopeSpec,
    countable,
    in_order,
)
from quadriga.model.families import gguf_keys
from quadriga.model.families.base import Family, must_read_back
from quadriga.model.families.deepseek_moe import GGUF_MIXTURE, first_dense, like_its_mixtures
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
    with_networks,
)
from quadriga.model.families.pieces import copies, qkv, single_rows
from quadriga.model.families.qwen3 import HF_ROUTER, hf_experts
from quadriga.model.weight_map import Piece, Shape, source_shapes

IGNORED = PRETRAINED_KEYS | {"moe_capacity", "moe_dropout_prob", "multi_token_pred_lambda"}
"""Settings of the training run: room for tokens that are never dropped afterwards, and weights of losses."""

NORM_MIN = 1e-12


def _moe(*, d_ff: int, top_k: int, n_shared: int) -> MoESpec:
    return MoESpec(
        d_ff=d_ff,
        n_experts=64,
        top_k=top_k,
        activation="silu",
        correction=True,
        normalize_min=NORM_MIN,
        aux_loss_weight=0.001,
        shared=DenseSpec(d_ff=d_ff * n_shared, activation="silu") if n_shared else None,
    )


def _preset(
    *, d_model: int, n_layers: int, n_dense: int, n_heads: int, n_kv_heads: int, d_ff: int, moe: MoESpec, tied: bool
) -> ModelConfig:
    norm = NormSpec(kind="rms", eps=1e-5)
    attention = AttentionSpec(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=128, position=RopeSpec(theta=500_000.0))
    dense = DenseSpec(d_ff=d_ff, activation="silu")
    return ModelConfig(
        family="ernie4_5-moe",
        vocab_size=103_424,
        d_model=d_model,
        max_seq_len=131_072,
        layers=in_order(
            LayerSpec(norm=norm, mixer=attention, ffn=dense if i < n_dense else moe) for i in range(n_layers)
        ),
        final_norm=norm,
        tied_embeddings=tied,
        bos_id=1,
        eos_ids=(2,),
        pad_id=0,
    )


PRESETS = {
    "ernie-4.5-21b-a3b": _preset(
        d_model=2560,
        n_layers=28,
        n_dense=1,
        n_heads=20,
        n_kv_heads=4,
        d_ff=12_288,
        moe=_moe(d_ff=1536, top_k=6, n_shared=2),
        tied=True,
    ),
    "ernie-4.5-300b-a47b": _preset(
        d_model=8192,
        n_layers=54,
        n_dense=3,
        n_heads=64,
        n_kv_heads=8,
        d_ff=28_672,
        moe=_moe(d_ff=3584, top_k=8, n_shared=0),
        tied=False,
    ),
}


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read an ERNIE 4.5 mixture's config.json, as transformers 4 or 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "ernie4_5_moe")
    keys.must_be("hidden_act", "silu")
    keys.must_be("use_bias", False)
    keys.must_be("use_rmsnorm", True)
    keys.must_be("moe_gate", "topk")
    keys.must_be("moe_use_aux_free", True)  # the correction
    keys.must_be("num_nextn_predict_layers", 0, 1, None)  # see ``left_out``
    keys.integer("num_key_value_heads")  # every published file has it, and the class's default is no other key's value
    # The class's default is tied, and transformers leaves out what is.
    tied = keys.flag("tie_word_embeddings") if keys.has("tie_word_embeddings") else True
    common = {**common_from_hf(keys), "tied_embeddings": tied}
    width, n_shared = keys.integer("moe_intermediate_size"), keys.integer("moe_num_shared_experts")
    moe = MoESpec(
        d_ff=width,
        n_experts=keys.integer("moe_num_experts"),
        top_k=keys.integer("moe_k"),
        activation="silu",
        correction=True,
        normalize_min=keys.number("moe_norm_min"),
        aux_loss_weight=keys.number("router_aux_loss_coef"),
        shared=DenseSpec(d_ff=width * n_shared, activation="silu") if n_shared else None,
    )
    dense = DenseSpec(d_ff=keys.integer("intermediate_size"), activation="silu")
    n_layers = countable(common["n_layers"])
    first, last = keys.integer("moe_layer_start_index"), keys.integer("moe_layer_end_index")
    last = n_layers - 1 if last == -1 else last
    ffns = _ffns(n_layers, range(first, last + 1), keys.integer("moe_layer_interval"), moe, dense)
    config = with_networks("ernie4_5-moe", common, ffns)
    keys.finish(IGNORED)
    return config


def _ffns(n_layers: int, among: range, step: int, moe: MoESpec, dense: DenseSpec) -> list[DenseSpec | MoESpec]:
    """The feed-forward of every layer: each ``step``-th of those in ``among`` is a mixture, counted from layer 0."""
    if step < 1:
        raise ConfigError(f"the interval of an ERNIE's mixtures must be 1 or more, got {step}")
    return [moe if i in among and (i + 1) % step == 0 else dense for i in range(n_layers)]


def _interval(config: ModelConfig) -> int:
    """The distance between the first two mixtures."""
    places = [i for i, _ in config.moe_layers]
    return places[1] - places[0] if len(places) > 1 else 1


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it, without what is left out."""
    form = "ERNIE-4.5's config.json"
    moe, dense = config.only_moe(form), [layer.ffn.d_ff for layer in config.layers if layer.moe is None]
    raw: dict[str, object] = {
        **common_to_hf(config, form),
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "use_bias": False,
        # Where no layer is dense, nothing is of this width.
        "intermediate_size": dense[0] if dense else moe.d_ff * moe.top_k,
        "moe_intermediate_size": moe.d_ff,
        "moe_num_experts": moe.n_experts,
        "moe_k": moe.top_k,
        "moe_num_shared_experts": 0 if moe.shared is None else moe.shared.d_ff // moe.d_ff,
        "moe_norm_min": moe.normalize_min,
        "moe_layer_start_index": first_dense(config),
        "moe_layer_end_index": config.moe_layers[-1][0],
        "moe_layer_interval": _interval(config),
        "router_aux_loss_coef": moe.aux_loss_weight,
    }
    del raw["attention_bias"]  # ``use_bias`` is this class's
    must_read_back(config, config_from_hf(raw), form)
    return raw


_MLP = "model.layers.{i}.mlp."
_HF_SHARED = {
    f"{_MLP}shared_experts.{part}_proj.weight": f"layers.{{i}}.moe.shared.w_{part}" for part in ("gate", "up", "down")
}


def _hf_common(config: ModelConfig) -> list[Piece]:
    q, k, v = (f"model.layers.{{i}}.self_attn.{part}_proj.weight" for part in "qkv")
    correction = {_MLP + "moe_statics.e_score_correction_bias": "layers.{i}.moe.router.correction"}
    names = HF_COMMON | HF_FFN | HF_ROUTER | _HF_SHARED
    return copies(config, names) + qkv(config, q, k, v, interleaved=True) + single_rows(config, correction)


def hf_layout(config: ModelConfig) -> list[Piece]:
    """transformers 4, and every published checkpoint: a matrix per expert."""
    return _hf_common(config) + hf_experts(config)


def gguf_map(config: ModelConfig) -> list[Piece]:
    """Every tensor of arch ``ernie4_5-moe``."""
    return copies(config, GGUF_COMMON | GGUF_FFN | GGUF_MIXTURE) + gguf_keys.projections(config, interleaved=True)


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``ernie4_5-moe``."""
    keys = gguf_keys.architecture_keys(metadata, "ernie4_5-moe")
    for key in ("expert_weights_scale", "expert_gating_func"):
        keys.must_be(key, 0, 1)
    keys.must_be("expert_weights_norm", True)
    for key in ("expert_group_count", "expert_group_used_count"):
        keys.must_be(key, 0, 1)
    keys.has("expert_shared_count")  # how many are stored as one; the width says how wide they are together
    shared_key = "expert_shared_feed_forward_length"
    shared = keys.integer(shared_key) if keys.given(shared_key) else 0
    common = common_from_gguf(keys, metadata, shapes)
    n_layers, first = countable(common["n_layers"]), keys.integer("leading_dense_block_count")
    step = keys.integer("interleave_moe_layer_step")
    moe = MoESpec(
        d_ff=keys.integer("expert_feed_forward_length"),
        n_experts=keys.integer("expert_count"),
        top_k=keys.integer("expert_used_count"),
        activation="silu",
        correction=any(name.endswith(".exp_probs_b.bias") for name in shapes),
        normalize_min=NORM_MIN,
        shared=DenseSpec(d_ff=shared, activation="silu") if shared else None,
    )
    dense = DenseSpec(d_ff=keys.integer("feed_forward_length"), activation="silu")
    config = with_networks("ernie4_5-moe", common, _ffns(n_layers, range(first, n_layers), step, moe, dense))
    keys.finish(gguf_keys.IGNORED)
    return config


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``ernie4_5-moe``, without what is left out."""
    form, arch = "GGUF arch ernie4_5-moe", "ernie4_5-moe"
    moe, alike = config.only_moe(form), like_its_mixtures(config)
    dense = [layer.ffn.d_ff for layer in config.layers if layer.moe is None]
    shared = 0 if moe.shared is None else moe.shared.d_ff
    metadata = {
        **common_to_gguf(alike, form, arch),
        **gguf_keys.expert_keys(alike, arch),
        f"{arch}.feed_forward_length": dense[0] if dense else moe.d_ff * moe.top_k,
        f"{arch}.expert_shared_count": shared // moe.d_ff,
        f"{arch}.expert_shared_feed_forward_length": shared,
        f"{arch}.leading_dense_block_count": first_dense(config),
        f"{arch}.interleave_moe_layer_step": _interval(config),
    }
    gguf_keys.must_read_back(config, config_from_gguf, metadata, form)
    return metadata


def left_out(config: ModelConfig) -> frozenset[str]:
    """Tensors of the block for multi-token prediction: a layer like the first or the last, and what joins it."""
    ends = [replace(config, layers=(layer,)) for layer in (config.layers[0], config.layers[-1])]
    names = {name for end in ends for name in source_shapes(hf_layout(end)) if name.startswith("model.layers.0.")}
    joints = (f"model.mtp_{name}.0.weight" for name in ("emb_norm", "hidden_norm", "linear_proj"))
    return frozenset({*joints, *(name.replace("model.layers.0.", "model.mtp_block.0.") for name in names)})


def notes(raw: Mapping[str, object]) -> list[str]:
    """What is said of the block for multi-token prediction."""
    if not raw.get("num_nextn_predict_layers"):
        return []
    return ["the block that predicts one token more (multi-token prediction) is left out"]


FAMILY = Family(
    name="ernie4_5-moe",
    presets=PRESETS,
    model_types=("ernie4_5_moe",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={"hf": hf_layout},
    gguf_archs=("ernie4_5-moe",),
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_map=gguf_map,
    left_out=left_out,
    notes=notes,
    tied_copies=HF_TIED,
)
