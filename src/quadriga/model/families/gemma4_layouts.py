"""Where Gemma 4's text stores its weights: Hugging Face directories, and GGUF files of arch gemma4.

Sources: see :mod:`quadriga.model.families.gemma4`.
"""

from __future__ import annotations

from quadriga.model.config import ModelConfig
from quadriga.model.families import gguf_keys
from quadriga.model.families.llama2 import GGUF_COMMON, GGUF_FFN, HF_COMMON, HF_FFN, hf_qkv
from quadriga.model.families.pieces import WITHIN, copies, gate_up, under
from quadriga.model.families.qwen3 import GGUF_QK_NORMS, HF_QK_NORMS
from quadriga.model.weight_map import Piece

_LAYER, _OURS = "model.layers.{i}.", "layers.{i}."
_HF_NAMES = {
    **{source: target for source, target in HF_COMMON.items() if "post_attention" not in source},
    **HF_QK_NORMS,
    _LAYER + "post_attention_layernorm.weight": _OURS + "attn_post_norm.weight",
    _LAYER + "pre_feedforward_layernorm.weight": _OURS + "ffn_norm.weight",
    _LAYER + "post_feedforward_layernorm.weight": _OURS + "ffn_post_norm.weight",
    _LAYER + "post_feedforward_layernorm_1.weight": _OURS + "moe.shared_post_norm.weight",
    _LAYER + "pre_feedforward_layernorm_2.weight": _OURS + "moe.norm.weight",
    _LAYER + "post_feedforward_layernorm_2.weight": _OURS + "moe.post_norm.weight",
    _LAYER + "layer_scalar": _OURS + "scale",
    _LAYER + "router.proj.weight": _OURS + "moe.router.weight",
    _LAYER + "router.scale": _OURS + "moe.router.scale",
    _LAYER + "router.per_expert_scale": _OURS + "moe.router.expert_scale",
    _LAYER + "experts.down_proj": _OURS + "moe.w_down",
}
_SHARED = {_LAYER + f"mlp.{part}_proj.weight": _OURS + f"moe.shared.w_{part}" for part in ("gate", "up", "down")}
_BLOCK = "blk.{i}."
_GGUF_NAMES = {
    **GGUF_COMMON,
    **GGUF_QK_NORMS,
    **gguf_keys.ROUTER,
    _BLOCK + "post_attention_norm.weight": _OURS + "attn_post_norm.weight",
    _BLOCK + "post_ffw_norm.weight": _OURS + "ffn_post_norm.weight",
    _BLOCK + "post_ffw_norm_1.weight": _OURS + "moe.shared_post_norm.weight",
    _BLOCK + "pre_ffw_norm_2.weight": _OURS + "moe.norm.weight",
    _BLOCK + "post_ffw_norm_2.weight": _OURS + "moe.post_norm.weight",
    _BLOCK + "layer_output_scale.weight": _OURS + "scale",
    _BLOCK + "ffn_gate_inp.scale": _OURS + "moe.router.scale",
    _BLOCK + "ffn_down_exps.scale": _OURS + "moe.router.expert_scale",
    _BLOCK + "ffn_down_exps.weight": _OURS + "moe.w_down",
}
_GGUF_SHARED = {_BLOCK + f"ffn_{part}.weight": _OURS + f"moe.shared.w_{part}" for part in ("gate", "up", "down")}


def text_layout(config: ModelConfig) -> list[Piece]:
    """The text alone, as transformers 5 writes it: all experts in one tensor, gate above up."""
    return [
        *copies(config, _HF_NAMES | (_SHARED if config.is_moe else HF_FFN)),
        *hf_qkv(config),
        *gate_up(config, _LAYER + "experts.gate_up_proj"),
    ]


def whole_layout(config: ModelConfig) -> list[Piece]:
    """The published checkpoints: the text within text and vision."""
    return under(WITHIN, text_layout(config))


def gguf_map(config: ModelConfig) -> list[Piece]:
    """Every tensor of arch ``gemma4`` but the factors of its rotation, which are read with the metadata."""
    return [
        *copies(config, _GGUF_NAMES | (_GGUF_SHARED if config.is_moe else GGUF_FFN)),
        *gguf_keys.projections(config, interleaved=False),
        *gate_up(config, _BLOCK + "ffn_gate_up_exps.weight"),
    ]
