"""Factors of parameters (ours) and of the matrices that a checkpoint stores (peft's): each from the other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from quadriga.errors import ConfigError
from quadriga.io.adapter_extras import Floats
from quadriga.io.adapter_files import Adapter
from quadriga.io.parameters import to_pairs
from quadriga.model import families
from quadriga.model.adapter_spec import target_of
from quadriga.model.config import ModelConfig
from quadriga.model.weight_map import Piece, whole

PREFIX = "base_model.model."
"""What peft writes before the name of a module."""


def by_source(config: ModelConfig, layout: str | None, *, adaptable: bool = True) -> dict[str, list[Piece]]:
    """Stored tensor -> its pieces; with ``adaptable`` only those of parameters that may have factors."""
    family = families.family_of(config)
    name = layout or next(iter(family.layouts))
    if name not in family.layouts:
        raise ConfigError(f"layout must be one of {', '.join(family.layouts)}; got {name!r}")
    if family.hf_form(config) != config:
        raise ConfigError(
            f"adapters in peft's form are of a Hugging Face directory's numbers, and this {family.name} has a GGUF "
            "file's (other norms, other heads). Make a directory first: quadriga convert MODEL OUT --to hf"
        )
    by_source: dict[str, list[Piece]] = {}
    for piece in family.layouts[name](config):
        if not adaptable or target_of(piece.target) is not None:
            by_source.setdefault(piece.source, []).append(piece)
    return by_source


def stored_factors(adapter: Adapter, source: str, pieces: list[Piece]) -> tuple[Floats, Floats]:
    """A and B of one stored matrix (or stack) from those of the parameters it fills."""
    parts = []
    for piece in pieces:
        a, b = adapter.factors[piece.target]
        box = piece.target_box or whole(piece.target_shape)
        flat = len(piece.source_shape) == 2 and len(box) == 3
        unknown = piece.transpose and not flat and not is_stack_in_out(piece)
        if (flat and box[0][1] - box[0][0] > 1) or unknown:
            raise ConfigError(f"peft has no form for factors of {source}; choose another layout of the family")
        if flat:
            a, b = a[box[0][0]], b[box[0][0]]
            if piece.transpose:
                a, b = b.T, a.T
            parts.append((a, b))
        else:
            rows = b[..., slice(*box[-2]), :] if len(pieces) == 1 else b
            parts.append((a, to_pairs(rows, piece.rotary_heads, piece.rotary_last) if piece.rotary_heads else rows))
    a, b = parts[0] if len(parts) == 1 else _side_by_side(parts, in_turn=pieces[0].stride is not None)
    return (np.swapaxes(b, -1, -2), np.swapaxes(a, -1, -2)) if is_stack_in_out(pieces[0]) else (a, b)


def is_stack_in_out(piece: Piece) -> bool:
    """Experts in one tensor, each the transpose of the parameter's slice: the factors trade places (gpt-oss)."""
    return piece.transpose and len(piece.source_shape) == 3


def _side_by_side(parts: list[tuple[Floats, Floats]], *, in_turn: bool) -> tuple[Floats, Floats]:
    """The factors of gate and up in one stack, one above the other or row by row in turn: a block for each."""
    zeros = [np.zeros_like(b) for _, b in parts]
    rows = [np.concatenate([b if i == j else zeros[i][..., : parts[j][1].shape[-1]] for j in range(len(parts))], -1)
            for i, (_, b) in enumerate(parts)]  # fmt: skip
    if in_turn:
        stacked = np.stack(rows, -2)
        together = stacked.reshape(*stacked.shape[:-3], -1, stacked.shape[-1])
    else:
        together = np.concatenate(rows, -2)
    return np.concatenate([a for a, _ in parts], -2), together


def fused_to_peft(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """(E, r, in), (E, out, r) -> peft's lora_A (E r, in) and lora_B (out, r E), as it is since 0.19."""
    return a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)


def _fused_from_peft(
    first: Floats, second: Floats, shape: tuple[int, ...], along_inputs: bool
) -> tuple[Floats, Floats] | None:
    """lora_A and lora_B of a stack (E, out, in) as (E, r, in), (E, out, r); None if they are not of it.

    Args:
        along_inputs: which form they are in, where both fit.
    """
    e, rows, columns = shape
    if first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[1] or first.shape[0] % e:
        return None
    new, old = (columns, rows), (rows, columns)
    given = (first.shape[1], second.shape[0])
    if given not in (new, old):
        return None
    one = first.reshape(e, -1, first.shape[1])  # (E, r, axis of A)
    other = second.reshape(second.shape[0], -1, e).transpose(2, 0, 1)  # (E, axis of B, r)
    if given == new and (along_inputs or new != old):
        return one, other
    return other.swapaxes(1, 2), one.swapaxes(1, 2)


def peft_pair(
    tensors: Mapping[str, Floats], source: str, piece: Piece, along_inputs: bool
) -> tuple[tuple[str, str], Floats, Floats] | None:
    shape = piece.source_shape
    if len(shape) == 3:
        owner = source.rpartition(".")[0]
        for inner in ("", "base_layer.", "base_layer.base_layer."):
            keys = (f"{PREFIX}{owner}.{inner}lora_A.weight", f"{PREFIX}{owner}.{inner}lora_B.weight")
            if all(key in tensors for key in keys):
                found = _fused_from_peft(tensors[keys[0]], tensors[keys[1]], shape, along_inputs)
                if found is not None:
                    return keys, *found
        return None
    name = source.removesuffix(".weight")
    keys = (f"{PREFIX}{name}.lora_embedding_A", f"{PREFIX}{name}.lora_embedding_B")
    if all(key in tensors for key in keys):
        return keys, tensors[keys[1]].T, tensors[keys[0]].T
    keys = (f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight")
    if not all(key in tensors for key in keys):
        return None
    a, b = (tensors[key] for key in keys)
    fits = a.ndim == b.ndim == 2 and a.shape[1] == shape[1] and b.shape[0] == shape[0] and a.shape[0] == b.shape[1]
    return (keys, a, b) if fits else None


def assembled(shape: tuple[int, ...], parts: list[tuple[Piece, Floats, Floats]]) -> tuple[Floats, Floats]:
    """One parameter's factors from those of the stored matrices in it: ranks side by side."""
    piece, a, b = parts[0]
    if len(shape) == 3 and a.ndim == 2:  # a matrix an expert
        rank = max(one.shape[0] for _, one, _ in parts)
        out = np.zeros((shape[0], rank, shape[2]), np.float32), np.zeros((shape[0], shape[1], rank), np.float32)
        for piece, a, b in parts:
            expert = (piece.target_box or whole(shape))[0][0]
            if piece.transpose:
                a, b = b.T, a.T
            out[0][expert, : a.shape[0]], out[1][expert, :, : b.shape[1]] = a, b
        return out
    if len(parts) == 1 and piece.target_box is None:
        return a, b
    rank = sum(one.shape[-2] for _, one, _ in parts)
    all_a = np.zeros((*shape[:-2], rank, shape[-1]), np.float32)
    all_b = np.zeros((*shape[:-1], rank), np.float32)
    at = 0
    for piece, a, b in parts:
        first, last = (piece.target_box or whole(shape))[-2]
        all_a[..., at : at + a.shape[-2], :] = a
        all_b[..., first:last, at : at + a.shape[-2]] = b
        at += a.shape[-2]
    return all_a, all_b


def widened(values: Floats, axis: int, rank: int) -> Floats:
    """With zeros behind an axis up to a rank."""
    missing = [(0, 0)] * values.ndim
    missing[axis] = (0, rank - values.shape[axis])
    return np.pad(values, missing)
