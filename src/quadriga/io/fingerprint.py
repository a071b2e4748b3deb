"""A short name for a checkpoint's numbers, from some of them: other weights of the same shapes get another one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from quadriga.io.open import Checkpoint
from quadriga.io.quantised.source import QuantisedSource
from quadriga.model.weight_map import Box, Shape, whole
from quadriga.quant.dtypes import raw_bytes

_ROWS = 16
_EDGE = 4096
"""Most numbers of a row that are looked at: GGUF's formats unpack what is read."""


def fingerprint(checkpoint: Checkpoint) -> str:
    """16 hex digits from every stored tensor's name, shape and some of its rows.

    A model that was trained further differs in nearly every number, so a few of each tensor tell; all of 132 billion
    would take longer to read than many runs. A change of single numbers elsewhere is not seen. The same weights in
    another format or layout have another fingerprint. What a quantiser packed is not unpacked: a row of GPTQ's numbers
    lies across its whole tensor.
    """
    digest = hashlib.sha256()
    source = checkpoint.source.stored if isinstance(checkpoint.source, QuantisedSource) else checkpoint.source
    for name, info in sorted(source.tensors.items()):
        digest.update(f"{name} {info.shape}\0".encode())
        for box in _looked_at(info.shape):
            digest.update(raw_bytes(source.read(name, box)).tobytes())
    return digest.hexdigest()[:16]


def _looked_at(shape: Shape) -> Iterator[Box]:
    """One row of each expert of a stack; some rows of a matrix, from its first to its last."""
    if not shape:
        yield ()
        return
    *outer, last = shape
    end = (0, min(last, _EDGE))
    match outer:
        case []:
            yield (end,)
        case [n]:
            yield from (((i, i + 1), end) for i in sorted({k * (n - 1) // (_ROWS - 1) for k in range(_ROWS)}))
        case [n, rows, *rest]:
            for i in range(n):
                yield ((i, i + 1), (i % rows, i % rows + 1), *whole(tuple(rest)), end)
