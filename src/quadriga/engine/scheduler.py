"""Which tokens the next pass computes: continuous batching with chunked prefill, values in, values out. Pure Python.

    add(sequence) ─► waiting ──admit──► running ──► schedule() ─► PassPlan of chunks ─► [the model] ─► commit(results)
                        ▲                  │
                        └─────preempt──────┘   blocks given back, tokens kept: it is computed again and goes on

A pass has a budget of tokens. Sequences that decode come first, one token each (more with a draft), so a long prompt
never stops the others; what is left goes to prompts, and to texts that are to be embedded, cut to fit.

**Whose turn it is.** Priority first; among equals clients take turns, and so do a client's requests (``engine.turns``).
Places and blocks are shared out the same way: while somebody waits who has two fewer running than another, the newest
of the one with the most gives way. A request for 128 answers, or a client with a thousand requests, so fills what
nobody else wants. The oldest sequence of all never gives way, so everything ends. What is computed in the background
gives way to whatever is not, of the same client too; one of it at a time does not (``engine.background``).

**What shares a pass.** With a :class:`Beside`, which knows what passes cost, only the *fluent* rows are in every pass:
those of whoever has asked for few answers (``engine.fluent``). The others, and prompts, come in as far as it allows.

**Recurrent layers** (``n_slots``) keep a state beside the blocks, at one position: a prefix is taken up only where one
was kept (``engine.states``), and a sequence whose guesses were wrong begins anew where the pass began, with tokens that
it knows by now.

Numbers never depend on how a sequence was cut or who ran beside it: that is the kernels' promise (batch invariance), so
this module may choose freely.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from quadriga.engine.background import Background
from quadriga.engine.blocks import BlockPool, BlockTable, chain_key
from quadriga.engine.fluent import Asked
from quadriga.engine.sequences import Chunk, PassPlan, Running
from quadriga.engine.states import StatePool
from quadriga.engine.turns import Turns
from quadriga.errors import ConfigError, RequestError
from quadriga.model.cache_layout import most_blocks
from quadriga.quant.packed import BLOCK_TOKENS

MOST_LOGIT_ROWS = 256
"""Tokens of a chunk of which every position's logits are wanted: (256, V) float32 is what the buffer grows to."""


class Beside(Protocol):
    """What may share a pass with fluent rows; ``engine.pace.Pace`` is one."""

    def room(self, n_fluent: int) -> tuple[int, int]:
        """(tokens of prompts, other rows) beside so many fluent rows; beside none, with others' prompts."""
        ...


class Scheduler:
    """See the module docstring.

    Args:
        n_blocks: blocks of the key/value cache.
        max_batch_tokens: tokens of one pass.
        max_sequences: sequences running at once.
        prefix_cache: whether finished prefixes are kept to be found again.
        windows: of every group of layers that has block tables of its own, how many positions a query sees; None: all.
            Blocks that a window has left behind are given back.
        beside: what may share a pass with fluent rows; None: everything that fits.
        n_slots: places for recurrent states; 0: the model has none. Half as many sequences run at once at most.

    Raises:
        ConfigError: max_sequences beyond max_batch_tokens (a pass could not give every sequence a token), or no block.
    """

    def __init__(
        self,
        n_blocks: int,
        *,
        max_batch_tokens: int = 2048,
        max_sequences: int = 64,
        prefix_cache: bool = True,
        windows: Sequence[int | None] = (None,),
        beside: Beside | None = None,
        n_slots: int = 0,
    ) -> None:
        if not 1 <= max_sequences <= max_batch_tokens:
            raise ConfigError(
                f"max_sequences must be from 1 to max_batch_tokens ({max_batch_tokens}), got {max_sequences}: every "
                "running sequence gets a token in every pass"
            )
        if n_blocks < len(windows):
            raise ConfigError(
                f"the cache needs at least one block of {BLOCK_TOKENS} tokens for each of its {len(windows)} groups of "
                f"layers, got {n_blocks}"
            )
        if n_slots == 1:
            raise ConfigError("a model with recurrent layers needs two slots for its states, got 1")
        self.pool = BlockPool(n_blocks)
        self.states = StatePool(n_slots) if n_slots else None
        if self.states is not None:
            max_sequences = min(max_sequences, self.states.n_places)
        self.max_batch_tokens, self.max_sequences = max_batch_tokens, max_sequences
        self.prefix_cache, self.windows, self.beside = prefix_cache, tuple(windows), beside
        self._windowed = any(window is not None for window in self.windows)
        self.running: list[Running] = []
        self.waiting: Turns[Running] = Turns(turn=max_batch_tokens)
        self.n_preemptions = 0
        self._arrivals = self._passes = 0
        self._rows_next = False
        self._alive: dict[int, Running] = {}
        self._asked = Asked()
        self._background = Background(self.waiting)

    def add(self, sequence: Running) -> None:
        """Queue a sequence.

        Raises:
            RequestError: it could not fit even alone.
        """
        needed = self._needed(sequence.max_tokens)
        if needed > self.pool.n_blocks:
            raise RequestError(
                f"prompt and answer of up to {sequence.max_tokens} tokens need {needed} blocks of {BLOCK_TOKENS}, the "
                f"cache has {self.pool.n_blocks}. Ask for fewer new tokens, or give the engine more cache memory."
            )
        sequence.blocks = BlockTable(self.pool, self.windows)
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._alive[sequence.request_id] = sequence
        self._asked.add(sequence)
        self._background.add(sequence)
        sequence.state = "waiting"
        self.waiting.add(sequence)

    def cancel(self, request_id: int) -> bool:
        """Drop a sequence wherever it is; its blocks are free at once. False if it is not here."""
        sequence = self._alive.get(request_id)
        if sequence is None:
            return False
        self._end(sequence)
        return True

    @property
    def has_work(self) -> bool:
        """True if any sequence is not finished."""
        return bool(self._alive)

    def schedule(self) -> PassPlan:
        """Choose the tokens of the next pass and take their blocks; empty only if there is no work but held rows."""
        self._background.lift(self.running, len(self._alive))
        chunks: dict[Running, Chunk] = {}
        rows, prompts = list[Running](), list[Running]()
        for sequence in sorted(self.running, key=lambda s: s.order):
            if not sequence.held:
                (rows if sequence.decodes else prompts).append(sequence)
        self._passes += 1
        if self.beside is None:
            self._fill(prompts, self._put_all(rows, self.max_batch_tokens, chunks), chunks)
            return PassPlan(tuple(chunks.values()))
        fluent = self._asked.fluent(rows)
        others = sorted((s for s in rows if s not in fluent), key=lambda s: s.last_pass)
        most = self.max_batch_tokens
        if len(self._alive) > 1 and (prompts or others or self.waiting):
            most, n_rows = self.beside.room(sum(1 + len(s.draft) for s in fluent))
            others = others[:n_rows]
        budget = self._put_all([s for s in rows if s in fluent], self.max_batch_tokens, chunks)
        # Prompts and other rows come into passes by turns, so that neither makes the other's pass longer.
        left = budget if others and self._rows_next else self._fill(prompts, min(budget, most), chunks)
        if left < min(budget, most):
            self._rows_next = True
        elif others:
            self._put_all(others, budget, chunks)
            self._rows_next = False
        if not chunks:  # the rows gave way, and there was no room beside them: now the others have the pass
            left = self._put_all([s for s in rows if s not in fluent], self.max_batch_tokens, chunks)
            self._fill([s for s in prompts if s.state == "running"], left, chunks)
        return self._plan(chunks, fluent)

    def _plan(self, chunks: dict[Running, Chunk], fluent: set[Running]) -> PassPlan:
        n_fluent = n_decode = 0
        for sequence, chunk in chunks.items():
            if sequence.decodes:
                n_decode += len(chunk.tokens)
                n_fluent += len(chunk.tokens) if sequence in fluent else 0
        return PassPlan(tuple(chunks.values()), n_fluent, n_decode)

    def hold(self, sequence: Running) -> None:
        """Keep a sequence out of passes: its next token is chosen elsewhere. After the commit of the pass."""
        if sequence.state == "running":
            sequence.held = True

    def resume(self, sequence: Running, new_tokens: Sequence[int], *, finished: bool) -> None:
        """A held sequence has its token; it goes on, or ends."""
        sequence.held = False
        sequence.tokens += new_tokens
        if finished:
            self._end(sequence)
        elif sequence.state == "parked":
            self._wait(sequence)

    def commit(self, plan: PassPlan, new_tokens: Mapping[int, Sequence[int]], finished: Collection[int]) -> None:
        """Record what a pass made.

        Args:
            new_tokens: request id -> tokens sampled for it: one, or one more than the drafts that were right.
            finished: request ids that are done; their blocks are released (full ones stay findable).
        """
        self.waiting.serve({c.sequence: len(c.tokens) for c in plan.chunks if c.sequence.state == "running"})
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence.state != "running":
                continue  # cancelled while the pass ran
            made = list(new_tokens.get(sequence.request_id, ())) if chunk.samples else []
            sequence.n_computed = chunk.start + len(chunk.tokens) - chunk.n_draft + max(0, len(made) - 1)
            sequence.tokens += made
            sequence.draft = []
            if self.states is not None:
                right = not chunk.n_draft or len(made) == chunk.n_draft + 1
                self.states.end(sequence, accepted=right)
                if not right:
                    sequence.n_computed = chunk.start
            self._publish(sequence)
            sequence.blocks.cut(max(1, -(-sequence.n_computed // BLOCK_TOKENS)))  # rejected drafts
            if self._windowed:
                sequence.blocks.let_go(sequence.n_computed)
            if sequence.request_id in finished:
                self._end(sequence)

    def check(self) -> None:
        """Assert that no block is lost and every reference has a holder."""
        held: dict[int, int] = {}
        for sequence in self.running:
            assert len(sequence.blocks) * BLOCK_TOKENS >= sequence.n_computed, "computed positions have blocks"
            for block in sequence.blocks:
                held[block] = held.get(block, 0) + 1
        waiting = list(self.waiting)
        parked = [s for s in self._alive.values() if s.state == "parked"]
        assert all(not len(sequence.blocks) and not sequence.n_computed for sequence in (*waiting, *parked))
        assert all(s.state == "waiting" for s in waiting) and all(s.state == "running" for s in self.running)
        assert len(waiting) == len(self.waiting)
        assert {*waiting, *parked, *self.running} == {*self._alive.values()}, "every sequence is in one place"
        self._asked.check([*self._alive.values()])
        self._background.check([*self._alive.values()])
        self.pool.check(held)
        if self.states is not None:
            self.states.check([*self.running])
            assert all((s.slot >= 0) == (s.n_computed > 0) for s in self.running), "what is computed has a state"

    # Inside ----------------------------------------------------------------------------------------------------------

    def _put_all(self, rows: Sequence[Running], budget: int, chunks: dict[Running, Chunk]) -> int:
        """Put rows into the pass; what is left of the budget."""
        for sequence in rows:
            if sequence.state == "running" and budget > 0:  # it may have been preempted for one before it
                budget -= self._put(sequence, budget, chunks)
        return budget

    def _put(self, sequence: Running, budget: int, chunks: dict[Running, Chunk]) -> int:
        """Put a running sequence's next chunk into the pass; how many tokens it has, 0 if it had to give way."""
        chunk = self._chunk(sequence, budget, chunks)
        if chunk is None:
            return 0
        chunks[sequence] = chunk
        sequence.last_pass = self._passes
        return len(chunk.tokens)

    def _fill(self, prompts: list[Running], budget: int, chunks: dict[Running, Chunk]) -> int:
        """Give the budget to running and waiting prompts, in turn; what is left of it."""
        if not prompts and not self.waiting:
            return budget
        turn = self.waiting.turn_of
        queue = sorted(prompts, key=turn, reverse=True)
        blocked = False
        while budget > 0:
            first = None if blocked or not self.waiting else self.waiting.first()
            if first is not None and (not queue or turn(first) < turn(queue[-1])):
                first = first if self._make_room(first, chunks) else self._instead(chunks)
                blocked = first is None
                if first is not None:
                    self._admit(first)
                    budget -= self._put(first, budget, chunks)
                    blocked = first not in chunks  # there was no block for it
            elif queue:
                sequence = queue.pop()
                if sequence.state == "running":
                    budget -= self._put(sequence, budget, chunks)
            else:
                break
        return budget

    def _chunk(self, sequence: Running, budget: int, chunks: dict[Running, Chunk]) -> Chunk | None:
        """The sequence's next chunk within the budget, or None if it lost its own blocks."""
        pending = sequence.n_pending
        draft = sequence.draft if pending == 1 else []
        room = sequence.max_tokens - len(sequence.tokens) - 1  # a draft may not reach beyond the last token
        n = min(pending + max(0, min(len(draft), room)), budget)
        if sequence.all_logits:
            n = min(n, MOST_LOGIT_ROWS)
        if self.states is not None:
            n = min(n, self._until_kept(sequence))
        wanted = sequence.n_computed + n
        while len(sequence.blocks) * BLOCK_TOKENS < wanted:
            if sequence.blocks.extend():
                continue
            have = len(sequence.blocks) * BLOCK_TOKENS - sequence.n_computed
            if have >= 1 and n > pending:
                n = min(pending, have)  # do without the guesses before taking blocks from others
                wanted = sequence.n_computed + n
                continue
            victim = self._first_to_give_way(self.running)
            if have >= 1 and (victim is sequence or self._windowed):
                n = have  # the first to give way takes what it has and goes on later; so do windows, which give back
                break
            self._preempt(victim, chunks)
            if victim is sequence:
                return None
        start = sequence.n_computed
        n_draft = max(0, n - pending)
        known = (*sequence.tokens[start : start + n], *draft[:n_draft])
        if self.states is not None:
            self.states.begin(sequence, guesses=n_draft > 0)
        slots = (sequence.slot, sequence.next_slot)
        return Chunk(sequence, start, known, n_draft, n >= pending and not sequence.embeds, *slots)

    def _until_kept(self, sequence: Running) -> int:
        """Tokens up to the next position of a prompt at which its state is to be kept."""
        start, last = sequence.n_computed, (sequence.n_prompt - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        if not self.prefix_cache or sequence.embeds:
            return self.max_batch_tokens
        return min((at - start for at in (sequence.n_shared, last) if at > start), default=self.max_batch_tokens)

    def _first_to_give_way(self, sequences: Iterable[Running]) -> Running:
        """Of the lowest priority, the newest of the request with the most of the client with the most."""
        clients = Counter(s.client for s in self.running)
        groups = Counter((s.client, s.group) for s in self.running)
        return max(sequences, key=lambda s: (-s.priority, clients[s.client], groups[s.client, s.group], s.arrival))

    def _above(self, sequence: Running) -> list[Running]:
        """Running sequences that would have more than the waiting one's client (or request) even after giving way, and
        those of the background."""
        behind = [] if sequence.in_background else [s for s in self.running if s.in_background]
        return behind + self._richer(sequence)

    def _richer(self, sequence: Running) -> list[Running]:
        mine = [s for s in self.running if s.client == sequence.client]
        clients = Counter(s.client for s in self.running)
        groups = Counter(s.group for s in mine)
        rivals = [
            s for s in self.running if s.priority <= sequence.priority and s.in_background == sequence.in_background
        ]
        above = [s for s in rivals if s.client != sequence.client and clients[s.client] >= len(mine) + 2]
        if above:
            return above
        few = groups[sequence.group] + 2
        return [
            s for s in rivals if s.client == sequence.client and s.group != sequence.group and groups[s.group] >= few
        ]

    def _make_room(self, sequence: Running, chunks: dict[Running, Chunk]) -> bool:
        """A place and blocks for the first of the waiting, from those who have more if there is no other way."""
        needed = self._needed(len(sequence.tokens))
        while len(self.running) >= self.max_sequences or (self.running and self.pool.n_free < needed):
            above = self._above(sequence)
            if not above or self.pool.n_free + sum(s.blocks.n_held for s in above) < needed:
                return False  # admitted now, it would only be preempted by those before it
            self._preempt(self._first_to_give_way(above), chunks)
        return True

    def _instead(self, chunks: dict[Running, Chunk]) -> Running | None:
        """Who may go before the next in line, which finds no room: one whose room comes from those who have more."""
        groups = Counter((s.client, s.group) for s in self.running)
        if max(groups.values(), default=0) < 2 and self.waiting.n_clients < 2:
            return None  # nobody has more than anybody else
        sequence = self.waiting.neediest()
        full = len(self.running) >= self.max_sequences or self.pool.n_free < self._needed(len(sequence.tokens))
        return sequence if full and self._make_room(sequence, chunks) else None

    def _admit(self, sequence: Running) -> None:
        """Move one of the waiting to the running, with the blocks of the prefix that is known already."""
        self.waiting.take(sequence)
        sequence.state = "running"
        self.running.append(sequence)
        usable = (len(sequence.tokens) - 1) // BLOCK_TOKENS
        if sequence.all_logits or sequence.embeds or not self.prefix_cache:
            usable = 0

        def keys() -> Iterator[bytes]:
            parent = b""
            for index in range(usable):
                tokens = sequence.tokens[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
                yield (parent := chain_key(parent, tokens, sequence.salt))

        sequence.keys = sequence.blocks.find(keys())
        if self.states is not None:
            sequence.n_shared = len(sequence.keys) * BLOCK_TOKENS
            n, sequence.slot = self.states.find(sequence.keys)
            sequence.blocks.cut(n)
            del sequence.keys[n:]
        sequence.n_computed = len(sequence.blocks) * BLOCK_TOKENS
        if not sequence.n_preempted:
            sequence.n_cached = sequence.n_computed

    def _needed(self, n_positions: int) -> int:
        """Blocks without which a sequence of so many positions cannot go on, of all groups."""
        columns = -(-n_positions // BLOCK_TOKENS)
        return sum(min(columns, most_blocks(window, n_positions)) for window in self.windows)

    def _publish(self, sequence: Running) -> None:
        if not self.prefix_cache or sequence.embeds:
            return
        while (len(sequence.keys) + 1) * BLOCK_TOKENS <= sequence.n_computed:
            index = len(sequence.keys)
            parent = sequence.keys[-1] if sequence.keys else b""
            tokens = sequence.tokens[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
            sequence.keys.append(chain_key(parent, tokens, sequence.salt))
            sequence.blocks.publish(index, sequence.keys[-1])
        at = sequence.n_computed
        if self.states is not None and at and at == len(sequence.keys) * BLOCK_TOKENS:
            self.states.keep(sequence, sequence.keys[-1], of_answer=at > sequence.n_prompt)

    def _preempt(self, sequence: Running, chunks: dict[Running, Chunk]) -> None:
        chunks.pop(sequence, None)
        self.running.remove(sequence)
        self._release(sequence)
        sequence.n_preempted += 1
        self.n_preemptions += 1
        if sequence.held:
            sequence.state = "parked"
        else:
            self._wait(sequence)

    def _wait(self, sequence: Running) -> None:
        """Back to the waiting."""
        sequence.state = "waiting"
        self.waiting.add(sequence)

    def _end(self, sequence: Running) -> None:
        """It is finished or dropped."""
        if sequence.state == "running":
            self.running.remove(sequence)
        elif sequence.state == "waiting":
            self.waiting.take(sequence)
        self._release(sequence)
        self.waiting.done(sequence)
        sequence.state = "done"
        del self._alive[sequence.request_id]
        self._asked.end(sequence)
        self._background.end(sequence)

    def _release(self, sequence: Running) -> None:
        if self.states is not None:
            self.states.release(sequence)
        sequence.blocks.cut(0)
        sequence.keys, sequence.n_computed, sequence.draft = [], 0, []
