"""Log-probabilities of many continuations, each shared prefix computed once.

    5 shots | question 1 | A            5 shots ─┬─ question 1 ─┬─ A
    5 shots | question 1 | B     ──►             │              └─ B        sorted by tokens, a walk over this tree
    5 shots | question 2 | A                     └─ question 2 ─── A

Sequences are sorted by their tokens, so whatever one shares with any earlier one it shares with the one before it: the
key/value blocks of the common prefix are kept and only the rest is computed. One pass packs the new tokens of many
sequences; a later one may read blocks that an earlier one fills in the same pass, because every layer stores all keys
and values before it attends. Blocks hold 16 positions, so up to 15 shared tokens are computed again. The head runs only
where a log-probability is wanted. Nothing is padded, and as the kernels are batch invariant nothing depends on how
sequences are packed.

This is not :meth:`Engine.score`, which returns one sequence's whole logits, nor the prefix cache, which serves requests
that come one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from quadriga.engine.blocks import BLOCK_TOKENS
from quadriga.engine.engine import Engine
from quadriga.errors import RequestError
from quadriga.ops.program import Batch

Ids = Sequence[int]
Done = Callable[[int], None]
"""Called with the number of requests that have just been scored."""

PASS_TOKENS = 1024
"""Tokens of a pass; SmolLM2 scored no faster with 2048."""

MOST_ROWS = 256
"""Rows of logits of a pass: the buffer is (256, V) float32."""


@dataclass(frozen=True)
class Scored:
    """How probable one continuation was."""

    logprobs: tuple[float, ...]
    """Natural-log probability of each of its tokens."""
    greedy: bool
    """Every token was the most probable one."""

    @property
    def logprob(self) -> float:
        """Of the whole continuation."""
        return sum(self.logprobs)

    @property
    def n_tokens(self) -> int:
        """Tokens of the continuation."""
        return len(self.logprobs)


def score(engine: Engine, requests: Sequence[tuple[Ids, Ids]], *, done: Done = lambda n: None) -> list[Scored]:
    """Score continuations after contexts, beside whatever else the engine holds.

    Args:
        requests: (context ids, continuation ids), neither empty.
        done: progress.

    Raises:
        RequestError: an empty side, ids outside the vocabulary, a pair longer than the model's context, or no room in
            the key/value cache for the longest one.
    """
    for context, continuation in requests:
        _check(engine, context, continuation)
    paths = [(*context, *continuation[:-1]) for context, continuation in requests]
    walk = _Walk(engine, requests, done)
    try:
        for i in sorted(range(len(paths)), key=paths.__getitem__):
            walk.add(i, paths[i])
        walk.flush()
    finally:
        walk.close()
    return walk.results()


def _check(engine: Engine, context: Ids, continuation: Ids) -> None:
    if not context or not continuation:
        raise RequestError("a context and a continuation need at least one token each")
    low, high = min(*context, *continuation), max(*context, *continuation)
    if low < 0 or high >= engine.config.vocab_size:
        raise RequestError(f"token ids must be from 0 to {engine.config.vocab_size - 1}, got {low} to {high}")
    n = len(context) + len(continuation) - 1
    if n > engine.config.max_seq_len:
        raise RequestError(
            f"context and continuation have {n + 1} tokens; a model with a context of {engine.config.max_seq_len} "
            f"scores at most {engine.config.max_seq_len + 1}. Shorten the context."
        )


@dataclass
class _Piece:
    """New tokens of one sequence in the pass that is being filled."""

    start: int
    tokens: tuple[int, ...]
    blocks: list[int]


class _Walk:
    """The walk over the tree: the current path's blocks, and the pass that is being filled."""

    def __init__(self, engine: Engine, requests: Sequence[tuple[Ids, Ids]], done: Done) -> None:
        self._runner, self._pool = engine.runner, engine.scheduler.pool
        self._requests, self._done = requests, done
        self._logprobs: list[list[float]] = [[] for _ in requests]
        self._greedy = [True] * len(requests)
        self._path: tuple[int, ...] = ()
        self._blocks: list[int] = []
        self._retired: list[int] = []  # no longer on the path, but the pass that is being filled reads them
        self._pieces: list[_Piece] = []
        self._n_tokens = 0
        self._rows: list[int] = []
        self._wanted: list[list[tuple[int, int]]] = []  # per row: (request, the token whose probability is asked)

    def add(self, request: int, path: tuple[int, ...]) -> None:
        """Put the next sequence, in sorted order, into the pass."""
        context, continuation = self._requests[request]
        first = len(context) - 1  # the position that predicts the continuation's first token
        if path == self._path and len(continuation) == 1 and self._rows and self._last_row_is(path):
            self._wanted[-1].append((request, continuation[0]))
            return
        keep = min(_common(path, self._path), first) // BLOCK_TOKENS
        self._retired += self._blocks[keep:]
        del self._blocks[keep:]
        self._path = path
        at, wanted = keep * BLOCK_TOKENS, dict(zip(range(first, len(path)), continuation, strict=True))
        while at < len(path):
            if self._n_tokens >= PASS_TOKENS or len(self._rows) >= MOST_ROWS:
                self.flush()
            n = min(len(path) - at, PASS_TOKENS - self._n_tokens)
            rows_before = max(0, first - at)
            n = min(n, rows_before + MOST_ROWS - len(self._rows))
            self._room_for(at + n)
            offset = self._n_tokens
            self._pieces.append(_Piece(at, path[at : at + n], list(self._blocks)))
            self._n_tokens += n
            for position in range(max(at, first), at + n):
                self._rows.append(offset + position - at)
                self._wanted.append([(request, wanted[position])])
            at += n

    def flush(self) -> None:
        """Run the pass that has been filled."""
        if self._pieces:
            logits = self._runner.forward(self._batch())
            best, log_sums = self._runner.row_stats(logits)
            finished = 0
            for row, asked in enumerate(self._wanted):
                for request, token in asked:
                    self._logprobs[request].append(float(logits[row, token]) - log_sums[row])
                    self._greedy[request] &= best[row] == token
                    finished += len(self._logprobs[request]) == len(self._requests[request][1])
            self._done(finished)
        for block in self._retired:
            self._pool.release(block)
        self._retired, self._pieces, self._n_tokens, self._rows, self._wanted = [], [], 0, [], []

    def close(self) -> None:
        """Give every block back."""
        for block in (*self._retired, *self._blocks):
            self._pool.release(block)
        self._retired, self._blocks = [], []

    def results(self) -> list[Scored]:
        """In the order of the requests."""
        return [Scored(tuple(p), g) for p, g in zip(self._logprobs, self._greedy, strict=True)]

    def _last_row_is(self, path: tuple[int, ...]) -> bool:
        """True if the pass's last row is the path's last position, so that its logits can answer once more."""
        return self._rows[-1] == self._n_tokens - 1 and bool(self._pieces) and len(path) == self._end()

    def _end(self) -> int:
        piece = self._pieces[-1]
        return piece.start + len(piece.tokens)

    def _room_for(self, n_positions: int) -> None:
        """Take blocks for the path's first ``n_positions``."""
        while len(self._blocks) * BLOCK_TOKENS < n_positions:
            block = self._pool.allocate()
            if block is None and self._pieces:
                self.flush()
                block = self._pool.allocate()
            if block is None:
                raise RequestError(
                    f"{n_positions} tokens do not fit into the free part of the cache. Give the engine more of it "
                    "(kv_memory), or ask again when its other requests are done."
                )
            self._blocks.append(block)

    def _batch(self) -> Batch:
        tokens: list[int] = []
        positions: list[int] = []
        tables: list[int] = []
        starts, table_starts = [0], [0]
        for piece in self._pieces:
            end = piece.start + len(piece.tokens)
            tokens += piece.tokens
            positions += range(piece.start, end)
            tables += piece.blocks[: -(-end // BLOCK_TOKENS)]
            starts.append(len(tokens))
            table_starts.append(len(tables))
        ints = (tokens, positions, starts, tables, table_starts, self._rows)
        return Batch(*(np.array(x, dtype=np.int32) for x in ints))


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    low, high = 0, n
    while high - low > 1:  # a[:low] == b[:low], a[:high] != b[:high]
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
