"""llama.cpp's importance matrices: how much each column of each matrix counts when its numbers are rounded.

Both forms that llama-imatrix has written (tools/imatrix in ggml-org/llama.cpp) are read here and written by
``io.imatrix_write``. Names are those of a GGUF file's tensors; experts of one tensor lie one after the other.

    GGUF    general.type "imatrix"; NAME.in_sum2 (experts, columns) float32 sums of squares of what came to the columns,
            NAME.counts (experts, 1) float32, of how many tokens
            imatrix.datasets [text], imatrix.chunk_count, imatrix.chunk_size: what was read, in how long windows
    .dat    int32 entries; of each int32 length, name, int32 calls, int32 numbers, float32 numbers: calls times the mean
            squares; then int32 calls, int32 length, text: what it was made of, which is not read
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quadriga.errors import CheckpointError, ConfigError
from quadriga.io.gguf import is_gguf
from quadriga.io.gguf_source import GGUFSource
from quadriga.io.restate import restated_columns
from quadriga.model import families
from quadriga.model.config import ModelConfig
from quadriga.model.weight_map import stays_float32, whole

Squares = NDArray[np.float32]

_MOST = 1 << 20
"""More entries, or bytes of a name, than any file has."""


def is_imatrix(path: Path) -> bool:
    """True if the file is one, by its first bytes (GGUF) or by its name (.dat, .imatrix)."""
    if not is_gguf(path):
        return path.suffix in (".dat", ".imatrix")
    source = GGUFSource(path)
    try:
        return source.metadata.get("general.type") == "imatrix"
    finally:
        source.close()


def read_imatrix(path: Path, config: ModelConfig) -> dict[str, Squares]:
    """The importance of the columns of a model's matrices.

    Returns:
        matrix (experts by number: NAME/3) -> (columns,) float32 mean squares. Matrices that the file does not know, and
        experts that no token came to, have no entry: all their columns count alike.

    Raises:
        CheckpointError: a broken file, one of another model, or one that knows no matrix of this one.
        ConfigError: GGUF has no names for this family's matrices.
    """
    entries = _of_gguf(path) if is_gguf(path) else _of_dat(path)
    found: dict[str, Squares] = {}
    stored = families.family_of(config).gguf_form(config)
    for tensor in gguf_matrices(config):
        if tensor.name not in entries:
            continue
        squares, count = entries[tensor.name], len(tensor.parameters)
        if squares.size == tensor.columns and len(set(tensor.parameters)) == 1:
            count = 1  # of all heads together
        if squares.size != count * tensor.columns:
            raise CheckpointError(
                f"{path.name}: {tensor.name} must have {count} x {tensor.columns} numbers for this model, got "
                f"{squares.size}. It was made of another model."
            )
        rows = squares.reshape(count, tensor.columns)
        for parameter in dict.fromkeys(tensor.parameters):
            of_it = [row for row, name in zip(rows, tensor.parameters, strict=False) if name == parameter]
            row: Squares = np.stack(of_it).mean(axis=0, dtype=np.float32) if len(of_it) > 1 else of_it[0]
            if np.isfinite(row).all() and row.any():
                found.setdefault(parameter, row)
    if not found:
        other = next(iter(entries), "anything")
        raise CheckpointError(f"{path.name} knows no matrix of this model: none of it is called {other}")
    return restated_columns(found, stored, config)


@dataclass(frozen=True)
class GGUFMatrices:
    """A tensor of a GGUF file that is a matrix, or several behind each other."""

    name: str
    columns: int
    parameters: tuple[str, ...]
    """Whose columns these are, one for each of its matrices: an expert's is NAME/3, of a matrix a head the same name
    for every head."""


def gguf_matrices(config: ModelConfig) -> Iterator[GGUFMatrices]:
    """The matrices of a model that an importance matrix can know, in the order of GGUF's tensors.

    Raises:
        ConfigError: GGUF has no names for this family's matrices.
    """
    family = families.family_of(config)
    if family.gguf_map is None:
        raise ConfigError(f"an importance matrix has GGUF's names, and GGUF has no architecture for {family.name}")
    for piece in family.gguf_map(family.gguf_form(config)):
        if len(piece.target_shape) < 2 or stays_float32(piece.target):
            continue
        heads = prod(piece.source_shape[:-2])
        names = [piece.target] * heads
        if len(piece.target_shape) == 3:
            names = [
                f"{piece.target}/{expert}" for expert in range(*(piece.target_box or whole(piece.target_shape))[0])
            ]
            assert len(names) == heads, "experts lie in one tensor of GGUF"
        yield GGUFMatrices(piece.source, piece.target_shape[-1], tuple(names))


def _of_gguf(path: Path) -> dict[str, Squares]:
    source = GGUFSource(path)
    try:
        entries: dict[str, Squares] = {}
        for name in source.tensors:
            if not name.endswith(".in_sum2"):
                continue
            stem = name.removesuffix(".in_sum2")
            if f"{stem}.counts" not in source.tensors:
                raise CheckpointError(f"{path.name}: {name} must have {stem}.counts beside it, which is missing")
            counts = source.read(f"{stem}.counts").astype(np.float32).reshape(-1, 1)
            sums = source.read(name).astype(np.float32)
            if sums.size % len(counts):
                raise CheckpointError(f"{path.name}: {name} must have rows for {len(counts)} counts, got {sums.shape}")
            entries[stem] = np.divide(sums.reshape(len(counts), -1), np.maximum(counts, 1), dtype=np.float32)
        return entries
    finally:
        source.close()


def _of_dat(path: Path) -> dict[str, Squares]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    at = 0

    def whole(most: int) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<i", raw, at)
        at += 4
        if not 0 <= value <= most or (most == len(raw) and at + 4 * value > len(raw)):
            raise CheckpointError(f"{path.name} is no importance matrix: a count of {value} at byte {at - 4}")
        return int(value)

    entries: dict[str, Squares] = {}
    try:
        for _ in range(whole(_MOST)):
            length = whole(_MOST)
            name = raw[at : at + length].decode()
            at += length
            calls, n = max(whole(2**31 - 1), 1), whole(len(raw))
            sums = np.frombuffer(raw, dtype=np.float32, count=n, offset=at)
            entries[name] = np.divide(sums, calls, dtype=np.float32)
            at += 4 * n
    except (struct.error, UnicodeDecodeError):
        raise CheckpointError(f"{path.name} is no importance matrix, or cut off: nothing fits at byte {at}") from None
    return entries
