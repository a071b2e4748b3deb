"""Where Qwen3-Next and Qwen3.5 store their weights: Hugging Face directories of transformers 4 and 5, and GGUF files.

Sources: see :mod:`quadriga.model.families.qwen3next`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from quadriga.model.config import (
    AttentionSpec,
    DeltaNetSpec,
    ModelConfig,
    uniform,
)
from quadriga.model.families import gguf_keys
from quadriga.model.families.lfm2 import taps_of_conv1d
from quadriga.model.families.llama2 import (
    GGUF_COMMON,
    GGUF_FFN,
    HF_COMMON,
    HF_FFN,
)
from quadriga.model.families.pieces import WITHIN, copies, single_rows, under
from quadriga.model.families.qwen2moe import HF_SHARED
from quadriga.model.families.qwen3 import GGUF_QK_NORMS, HF_QK_NORMS, HF_ROUTER, hf5_experts, hf_experts
from quadriga.model.weight_map import Piece

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


def whole_layout(config: ModelConfig) -> list[Piece]:
    """The published checkpoints, text and vision: all experts in one tensor."""
    return under(WITHIN, text5_layout(config))


def whole_split_layout(config: ModelConfig) -> list[Piece]:
    """The same with a matrix per expert."""
    return under(WITHIN, text_layout(config))


# GGUF ----------------------------------------------------------------------------------------------------------------

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


def left_out(config: ModelConfig) -> frozenset[str]:
    """Tensors of the block for multi-token prediction behind the last layer of a GGUF file."""
    last = replace(config, layers=uniform(config.first_attention(), 1))
    names = {piece.source for piece in copies(last, _GGUF_NAMES) + _gated_qkv(last, _BLOCK + "attn_{part}.weight")}
    names |= {f"blk.0.nextn.{name}.weight" for name in ("eh_proj", "enorm", "hnorm", "embed_tokens")}
    names |= {f"blk.0.nextn.shared_head_{name}.weight" for name in ("norm", "head")}
    return frozenset(n.replace("blk.0.", f"blk.{config.n_layers}.", 1) for n in names if n.startswith("blk.0."))
