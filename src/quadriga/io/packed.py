"""Parameters as the CPU's kernels want them, from any checkpoint.

    a packed Quadriga directory   read by several threads into huge pages; memory-mapped if it is nearly all of memory
    GGUF Q8_0, Q4_0, Q4_1; GPTQ   blocks rearranged, no number changed (GPTQ of 4 bits, symmetric, in order)
    GGUF Q5_0, Q5_1, Q2_K .. Q6_K, IQ4_NL, IQ4_XS   the same
    MXFP4                         as mx4, its codes beside float16 scales, no number changed
    GGUF's TQ1_0, TQ2_0           as q8, whose integers hold their numbers exactly
    anything else                 read part by part and packed as `format` says

Routers, biases and vectors are float32 in every case.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from quadriga import runtime
from quadriga.errors import CheckpointError, ConfigError
from quadriga.io import directory as engine_file
from quadriga.io.gguf_source import GGUFSource
from quadriga.io.mxfp4_source import Mxfp4Source
from quadriga.io.open import Checkpoint
from quadriga.io.parameters import Progress, from_stored
from quadriga.io.quantised.fp8 import GROUP as FP8_GROUP
from quadriga.io.quantised.source import QuantisedSource
from quadriga.kernels.cpu.expert_store import ExpertStore
from quadriga.kernels.cpu.packing import STORED, Bytes, Packed, Parameter, allocate, pack, pack_blocks, pack_mx4
from quadriga.model.weight_map import Piece, Shape, parameter_shapes, source_index, stays_float32, whole
from quadriga.quant import mxfp4
from quadriga.quant.dtypes import Array, as_float32
from quadriga.quant.feedback import Importance
from quadriga.quant.formats import FORMATS
from quadriga.quant.packed import FROM_GGUF, OF_BLOCKS, PACKED, QUANTISED

FORMATS_TO_LOAD = ("keep", *PACKED)


@dataclass(frozen=True)
class PackedParameters:
    """A model's parameters and, where its experts stay on disk, their store."""

    parameters: dict[str, Parameter]
    store: ExpertStore | None = None


def load_packed(
    checkpoint: Checkpoint, form: str = "keep", *, expert_memory: int | None = None, progress: Progress | None = None
) -> PackedParameters:
    """Every parameter, packed.

    Args:
        form: one of FORMATS_TO_LOAD. ``keep`` takes the blocks of ``FROM_GGUF``, float32 and bfloat16 as they are;
            float16 becomes bfloat16, MXFP4 mx4, other block formats q8.
        expert_memory: leave experts on disk, with a cache of this many bytes (packed directories only).
        progress: called after each matrix.

    Raises:
        ConfigError: an unknown format, or experts that cannot stay on disk.
        CheckpointError: weights that cannot be read or packed.
    """
    if form not in FORMATS_TO_LOAD:
        raise ConfigError(f"format must be one of {', '.join(FORMATS_TO_LOAD)}; got {form!r}")
    if expert_memory is not None and not checkpoint.config.is_moe:
        raise ConfigError(
            "expert_memory (--expert-memory) would have no effect: this model is dense, without experts. Leave it out."
        )
    manifest = packed_manifest(checkpoint)
    if manifest is not None and form == "keep":
        return _map_directory(checkpoint, manifest, expert_memory, progress)
    if expert_memory is not None:
        raise ConfigError(
            "expert_memory (--expert-memory) needs a packed Quadriga directory: only there can experts stay on disk. "
            "Make one: quadriga convert MODEL OUT --format q4"
        )
    parameters: dict[str, Parameter] = {}
    shapes = parameter_shapes(checkpoint.config)
    total, done = sum(prod(shape) for shape in shapes.values()), 0
    for name, shape in shapes.items():
        if len(shape) == 1:
            parameters[name] = as_float32(checkpoint.parameters.read(name))
        elif form == "keep" and name.endswith("attn.wqkv.weight") and (runs := runs_of_rows(checkpoint, name)):
            parameters[name] = [read_rows(checkpoint, run).pack(FROM_GGUF.get(block, "q8")) for block, run in runs]
        else:
            matrices = list(pack_parameter(checkpoint, name, shape, form))
            parameters[name] = matrices if len(shape) == 3 else matrices[0]
        done += prod(shape)
        if progress is not None:
            progress(done, total, name)
    return PackedParameters(parameters)


def packed_manifest(checkpoint: Checkpoint) -> engine_file.Manifest | None:
    """The manifest of a packed directory; None: the checkpoint is none."""
    manifest = engine_file.read_manifest(checkpoint.path) if checkpoint.kind == "quadriga" else None
    return manifest if manifest is not None and manifest.packed else None


def is_quantised(checkpoint: Checkpoint, form: str) -> bool:
    """True if :func:`load_packed` with this format gives any quantised matrix."""
    manifest = packed_manifest(checkpoint)
    if manifest is not None and form == "keep":
        return any(entry.format in QUANTISED for entry in manifest.parameters.values())
    matrices = [name for name, shape in parameter_shapes(checkpoint.config).items() if len(shape) > 1]
    return any(packed_format(checkpoint, name, form) in QUANTISED for name in matrices)


def packed_format(checkpoint: Checkpoint, name: str, form: str) -> str:
    """What a matrix becomes under ``form``."""
    if stays_float32(name):
        return "float32"
    if form != "keep":
        return form
    pieces = _pieces(checkpoint, name)
    stored = {checkpoint.source.tensors[piece.source].dtype for piece in pieces}
    one = next(iter(stored))
    if len(stored) == 1 and one in FROM_GGUF and (FROM_GGUF[one] not in OF_BLOCKS or _blocks_of(checkpoint, pieces)):
        return FROM_GGUF[one]
    if stored == {"mxfp4"} and (isinstance(checkpoint.source, Mxfp4Source) or _blocks_of(checkpoint, pieces)):
        return "mx4"
    if len(stored) == 1 and one in PACKED:
        return one
    if all(one in ("float32", "bfloat16") for one in stored):
        return "float32" if "float32" in stored else "bfloat16"
    return "bfloat16" if stored <= {"float16", "bfloat16"} else "q8"


def pack_parameter(checkpoint: Checkpoint, name: str, shape: Shape, form: str) -> Iterator[Packed]:
    """The matrices of one parameter, packed one after the other: one, or one per expert."""
    wanted = packed_format(checkpoint, name, form)
    for expert in range(shape[0] if len(shape) == 3 else 1):
        yield read_matrix(checkpoint, name, expert, wanted).pack(wanted)


@dataclass(frozen=True)
class Unpacked:
    """One matrix as it was read: numbers, or the rows of blocks it is stored in."""

    name: str
    rows: int
    cols: int
    values: Array | None = None
    blocks: np.ndarray[Any, Any] | None = None
    block_format: str = ""

    def pack(self, form: str, *, out: Bytes | None = None, importance: Importance | None = None) -> Packed:
        """The packed matrix.

        Args:
            out: memory to fill, ``PACKED[form].nbytes_of(rows, cols)`` bytes; None allocates.
            importance: (cols,) how much each column's squared error counts in the search for scales.

        Raises:
            CheckpointError: numbers that the format cannot hold.
        """
        try:
            rows, cols = self.rows, self.cols
            if self.blocks is not None and self.block_format == "mx4":
                return pack_mx4(self.blocks, rows, cols, out=out)
            if self.blocks is not None:
                return pack_blocks(self.blocks, self.block_format, rows, cols, form, out=out, importance=importance)
            assert self.values is not None
            return pack(self.values, form, out=out, importance=importance)
        except CheckpointError as error:
            raise CheckpointError(f"{self.name}: {error}") from None


def _blocks_of(checkpoint: Checkpoint, pieces: Iterable[Piece]) -> set[str]:
    """The block formats that pieces are stored in, if all of them are whole rows of blocks; else none."""
    of_blocks = isinstance(checkpoint.source, (GGUFSource, QuantisedSource)) and all(map(_is_rows, pieces))
    stored = {checkpoint.source.tensors[piece.source].dtype for piece in pieces}
    return stored if of_blocks and stored <= STORED.keys() else set()


def _pieces(checkpoint: Checkpoint, name: str) -> list[Piece]:
    """What a parameter is made of, in the order of its rows (a matrix) or of its experts."""
    pieces = (piece for piece in checkpoint.pieces if piece.target == name)
    return sorted(pieces, key=lambda piece: (piece.target_box or whole(piece.target_shape))[0])


def runs_of_rows(checkpoint: Checkpoint, name: str) -> list[tuple[str, list[Piece]]]:
    """A matrix whose rows are blocks of several formats as runs of rows of one, in order; none: it is not such."""
    pieces = _pieces(checkpoint, name)
    if len(_blocks_of(checkpoint, pieces)) < 2:
        return []
    runs = groupby(pieces, lambda piece: checkpoint.source.tensors[piece.source].dtype)
    return [(block, list(run)) for block, run in runs]


def rows_of(run: list[Piece]) -> int:
    """How many rows a run has."""
    first, last = ((piece.target_box or whole(piece.target_shape))[0] for piece in (run[0], run[-1]))
    return last[1] - first[0]


def read_rows(checkpoint: Checkpoint, run: list[Piece]) -> Unpacked:
    """One of :func:`runs_of_rows`."""
    source, shape = checkpoint.source, run[0].target_shape
    assert isinstance(source, (GGUFSource, QuantisedSource)), "blocks"
    first, last = ((piece.target_box or whole(shape))[0] for piece in (run[0], run[-1]))
    block = source.tensors[run[0].source].dtype
    rows = _block_rows(source, run, shape, 0, block)[first[0] : last[1]]
    return Unpacked(run[0].target, len(rows), shape[1], blocks=rows, block_format=block)


def read_some_rows(checkpoint: Checkpoint, name: str, first: int, last: int, form: str) -> Unpacked:
    """Rows [first, last) of a matrix that will be packed as ``form``; blocks where a run of them has just those."""
    begin = 0
    for _, run in runs_of_rows(checkpoint, name):
        end = begin + rows_of(run)
        if (begin, end) == (first, last):
            return read_rows(checkpoint, run)
        begin = end
    whole_matrix = read_matrix(checkpoint, name, 0, form)
    values, blocks = (None if part is None else part[first:last] for part in (whole_matrix.values, whole_matrix.blocks))
    return replace(whole_matrix, rows=last - first, values=values, blocks=blocks)


def read_matrix(checkpoint: Checkpoint, name: str, expert: int, form: str) -> Unpacked:
    """One matrix of a parameter; blocks as they are stored, where they are whole rows of it.

    Args:
        expert: which matrix of a parameter (E, rows, cols); 0 for others.
        form: what it will be packed as.
    """
    shape = parameter_shapes(checkpoint.config)[name]
    pieces = _pieces(checkpoint, name)
    source, (rows, cols) = checkpoint.source, shape[-2:]
    stored = {source.tensors[piece.source].dtype for piece in pieces}
    if isinstance(source, (GGUFSource, QuantisedSource)) and len(_blocks_of(checkpoint, pieces)) == 1:
        block = next(iter(stored))
        raw = _block_rows(source, pieces, shape, expert, block)
        return Unpacked(name, rows, cols, blocks=raw, block_format=block)
    if isinstance(source, Mxfp4Source) and stored == {"mxfp4"} and all(map(_is_stack, pieces)):
        return _of_codes(source, pieces[0], expert, form)
    box = whole(shape) if len(shape) == 2 else ((expert, expert + 1), *whole(shape[1:]))
    values = np.ascontiguousarray(checkpoint.parameters.read(name, box).reshape(rows, cols))
    if stored == {"mxfp4"} and form == "q8" and cols % mxfp4.BLOCK == 0:
        exact = mxfp4.as_q8_0(as_float32(values).reshape(-1, mxfp4.BLOCK))
        return Unpacked(name, rows, cols, blocks=exact.reshape(rows, -1), block_format="q8_0")
    return Unpacked(name, rows, cols, values=as_float32(values) if values.dtype == np.float64 else values)


def _is_stack(piece: Piece) -> bool:
    """True if the piece fills a parameter of experts from a tensor of experts, row by row or every n-th row."""
    whole_tensors = piece.source_box is None and piece.target_box is None and piece.view is None
    return whole_tensors and not piece.transpose and len(piece.source_shape) == 3


def _of_codes(source: Mxfp4Source, piece: Piece, expert: int, form: str) -> Unpacked:
    """An expert's matrix from its own rows of codes alone; for q8 as the blocks that hold the same numbers."""
    _, rows, cols = piece.target_shape
    box = ((expert, expert + 1), (0, piece.source_shape[1]), (0, cols // mxfp4.BLOCK))
    codes, scales = (values[0, source_index(piece)[1]] for values in source.codes(piece.source, box))
    codes, scales = codes.reshape(-1, codes.shape[-1]), scales.reshape(-1)
    exact = mxfp4.as_mx4(codes, scales) if form == "mx4" else None
    if exact is not None:
        return Unpacked(piece.target, rows, cols, blocks=exact, block_format="mx4")
    if form == "q8":
        blocks = mxfp4.pairs_as_q8_0(codes, scales).reshape(rows, -1)
        return Unpacked(piece.target, rows, cols, blocks=blocks, block_format="q8_0")
    return Unpacked(piece.target, rows, cols, values=mxfp4.from_pairs(codes, scales).reshape(rows, cols))


def _is_rows(piece: Piece) -> bool:
    """True if the piece moves whole rows: their blocks can move with them."""
    box = piece.source_box or whole(piece.source_shape)
    # A tensor an expert has a view with a one before its shape; a matrix a head is seen as the rows of all heads.
    flat = (prod(piece.source_shape[:-1]), piece.source_shape[-1])
    same_rows = piece.view in (None, (1, *piece.source_shape), flat)
    return not piece.transpose and piece.stride is None and same_rows and box[1:] == whole(piece.source_shape[1:])


def _block_rows(
    source: GGUFSource | QuantisedSource, pieces: list[Piece], shape: Shape, expert: int, form: str
) -> np.ndarray[Any, Any]:
    """The stored blocks of one matrix, row by row in the parameter's order."""
    row_bytes = FORMATS[form].nbytes_of(shape[-1:])
    out = np.empty((shape[-2], row_bytes), dtype=np.uint8)
    for piece, start, n, to in _row_pieces(pieces, shape, expert):
        raw = np.frombuffer(source.raw(piece.source, start, start + n), dtype=np.uint8).reshape(n, row_bytes)
        out[to : to + n] = raw[_order(piece, n)]
    return out


def rows_of_fp8(checkpoint: Checkpoint, name: str, expert: int) -> tuple[Bytes, Array] | None:
    """One matrix of a parameter as FP8 stores it: codes of e4m3 (rows, cols) uint8, scales (rows, ceil(cols / 128)).

    None: it is stored otherwise, or moved otherwise than by whole rows.
    """
    shape, pieces, source = parameter_shapes(checkpoint.config)[name], _pieces(checkpoint, name), checkpoint.source
    if not isinstance(source, QuantisedSource) or not all(map(_is_rows, pieces)):
        return None
    codes = np.empty(shape[-2:], dtype=np.uint8)
    scales = np.empty((shape[-2], -(-shape[-1] // FP8_GROUP)), dtype=np.float32)
    for piece, start, n, to in _row_pieces(pieces, shape, expert):
        stored = source.codes(piece.source, start, start + n)
        if stored is None:
            return None
        order = _order(piece, n)
        codes[to : to + n], scales[to : to + n] = stored[0][order], stored[1][order]
    return codes, scales


def _row_pieces(pieces: list[Piece], shape: Shape, expert: int) -> Iterator[tuple[Piece, int, int, int]]:
    """(piece, its first row in the source, how many, the first one's place) of those that make one matrix."""
    for piece in pieces:
        target = piece.target_box or whole(shape)
        first, _ = (piece.source_box or whole(piece.source_shape))[0]
        if len(shape) == 3:
            if not target[0][0] <= expert < target[0][1]:
                continue
            start = (first + expert - target[0][0]) * (shape[1] if len(piece.source_shape) == 3 else 1)
            n, to = target[1][1] - target[1][0], target[1][0]
        else:
            start, n, to = first, target[0][1] - target[0][0], target[0][0]
        yield piece, start, n, to


def _order(piece: Piece, n: int) -> Any:
    """Where a piece's rows come from, found by moving their numbers as values are moved."""
    return from_stored(np.arange(n)[:, None], piece)[:, 0] if piece.rotary_heads else slice(None)


class _Weights:
    """The files of a packed directory: mapped where they lie, or read into memory by several threads."""

    def __init__(self, directory: Path, copy: bool, progress: Progress | None) -> None:
        self._directory, self._copy, self._progress = directory, copy, progress
        self._maps: dict[str, Bytes] = {}
        self._reads: list[tuple[engine_file.Entry, Bytes]] = []

    def bytes_of(self, entry: engine_file.Entry) -> Bytes:
        """The entry's bytes; with ``copy`` they are there after :meth:`finish`."""
        if self._copy:
            out = allocate(entry.nbytes)
            self._reads.append((entry, out))
            return out
        if entry.file not in self._maps:
            self._maps[entry.file] = np.memmap(self._directory / entry.file, dtype=np.uint8, mode="r")
        return self._maps[entry.file][entry.offset : entry.offset + entry.nbytes]

    def finish(self) -> None:
        """Read what was asked for.

        Raises:
            CheckpointError: a file ended early.
        """
        total, done = sum(entry.nbytes for entry, _ in self._reads), 0
        files = {name: os.open(self._directory / name, os.O_RDONLY) for name in {e.file for e, _ in self._reads}}
        try:
            with ThreadPoolExecutor(min(4, runtime.cpu_count())) as pool:
                tasks = [pool.submit(_read_into, files[e.file], e.offset, out, e.file) for e, out in self._reads]
                for task, (entry, _) in zip(tasks, self._reads, strict=True):
                    task.result()
                    done += entry.nbytes
                    if self._progress is not None:
                        self._progress(done, total, entry.file)
        finally:
            for fd in files.values():
                os.close(fd)


def _read_into(fd: int, offset: int, out: Bytes, name: str) -> None:
    done, view = 0, memoryview(out)  # type: ignore[arg-type]
    while done < len(view):
        got = os.preadv(fd, [view[done : done + (64 << 20)]], offset + done)
        if got == 0:
            raise CheckpointError(f"{name} became shorter while it was read")
        done += got


def _map_directory(
    checkpoint: Checkpoint, manifest: engine_file.Manifest, expert_memory: int | None, progress: Progress | None
) -> PackedParameters:
    config = checkpoint.config
    parameters: dict[str, Parameter] = {}
    on_disk = expert_memory is not None and config.is_moe
    resident = sum(e.nbytes for n, e in manifest.parameters.items() if not (on_disk and "/" in n))
    # Copied into huge pages where it fits easily; larger models are mapped, and the system pages them in and out.
    weights = _Weights(checkpoint.path, resident < 0.7 * runtime.memory_bytes()[1], progress)
    vectors: list[tuple[str, Bytes]] = []
    extents: list[list[list[engine_file.Entry]]] = [[] for _ in range(config.n_layers)]
    for name, shape in parameter_shapes(config).items():
        entries = manifest.entries(name)
        if len(shape) == 1:
            vectors.append((name, weights.bytes_of(entries[0])))
            continue
        if on_disk and len(shape) == 3:
            extents[int(name.split(".")[1])].append(entries)
            nothing = np.zeros(64, dtype=np.uint8)
            parameters[name] = [Packed(e.format, e.shape[0], e.shape[1], nothing) for e in entries]
            continue
        matrices = [Packed(e.format, e.shape[0], e.shape[1], weights.bytes_of(e)) for e in entries]
        parameters[name] = matrices if len(shape) == 3 or len(matrices) > 1 else matrices[0]
    weights.finish()
    parameters.update({name: np.array(raw).view(np.float32) for name, raw in vectors})
    if not on_disk:
        return PackedParameters(parameters)
    assert expert_memory is not None
    by_expert = [[tuple(parts) for parts in zip(*layer, strict=True)] for layer in extents]
    store = ExpertStore(
        checkpoint.path,
        [[[(e.file, e.offset, e.nbytes) for e in parts] for parts in layer] for layer in by_expert],
        budget=expert_memory,
    )
    return PackedParameters(parameters, store)
