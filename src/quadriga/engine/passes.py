"""A pass on the way in and on the way out: a plan as the arrays that the runner takes, and what it computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import numpy as np

from quadriga.engine.request import Routing, TokenEvent
from quadriga.engine.sequences import PassPlan
from quadriga.engine.steering import steering_of
from quadriga.kernels.pass_batch import PassBatch
from quadriga.runners.base import LayerRouting, PassResult, Runner


def build_batch(plan: PassPlan) -> tuple[PassBatch, list[int]]:
    """A plan as arrays, and the index of every chunk's first wanted row among the rows of logits."""
    tokens: list[int] = []
    positions: list[int] = []
    starts, table_starts = [0], [0]
    tables = [list[int]() for _ in plan.chunks[0].sequence.blocks.rows]
    rows: list[int] = []
    first_rows: list[int] = []
    steers = False
    for chunk in plan.chunks:
        n = len(chunk.tokens)
        steers |= chunk.sequence.steering is not None
        first_rows.append(len(rows))
        if chunk.sequence.all_logits:
            rows.extend(range(len(tokens), len(tokens) + n))
        elif chunk.samples:
            rows.extend(range(len(tokens) + n - 1 - chunk.n_draft, len(tokens) + n))
        tokens.extend(chunk.tokens)
        positions.extend(range(chunk.start, chunk.start + n))
        starts.append(len(tokens))
        for table, row in zip(tables, chunk.sequence.blocks.rows, strict=True):
            table.extend(row)
        table_starts.append(len(tables[0]))
    ints: list[object] = [tokens, positions, starts, tables, table_starts, rows]
    if plan.chunks[0].after >= 0:  # all sequences of a model have slots, or none has
        ints += [[chunk.before for chunk in plan.chunks], [chunk.after for chunk in plan.chunks]]
    steering = steered = None
    if steers:
        steering, steered = steering_of([(chunk.sequence.steering, len(chunk.tokens)) for chunk in plan.chunks])
    arrays = [np.array(x, dtype=np.int32) for x in ints]
    return PassBatch(*arrays, steering=steering, steered=steered), first_rows


class Computed:
    """What a pass has computed: logits (R, V), and the routing."""

    def __init__(self, batch: PassBatch, result: PassResult, runner: Runner) -> None:
        self._batch, self._routing, self._runner = batch, result.routing, runner
        self.logits = result.logits

    @cached_property
    def _stats(self) -> tuple[list[int], list[float]]:
        return self._runner.row_stats(self.logits)

    @property
    def best(self) -> list[int]:
        """Of every row the most probable token."""
        return self._stats[0]

    @property
    def log_sums(self) -> list[float]:
        """Of every row log(sum(exp))."""
        return self._stats[1]

    def with_routing(self, event: TokenEvent, row: int) -> TokenEvent:
        """The event with the experts that predicted it."""
        return self.routing_into(row)(event)

    def routing_into(self, row: int) -> Callable[[TokenEvent], TokenEvent]:
        """Puts the experts that predicted a row's token into its event, also after the pass."""
        assert self._routing is not None, "asked for where a request wants it"
        token = int(self._batch.rows[row])
        routing, entropy = _routing_of(self._routing, token), _entropy_of(self._routing, token)
        return lambda event: replace(event, routing=routing, router_entropy=entropy)


def _routing_of(stats: list[LayerRouting], token: int) -> Routing:
    """One position's experts in every layer, heaviest first."""
    layers = []
    for layer in stats:
        pairs = zip(layer.expert_ids[token].tolist(), layer.expert_weights[token].tolist(), strict=True)
        layers.append(tuple(sorted(pairs, key=lambda pair: -pair[1])))
    return tuple(layers)


def _entropy_of(stats: list[LayerRouting], token: int) -> tuple[float, ...]:
    """One position's router entropies, each as a part of the largest possible, ln(E)."""
    if not stats:
        return ()
    entropies = []
    for layer in stats:
        probs, n_experts = layer.probs[token].astype(np.float64), layer.probs.shape[-1]
        entropy = -float((probs * np.log(np.maximum(probs, 1e-300))).sum())
        entropies.append(min(1.0, max(0.0, entropy / math.log(n_experts))) if n_experts > 1 else 0.0)
    return tuple(entropies)
