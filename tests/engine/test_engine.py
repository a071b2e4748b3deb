"""The engine on a tiny MoE, on the CPU's kernels and on plain torch: a request's answer is its own."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from quadriga.engine.engine import Engine
from quadriga.engine.lookup import Lookup
from quadriga.engine.request import Embed, Embedding, Request, SamplingParams, TokenEvent
from quadriga.errors import BusyError, RequestError
from quadriga.kernels.arrays import arrays
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.runners.base import Runner
from quadriga.runners.compiled import CompiledModel, pack_parameters
from quadriga.runners.torch import TorchRunner
from quadriga.text.grammar import Mask
from quadriga.text.tokenizer import Tokenizer
from tests.batches import batch
from tests.checkpoint.models import TINY

CONFIG = replace(TINY["dbrx"], max_seq_len=400)
Answers = dict[int, list[TokenEvent]]


def compiled(n_blocks: int = 60, form: str = "q4", threads: int = 2) -> CompiledModel:
    parameters = random_parameters(CONFIG, std=0.3)
    return CompiledModel(CONFIG, pack_parameters(arrays(parameters), form), threads=threads, n_blocks=n_blocks)


def plain(n_blocks: int = 60) -> TorchRunner:
    return TorchRunner(Transformer.from_parameters(CONFIG, random_parameters(CONFIG, std=0.3)), n_blocks)


RUNNERS = {"compiled": compiled, "torch": plain}


def drain(engine: Engine, answers: Answers | None = None) -> Answers:
    answers = {} if answers is None else answers
    while engine.has_work:
        for request_id, event in engine.step():
            assert isinstance(event, TokenEvent), event
            answers.setdefault(request_id, []).append(event)
    return answers


def request(seed: int, **params: object) -> Request:
    rng = random.Random(seed)
    n = rng.randint(1, 60)
    prompt = [rng.randrange(97) for _ in range(n)] if seed % 3 else [5] * 16 + [rng.randrange(97) for _ in range(n)]
    options: dict[str, object] = {
        "max_new_tokens": rng.randint(1, 50),
        "temperature": rng.choice([0.0, 0.7, 1.3]),
        "top_p": rng.choice([1.0, 0.9]),
        "seed": seed,
        "ignore_eos": True,
        "logprobs": rng.choice([0, 2]),
        "frequency_penalty": rng.choice([0.0, 0.5]),
        "speculate": rng.choice([0, 0, 4]),
        "prompt_logprobs": rng.random() < 0.2,
        "logit_bias": {3: 100.0} if seed % 5 == 0 else {},  # says one thing only, so guesses come true
    }
    return Request(prompt=tuple(prompt), params=SamplingParams(**{**options, **params}))  # type: ignore[arg-type]


def solo(make: object, one: Request) -> list[TokenEvent]:
    engine = Engine(make())  # type: ignore[operator]
    wanted = engine.submit(replace(one, params=replace(one.params, speculate=0)))
    return drain(engine)[wanted]


def same(a: list[TokenEvent], b: list[TokenEvent]) -> bool:
    """Tokens, log-probabilities and reasons, bit for bit."""

    def key(e: TokenEvent) -> tuple[object, ...]:
        scored = e.prompt.logprobs if e.prompt is not None else None
        return (e.token_id, e.logprob, e.top_logprobs, e.finish_reason, scored)

    return [key(e) for e in a] == [key(e) for e in b]


def test_crowded_chunked_preempted_and_cached_answers_are_the_solo_ones() -> None:
    """Kernels are batch invariant, so the comparison is of bits."""
    engine = Engine(compiled(n_blocks=14, threads=1), max_batch_tokens=23, max_sequences=5)
    wanted = {engine.submit(one): one for one in (request(seed) for seed in range(30))}
    answers = drain(engine)
    stats = engine.stats()
    assert stats.n_preemptions > 0 and stats.n_cached_tokens > 0 and stats.n_guessed_right > 0
    for number, one in wanted.items():
        assert same(answers[number], solo(compiled, one)), f"request {number}"
    assert stats.kv_blocks_used == 0


def test_plain_torch_gives_the_same_tokens_in_a_crowd() -> None:
    engine = Engine(plain(n_blocks=30), max_batch_tokens=32, max_sequences=4)
    wanted = {engine.submit(one): one for one in (request(seed, temperature=0.0) for seed in range(8))}
    answers = drain(engine)
    for number, one in wanted.items():
        alone = solo(plain, one)
        assert [e.token_id for e in answers[number]] == [e.token_id for e in alone]
        assert [e.logprob for e in answers[number]] == pytest.approx([e.logprob for e in alone], abs=1e-4)


@pytest.mark.parametrize("name", RUNNERS)
def test_prompt_logprobs_are_the_models(name: str) -> None:
    runner: Runner = RUNNERS[name]()
    engine = Engine(runner, max_batch_tokens=7, max_sequences=2)
    prompt = [i * 5 % 97 for i in range(33)]
    number = engine.submit(Request(prompt=tuple(prompt), params=SamplingParams(max_new_tokens=2, prompt_logprobs=True)))
    report = drain(engine)[number][0].prompt
    assert report is not None
    logits, _ = Engine(runner).score(prompt)
    expected = torch.from_numpy(logits).log_softmax(-1)[torch.arange(32), torch.tensor(prompt[1:])]
    assert list(report.logprobs) == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", RUNNERS)
def test_alternatives_of_prompt_and_answer_are_the_models(name: str) -> None:
    """Every number of every list, of prompts in chunks with others beside them and of sampled answers."""
    runner: Runner = RUNNERS[name]()
    engine = Engine(runner, max_batch_tokens=23, max_sequences=3)
    params = SamplingParams(
        max_new_tokens=6, prompt_logprobs=True, logprobs=4, temperature=1.5, seed=2, ignore_eos=True, logit_bias={3: 4.0},
        top_k=9,
    )  # fmt: skip
    prompts = [[i * k % 97 for i in range(40)] for k in (3, 5, 7)]
    wanted = {engine.submit(Request(prompt=tuple(prompt), params=params)): prompt for prompt in prompts}
    for number, events in drain(engine).items():
        prompt, report = wanted[number], events[0].prompt
        assert report is not None and all(event.prompt is None for event in events[1:])
        ids = prompt + [event.token_id for event in events]
        own = torch.from_numpy(Engine(RUNNERS[name]()).score(ids)[0]).log_softmax(-1)
        assert len(report.logprobs) == len(report.top_logprobs) == 39
        tops = [*report.top_logprobs, *(event.top_logprobs for event in events)]
        chosen = [*report.logprobs, *(event.logprob for event in events)]
        for position, (top, logprob) in enumerate(zip(tops, chosen, strict=True)):
            values, best = own[position].topk(4)
            said = ids[position + 1] if position >= 39 and ids[position + 1] not in best.tolist() else None
            assert [token for token, _ in top] == best.tolist() + ([] if said is None else [said]), position
            assert [p for _, p in top[:4]] == pytest.approx(values.tolist(), abs=1e-4)
            assert said is None or top[4][1] == logprob
            assert logprob == pytest.approx(float(own[position, ids[position + 1]]), abs=1e-4)


# Which token a request is made to say at which place: the third is an end of some kind.
SAYS = {"one end": 11, "another end": 13, "its own end": 17, "no end": 19}


@pytest.mark.parametrize("own", [(), (17,), (17, 23)])
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("what", SAYS)
def test_an_answer_ends_at_any_of_its_ends(what: str, ignore: bool, own: tuple[int, ...]) -> None:
    """The model's ends, all of them, unless they are to be ignored; and the request's own in any case."""

    class Script:
        """A grammar that allows one token at each place."""

        def __init__(self) -> None:
            self.rest = [5, 6, SAYS[what], 7, 8]

        def allowed(self) -> Mask:
            return np.arange(97) == self.rest.pop(0)

        def accept(self, token_id: int) -> bool:
            return False

    engine = Engine(compiled(), end_ids=frozenset({13, 11}))
    params = SamplingParams(max_new_tokens=5, stop_ids=own, ignore_eos=ignore)
    number = engine.submit(Request(prompt=(1, 2, 3), params=params, constraint=Script()))
    events = drain(engine)[number]
    ends = (what in ("one end", "another end") and not ignore) or (what == "its own end" and 17 in own)
    assert [e.token_id for e in events] == [5, 6, SAYS[what], 7, 8][: 3 if ends else 5]
    assert [e.finish_reason for e in events] == [None] * (len(events) - 1) + ["stop" if ends else "length"]


class Bytes:
    """One token a byte, three more without text."""

    n_vocab = 97 + 3

    def encode(self, text: str, allow_special: bool) -> list[int]:
        raise AssertionError("not asked")

    def token_bytes(self, token_id: int) -> bytes:
        return {93: b"\xc3", 94: b"\xa9"}.get(token_id, bytes([token_id % 96 + 32]))


@pytest.mark.parametrize(
    ("says", "stop", "text", "reason"),
    [
        ([65, 66, 67, 68], (), "abcd", "length"),
        ([65, 66, 67, 68], ("bc",), "a", "stop"),
        ([65, 66, 67, 68], ("dz", "cdy"), "abcd", "length"),  # held back for a stop string that never came
        ([93, 94, 65, 93], (), "\u00e9a", "length"),  # half a character at the end is left out
        ([65, 13, 67, 68], ("b",), "a", "stop"),
        ([65, 66, 13, 68], ("bz",), "ab", "stop"),  # held back, then an end
    ],
)
def test_all_text_comes_out_and_no_more(says: list[int], stop: tuple[str, ...], text: str, reason: str) -> None:
    class Script:
        def __init__(self) -> None:
            self.rest = list(says)

        def allowed(self) -> Mask:
            return np.arange(97) == self.rest.pop(0)

        def accept(self, token_id: int) -> bool:
            return False

    engine = Engine(compiled(), Tokenizer(Bytes(), special_ids={}), end_ids=frozenset({13}))
    params = SamplingParams(max_new_tokens=4, stop=stop)
    number = engine.submit(Request(prompt=(1, 2, 3), params=params, constraint=Script()))
    events = drain(engine)[number]
    assert "".join(event.text for event in events) == text and events[-1].finish_reason == reason


def test_nothing_is_guessed_for_an_answer_that_follows_a_grammar() -> None:
    class Script:
        def __init__(self) -> None:
            self.rest = [5, 6, 7] * 5

        def allowed(self) -> Mask:
            return np.arange(97) == self.rest.pop(0)

        def accept(self, token_id: int) -> bool:
            return False

    engine = Engine(compiled())
    params = SamplingParams(max_new_tokens=15, ignore_eos=True, speculate=4)
    number = engine.submit(Request(prompt=(5, 6, 7) * 4, params=params, constraint=Script()))
    assert [e.token_id for e in drain(engine)[number]] == [5, 6, 7] * 5
    assert engine.stats().n_guessed == 0 and engine.stats().n_steps == 15


@pytest.mark.parametrize("n", [1, 2, 7])
def test_an_answer_has_as_many_tokens_as_were_asked_for_or_as_fit(n: int) -> None:
    engine = Engine(compiled())
    short = engine.submit(Request(prompt=(1, 2), params=SamplingParams(max_new_tokens=n, ignore_eos=True)))
    full = engine.submit(Request(prompt=(1,) * (400 - n), params=SamplingParams(max_new_tokens=99, ignore_eos=True)))
    answers = drain(engine)
    assert len(answers[short]) == len(answers[full]) == n
    assert [e.finish_reason for e in answers[full]] == [None] * (n - 1) + ["length"]
    with pytest.raises(RequestError, match="no room for an answer"):
        engine.submit(Request(prompt=(1,) * 400, params=SamplingParams(max_new_tokens=1)))


def test_the_counters_count_tokens() -> None:
    engine = Engine(compiled(), max_batch_tokens=20, max_sequences=2)
    prompts = [(5,) * 40, (5,) * 40, (6,) * 10]
    for prompt in prompts:
        engine.submit(Request(prompt=prompt, params=SamplingParams(max_new_tokens=6, ignore_eos=True)))
        drain(engine)
    stats = engine.stats()
    assert (stats.n_prompt_tokens, stats.n_cached_tokens, stats.n_generated_tokens) == (90, 32, 18)
    assert stats.n_steps == (2 + 5) + (1 + 5) + (1 + 5), "a prompt of 40 in two passes, of 8 in one"
    engine.submit(
        Request(prompt=(3, 1, 4) * 5, params=SamplingParams(max_new_tokens=9, speculate=3, logit_bias={3: 100.0}))
    )
    drain(engine)
    guessed = engine.stats()
    assert guessed.n_generated_tokens == 27 and 0 < guessed.n_guessed_right <= guessed.n_guessed


@pytest.mark.parametrize("name", RUNNERS)
def test_routing_is_that_of_the_token_it_came_from(name: str) -> None:
    """In a pass of several: experts by weight, and the entropy of each router, as if it ran alone."""
    engine = Engine(RUNNERS[name]())
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    prompts = [(i, 50 + i, 7, i) for i in (1, 2, 3)]
    wanted = {engine.submit(Request(prompt=p, params=params, routing=True)): p for p in prompts}
    for number, events in drain(engine).items():
        ids = [*wanted[number], *(e.token_id for e in events)]
        _, stats = Engine(RUNNERS[name]()).score(ids)
        for i, event in enumerate(events):
            at = len(wanted[number]) - 1 + i
            assert event.routing is not None and len(event.routing) == CONFIG.n_layers
            for layer, pairs, entropy in zip(stats, event.routing, event.router_entropy, strict=True):
                weights = dict(zip(layer.expert_ids[at].tolist(), layer.expert_weights[at].tolist(), strict=True))
                assert dict(pairs) == pytest.approx(weights, abs=1e-5)
                assert [w for _, w in pairs] == sorted((w for _, w in pairs), reverse=True)
                p = layer.probs[at]
                assert entropy == pytest.approx(float(-(p * np.log(p)).sum() / math.log(5)), abs=1e-4)


def test_routing_of_a_guess_is_its_own() -> None:
    params = SamplingParams(max_new_tokens=30, ignore_eos=True, logit_bias={3: 6.0, 4: 6.0})
    request = Request(prompt=(3, 1, 4, 1, 5, 9) * 4, params=params, routing=True)
    seen = []
    for speculate in (0, 6):
        engine = Engine(compiled())
        number = engine.submit(replace(request, params=replace(params, speculate=speculate)))
        seen.append([(e.token_id, e.routing, e.router_entropy) for e in drain(engine)[number]])
        assert (engine.stats().n_guessed_right > 0) == (speculate > 0)
    assert seen[0] == seen[1] and len({routing for _, routing, _ in seen[0]}) > 5


@pytest.mark.parametrize("asking", [0, 1, 2])
def test_whoever_asks_is_told_the_routing_wherever_in_the_pass_it_is(asking: int) -> None:
    engine, params = Engine(compiled()), SamplingParams(max_new_tokens=3, ignore_eos=True)
    numbers = [engine.submit(Request(prompt=(3, 1, i), params=params, routing=i == asking)) for i in range(3)]
    made = drain(engine)
    for i, number in enumerate(numbers):
        assert all((event.routing is not None) == (i == asking) for event in made[number])


@pytest.mark.parametrize("name", RUNNERS)
def test_a_vector_is_the_mean_of_all_hidden_states_of_length_one(name: str) -> None:
    runner, ids = RUNNERS[name](), [i * 7 % 97 for i in range(50)]
    states = runner.forward(batch([(ids, 0, [0, 1, 2, 3])]), hidden=True).hidden
    assert states is not None
    mean = states.mean(0)
    for chunk in (512, 16, 7):
        engine = Engine(runner, max_batch_tokens=chunk, max_sequences=2)
        number = engine.submit(Embed(prompt=tuple(ids)))
        *between, last = [engine.step() for _ in range(-(-50 // chunk))]
        assert not any(between) and not engine.has_work
        ((made, event),) = last
        assert made == number and isinstance(event, Embedding)
        np.testing.assert_allclose(event.vector, mean / np.linalg.norm(mean), rtol=1e-4, atol=1e-5)
        assert engine.scheduler.pool.n_free == 60


def test_scoring_gives_its_blocks_back_even_when_it_fails() -> None:
    engine = Engine(compiled(n_blocks=4))
    with pytest.raises(BusyError, match="do not fit"):
        engine.score([1] * 65)
    assert engine.scheduler.pool.n_free == 4
    logits, stats = engine.score(list(range(64)), chunk=20)
    whole, _ = Engine(compiled(n_blocks=4)).score(list(range(64)))
    assert np.array_equal(logits, whole) and stats[0].expert_ids.shape == (64, 3)
    assert engine.scheduler.pool.n_free == 4


@pytest.mark.parametrize("name", RUNNERS)
def test_guessing_changes_the_time_only(name: str) -> None:
    params = SamplingParams(max_new_tokens=60, ignore_eos=True, logit_bias={3: 6.0, 4: 6.0})
    prompt = tuple([3, 1, 4, 1, 5, 9] * 4)
    steps, answers = [], []
    for speculate in (0, 6):
        engine = Engine(RUNNERS[name]())
        number = engine.submit(Request(prompt=prompt, params=replace(params, speculate=speculate)))
        answers.append([e.token_id for e in drain(engine)[number]])
        steps.append(engine.stats().n_steps)
    assert answers[0] == answers[1]
    assert steps[1] < steps[0], "this request repeats itself, so some guess is right"


def test_a_cancelled_request_is_gone_at_once() -> None:
    engine = Engine(compiled(), max_sequences=2)
    first, second, third = (engine.submit(request(seed, max_new_tokens=40)) for seed in (1, 2, 4))
    engine.step()
    assert engine.cancel(first) and engine.cancel(third) and not engine.cancel(first)
    answers = drain(engine)
    assert set(answers) == {second}
    assert engine.stats().kv_blocks_used == 0


def test_higher_priority_is_admitted_first() -> None:
    engine = Engine(compiled(), max_sequences=1)
    low = engine.submit(replace(request(1, max_new_tokens=3), priority=0))
    high = engine.submit(replace(request(2, max_new_tokens=3), priority=5))
    order = [number for number, _ in (event for _ in range(20) for event in engine.step())]
    assert order.index(high) < order.index(low)


def test_broken_weights_are_reported_and_nothing_is_left_behind() -> None:
    parameters = random_parameters(CONFIG)
    parameters["final_norm.weight"][3] = float("nan")
    engine = Engine(CompiledModel(CONFIG, pack_parameters(arrays(parameters), "bfloat16"), threads=1, n_blocks=60))
    number = engine.submit(request(1))
    failed, error = engine.step()[0]
    assert failed == number and isinstance(error, RequestError) and "logits are not finite" in str(error)
    assert not engine.has_work and engine.stats().kv_blocks_used == 0


class Grudge:
    """A grammar that fails, or allows nothing, at its nth token."""

    def __init__(self, n: int, *, fails: bool) -> None:
        self.n, self.fails = n, fails

    def allowed(self) -> Mask:
        self.n -= 1
        if self.n == 0 and self.fails:
            raise RequestError("the grammar failed")
        return np.full(97, self.n != 0)

    def accept(self, token_id: int) -> bool:
        return False


@pytest.mark.parametrize("fails", [True, False])
def test_a_grammar_that_fails_ends_its_own_request_only(fails: bool) -> None:
    engine, params = Engine(compiled()), SamplingParams(max_new_tokens=9, ignore_eos=True)
    good, bad = Request(prompt=(1, 2, 3), params=params), Request(prompt=(4, 5), params=params)
    reference = Engine(compiled())
    first = reference.submit(good)
    expected = drain(reference)[first]
    beside = engine.submit(good)
    failing = engine.submit(replace(bad, constraint=Grudge(4, fails=fails)))
    seen: dict[int, list[object]] = {beside: [], failing: []}
    while engine.has_work:
        for number, event in engine.step():
            seen[number].append(event)
    assert [e.token_id for e in seen[beside]] == [e.token_id for e in expected]  # type: ignore[attr-defined]
    assert len(seen[failing]) == 4 and isinstance(seen[failing][-1], RequestError)
    assert engine.stats().kv_blocks_used == 0


def test_bad_requests_are_refused_at_the_door() -> None:
    engine = Engine(compiled(n_blocks=4))
    for prompt, message in (((), "at least one token"), ((97,), "from 0 to 96"), ((1,) * 400, "no room for an answer")):
        with pytest.raises(RequestError, match=message):
            engine.submit(Request(prompt=prompt, params=SamplingParams()))
    with pytest.raises(RequestError, match="the cache has 4"):
        engine.submit(Request(prompt=(1,) * 60, params=SamplingParams(max_new_tokens=20)))
    assert not engine.has_work


def test_expert_load_counts_what_was_computed() -> None:
    runner = compiled()
    engine = Engine(runner, prefix_cache=False)
    engine.submit(request(1, max_new_tokens=10, speculate=0))
    engine.submit(request(2, max_new_tokens=10, speculate=0))
    drain(engine)
    computed = sum(len(request(seed).prompt) + 9 for seed in (1, 2))
    assert [int(load.sum()) for load in runner.expert_load()] == [3 * computed] * CONFIG.n_layers


def test_lookup_finds_the_latest_continuation() -> None:
    lookup = Lookup()
    assert lookup.guess([1, 2], 4) == []
    assert lookup.guess([1, 2, 3, 9, 1, 2, 3], 2) == [9, 1]
    assert lookup.guess([1, 2, 3, 9, 1, 2, 3, 8, 2, 3], 3) == [8, 2, 3]
    assert lookup.guess([1, 2, 3, 9, 1, 2, 3, 8, 2, 3, 7], 3) == []


@pytest.mark.slow
def test_a_thousand_random_requests() -> None:
    """They arrive, are cancelled and preempted at random; every answer is its solo run's, no block is lost."""
    rng, reference = random.Random(0), compiled
    engine = Engine(compiled(n_blocks=20), max_batch_tokens=40, max_sequences=6)
    waiting: dict[int, Request] = {}
    answers: Answers = {}
    finished = cancelled = seed = 0
    while seed < 1000 or engine.has_work:
        if seed < 1000 and len(waiting) < 12 and rng.random() < 0.3:
            one = replace(request(seed), priority=rng.choice([0, 0, 1]))
            waiting[engine.submit(one)] = one
            seed += 1
        if waiting and rng.random() < 0.02:
            number = rng.choice(list(waiting))
            assert engine.cancel(number)
            answers.pop(number, None)
            del waiting[number]
            cancelled += 1
        for number, event in engine.step():
            answers.setdefault(number, []).append(event)
            if event.finish_reason is not None:
                assert same(answers.pop(number), solo(reference, waiting.pop(number))), f"request {number}"
                finished += 1
        engine.scheduler.check()
    assert finished > 100 and cancelled > 5 and engine.stats().n_preemptions > 10
    assert engine.stats().kv_blocks_used == 0
    print(f"{finished} finished, {cancelled} cancelled, {engine.stats()}")
