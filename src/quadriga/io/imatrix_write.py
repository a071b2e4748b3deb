"""Importance matrices for llama.cpp and its kin: what came to each column of each matrix, as ``io.imatrix`` reads it.

llama.cpp and those who quantise with it read the GGUF form, ik_llama.cpp and releases before mid-2025 the .dat form. An
expert that no token came to has the count 0 in GGUF and ones in .dat: readers take its columns to count alike.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from quadriga.errors import CheckpointError, ConfigError
from quadriga.io.gguf import Typed, plan_gguf
from quadriga.io.imatrix import GGUFMatrices, Squares, gguf_matrices
from quadriga.io.restate import restated_columns
from quadriga.model import families
from quadriga.model.config import ModelConfig

SUFFIXES = (".gguf", ".dat")
"""What a file's name must end with: the form follows it."""


@dataclass(frozen=True)
class ColumnSums:
    """What came to one matrix while a text was read."""

    squares: Squares
    """(columns,) float32 sums of squares."""
    count: int
    """Of how many rows; of an expert the tokens that visited it."""


@dataclass(frozen=True)
class TextRead:
    """What the sums are of."""

    name: str
    n_windows: int
    window: int
    """Tokens of a window."""


def require_suffix(path: Path) -> None:
    """Refuse a name that says no form.

    Raises:
        ConfigError: it ends neither with .gguf nor with .dat.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(
            f"an importance matrix must be called NAME.gguf (llama.cpp) or NAME.dat (ik_llama.cpp), got {path.name!r}"
        )


def write_imatrix(path: Path, config: ModelConfig, sums: Mapping[str, ColumnSums], text: TextRead) -> int:
    """Write the sums of a model's matrices under GGUF's names.

    Args:
        path: the file to make, in the form that its ending says.
        config: the model's.
        sums: matrix (experts by number: NAME/3) -> what came to it. Tensors without sums have no entry.

    Returns:
        how many tensors have an entry.

    Raises:
        ConfigError: another ending, or GGUF has no names for this family's matrices.
        CheckpointError: the file is there already, or cannot be written; or no tensor has sums.
    """
    require_suffix(path)
    if path.exists():
        raise CheckpointError(f"{path} exists; give a new name, or remove it first")
    squares = {name: one.squares for name, one in sums.items()}
    squares = restated_columns(squares, config, families.family_of(config).gguf_form(config))
    entries: dict[str, tuple[Squares, Squares]] = {}
    for tensor in gguf_matrices(config):
        if all(name in sums for name in tensor.parameters):
            entries[tensor.name] = _rows(tensor, squares, {n: sums[n].count for n in tensor.parameters})
    if not entries:
        raise CheckpointError("an importance matrix must know some matrix of the model, and none was measured")
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            (_write_gguf if path.suffix == ".gguf" else _write_dat)(file, entries, text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from None
    return len(entries)


def _rows(tensor: GGUFMatrices, squares: Mapping[str, Squares], counts: Mapping[str, int]) -> tuple[Squares, Squares]:
    """Sums (matrices, columns) and counts (matrices,) of a tensor; heads share what came to all of them."""
    shared = [tensor.parameters.count(name) for name in dict.fromkeys(tensor.parameters)]
    heads = np.float32(shared[0])
    rows = np.stack([squares[name] / heads for name in tensor.parameters]).astype(np.float32)
    return rows, np.array([counts[name] for name in tensor.parameters], dtype=np.float32) / heads


def _write_gguf(file: BinaryIO, entries: Mapping[str, tuple[Squares, Squares]], text: TextRead) -> None:
    arrays: dict[str, Squares] = {}
    for name, (rows, counts) in entries.items():
        arrays[f"{name}.in_sum2"] = rows
        arrays[f"{name}.counts"] = counts[:, None]
    metadata = {
        "general.type": Typed("string", "imatrix"),
        "imatrix.datasets": Typed("string", [text.name]),
        "imatrix.chunk_count": Typed("uint32", text.n_windows),
        "imatrix.chunk_size": Typed("uint32", text.window),
    }
    plan = plan_gguf("", metadata, {name: (array.shape, "float32") for name, array in arrays.items()})
    file.write(plan.headers[""])
    for name, array in arrays.items():
        file.seek(plan.places[name][1])
        file.write(array.astype("<f4").tobytes())
    file.truncate(plan.sizes[""])


def _write_dat(file: BinaryIO, entries: Mapping[str, tuple[Squares, Squares]], text: TextRead) -> None:
    file.write(struct.pack("<i", len(entries)))
    for name, (rows, counts) in entries.items():
        seen = counts[:, None]
        means = np.where(seen > 0, rows / np.maximum(seen, 1), 1)
        file.write(struct.pack("<i", len(name.encode())) + name.encode())
        file.write(struct.pack("<ii", text.n_windows, rows.size))
        file.write((means * text.n_windows).astype("<f4").tobytes())
    file.write(struct.pack("<ii", text.n_windows, len(text.name.encode())) + text.name.encode())
