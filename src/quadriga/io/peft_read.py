"""An adapter of peft as one of ours: every tensor of its file has a place in the model, or is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from quadriga.errors import CheckpointError, ConfigError
from quadriga.io import peft_config
from quadriga.io.adapter_extras import Extras, Floats
from quadriga.io.adapter_files import Adapter, check, in_order, read_tensors
from quadriga.io.json_files import read_json
from quadriga.io.parameters import from_pairs, from_stored
from quadriga.io.peft_config import PeftConfig, names_module
from quadriga.io.peft_factors import PREFIX, assembled, by_source, is_stack_in_out, peft_pair
from quadriga.model import families
from quadriga.model.adapter_spec import TARGETS, LoraSpec, adapted_shapes, target_of
from quadriga.model.config import ModelConfig
from quadriga.model.weight_map import Box, Piece, parameter_shapes, whole


def from_peft(folder: Path, config: ModelConfig) -> Adapter:
    """Read peft's form.

    Raises:
        CheckpointError: malformed files, factors that fit no matrix of this model, or others than the configuration
            says.
        ConfigError: an option that is not computed.
    """
    how = peft_config.read(read_json(folder / peft_config.FILE))
    if not (folder / peft_config.WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise CheckpointError(
            f"{folder} lacks {peft_config.WEIGHTS}"
            + (": its adapter_model.bin is a pickle. Load it with peft and save it again" if pickled else "")
        )
    tensors = read_tensors(folder / peft_config.WEIGHTS)
    if config.tied_embeddings:
        tensors = _untie(tensors, folder)
    found = [_match_peft(tensors, config, layout, how) for layout in families.family_of(config).layouts]
    best = min(found, key=lambda match: (not match.parts, len(match.left)))  # the first of equals
    if best.left or not best.parts:
        left = sorted(best.left if best.parts else tensors)
        raise CheckpointError(
            f"{folder}: {len(left)} tensors fit no matrix of this model, e.g. {left[:3]}"
            + _not_adaptable(left, config, best.layout)
        )
    _check_modules(best, how, config, folder)
    shapes = parameter_shapes(config)
    factors = in_order({name: assembled(shapes[name], parts) for name, parts in best.parts.items()}, config)
    targets = tuple(t for t in TARGETS if t in {target_of(name) for name in factors})
    # Scale 1: it is in B already.
    spec = LoraSpec(rank=how.rank, alpha=float(how.rank), targets=targets, dropout=how.dropout)
    # A target may have been adapted in part (q and v only): what is left out gets factors of zero.
    for name, (a_shape, b_shape) in adapted_shapes(config, spec).items():
        if name not in factors:
            factors[name] = (np.zeros(a_shape, np.float32), np.zeros(b_shape, np.float32))
    check(factors, spec, config, folder)
    extras = _extras(best, how, config, folder)
    return Adapter(spec=spec, factors=in_order(factors, config), base=how.base, extras=extras)


def _not_adaptable(left: list[str], config: ModelConfig, layout: str) -> str:
    """What to say of factors of a tensor that the model has, and that no adapter of ours changes; or nothing."""
    found = {}
    for source, pieces in by_source(config, layout, adaptable=False).items():
        module = source.removesuffix(".weight")
        if target_of(pieces[0].target) is None and any(key.startswith(f"{PREFIX}{module}.lora_") for key in left):
            found[module] = pieces[0].target
    if not found:
        return ""
    module, target = next(iter(found.items()))
    return (
        f". {len(found)} of the adapted modules have no factors here (e.g. {module}, our {target}): "
        f"train the adapter with {module.rpartition('.')[2]!r} in exclude_modules, or merge it with peft"
    )


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
    for source, pieces in by_source(config, layout, adaptable=False).items():
        module = source.removesuffix(".weight")
        if target_of(pieces[0].target) is not None:
            _take_factors(match, tensors, source, pieces, how)
            for key in (f"{PREFIX}{module}.lora_magnitude_vector{end}" for end in ("", ".weight")):
                if match.takes(key):
                    match.lengths[source] = pieces[0], tensors[key]
            key = f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"
            if match.takes(key):
                match.tokens[source] = pieces[0], tensors[key]
        # An adapted table is saved with its base's numbers.
        for key in (f"{PREFIX}{source}", f"{PREFIX}{module}.base_layer.weight"):
            if match.takes(key):
                match.whole[source] = pieces, tensors[key]
    return match


def _take_factors(
    match: _Match, tensors: Mapping[str, Floats], source: str, pieces: list[Piece], how: PeftConfig
) -> None:
    pair = peft_pair(tensors, source, pieces[0], how.along_inputs)
    if pair is None:
        return
    keys, a, b = pair
    module = source.removesuffix(".weight")
    if a.shape[-2] != how.rank_of(module):
        raise CheckpointError(
            f"{peft_config.WEIGHTS}: the factors of {module} must have the rank that {peft_config.FILE} gives, "
            f"{how.rank_of(module)}, and have {a.shape[-2]}. Were the two files saved together?"
        )
    match.left -= set(keys)
    match.adapted.add(source)
    b = b * how.scale_of(module)
    if is_stack_in_out(pieces[0]):
        a, b = np.swapaxes(b, -1, -2), np.swapaxes(a, -1, -2)
    start = 0
    for piece in pieces:
        box = piece.target_box or whole(piece.target_shape)
        height = box[-2][1] - box[-2][0]
        rows = b if len(pieces) == 1 else b[..., start : start + height, :]
        if piece.stride is not None:
            rows = b[..., piece.stride.start :: piece.stride.step, :]
        if piece.rotary_heads:  # ERNIE
            rows = from_pairs(rows, piece.rotary_heads, piece.rotary_last)
        start += height
        match.parts.setdefault(piece.target, []).append((piece, a, rows))


def _check_modules(match: _Match, how: PeftConfig, config: ModelConfig, folder: Path) -> None:
    """The modules with factors are those that the configuration says, and so are whole matrices and lengths."""
    missing, alien = [], []
    for source, pieces in by_source(config, match.layout).items():
        module = source.removesuffix(".weight")
        wanted = how.adapts(module) if len(pieces[0].source_shape) == 2 else how.adapts_parameter(source)
        if wanted is True and source not in match.adapted and not names_module(how.saved, module):
            missing.append(module)
        if wanted is False and source in match.adapted:
            alien.append(module)
    if missing or alien:
        raise CheckpointError(
            f"{folder}: the factors are not those that {peft_config.FILE} names (target_modules, target_parameters, "
            f"exclude_modules, layers_to_transform). Without factors: {missing[:3]} ({len(missing)} in all); with "
            f"factors but not named: {alien[:3]} ({len(alien)}). Were the two files saved together?"
        )
    modules = [source.removesuffix(".weight") for source in match.whole]
    for name in how.saved:
        if not any(names_module((name,), module) for module in modules):
            raise CheckpointError(
                f"{folder}: modules_to_save names {name!r}, whose weight is not in {peft_config.WEIGHTS}"
            )
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
        raise CheckpointError(
            f"{folder}: trainable_token_indices is given, and {peft_config.WEIGHTS} has no rows of tokens"
        )
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
    heads = [f"{PREFIX}{peft_config.HEAD}.lora_{part}.weight" for part in "AB"]
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
    frozen = f"{PREFIX}{peft_config.HEAD}.base_layer.weight"
    stored = tensors.get(table.replace("lora_embedding_", "base_layer.weight"))
    if frozen in tensors and stored is not None and np.array_equal(tensors[frozen], stored):
        heads.append(frozen)
    return {key: t for key, t in tensors.items() if key not in heads}
