"""Where Granite 4 stores its weights: Hugging Face directories, and GGUF files of arch granitehybrid.

Sources: see :mod:`quadriga.model.families.granite_hybrid`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from quadriga.model.config import Mamba2Spec, ModelConfig, MoESpec
from quadriga.model.families import gguf_keys
from quadriga.model.families.granite import HF_MIXTURE, HF_MOE, HF_SHARED
from quadriga.model.families.lfm2 import taps_of_conv1d
from quadriga.model.families.llama2 import GGUF_COMMON, GGUF_FFN, HF_COMMON, gguf_qkv, hf_qkv
from quadriga.model.families.pieces import copies, gate_up
from quadriga.model.weight_map import Piece

_LAYER, _OURS = "model.layers.{i}.mamba.", "layers.{i}.mamba."
_HF_MAMBA = {
    _LAYER + "A_log": _OURS + "rate",
    _LAYER + "D": _OURS + "skip",
    _LAYER + "dt_bias": _OURS + "dt",
    _LAYER + "conv1d.bias": _OURS + "conv_bias",
    _LAYER + "norm.weight": _OURS + "norm.weight",
    _LAYER + "out_proj.weight": _OURS + "w_out.weight",
}
_BLOCK = "blk.{i}."
GGUF_MAMBA = {
    _BLOCK + "ssm_conv1d.weight": _OURS + "taps",
    _BLOCK + "ssm_conv1d.bias": _OURS + "conv_bias",
    _BLOCK + "ssm_dt.bias": _OURS + "dt",
    _BLOCK + "ssm_out.weight": _OURS + "w_out.weight",
}


def in_projection(config: ModelConfig, name: str) -> list[Piece]:
    """Pieces for a state-space layer's projection in one tensor: z, x, B and C, and below them a row a head for a.

    Args:
        name: source name with ``{i}`` for the layer.
    """
    pieces, d = [], config.d_model
    for i, layer in enumerate(config.layers):
        if not isinstance(layer.mixer, Mamba2Spec):
            continue
        first = layer.mixer.inner_dim + layer.mixer.width
        rows = first + layer.mixer.n_heads
        pieces += [
            Piece(
                source=name.format(i=i),
                source_shape=(rows, d),
                source_box=((start, stop), (0, d)),
                target=f"layers.{i}.mamba.{part}.weight",
                target_shape=(stop - start, d),
            )
            for part, start, stop in (("w_in", 0, first), ("w_dt", first, rows))
        ]
    return pieces


def as_matrices(config: ModelConfig, names: Mapping[str, str], rows: Literal["heads", "groups"]) -> list[Piece]:
    """Pieces for vectors that GGUF keeps as matrices: a row a head, of one number, or a row a group of heads.

    Args:
        names: source name -> parameter name, both with ``{i}`` for the layer.
    """
    pieces = []
    for piece in copies(config, names):
        mixer = config.layers[int(piece.target.split(".")[1])].mixer
        assert isinstance(mixer, Mamba2Spec), "no other layer has these parameters"
        n = mixer.n_heads if rows == "heads" else mixer.n_groups
        shape = (n, piece.target_shape[0] // n)
        pieces.append(replace(piece, source_shape=shape, view=piece.target_shape))
    return pieces


def _hf_network(config: ModelConfig) -> list[Piece]:
    """The network that is called shared, gate above up: beside the experts, or all there is."""
    pieces, d = [], config.d_model
    for i, layer in enumerate(config.layers):
        shared = layer.ffn.shared if isinstance(layer.ffn, MoESpec) else layer.ffn
        assert shared is not None, "every mixture of this family has one"
        ours = f"layers.{i}.{'moe.shared' if layer.moe is not None else 'ffn'}."
        up = HF_SHARED.format(i=i) + "input_linear.weight"
        pieces += [
            Piece(
                source=up,
                source_shape=(2 * shared.d_ff, d),
                source_box=((start, start + shared.d_ff), (0, d)),
                target=ours + part,
                target_shape=(shared.d_ff, d),
            )
            for part, start in (("w_gate", 0), ("w_up", shared.d_ff))
        ]
        pieces.append(
            Piece(
                source=HF_SHARED.format(i=i) + "output_linear.weight",
                source_shape=(d, shared.d_ff),
                target=ours + "w_down",
                target_shape=(d, shared.d_ff),
            )
        )
    return pieces


def hf_layout(config: ModelConfig) -> list[Piece]:
    """Every published checkpoint; transformers writes the same."""
    return [
        *copies(config, HF_COMMON | HF_MIXTURE | _HF_MAMBA),
        *hf_qkv(config),
        *in_projection(config, _LAYER + "in_proj.weight"),
        *taps_of_conv1d(config, _LAYER + "conv1d.weight", _OURS + "taps"),
        *gate_up(config, HF_MOE + "input_linear.weight"),
        *_hf_network(config),
    ]


def gguf_map(config: ModelConfig) -> list[Piece]:
    """Every tensor of arch ``granitehybrid``; q and k lie as in arch ``llama``, whether they turn or not."""
    heads = {_BLOCK + "ssm_a": _OURS + "rate", _BLOCK + "ssm_d": _OURS + "skip"}
    mixtures = gguf_keys.ROUTER | gguf_keys.MERGED_EXPERTS | gguf_keys.SHARED_EXPERT
    return [
        *copies(config, GGUF_COMMON | GGUF_FFN | mixtures | GGUF_MAMBA),
        *gguf_qkv(config),
        *in_projection(config, _BLOCK + "ssm_in.weight"),
        *as_matrices(config, heads, "heads"),
        *as_matrices(config, {_BLOCK + "ssm_norm.weight": _OURS + "norm.weight"}, "groups"),
    ]
