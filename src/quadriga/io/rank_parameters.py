"""A rank's part of a checkpoint's parameters, as the CPU's kernels want them.

    a packed Quadriga directory   the bytes of the rank's own rows, columns and experts are copied; no others are read
    blocks (GGUF, MXFP4)          of its own experts and layers; whole blocks of the rows are kept as they are
    anything else                 of its own experts and layers; a matrix that is cut is read whole and packed in part

A cut inside of stored blocks changes their numbers, so it is refused where blocks are to be kept as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np

from quadriga import runtime
from quadriga.errors import ConfigError, HardwareError
from quadriga.io import directory as engine_file
from quadriga.io.open import Checkpoint
from quadriga.io.packed import (
    FORMATS_TO_LOAD,
    Unpacked,
    packed_format,
    packed_manifest,
    read_matrix,
    read_rows,
    runs_of_rows,
)
from quadriga.io.parameters import Progress
from quadriga.kernels.cpu.packing import Bytes, Packed, Parameter, allocate, pack
from quadriga.model.rank_mesh import Run
from quadriga.model.rank_share import RankShare, Runs, Selection
from quadriga.model.weight_map import Shape, parameter_shapes, whole
from quadriga.quant.dtypes import Array, as_float32
from quadriga.quant.formats import FORMATS
from quadriga.quant.packed import FROM_GGUF, PACKED, TILE

_NOTHING = np.zeros(0, dtype=np.uint8)
_USABLE = 0.95
"""Of the free memory: the rest is for keys, values and the program."""


def load_part(
    checkpoint: Checkpoint, share: RankShare, form: str = "keep", *, progress: Progress | None = None
) -> dict[str, Parameter]:
    """The parameters of ``share.config``, packed.

    Args:
        form: as for ``io.packed.load_packed``.
        progress: called after each parameter.

    Raises:
        ConfigError: an unknown format, or a cut inside of blocks.
        CheckpointError: weights that cannot be read or packed.
        HardwareError: the part does not fit into the memory that is free.
    """
    if form not in FORMATS_TO_LOAD:
        raise ConfigError(f"format must be one of {', '.join(FORMATS_TO_LOAD)}; got {form!r}")
    shapes = parameter_shapes(checkpoint.config)
    reader = _Reader(checkpoint, form)
    reader.require_room(share, shapes)
    parameters: dict[str, Parameter] = {}
    total = sum(prod(shapes[source]) for source, _ in share.wanted.values())
    done = 0
    for name, (source, selection) in share.wanted.items():
        if name == "lm_head.weight" and source in parameters:  # tied, and this rank has the whole table
            parameters[name] = _rows_of(parameters[source], selection)
        else:
            parameters[name] = reader.read(source, shapes[source], selection)
        done += prod(shapes[source])
        if progress is not None:
            progress(done, total, source)
    return parameters


def _rows_of(table: Parameter, selection: Selection) -> Packed:
    """Rows of the embedding as the head: the same memory where they are whole tiles."""
    assert isinstance(table, Packed), "an embedding is a matrix"
    ((first, last),) = selection.rows or ((0, table.rows),)
    if first % TILE:
        return pack(np.ascontiguousarray(table.unpack(first, last - first)), _plain(table.format))
    size = PACKED[table.format].nbytes_of(TILE, table.cols)
    return Packed(table.format, last - first, table.cols, table.data[first // TILE * size : -(-last // TILE) * size])


def _plain(form: str) -> str:
    """A format of numbers as they are, for a cut that is no whole tiles.

    Raises:
        ConfigError: the numbers are in blocks.
    """
    if form not in ("float32", "bfloat16"):
        raise _inside(form)
    return form


def _inside(form: str) -> ConfigError:
    return ConfigError(
        f"a cut between ranks falls inside of {form}'s blocks, whose numbers are stored together. Take other numbers "
        "for parallel (pp never cuts a matrix), or weights in another format"
    )


class _Reader:
    """Reads parts of a checkpoint's parameters."""

    def __init__(self, checkpoint: Checkpoint, form: str) -> None:
        self._checkpoint, self._form = checkpoint, form
        self._manifest = packed_manifest(checkpoint) if form == "keep" else None
        self._maps: dict[str, Bytes] = {}

    def require_room(self, share: RankShare, shapes: dict[str, Shape]) -> None:
        """See :func:`load_part`."""
        needed = 0.0
        for source, selection in share.wanted.values():
            shape = shapes[source]
            if len(shape) > 1:
                needed += _elements(shape, selection) * self._bits(source) / 8
        free = runtime.memory_bytes()[1]
        if needed > _USABLE * free:
            raise HardwareError(
                f"rank {share.place.rank}'s part of the weights needs {needed / 1e9:.1f} GB of memory, and "
                f"{free / 1e9:.1f} GB are free here. Take more ranks, or weights of fewer bits"
            )

    def _bits(self, source: str) -> float:
        if self._manifest is not None:
            return max(PACKED[entry.format].bits for entry in self._manifest.entries(source))
        return PACKED[packed_format(self._checkpoint, source, self._form)].bits

    def read(self, source: str, shape: Shape, selection: Selection) -> Parameter:
        """A part of one parameter, packed."""
        if len(shape) == 1:
            vector = as_float32(self._checkpoint.parameters.read(source))
            return np.concatenate([vector[a:b] for a, b in selection.rows or ((0, len(vector)),)])
        if self._form == "keep" and source.endswith("attn.wqkv.weight"):
            if self._manifest is not None and len(entries := self._manifest.entries(source)) > 1:
                stored = [Packed(e.format, e.shape[0], e.shape[1], self._bytes_of(e)) for e in entries]
                parts = _own_rows([one.rows for one in stored], selection.rows or ((0, shape[0]),))
                return [_part_of_tiles(stored[i], Selection(rows=own)) for i, own in parts]
            runs = runs_of_rows(self._checkpoint, source)
            if runs:
                pieces = [read_rows(self._checkpoint, run) for _, run in runs]
                return list(_pieces_of_rows(pieces, selection.rows or ((0, shape[0]),)))
        first, last = selection.experts or (0, shape[0] if len(shape) == 3 else 1)
        matrices = [self._matrix(source, shape, i, selection) for i in range(first, last)]
        if len(shape) == 2:
            return matrices[0]
        rows, cols = matrices[0].rows, matrices[0].cols
        elsewhere = Packed(matrices[0].format, rows, cols, _NOTHING)
        return [elsewhere] * first + matrices + [elsewhere] * (shape[0] - last)

    def _matrix(self, source: str, shape: Shape, expert: int, selection: Selection) -> Packed:
        if self._manifest is not None:
            entry = self._manifest.entries(source)[expert]
            stored = Packed(entry.format, shape[-2], shape[-1], self._bytes_of(entry))
            return _zeros(stored) if selection.zero else _part_of_tiles(stored, selection)
        wanted = packed_format(self._checkpoint, source, self._form)
        read = read_matrix(self._checkpoint, source, expert, wanted)
        if selection.cuts and read.blocks is not None and not _on_blocks(read, selection.cols):
            if self._form == "keep":
                raise _inside(read.block_format)
            box = whole(shape) if len(shape) == 2 else ((expert, expert + 1), *whole(shape[1:]))
            values = self._checkpoint.parameters.read(source, box).reshape(shape[-2:])
            read = Unpacked(read.name, read.rows, read.cols, values=as_float32(values))
        if selection.zero:
            assert read.values is not None, "biases are numbers"
            read = replace(read, values=np.zeros_like(read.values))
        return _cut(read, selection).pack(wanted)

    def _bytes_of(self, entry: engine_file.Entry) -> Bytes:
        if entry.file not in self._maps:
            path = Path(self._checkpoint.path) / entry.file
            self._maps[entry.file] = np.memmap(path, dtype=np.uint8, mode="r")
        return self._maps[entry.file][entry.offset : entry.offset + entry.nbytes]


def _elements(shape: Shape, selection: Selection) -> int:
    """Numbers of a part."""
    rows, cols = (
        n if runs is None else sum(b - a for a, b in runs)
        for n, runs in zip(shape[-2:], (selection.rows, selection.cols), strict=True)
    )
    matrices = (
        1 if len(shape) == 2 else shape[0] if selection.experts is None else -int(np.subtract(*selection.experts))
    )
    return matrices * rows * cols


def _zeros(matrix: Packed) -> Packed:
    return pack(np.zeros((matrix.rows, matrix.cols), dtype=np.float32), matrix.format)


def _part_of_tiles(matrix: Packed, selection: Selection) -> Packed:
    """A part of a packed matrix, in memory of its own."""
    form = PACKED[matrix.format]
    rows, cols = selection.rows or ((0, matrix.rows),), selection.cols or ((0, matrix.cols),)
    whole_tiles = _whole(rows, TILE, matrix.rows) and _whole(cols, form.columns, matrix.cols)
    if not whole_tiles:
        numbers = _take(matrix.unpack(), selection)
        return pack(numbers, _plain(matrix.format))
    tiles = matrix.data.reshape(-(-matrix.rows // TILE), -(-matrix.cols // form.columns), form.nbytes)
    n_rows, n_cols = _length(rows), _length(cols)
    out = allocate(form.nbytes_of(n_rows, n_cols))
    grid = out.reshape(-(-n_rows // TILE), -(-n_cols // form.columns), form.nbytes)
    down = 0
    for a, b in _in_units(rows, TILE):
        across = 0
        for c, d in _in_units(cols, form.columns):
            grid[down : down + b - a, across : across + d - c] = tiles[a:b, c:d]
            across += d - c
        down += b - a
    return Packed(matrix.format, n_rows, n_cols, out)


def _whole(runs: Runs, unit: int, n: int) -> bool:
    """True if runs begin and end where units do; the end of all but the last run of a matrix must."""
    inner = all(a % unit == 0 and (b % unit == 0 or b == n) for a, b in runs)
    return inner and all(b % unit == 0 for _, b in runs[:-1])


def _in_units(runs: Runs, unit: int) -> Iterator[Run]:
    return ((a // unit, -(-b // unit)) for a, b in runs)


def _length(runs: Runs) -> int:
    return sum(b - a for a, b in runs)


def _on_blocks(read: Unpacked, cols: Runs | None) -> bool:
    """True if columns are cut where stored blocks end."""
    return cols is None or all(a % _block(read) == 0 and b % _block(read) == 0 for a, b in cols)


def _block(read: Unpacked) -> int:
    return 32 if read.block_format == "mx4" else FORMATS[read.block_format].block


def _take(values: Array, selection: Selection) -> Array:
    """Runs of rows and of columns of a matrix, contiguous."""
    if selection.rows is not None:
        values = np.concatenate([values[a:b] for a, b in selection.rows])
    if selection.cols is not None:
        values = np.concatenate([values[:, a:b] for a, b in selection.cols], axis=1)
    return np.ascontiguousarray(values)


def _cut(read: Unpacked, selection: Selection) -> Unpacked:
    """A part of a matrix as it was read, its blocks as they are."""
    if not selection.cuts:
        return read
    rows = read.rows if selection.rows is None else _length(selection.rows)
    cols = read.cols if selection.cols is None else _length(selection.cols)
    if read.values is not None:
        return replace(read, rows=rows, cols=cols, values=_take(read.values, selection))
    assert read.blocks is not None, "numbers or blocks"
    unit = _block(read)
    stacked = read.blocks.reshape(read.rows, read.cols // unit, -1)
    in_blocks = None if selection.cols is None else tuple((a // unit, b // unit) for a, b in selection.cols)
    part = _take(stacked, replace(selection, cols=in_blocks))
    shape = (-1, part.shape[-1]) if read.block_format == "mx4" else (rows, -1)
    return replace(read, rows=rows, cols=cols, blocks=part.reshape(shape))


def _pieces_of_rows(pieces: Sequence[Unpacked], rows: Runs) -> Iterator[Packed]:
    """Rows of a matrix that lies in pieces of several formats, each with what is wanted of it."""
    for i, own in _own_rows([piece.rows for piece in pieces], rows):
        yield _cut(pieces[i], Selection(rows=own)).pack(FROM_GGUF.get(pieces[i].block_format, "q8"))


def _own_rows(heights: Sequence[int], rows: Runs) -> Iterator[tuple[int, Runs]]:
    """Of pieces of a matrix one after the other, those that have wanted rows, and which of their own rows these are."""
    begin = 0
    for i, height in enumerate(heights):
        end = begin + height
        own = tuple((max(a, begin) - begin, min(b, end) - begin) for a, b in rows if a < end and b > begin)
        begin = end
        if own:
            yield i, own
