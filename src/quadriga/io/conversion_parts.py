"""The bytes of a result tensor in parts of bounded size, made from the parameters of a checkpoint."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np

from quadriga.errors import CheckpointError
from quadriga.io.conversion_plan import ConversionPlan
from quadriga.io.gguf_source import GGUFSource
from quadriga.io.open import Checkpoint
from quadriga.io.packed import Unpacked, read_matrix, read_some_rows
from quadriga.io.parameters import SLICE_BYTES, slices, to_stored
from quadriga.kernels.cpu import searching
from quadriga.kernels.cpu.packing import allocate
from quadriga.model.weight_map import (
    Piece,
    Shape,
    parameter_shapes,
    source_index,
    whole,
)
from quadriga.quant import codec
from quadriga.quant.dtypes import DTYPES as NUMPY
from quadriga.quant.dtypes import Array, as_float32, raw_bytes, wider
from quadriga.quant.feedback import Importance
from quadriga.quant.formats import FORMATS, PLAIN

PARTS_WAITING = 3
"""Parts made and not yet written: what the memory of a conversion is a few times of."""
_READ_AHEAD = 2


def packed_parts(
    checkpoint: Checkpoint, plan: ConversionPlan, importance: Mapping[str, Importance], finished: Collection[str]
) -> Iterator[tuple[str, Iterator[tuple[memoryview, int]]]]:
    """Packed matrices and vectors: one thread reads ahead while the others pack."""
    missing = [
        (part, name, i)
        for name, shape in parameter_shapes(checkpoint.config).items()
        for i, part in enumerate(_parts_of(plan, name, shape))
        if part not in finished
    ]
    # Fresh memory costs a page fault every 4 kB, a third of the time: results take turns in a few buffers.
    buffers = [allocate(max(plan.nbytes(part) for part in plan.tensors)) for _ in range(PARTS_WAITING + 2)]

    def read(part: str, name: str, i: int) -> Unpacked | Array:
        shape, form = plan.tensors[part]
        if len(shape) == 1:
            return np.ascontiguousarray(as_float32(checkpoint.parameters.read(name)))
        if name not in plan.tensors and len(parameter_shapes(checkpoint.config)[name]) == 2:
            first = sum(plan.tensors[f"{name}/{j}"][0][0] for j in range(i))
            return read_some_rows(checkpoint, name, first, first + shape[0], form)
        return read_matrix(checkpoint, name, i, form)

    with ThreadPoolExecutor(1) as reader:
        ahead = deque(reader.submit(read, *one) for one in missing[:_READ_AHEAD])
        for index, (part, name, _) in enumerate(missing):
            got = ahead.popleft().result()
            if index + _READ_AHEAD < len(missing):
                ahead.append(reader.submit(read, *missing[index + _READ_AHEAD]))
            if not isinstance(got, Unpacked):
                yield part, iter([(raw_bytes(got).data, 0)])
                continue
            out = buffers[index % len(buffers)][: plan.nbytes(part)]
            packed = got.pack(plan.tensors[part][1], out=out, importance=importance.get(part, importance.get(name)))
            yield part, iter([(packed.data.data, 0)])


def _parts_of(plan: ConversionPlan, name: str, shape: Shape) -> list[str]:
    """The matrices that a parameter is packed as: one, one an expert, or one a run of rows of q, k and v."""
    if name in plan.tensors:
        return [name]
    if len(shape) == 3:
        return [f"{name}/{expert}" for expert in range(shape[0])]
    return [f"{name}/{i}" for i in range(shape[0]) if f"{name}/{i}" in plan.tensors]


def encoded_parts(
    checkpoint: Checkpoint, plan: ConversionPlan, name: str, pieces: list[Piece], importance: Mapping[str, Importance]
) -> Iterator[tuple[memoryview, int]]:
    """The bytes of one result tensor in parts, each with its place inside the tensor.

    Raises:
        CheckpointError: numbers that the format cannot hold, with the tensor's name.
    """
    try:
        yield from _encoded(checkpoint, plan, name, pieces, importance)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None


def _encoded(
    checkpoint: Checkpoint, plan: ConversionPlan, name: str, pieces: list[Piece], importance: Mapping[str, Importance]
) -> Iterator[tuple[memoryview, int]]:
    shape, form = plan.tensors[name]
    if not importance and _is_there_already(checkpoint, name, form, pieces):
        yield from _as_stored(checkpoint, name, shape, form)
        return
    if any(piece.stride is not None for piece in pieces):
        yield from _taking_turns(checkpoint, shape, form, pieces)
        return
    for piece in pieces:
        for cut in slices(piece, SLICE_BYTES // 4):
            values = to_stored(checkpoint.parameters.read(cut.target, cut.target_box), cut)
            box = cut.source_box or whole(shape)
            # A run of rows is one run of bytes; where the box leaves out part of axis 1 (gate and up of every expert
            # in one tensor), each index of axis 0 is a run of its own.
            split = len(shape) > 1 and box[1] != (0, shape[1])
            assert all(r == (0, n) for r, n in zip(box[2:], shape[2:], strict=True)), "parts are runs of rows"
            by_expert = len(cut.target_shape) == 3 and len(shape) == 3 and any("/" in part for part in importance)
            for start, run in enumerate(values, box[0][0]) if split or by_expert else ((box[0][0], values),):
                encoded = encode(run, form, _importance_of(cut, importance, start - box[0][0]))
                yield encoded, FORMATS[form].nbytes_of((_first_element(((start, 0), *box[1:]), shape),))


def _is_there_already(checkpoint: Checkpoint, name: str, form: str, pieces: list[Piece]) -> bool:
    """True if the source is a GGUF file with this very tensor in this very format."""
    source = checkpoint.source
    if not isinstance(source, GGUFSource) or name not in source.tensors or source.tensors[name].dtype != form:
        return False
    theirs = [piece for piece in checkpoint.pieces if piece.source == name]
    return sorted(map(repr, theirs)) == sorted(map(repr, pieces))


def _as_stored(checkpoint: Checkpoint, name: str, shape: Shape, form: str) -> Iterator[tuple[memoryview, int]]:
    """A tensor's own bytes: to round its numbers once more would only lose some."""
    assert isinstance(checkpoint.source, GGUFSource), "bytes of a GGUF file"
    row_bytes, rows = FORMATS[form].nbytes_of(shape[-1:]), prod(shape[:-1])
    step = max(1, SLICE_BYTES // row_bytes)
    for start in range(0, rows, step):
        yield checkpoint.source.raw(name, start, min(start + step, rows)).data, start * row_bytes


def _importance_of(cut: Piece, importance: Mapping[str, Importance], index: int) -> Importance | None:
    """The importance of the columns of a run that starts at the cut's first axis' ``index``; None: nothing is known."""
    columns = (cut.target_box or whole(cut.target_shape))[-1]
    if cut.transpose or columns != (0, cut.target_shape[-1]):
        return None
    if len(cut.target_shape) < 3:
        return importance.get(cut.target)
    first = (cut.target_box or whole(cut.target_shape))[0][0]
    return importance.get(f"{cut.target}/{first + index}")


def _taking_turns(
    checkpoint: Checkpoint, shape: Shape, form: str, pieces: list[Piece]
) -> Iterator[tuple[memoryview, int]]:
    """The parts of a tensor whose pieces lie between each other: cut alike, and put together before writing."""
    for cuts in zip(*(slices(piece, SLICE_BYTES // 4) for piece in pieces), strict=True):
        spans = {(cut.source_box or whole(shape))[0] for cut in cuts}
        assert len(spans) == 1, "pieces that take turns are cut at the same rows"
        start, stop = next(iter(spans))
        parts = [to_stored(checkpoint.parameters.read(cut.target, cut.target_box), cut) for cut in cuts]
        together = np.empty((stop - start, *shape[1:]), dtype=functools.reduce(wider, (part.dtype for part in parts)))
        for cut, part in zip(cuts, parts, strict=True):
            _, *inner = source_index(cut)
            together[(slice(None), *inner)] = part
        yield encode(together, form), FORMATS[form].nbytes_of((start, *shape[1:]))


def _first_element(box: tuple[tuple[int, int], ...], shape: Shape) -> int:
    index = 0
    for (start, _), size in zip(box, shape, strict=True):
        index = index * size + start
    return index


def encode(values: Array, form: str, importance: Importance | None = None) -> memoryview:
    """An array's numbers in a stored format, as bytes.

    Args:
        values: whole rows, (..., columns).
        importance: (columns,), for formats that are searched; see ``quant.codec.quantize``.

    Raises:
        CheckpointError: a finite number is beyond float16's largest, 65504: it would become infinite in silence.
    """
    if form in PLAIN:
        with np.errstate(over="ignore"):  # what became infinite is refused below
            plain = values.astype(NUMPY[form], copy=False)
        if form == "float16" and plain.dtype != values.dtype and not np.array_equal(np.isinf(plain), np.isinf(values)):
            raise CheckpointError(
                f"a weight of {float(np.abs(as_float32(values)).max()):g} does not fit float16, whose largest number "
                "is 65504. Choose bfloat16 or float32."
            )
        return raw_bytes(plain).data
    return codec.quantize(np.ascontiguousarray(as_float32(values)), form, importance, searching.fastest()).data
