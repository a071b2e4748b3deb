"""Whose turn it is: order, fairness, and that nobody sleeps for ever, whatever is thrown at whom."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from quadriga.engine.threads import ThreadTurns
from quadriga.errors import EngineError
from tests.threads import MOST_SECONDS, all_at_once, until


class Counter:
    """An engine of sorts: each pass adds one, and says how many threads were in it at once."""

    def __init__(self) -> None:
        self.n = 0
        self.inside = 0

    def step(self) -> None:
        self.inside += 1
        assert self.inside == 1, "one thread at a time"
        self.n += 1
        self.inside -= 1

    def has(self, n: int) -> Callable[[], bool]:
        return lambda: self.n >= n


def test_a_thread_alone_steps_until_it_has_what_it_wants() -> None:
    turns, counter = ThreadTurns(), Counter()
    turns.run_until(counter.has(5), counter.step)
    assert counter.n == 5
    turns.run_until(counter.has(5), counter.step)
    assert counter.n == 5, "it has it already"
    with turns.turn():
        counter.n = 7
    turns.run_until(counter.has(8), counter.step)
    assert counter.n == 8 and turns.n_waiting == 0


def test_a_thread_sleeps_while_another_steps_for_both() -> None:
    turns, counter = ThreadTurns(), Counter()
    steppers: set[int] = set()
    waits = threading.Event()

    def step() -> None:
        steppers.add(threading.get_ident())
        if counter.n == 0:
            waits.wait(MOST_SECONDS)
        counter.step()

    def second() -> None:
        turns.run_until(counter.has(3), step)

    def watch() -> None:
        until(lambda: turns.n_waiting == 1)
        waits.set()

    def first() -> None:
        turns.run_until(counter.has(10), step)

    all_at_once(first, second, watch)
    assert counter.n == 10 and len(steppers) in (1, 2), "who came first stepped; the other went on if it wanted more"


def test_who_has_enough_hands_on_to_who_has_not() -> None:
    turns, counter = ThreadTurns(), Counter()
    waits = threading.Event()
    steppers: list[str] = []

    def step() -> None:
        steppers.append(threading.current_thread().name)
        waits.wait(MOST_SECONDS)
        counter.step()

    def first() -> None:
        turns.run_until(counter.has(2), step)

    def second() -> None:
        until(lambda: bool(steppers))  # the first is in its pass
        turns.run_until(counter.has(5), step)

    def watch() -> None:
        until(lambda: turns.n_waiting == 1)
        waits.set()

    all_at_once(first, second, watch)
    assert counter.n == 5 and steppers == ["first"] * 2 + ["second"] * 3


def test_work_and_passes_alternate_in_the_order_asked() -> None:
    """A thread that would step for ever lets everybody in, one between two of its passes."""
    turns, order = ThreadTurns(), []
    ready, stop = threading.Event(), threading.Event()

    def step() -> None:
        order.append("pass")
        ready.wait(MOST_SECONDS)

    def work(name: str) -> Callable[[], None]:
        def run() -> None:
            until(lambda: turns.n_waiting == int(name))
            with turns.turn():
                order.append(name)

        return run

    def forever() -> None:
        turns.run_until(lambda: order.count("pass") > 1 and stop.is_set(), step)

    def watch() -> None:
        until(lambda: turns.n_waiting == 3)
        ready.set()
        until(lambda: {"0", "1", "2"} <= set(order))
        stop.set()

    def late() -> None:
        until(lambda: "pass" in order)
        all_at_once(work("0"), work("1"), work("2"))

    all_at_once(forever, late, watch)
    assert [name for name in order if name != "pass"] == ["0", "1", "2"]


def test_what_a_step_raises_is_its_threads_and_the_others_go_on() -> None:
    turns, counter = ThreadTurns(), Counter()
    waits = threading.Event()
    raised = []

    def bad() -> None:
        waits.wait(MOST_SECONDS)
        raise ValueError("a pass that fails")

    def first() -> None:
        try:
            turns.run_until(counter.has(3), bad)
        except ValueError:
            raised.append(1)

    def second() -> None:
        until(lambda: turns._owner is not None)
        turns.run_until(counter.has(3), counter.step)

    def watch() -> None:
        until(lambda: turns.n_waiting == 1)
        waits.set()

    all_at_once(first, second, watch)
    assert raised and counter.n == 3
    with pytest.raises(ValueError), turns.turn():
        raise ValueError
    with turns.turn():  # it is free again
        pass


def test_a_turn_within_a_turn_is_an_error_not_a_wait() -> None:
    turns, counter = ThreadTurns(), Counter()
    with turns.turn(), pytest.raises(EngineError, match="would wait"), turns.turn():
        pass
    with turns.turn(), pytest.raises(EngineError, match="would wait"):
        turns.run_until(counter.has(1), counter.step)
    turns.run_until(counter.has(1), counter.step)


def test_what_is_left_for_later_is_done_at_once_or_in_the_turn_that_is() -> None:
    turns, done = ThreadTurns(), []
    turns.soon(lambda: done.append("free"))
    assert done == ["free"]
    with turns.turn():
        turns.soon(lambda: done.append("own turn"))  # as a finaliser does, within its own thread's turn
        assert done == ["free"]
    assert done == ["free", "own turn"]
    counter = Counter()

    def step() -> None:
        if counter.n == 1:
            turns.soon(lambda: done.append(f"before pass {counter.n + 1}"))
        counter.step()

    turns.run_until(counter.has(3), step)
    assert done[2:] == ["before pass 3"]


def test_what_is_left_wakes_who_waits_for_it() -> None:
    turns, closed = ThreadTurns(), threading.Event()

    def step() -> None:
        raise AssertionError("nothing to run")

    def sleeper() -> None:
        turns.run_until(closed.is_set, step)

    def holder() -> None:
        with turns.turn():
            begun.set()
            until(lambda: turns.n_waiting == 1)
            turns.soon(closed.set)

    def late() -> None:
        begun.wait(MOST_SECONDS)
        sleeper()

    begun = threading.Event()
    all_at_once(holder, late)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """KeyboardInterrupt at SIGINT: tests in the background of a shell inherit that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_thread_interrupted_in_line_leaves_the_line(ctrl_c: None) -> None:
    """Ctrl-C comes to the main thread, asleep here; the turn then goes to the next, and comes back to it later."""
    turns, begun, end = ThreadTurns(), threading.Event(), threading.Event()
    order, main = [], threading.get_ident()

    def holder() -> None:
        with turns.turn():
            begun.set()
            until(lambda: turns.n_waiting == 1)
            signal.pthread_kill(main, signal.SIGINT)
            end.wait(MOST_SECONDS)
        order.append("holder")

    thread = threading.Thread(target=holder, daemon=True)
    thread.start()
    begun.wait(MOST_SECONDS)
    with pytest.raises(KeyboardInterrupt), turns.turn():
        order.append("never")
    assert turns.n_waiting == 0
    end.set()
    thread.join(MOST_SECONDS)
    with turns.turn():
        order.append("main")
    assert order == ["holder", "main"]


@pytest.mark.parametrize("run", range(10))
def test_a_crowd(run: int) -> None:
    """Eight threads that want passes, work and both, some of which fail: all end, no two are in at once."""
    turns, counter, inside = ThreadTurns(), Counter(), []

    def work() -> None:
        with turns.turn():
            inside.append(1)
            assert len(inside) == 1
            inside.pop()

    def step() -> None:
        assert not inside
        counter.step()
        if counter.n % 7 == run:
            raise ValueError("now and then")

    def one(seed: int) -> Callable[[], None]:
        def go() -> None:
            for i in range(40):
                if (i * seed) % 3 == 0:
                    work()
                elif (i * seed) % 5 == 1:
                    turns.soon(lambda: None)
                else:
                    with contextlib.suppress(ValueError):
                        turns.run_until(counter.has(counter.n + 2), step)

        return go

    all_at_once(*(one(seed) for seed in range(1, 9)))
    assert turns._owner is None and turns.n_waiting == 0 and not turns._left
