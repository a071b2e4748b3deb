"""Blocks and scheduler under random traffic: nothing lost, nobody starved, budgets kept, every cache position right."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadriga.engine.blocks import BLOCK_TOKENS, BlockPool, chain_key
from quadriga.engine.scheduler import Chunk, Plan, Running, Scheduler
from quadriga.errors import ConfigError, RequestError


def fake_next(tokens: list[int]) -> int:
    """The model of these tests: the next token is a hash of all before it."""
    return blake2b(repr(tokens).encode(), digest_size=1).digest()[0] % 5


@dataclass
class FakeModel:
    """Remembers what was written where, and checks that what a pass reads is the sequence's own past."""

    cells: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    """(block, offset) -> all tokens up to and with the one stored there."""

    def run(self, plan: Plan) -> dict[int, list[int]]:
        made: dict[int, list[int]] = {}
        for chunk in plan.chunks:
            known = chunk.sequence.tokens[: chunk.start] + list(chunk.tokens)
            for position in range(chunk.start):
                assert self._cell(chunk, position) == tuple(known[: position + 1]), "the cache holds another past"
        for chunk in plan.chunks:
            known = chunk.sequence.tokens[: chunk.start] + list(chunk.tokens)
            for position in range(chunk.start, len(known)):
                block = chunk.sequence.blocks[position // BLOCK_TOKENS]
                self.cells[block, position % BLOCK_TOKENS] = tuple(known[: position + 1])
            if chunk.samples:
                made[chunk.sequence.request_id] = self._accept(chunk, known)
        return made

    def _cell(self, chunk: Chunk, position: int) -> tuple[int, ...] | None:
        return self.cells.get((chunk.sequence.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS))

    def _accept(self, chunk: Chunk, known: list[int]) -> list[int]:
        certain = len(known) - chunk.n_draft
        made: list[int] = []
        for i in range(chunk.n_draft + 1):
            made.append(fake_next(known[: certain + i]))
            if i < chunk.n_draft and known[certain + i] != made[-1]:
                break
        return made


def answer(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < max_tokens:
        tokens.append(fake_next(tokens))
    return tokens


@dataclass(frozen=True)
class Job:
    prompt: list[int]
    n_new: int
    priority: int
    salt: bytes
    at: int
    cancel_at: int | None
    guesses: bool
    all_logits: bool


JOBS = st.lists(
    st.builds(
        Job,
        # Few different tokens: shared prefixes happen.
        prompt=st.one_of(
            st.lists(st.integers(0, 1), min_size=1, max_size=20), st.integers(1, 70).map(lambda n: [0] * n)
        ),
        n_new=st.integers(1, 40),
        priority=st.sampled_from([0, 0, 0, 1, -2, 5]),
        salt=st.sampled_from([b"", b"", b"x"]),
        at=st.integers(0, 30),
        cancel_at=st.one_of(st.none(), st.none(), st.integers(0, 60)),
        guesses=st.booleans(),
        all_logits=st.sampled_from([False, False, False, True]),
    ),
    min_size=1,
    max_size=12,
)


def check_turns(before: list[Running], scheduler: Scheduler, plan: Plan) -> None:
    """Nobody is let in past one who waits, and who gave way came after all who stayed."""
    for sequence in scheduler.running:
        if sequence not in before:
            assert all(sequence.order < other.order for other in scheduler.waiting), "overtaken"
    for sequence in before:
        if sequence in scheduler.waiting:
            assert all(other.order < sequence.order for other in scheduler.running), "the wrong one gave way"
    ready = [s.order for s in before if s in scheduler.running and len(s.tokens) - s.n_computed == 1]
    planned = [c.sequence.order for c in plan.chunks if c.sequence.order in ready]
    assert planned == sorted(ready)[: len(planned)], "who decodes goes first, in order"


@settings(max_examples=300, deadline=None)
@given(
    jobs=JOBS, n_blocks=st.integers(7, 14), budget=st.integers(3, 40), n_running=st.integers(1, 3), cache=st.booleans()
)
def test_any_traffic_ends_with_the_answers_of_each_alone(
    jobs: list[Job], n_blocks: int, budget: int, n_running: int, cache: bool
) -> None:
    scheduler = Scheduler(n_blocks, max_batch_tokens=budget, max_sequences=n_running, prefix_cache=cache)
    model, step = FakeModel(), 0
    sequences: dict[int, Running] = {}
    alive: set[int] = set()
    work, computed = sum(len(job.prompt) + job.n_new for job in jobs), 0
    while step <= 60 or scheduler.has_work:
        assert step < 100 + 60 * work, "somebody starves"
        for number, job in enumerate(jobs):
            if job.at == step:
                sequences[number] = Running(
                    number, list(job.prompt), len(job.prompt) + job.n_new, priority=job.priority, salt=job.salt,
                    all_logits=job.all_logits,
                )  # fmt: skip
                scheduler.add(sequences[number])
                alive.add(number)
            if job.cancel_at == step and number in alive:
                assert scheduler.cancel(number)
                alive.discard(number)
        for running in scheduler.running:
            if jobs[running.request_id].guesses:  # right for a while, then wrong
                future = answer(running.tokens, len(running.tokens) + 3)[len(running.tokens) :]
                running.draft = [*future[:2], 9, 9] if step % 2 else [9]
        before = list(scheduler.running)
        plan = scheduler.schedule()
        check_turns(before, scheduler, plan)
        computed += plan.n_tokens - sum(chunk.n_draft for chunk in plan.chunks)
        assert plan.n_tokens <= budget
        assert len(scheduler.running) <= n_running
        assert bool(plan.chunks) == scheduler.has_work
        scheduler.check()
        made = model.run(plan)
        finished = set()
        for number, tokens in made.items():
            assert len(sequences[number].tokens) + len(tokens) <= sequences[number].max_tokens
            if len(sequences[number].tokens) + len(tokens) == sequences[number].max_tokens:
                finished.add(number)
        scheduler.commit(plan, made, finished)
        scheduler.check()
        for number in finished:
            alive.discard(number)
            assert sequences[number].tokens == answer(jobs[number].prompt, sequences[number].max_tokens)
        step += 1
    assert not alive
    assert scheduler.pool.n_free == n_blocks, "every block came back"
    if not scheduler.n_preemptions and not any(job.cancel_at is not None or job.guesses for job in jobs):
        found = sum(sequence.n_cached for sequence in sequences.values())
        assert computed == work - found - len(jobs), "each token once; the last of an answer is never read"


def run(scheduler: Scheduler, sequence: Running, model: FakeModel) -> Running:
    scheduler.add(sequence)
    while scheduler.has_work:
        plan = scheduler.schedule()
        made = model.run(plan)
        done = {n for n, t in made.items() if len(sequence.tokens) + len(t) >= sequence.max_tokens}
        scheduler.commit(plan, made, done)
    return sequence


def test_a_prefix_is_computed_once() -> None:
    scheduler, model = Scheduler(20), FakeModel()
    prompt = [i % 3 for i in range(40)]
    assert run(scheduler, Running(0, list(prompt), 45), model).n_cached == 0
    assert run(scheduler, Running(1, list(prompt), 45), model).n_cached == 32
    assert run(scheduler, Running(2, prompt[:32], 45), model).n_cached == 16, "one token is left to compute"
    assert run(scheduler, Running(3, list(prompt), 45, salt=b"other"), model).n_cached == 0
    assert run(scheduler, Running(4, list(prompt), 45, all_logits=True), model).n_cached == 0
    scheduler.pool.forget_all()
    assert run(scheduler, Running(5, list(prompt), 45), model).n_cached == 0


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    scheduler, model = Scheduler(100, max_batch_tokens=20, max_sequences=4), FakeModel()
    short, long = Running(0, [1, 2], 50), Running(1, [0] * 400, 410)
    scheduler.add(short)
    scheduler.commit(plan := scheduler.schedule(), model.run(plan), ())
    scheduler.add(long)
    for _ in range(10):
        plan = scheduler.schedule()
        assert [(c.sequence.request_id, len(c.tokens)) for c in plan.chunks] == [(0, 1), (1, 19)]
        scheduler.commit(plan, model.run(plan), ())
    assert len(short.tokens) == 13


def test_the_latest_gives_way_and_resumes() -> None:
    scheduler, model = Scheduler(4, max_batch_tokens=64, max_sequences=2, prefix_cache=False), FakeModel()
    first, second = Running(0, [0] * 17, 60), Running(1, [1] * 17, 60)
    scheduler.add(first)
    scheduler.add(second)
    done: set[int] = set()
    while scheduler.has_work:
        plan = scheduler.schedule()
        made = model.run(plan)
        done = {s.request_id for s in (first, second) if len(s.tokens) + len(made.get(s.request_id, ())) >= 60}
        scheduler.commit(plan, made, done & made.keys())
    assert (first.n_preempted, second.n_preempted > 0) == (0, True)
    assert first.tokens == answer([0] * 17, 60) and second.tokens == answer([1] * 17, 60)


def test_what_cannot_fit_is_refused_at_once() -> None:
    scheduler = Scheduler(3)
    with pytest.raises(RequestError, match="need 4 blocks of 16, the cache has 3"):
        scheduler.add(Running(0, [1] * 10, 49))
    with pytest.raises(ConfigError, match="max_sequences must be from 1 to max_batch_tokens"):
        Scheduler(3, max_batch_tokens=4, max_sequences=5)
    with pytest.raises(ConfigError, match="at least one block"):
        Scheduler(0)
    assert not scheduler.cancel(7)


@given(st.lists(st.tuples(st.sampled_from("arlpf"), st.integers(0, 9)), max_size=80))
def test_blocks_are_never_lost(moves: list[tuple[str, int]]) -> None:
    pool, held = BlockPool(6), list[int]()
    for move, n in moves:
        key = chain_key(b"", [n])
        if move in "al" and (block := pool.allocate() if move == "a" else pool.lookup(key)) is not None:
            held.append(block)
        elif move == "r" and held:
            pool.release(held.pop(n % len(held)))
        elif move == "p" and held:
            pool.publish(held[n % len(held)], key)
        elif move == "f":
            pool.forget_all()
        pool.check({block: held.count(block) for block in held})
        assert pool.n_free == 6 - len(set(held))


def test_keys_tell_prefixes_and_tenants_apart() -> None:
    tokens = list(range(16))
    keys = {
        chain_key(b"", tokens),
        chain_key(b"", tokens[::-1]),
        chain_key(b"a" * 16, tokens),
        chain_key(b"", tokens, b"tenant"),
        chain_key(b"", [256, *tokens[1:]]),
    }
    assert len(keys) == 5 and all(len(key) == 16 for key in keys)


def test_the_least_recently_released_prefix_goes_first() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(), pool.allocate()
    assert first is not None and second is not None
    pool.publish(first, b"1")
    pool.publish(second, b"2")
    pool.release(second)
    pool.release(first)
    assert pool.n_cached == 2
    assert pool.allocate() == second
    assert pool.lookup(b"2") is None and pool.lookup(b"1") == first
