"""Turns by client and request: against a plain statement of the rule, and what an arrival costs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadriga.engine.turns import Turns

TURN = 50


@dataclass(eq=False)
class Work:
    """Something that waits."""

    arrival: int
    client: str = "a"
    group: int = 0
    priority: int = 0
    n_pending: int = 1


class Plainly:
    """The rule, by looking at everything every time."""

    def __init__(self) -> None:
        self.service: dict[tuple[Any, ...], float] = {}  # (priority, client) or (priority, client, group)
        self.clock: dict[tuple[Any, ...], float] = {}  # (priority,) or (priority, client)
        self.alive: list[Work] = []
        self.waiting: list[Work] = []

    @staticmethod
    def path(work: Work) -> list[tuple[Any, ...]]:
        return [(work.priority,), (work.priority, work.client), (work.priority, work.client, work.group)]

    def members(self, flow: tuple[Any, ...], of: list[Work]) -> list[Work]:
        return [w for w in of if self.path(w)[len(flow) - 1] == flow]

    def add(self, work: Work) -> None:
        if work not in self.alive:
            for parent, flow in zip(self.path(work), self.path(work)[1:], strict=False):
                clock = self.clock.setdefault(parent, 0.0)
                if not self.members(flow, self.alive):
                    self.service[flow] = clock
                elif not self.members(flow, self.waiting):
                    self.service[flow] = max(self.service[flow], clock)
            self.alive.append(work)
        self.waiting.append(work)

    def first(self) -> Work:
        def next_of(flow: tuple[Any, ...]) -> Work:
            mine = self.members(flow, self.waiting)
            if len(flow) == 3:
                return min(mine, key=lambda w: w.arrival)
            firsts = [next_of(child) for child in {self.path(w)[len(flow)] for w in mine}]
            return min(firsts, key=lambda w: (self.after(self.path(w)[len(flow)], w), w.arrival))

        return next_of((max(w.priority for w in self.waiting),))

    def after(self, flow: tuple[Any, ...], work: Work) -> float:
        return self.service[flow] + min(work.n_pending, TURN)

    def serve(self, work: dict[Work, int]) -> None:
        for one, n in work.items():
            for parent, flow in zip(self.path(one), self.path(one)[1:], strict=False):
                self.service[flow] += n
                children = {self.path(w)[len(parent)] for w in self.members(parent, self.alive)}
                self.clock[parent] += n / len(children)

    def done(self, work: Work) -> None:
        self.alive.remove(work)
        for flow in self.path(work):
            if not self.members(flow, self.alive):
                self.service.pop(flow, None)
                self.clock.pop(flow, None)


MOVES = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "take", "serve", "back", "drop", "done"]),
        st.sampled_from("abc"),
        st.integers(0, 3),
        st.sampled_from([0, 0, 1]),
        st.integers(1, 90),
    ),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(MOVES)
def test_the_next_is_the_one_that_the_plain_rule_names(moves: list[tuple[str, str, int, int, int]]) -> None:
    turns, plainly = Turns[Work](TURN), Plainly()
    running: list[Work] = []
    for number, (move, client, group, priority, n) in enumerate(moves):
        if move == "add":
            work = Work(number, client, group, priority, n)
            turns.add(work)
            plainly.add(work)
        elif move == "take" and plainly.waiting:
            work = turns.first()
            turns.take(work)
            plainly.waiting.remove(work)
            running.append(work)
        elif move == "serve" and running:
            served = {w: 1 + (n + i) % 70 for i, w in enumerate(running)}
            turns.serve(served)
            plainly.serve(served)
        elif move == "back" and running:
            work = running.pop(n % len(running))
            turns.add(work)
            plainly.add(work)
        elif move == "drop" and plainly.waiting:
            work = plainly.waiting.pop(n % len(plainly.waiting))
            turns.take(work)
            turns.done(work)
            plainly.done(work)
        elif move == "done" and running:
            work = running.pop(n % len(running))
            turns.done(work)
            plainly.done(work)
        assert len(turns) == len(plainly.waiting) and {*turns} == {*plainly.waiting}
        if plainly.waiting:
            assert turns.first() is plainly.first()
    for work in plainly.waiting:
        turns.take(work)
        turns.done(work)
    for work in running:
        turns.done(work)
    assert not turns._roots and not turns._paths, "nothing is remembered of who has gone"


def calls_of(work: Callable[[], None]) -> int:
    """Functions that were called meanwhile, Python's and C's."""
    n = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal n
        n += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return n


@pytest.mark.parametrize("spread", ["one request", "one client", "many clients"])
def test_an_arrival_costs_the_same_however_many_wait(spread: str) -> None:
    def work(i: int) -> Work:
        group = 0 if spread == "one request" else i
        return Work(i, client=str(i) if spread == "many clients" else "a", group=group, n_pending=1 + i % 7)

    def through(n: int) -> None:
        turns = Turns[Work](TURN)
        for i in range(n):
            turns.add(work(i))
        while turns:
            first = turns.first()
            turns.take(first)
            turns.serve({first: 1})
            turns.done(first)

    assert calls_of(lambda: through(4000)) < 4.4 * calls_of(lambda: through(1000))


def test_a_small_request_passes_what_one_client_has_piled_up() -> None:
    turns = Turns[Work](TURN)
    for i in range(100):
        turns.add(Work(i, client="heavy", group=i // 10, n_pending=40))
    turns.add(Work(100, client="light", n_pending=3))
    assert turns.first().client == "light"


def test_a_small_request_passes_the_many_answers_of_another_of_the_same_client() -> None:
    turns = Turns[Work](TURN)
    for i in range(128):
        turns.add(Work(i, group=1, n_pending=10))
    for _ in range(20):
        first = turns.first()
        turns.take(first)
        turns.serve({first: 10})
        turns.done(first)
    turns.add(Work(200, group=2, n_pending=10))
    order = []
    for _ in range(2):
        first = turns.first()
        turns.take(first)
        turns.serve({first: 10})
        turns.done(first)
        order.append(first.group)
    assert order == [1, 2], "one turn each, the older first"


def test_having_been_away_earns_nothing() -> None:
    turns = Turns[Work](TURN)
    here = [Work(i, client="here", group=i, n_pending=10) for i in range(40)]
    for work in here:
        turns.add(work)
    for _ in range(20):
        first = turns.first()
        turns.take(first)
        turns.serve({first: 10})
        turns.done(first)
    for i in range(40):
        turns.add(Work(100 + i, client="back", group=100 + i, n_pending=10))
    order = []
    for _ in range(20):
        first = turns.first()
        turns.take(first)
        turns.serve({first: 10})
        turns.done(first)
        order.append(first.client)
    assert 9 <= order.count("here") <= 11, "from now on they take turns"
