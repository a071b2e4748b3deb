"""Where Nemotron-H stores its weights: Hugging Face directories, and GGUF files of archs nemotron_h and nemotron_h_moe.

Sources: see :mod:`quadriga.model.families.nemotron_h`.
"""

from __future__ import annotations

from quadriga.model.config import ModelConfig
from quadriga.model.families import deepseek_moe
from quadriga.model.families.granite_hybrid_layouts import GGUF_MAMBA, as_matrices, in_projection
from quadriga.model.families.lfm2 import taps_of_conv1d
from quadriga.model.families.llama2 import GGUF_COMMON, GGUF_FFN, gguf_qkv
from quadriga.model.families.pieces import copies, experts, qkv
from quadriga.model.weight_map import Piece

_OURS = "layers.{i}."
_ENDS = {"embeddings.weight": "embed.weight", "norm_f.weight": "final_norm.weight"}
_BRANCHES = {
    "mixer.A_log": _OURS + "mamba.rate",
    "mixer.D": _OURS + "mamba.skip",
    "mixer.dt_bias": _OURS + "mamba.dt",
    "mixer.conv1d.bias": _OURS + "mamba.conv_bias",
    "mixer.norm.weight": _OURS + "mamba.norm.weight",
    "mixer.out_proj.weight": _OURS + "mamba.w_out.weight",
    "mixer.o_proj.weight": _OURS + "attn.wo.weight",
    "mixer.up_proj.weight": _OURS + "ffn.w_up",
    "mixer.down_proj.weight": _OURS + "ffn.w_down",
    "mixer.gate.weight": _OURS + "moe.router.weight",
    "mixer.gate.e_score_correction_bias": _OURS + "moe.router.correction",
    "mixer.shared_experts.up_proj.weight": _OURS + "moe.shared.w_up",
    "mixer.shared_experts.down_proj.weight": _OURS + "moe.shared.w_down",
}
_NORMS = (_OURS + "attn_norm.weight", _OURS + "ffn_norm.weight")
"""A layer has one of them, whatever its branch."""


def _one_norm(config: ModelConfig, name: str) -> list[Piece]:
    return [piece for norm in _NORMS for piece in copies(config, {name: norm})]


def _hf_common(config: ModelConfig, stem: str) -> list[Piece]:
    layer = stem + "layers.{i}."
    return [
        *copies(config, {stem + source: target for source, target in _ENDS.items()}),
        *copies(config, {"lm_head.weight": "lm_head.weight"}),
        *copies(config, {layer + source: target for source, target in _BRANCHES.items()}),
        *_one_norm(config, layer + "norm.weight"),
        *qkv(config, *(f"{layer}mixer.{part}_proj.weight" for part in "qkv")),
        *in_projection(config, layer + "mixer.in_proj.weight"),
        *taps_of_conv1d(config, layer + "mixer.conv1d.weight", _OURS + "mamba.taps"),
    ]


def hf_layout(config: ModelConfig) -> list[Piece]:
    """Every published checkpoint, and what transformers 5 writes: a matrix an expert, under ``backbone.``."""
    one = "backbone.layers.{i}.mixer.experts.{e}."
    return [
        *_hf_common(config, "backbone."),
        *experts(config, "w_up", one + "up_proj.weight"),
        *experts(config, "w_down", one + "down_proj.weight"),
    ]


def hf5_layout(config: ModelConfig) -> list[Piece]:
    """transformers 5 in memory: all experts in one tensor, under ``model.``."""
    layer = "model.layers.{i}.mixer.experts."
    stacks = {layer + "up_proj": _OURS + "moe.w_up", layer + "down_proj": _OURS + "moe.w_down"}
    return _hf_common(config, "model.") + copies(config, stacks)


def gguf_map(config: ModelConfig) -> list[Piece]:
    """Every tensor of both archs; q and k lie as in arch ``llama``, though nothing turns, every norm is attn_norm."""
    heads = {"blk.{i}.ssm_a": _OURS + "mamba.rate", "blk.{i}.ssm_d": _OURS + "mamba.skip"}
    norm = "blk.{i}.attn_norm.weight"
    common = {source: target for source, target in (GGUF_COMMON | GGUF_FFN).items() if target not in _NORMS}
    return [
        *copies(config, common | deepseek_moe.GGUF_MIXTURE | GGUF_MAMBA),
        *_one_norm(config, norm),
        *gguf_qkv(config),
        *in_projection(config, "blk.{i}.ssm_in.weight"),
        *as_matrices(config, heads, "heads"),
        *as_matrices(config, {"blk.{i}.ssm_norm.weight": _OURS + "mamba.norm.weight"}, "groups"),
    ]
