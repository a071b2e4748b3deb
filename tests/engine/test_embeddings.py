"""Texts as vectors: requests of the scheduler, and the same bits however they were cut and whoever shared their passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from quadriga.engine.embeds import Embeds
from quadriga.engine.engine import Engine
from quadriga.engine.pooling import SUM_TOKENS, Pooling
from quadriga.engine.request import Embed, Embedding, Request, SamplingParams, TokenEvent
from quadriga.engine.sequences import Chunk, PassPlan, Running
from quadriga.errors import RequestError
from quadriga.kernels.arrays import arrays
from quadriga.kernels.pass_batch import PassBatch
from quadriga.nn.transformer import random_parameters
from quadriga.quant.packed import BLOCK_TOKENS
from quadriga.runners.base import Floats
from quadriga.runners.compiled import CompiledModel, pack_parameters
from tests.engine.test_engine import CONFIG, compiled, request


def text(n: int, seed: int = 0) -> tuple[int, ...]:
    return tuple((7 * i * i + 3 * i + seed) % 97 for i in range(n))


def plainly(ids: tuple[int, ...]) -> Floats:
    """Passes of SUM_TOKENS tokens, one after the other, on a model of its own: what the vector is."""
    runner = compiled()
    total = np.zeros(CONFIG.d_model, dtype=np.float32)
    blocks = list(range(-(-len(ids) // BLOCK_TOKENS)))
    for start in range(0, len(ids), SUM_TOKENS):
        tokens = ids[start : start + SUM_TOKENS]
        n = len(tokens)
        ints = (tokens, range(start, start + n), (0, n), blocks, (0, len(blocks)), ())
        states = runner.forward(PassBatch(*(np.array(x, dtype=np.int32) for x in ints)), hidden=True).hidden
        assert states is not None and states.shape == (n, CONFIG.d_model)
        total += states.sum(0)
    return total / np.sqrt(np.square(total).sum())


def run(engine: Engine) -> dict[int, list[Any]]:
    made: dict[int, list[Any]] = {}
    while engine.has_work:
        for number, event in engine.step():
            made.setdefault(number, []).append(event)
        engine.scheduler.check()
    return made


@pytest.mark.parametrize("budget", [512, 64, 17])
def test_the_vector_is_the_same_however_the_text_is_cut(budget: int) -> None:
    engine = Engine(compiled(), max_batch_tokens=budget, max_sequences=4)
    numbers = {engine.submit(Embed(prompt=text(n, n))): text(n, n) for n in (1, 16, 33, 250, 400)}
    made = run(engine)
    for number, ids in numbers.items():
        (event,) = made[number]
        assert isinstance(event, Embedding) and np.array_equal(event.vector, plainly(ids)), len(ids)
    assert engine.stats().kv_blocks_used == 0


def test_in_a_crowd_with_a_full_cache_texts_and_answers_are_what_they_are_alone() -> None:
    engine = Engine(compiled(n_blocks=26, threads=1), max_batch_tokens=40, max_sequences=6)
    engine.share_time()
    answers = {engine.submit(one): one for one in (request(seed) for seed in range(12))}
    texts = {engine.submit(Embed(prompt=text(100 + 30 * i, i), client=b"%d" % (i % 2))): i for i in range(8)}
    made = run(engine)
    assert engine.stats().n_preemptions > 0
    for number, i in texts.items():
        (event,) = made[number]
        assert np.array_equal(event.vector, plainly(text(100 + 30 * i, i)))
    for number, one in answers.items():
        reference = Engine(compiled(threads=1))
        alone = reference.submit(one)
        expected = run(reference)[alone]
        assert [(e.token_id, e.logprob) for e in made[number]] == [(e.token_id, e.logprob) for e in expected]


def test_answers_go_on_in_every_pass_beside_texts() -> None:
    engine = Engine(compiled(n_blocks=400), max_batch_tokens=64, max_sequences=40)
    engine.share_time()
    params = SamplingParams(max_new_tokens=60, ignore_eos=True)
    talker = engine.submit(Request(prompt=(1, 2, 3), params=params))
    engine.step()
    for i in range(16):
        engine.submit(Embed(prompt=text(390, i)))
    for _ in range(50):
        assert talker in {number for number, event in engine.step() if isinstance(event, TokenEvent)}
    assert engine.stats().n_running > 1


def test_texts_are_refused_at_the_door_and_dropped_anywhere() -> None:
    engine = Engine(compiled(n_blocks=25), max_batch_tokens=32, max_sequences=1)
    for ids, message in (
        ((), "at least one token"),
        ((97,), "from 0 to 96"),
        ((1,) * 401, "exceed the model's context"),
    ):
        with pytest.raises(RequestError, match=message):
            engine.submit(Embed(prompt=ids))
    running, waiting = (engine.submit(Embed(prompt=text(200, i))) for i in range(2))
    engine.step()
    assert engine.is_active(running) and engine.cancel(running) and engine.cancel(waiting)
    assert not engine.has_work and not engine.is_active(waiting) and engine.stats().kv_blocks_used == 0


def test_states_that_are_not_finite_fail_for_their_text_only() -> None:
    parameters = random_parameters(CONFIG, std=0.3)
    parameters["embed.weight"][5] = float("nan")
    engine = Engine(CompiledModel(CONFIG, pack_parameters(arrays(parameters), "bfloat16"), threads=1, n_blocks=60))
    bad, good = engine.submit(Embed(prompt=(1, 5, 2))), engine.submit(Embed(prompt=(1, 2, 3)))
    made = run(engine)
    assert isinstance(made[bad][0], RequestError) and "not finite" in str(made[bad][0])
    assert isinstance(made[good][0], Embedding)


@pytest.mark.parametrize("n", [1, 511, 512, 513, 1024, 1500])
def test_sums_are_cut_at_the_same_places_whatever_the_passes(n: int) -> None:
    states = np.random.default_rng(n).standard_normal((n, 24)).astype(np.float32)
    expected = sum((states[i : i + 512].sum(0) for i in range(0, n, 512)), np.zeros(24, np.float32))
    for cut in (1, 7, 100, 512, 2000):
        pooling = Pooling(24)
        pooling.add(0, states[: n // 2])  # it had to give way, and begins again
        for start in range(0, n, cut):
            pooling.add(start, states[start : start + cut])
        assert np.array_equal(pooling.vector(), expected / np.sqrt(np.square(expected).sum()))


def test_each_text_takes_its_own_part_of_a_passs_states() -> None:
    texts = {i: Running(i, list(text(n)), n, embeds=True) for i, n in ((4, 5), (6, 3), (9, 4))}
    answer = Running(7, [1, 2], 9)
    embeds = Embeds(d_model=8)
    for running in (texts[4], texts[6]):  # nobody wants the third any more
        embeds.add(running)
    states = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)

    def chunk(running: Running, start: int, n: int) -> Chunk:
        return Chunk(running, start, tuple(running.tokens[start : start + n]), 0, False)

    first = PassPlan((chunk(answer, 0, 2), chunk(texts[4], 0, 3), chunk(texts[9], 0, 4), chunk(texts[6], 0, 3)))
    ((number, found),) = embeds.take(first, states)
    own = states[9:].sum(0)
    assert number == 6 and isinstance(found, Embedding)
    np.testing.assert_allclose(found.vector, own / np.linalg.norm(own), rtol=1e-6)
    ((number, found),) = embeds.take(PassPlan((chunk(texts[4], 3, 2),)), states[:2])
    own = states[2:5].sum(0) + states[:2].sum(0)
    assert number == 4 and isinstance(found, Embedding)
    np.testing.assert_allclose(found.vector, own / np.linalg.norm(own), rtol=1e-6)
    assert embeds.running() == [texts[4], texts[6]]
    assert embeds.drop(4) and not embeds.drop(4) and 4 not in embeds and 6 in embeds
