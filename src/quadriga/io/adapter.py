"""Adapters as files: our own form, peft's in both directions, and folding one into a checkpoint.

    ADAPTER/quadriga_adapter.json    rank, alpha, targets, what it was made for, sha256 of the numbers
    ADAPTER/adapter.safetensors      layers.0.moe.w_up.a (E, r, D), layers.0.moe.w_up.b (E, F, r), ...

peft writes one pair of factors for every matrix that Hugging Face's checkpoint stores, so the family's weight map ties
the two forms together: a stored matrix is a box of a parameter, its factors are the same rows of B over a common A.

    export   q_proj: A, B[rows of q]     k_proj: A, B[rows of k]     ...                  exact
    import   wqkv:   A = [A_q; A_k; A_v],  B = blockdiag(B_q, B_k, B_v)                   exact, of rank 3 r

peft's form for fused expert stacks (``target_parameters``, experts (E, out, in)) reads and writes as well: all experts'
A below each other, the numbers of B with the expert as the fastest axis. Before 0.19 it took the first axis of a slice
for the input, so A and B changed places.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from quadriga.errors import CheckpointError, ConfigError
from quadriga.io import peft_config
from quadriga.io.adapter_extras import Extras, Floats
from quadriga.io.derive import Unchanged, derive
from quadriga.io.directory import write_text
from quadriga.io.json_files import read_json
from quadriga.io.open import Checkpoint
from quadriga.io.parameters import from_pairs, from_stored, to_pairs
from quadriga.io.peft_config import PeftConfig, names_module
from quadriga.io.safetensors import SafetensorsSource
from quadriga.model import families
from quadriga.model.adapter_spec import TARGETS, LoraSpec, adapted_shapes, target_of
from quadriga.model.config import ModelConfig
from quadriga.model.weight_map import Box, Piece, parameter_shapes, whole
from quadriga.quant.dtypes import Array, as_float32

Factors = dict[str, tuple[Floats, Floats]]
"""Parameter -> (A, B), float32: ([E,] r, in) and ([E,] out, r)."""

MANIFEST = "quadriga_adapter.json"
WEIGHTS = "adapter.safetensors"
_PEFT_CONFIG = peft_config.FILE
_PEFT_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HEAD = "lm_head"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A low-rank adapter with its numbers."""

    spec: LoraSpec
    factors: Factors
    base: str = ""
    """The model it was trained on, for people."""
    extras: Extras | None = None
    """What it has beyond factors; see :func:`low_rank`."""


def low_rank(adapter: Adapter) -> Factors:
    """The factors of an adapter that has nothing else.

    Raises:
        ConfigError: it has more, which would be left out.
    """
    if adapter.extras is not None:
        raise ConfigError(
            f"this adapter has more than low-rank factors ({', '.join(adapter.extras.reasons())}): it can only be "
            "folded into its model. Write the result with `quadriga adapter merge` and use that."
        )
    return adapter.factors


def save(adapter: Adapter, folder: Path) -> None:
    """Write our form; the manifest comes last, so a folder that has one is complete.

    Raises:
        CheckpointError: the folder exists with something in it, or cannot be written.
        ConfigError: an adapter with more than factors.
    """
    tensors = {f"{name}.{part}": t for name, ab in low_rank(adapter).items() for part, t in zip("ab", ab, strict=True)}
    digest = _write_tensors(tensors, folder, WEIGHTS)
    body = {"quadriga_adapter": _VERSION, "base": adapter.base, "lora": asdict(adapter.spec), "sha256": digest}
    write_text(folder / MANIFEST, json.dumps(body, indent=1) + "\n")


def load(folder: Path, config: ModelConfig) -> Adapter:
    """Read an adapter of either form and hold it to the model it is for.

    Raises:
        CheckpointError: nothing there, malformed, changed since it was written, or of another model.
        ConfigError: peft options that are no plain low-rank adapter.
    """
    if (folder / MANIFEST).is_file():
        return _load_own(folder, config)
    if (folder / _PEFT_CONFIG).is_file():
        return from_peft(folder, config)
    raise CheckpointError(f"{folder} is no adapter: it needs {MANIFEST}, or peft's {_PEFT_CONFIG}")


def _load_own(folder: Path, config: ModelConfig) -> Adapter:
    body = read_json(folder / MANIFEST)
    if body.get("quadriga_adapter") != _VERSION:
        raise CheckpointError(
            f"{MANIFEST} must have version {_VERSION}, got {body.get('quadriga_adapter')!r}: another release wrote it"
        )
    try:
        spec = msgspec.convert(body.get("lora"), LoraSpec)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{MANIFEST} is malformed: {error}") from None
    tensors = _read_tensors(folder / WEIGHTS)
    if _sha256(folder / WEIGHTS) != body.get("sha256"):
        raise CheckpointError(f"{folder / WEIGHTS} is not what {MANIFEST} describes: it changed since it was written")
    names = sorted({name.rpartition(".")[0] for name in tensors})
    try:
        factors = {name: (tensors[f"{name}.a"], tensors[f"{name}.b"]) for name in names}
    except KeyError as error:
        raise CheckpointError(f"{folder / WEIGHTS} lacks {error}") from None
    _check(factors, spec, config, folder)
    return Adapter(spec=spec, factors=_ordered(factors, config), base=str(body.get("base", "")))


def _ordered(factors: Factors, config: ModelConfig) -> Factors:
    return {name: factors[name] for name in parameter_shapes(config) if name in factors}


def _check(factors: Factors, spec: LoraSpec, config: ModelConfig, folder: Path) -> None:
    """Every factor fits its parameter, and all parameters of the targets have some."""
    shapes = parameter_shapes(config)
    wrong = []
    for name, (a, b) in factors.items():
        shape = shapes.get(name, ())
        fits = len(shape) > 1 and a.shape[:-2] == shape[:-2] == b.shape[:-2]
        if not fits or a.shape[-1] != shape[-1] or b.shape[-2] != shape[-2] or a.shape[-2] != b.shape[-1]:
            wrong.append(f"{name}: A {list(a.shape)}, B {list(b.shape)} for {list(shape)}")
    missing = sorted(set(adapted_shapes(config, spec)) - factors.keys())
    if wrong or missing:
        raise CheckpointError(
            f"{folder} does not fit this model: {len(wrong)} factors of other shapes {wrong[:3]}, {len(missing)} "
            f"missing {missing[:3]}. Give the model it was trained on."
        )


# Folding in ----------------------------------------------------------------------------------------------------------


def merge(base: Checkpoint, adapter: Adapter) -> Checkpoint:
    """``base`` with W + s B A for every adapted W, as a derived checkpoint; ``convert.write`` stores it."""
    return derive(base, _Merge(base, adapter))


class _Merge(Unchanged):
    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        digest = hashlib.sha256(repr(adapter.spec).encode())
        for name, factors in adapter.factors.items():
            digest.update(name.encode())
            for t in factors:
                digest.update(t.tobytes())
        self.extras = adapter.extras or Extras()
        for where, t in self.extras.parts():
            digest.update(where.encode())
            digest.update(t.tobytes())
        super().__init__(base, base.config, f"with adapter {digest.hexdigest()[:16]}")
        self.adapter = adapter

    def rows(self, name: str, expert: int | None, first: int, last: int) -> Array:
        frozen = self.extras.in_place(name, expert, first, super().rows(name, expert, first, last))
        if name not in self.adapter.factors:
            return frozen
        a, b = self.adapter.factors[name]
        if expert is not None:
            a, b = a[expert], b[expert]
        rows = as_float32(frozen) + np.float32(self.adapter.spec.scale) * (b[first:last] @ a)
        return self.extras.stretched(name, expert, first, rows).astype(frozen.dtype)


# peft's form ---------------------------------------------------------------------------------------------------------


def to_peft(adapter: Adapter, config: ModelConfig, folder: Path, *, layout: str | None = None) -> None:
    """Write peft's form for the model in one of its Hugging Face layouts.

    Args:
        layout: one of the family's; None: the one exports use. ``hf5`` of Mixtral writes fused expert stacks.

    Raises:
        ConfigError: no such layout, or one whose experts peft has no form for; an adapter with more than factors.
        CheckpointError: the folder exists with something in it, or cannot be written.
    """
    by_source = _by_source(config, layout)
    tensors: dict[str, Floats] = {}
    modules: set[str] = set()
    parameters: list[str] = []
    nesting: dict[str, list[str]] = {}
    pairs: dict[str, tuple[Floats, Floats]] = {}
    for source, pieces in by_source.items():
        if not any(piece.target in low_rank(adapter) for piece in pieces):
            continue
        pairs[source] = _stored_factors(adapter, source, pieces)
        if pairs[source][0].ndim == 3:
            nesting.setdefault(source.rpartition(".")[0], []).append(source)
    rank = max(a.shape[-2] for a, _ in pairs.values())
    for source, (a, b) in pairs.items():
        a, b = _widened(a, -2, rank), _widened(b, -1, rank)
        if a.ndim == 3:
            owner = source.rpartition(".")[0]
            nesting[owner].sort(key=lambda name: name.endswith("down_proj"))  # the first parameter is the innermost
            inner = "base_layer." * (len(nesting[owner]) - 1 - nesting[owner].index(source))
            key, (a, b) = f"{_PREFIX}{owner}.{inner}lora_", _fused_to_peft(a, b)
            parameters.append(".".join(source.split(".")[-3:]))
        elif by_source[source][0].target == "embed.weight":
            name = source.removesuffix(".weight")
            modules.add(name.rpartition(".")[2])
            tensors[f"{_PREFIX}{name}.lora_embedding_A"] = b.T
            tensors[f"{_PREFIX}{name}.lora_embedding_B"] = a.T
            if not config.tied_embeddings:
                continue
            # peft adapts the two uses of a tied table apart: the same factors go to both.
            name = _HEAD
            modules.add(name)
            key = f"{_PREFIX}{name}.lora_"
        else:
            name = source.removesuffix(".weight")
            modules.add(name.rpartition(".")[2])
            key = f"{_PREFIX}{name}.lora_"
        tensors[f"{key}A.weight"], tensors[f"{key}B.weight"] = a, b
    _write_tensors(tensors, folder, _PEFT_WEIGHTS)
    body = {
        "peft_type": "LORA",
        "peft_version": "0.19.0",  # whose form of fused stacks this is
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": rank,
        "lora_alpha": adapter.spec.scale * rank,
        "lora_dropout": 0.0 if parameters else adapter.spec.dropout,
        "target_modules": sorted(modules),
        "target_parameters": sorted(set(parameters), key=parameters.index) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    write_text(folder / _PEFT_CONFIG, json.dumps(body, indent=1) + "\n")


def from_peft(folder: Path, config: ModelConfig) -> Adapter:
    """Read peft's form.

    Raises:
        CheckpointError: malformed files, factors that fit no matrix of this model, or others than the configuration
            says.
        ConfigError: an option that is not computed.
    """
    how = peft_config.read(read_json(folder / _PEFT_CONFIG))
    if not (folder / _PEFT_WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise CheckpointError(
            f"{folder} lacks {_PEFT_WEIGHTS}"
            + (": its adapter_model.bin is a pickle. Load it with peft and save it again" if pickled else "")
        )
    tensors = _read_tensors(folder / _PEFT_WEIGHTS)
    if config.tied_embeddings:
        tensors = _untie(tensors, folder)
    found = [_match_peft(tensors, config, layout, how) for layout in families.family_of(config).layouts]
    best = min(found, key=lambda match: (not match.parts, len(match.left)))  # the first of equals
    if best.left or not best.parts:
        left = sorted(best.left if best.parts else tensors)
        raise CheckpointError(f"{folder}: {len(left)} tensors fit no matrix of this model, e.g. {left[:3]}")
    _check_modules(best, how, config, folder)
    shapes = parameter_shapes(config)
    factors = _ordered({name: _assembled(shapes[name], parts) for name, parts in best.parts.items()}, config)
    targets = tuple(t for t in TARGETS if t in {target_of(name) for name in factors})
    # Scale 1: it is in B already.
    spec = LoraSpec(rank=how.rank, alpha=float(how.rank), targets=targets, dropout=how.dropout)
    # A target may have been adapted in part (q and v only): what is left out gets factors of zero.
    for name, (a_shape, b_shape) in adapted_shapes(config, spec).items():
        if name not in factors:
            factors[name] = (np.zeros(a_shape, np.float32), np.zeros(b_shape, np.float32))
    _check(factors, spec, config, folder)
    extras = _extras(best, how, config, folder)
    return Adapter(spec=spec, factors=_ordered(factors, config), base=how.base, extras=extras)


@dataclass
class _Match:
    """What a file holds for the matrices of one layout, and what found no place."""

    layout: str
    left: set[str]
    parts: dict[str, list[tuple[Piece, Floats, Floats]]] = field(default_factory=dict)
    """Parameter -> the factors of the stored matrices in it, scaled already."""
    adapted: set[str] = field(default_factory=set)
    """Stored tensors with factors."""
    lengths: dict[str, tuple[Piece, Floats]] = field(default_factory=dict)
    tokens: dict[str, tuple[Piece, Floats]] = field(default_factory=dict)
    whole: dict[str, tuple[list[Piece], Floats]] = field(default_factory=dict)

    def takes(self, key: str) -> bool:
        """Whether a stored tensor is there and has had no place yet; it has one now."""
        there = key in self.left
        self.left.discard(key)
        return there


def _match_peft(tensors: Mapping[str, Floats], config: ModelConfig, layout: str, how: PeftConfig) -> _Match:
    match = _Match(layout, set(tensors))
    for source, pieces in _by_source(config, layout, adaptable=False).items():
        module = source.removesuffix(".weight")
        if target_of(pieces[0].target) is not None:
            _take_factors(match, tensors, source, pieces, how)
            for key in (f"{_PREFIX}{module}.lora_magnitude_vector{end}" for end in ("", ".weight")):
                if match.takes(key):
                    match.lengths[source] = pieces[0], tensors[key]
            key = f"{_PREFIX}{module}.token_adapter.trainable_tokens_delta"
            if match.takes(key):
                match.tokens[source] = pieces[0], tensors[key]
        # An adapted table is saved with its base's numbers.
        for key in (f"{_PREFIX}{source}", f"{_PREFIX}{module}.base_layer.weight"):
            if match.takes(key):
                match.whole[source] = pieces, tensors[key]
    return match


def _take_factors(
    match: _Match, tensors: Mapping[str, Floats], source: str, pieces: list[Piece], how: PeftConfig
) -> None:
    pair = _peft_pair(tensors, source, pieces[0], how.along_inputs)
    if pair is None:
        return
    keys, a, b = pair
    module = source.removesuffix(".weight")
    if a.shape[-2] != how.rank_of(module):
        raise CheckpointError(
            f"{_PEFT_WEIGHTS}: the factors of {module} must have the rank that {_PEFT_CONFIG} gives, "
            f"{how.rank_of(module)}, and have {a.shape[-2]}. Were the two files saved together?"
        )
    match.left -= set(keys)
    match.adapted.add(source)
    b = b * how.scale_of(module)
    if _is_stack_in_out(pieces[0]):
        a, b = np.swapaxes(b, -1, -2), np.swapaxes(a, -1, -2)
    start = 0
    for piece in pieces:
        box = piece.target_box or whole(piece.target_shape)
        height = box[-2][1] - box[-2][0]
        rows = b if len(pieces) == 1 else b[..., start : start + height, :]
        if piece.stride is not None:
            rows = b[..., piece.stride.start :: piece.stride.step, :]
        if piece.rotary_heads:  # ERNIE
            rows = from_pairs(rows, piece.rotary_heads)
        start += height
        match.parts.setdefault(piece.target, []).append((piece, a, rows))


def _is_stack_in_out(piece: Piece) -> bool:
    """Experts in one tensor, each the transpose of the parameter's slice: the factors trade places (gpt-oss)."""
    return piece.transpose and len(piece.source_shape) == 3


def _check_modules(match: _Match, how: PeftConfig, config: ModelConfig, folder: Path) -> None:
    """The modules with factors are those that the configuration says, and so are whole matrices and lengths."""
    missing, alien = [], []
    for source, pieces in _by_source(config, match.layout).items():
        module = source.removesuffix(".weight")
        wanted = how.adapts(module) if len(pieces[0].source_shape) == 2 else how.adapts_parameter(source)
        if wanted is True and source not in match.adapted and not names_module(how.saved, module):
            missing.append(module)
        if wanted is False and source in match.adapted:
            alien.append(module)
    if missing or alien:
        raise CheckpointError(
            f"{folder}: the factors are not those that {_PEFT_CONFIG} names (target_modules, target_parameters, "
            f"exclude_modules, layers_to_transform). Without factors: {missing[:3]} ({len(missing)} in all); with "
            f"factors but not named: {alien[:3]} ({len(alien)}). Were the two files saved together?"
        )
    modules = [source.removesuffix(".weight") for source in match.whole]
    for name in how.saved:
        if not any(names_module((name,), module) for module in modules):
            raise CheckpointError(f"{folder}: modules_to_save names {name!r}, whose weight is not in {_PEFT_WEIGHTS}")
    for module, (pieces, _) in zip(modules, match.whole.values(), strict=True):
        if target_of(pieces[0].target) not in ("embeddings", "head") and not names_module(how.saved, module):
            raise CheckpointError(
                f"{folder}: it holds the whole weight of {module}, which modules_to_save does not name"
            )
    if match.lengths.keys() != (match.adapted if how.dora else set()):
        raise CheckpointError(
            f"{folder}: use_dora is {how.dora}, and {len(match.lengths)} of {len(match.adapted)} adapted matrices have "
            "a magnitude vector"
        )


def _extras(match: _Match, how: PeftConfig, config: ModelConfig, folder: Path) -> Extras | None:
    """What the file holds beyond factors; None if there is nothing."""
    replaced: dict[str, list[tuple[Box, Floats]]] = {}
    for source, (pieces, values) in match.whole.items():
        if values.shape != pieces[0].source_shape:
            raise CheckpointError(
                f"{folder}: {source} is saved whole with shape {list(values.shape)}, this model's has "
                f"{list(pieces[0].source_shape)}. If tokens were added, merge with peft and give the result."
            )
        for piece in pieces:
            box = piece.source_box or whole(piece.source_shape)
            part = from_stored(values[tuple(slice(*axis) for axis in box)], piece)
            replaced.setdefault(piece.target, []).append((piece.target_box or whole(piece.target_shape), part))
    for name, ids, values in _token_rows(match, how, folder):
        columns = (0, values.shape[1])
        boxes = [(((i, i + 1), columns), row[None]) for i, row in zip(ids, values, strict=True)]
        replaced.setdefault(name, []).extend(boxes)
    if config.tied_embeddings and how.saved and {"embed.weight", "lm_head.weight"} & replaced.keys():
        raise ConfigError(
            f"{folder} saves the table or the head of a model with tied embeddings as a matrix of its own. Here they "
            "are one: merge with peft and give the result, with tie_word_embeddings false."
        )
    lengths = _row_lengths(match, config)
    return Extras(lengths=lengths, replaced=replaced) if lengths or replaced else None


def _token_rows(match: _Match, how: PeftConfig, folder: Path) -> list[tuple[str, tuple[int, ...], Floats]]:
    """(table, ids, their rows) of single trained tokens."""
    found = []
    for source, (piece, values) in match.tokens.items():
        ids = next(
            (ids for name, ids in how.tokens.items() if names_module((name,), source.removesuffix(".weight"))), ()
        )
        n, columns = piece.source_shape
        if values.shape != (len(ids), columns) or max(ids, default=0) >= n:
            raise CheckpointError(
                f"{folder}: trainable_token_indices gives {len(ids)} ids below {n} for {source}, the file has rows of "
                f"shape {list(values.shape)}"
            )
        found.append((piece.target, ids, values))
    if how.tokens and not found:
        raise CheckpointError(f"{folder}: trainable_token_indices is given, and {_PEFT_WEIGHTS} has no rows of tokens")
    return found


def _row_lengths(match: _Match, config: ModelConfig) -> dict[str, Floats]:
    shapes = parameter_shapes(config)
    lengths: dict[str, Floats] = {}
    for source, (piece, values) in match.lengths.items():
        box = piece.target_box or whole(piece.target_shape)
        # peft's lengths run along rows of what is stored; for tables and fused stacks they mean something else.
        plain = len(piece.source_shape) == 2 and not piece.transpose and not piece.rotary_heads
        if not plain or piece.target == "embed.weight" or (len(box) == 3 and box[0][1] - box[0][0] != 1):
            raise ConfigError(f"use_dora is read for plain linear layers only, not for {source}")
        if values.shape != piece.source_shape[:1]:
            raise CheckpointError(f"the magnitude vector of {source} must have {piece.source_shape[0]} numbers")
        rows = lengths.setdefault(piece.target, np.full(shapes[piece.target][:-1], np.nan, np.float32))
        rows[tuple(slice(*axis) for axis in box[:-1])] = values
    return lengths


def _untie(tensors: dict[str, Floats], folder: Path) -> dict[str, Floats]:
    """Without the head's factors, once they are seen to be the table's: here a tied table is one matrix."""
    table = next((key.removesuffix("A") for key in tensors if key.endswith("lora_embedding_A")), None)
    heads = [f"{_PREFIX}{_HEAD}.lora_{part}.weight" for part in "AB"]
    if table is None and not any(key in tensors for key in heads):
        return tensors
    same = table is not None and all(key in tensors for key in heads)
    if same and table is not None:
        a, b = (tensors[key] for key in heads)
        same = np.array_equal(b.T, tensors[table + "A"]) and np.array_equal(a.T, tensors[table + "B"])
    if not same or table is None:
        raise ConfigError(
            f"{folder} adapts the table and the head of a model with tied embeddings as two matrices. Here they "
            "are one: both must have the same factors, as Quadriga and peft's ensure_weight_tying write them."
        )
    frozen = f"{_PREFIX}{_HEAD}.base_layer.weight"
    stored = tensors.get(table.replace("lora_embedding_", "base_layer.weight"))
    if frozen in tensors and stored is not None and np.array_equal(tensors[frozen], stored):
        heads.append(frozen)
    return {key: t for key, t in tensors.items() if key not in heads}


def _by_source(config: ModelConfig, layout: str | None, *, adaptable: bool = True) -> dict[str, list[Piece]]:
    """Stored tensor -> its pieces; with ``adaptable`` only those of parameters that may have factors."""
    family = families.family_of(config)
    name = layout or next(iter(family.layouts))
    if name not in family.layouts:
        raise ConfigError(f"layout must be one of {', '.join(family.layouts)}; got {name!r}")
    by_source: dict[str, list[Piece]] = {}
    for piece in family.layouts[name](config):
        if not adaptable or target_of(piece.target) is not None:
            by_source.setdefault(piece.source, []).append(piece)
    return by_source


def _stored_factors(adapter: Adapter, source: str, pieces: list[Piece]) -> tuple[Floats, Floats]:
    """A and B of one stored matrix (or stack) from those of the parameters it fills."""
    parts = []
    for piece in pieces:
        a, b = adapter.factors[piece.target]
        box = piece.target_box or whole(piece.target_shape)
        flat = len(piece.source_shape) == 2 and len(box) == 3
        unknown = piece.transpose and not flat and not _is_stack_in_out(piece)
        if (flat and box[0][1] - box[0][0] > 1) or unknown:
            raise ConfigError(f"peft has no form for factors of {source}; choose another layout of the family")
        if flat:
            a, b = a[box[0][0]], b[box[0][0]]
            if piece.transpose:
                a, b = b.T, a.T
            parts.append((a, b))
        else:
            rows = b[..., slice(*box[-2]), :] if len(pieces) == 1 else b
            parts.append((a, to_pairs(rows, piece.rotary_heads) if piece.rotary_heads else rows))
    a, b = parts[0] if len(parts) == 1 else _side_by_side(parts, in_turn=pieces[0].stride is not None)
    return (np.swapaxes(b, -1, -2), np.swapaxes(a, -1, -2)) if _is_stack_in_out(pieces[0]) else (a, b)


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


def _fused_to_peft(a: Floats, b: Floats) -> tuple[Floats, Floats]:
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


def _peft_pair(
    tensors: Mapping[str, Floats], source: str, piece: Piece, along_inputs: bool
) -> tuple[tuple[str, str], Floats, Floats] | None:
    shape = piece.source_shape
    if len(shape) == 3:
        owner = source.rpartition(".")[0]
        for inner in ("", "base_layer.", "base_layer.base_layer."):
            keys = (f"{_PREFIX}{owner}.{inner}lora_A.weight", f"{_PREFIX}{owner}.{inner}lora_B.weight")
            if all(key in tensors for key in keys):
                found = _fused_from_peft(tensors[keys[0]], tensors[keys[1]], shape, along_inputs)
                if found is not None:
                    return keys, *found
        return None
    name = source.removesuffix(".weight")
    keys = (f"{_PREFIX}{name}.lora_embedding_A", f"{_PREFIX}{name}.lora_embedding_B")
    if all(key in tensors for key in keys):
        return keys, tensors[keys[1]].T, tensors[keys[0]].T
    keys = (f"{_PREFIX}{name}.lora_A.weight", f"{_PREFIX}{name}.lora_B.weight")
    if not all(key in tensors for key in keys):
        return None
    a, b = (tensors[key] for key in keys)
    fits = a.ndim == b.ndim == 2 and a.shape[1] == shape[1] and b.shape[0] == shape[0] and a.shape[0] == b.shape[1]
    return (keys, a, b) if fits else None


def _assembled(shape: tuple[int, ...], parts: list[tuple[Piece, Floats, Floats]]) -> tuple[Floats, Floats]:
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


def _widened(values: Floats, axis: int, rank: int) -> Floats:
    """With zeros behind an axis up to a rank."""
    missing = [(0, 0)] * values.ndim
    missing[axis] = (0, rank - values.shape[axis])
    return np.pad(values, missing)


# Files ---------------------------------------------------------------------------------------------------------------


def _write_tensors(tensors: Mapping[str, Floats], folder: Path, file: str) -> str:
    from safetensors.numpy import save_file

    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} exists and is not empty; give a new name, or remove it first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / (file + ".part")
        save_file({name: np.ascontiguousarray(t, dtype=np.float32) for name, t in tensors.items()}, part)
        part.replace(folder / file)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder / file}: {error.strerror}") from None
    return _sha256(folder / file)


def _read_tensors(path: Path) -> dict[str, Floats]:
    source = SafetensorsSource(path)
    try:
        return {name: as_float32(source.read(name)) for name in source.tensors}
    finally:
        source.close()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
