"""Blocks and scheduler under random traffic: nothing lost, nobody starved, budgets kept, every cache position right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quadriga.engine.blocks import BlockPool, chain_key
from quadriga.engine.scheduler import Scheduler
from quadriga.engine.sequences import BACKGROUND, Chunk, PassPlan, Running
from quadriga.errors import ConfigError, RequestError
from quadriga.quant.packed import BLOCK_TOKENS
from tests.engine.test_turns import calls_of


def fake_next(tokens: list[int]) -> int:
    """The model of these tests: the next token is a hash of all before it."""
    return blake2b(repr(tokens).encode(), digest_size=1).digest()[0] % 5


@dataclass
class FakeModel:
    """Remembers what was written where, and checks that what a pass reads is the sequence's own past."""

    cells: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    """(block, offset) -> all tokens up to and with the one stored there, and the group it is stored for."""
    slots: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Slot of recurrent states -> all tokens before the position they are of."""

    def run(self, plan: PassPlan) -> dict[int, list[int]]:
        made: dict[int, list[int]] = {}
        for chunk in plan.chunks:
            known = chunk.sequence.tokens[: chunk.start] + list(chunk.tokens)
            for group, window in enumerate(chunk.sequence.blocks.windows):
                for position in range(max(0, chunk.start + 1 - (window or 10**9)), chunk.start):
                    past = (*known[: position + 1], group)
                    assert self._cell(chunk, group, position) == past, "the cache holds another past"
        written = [chunk.after for chunk in plan.chunks if chunk.after >= 0]
        read = [chunk.before for chunk in plan.chunks if chunk.before >= 0 and chunk.before != chunk.after]
        assert len({*written}) == len(written) and not {*written} & {*read}, "a slot is one sequence's to write"
        for chunk in plan.chunks:
            if chunk.after >= 0 and chunk.start:
                assert self.slots[chunk.before] == tuple(chunk.sequence.tokens[: chunk.start]), "another past's state"
            elif chunk.after >= 0:
                assert chunk.before == -1
        for chunk in plan.chunks:
            known = chunk.sequence.tokens[: chunk.start] + list(chunk.tokens)
            if chunk.after >= 0:
                self.slots[chunk.after] = tuple(known)
            for position in range(chunk.start, len(known)):
                for group, row in enumerate(chunk.sequence.blocks.rows):
                    assert row[position // BLOCK_TOKENS] >= 0
                    self.cells[row[position // BLOCK_TOKENS], position % BLOCK_TOKENS] = (*known[: position + 1], group)
            if chunk.samples:
                made[chunk.sequence.request_id] = self._accept(chunk, known)
        return made

    def _cell(self, chunk: Chunk, group: int, position: int) -> tuple[int, ...] | None:
        block = chunk.sequence.blocks.rows[group][position // BLOCK_TOKENS]
        return self.cells.get((block, position % BLOCK_TOKENS))

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
    client: bytes
    group: int
    embeds: bool
    held: int
    """Passes that each of its tokens is chosen beside, every third token."""


PLAIN = Job([0], 1, 0, b"", 0, None, False, False, b"a", 0, False, 0)

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
        client=st.sampled_from([b"a", b"a", b"b", b"c"]),
        group=st.integers(0, 3),
        embeds=st.sampled_from([False, False, True]),
        held=st.sampled_from([0, 0, 1, 5]),
    ),
    min_size=1,
    max_size=12,
)


@dataclass
class Whim:
    """Lets something else beside fluent rows now and then, and other prompts always."""

    rooms: list[tuple[int, int]]
    asked: int = 0

    def room(self, n_fluent: int) -> tuple[int, int]:
        self.asked += 1
        n_prompt, n_rows = self.rooms[self.asked % len(self.rooms)]
        if not n_fluent or self.asked % 5 == 0:
            return max(1, n_prompt), max(1, n_rows)
        return n_prompt, n_rows


class Traffic:
    """Jobs on a scheduler, a pass at a time; what must always hold is held after every one."""

    def __init__(self, jobs: list[Job], scheduler: Scheduler) -> None:
        self.jobs, self.scheduler, self.model, self.step = jobs, scheduler, FakeModel(), 0
        self.sequences: dict[int, Running] = {}
        self.alive: set[int] = set()
        self.chosen: dict[int, tuple[int, list[int]]] = {}  # held sequence -> (when its tokens are there, they)
        self.states: dict[int, list[int]] = {}  # embedding sequence -> the positions it has had, in order
        self.n_computed = 0

    def arrive_and_leave(self) -> None:
        for number, job in enumerate(self.jobs):
            if job.at == self.step:
                sequence = self.sequences[number] = Running(
                    number,
                    list(job.prompt),
                    len(job.prompt) + (0 if job.embeds else job.n_new),
                    priority=job.priority,
                    salt=job.salt,
                    client=job.client,
                    group=100 + job.group,
                    embeds=job.embeds,
                    all_logits=job.all_logits and not job.embeds,
                )
                self.scheduler.add(sequence)
                self.alive.add(number)
            if job.cancel_at == self.step and number in self.alive:
                assert self.scheduler.cancel(number)
                self.alive.discard(number)
                self.chosen.pop(number, None)

    def choose(self) -> None:
        for number, (when, tokens) in list(self.chosen.items()):
            if when <= self.step:
                del self.chosen[number]
                self.end(number, self.scheduler.resume, tokens)

    def end(self, number: int, resume: Callable[..., None], tokens: list[int]) -> None:
        sequence = self.sequences[number]
        finished = len(sequence.tokens) + len(tokens) == sequence.max_tokens
        resume(sequence, tokens, finished=finished)
        if finished:
            self.alive.discard(number)
            assert sequence.tokens == answer(self.jobs[number].prompt, sequence.max_tokens)

    def guess(self) -> None:
        for running in self.scheduler.running:
            job = self.jobs[running.request_id]
            if job.guesses and not job.embeds and not job.held:  # right for a while, then wrong
                future = answer(running.tokens, len(running.tokens) + 3)[len(running.tokens) :]
                running.draft = [*future[:2], 9, 9] if self.step % 2 else [9]

    def check_rows(self, before: list[Running], plan: PassPlan) -> None:
        """Who decodes is in every pass, in order, before any prompt; unless others' work is paced."""
        ready = [s for s in before if s.state == "running" and s.decodes and not s.held]
        planned = [chunk.sequence for chunk in plan.chunks]
        if self.scheduler.beside is None:
            first = sorted(ready, key=lambda s: s.order)[: len(plan.chunks)]
            assert [s for s in planned if s in ready] == first == planned[: len(first)]
        oldest = min((s for s in before), key=lambda s: s.order, default=None)
        assert (
            oldest is None or oldest.state != "waiting" or any(s.order < oldest.order for s in self.scheduler.running)
        )

    def run(self) -> None:
        """One pass."""
        self.arrive_and_leave()
        self.choose()
        self.guess()
        before = list(self.scheduler.running)
        plan = self.scheduler.schedule()
        self.check_rows(before, plan)
        self.n_computed += plan.n_tokens - sum(chunk.n_draft for chunk in plan.chunks)
        assert plan.n_tokens <= self.scheduler.max_batch_tokens
        assert len(self.scheduler.running) <= self.scheduler.max_sequences
        assert bool(plan.chunks) == self.scheduler.has_work or self.chosen, "only what is held makes a pass empty"
        assert not any(chunk.sequence.request_id in self.chosen for chunk in plan.chunks), "held rows take no part"
        self.scheduler.check()
        made, finished = self.model.run(plan), set()
        for chunk in plan.chunks:
            number = chunk.sequence.request_id
            if self.jobs[number].embeds:
                assert not chunk.samples and not chunk.n_draft
                had = self.states.setdefault(number, [])
                if chunk.start == 0:
                    had.clear()
                had += range(chunk.start, chunk.start + len(chunk.tokens))
                if len(had) == len(self.jobs[number].prompt):
                    assert had == list(range(len(had))), "every position once, in order"
                    finished.add(number)
        held = [n for n in made if self.jobs[n].held and len(self.sequences[n].tokens) % 3 == 0]
        for number in held:
            self.chosen[number] = (self.step + self.jobs[number].held, made.pop(number))
        for number, tokens in made.items():
            assert len(self.sequences[number].tokens) + len(tokens) <= self.sequences[number].max_tokens
            if len(self.sequences[number].tokens) + len(tokens) == self.sequences[number].max_tokens:
                finished.add(number)
        self.scheduler.commit(plan, made, finished)
        for number in held:
            self.scheduler.hold(self.sequences[number])
        self.scheduler.check()
        for number in finished:
            self.alive.discard(number)
            assert self.sequences[number].tokens == answer(self.jobs[number].prompt, self.sequences[number].max_tokens)
        self.step += 1


@settings(max_examples=400, deadline=None)
@example(  # the only row gives way in a pass without room for the prompt beside it
    jobs=[PLAIN, replace(PLAIN, prompt=[0] * 43, n_new=7, at=1, held=5), replace(PLAIN, prompt=[0] * 52, group=1)],
    n_blocks=7,
    budget=3,
    n_running=2,
    cache=False,
    rooms=[(0, 0)],
    n_slots=0,
    windows=(None,),
)
@given(
    jobs=JOBS,
    n_blocks=st.integers(7, 14),
    budget=st.integers(3, 40),
    n_running=st.integers(1, 3),
    cache=st.booleans(),
    rooms=st.one_of(st.none(), st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3)), min_size=1, max_size=4)),
    n_slots=st.one_of(st.just(0), st.integers(2, 12)),
    windows=st.sampled_from([(None,), (None,), (None, 20), (20,), (5, 33), (None, None, 17), (1,)]),
)
def test_any_traffic_ends_with_the_answers_of_each_alone(
    jobs: list[Job],
    n_blocks: int,
    budget: int,
    n_running: int,
    cache: bool,
    rooms: list[tuple[int, int]] | None,
    windows: tuple[int | None, ...],
    n_slots: int,
) -> None:
    """Priorities, clients, many answers, chunks, embeddings, held tokens, windows, recurrent states, a full cache."""
    windows = (None,) if n_slots else windows  # a model with recurrent layers has one group
    n_blocks *= len(windows)
    scheduler = Scheduler(
        n_blocks,
        max_batch_tokens=budget,
        max_sequences=n_running,
        prefix_cache=cache,
        windows=windows,
        beside=None if rooms is None else Whim(rooms),
        n_slots=n_slots,
    )
    traffic = Traffic(jobs, scheduler)
    work = sum(len(job.prompt) + job.n_new * (1 + job.held) for job in jobs)
    while traffic.step <= 60 or scheduler.has_work:
        assert traffic.step < 100 + 60 * work, "somebody starves"
        traffic.run()
    assert not traffic.alive
    assert scheduler.pool.n_free == n_blocks, "every block came back"
    assert scheduler.states is None or scheduler.states.n_free == n_slots, "and every slot"
    assert not scheduler.waiting._roots, "nothing is remembered of who has gone"
    if not scheduler.n_preemptions and not any(job.cancel_at is not None or job.guesses for job in jobs):
        found = sum(sequence.n_cached for sequence in traffic.sequences.values())
        read = sum(len(job.prompt) + (0 if job.embeds else job.n_new - 1) for job in jobs)
        assert traffic.n_computed == read - found, "each token once; the last of an answer is never read"


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


def test_a_prefix_is_taken_up_where_a_state_was_kept() -> None:
    """At a prompt's last whole block, where a later one parted from it, and at an answer's latest."""
    scheduler, model = Scheduler(60, n_slots=9), FakeModel()
    shared = [i % 3 for i in range(40)]
    assert run(scheduler, Running(0, [*shared, *[1] * 30], 72), model).n_cached == 0
    assert run(scheduler, Running(1, [*shared, *[2] * 30], 72), model).n_cached == 0, "blocks for 32, no state there"
    assert run(scheduler, Running(2, [*shared, *[0] * 30], 72), model).n_cached == 32, "kept when the second parted"
    assert run(scheduler, Running(3, [*shared, *[1] * 30], 72), model).n_cached == 64
    answered = run(scheduler, Running(4, [7] * 20, 71), model).tokens
    assert run(scheduler, Running(5, [*answered, 1, 2], 75), model).n_cached == 64, "of 70 positions that were read"
    assert run(scheduler, Running(6, [*answered[:50], 9, 9], 55), model).n_cached == 16, (
        "the latest replaced those between"
    )


def test_slots_limit_how_many_run_and_the_least_recently_used_state_goes_first() -> None:
    scheduler, model = Scheduler(60, n_slots=4), FakeModel()
    assert scheduler.max_sequences == 2
    with pytest.raises(ConfigError, match="two slots"):
        Scheduler(60, n_slots=1)
    for number in range(4):
        run(scheduler, Running(number, [number] * 20, 22), model)
    assert run(scheduler, Running(4, [0] * 20, 22), model).n_cached == 0, "forgotten for the others"
    assert run(scheduler, Running(5, [3] * 20, 22), model).n_cached == 16


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


# Turns, places and pace ----------------------------------------------------------------------------------------------


def drive(scheduler: Scheduler, passes: int, finish: Callable[[Running], bool] = lambda s: False) -> list[PassPlan]:
    """So many passes of a model that says 1; sequences end at their last token, or as ``finish`` says."""
    plans = []
    for _ in range(passes):
        plan = scheduler.schedule()
        made = {c.sequence.request_id: [1] for c in plan.chunks if c.samples}
        done = {
            c.sequence.request_id
            for c in plan.chunks
            if (c.samples and (len(c.sequence.tokens) + 1 >= c.sequence.max_tokens or finish(c.sequence)))
            or (c.sequence.embeds and c.start + len(c.tokens) == len(c.sequence.tokens))
        }
        scheduler.commit(plan, made, done)
        scheduler.check()
        plans.append(plan)
    return plans


def ids_of(plan: PassPlan) -> set[int]:
    return {chunk.sequence.request_id for chunk in plan.chunks}


def test_twenty_thousand_prompts_cost_no_more_each_than_a_few() -> None:
    def through(n: int) -> None:
        scheduler = Scheduler(64, max_batch_tokens=64, max_sequences=64)
        for i in range(n):
            scheduler.add(Running(i, [1], 2))
        while scheduler.has_work:
            plan = scheduler.schedule()
            made = {chunk.sequence.request_id: [1] for chunk in plan.chunks}
            scheduler.commit(plan, made, made.keys())

    assert calls_of(lambda: through(4000)) < 4.4 * calls_of(lambda: through(1000))


@pytest.mark.parametrize("same_client", [True, False], ids=["one client's requests", "clients"])
def test_who_asks_for_128_answers_keeps_nobody_waiting(same_client: bool) -> None:
    scheduler = Scheduler(1000, max_batch_tokens=256, max_sequences=16)
    for i in range(4 * 128):
        client = b"" if same_client else b"client %d" % (i // 128)
        scheduler.add(Running(i, [1] * 5, 300, client=client, group=i // 128))
    drive(scheduler, 20)
    before = scheduler.n_preemptions
    late = Running(1000, [2] * 5, 300, client=b"" if same_client else b"fifth")
    scheduler.add(late)
    plans = drive(scheduler, 10)
    assert all(1000 in ids_of(plan) for plan in plans), "it runs in the next pass, and in every one from then on"
    assert scheduler.n_preemptions == before + 1, "one gave way"


def test_places_are_shared_out_evenly_however_many_ask() -> None:
    scheduler = Scheduler(1000, max_batch_tokens=256, max_sequences=12)
    for i in range(100):
        scheduler.add(Running(i, [1] * 5, 300, client=b"first", group=i))
    drive(scheduler, 3)
    for i in range(100, 200):
        scheduler.add(Running(i, [1] * 5, 300, client=b"second", group=i))
    for i in range(200, 202):
        scheduler.add(Running(i, [1] * 5, 300, client=b"third", group=i))
    drive(scheduler, 3)
    running = [s.client for s in scheduler.running]
    assert (running.count(b"first"), running.count(b"second"), running.count(b"third")) == (5, 5, 2)
    drive(scheduler, 50)
    assert sorted(s.client for s in scheduler.running) == sorted(running), "and stay so: nobody is put back for nothing"


def test_a_client_that_is_alone_has_all_places_and_its_newest_give_way() -> None:
    scheduler = Scheduler(1000, max_batch_tokens=256, max_sequences=4)
    for i in range(4):
        scheduler.add(Running(i, [1] * 5, 300, client=b"a"))
    drive(scheduler, 3)
    assert len(scheduler.running) == 4
    scheduler.add(Running(9, [1] * 5, 300, client=b"b"))
    drive(scheduler, 1)
    assert {s.request_id for s in scheduler.running} == {0, 1, 2, 9}


def test_with_one_place_clients_and_requests_take_turns() -> None:
    scheduler = Scheduler(100, max_batch_tokens=64, max_sequences=1)
    for i in range(6):
        scheduler.add(Running(i, [1] * 4, 8, client=b"a", group=0))
    for i in range(6, 9):
        scheduler.add(Running(i, [1] * 4, 8, client=b"a", group=i))
    for i in range(9, 15):
        scheduler.add(Running(i, [1] * 4, 8, client=b"b", group=9))
    order: list[int] = []
    while scheduler.has_work:
        order += [n for plan in drive(scheduler, 1) for n in ids_of(plan) if n not in order]
    assert [n < 9 for n in order[:12]] == [True, False] * 6, "the clients by turns"
    assert [n for n in order if n < 9][:6] == [0, 6, 7, 8, 1, 2], "and one client's requests"


def test_a_full_cache_takes_from_who_has_most_and_the_oldest_never_gives_way() -> None:
    scheduler = Scheduler(24, max_batch_tokens=256, max_sequences=16, prefix_cache=False)
    oldest = Running(0, [1] * 5, 200, client=b"many")
    scheduler.add(oldest)
    for i in range(1, 16):
        scheduler.add(Running(i, [1] * 5, 200, client=b"many", group=0))
    drive(scheduler, 30)
    assert scheduler.n_preemptions > 0
    single = Running(100, [2] * 5, 200, client=b"single")
    scheduler.add(single)
    plans = drive(scheduler, 150)
    assert single.n_preempted == 0 and all(100 in ids_of(plan) for plan in plans)
    while oldest.state != "done":
        drive(scheduler, 1)
    assert oldest.n_preempted == 0


def test_higher_priority_is_served_before_fairness() -> None:
    scheduler = Scheduler(100, max_batch_tokens=64, max_sequences=1)
    for i in range(3):
        scheduler.add(Running(i, [1] * 4, 8, client=b"a", priority=1))
    scheduler.add(Running(9, [1] * 4, 8, client=b"b"))
    order: list[int] = []
    while scheduler.has_work:
        order += [n for plan in drive(scheduler, 1) for n in ids_of(plan) if n not in order]
    assert order == [0, 1, 2, 9]


@dataclass
class Rooms:
    """What a pass has room for beside fluent rows, as the test says; remembers who asked."""

    room_for: tuple[int, int] = (0, 0)
    asked: list[int] = field(default_factory=list)

    def room(self, n_fluent: int) -> tuple[int, int]:
        self.asked.append(n_fluent)
        return self.room_for if n_fluent else (20, 0)


def test_fluent_rows_are_in_every_pass_and_others_as_there_is_room() -> None:
    rooms = Rooms()
    scheduler = Scheduler(1000, max_batch_tokens=256, max_sequences=32, beside=rooms)
    scheduler.add(Running(0, [1] * 4, 300, client=b"one"))
    for i in range(1, 21):
        scheduler.add(Running(i, [1] * 4, 300, client=b"many", group=1))
    while any(not s.decodes for s in scheduler.running) or scheduler.waiting:
        rooms.room_for = (100, 0)
        drive(scheduler, 1)
    scheduler.add(Running(50, [1] * 100, 100, client=b"embeds", embeds=True))
    rooms.room_for = (0, 0)
    alone = drive(scheduler, 5)
    assert [ids_of(plan) for plan in alone] == [{0}] * 5 and [p.n_fluent for p in alone] == [1] * 5
    rooms.room_for = (30, 8)
    plans = drive(scheduler, 6)
    assert all(0 in ids_of(plan) for plan in plans)
    plans.sort(key=lambda plan: plan.n_decode)
    assert [(p.n_decode, p.n_tokens - p.n_decode) for p in plans] == [(1, 30)] * 3 + [(9, 0)] * 3, "by turns"
    others = [ids_of(plan) - {0} for plan in plans[3:]]
    assert set.union(*others) == set(range(1, 21)), "and each of these has its turn"
    assert set(rooms.asked) == {0, 1}


def test_rows_of_equal_requests_are_all_fluent_and_ask_nobody() -> None:
    rooms = Rooms()
    scheduler = Scheduler(1000, max_batch_tokens=256, max_sequences=32, beside=rooms)
    for i in range(10):
        scheduler.add(Running(i, [1] * 4, 100, client=b"a" if i < 6 else b"b"))
    rooms.room_for = (100, 0)
    drive(scheduler, 3)
    rooms.asked.clear()
    assert [p.n_fluent for p in drive(scheduler, 5)] == [10] * 5 and not rooms.asked


@pytest.mark.parametrize(
    ("crowd", "one"), [(1000, 0), (0, 5), (3, BACKGROUND)], ids=["above", "below", "beside a batch"]
)
def test_a_crowd_of_another_priority_slows_no_answer_down(crowd: int, one: int) -> None:
    """Priority says who begins first. Of what is under way few are in every pass; a batch's lines never are."""
    rooms = Rooms((100, 0))
    scheduler = Scheduler(1000, max_batch_tokens=256, max_sequences=64, beside=rooms)
    scheduler.add(Running(0, [1] * 4, 100, client=b"a", priority=one))
    drive(scheduler, 2)
    for i in range(1, 33):
        scheduler.add(Running(i, [1] * 4, 100, client=b"a", priority=crowd))
    drive(scheduler, 2)
    rooms.room_for = (0, 0)
    few = set(range(1, 33)) if one == BACKGROUND else {0}
    assert [ids_of(plan) for plan in drive(scheduler, 3)] == [few] * 3
    rooms.room_for = (0, 8)
    assert all(few < ids_of(plan) for plan in drive(scheduler, 8)), "and the others have what there is room for"


@pytest.mark.parametrize("keys", [True, False], ids=["ten keys", "one address"])
def test_who_has_asked_for_128_answers_is_a_crowd_however_few_of_them_run(keys: bool) -> None:
    """Ten requests of 128 have two places each; the one beside them has one."""
    rooms = Rooms((100, 0))
    scheduler = Scheduler(1000, max_batch_tokens=256, max_sequences=21, beside=rooms)
    for i in range(1280):
        scheduler.add(Running(i, [1] * 4, 100, client=b"%d" % (i // 128 if keys else 0), group=i // 128 * 128))
    drive(scheduler, 4)
    scheduler.add(Running(9999, [1] * 4, 100, client=b"one" if keys else b"0"))
    drive(scheduler, 4)
    assert max(Counter(s.group for s in scheduler.running).values()) == 2
    rooms.room_for = (0, 0)
    assert [ids_of(plan) for plan in drive(scheduler, 3)] == [{9999}] * 3


def test_a_small_prompt_passes_texts_that_others_have_piled_up() -> None:
    rooms = Rooms()
    scheduler = Scheduler(1000, max_batch_tokens=64, max_sequences=32, beside=rooms)
    for i in range(16):
        scheduler.add(Running(i, [1] * 200, 200, client=b"embeds", group=i, embeds=True))
    drive(scheduler, 4)
    scheduler.add(Running(99, [2] * 6, 20, client=b"talks"))
    assert 99 in ids_of(drive(scheduler, 1)[0])


def test_texts_share_the_budget_and_leave_nothing_in_the_prefix_cache() -> None:
    scheduler = Scheduler(20, max_batch_tokens=50, max_sequences=4)
    text = Running(0, [1] * 120, 120, embeds=True)
    scheduler.add(text)
    scheduler.add(Running(1, [1] * 40, 60))
    sizes = [[(c.sequence.request_id, len(c.tokens), c.samples) for c in p.chunks] for p in drive(scheduler, 4)]
    assert sizes == [
        [(1, 40, True), (0, 10, False)],
        [(1, 1, True), (0, 49, False)],
        [(1, 1, True), (0, 49, False)],
        [(1, 1, True), (0, 12, False)],
    ]
    assert text.state == "done" and text.n_cached == 0
    scheduler.cancel(1)
    scheduler.pool.forget_all()
    scheduler.add(Running(2, [1] * 120, 120, embeds=True))
    drive(scheduler, 4)
    assert scheduler.pool.n_cached == 0
