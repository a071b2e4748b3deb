"""What passes are told of requests that steer experts, and what keeps their prefixes apart from others'."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


def salt_of(salt: bytes, adapter: int, steering: Floats | None) -> bytes:
    """What a request's prefixes are shared under.

    What one adapter cached is of no use to another, nor to the next of the same name; and keys and values are others
    where experts are steered.

    Args:
        salt: the request's own.
        adapter: the number of its adapter; 0: none.
    """
    if adapter:
        salt = blake2b(salt, salt=adapter.to_bytes(8, "little")).digest()
    if steering is not None:
        salt = blake2b(salt + steering.tobytes(), person=b"steering").digest()
    return salt


def steering_of(chunks: Sequence[tuple[Floats | None, int]]) -> tuple[Floats | None, Ints | None]:
    """What a pass adds to routers' logits, as ``PassBatch.steering`` and ``steered`` have it.

    Args:
        chunks: of every chunk its sequence's (n_layers, E), or None, and its number of tokens.

    Returns:
        (tables (M, n_layers, E), each token's row of them (N,), -1 for none); (None, None) where nobody asks.
    """
    tables: list[Floats] = []
    rows: list[int] = []
    for steering, n_tokens in chunks:
        row = -1
        if steering is not None:  # answers to one request share a table
            row = next((i for i, table in enumerate(tables) if np.array_equal(table, steering)), len(tables))
            if row == len(tables):
                tables.append(steering)
        rows += [row] * n_tokens
    return (np.stack(tables), np.array(rows, dtype=np.int32)) if tables else (None, None)
