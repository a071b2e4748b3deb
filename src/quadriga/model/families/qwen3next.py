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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from quadriga.errors import ConfigError
from quadriga.model.config import (
    AttentionSpec,
    DeltaNetSpec,
    DenseSpec,
    LayerSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    QKNormSpec,
    RopeSpec,
    countable,
    in_order,
    uniform,
)
from quadriga.model.families import gguf_keys
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.lfm2 import taps_of_conv1d
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
)
from quadriga.model.families.pieces import copies, single_rows
from quadriga.model.families.qwen2moe import HF_SHARED
from quadriga.model.families.qwen3 import GGUF_QK_NORMS, HF_QK_NORMS, HF_ROUTER, hf5_experts, hf_experts, sparse_layers
from quadriga.model.weight_map import Piece, Shape

Ffns = Sequence[DenseSpec | MoESpec]
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


def _model(
    family: str, common: Mapping[str, Any], ffns: Ffns, attends: Sequence[bool], delta: DeltaNetSpec
) -> ModelConfig:
    """Layers of both kinds; ``common`` as of LLaMA, with ``tied_embeddings``."""
    rest = {key: value for key, value in common.items() if key not in ("norm", "mixer", "n_layers")}
    norm: NormSpec = common["norm"]
    qk_norm = QKNormSpec(over="head", eps=norm.eps, plus_one=norm.plus_one)
    attention = replace(common["mixer"], qk_norm=qk_norm, output_gate=True)
    layers = in_order(
        LayerSpec(norm=norm, mixer=attention if full else delta, ffn=ffn)
        for full, ffn in zip(attends, ffns, strict=True)
    )
    return ModelConfig(family=family, layers=layers, final_norm=norm, **rest)


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
    return _model(family, common, ffns, [i % 4 == 3 for i in range(len(ffns))], delta)


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
        outer.section("text_config")  # raises unless it is one
        section = raw["text_config"]
        assert isinstance(section, Mapping), "it is a section"
        where, text = "config.json: text_config", section
        tied = Keys(text, where).value("tie_word_embeddings")
        outer.must_be("tie_word_embeddings", tied)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            outer.has(key)
        outer.finish(PRETRAINED_KEYS | _VISION)
    rope = text.get("rope_parameters")
    if isinstance(rope, Mapping):  # sections of a head that turn with height and width of pictures; for text all alike
        rope = {key: value for key, value in rope.items() if key not in ("mrope_section", "mrope_interleaved")}
        text = {**text, "rope_parameters": rope}
    keys = Keys(text, where)
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
    config = _model(family, common, ffns, _attends(keys, len(ffns)), delta)
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


def _delta(config: ModelConfig, form: str) -> DeltaNetSpec:
    for layer in config.kinds():
        if not isinstance(layer.mixer, AttentionSpec):
            return of_kind(layer.mixer, DeltaNetSpec, form)
    raise ConfigError(f"{form} cannot express this model: it has no gated delta rule")


def _to_hf(config: ModelConfig, form: str) -> dict[str, object]:
    alike = replace(config, layers=uniform(config.first_attention(), config.n_layers))
    delta = _delta(config, form)
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


# Weights -------------------------------------------------------------------------------------------------------------

_LAYER, _OURS = "model.layers.{i}.", "layers.{i}."
_LINEAR, _DELTA = _LAYER + "linear_attn.", _OURS + "delta."
_HF_DELTA = {
    _LINEAR + "A_log": _DELTA + "rate",
    _LINEAR + "dt_bias": _DELTA + "dt",
    _LINEAR + "norm.weight": _DELTA + "norm.weight",
    _LINEAR + "out_proj.weight": _DELTA + "w_out.weight",
}
Parts = Mapping[str, Sequence[tuple[int, int, int]]]
"""Name of a tensor -> (first row in it, first row of the parameter, how many)."""
Spec = TypeVar("Spec", AttentionSpec, DeltaNetSpec)


def _rows(
    config: ModelConfig, kind: type[Spec], source: str, target: str, parts_of: Callable[[Spec], Parts]
) -> list[Piece]:
    """Pieces for a matrix whose rows lie elsewhere in the file.

    Args:
        kind: of the mixers of the layers it belongs to.
        source: name with ``{i}`` for the layer and ``{part}`` for one of several tensors.
        target: the parameter within its layer.
        parts_of: where the rows are.
    """
    pieces, d = [], config.d_model
    for i, layer in enumerate(config.layers):
        if not isinstance(layer.mixer, kind):
            continue
        parts = parts_of(layer.mixer)
        heights = {part: sum(n for _, _, n in boxes) for part, boxes in parts.items()}
        pieces += [
            Piece(
                source=source.format(i=i, part=part),
                source_shape=(heights[part], d),
                source_box=((first, first + n), (0, d)),
                target=f"layers.{i}.{target}",
                target_shape=(sum(heights.values()), d),
                target_box=((place, place + n), (0, d)),
            )
            for part, boxes in parts.items()
            for first, place, n in boxes
        ]
    return pieces


def _gated_qkv(config: ModelConfig, name: str) -> list[Piece]:
    """q, each head followed by its gates, k and v of attention; ``name`` with ``{i}`` and ``{part}`` (q, k or v)."""

    def parts(attn: AttentionSpec) -> Parts:
        d, gates = attn.head_dim, attn.q_dim + 2 * attn.kv_dim
        heads = range(attn.n_heads)
        return {
            "q": [box for h in heads for box in ((2 * h * d, h * d, d), ((2 * h + 1) * d, gates + h * d, d))],
            "k": [(0, attn.q_dim, attn.kv_dim)],
            "v": [(0, attn.q_dim + attn.kv_dim, attn.kv_dim)],
        }

    return _rows(config, AttentionSpec, name, "attn.wqkv.weight", parts)


def _by_key_head(n_heads: int, widths: Sequence[tuple[int, int]]) -> Parts:
    """Boxes of a matrix in which the rows of a head of keys lie together, one part after the other.

    Args:
        widths: of each part, rows of a head of keys and its first row in the parameter.
    """
    boxes, first = [], 0
    for g in range(n_heads):
        for n, begin in widths:
            boxes.append((first, begin + g * n, n))
            first += n
    return {"": boxes}


def _together_qkvz(config: ModelConfig, name: str) -> list[Piece]:
    """Qwen3-Next's q, k, v and z, each head of keys with its own."""

    def parts(delta: DeltaNetSpec) -> Parts:
        v = delta.value_dim // delta.n_k_heads
        firsts = (0, delta.qk_dim, 2 * delta.qk_dim, delta.width)
        return _by_key_head(delta.n_k_heads, list(zip((delta.k_dim, delta.k_dim, v, v), firsts, strict=True)))

    return _rows(config, DeltaNetSpec, name, "delta.w_in.weight", parts)


def _together_ba(config: ModelConfig, name: str) -> list[Piece]:
    """Qwen3-Next's b and a, each head of keys with its own."""

    def parts(delta: DeltaNetSpec) -> Parts:
        times = delta.n_v_heads // delta.n_k_heads
        return _by_key_head(delta.n_k_heads, [(times, 0), (times, delta.n_v_heads)])

    return _rows(config, DeltaNetSpec, name, "delta.w_ba.weight", parts)


def _apart_qkv_z(config: ModelConfig, name: str, qkv: str, z: str) -> list[Piece]:
    """q, k and v in one matrix, z in another."""

    def parts(delta: DeltaNetSpec) -> Parts:
        return {qkv: [(0, 0, delta.width)], z: [(0, delta.width, delta.value_dim)]}

    return _rows(config, DeltaNetSpec, name, "delta.w_in.weight", parts)


def _apart_b_a(config: ModelConfig, name: str, b: str, a: str) -> list[Piece]:
    """b and a in matrices of their own."""

    def parts(delta: DeltaNetSpec) -> Parts:
        return {b: [(0, 0, delta.n_v_heads)], a: [(0, delta.n_v_heads, delta.n_v_heads)]}

    return _rows(config, DeltaNetSpec, name, "delta.w_ba.weight", parts)


_HF_NAMES = HF_COMMON | HF_QK_NORMS | HF_FFN | HF_ROUTER | HF_SHARED | _HF_DELTA


def _hf_common(config: ModelConfig) -> list[Piece]:
    gate = {_LAYER + "mlp.shared_expert_gate.weight": _OURS + "moe.shared_gate"}
    return [
        *copies(config, _HF_NAMES),
        *single_rows(config, gate),
        *taps_of_conv1d(config, _LINEAR + "conv1d.weight", _DELTA + "taps"),
        *_gated_qkv(config, _LAYER + "self_attn.{part}_proj.weight"),
    ]


def _next_common(config: ModelConfig) -> list[Piece]:
    together = _together_qkvz(config, _LINEAR + "in_proj_qkvz.weight") + _together_ba(
        config, _LINEAR + "in_proj_ba.weight"
    )
    return _hf_common(config) + together


def next_layout(config: ModelConfig) -> list[Piece]:
    """Qwen3-Next's: transformers 4, and the published checkpoint, a matrix per expert."""
    return _next_common(config) + hf_experts(config)


def next5_layout(config: ModelConfig) -> list[Piece]:
    """Qwen3-Next's in transformers 5 in memory: all experts in one tensor, gate above up."""
    return _next_common(config) + hf5_experts(config)


def _text_common(config: ModelConfig) -> list[Piece]:
    name = _LINEAR + "in_proj_{part}.weight"
    return _hf_common(config) + _apart_qkv_z(config, name, "qkv", "z") + _apart_b_a(config, name, "b", "a")


def text_layout(config: ModelConfig) -> list[Piece]:
    """Qwen3.5's text alone as transformers 5 writes it: a matrix per expert."""
    return _text_common(config) + hf_experts(config)


def text5_layout(config: ModelConfig) -> list[Piece]:
    """The same as transformers 5 has it in memory: all experts in one tensor, gate above up."""
    return _text_common(config) + hf5_experts(config)


def _whole(pieces: list[Piece]) -> list[Piece]:
    """The names of a text within those of text and vision."""
    old, new = "model.", "model.language_model."
    return [
        replace(piece, source=new + piece.source.removeprefix(old)) if piece.source.startswith(old) else piece
        for piece in pieces
    ]


def whole_layout(config: ModelConfig) -> list[Piece]:
    """The published checkpoints, text and vision: all experts in one tensor."""
    return _whole(text5_layout(config))


def whole_split_layout(config: ModelConfig) -> list[Piece]:
    """The same with a matrix per expert."""
    return _whole(text_layout(config))


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


# GGUF ----------------------------------------------------------------------------------------------------------------

ARCHS = ("qwen3next", "qwen35moe", "qwen35")
_BLOCK = "blk.{i}."
_GGUF_NAMES = {
    **{source: target for source, target in GGUF_COMMON.items() if "ffn_norm" not in target},
    _BLOCK + "post_attention_norm.weight": _OURS + "ffn_norm.weight",
    **GGUF_FFN,
    **GGUF_QK_NORMS,
    **gguf_keys.ROUTER,
    **gguf_keys.MERGED_EXPERTS,
    **gguf_keys.SHARED_EXPERT,
    _BLOCK + "ffn_gate_inp_shexp.weight": _OURS + "moe.shared_gate",
    _BLOCK + "ssm_a": _DELTA + "rate",
    _BLOCK + "ssm_dt.bias": _DELTA + "dt",
    _BLOCK + "ssm_norm.weight": _DELTA + "norm.weight",
    _BLOCK + "ssm_out.weight": _DELTA + "w_out.weight",
    _BLOCK + "ssm_conv1d.weight": _DELTA + "taps",
}


def _gguf_common(config: ModelConfig) -> list[Piece]:
    name = _BLOCK + "attn_{part}.weight"
    return copies(config, _GGUF_NAMES) + _gated_qkv(config, name) + _apart_qkv_z(config, name, "qkv", "gate")


def next_gguf_map(config: ModelConfig) -> list[Piece]:
    """Every tensor of arch ``qwen3next``."""
    return _gguf_common(config) + _together_ba(config, _BLOCK + "ssm_ba.weight")


def gguf_map(config: ModelConfig) -> list[Piece]:
    """Every tensor of archs ``qwen35moe`` and ``qwen35``."""
    return _gguf_common(config) + _apart_b_a(config, _BLOCK + "ssm_{part}.weight", "beta", "alpha")


def next_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``qwen3next``."""
    return _from_gguf("qwen3next", "qwen3next", metadata, shapes)


def moe_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``qwen35moe``."""
    return _from_gguf("qwen35moe", "qwen35moe", metadata, shapes)


def dense_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``qwen35``."""
    return _from_gguf("qwen35", "qwen35", metadata, shapes)


def _from_gguf(family: str, arch: str, metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    # Sections of a head that turn with height and width of pictures; for text they turn alike.
    plain_text = {key: value for key, value in metadata.items() if key != f"{arch}.rope.dimension_sections"}
    keys = gguf_keys.architecture_keys(plain_text, arch)
    common = common_from_gguf(keys, metadata, shapes)
    n_more = keys.integer("nextn_predict_layers") if keys.has("nextn_predict_layers") else 0
    n_layers = countable(common["n_layers"] - n_more)
    ffn: DenseSpec | MoESpec
    if arch == "qwen35":
        ffn = DenseSpec(d_ff=keys.integer("feed_forward_length"), activation="silu")
    else:
        keys.has("feed_forward_length")
        d_ff, shared = keys.integer("expert_feed_forward_length"), keys.integer("expert_shared_feed_forward_length")
        plain = gguf_keys.plain_experts(keys, d_ff, shared=DenseSpec(d_ff=shared, activation="silu"))
        ffn = replace(plain, shared_gate=True)
    n_v_heads, inner = keys.integer("ssm.time_step_rank"), keys.integer("ssm.inner_size")
    if n_v_heads < 1 or inner % n_v_heads:
        raise ConfigError(f"GGUF ssm.inner_size must be a multiple of ssm.time_step_rank, got {inner} and {n_v_heads}")
    delta = DeltaNetSpec(
        n_k_heads=keys.integer("ssm.group_count"),
        n_v_heads=n_v_heads,
        k_dim=keys.integer("ssm.state_size"),
        v_dim=inner // n_v_heads,
        taps=keys.integer("ssm.conv_kernel"),
        eps=common["norm"].eps,
        log_rate=False,
        tiled=arch != "qwen3next",
    )
    # llama.cpp: every fourth layer is attention where a file does not say.
    every = keys.integer("full_attention_interval") if keys.has("full_attention_interval") else 4
    if every < 1:
        raise ConfigError(f"GGUF full_attention_interval must be 1 or more, got {every}")
    config = _model(family, common, [ffn] * n_layers, [(i + 1) % every == 0 for i in range(n_layers)], delta)
    keys.finish(gguf_keys.IGNORED)
    return config


def _restated(config: ModelConfig, *, gguf: bool) -> ModelConfig:
    """The same model with its numbers as GGUF files keep them, or as Hugging Face directories do."""

    def change(layer: LayerSpec) -> LayerSpec:
        mixer = layer.mixer
        if isinstance(mixer, DeltaNetSpec):
            mixer = replace(mixer, log_rate=not gguf, tiled=gguf and config.family != "qwen3next")
        elif isinstance(mixer, AttentionSpec) and mixer.qk_norm is not None:
            mixer = replace(mixer, qk_norm=replace(mixer.qk_norm, plus_one=not gguf))
        return replace(layer, mixer=mixer, norm=replace(layer.norm, plus_one=not gguf))

    return replace(config.with_layers(change), final_norm=replace(config.final_norm, plus_one=not gguf))


def gguf_form(config: ModelConfig) -> ModelConfig:
    """Norms plus one, negative rates and, in Qwen3.5's archs, heads of v by turns."""
    return _restated(config, gguf=True)


def hf_form(config: ModelConfig) -> ModelConfig:
    """Norms less one, logarithms of rates, heads of v by their head of k."""
    return _restated(config, gguf=False)


def next_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``qwen3next``, of a model in :func:`gguf_form`."""
    return _to_gguf(config, "qwen3next", next_from_gguf)


def moe_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``qwen35moe``, of a model in :func:`gguf_form`."""
    return _to_gguf(config, "qwen35moe", moe_from_gguf)


def dense_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``qwen35``, of a model in :func:`gguf_form`."""
    return _to_gguf(config, "qwen35", dense_from_gguf)


def _to_gguf(
    config: ModelConfig, arch: str, read: Callable[[Mapping[str, object], Mapping[str, Shape]], ModelConfig]
) -> dict[str, object]:
    form = f"GGUF arch {arch}"
    first, delta = config.first_attention(), _delta(config, form)
    alike = replace(config, layers=uniform(first, config.n_layers))
    written = {
        **common_to_gguf(alike, form, arch),
        f"{arch}.full_attention_interval": config.layers.index(first) + 1,
        f"{arch}.ssm.conv_kernel": delta.taps,
        f"{arch}.ssm.state_size": delta.k_dim,
        f"{arch}.ssm.group_count": delta.n_k_heads,
        f"{arch}.ssm.time_step_rank": delta.n_v_heads,
        f"{arch}.ssm.inner_size": delta.value_dim,
    }
    if arch != "qwen35":
        moe = config.only_moe(form)
        written |= gguf_keys.expert_keys(alike, arch)
        written[f"{arch}.expert_shared_feed_forward_length"] = of_kind(moe.shared, DenseSpec, form).d_ff
    if arch != "qwen3next":  # llama.cpp asks for them; for text any that take in all pairs do
        attn = first.attention
        pairs = (of_kind(attn.position, RopeSpec, form).dim or attn.head_dim) // 2
        written[f"{arch}.rope.dimension_sections"] = [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3, 0]
    gguf_keys.must_read_back(config, read, written, form)
    return written


def left_out(config: ModelConfig) -> frozenset[str]:
    """Tensors of the block for multi-token prediction behind the last layer of a GGUF file."""
    last = replace(config, layers=uniform(config.first_attention(), 1))
    names = {piece.source for piece in copies(last, _GGUF_NAMES) + _gated_qkv(last, _BLOCK + "attn_{part}.weight")}
    names |= {f"blk.0.nextn.{name}.weight" for name in ("eh_proj", "enorm", "hnorm", "embed_tokens")}
    names |= {f"blk.0.nextn.shared_head_{name}.weight" for name in ("norm", "head")}
    return frozenset(n.replace("blk.0.", f"blk.{config.n_layers}.", 1) for n in names if n.startswith("blk.0."))


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
