"""The order of a curriculum: its guarantees, and comparison with plain counting."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quadriga.errors import ConfigError
from quadriga.train.order import MIX_PERIOD, Curriculum, DomainShape, Mix, StageShape, hash64, shuffle

UNIT = 24
PINNED_SHUFFLE = [2, 7, 8, 5, 3, 9, 1, 4, 0, 6]
PINNED_PLACES = [
    (0, 384),
    (1, 93),
    (0, 92),
    (0, 280),
    (1, 69),
    (0, 392),
    (0, 100),
    (1, 101),
    (0, 288),
    (1, 77),
    (0, 376),
    (0, 108),
    (0, 304),
    (1, 289),
    (0, 352),
    (1, 109),
    (0, 20),
    (0, 116),
]


@given(n=st.integers(1, 500), key=st.integers(0, 2**64 - 1))
@settings(max_examples=40, deadline=None)
def test_shuffle_is_a_permutation(n: int, key: int) -> None:
    assert sorted(shuffle(i, n, key) for i in range(n)) == list(range(n))


def test_shuffle_moves_things_and_depends_on_the_key() -> None:
    n = 1000
    one, two = ([shuffle(i, n, key) for i in range(n)] for key in (1, 2))
    assert sum(a == b for a, b in zip(one, two, strict=True)) < 20  # about 1 is expected
    assert sum(i == a for i, a in enumerate(one)) < 20
    steps = [abs(a - b) for a, b in pairwise(one)]
    assert 250 < sum(steps) / len(steps) < 420  # n / 3 for a random order


@given(
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(lambda w: sum(w) > 1e-3),
    seed=st.integers(0, 99),
    start=st.integers(0, 3 * MIX_PERIOD),
)
@example(weights=[0.3, 0.5, 0.2], seed=7, start=2 * MIX_PERIOD - 100)  # a window across the end of a period
@settings(max_examples=25, deadline=None)
def test_a_mix_counts_its_rows_and_keeps_its_proportions(weights: list[float], seed: int, start: int) -> None:
    mix = Mix(weights, seed)
    n = 200
    counts = [0] * len(weights)
    for row in range(start, start + n):
        assert mix.before(row, mix.domain(row)) - mix.before(start, mix.domain(row)) == counts[mix.domain(row)]
        counts[mix.domain(row)] += 1
    for d, weight in enumerate(weights):
        share = weight / sum(weights)
        # Each domain is jittered by up to one row at both ends of the window, which moves the others; weights are
        # rounded to parts of MIX_PERIOD, and a weight above 0 gets at least one part, which the others give.
        slack = 2 + len(weights) + n * (len(weights) + 1) / MIX_PERIOD
        assert abs(counts[d] - n * share) <= slack
        assert (mix.quotas[d] == 0) == (weight == 0)
    assert sum(mix.quotas) == MIX_PERIOD


stage_shapes = st.builds(
    StageShape,
    seq_len=st.sampled_from([2, 3, 4, 6, 8, 12, 24]),
    n_rows=st.integers(1, 7),
    n_steps=st.integers(1, 9),
    weights=st.fixed_dictionaries({"a": st.floats(0.1, 1), "b": st.floats(0.1, 1)}),
)


def _places(curriculum: Curriculum) -> list[tuple[int, int, int]]:
    """(domain, first token, seq_len) of every row, in order."""
    found = []
    for number, stage in enumerate(curriculum.stages):
        for row in range(stage.n_rows * stage.n_steps):
            found.append((*curriculum.place(number, row), stage.seq_len))
    return found


@given(
    sizes=st.tuples(st.integers(UNIT, 200), st.integers(UNIT, 900)),
    stages=st.lists(stage_shapes, min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_no_token_is_read_twice_in_an_epoch(sizes: tuple[int, int], stages: list[StageShape], seed: int) -> None:
    domains = [DomainShape("a", sizes[0]), DomainShape("b", sizes[1])]
    curriculum = Curriculum(domains, stages, UNIT, seed)
    read: list[list[int]] = [[], []]
    for domain, first, length in _places(curriculum):
        read[domain].extend((first + i) % sizes[domain] for i in range(length))
    for d, size in enumerate(sizes):
        epochs = -(-curriculum.units_read[d] // (size // UNIT))
        # A token is read at most once in each epoch that was begun, whichever stages the epoch spans.
        assert max((read[d].count(token) for token in set(read[d])), default=0) <= epochs
        units = sum(-(-curriculum.stage_rows(s, d) // (UNIT // stage.seq_len)) for s, stage in enumerate(stages))
        assert curriculum.units_read[d] == units
        assert len(read[d]) > (units - len(stages) * (1 + epochs)) * UNIT  # less than one unit left over per segment


@given(stages=st.lists(stage_shapes, min_size=2, max_size=3), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_a_later_stage_changes_no_earlier_one(stages: list[StageShape], seed: int) -> None:
    domains = [DomainShape("a", 100), DomainShape("b", 250)]
    whole = _places(Curriculum(domains, stages, UNIT, seed))
    before = _places(Curriculum(domains, stages[:-1], UNIT, seed))
    assert whole[: len(before)] == before


def test_epochs_and_seeds_read_in_different_orders() -> None:
    domains = [DomainShape("a", 1200)]
    stage = StageShape(seq_len=24, n_rows=50, n_steps=2, weights={})
    rows = _places(Curriculum(domains, [stage], UNIT, 1))
    first, second = rows[:50], rows[50:]
    assert sorted(first) != sorted(second)  # cut at other places
    assert [row[1] for row in first] != [row[1] for row in second]
    assert rows != _places(Curriculum(domains, [stage], UNIT, 2))


def test_the_order_is_the_published_one() -> None:
    """SplitMix64's published numbers, and a fixed permutation: an old run must resume in the same order in any release."""
    mask = 2**64 - 1
    state, seeds = 0, []
    for _ in range(3):  # the finaliser over a counter, as its authors publish it for seed 0
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        seeds.append(z ^ (z >> 31))
    assert seeds[0] == 0xE220A8397B1DCDAF
    h = 0x9E3779B97F4A7C15
    for value in (3, 2**64 - 1, 0):
        z = ((h ^ value) + 0x9E3779B97F4A7C15) & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        h = z ^ (z >> 31)
    assert hash64(3, -1, 0) == h
    assert [shuffle(i, 10, 7) for i in range(10)] == PINNED_SHUFFLE
    curriculum = Curriculum(
        [DomainShape("a", 500), DomainShape("b", 300)],
        [StageShape(seq_len=8, n_rows=4, n_steps=3, weights={"a": 2, "b": 1}), StageShape(24, 2, 3, {})],
        UNIT,
        seed=3,
    )
    assert [place[:2] for place in _places(curriculum)] == PINNED_PLACES


def test_each_stage_orders_its_domains_differently() -> None:
    stage = StageShape(seq_len=8, n_rows=10, n_steps=6, weights={"a": 1, "b": 1, "c": 1})
    domains = [DomainShape(name, 5000) for name in "abc"]
    dealt = [place[0] for place in _places(Curriculum(domains, [stage] * 3, UNIT, 1))]
    assert len({tuple(dealt[60 * i : 60 * (i + 1)]) for i in range(3)}) == 3


def test_epochs_differ_in_order_and_starting_point() -> None:
    """Not even a shifted order: neighbours in one epoch are not neighbours in the next."""
    domains, n = [DomainShape("a", 2400)], 100
    rows = [row[1] for row in _places(Curriculum(domains, [StageShape(24, n, 3, {})], UNIT, 1))]
    epochs = [rows[:n], rows[n : 2 * n], rows[2 * n :]]
    followers = [{(b - a) % 2400 for a, b in pairwise(epoch)} for epoch in epochs]
    assert all(len(steps) > 40 for steps in followers), "an order at random"
    moves = [{(b - a) % 2400 for a, b in zip(one, two, strict=True)} for one, two in pairwise(epochs)]
    assert all(len(steps) > 40 for steps in moves), "another order, not the same one moved"
    phases = [{first % 24 for first in epoch} for epoch in epochs]
    assert all(len(phase) == 1 for phase in phases) and len(set.union(*phases)) > 1, "cut at other places"


def test_rows_of_a_unit_come_far_apart_and_in_another_order_for_each_unit() -> None:
    stage = StageShape(seq_len=4, n_rows=60, n_steps=1, weights={})
    rows = [row[1] for row in _places(Curriculum([DomainShape("a", 240)], [stage], UNIT, 2))]
    when = {first: i for i, first in enumerate(rows)}
    apart = [abs(when[first] - when[(first + 4) % 240]) for first in rows]
    assert sum(apart) / len(apart) > 10, "what stands together in a document comes at different times"
    assert len({first % UNIT for first in rows[:10]}) > 2, "units begin with different rows"


def test_impossible_curricula_are_refused() -> None:
    stage = StageShape(seq_len=8, n_rows=4, n_steps=3, weights={"a": 1.0, "c": 1.0})
    with pytest.raises(ConfigError, match="mix names c"):
        Curriculum([DomainShape("a", 100), DomainShape("b", 100)], [stage], UNIT, 0)
    stage = StageShape(seq_len=8, n_rows=4, n_steps=3, weights={"a": 1.0})
    with pytest.raises(ConfigError, match="less than one unit"):
        Curriculum([DomainShape("a", UNIT - 1)], [stage], UNIT, 0)
    # b is not read, so its size does not matter.
    Curriculum([DomainShape("a", 100), DomainShape("b", 3)], [stage], UNIT, 0)
