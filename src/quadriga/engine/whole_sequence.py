"""One sequence through the model beside whatever the engine is doing, in blocks (and states) of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields

import numpy as np

from quadriga.engine.blocks import BlockTable
from quadriga.engine.scheduler import Scheduler
from quadriga.errors import BusyError
from quadriga.kernels.pass_batch import PassBatch
from quadriga.quant.packed import BLOCK_TOKENS
from quadriga.runners.base import Floats, LayerRouting, PassResult, Runner


def score(
    runner: Runner, scheduler: Scheduler, token_ids: Sequence[int], chunk: int
) -> tuple[Floats, list[LayerRouting]]:
    """Logits (T, V) float32 of every position, and the routing per MoE layer, ``chunk`` tokens a pass.

    Raises:
        BusyError: the sequence does not fit into the free blocks.
    """
    logits, stats = [], []
    for result in _passes(runner, scheduler, token_ids, chunk):
        assert result.routing is not None, "it was asked for"
        logits.append(result.logits)
        stats.append(result.routing)
    names = [field.name for field in fields(LayerRouting)]
    merged = [
        LayerRouting(*(np.concatenate([getattr(s, name) for s in layer]) for name in names))
        for layer in zip(*stats, strict=True)
    ]
    return np.concatenate(logits), merged


def _passes(runner: Runner, scheduler: Scheduler, token_ids: Sequence[int], chunk: int) -> Iterator[PassResult]:
    """Run one sequence beside everything else, in blocks of its own: logits and routing of every pass."""
    n, states = len(token_ids), scheduler.states
    blocks = BlockTable(scheduler.pool, scheduler.windows)
    slot = None if states is None else states.take()
    try:
        if states is not None and slot is None:
            raise BusyError("no place is free for the states of one more sequence; ask again later")
        for start in range(0, n, chunk):
            stop = min(start + chunk, n)
            blocks.let_go(start)
            while len(blocks) * BLOCK_TOKENS < stop:
                if not blocks.extend():
                    raise BusyError(f"{n} tokens do not fit into the free part of the cache; ask again later")
            ints = (
                token_ids[start:stop],
                range(start, stop),
                (0, stop - start),
                blocks.rows,
                (0, len(blocks)),
                range(stop - start),
            )
            slots = () if slot is None else ((slot if start else -1,), (slot,))
            yield runner.forward(PassBatch(*(np.array(x, dtype=np.int32) for x in (*ints, *slots))), routing=True)
    finally:
        if states is not None and slot is not None:
            states.give(slot)
        blocks.cut(0)
