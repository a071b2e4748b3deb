"""What a conversion would read, from a checkpoint's configuration and index alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from quadriga.errors import CheckpointError
from quadriga.io.detect import locate
from quadriga.io.json_files import read_json
from quadriga.io.mxfp4_source import of_numbers
from quadriga.io.open import open_checkpoint, without_extras
from quadriga.io.quantised import source as quantised
from quadriga.io.safetensors import INDEX, is_left_over
from quadriga.model import families
from quadriga.model.families.base import pick_layout
from quadriga.model.weight_map import (
    Piece,
    check_cover,
    parameter_shapes,
    source_shapes,
)


@dataclass(frozen=True)
class DryRun:
    """What a conversion of a checkpoint would read, from its configuration and index alone."""

    layout: str
    n_tensors: int
    n_parameters: int
    n_numbers: int
    n_files: int
    files_present: int
    source_of: dict[str, list[str]]
    """Parameter -> the stored tensors that fill it."""


def dry_run(path: Path, *, pickles: bool = False) -> DryRun:
    """Map a checkpoint by name and shape without its weights: config.json and an index are enough.

    Where the shards are missing, shapes are those the configuration demands; where they are there, the stored ones.

    Raises:
        CheckpointError: names (or, with shards, shapes) that do not match, with both lists.
        ConfigError: a configuration no model of ours can have.
    """
    table: dict[str, str] = {}
    if (path / INDEX).is_file() and (path / "config.json").is_file():
        table = read_json(path / INDEX).get("weight_map") or {}
        if not isinstance(table, dict) or not all(isinstance(f, str) for f in table.values()):
            raise CheckpointError(f"{INDEX} must have a 'weight_map' from tensor names to file names")
    files = set(table.values())
    if is_left_over(path, files):
        files = set()
    if all((path / file).is_file() for file in files):
        checkpoint = open_checkpoint(path, pickles=pickles)
        checkpoint.close()
        return _report(checkpoint.layout, checkpoint.pieces, len(files) or 1, len(files) or 1)
    found = locate(path)
    config = found.config
    family = families.family_of(config)
    names = of_numbers(table) if found.method is None else quantised.of_numbers(table, found.method)
    layout, pieces = pick_layout(family, config, dict.fromkeys(names, ()))
    demanded = source_shapes(pieces)
    named = {name: demanded.get(name, ()) for name in names}
    check_cover(pieces, parameter_shapes(config), without_extras(family, config, named, pieces))
    return _report(layout, pieces, len(files), sum((path / file).is_file() for file in files))


def _report(layout: str, pieces: list[Piece], n_files: int, present: int) -> DryRun:
    source_of: dict[str, list[str]] = {}
    for piece in pieces:
        source_of.setdefault(piece.target, []).append(piece.source)
    stored = source_shapes(pieces)
    n_numbers = sum(prod(shape) for shape in stored.values())
    return DryRun(layout, len(stored), len(source_of), n_numbers, n_files, present, source_of)
