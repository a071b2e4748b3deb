"""What the scheduler chooses, by hand: answers are right whatever it chooses, so these count work, hits and turns."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import pytest

from quadriga.engine.blocks import BlockPool, chain_key
from quadriga.engine.lookup import Lookup
from quadriga.engine.scheduler import MOST_LOGIT_ROWS, Scheduler
from quadriga.engine.sequences import BACKGROUND, PassPlan, Running
from quadriga.quant.packed import BLOCK_TOKENS
from tests.engine.test_scheduler import FakeModel, answer


class Desk(Scheduler):
    """A scheduler with its model."""

    def __init__(self, n_blocks: int, **options: int) -> None:
        super().__init__(n_blocks, **options)  # type: ignore[arg-type]
        self.model = FakeModel()


def passes(scheduler: Desk) -> list[list[tuple[int, int, int]]]:
    """Run to the end: (request, first position, tokens) of every chunk of every pass."""
    found = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        found.append(chunks(plan))
        commit(scheduler, plan)
    return found


def chunks(plan: PassPlan) -> list[tuple[int, int, int]]:
    return [(c.sequence.request_id, c.start, len(c.tokens)) for c in plan.chunks]


def commit(scheduler: Desk, plan: PassPlan) -> None:
    made = scheduler.model.run(plan)
    sequences = {c.sequence.request_id: c.sequence for c in plan.chunks}
    done = {n for n, t in made.items() if len(sequences[n].tokens) + len(t) >= sequences[n].max_tokens}
    scheduler.commit(plan, made, done)
    scheduler.check()


def add(scheduler: Desk, *sequences: Running) -> None:
    for sequence in sequences:
        scheduler.add(sequence)


def work(found: Sequence[Sequence[tuple[int, int, int]]], request: int) -> int:
    """Tokens that were computed for a request."""
    return sum(n for one in found for number, _, n in one if number == request)


# Admission -----------------------------------------------------------------------------------------------------------


def test_nobody_is_let_in_to_be_put_out_again() -> None:
    """The second prompt's blocks are not free while the first runs: it waits, and nothing is computed twice."""
    scheduler = Desk(6, max_batch_tokens=100, max_sequences=4, prefix_cache=False)
    first, second = Running(0, [1] * 40, 60), Running(1, [2] * 60, 70)
    add(scheduler, first, second)
    found = passes(scheduler)
    assert scheduler.n_preemptions == 0
    assert work(found, 0) == 59 and work(found, 1) == 69, "every position once, but the last, which nobody reads"
    started = next(i for i, one in enumerate(found) if any(number == 1 for number, _, _ in one))
    assert started == 20, "as soon as the first is done"


def test_alone_it_is_let_in_whatever_is_free() -> None:
    scheduler = Desk(3, max_batch_tokens=100, max_sequences=4)
    add(scheduler, Running(0, [1] * 47, 48))
    assert passes(scheduler) == [[(0, 0, 47)]]


def test_the_next_in_line_is_never_overtaken() -> None:
    """A short one that would fit waits behind a long one that does not: else a long one might wait for ever."""
    scheduler = Desk(6, max_batch_tokens=100, max_sequences=4)
    add(scheduler, Running(0, [1] * 40, 60, priority=1), Running(1, [2] * 60, 70, priority=1), Running(2, [3] * 5, 7))
    found = passes(scheduler)
    first_seen = {number: i for i, one in reversed(list(enumerate(found))) for number, _, _ in one}
    assert first_seen[0] < first_seen[1] <= first_seen[2]


def test_as_many_run_at_once_as_may_and_no_more() -> None:
    scheduler = Desk(50, max_batch_tokens=100, max_sequences=3)
    add(scheduler, *(Running(i, [i] * 4, 6) for i in range(7)))
    found = passes(scheduler)
    assert [sorted({number for number, _, _ in one}) for one in found] == [
        [0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5], [6], [6],
    ]  # fmt: skip


def test_priority_goes_first_and_equals_in_the_order_they_came() -> None:
    scheduler = Desk(50, max_batch_tokens=100, max_sequences=1)
    for number, priority in enumerate([0, 5, -3, 5, 0, 9]):
        scheduler.add(Running(number, [1] * 3, 4, priority=priority))
    assert [one[0][0] for one in passes(scheduler)] == [5, 1, 3, 0, 4, 2]


# Passes --------------------------------------------------------------------------------------------------------------


def test_decoding_comes_first_then_prompts_in_turn_cut_to_fit() -> None:
    scheduler = Desk(100, max_batch_tokens=20, max_sequences=5, prefix_cache=False)
    add(scheduler, Running(0, [1] * 3, 30), Running(1, [2] * 45, 50))
    plan = scheduler.schedule()
    assert chunks(plan) == [(0, 0, 3), (1, 0, 17)]
    commit(scheduler, plan)
    add(scheduler, Running(2, [3] * 9, 12), Running(3, [4] * 2, 9, priority=1))
    plan = scheduler.schedule()
    assert chunks(plan) == [(0, 3, 1), (3, 0, 2), (2, 0, 9), (1, 17, 8)], "who has had the most goes on last"
    commit(scheduler, plan)
    plan = scheduler.schedule()
    assert chunks(plan) == [(3, 2, 1), (0, 4, 1), (2, 9, 1), (1, 25, 17)]
    commit(scheduler, plan)
    assert chunks(scheduler.schedule()) == [(3, 3, 1), (0, 5, 1), (2, 10, 1), (1, 42, 3)]


def test_a_chunk_whose_every_row_is_wanted_is_bounded() -> None:
    scheduler = Desk(60, max_batch_tokens=1000, max_sequences=2)
    add(scheduler, Running(0, [1] * 600, 602, all_logits=True), Running(1, [2] * 300, 301))
    found = passes(scheduler)
    assert [n for one in found for number, _, n in one if number == 0] == [MOST_LOGIT_ROWS, MOST_LOGIT_ROWS, 88, 1]
    assert [n for one in found for number, _, n in one if number == 1] == [300]


def test_guesses_go_no_further_than_the_answer_and_the_budget() -> None:
    scheduler = Desk(20, max_batch_tokens=6, max_sequences=3)
    one, two = Running(0, [1, 2], 20), Running(1, [3, 4], 6)
    add(scheduler, one, two)
    commit(scheduler, scheduler.schedule())
    one.draft, two.draft = [9] * 8, [9] * 8
    plan = scheduler.schedule()
    assert [(len(c.tokens), c.n_draft) for c in plan.chunks] == [(6, 5)], "the budget is spent on the first"
    commit(scheduler, plan)
    one.draft, two.draft = [], [9] * 8
    plan = scheduler.schedule()
    assert [(len(c.tokens), c.n_draft) for c in plan.chunks] == [(1, 0), (3, 2)], "of three to come two may be guessed"


def test_blocks_of_wrong_guesses_are_given_back_and_right_ones_are_kept() -> None:
    scheduler = Desk(20, max_batch_tokens=90, max_sequences=3)
    one = Running(0, [1] * 10, 80)
    scheduler.add(one)
    commit(scheduler, scheduler.schedule())
    one.draft = [9] * 40
    plan = scheduler.schedule()
    assert len(one.blocks) == 4
    commit(scheduler, plan)
    assert len(one.blocks) == 1 and one.n_computed == 11 and len(one.tokens) == 12
    one.draft = answer(one.tokens, 45)[12:]
    commit(scheduler, scheduler.schedule())
    assert one.n_computed == 45 and len(one.tokens) == 46 and len(one.blocks) == 3
    assert one.tokens == answer([1] * 10, 46)


# Giving way ----------------------------------------------------------------------------------------------------------


def test_the_last_in_line_gives_way_and_comes_back() -> None:
    scheduler = Desk(6, max_batch_tokens=100, max_sequences=2, prefix_cache=False)
    first, second = Running(0, [1] * 30, 80), Running(1, [2] * 30, 60)
    add(scheduler, first, second, Running(2, [3] * 4, 6))
    found = passes(scheduler)
    assert (first.n_preempted, second.n_preempted) == (0, 1) and scheduler.n_preemptions == 1
    assert work(found, 0) == 79, "the first computes nothing twice"
    begins = [i for i, one in enumerate(found) if (1, 0) in [(number, start) for number, start, _ in one]]
    assert len(begins) == 2, "it came back once, when it could stay"
    assert second.tokens == answer([2] * 30, 60)


def test_who_matters_more_gives_way_last() -> None:
    """A later request of higher priority takes the blocks of an earlier one, never the other way round."""
    scheduler = Desk(6, max_batch_tokens=100, max_sequences=3, prefix_cache=False)
    low, high = Running(0, [1] * 30, 80), Running(1, [2] * 30, 80, priority=1)
    scheduler.add(low)
    commit(scheduler, scheduler.schedule())
    scheduler.add(high)
    passes(scheduler)
    assert (low.n_preempted > 0, high.n_preempted) == (True, 0)
    assert low.tokens == answer([1] * 30, 80) and high.tokens == answer([2] * 30, 80)


def test_a_lower_priority_takes_no_place_from_a_higher() -> None:
    """However much more the other has."""
    scheduler = Desk(20, max_batch_tokens=100, max_sequences=3)
    add(scheduler, *(Running(i, [i] * 4, 9, priority=1, client=b"a") for i in range(3)))
    commit(scheduler, scheduler.schedule())
    scheduler.add(Running(3, [3] * 4, 9, client=b"b"))
    found = passes(scheduler)
    assert scheduler.n_preemptions == 0 and {number for number, _, _ in found[0]} == {0, 1, 2}


def test_the_background_gives_its_places_to_whoever_comes_but_one() -> None:
    """To its own client too, and to nobody else of the background; its oldest is like anybody's request by then."""
    scheduler = Desk(20, max_batch_tokens=100, max_sequences=3)
    add(scheduler, *(Running(i, [i] * 4, 30, priority=BACKGROUND, client=b"a") for i in range(4)))
    commit(scheduler, scheduler.schedule())
    assert {s.request_id for s in scheduler.running} == {0, 1, 2}
    add(scheduler, *(Running(i, [i] * 4, 20, client=b"a") for i in (7, 8)))
    commit(scheduler, scheduler.schedule())
    assert {s.request_id for s in scheduler.running} == {0, 7, 8}, "the newest went"
    scheduler.add(Running(9, [9] * 4, 20, client=b"b"))
    found = passes(scheduler)
    ends = {number: max(i for i, one in enumerate(found) if number in {n for n, _, _ in one}) for number in range(4)}
    assert max(i for i, one in enumerate(found) for n, _, _ in one if n in (7, 8, 9)) < min(ends[i] for i in (1, 2, 3))


@pytest.mark.parametrize("load", ["answers", "prompts", "no places"])
def test_the_background_moves_one_at_a_time_whatever_comes(load: str) -> None:
    """Every pass brings another client's request, more than can be computed; four lines of two keys go on beside them."""
    places = 2 if load == "no places" else 12
    scheduler = Desk(400, max_batch_tokens=16, max_sequences=places, prefix_cache=False)
    lines = [Running(i, [i] * 20, 30, priority=BACKGROUND, client=b"%d" % (i // 3)) for i in range(4)]
    add(scheduler, *lines)
    n_passes = 0
    while any(line.state != "done" for line in lines):
        n_tokens, longest = (60, 62) if load == "prompts" else (4, 24)
        scheduler.add(Running(100 + n_passes, [5] * n_tokens, longest, client=b"c%d" % (n_passes % 7)))
        commit(scheduler, scheduler.schedule())
        assert sum(line.state != "done" and not line.in_background for line in lines) <= 1
        n_passes += 1
        assert n_passes < 4 * 10 * 12, "each of ten tokens waits for no more than its turn among the places"
    while scheduler.running or scheduler.waiting:
        commit(scheduler, scheduler.schedule())
    assert [line.tokens for line in lines] == [answer([i] * 20, 30) for i in range(4)]


def test_guesses_are_given_up_before_anybody_gives_way() -> None:
    scheduler = Desk(4, max_batch_tokens=100, max_sequences=2, prefix_cache=False)
    one, two = Running(0, [1] * 17, 60), Running(1, [2] * 17, 34)
    add(scheduler, one, two)
    commit(scheduler, scheduler.schedule())
    one.draft = [9] * 30
    plan = scheduler.schedule()
    assert scheduler.n_preemptions == 0 and [c.sequence.request_id for c in plan.chunks] == [0, 1]
    assert [(len(c.tokens), c.n_draft) for c in plan.chunks] == [(1, 0), (1, 0)]


def test_the_last_in_line_uses_the_room_it_has() -> None:
    """Its next block is not free, but part of its last one is: it takes that and goes on later."""
    scheduler = Desk(5, max_batch_tokens=20, max_sequences=2, prefix_cache=False)
    first, last = Running(0, [1] * 16, 50), Running(1, [2] * 60, 62)
    add(scheduler, first, last)
    found = passes(scheduler)
    assert [one[1] for one in found[:4]] == [(1, 0, 4), (1, 4, 19), (1, 23, 19), (1, 42, 6)]
    assert [number for number, _, _ in found[4]] == [0], "now it has none, and gives way"
    assert first.tokens == answer([1] * 16, 50) and last.tokens == answer([2] * 60, 62)
    assert work(found, 0) == 49 and last.n_preempted == 1


def test_what_was_found_in_the_cache_is_said_of_the_first_time_only() -> None:
    scheduler = Desk(5, max_batch_tokens=100, max_sequences=2)
    add(scheduler, Running(9, [2] * 20, 21))
    passes(scheduler)
    first, second = Running(0, [1] * 20, 70), Running(1, [2] * 20, 40)
    add(scheduler, first, second)
    passes(scheduler)
    assert second.n_preempted > 0 and second.n_cached == 16 and first.n_cached == 0
    assert second.tokens == answer([2] * 20, 40)


# The prefix cache ----------------------------------------------------------------------------------------------------


def serve(scheduler: Desk, number: int, prompt: list[int], **more: object) -> int:
    """Run a request of one new token; how many of its tokens were found."""
    sequence = Running(number, list(prompt), len(prompt) + 1, **more)  # type: ignore[arg-type]
    scheduler.add(sequence)
    found = passes(scheduler)
    assert work(found, number) == len(prompt) - sequence.n_cached
    return sequence.n_cached


def test_the_end_of_a_prefix_is_taken_before_its_beginning() -> None:
    scheduler = Desk(5)
    long, other = [1, 2] * 32, [3] * 40
    assert serve(scheduler, 0, long) == 0
    assert scheduler.pool.n_cached == 4
    assert serve(scheduler, 1, other) == 0  # three blocks: the free one and two of the long one's
    assert serve(scheduler, 2, long) == 32, "its beginning, the better half, is still there"


def test_prefixes_are_forgotten_in_the_order_they_were_left() -> None:
    scheduler = Desk(4)
    prompts = [[i] * 17 for i in range(3)]
    for i, prompt in enumerate(prompts):
        assert serve(scheduler, i, prompt) == 0
    assert serve(scheduler, 3, prompts[0]) == 16, "the first is used again"
    assert serve(scheduler, 4, [9] * 17) == 0, "one of them must go"
    assert serve(scheduler, 5, prompts[0]) == serve(scheduler, 6, prompts[2]) == 16
    assert serve(scheduler, 7, prompts[1]) == 0, "the one that nobody had asked for the longest"


def test_what_is_free_is_taken_before_what_is_known() -> None:
    scheduler = Desk(12)
    assert serve(scheduler, 0, [1] * 64) == 0
    for i in range(1, 6):
        assert serve(scheduler, i, [2] * 15 + [i]) == 0
    assert serve(scheduler, 6, [1] * 64) == 48, "five blocks were free all the time"


def test_a_prefix_belongs_to_its_salt_and_to_all_that_was_before() -> None:
    scheduler = Desk(40)
    prompt = [1] * 16 + [2] * 16 + [3] * 16 + [4]
    assert serve(scheduler, 0, prompt, salt=b"one") == 0
    assert serve(scheduler, 1, prompt, salt=b"one") == 48
    assert serve(scheduler, 2, prompt, salt=b"two") == 0
    assert serve(scheduler, 3, prompt) == 0
    assert serve(scheduler, 4, [9] * 16 + prompt[16:], salt=b"one") == 0, "the same words after others are not the same"
    assert serve(scheduler, 5, [257] * 16 + prompt[16:], salt=b"one") == 0, "token 257 is not token 1"
    assert serve(scheduler, 6, prompt[:16] + [9] * 17, salt=b"one") == 16
    assert serve(scheduler, 7, prompt[:32], salt=b"one") == 16, "the last token is always computed"


def test_only_whole_blocks_are_known() -> None:
    scheduler = Desk(20, max_batch_tokens=24, max_sequences=2)
    one = Running(0, [1] * 40, 42)
    scheduler.add(one)
    commit(scheduler, scheduler.schedule())
    assert len(one.keys) == 1 and one.n_computed == 24
    passes(scheduler)
    assert scheduler.pool.n_cached == 2 and scheduler.pool.n_free == 20


@pytest.mark.parametrize("way", ["no cache", "all logits"])
def test_without_the_cache_nothing_is_found_or_kept(way: str) -> None:
    scheduler = Desk(20, prefix_cache=way != "no cache")
    serve(scheduler, 0, [1] * 40)
    sequence = Running(1, [1] * 40, 41, all_logits=way == "all logits")
    scheduler.add(sequence)
    passes(scheduler)
    assert sequence.n_cached == 0
    assert scheduler.pool.n_cached == (0 if way == "no cache" else 2)


def test_a_running_prefix_is_shared_at_once() -> None:
    scheduler = Desk(7, max_batch_tokens=100, max_sequences=4)
    one, two = Running(0, [1] * 33, 60), Running(1, [1] * 33, 60)
    scheduler.add(one)
    commit(scheduler, scheduler.schedule())
    scheduler.add(two)
    plan = scheduler.schedule()
    assert chunks(plan) == [(0, 33, 1), (1, 32, 1)] and one.blocks.rows[0][:2] == two.blocks.rows[0][:2]
    assert scheduler.pool.n_free == 7 - 4
    commit(scheduler, plan)
    assert scheduler.cancel(0) and two.blocks.n_held == 3 and scheduler.pool.n_free == 7 - 3


def test_a_cancelled_one_leaves_its_blocks_wherever_it_is() -> None:
    scheduler = Desk(7, max_batch_tokens=100, max_sequences=1, prefix_cache=False)
    add(scheduler, Running(0, [1] * 33, 60), Running(1, [1] * 33, 60))
    made = scheduler.model.run(plan := scheduler.schedule())
    assert scheduler.cancel(0) and scheduler.pool.n_free == 7 and not scheduler.running
    scheduler.commit(plan, made, ())
    assert scheduler.pool.n_free == 7 and scheduler.cancel(1) and not scheduler.has_work
    assert not scheduler.cancel(1)


# Blocks and guesses --------------------------------------------------------------------------------------------------


def test_a_found_block_is_nobody_elses() -> None:
    pool = BlockPool(2)
    held = pool.allocate()
    assert held is not None
    pool.publish(held, b"key")
    pool.release(held)
    assert pool.lookup(b"key") == held and pool.lookup(b"key") == held and pool.n_cached == 0
    assert pool.allocate() is not None and pool.allocate() is None
    pool.release(held)
    assert pool.allocate() is None, "the other holder has it still"
    pool.release(held)
    assert pool.n_cached == 1 and pool.allocate() == held and pool.lookup(b"key") is None


def test_the_first_block_of_a_key_keeps_it() -> None:
    pool = BlockPool(3)
    one, two = pool.allocate(), pool.allocate()
    assert one is not None and two is not None
    pool.publish(one, b"key")
    pool.publish(two, b"key")
    pool.publish(one, b"other")
    assert pool.lookup(b"key") == one and pool.lookup(b"other") is None
    pool.release(two)
    assert pool.n_cached == 0 and pool.n_free == 2


def test_keys_are_the_published_hash() -> None:
    tokens = [257, 1, 65536, *range(13)]
    raw = b"".join(token.to_bytes(4, "little") for token in tokens)
    assert len(tokens) == BLOCK_TOKENS
    assert chain_key(b"parent", tokens, b"salt") == blake2b(b"parent" + raw, digest_size=16, key=b"salt").digest()


def test_the_longest_and_latest_match_is_the_guess() -> None:
    said = [1, 2, 3, 7, 2, 3, 8, 1, 2, 3]
    assert Lookup().guess(said, 3) == [7, 2, 3], "three tokens match better than two that came later"
    assert Lookup().guess([5, 2, 3, 7, 6, 2, 3, 8, 9, 2, 3], 2) == [8, 9], "the latest of equal matches"
    assert Lookup().guess([1, 2, 3, 4], 3) == [] and Lookup().guess([2, 3, 2, 3], 5) == [2, 3]
    grown, lookup = [], Lookup()
    for token in [4, 5, 6, 4, 5, 6, 4]:
        grown.append(token)
        lookup.guess(grown, 2)
    assert lookup.guess([*grown, 5], 2) == [6, 4]
