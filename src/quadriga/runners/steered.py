"""A pass whose sequences ask different things of experts, as passes that ask one thing each.

    sequences  a  b  c  d        row of the steering table  -1  0  -1  1
    passes     a c | b | d       each computed as if it were alone; results go back to the places of their tokens

What runs a captured program has one bias for all tokens of a pass. Numbers do not depend on what shares a pass (batch
invariance), so parting it changes none; it costs the weights being read once for every part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadriga.kernels.pass_batch import PassBatch
from quadriga.runners.base import LayerRouting, PassResult

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Part:
    """Some of a pass's sequences."""

    batch: PassBatch
    """Without steering."""
    row: int
    """Of the steering table; -1: none."""
    tokens: Ints
    """Where its tokens stand in the whole pass."""
    rows: Ints
    """Where its rows of logits stand among the whole pass's."""


def parts_of(batch: PassBatch) -> list[Part]:
    """A pass, parted by the row of the steering table that its sequences take."""
    assert batch.steered is not None, "a pass that is parted has sequences that steer"
    of_sequence = batch.steered[batch.starts[:-1]]
    same = np.repeat(of_sequence, np.diff(batch.starts))
    assert np.array_equal(same, batch.steered), "all tokens of a sequence take the same row"
    return [_part(batch, int(row), np.flatnonzero(of_sequence == row)) for row in np.unique(of_sequence)]


def _part(batch: PassBatch, row: int, sequences: NDArray[np.intp]) -> Part:
    tokens = _ranges(batch.starts, sequences)
    blocks = _ranges(batch.table_starts, sequences)
    place = np.full(len(batch.tokens), -1, dtype=np.int32)  # of a token in the part
    place[tokens] = np.arange(len(tokens))
    rows = np.flatnonzero(place[batch.rows] >= 0).astype(np.int32)
    return Part(
        PassBatch(
            tokens=batch.tokens[tokens],
            positions=batch.positions[tokens],
            starts=_starts(np.diff(batch.starts)[sequences]),
            tables=np.ascontiguousarray(batch.tables[..., blocks]),
            table_starts=_starts(np.diff(batch.table_starts)[sequences]),
            rows=place[batch.rows[rows]],
            before=None if batch.before is None else batch.before[sequences],
            after=None if batch.after is None else batch.after[sequences],
        ),
        row,
        tokens,
        rows,
    )


def _ranges(starts: Ints, sequences: NDArray[np.intp]) -> Ints:
    """The places [starts[s], starts[s + 1]) of some sequences, one after the other."""
    return np.concatenate([np.arange(starts[s], starts[s + 1], dtype=np.int32) for s in sequences])


def _starts(sizes: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)


def joined(results: Sequence[tuple[Part, PassResult]], n_tokens: int, n_rows: int) -> PassResult:
    """What the parts computed, in the places of the whole pass."""
    tokens, rows = [part.tokens for part, _ in results], [part.rows for part, _ in results]
    made = [result for _, result in results]
    hidden = [result.hidden for result in made if result.hidden is not None]
    layers = [result.routing for result in made if result.routing is not None]
    return PassResult(
        _placed([np.asarray(result.logits) for result in made], rows, n_rows),
        _placed(hidden, tokens, n_tokens) if hidden else None,
        [
            LayerRouting(
                **{
                    field.name: _placed([getattr(one, field.name) for one in layer], tokens, n_tokens)
                    for field in fields(LayerRouting)
                }
            )
            for layer in zip(*layers, strict=True)
        ]
        if layers
        else None,
    )


def _placed(values: Sequence[NDArray[Any]], places: Sequence[Ints], n: int) -> NDArray[Any]:
    out: NDArray[Any] = np.empty((n, *values[0].shape[1:]), dtype=values[0].dtype)
    for value, at in zip(values, places, strict=True):
        out[at] = value
    return out
