"""Quantise and dequantise block formats: the readable reference that the kernels are tested against.

Everything works on NumPy arrays of whole blocks, (n_blocks, bytes per block) uint8 <-> (n_blocks, elements per block)
float32. Scales are float16 on disk and multiply in float32, in the same order as in ggml, so that dequantising is
bit-exact to ggml. Inf or NaN scales of a broken file give Inf or NaN (Inf * 0 = NaN), never a finite number. Quantising
refuses values that a block cannot represent. Plain float formats are not blocks; they are cast.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from quadriga import runtime
from quadriga.quant import blocks, codebook_blocks, pack_blocks
from quadriga.quant.blocks import Bytes, Floats
from quadriga.quant.feedback import Feedback, Importance, Moments, carry
from quadriga.quant.formats import FORMATS
from quadriga.quant.search import NUMPY, Search
from quadriga.quant.stored_half import as_half, inverse

_UNPACK = blocks.UNPACK | codebook_blocks.UNPACK


def dequantize(raw: Bytes, name: str) -> Floats:
    """Dequantise whole blocks.

    Args:
        raw: uint8 of any shape; a whole number of blocks.
        name: a block format of ``quant.formats``.

    Returns:
        float32 (n_blocks * elements per block,).
    """
    spec = FORMATS[name]
    with np.errstate(invalid="ignore", over="ignore"):
        return _UNPACK[name](raw.reshape(-1, spec.nbytes)).reshape(-1)


def quantize(values: Floats, name: str, importance: Importance | None = None, search: Search = NUMPY) -> Bytes:
    """Quantise float32 values, row-major in whole blocks.

    q8_0 has the rounding of ggml's reference quantiser, and so have q4_0 and q4_1 without an importance; the others are
    searched for (``quant.search``).

    Args:
        values: whole rows, (..., columns).
        name: one of WRITTEN.
        importance: (columns,) how much each column's squared error counts in a search; None: all alike. With the
            moments of what comes to the columns, errors are made up for by the columns behind (``quant.feedback``).
        search: who looks for scales; ``kernels.cpu.searching`` is many times faster.

    Returns:
        uint8 (n_blocks * bytes per block,).

    Raises:
        CheckpointError: a value is NaN or infinite, or so large that its block's scale or minimum is beyond float16.
    """
    spec = FORMATS[name]
    x = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, spec.block)
    if name in _PACK and (importance is None or name not in pack_blocks.WEIGHED):
        return _PACK[name](x).reshape(-1)
    if isinstance(importance, Moments):
        return _with_feedback(x.reshape(-1, values.shape[-1]), name, importance, search)
    weight = np.ones((1, 1), dtype=np.float32)
    if importance is not None:
        weight = _positive(importance).reshape(-1, spec.block)
    return _searched(x, name, weight, values.shape[-1] // spec.block, search).reshape(-1)


def _with_feedback(x: Floats, name: str, moments: Moments, search: Search) -> Bytes:
    """Rows (n, columns) packed block of columns by block of columns, each one's errors taken from those behind."""
    pack_blocks.require_finite(x)
    spec, upper, rows = FORMATS[name], moments.upper, x.copy()
    out = np.empty((len(x), x.shape[1] // spec.block, spec.nbytes), dtype=np.uint8)
    for block in range(out.shape[1]):
        here = slice(block * spec.block, (block + 1) * spec.block)
        behind = slice(here.stop, None)
        values, part = np.ascontiguousarray(rows[:, here]), upper[here, here]
        weight = (np.diag(part) ** -2)[None, :]
        fed = Feedback(search, part).search()
        out[:, block] = _searched(values, name, weight / weight.mean(), 1, fed)
        stored = dequantize(out[:, block], name).reshape(values.shape)
        carry(values, stored, part, upper[here, behind], rows[:, behind])
    return out.reshape(-1)


_SEARCHED = 1 << 17
"""Numbers searched at once: a search takes some ten times their memory, and should find it in the cache."""


def _searched(x: Floats, name: str, weight: Floats, blocks_a_row: int, search: Search) -> Bytes:
    """Blocks (n, elements) packed by the search, on all processors: a run of whole rows each."""
    out = np.empty((len(x), FORMATS[name].nbytes), dtype=np.uint8)
    step = max(1, _SEARCHED // (x.shape[1] * blocks_a_row)) * blocks_a_row

    def pack(first: int) -> None:
        part = x[first : first + step]
        pack_blocks.require_finite(part)
        of_part = weight if len(weight) == 1 else np.tile(weight, (len(part) // len(weight), 1))
        of_part = np.broadcast_to(of_part, (len(part), of_part.shape[1]))
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is no scale, and refused
            out[first : first + step] = (pack_blocks.PACK | pack_blocks.WEIGHED)[name](part, of_part, search)

    with ThreadPoolExecutor(runtime.cpu_count()) as pool:
        for done in pool.map(pack, range(0, len(x), step)):
            assert done is None
    return out


def _positive(importance: Floats) -> Floats:
    """Importance of columns as weights with a mean of 1; columns that were never seen count a little."""
    weight = np.maximum(np.asarray(importance, dtype=np.float32), 0)
    mean = weight.mean()
    if not np.isfinite(mean) or mean <= 0:
        return np.ones_like(weight)
    positive: Floats = weight / mean + np.float32(1e-3)
    return positive


# Packing -------------------------------------------------------------------------------------------------------------


def _round_half_away(values: Floats) -> Floats:
    """Round like C's roundf. Truncating x + 0.5 would round 0.49999997 to 1, and NumPy's rint rounds halves to even."""
    whole = np.trunc(values)
    return whole + np.trunc(2 * (values - whole))


def _pack_q8_0(blocks: Floats) -> Bytes:
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scale = as_half(d)
    q = _round_half_away(blocks * inverse(d)).astype(np.int8)
    return np.concatenate((scale, q.view(np.uint8)), axis=1)


def _pack_nibbles(q: NDArray[np.uint8]) -> Bytes:
    return q[:, :16] | q[:, 16:] << np.uint8(4)


def _pack_q4_0(blocks: Floats) -> Bytes:
    largest = np.abs(blocks).argmax(axis=1)[:, None]
    # The value furthest from zero becomes exactly -8, which keeps its sign and uses the whole range.
    d = np.take_along_axis(blocks, largest, axis=1) / np.float32(-8)
    scale = as_half(d)
    q = (blocks * inverse(d) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    return np.concatenate((scale, _pack_nibbles(q)), axis=1)


def _pack_q4_1(blocks: Floats) -> Bytes:
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    with np.errstate(over="ignore", invalid="ignore"):
        d = (high - low) / np.float32(15)
    scale, minimum = as_half(d), as_half(low)
    q = ((blocks - low) * inverse(d) + np.float32(0.5)).astype(np.uint8).clip(0, 15)
    return np.concatenate((scale, minimum, _pack_nibbles(q)), axis=1)


_PACK: dict[str, Callable[[Floats], Bytes]] = {"q8_0": _pack_q8_0, "q4_0": _pack_q4_0, "q4_1": _pack_q4_1}
"""Quantisers of the formats that need no search."""

WRITTEN = (*_PACK, *pack_blocks.PACK)
"""Block formats that Quadriga writes."""
