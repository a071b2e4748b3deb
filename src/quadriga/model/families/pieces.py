"""Building blocks of weight maps: the few ways in which checkpoints store what we keep as one parameter.

    copies        one tensor is one parameter, names given as a table
    qkv           three projections are the rows of wqkv:       [q; k; v]
    experts       one matrix per expert is a slice of a stack:  w[e]
    flat_experts  all experts below each other in one matrix:   (E*F, D)
    in_turn       rows of gate and up by turns in one tensor:   [g0; u0; g1; u1; ...]

Nothing here knows a family; nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Literal

from quadriga.model.config import AttentionSpec, ModelConfig, MoESpec
from quadriga.model.weight_map import Piece, Stride, parameter_shapes, whole

ExpertPart = Literal["w_gate", "w_up", "w_down"]

WITHIN = "model.language_model."
"""What a text's tensors begin with, in place of "model.", within a model that sees pictures too."""


def under(prefix: str, pieces: Sequence[Piece]) -> list[Piece]:
    """The same pieces where names that begin with "model." begin with ``prefix`` instead."""
    own = "model."
    return [
        replace(piece, source=prefix + piece.source.removeprefix(own)) if piece.source.startswith(own) else piece
        for piece in pieces
    ]


def copies(config: ModelConfig, names: Mapping[str, str], *, transpose: bool = False) -> list[Piece]:
    """Pieces for tensors that are stored as we keep them, or transposed.

    Args:
        names: source name -> parameter name; ``{i}`` in both stands for every layer. ``lm_head.weight`` is left out
            where the model has none because its embeddings are tied.
        transpose: the stored matrix is the parameter's transpose.
    """
    shapes = parameter_shapes(config)
    pieces = []
    for source, target in names.items():
        if target == "lm_head.weight" and config.tied_embeddings:
            continue
        for i in range(config.n_layers if "{i}" in target else 1):
            shape = shapes.get(target.format(i=i))
            if shape is None:  # a layer of another kind; a parameter that nobody fills is check_cover's to find
                continue
            pieces.append(
                Piece(
                    source=source.format(i=i),
                    source_shape=shape[:-2] + shape[-2:][::-1] if transpose else shape,
                    target=target.format(i=i),
                    target_shape=shape,
                    transpose=transpose,
                )
            )
    return pieces


def qkv(
    config: ModelConfig, q: str, k: str, v: str, *, interleaved: bool = False, transpose: bool = False
) -> list[Piece]:
    """Pieces for separate query, key and value projections, which fill wqkv's rows in this order; biases with them.

    Args:
        q, k, v: source names with ``{i}`` for the layer; a bias is named like its weight.
        interleaved: q's and k's rows hold rotary pairs side by side (Meta, Mistral, GGUF llama), not in halves.
        transpose: the stored matrices are (D, rows).
    """
    d, pieces = config.d_model, []
    for i, layer in enumerate(config.layers):
        attn, target = layer.mixer, f"layers.{i}.attn.wqkv."
        if not isinstance(attn, AttentionSpec):
            continue
        parts = (
            (q, 0, attn.q_dim, attn.n_heads if interleaved else 0),
            (k, attn.q_dim, attn.kv_dim, attn.n_kv_heads if interleaved else 0),
            (v, attn.q_dim + attn.kv_dim, attn.kv_dim, 0),
        )[: 2 if attn.keys_as_values else 3]
        for source, start, rows, heads in parts:
            pieces.append(
                Piece(
                    source=source.format(i=i),
                    source_shape=(d, rows) if transpose else (rows, d),
                    target=target + "weight",
                    target_shape=(attn.qkv_dim, d),
                    target_box=((start, start + rows), (0, d)),
                    transpose=transpose,
                    rotary_heads=heads,
                )
            )
            if attn.qkv_bias:
                pieces.append(
                    Piece(
                        source=source.format(i=i).removesuffix("weight") + "bias",
                        source_shape=(rows,),
                        target=target + "bias",
                        target_shape=(attn.qkv_dim,),
                        target_box=((start, start + rows),),
                        rotary_heads=heads,
                    )
                )
    return pieces


def experts(config: ModelConfig, part: ExpertPart, name: str, *, transpose: bool = False) -> list[Piece]:
    """Pieces for experts stored one matrix each.

    Args:
        part: the parameter they fill: w_gate or w_up (E, F, D), w_down (E, D, F).
        name: source name with ``{i}`` for the layer and ``{e}`` for the expert.
        transpose: a stored matrix is the transpose of the parameter's slice.
    """
    pieces = []
    for i, spec in config.moe_layers:
        n_experts, rows, columns = _stack_shape(spec, config.d_model, part)
        stored = (columns, rows) if transpose else (rows, columns)
        pieces += [
            Piece(
                source=name.format(i=i, e=e),
                source_shape=stored,
                target=f"layers.{i}.moe.{part}",
                target_shape=(n_experts, rows, columns),
                target_box=((e, e + 1), (0, rows), (0, columns)),
                view=(1, *stored),
                transpose=transpose,
            )
            for e in range(n_experts)
        ]
    return pieces


def single_rows(config: ModelConfig, names: Mapping[str, str]) -> list[Piece]:
    """Pieces for vectors of every layer that are stored as a matrix of one row: (1, D) for (D,).

    Args:
        names: source name -> parameter name, both with ``{i}`` for the layer.
    """
    return [
        replace(piece, source_shape=(1, *piece.target_shape), view=piece.target_shape)
        for piece in copies(config, names)
    ]


def gate_up(config: ModelConfig, name: str) -> list[Piece]:
    """Pieces for w_gate and w_up in one tensor of all experts, each one's gate above its up: (E, 2 F, D).

    Args:
        name: source name with ``{i}`` for the layer.
    """
    pieces = []
    for i, spec in config.moe_layers:
        shape = (spec.n_experts, spec.d_ff, config.d_model)
        for part, start in (("w_gate", 0), ("w_up", spec.d_ff)):
            pieces.append(
                Piece(
                    source=name.format(i=i),
                    source_shape=(spec.n_experts, 2 * spec.d_ff, config.d_model),
                    source_box=(whole(shape)[0], (start, start + spec.d_ff), whole(shape)[2]),
                    target=f"layers.{i}.moe.{part}",
                    target_shape=shape,
                )
            )
    return pieces


def in_turn(config: ModelConfig, parts: Sequence[str], name: str, *, transpose: bool = False) -> list[Piece]:
    """Pieces for parameters of the experts whose rows one tensor holds by turns: the first row of each, the second, ...

    Args:
        parts: parameters of one shape, (E, F, D) or (E, F), such as w_gate and w_up.
        name: source name with ``{i}`` for the layer.
        transpose: the stored matrices are (D, rows), so that columns take turns.
    """
    shapes, pieces = parameter_shapes(config), []
    for i, _ in config.moe_layers:
        for start, part in enumerate(parts):
            target = f"layers.{i}.moe.{part}"
            n_experts, rows, *columns = shape = shapes[target]
            rows *= len(parts)
            pieces.append(
                Piece(
                    source=name.format(i=i),
                    source_shape=(n_experts, *columns, rows) if transpose else (n_experts, rows, *columns),
                    target=target,
                    target_shape=shape,
                    stride=Stride(axis=2 if transpose else 1, step=len(parts), start=start),
                    transpose=transpose,
                )
            )
    return pieces


def shared_gate_up(config: ModelConfig, name: str) -> list[Piece]:
    """Pieces for gate above up of the shared network in one tensor (2 S, D).

    Args:
        name: source name with ``{i}`` for the layer.
    """
    pieces = []
    for i, spec in config.moe_layers:
        if spec.shared is None:
            continue
        width, d = spec.shared.d_ff, config.d_model
        pieces += [
            Piece(
                source=name.format(i=i),
                source_shape=(2 * width, d),
                source_box=((start, start + width), (0, d)),
                target=f"layers.{i}.moe.shared.{part}",
                target_shape=(width, d),
            )
            for part, start in (("w_gate", 0), ("w_up", width))
        ]
    return pieces


def flat_experts(config: ModelConfig, part: ExpertPart, name: str, *, transpose: bool = False) -> list[Piece]:
    """Pieces for experts stored one below the other in a matrix: (E*F, D) for w_gate and w_up.

    With ``transpose`` each expert's block is stored transposed: (E*F, D) for w_down as well (MegaBlocks, DBRX).
    """
    pieces = []
    for i, spec in config.moe_layers:
        n_experts, rows, columns = shape = _stack_shape(spec, config.d_model, part)
        view = (n_experts, columns, rows) if transpose else shape
        pieces.append(
            Piece(
                source=name.format(i=i),
                source_shape=(prod(view[:2]), view[2]),
                target=f"layers.{i}.moe.{part}",
                target_shape=shape,
                view=view,
                transpose=transpose,
            )
        )
    return pieces


def _stack_shape(spec: MoESpec, d_model: int, part: ExpertPart) -> tuple[int, int, int]:
    rows, columns = (d_model, spec.d_ff) if part == "w_down" else (spec.d_ff, d_model)
    return (spec.n_experts, rows, columns)
