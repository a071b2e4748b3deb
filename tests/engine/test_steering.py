"""Requests that steer experts: beside others, through the prefix cache, and refused where they cannot be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from quadriga.engine.engine import Engine
from quadriga.engine.request import Request
from quadriga.engine.steering import salt_of, steering_of
from quadriga.errors import RequestError
from quadriga.model.steering import ExpertFactor
from tests.engine.test_engine import RUNNERS, compiled, drain, request, same, solo

OFF = (ExpertFactor(0, 1, 0), ExpertFactor(2, 3, 0))
BOOST = (ExpertFactor(1, 4, 100.0),)


def steered(seed: int, steering: tuple[ExpertFactor, ...], **params: object) -> Request:
    return replace(request(seed, **params), steering=steering)


def test_answers_of_all_kinds_in_one_crowd_are_the_solo_ones() -> None:
    requests = [steered(seed, ((), OFF, BOOST)[seed % 3], max_new_tokens=12) for seed in range(9)]
    engine = Engine(compiled(), max_batch_tokens=23, max_sequences=4)
    ids = [engine.submit(one) for one in requests]
    answers = drain(engine)
    for one, i in zip(requests, ids, strict=True):
        assert same(answers[i], solo(compiled, one))


@pytest.mark.parametrize("name", RUNNERS)
def test_it_changes_the_answer_and_the_routing_says_so(name: str) -> None:
    runner = RUNNERS[name]()
    routed = replace(request(4, max_new_tokens=10, temperature=0.0), routing=True)
    answers = {steering: drain_one(Engine(runner), replace(routed, steering=steering)) for steering in ((), OFF, BOOST)}
    chosen = {
        how: [{e for e, _ in layer} for event in events for layer in (event.routing or ())]
        for how, events in answers.items()
    }
    layers = len(answers[()][0].routing or ())
    assert any(1 in experts for experts in chosen[()][0::layers]) and not any(1 in e for e in chosen[OFF][0::layers])
    assert any(3 in experts for experts in chosen[()][2::layers]) and not any(3 in e for e in chosen[OFF][2::layers])
    assert all(4 in experts for experts in chosen[BOOST][1::layers])
    logprobs = [[event.logprob for event in events] for events in answers.values()]
    assert logprobs[0] != logprobs[1] and logprobs[0] != logprobs[2]


def drain_one(engine: Engine, one: Request) -> list:
    i = engine.submit(one)
    return drain(engine)[i]


def test_a_cached_prefix_is_used_by_the_same_steering_only() -> None:
    engine = Engine(compiled())
    one = request(3, max_new_tokens=4, temperature=0.0)  # begins with a block that all of seed 3, 6, ... share

    def cached(steering: tuple[ExpertFactor, ...]) -> int:
        first = drain_one(engine, replace(one, prompt=(5,) * 33, steering=steering))[0]
        assert first.prompt is not None
        return first.prompt.n_cached_tokens

    assert [cached(()), cached(OFF), cached(BOOST), cached(OFF), cached(())] == [0, 0, 0, 32, 32]


def test_what_cannot_be_steered_is_refused_at_the_door() -> None:
    engine = Engine(compiled())
    with pytest.raises(RequestError, match="layer must be from 0 to 2"):
        engine.submit(steered(1, (ExpertFactor(3, 0, 0),)))
    runner = compiled()
    runner.can_steer = False
    with pytest.raises(RequestError, match="does not support it"):
        Engine(runner).submit(steered(1, OFF))
    assert not engine.has_work


def test_salts_part_what_differs() -> None:
    tables = [np.zeros((3, 5), np.float32), np.eye(3, 5, dtype=np.float32)]
    salts = [salt_of(b"me", adapter, table) for adapter in (0, 1, 2) for table in (None, *tables)]
    assert len(set(salts)) == 9 and salts[0] == b"me"


def test_requests_that_ask_the_same_share_a_table() -> None:
    one, other = np.zeros((3, 5), np.float32), np.ones((3, 5), np.float32)
    tables, rows = steering_of([(None, 2), (one, 1), (other, 3), (one.copy(), 2)])
    assert tables is not None and rows is not None
    np.testing.assert_array_equal(tables, np.stack([one, other]))
    assert rows.tolist() == [-1, -1, 0, 1, 1, 1, 0, 0]
    assert steering_of([(None, 4)]) == (None, None)
