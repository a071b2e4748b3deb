"""Which tokens the next pass computes: continuous batching with chunked prefill, values in, values out. Pure Python.

    add(sequence) ─► waiting ──admit──► running ──► schedule() ─► Batch of chunks ─► [the model] ─► commit(results)
                        ▲                  │
                        └─────preempt──────┘   blocks given back, tokens kept: it is computed again and goes on

A pass has a budget of tokens. Sequences that decode come first, one token each (more with a draft), so a long prompt
never stops the others; what is left goes to prompts, oldest first, cut to fit. Priority orders admission; within one
priority it is first come, first served, and a sequence that must give up its blocks is always one that came later.
Numbers never depend on how a sequence was cut or who ran beside it: that is the kernels' promise (batch invariance), so
this module may choose freely.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from quadriga.engine.blocks import BLOCK_TOKENS, BlockPool, chain_key
from quadriga.errors import ConfigError, RequestError

MOST_LOGIT_ROWS = 256
"""Tokens of a chunk of which every position's logits are wanted: (256, V) float32 is what the buffer grows to."""


@dataclass(eq=False)
class Running:
    """One sequence as the scheduler sees it."""

    request_id: int
    tokens: list[int]
    """Prompt and answer so far."""
    max_tokens: int
    """Longest that ``tokens`` may become."""
    priority: int = 0
    """Higher goes first."""
    salt: bytes = b""
    """Prefixes are shared among sequences of equal salt only."""
    adapter: int = 0
    """Number of the adapter its tokens run with; 0: none."""
    all_logits: bool = False
    """Every prompt position's logits are wanted, so nothing of it is taken from the prefix cache."""
    draft: list[int] = field(default_factory=list)
    """Guesses at the tokens that follow; checked in the next pass."""
    n_computed: int = 0
    """Positions whose keys and values are stored."""
    n_cached: int = 0
    """Prompt positions that were found in the prefix cache."""
    n_preempted: int = 0
    arrival: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    """Keys of the full blocks published so far."""

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)

    @property
    def order(self) -> tuple[int, int]:
        """Smaller is served first."""
        return (-self.priority, self.arrival)


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence in a pass."""

    sequence: Running
    start: int
    """Position of the first."""
    tokens: tuple[int, ...]
    n_draft: int
    """How many of the last are guesses."""
    samples: bool
    """The chunk ends at the sequence's last token (and its drafts): new tokens come from it."""


@dataclass(frozen=True)
class Plan:
    """What one pass computes."""

    chunks: tuple[Chunk, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens of the pass."""
        return sum(len(chunk.tokens) for chunk in self.chunks)


class Scheduler:
    """See the module docstring.

    Args:
        n_blocks: blocks of the key/value cache.
        max_batch_tokens: tokens of one pass.
        max_sequences: sequences running at once.
        prefix_cache: whether finished prefixes are kept to be found again.

    Raises:
        ConfigError: max_sequences beyond max_batch_tokens (a pass could not give every sequence a token), or no block.
    """

    def __init__(
        self, n_blocks: int, *, max_batch_tokens: int = 2048, max_sequences: int = 64, prefix_cache: bool = True
    ) -> None:
        if not 1 <= max_sequences <= max_batch_tokens:
            raise ConfigError(
                f"max_sequences must be from 1 to max_batch_tokens ({max_batch_tokens}), got {max_sequences}: every "
                "running sequence gets a token in every pass"
            )
        if n_blocks < 1:
            raise ConfigError(f"the cache needs at least one block of {BLOCK_TOKENS} tokens, got {n_blocks}")
        self.pool = BlockPool(n_blocks)
        self.max_batch_tokens, self.max_sequences = max_batch_tokens, max_sequences
        self.prefix_cache = prefix_cache
        self.running: list[Running] = []
        self.waiting: list[Running] = []
        self.n_preemptions = 0
        self._arrivals = 0

    def add(self, sequence: Running) -> None:
        """Queue a sequence.

        Raises:
            RequestError: it could not fit even alone.
        """
        needed = -(-sequence.max_tokens // BLOCK_TOKENS)
        if needed > self.pool.n_blocks:
            raise RequestError(
                f"prompt and answer of up to {sequence.max_tokens} tokens need {needed} blocks of {BLOCK_TOKENS}, the "
                f"cache has {self.pool.n_blocks}. Ask for fewer new tokens, or give the engine more cache memory."
            )
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._wait(sequence)

    def cancel(self, request_id: int) -> bool:
        """Drop a sequence wherever it is; its blocks are free at once. False if it is not here."""
        for queue in (self.running, self.waiting):
            for sequence in queue:
                if sequence.request_id == request_id:
                    queue.remove(sequence)
                    self._release(sequence)
                    return True
        return False

    @property
    def has_work(self) -> bool:
        """True if any sequence is not finished."""
        return bool(self.running or self.waiting)

    def schedule(self) -> Plan:
        """Choose the tokens of the next pass and take their blocks; empty only if there is no work."""
        budget = self.max_batch_tokens
        chunks: dict[Running, Chunk] = {}
        ready = sorted(self.running, key=lambda s: (len(s.tokens) - s.n_computed > 1, s.order))
        for sequence in ready:
            if sequence in self.running and budget > 0:  # it may have been preempted for one before it
                chunk = self._chunk(sequence, budget, chunks)
                if chunk is not None:
                    chunks[sequence] = chunk
                    budget -= len(chunk.tokens)
        while self.waiting and budget > 0 and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break  # the next in line is never overtaken
            chunk = self._chunk(sequence, budget, chunks)
            if chunk is None:
                break
            chunks[sequence] = chunk
            budget -= len(chunk.tokens)
        return Plan(tuple(chunks.values()))

    def commit(self, plan: Plan, new_tokens: Mapping[int, Sequence[int]], finished: Collection[int]) -> None:
        """Record what a pass made.

        Args:
            new_tokens: request id -> tokens sampled for it: one, or one more than the drafts that were right.
            finished: request ids that are done; their blocks are released (full ones stay findable).
        """
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence not in self.running:
                continue  # cancelled while the pass ran
            made = list(new_tokens.get(sequence.request_id, ())) if chunk.samples else []
            sequence.n_computed = chunk.start + len(chunk.tokens) - chunk.n_draft + max(0, len(made) - 1)
            sequence.tokens += made
            sequence.draft = []
            self._publish(sequence)
            spare = -(-sequence.n_computed // BLOCK_TOKENS)
            while len(sequence.blocks) > max(spare, 1):  # rejected drafts
                self.pool.release(sequence.blocks.pop())
            if sequence.request_id in finished:
                self.running.remove(sequence)
                self._release(sequence)

    def check(self) -> None:
        """Assert that no block is lost and every reference has a holder."""
        held: dict[int, int] = {}
        for sequence in self.running:
            assert len(sequence.blocks) * BLOCK_TOKENS >= sequence.n_computed, "computed positions have blocks"
            for block in sequence.blocks:
                held[block] = held.get(block, 0) + 1
        assert all(not sequence.blocks and not sequence.n_computed for sequence in self.waiting)
        self.pool.check(held)

    # Inside ----------------------------------------------------------------------------------------------------------

    def _chunk(self, sequence: Running, budget: int, chunks: dict[Running, Chunk]) -> Chunk | None:
        """The sequence's next chunk within the budget, or None if it lost its own blocks."""
        pending = len(sequence.tokens) - sequence.n_computed
        draft = sequence.draft if pending == 1 else []
        room = sequence.max_tokens - len(sequence.tokens) - 1  # a draft may not reach beyond the last token
        n = min(pending + max(0, min(len(draft), room)), budget)
        if sequence.all_logits:
            n = min(n, MOST_LOGIT_ROWS)
        wanted = sequence.n_computed + n
        while len(sequence.blocks) * BLOCK_TOKENS < wanted:
            block = self.pool.allocate()
            if block is not None:
                sequence.blocks.append(block)
                continue
            have = len(sequence.blocks) * BLOCK_TOKENS - sequence.n_computed
            if have >= 1 and n > pending:
                n = min(pending, have)  # do without the guesses before taking blocks from others
                wanted = sequence.n_computed + n
                continue
            victim = max(self.running, key=lambda s: s.order)
            if victim is sequence and have >= 1:
                n = have  # the last in line takes what it has and goes on later
                break
            self._preempt(victim)
            chunks.pop(victim, None)
            if victim is sequence:
                return None
        start = sequence.n_computed
        known = (sequence.tokens + draft)[start : start + n]
        n_draft = max(0, n - pending)
        return Chunk(sequence, start, tuple(known), n_draft, n >= pending)

    def _admit(self, sequence: Running) -> bool:
        """Move the first of the waiting to the running, with the blocks of the prefix that is known already."""
        needed = -(-len(self.waiting[0].tokens) // BLOCK_TOKENS)
        if self.running and self.pool.n_free < needed:
            return False  # admitted now, it would only be preempted by those before it
        self.waiting.pop(0)
        self.running.append(sequence)
        usable = 0 if sequence.all_logits or not self.prefix_cache else (len(sequence.tokens) - 1) // BLOCK_TOKENS
        parent = b""
        for index in range(usable):
            parent = chain_key(
                parent, sequence.tokens[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS], sequence.salt
            )
            block = self.pool.lookup(parent)
            if block is None:
                break
            sequence.blocks.append(block)
            sequence.keys.append(parent)
        sequence.n_computed = len(sequence.blocks) * BLOCK_TOKENS
        if not sequence.n_preempted:
            sequence.n_cached = sequence.n_computed
        return True

    def _publish(self, sequence: Running) -> None:
        if not self.prefix_cache:
            return
        while (len(sequence.keys) + 1) * BLOCK_TOKENS <= sequence.n_computed:
            index = len(sequence.keys)
            parent = sequence.keys[-1] if sequence.keys else b""
            tokens = sequence.tokens[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
            sequence.keys.append(chain_key(parent, tokens, sequence.salt))
            self.pool.publish(sequence.blocks[index], sequence.keys[-1])

    def _preempt(self, sequence: Running) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.n_preempted += 1
        self.n_preemptions += 1
        self._wait(sequence)

    def _release(self, sequence: Running) -> None:
        # The end of a prefix is of less use than its beginning: released first, it is taken first.
        for block in reversed(sequence.blocks):
            self.pool.release(block)
        sequence.blocks, sequence.keys, sequence.n_computed, sequence.draft = [], [], 0, []

    def _wait(self, sequence: Running) -> None:
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda s: s.order)
