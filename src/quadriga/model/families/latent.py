"""Multi-head latent attention as config.json and GGUF state it, both ways, and where its matrices lie.

    config.json   q_lora_rank (null: none), kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim
                  rope_scaling.mscale_all_dim: the softmax scale's m, beside the rotation's own factor
    GGUF          attention.q_lora_rank, kv_lora_rank, key_length_mla, value_length_mla, rope.dimension_count
                  rope.scaling.yarn_log_multiplier: 0.1 m; the rotation's own factor is 1 where it is given

Rotary pairs lie side by side in both, behind the numbers of every head that do not turn. W_Kb and W_Vb are one matrix
in Hugging Face's files and in GGUF files from before April 2025 (ggml-org/llama.cpp#12801), two tensors of all heads
since. The norms of the latents have the epsilon 1e-6 in DeepSeek's own code and in transformers, whatever rms_norm_eps
says; llama.cpp gives them the model's. Where the two differ (GLM-4.7-Flash: 1e-5) the models' own code is followed.
Sources: transformers 4.57.6 and 5.24.0 (modeling_deepseek_v2, modeling_deepseek_v3), llama.cpp
(src/models/deepseek2.cpp, conversion/deepseek.py). transformers before 5 leaves m out of DeepSeek-V2's scale;
DeepSeek's own code has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from quadriga.errors import ConfigError
from quadriga.model.config import LatentAttentionSpec, ModelConfig, RopeSpec, YarnScaling
from quadriga.model.families.base import of_kind
from quadriga.model.families.keys import Keys, shortest_float32
from quadriga.model.families.pieces import copies
from quadriga.model.families.rope_keys import (
    rope_from_gguf,
    rope_from_hf,
    rope_to_gguf,
    rope_to_hf,
    usual_attention_factor,
)
from quadriga.model.weight_map import Piece, Shape, whole

# config.json ---------------------------------------------------------------------------------------------------------


def mixer_from_hf(keys: Keys) -> LatentAttentionSpec:
    """The mixer of every layer."""
    n_heads, rope_dim = keys.integer("num_attention_heads"), keys.integer("qk_rope_head_dim")
    nope_dim = keys.integer("qk_nope_head_dim")
    no_rank = keys.has("q_lora_rank") and not keys.given("q_lora_rank")
    keys.must_be("num_key_value_heads", n_heads)
    keys.must_be("attention_bias", False)
    keys.must_be("head_dim", rope_dim, nope_dim + rope_dim, None)  # transformers' name for the part that turns
    keys.must_be("qk_head_dim", nope_dim + rope_dim, None)
    keys.must_be("rope_interleave", True, None)
    rope = rope_from_hf(keys, rope_dim, keys.integer("max_position_embeddings"))
    return LatentAttentionSpec(
        n_heads=n_heads,
        kv_rank=keys.integer("kv_lora_rank"),
        q_rank=None if no_rank else keys.integer("q_lora_rank"),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        v_dim=keys.integer("v_head_dim"),
        position=rope,
        yarn_mscale=_mscale_from_hf(keys) if isinstance(rope.scaling, YarnScaling) else 0.0,
    )


def _mscale_from_hf(keys: Keys) -> float:
    section = keys.section("rope_scaling" if keys.given("rope_scaling") else "rope_parameters")
    return section.number("mscale_all_dim") if section.given("mscale_all_dim") else 0.0


def mixer_to_hf(spec: LatentAttentionSpec, form: str) -> dict[str, object]:
    """The keys that :func:`mixer_from_hf` reads."""
    written = rope_to_hf(of_kind(spec.position, RopeSpec, form), spec.rope_dim, form)
    scaling = written["rope_scaling"]
    if spec.yarn_mscale and isinstance(scaling, dict):
        scaling["mscale_all_dim"] = spec.yarn_mscale
        if scaling["attention_factor"] == 1:  # as every published file has it
            del scaling["attention_factor"]
            scaling["mscale"] = spec.yarn_mscale
    return {
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_heads,
        "q_lora_rank": spec.q_rank,
        "kv_lora_rank": spec.kv_rank,
        "qk_nope_head_dim": spec.nope_dim,
        "qk_rope_head_dim": spec.rope_dim,
        "v_head_dim": spec.v_dim,
        "attention_bias": False,
        **written,
    }


# GGUF ----------------------------------------------------------------------------------------------------------------


def mixer_from_gguf(
    keys: Keys, metadata: Mapping[str, object], shapes: Mapping[str, Shape], max_seq_len: int
) -> LatentAttentionSpec:
    """The mixer of every layer, of files with ``attn_kv_b`` and of those with ``attn_k_b`` and ``attn_v_b``."""
    n_heads, rope_dim = keys.integer("attention.head_count"), keys.integer("rope.dimension_count")
    rank = keys.integer("attention.kv_lora_rank")
    if keys.given(
        "attention.key_length_mla"
    ):  # keys and values are the latent's, their heads' under names of their own
        qk_dim, v_dim = keys.integer("attention.key_length_mla"), keys.integer("attention.value_length_mla")
        kv_heads, key, value = 1, rank + rope_dim, rank
    else:
        qk_dim, v_dim = keys.integer("attention.key_length"), keys.integer("attention.value_length")
        kv_heads, key, value = n_heads, qk_dim, v_dim
    keys.must_be("attention.head_count_kv", kv_heads)
    keys.must_be("attention.key_length", key)
    keys.must_be("attention.value_length", value)
    keys.must_be("attention.temperature_scale", 0)
    keys.has("attention.temperature_length")  # of that scale
    rope, m = _rope_from_gguf(keys, metadata, shapes, max_seq_len)
    given = keys.given("attention.q_lora_rank")
    return LatentAttentionSpec(
        n_heads=n_heads,
        kv_rank=rank,
        q_rank=(keys.integer("attention.q_lora_rank") or None) if given else None,
        nope_dim=qk_dim - rope_dim,
        rope_dim=rope_dim,
        v_dim=v_dim,
        position=rope,
        yarn_mscale=m,
    )


def _rope_from_gguf(
    keys: Keys, metadata: Mapping[str, object], shapes: Mapping[str, Shape], max_seq_len: int
) -> tuple[RopeSpec, float]:
    """The rotation, and the softmax scale's m."""
    rope = rope_from_gguf(keys, "deepseek2", metadata, shapes, max_seq_len, multiplier=True)
    multiplier = (
        keys.number("rope.scaling.yarn_log_multiplier") if keys.given("rope.scaling.yarn_log_multiplier") else 0
    )
    if not isinstance(rope.scaling, YarnScaling):
        return rope, 0.0
    if not multiplier:
        raise ConfigError(
            "GGUF rope.scaling.yarn_log_multiplier must be given beside YaRN in arch deepseek2, got none: without it "
            "llama.cpp scales scores in a way that no model of this arch was trained with. Convert the model anew."
        )
    if rope.scaling.attention_factor != usual_attention_factor(rope.scaling.factor):
        raise ConfigError("GGUF rope.scaling.attn_factor must be 1 or absent in arch deepseek2")
    m = shortest_float32(float(np.float32(10 * shortest_float32(multiplier))))
    return replace(rope, scaling=replace(rope.scaling, attention_factor=1.0)), m


def mixer_to_gguf(spec: LatentAttentionSpec, arch: str) -> dict[str, object]:
    """The keys that :func:`mixer_from_gguf` reads, of a file with ``attn_k_b`` and ``attn_v_b``.

    Raises:
        ConfigError: a rotation whose scaling llama.cpp does not compute.
    """
    form = f"GGUF arch {arch}"
    rope = of_kind(spec.position, RopeSpec, form)
    written: dict[str, object] = {
        f"{arch}.attention.kv_lora_rank": spec.kv_rank,
        f"{arch}.attention.key_length": spec.head_dim,
        f"{arch}.attention.value_length": spec.kv_rank,
        f"{arch}.attention.key_length_mla": spec.qk_dim,
        f"{arch}.attention.value_length_mla": spec.v_dim,
    }
    if spec.q_rank is not None:
        written[f"{arch}.attention.q_lora_rank"] = spec.q_rank
    if isinstance(rope.scaling, YarnScaling):
        if rope.scaling.attention_factor != 1 or not spec.yarn_mscale:
            raise ConfigError(
                f"{form} has one number for YaRN's softmax scale and none for its rotation: a model must have "
                f"mscale = mscale_all_dim, got an attention factor of {rope.scaling.attention_factor:g} and "
                f"mscale_all_dim {spec.yarn_mscale:g}"
            )
        written[f"{arch}.rope.scaling.yarn_log_multiplier"] = 0.1 * spec.yarn_mscale
        usual = usual_attention_factor(rope.scaling.factor)
        rope = replace(rope, scaling=replace(rope.scaling, attention_factor=usual))  # which no key has to say
    return written | rope_to_gguf(rope, spec.rope_dim, arch)


# Weights -------------------------------------------------------------------------------------------------------------

_HF = "model.layers.{i}.self_attn."
_OURS = "layers.{i}.attn."
HF_LATENT = {
    _HF + "q_a_proj.weight": _OURS + "wq_a.weight",
    _HF + "q_a_layernorm.weight": _OURS + "q_a_norm.weight",
    _HF + "kv_a_layernorm.weight": _OURS + "kv_a_norm.weight",
}
GGUF_LATENT = {
    "blk.{i}.attn_q_a.weight": _OURS + "wq_a.weight",
    "blk.{i}.attn_q_a_norm.weight": _OURS + "q_a_norm.weight",
    "blk.{i}.attn_kv_a_norm.weight": _OURS + "kv_a_norm.weight",
}


def hf_attention(config: ModelConfig) -> list[Piece]:
    """Everything of the attention but its output projection, as transformers names it."""
    names = {part: f"{_HF}{part}.weight" for part in ("q_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")}
    pieces = copies(config, HF_LATENT) + _joined(config, names["kv_b_proj"])
    return pieces + _turning(config, names["q_proj"], names["q_b_proj"], names["kv_a_proj_with_mqa"])


def gguf_attention(config: ModelConfig, *, joined: bool) -> list[Piece]:
    """The same as llama.cpp names it.

    Args:
        joined: W_Kb and W_Vb are one matrix, ``attn_kv_b``, as until April 2025.
    """
    pieces = copies(config, GGUF_LATENT)
    pieces += _turning(config, *(f"blk.{{i}}.attn_{part}.weight" for part in ("q", "q_b", "kv_a_mqa")))
    return pieces + (_joined(config, "blk.{i}.attn_kv_b.weight") if joined else _stacked(config))


def _mixers(config: ModelConfig) -> list[tuple[int, LatentAttentionSpec]]:
    return [(i, of_kind(layer.mixer, LatentAttentionSpec, "this layout")) for i, layer in enumerate(config.layers)]


def _turning(config: ModelConfig, q: str, q_b: str, kv_a: str) -> list[Piece]:
    """The projections whose rows have rotary pairs side by side at the end of a head, or of the matrix."""
    pieces = []
    for i, spec in _mixers(config):
        own, source = ("wq", q) if spec.q_rank is None else ("wq_b", q_b)
        queries = (spec.n_heads * spec.qk_dim, spec.q_rank or config.d_model)
        for part, name, shape, n_heads in (
            (own, source, queries, spec.n_heads),
            ("wkv_a", kv_a, (spec.head_dim, config.d_model), 1),
        ):
            pieces.append(
                Piece(
                    source=name.format(i=i),
                    source_shape=shape,
                    target=f"layers.{i}.attn.{part}.weight",
                    target_shape=shape,
                    rotary_heads=n_heads,
                    rotary_last=spec.rope_dim,
                )
            )
    return pieces


def _joined(config: ModelConfig, name: str) -> list[Piece]:
    """One matrix of all heads, each one's W_Kb above its W_Vb: (H (nope + v), R)."""
    pieces = []
    for i, spec in _mixers(config):
        rank, n = spec.kv_rank, spec.nope_dim + spec.v_dim
        source, shape = name.format(i=i), (spec.n_heads * n, rank)
        for h in range(spec.n_heads):
            middle = h * n + spec.nope_dim
            pieces += [
                Piece(
                    source=source,
                    source_shape=shape,
                    source_box=((h * n, middle), (0, rank)),
                    target=f"layers.{i}.attn.wk_b.weight",
                    target_shape=(spec.n_heads * rank, spec.nope_dim),
                    target_box=((h * rank, (h + 1) * rank), (0, spec.nope_dim)),
                    transpose=True,
                ),
                Piece(
                    source=source,
                    source_shape=shape,
                    source_box=((middle, (h + 1) * n), (0, rank)),
                    target=f"layers.{i}.attn.wv_b.weight",
                    target_shape=(spec.n_heads * spec.v_dim, rank),
                    target_box=((h * spec.v_dim, (h + 1) * spec.v_dim), (0, rank)),
                ),
            ]
    return pieces


def _stacked(config: ModelConfig) -> list[Piece]:
    """A matrix a head, W_Kb transposed as it is used, all in one tensor: (H, R, nope) and (H, v, R)."""
    pieces = []
    for i, spec in _mixers(config):
        for part, rows, columns in (("k_b", spec.kv_rank, spec.nope_dim), ("v_b", spec.v_dim, spec.kv_rank)):
            shape = (spec.n_heads * rows, columns)
            pieces.append(
                Piece(
                    source=f"blk.{i}.attn_{part}.weight",
                    source_shape=(spec.n_heads, rows, columns),
                    source_box=whole((spec.n_heads, rows, columns)),
                    target=f"layers.{i}.attn.w{part}.weight",
                    target_shape=shape,
                    view=shape,
                )
            )
    return pieces
