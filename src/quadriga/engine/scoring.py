"""Log-probabilities of many continuations, each shared prefix computed once.

    5 shots | question 1 | A             5 shots ─┬─ question 1 ─┬─ A
    5 shots | question 1 | B      ──►             │              └─ B
    5 shots | question 2 | A                      └─ question 2 ─── A
                                          first wave: contexts │ second wave: continuations

First the distinct contexts, sorted by their tokens: what one shares with any earlier one it shares with the one before
it, so the key/value blocks of the common prefix are kept and only the rest is computed. One pass packs the new tokens
of many contexts; a later one may read blocks that an earlier one fills in the same pass, because every layer stores all
keys and values before it attends. A context's last row answers for the first token of all its continuations. Then the
continuations' other tokens, each in blocks of its own that begin as a copy of the context's last, half-filled one.

So a question's four choices cost one context and four endings, a one-letter choice costs nothing, the head runs only
where a probability is wanted, nothing is padded, and as the kernels are batch invariant nothing depends on the packing.

Where a model has recurrent layers, what contexts share needs their state at its end too: the first of them is cut
there, and the state stays in a slot that the others begin from. A pass never reads a state that it writes itself.

This is not :meth:`Engine.score`, which returns one sequence's whole logits, nor the prefix cache, which serves requests
that come one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from quadriga.engine.engine import Engine
from quadriga.errors import RequestError
from quadriga.kernels.pass_batch import PassBatch
from quadriga.quant.packed import BLOCK_TOKENS

Ids = Sequence[int]
Column = tuple[int, ...]
"""The blocks of 16 positions, one for each group of layers. Nothing is let go before a context is done with."""

Done = Callable[[int], None]
"""Called with the number of requests that have just been scored."""

PASS_TOKENS = 1024
"""Tokens of a pass; SmolLM2 scored no faster with 512 or 2048."""

MOST_KEPT = 4
"""Recurrent states kept along the path to a context: where it parted from those after it."""

MOST_ROWS = 512
"""Rows of logits of a pass: the buffer is (512, V) float32."""


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
    if not requests:
        return []
    members: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(requests):
        _check(engine, context, continuation)
        members.setdefault(tuple(context), []).append(i)
    scorer = _Scorer(engine, [continuation for _, continuation in requests], done)
    try:
        contexts = sorted(members)
        for context, following in zip(contexts, [*contexts[1:], ()], strict=True):
            scorer.add(context, members[context], _common(context, following))
        scorer.finish_group()
    finally:
        scorer.close()
    return scorer.results()


def _check(engine: Engine, context: Ids, continuation: Ids) -> None:
    if not context or not continuation:
        raise RequestError("a context and a continuation need at least one token each")
    low, high = min(*context, *continuation), max(*context, *continuation)
    if low < 0 or high >= engine.config.vocab_size:
        raise RequestError(f"token ids must be from 0 to {engine.config.vocab_size - 1}, got {low} to {high}")
    n = len(context) + len(continuation)
    if n > engine.config.max_seq_len + 1:
        raise RequestError(
            f"context and continuation have {n} tokens; a model with a context of {engine.config.max_seq_len} scores "
            f"at most {engine.config.max_seq_len + 1}, as the last one is not read. Shorten the context."
        )


@dataclass(frozen=True)
class _Piece:
    """New tokens of one sequence in the pass that is being filled."""

    start: int
    tokens: tuple[int, ...]
    blocks: list[Column]
    before: int
    """Slot of the recurrent states before it; -1: none."""
    after: int


@dataclass(frozen=True)
class _Stem:
    """A context of the present group, and who continues it."""

    length: int
    blocks: list[Column]
    members: list[int]
    slot: int
    """Of the recurrent states behind it; -1: the model has none."""


class _Scorer:
    """The path to the present context, the group of contexts kept in the cache, and the pass that is being filled."""

    def __init__(self, engine: Engine, continuations: Sequence[Ids], done: Done) -> None:
        self._runner, self._pool, self._states = engine.runner, engine.scheduler.pool, engine.scheduler.states
        self._slots: set[int] = set()  # all that are taken
        self._kept: list[tuple[int, int]] = []  # (position, slot of the states there), along the path
        self._n_groups = len(engine.scheduler.windows)
        self._continuations, self._done = continuations, done
        self._logprobs: list[list[float]] = [[] for _ in continuations]
        self._greedy = [True] * len(continuations)
        self._reserve = max(map(len, continuations), default=0) // BLOCK_TOKENS + 2
        self._path: tuple[int, ...] = ()
        self._blocks: list[Column] = []  # of the path
        self._stems: list[_Stem] = []
        self._retired: list[Column] = []  # off the path, but the group's continuations read them
        self._own: list[Column] = []  # of the continuation that is being put into passes
        self._group_tokens = 0
        self._new_pass()

    def _new_pass(self) -> None:
        self._pieces: list[_Piece] = []
        self._n_tokens = 0
        self._rows: list[int] = []
        self._asked: list[list[tuple[int, int]]] = []  # per row: (request, the token whose probability is wanted)
        self._copies: list[tuple[int, int]] = []
        self._passing: list[Column] = []  # blocks that are free after this pass
        self._passing_slots: list[int] = []
        self._written: set[int] = set()  # slots that this pass writes

    # First wave ------------------------------------------------------------------------------------------------------

    def add(self, context: tuple[int, ...], members: list[int], n_shared: int) -> None:
        """Take the next context, in sorted order; its first ``n_shared`` tokens are the next one's too."""
        if self._group_tokens >= PASS_TOKENS:
            self.finish_group()
        last = len(context) - 1
        keep = min(_common(context, self._path), last) // BLOCK_TOKENS
        before, ends = -1, [(len(context), -1)]
        if self._states is not None:
            keep, before, ends = self._parts(context, keep, n_shared)
        self._retired += self._blocks[keep:]
        del self._blocks[keep:]
        self._path = context
        if self._pool.n_free < self._n_groups * (-(-len(context) // BLOCK_TOKENS) - keep + self._reserve):
            self.finish_group()  # any continuation must find room after its context
        at = keep * BLOCK_TOKENS
        self._group_tokens += len(context) - at
        for end, slot in ends:
            while at < end:
                if self._n_tokens >= PASS_TOKENS or len(self._rows) >= MOST_ROWS or before in self._written:
                    self._flush()
                stop = min(end, at + PASS_TOKENS - self._n_tokens)
                while len(self._blocks) * BLOCK_TOKENS < stop:
                    self._blocks.append(self._block(stop, self.finish_group))
                asks = [[(i, self._continuations[i][0]) for i in members]] if stop == len(context) else []
                self._put(_Piece(at, context[at:stop], list(self._blocks), before, slot), asks)
                at, before = stop, slot
        self._stems.append(_Stem(len(context), list(self._blocks), members, ends[-1][1]))

    def _parts(self, context: tuple[int, ...], keep: int, n_shared: int) -> tuple[int, int, list[tuple[int, int]]]:
        """How many blocks of the path stay, the slot to begin from, and (end, slot for its states) of each part."""
        assert self._states is not None, "a model with recurrent layers"
        own = self._slot(self.finish_group)
        while self._kept and self._kept[-1][0] > keep * BLOCK_TOKENS:
            self._passing_slots.append(self._kept.pop()[1])
        at, before = self._kept[-1] if self._kept else (0, -1)
        cut = min(n_shared, len(context) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        ends = [(len(context), own)]
        if cut > at and len(self._kept) < MOST_KEPT and self._states.n_free > 2:
            self._kept.append((cut, self._slot(self._flush)))
            ends.insert(0, self._kept[-1])
        return at // BLOCK_TOKENS, before, ends

    # Second wave -----------------------------------------------------------------------------------------------------

    def finish_group(self) -> None:
        """Run the contexts taken so far, then their continuations, and let their blocks go."""
        self._flush()
        for stem in self._stems:
            for i in stem.members:
                if len(self._continuations[i]) > 1:
                    self._continue(stem, i)
        self._flush()
        self._release(self._retired)
        for stem in self._stems:
            self._give(stem.slot)
        self._stems, self._retired, self._group_tokens = [], [], 0

    def _continue(self, stem: _Stem, request: int) -> None:
        ids = tuple(self._continuations[request])
        tokens, n_shared = ids[:-1], stem.length // BLOCK_TOKENS
        at, end = 0, stem.length + len(ids) - 1
        own = self._own = list[Column]()
        slot = -1 if self._states is None else self._slot(self._flush)
        before = stem.slot
        while at < len(tokens):
            if self._n_tokens >= PASS_TOKENS or len(self._rows) >= MOST_ROWS:
                self._flush()
            n = min(len(tokens) - at, PASS_TOKENS - self._n_tokens, MOST_ROWS - len(self._rows))
            while (n_shared + len(own)) * BLOCK_TOKENS < stem.length + at + n:
                own.append(self._block(end, self._flush))
                if len(own) == 1 and stem.length % BLOCK_TOKENS:
                    self._copies += zip(stem.blocks[n_shared], own[0], strict=True)
            piece = _Piece(stem.length + at, tokens[at : at + n], stem.blocks[:n_shared] + own, before, slot)
            self._put(piece, [[(request, ids[at + 1 + j])] for j in range(n)])
            at, before = at + n, slot
        self._passing += own
        self._passing_slots.append(slot)
        self._own = []

    # A pass ----------------------------------------------------------------------------------------------------------

    def _put(self, piece: _Piece, asks: list[list[tuple[int, int]]]) -> None:
        """Add a piece to the pass; its last ``len(asks)`` rows are wanted."""
        self._pieces.append(piece)
        if piece.after >= 0:
            self._written.add(piece.after)
        self._n_tokens += len(piece.tokens)
        self._rows += range(self._n_tokens - len(asks), self._n_tokens)
        self._asked += asks

    def _flush(self) -> None:
        """Run the pass."""
        if self._copies:
            self._runner.copy_blocks(self._copies)
        if self._pieces:
            logits = self._runner.forward(self._batch()).logits
            best, log_sums = self._runner.row_stats(logits) if self._rows else ([], [])
            finished = 0
            for row, asks in enumerate(self._asked):
                for request, token in asks:
                    self._logprobs[request].append(float(logits[row, token]) - log_sums[row])
                    self._greedy[request] &= best[row] == token
                    finished += len(self._logprobs[request]) == len(self._continuations[request])
            self._done(finished)
        self._release(self._passing)
        for slot in self._passing_slots:
            self._give(slot)
        self._new_pass()

    def _slot(self, make_room: Callable[[], None]) -> int:
        """A slot for recurrent states."""
        assert self._states is not None, "a model with recurrent layers"
        slot = self._states.take()
        if slot is None:
            make_room()
            slot = self._states.take()
        if slot is None:
            raise RequestError(
                "no slot is free for the states of one more sequence. Give the engine more cache memory (kv_memory), "
                "or ask again when its other requests are done."
            )
        self._slots.add(slot)
        return slot

    def _give(self, slot: int) -> None:
        if self._states is not None and slot in self._slots:
            self._slots.remove(slot)
            self._states.give(slot)

    def _block(self, n_positions: int, make_room: Callable[[], None]) -> Column:
        if self._pool.n_free < self._n_groups:
            make_room()
        if self._pool.n_free < self._n_groups:
            raise RequestError(
                f"{n_positions} tokens do not fit into the free part of the cache. Give the engine more of it "
                "(kv_memory), or ask again when its other requests are done."
            )
        blocks = [self._pool.allocate() for _ in range(self._n_groups)]
        return tuple(block for block in blocks if block is not None)

    def _release(self, columns: Iterable[Column]) -> None:
        for column in columns:
            for block in column:
                self._pool.release(block)

    def _batch(self) -> PassBatch:
        tokens: list[int] = []
        positions: list[int] = []
        tables: list[Column] = []
        starts, table_starts = [0], [0]
        for piece in self._pieces:
            end = piece.start + len(piece.tokens)
            tokens += piece.tokens
            positions += range(piece.start, end)
            tables += piece.blocks[: -(-end // BLOCK_TOKENS)]
            starts.append(len(tokens))
            table_starts.append(len(tables))
        ints: list[object] = [tokens, positions, starts, [*zip(*tables, strict=True)], table_starts, self._rows]
        if self._states is not None:
            ints += [[piece.before for piece in self._pieces], [piece.after for piece in self._pieces]]
        return PassBatch(*(np.array(x, dtype=np.int32) for x in ints))

    def close(self) -> None:
        """Give every block and slot back."""
        for slot in list(self._slots):
            self._give(slot)
        self._release((*self._passing, *self._own, *self._retired, *self._blocks))
        self._passing, self._own, self._retired, self._blocks = [], [], [], []

    def results(self) -> list[Scored]:
        """In the order of the requests."""
        return [Scored(tuple(p), g) for p, g in zip(self._logprobs, self._greedy, strict=True)]


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common prefix, to the block: what lies beyond one is not asked for."""
    n, at = min(len(a), len(b)), 0
    while at + BLOCK_TOKENS <= n and a[at : at + BLOCK_TOKENS] == b[at : at + BLOCK_TOKENS]:
        at += BLOCK_TOKENS
    return at
