"""Tokens that a grammar takes long over are chosen beside the passes: others never wait, and nothing changes."""

from __future__ import annotations

import threading
from concurrent.futures import wait
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from quadriga.engine.engine import Engine
from quadriga.engine.request import Request, SamplingParams, TokenEvent
from quadriga.errors import AnswerError, GrammarError
from quadriga.text.grammar import Mask
from tests.engine.test_engine import compiled
from tests.waiting import HANG_S

PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True, temperature=0.9, seed=3, logprobs=2)


class Even:
    """Allows even tokens; takes as long over each as the test says, where it is not ready."""

    def __init__(self, *, ready: bool, ends_at: int = 99, fails: BaseException | None = None) -> None:
        self.ready, self.ends_at, self.fails = ready, ends_at, fails
        self.may = threading.Semaphore(0)
        self.asked = threading.Semaphore(0)
        self.threads: set[str] = set()
        self.accepted: list[int] = []

    def allowed(self) -> Mask:
        self.threads.add(threading.current_thread().name)
        if not self.ready:
            self.asked.release()
            assert self.may.acquire(timeout=HANG_S)
        if self.fails is not None and len(self.accepted) == 2:
            raise self.fails
        return np.arange(97) % 2 == 0

    def accept(self, token_id: int) -> bool:
        self.accepted.append(token_id)
        return len(self.accepted) == self.ends_at


def answer_of(events: list[Any]) -> list[Any]:
    return [(e.token_id, e.text, e.logprob, e.top_logprobs, e.finish_reason) for e in events]


def alone(one: Request) -> list[Any]:
    engine = Engine(compiled())
    number = engine.submit(one)
    events = []
    while engine.has_work:
        events += [event for n, event in engine.step() if n == number]
    return events


@pytest.mark.parametrize("ends_at", [99, 5])
def test_others_go_on_while_a_token_is_being_chosen_and_the_answer_is_the_same(ends_at: int) -> None:
    prompt = (4, 5, 6)
    expected = alone(Request(prompt=prompt, params=PARAMS, constraint=Even(ready=True, ends_at=ends_at)))
    slow = Even(ready=False, ends_at=ends_at)
    engine = Engine(compiled())
    held = engine.submit(Request(prompt=prompt, params=PARAMS, constraint=slow, routing=True))
    talker = engine.submit(Request(prompt=(1, 2), params=replace(PARAMS, max_new_tokens=300)))
    made: dict[int, list[Any]] = {held: [], talker: []}
    while not made[held] or made[held][-1].finish_reason is None:
        before = len(made[talker])
        assert slow.asked.acquire(timeout=HANG_S) if len(made[talker]) else True
        for _ in range(4):
            for number, event in engine.step():
                made[number].append(event)
        if before:
            assert len(made[talker]) == before + 4, "a token in every pass"
            n_held, choice = len(made[held]), engine._beside._held[held].choice
            slow.may.release()
            wait([choice], HANG_S)  # without passes: the other answer must not end before this one
            for number, event in engine.step():
                made[number].append(event)
            assert len(made[held]) == n_held + 1
    assert answer_of(made[held]) == answer_of(expected)
    assert all(event.routing for event in made[held]), "what the pass knew comes with the token"
    assert threading.main_thread().name not in slow.threads
    engine.cancel(talker)
    assert not engine.has_work and engine.stats().kv_blocks_used == 0


def test_when_everything_is_held_a_step_lets_commands_in_between() -> None:
    slow = Even(ready=False)
    engine = Engine(compiled())
    number = engine.submit(Request(prompt=(4, 5, 6), params=PARAMS, constraint=slow))
    assert engine.step() == [] and engine.step() == [] and engine.has_work
    assert engine.cancel(number) and not engine.has_work
    slow.may.release()
    assert engine.step() == []


@pytest.mark.parametrize("error", [GrammarError("too much"), RuntimeError("oops")], ids=repr)
def test_a_choice_that_fails_ends_its_own_answer_only(error: Exception) -> None:
    slow = Even(ready=False, fails=error)
    slow.may.release(100)
    engine = Engine(compiled())
    failing = engine.submit(Request(prompt=(4, 5, 6), params=PARAMS, constraint=slow))
    beside = engine.submit(Request(prompt=(1, 2), params=PARAMS))
    made: dict[int, list[Any]] = {failing: [], beside: []}
    while engine.has_work:
        for number, event in engine.step():
            made[number].append(event)
    assert [isinstance(event, TokenEvent) for event in made[failing]] == [True, True, False]
    assert isinstance(made[failing][-1], GrammarError if isinstance(error, GrammarError) else AnswerError)
    assert answer_of(made[beside]) == answer_of(alone(Request(prompt=(1, 2), params=PARAMS)))
    assert engine.stats().kv_blocks_used == 0


def test_an_answer_that_must_give_way_while_it_is_held_goes_on_with_the_same_tokens() -> None:
    prompt = tuple(range(20))
    expected = alone(Request(prompt=prompt, params=PARAMS, constraint=Even(ready=True)))
    slow = Even(ready=False)
    engine = Engine(compiled(n_blocks=8))
    big = engine.submit(Request(prompt=(9,) * 40, params=replace(PARAMS, max_new_tokens=70)))
    engine.step()
    held = engine.submit(Request(prompt=prompt, params=PARAMS, constraint=slow))
    made: dict[int, list[Any]] = {big: [], held: []}

    def step() -> None:
        for number, event in engine.step():
            made[number].append(event)
        engine.scheduler.check()

    while not engine.stats().n_preemptions:
        step()
    assert not made[held] and engine.stats().n_waiting == 0, "it waits for its token before it waits for a place"
    slow.may.release(100)
    while engine.has_work:
        step()
    assert answer_of(made[held]) == answer_of(expected)
    assert len(made[big]) == 69
