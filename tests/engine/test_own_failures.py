"""What one request does wrong, or we do wrong for it, is its own end and nobody else's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from quadriga import LLM
from quadriga.engine import answers, passes
from quadriga.engine.engine import Engine
from quadriga.engine.request import Request, SamplingParams, TokenEvent
from quadriga.errors import AnswerError, QuadrigaError, RequestError
from quadriga.kernels.arrays import arrays
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.runners.compiled import CompiledModel, pack_parameters
from quadriga.runners.torch import TorchRunner
from quadriga.text.grammar import Mask
from quadriga.text.tokenizer import Tokenizer
from tests.checkpoint.models import TINY

CONFIG = replace(TINY["dbrx"], max_seq_len=400)
GOOD = Request(prompt=(1, 2, 3), params=SamplingParams(max_new_tokens=12, ignore_eos=True))
BAD = Request(prompt=(4, 5) * 4, params=SamplingParams(max_new_tokens=12, ignore_eos=True, stop=("never said",)))


class PanicException(BaseException):
    """As pyo3 makes of a Rust panic: no Exception."""


class Letters:
    """97 one-byte tokens."""

    n_vocab = 97

    def encode(self, text: str, allow_special: bool) -> list[int]:
        return [ord(c) - 30 for c in text]

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id + 30])


def new_engine() -> Engine:
    runner = CompiledModel(
        CONFIG, pack_parameters(arrays(random_parameters(CONFIG, std=0.3)), "q8"), threads=1, n_blocks=60
    )
    return Engine(runner, Tokenizer(Letters(), special_ids={}))


Breaker = Callable[[Any], None]
"""Damages a request inside the engine."""


def both(engine: Engine, bad: Request, breaker: Breaker = lambda active: None) -> tuple[list[TokenEvent], list[Any]]:
    """The events of a good request and of a bad one beside it."""
    good_id, bad_id = engine.submit(GOOD), engine.submit(bad)
    seen: dict[int, list[Any]] = {good_id: [], bad_id: []}
    breaker(engine._active[bad_id])
    while engine.has_work:
        for number, event in engine.step():
            seen[number].append(event)
        engine.scheduler.check()
    assert engine.stats().kv_blocks_used == 0 and not engine.is_active(bad_id)
    return seen[good_id], seen[bad_id]


class Grammar:
    """Allows everything until it raises."""

    def __init__(self, error: BaseException, where: str) -> None:
        self.error, self.where, self.calls = error, where, 0

    def _count(self, where: str) -> None:
        self.calls += where == self.where
        if self.calls == 4:
            raise self.error

    def allowed(self) -> Mask:
        self._count("allowed")
        return np.ones(97, dtype=np.bool_)

    def accept(self, token_id: int) -> bool:
        self._count("accept")
        return False


def fourth(error: BaseException, real: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but its fourth call raises."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise error
        return real(*args, **kwargs)

    return call


def at_sampler(active: Any, error: BaseException) -> None:
    active.sampler.take = fourth(error, active.sampler.take)


def at_text(active: Any, error: BaseException) -> None:
    active.text.push = fourth(error, active.text.push)


def at_lookup(active: Any, error: BaseException) -> None:
    active.lookup.guess = fourth(error, active.lookup.guess)


PLACES: dict[str, tuple[Request, Callable[[Any, BaseException], None]]] = {
    "sampler": (BAD, at_sampler),
    "sampler, among guesses": (
        replace(BAD, params=replace(BAD.params, speculate=4, logit_bias={9: 100.0})),
        at_sampler,
    ),
    "text": (BAD, at_text),
    "lookup": (replace(BAD, params=replace(BAD.params, speculate=4)), at_lookup),
}
ERRORS = [KeyError("k"), PanicException("panicked"), SystemExit(3), MemoryError(), RuntimeError("r"), StopIteration()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("place", [*PLACES, "allowed", "accept"])
def test_an_exception_of_its_own_work_ends_a_request_only(
    place: str, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    if place in PLACES:
        bad, damage = PLACES[place]
    else:
        bad, damage = replace(BAD, constraint=Grammar(error, place)), lambda active, error: None
    alone = new_engine()
    alone.submit(GOOD)
    expected = []
    while alone.has_work:
        expected += [event.token_id for _, event in alone.step() if isinstance(event, TokenEvent)]
    with caplog.at_level(logging.ERROR):
        good, ended = both(new_engine(), bad, lambda active: damage(active, error))
    assert [event.token_id for event in good] == expected and good[-1].finish_reason == "length"
    assert all(isinstance(event, TokenEvent) for event in ended[:-1]) and 1 <= len(ended) <= 12
    assert isinstance(ended[-1], AnswerError) and ended[-1].__cause__ is error
    assert type(error).__name__ in str(ended[-1]) and "Traceback" in caplog.text, "the log has the whole of it"


def test_a_request_that_wants_the_routing_fails_alone_when_it_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine()

    def broken(stats: Any, token: int) -> Any:
        raise RuntimeError("no routing")

    monkeypatch.setattr(passes, "_routing_of", broken)
    good, ended = both(engine, replace(BAD, routing=True))
    assert len(good) == 12 and len(ended) == 1 and isinstance(ended[0], AnswerError)


def test_scoring_a_prompt_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise PanicException("top")

    monkeypatch.setattr(answers, "top_logprobs", broken)
    scored = replace(BAD, params=replace(BAD.params, prompt_logprobs=True, logprobs=2))
    good, ended = both(new_engine(), scored)
    assert len(good) == 12 and len(ended) == 1 and isinstance(ended[0], AnswerError)


def test_ctrl_c_is_nobodys_own_failure() -> None:
    engine = new_engine()
    number = engine.submit(GOOD)
    engine._active[number].sampler.take = fourth(KeyboardInterrupt(), engine._active[number].sampler.take)  # type: ignore[method-assign]
    for _ in range(3):
        engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()


class Poison:
    """A runner whose logits are not finite where a marked request is."""

    def __init__(self, engine: Engine, token: int) -> None:
        real = engine.runner.forward

        def forward(batch: Any, **wanted: Any) -> Any:
            result = real(batch, **wanted)
            if token in batch.tokens:
                result.logits[0, 11] = float("nan")
            return result

        engine.runner.forward = forward  # type: ignore[method-assign]


def test_a_prompt_whose_scores_are_not_finite_is_refused_not_reported() -> None:
    engine = new_engine()
    Poison(engine, 60)
    params = SamplingParams(max_new_tokens=1, prompt_logprobs=True)
    engine.submit(Request(prompt=(60, 2, 3), params=params))
    [(_, error)] = engine.step()
    assert isinstance(error, RequestError) and "not finite" in str(error)


def test_more_alternatives_than_tokens_are_all_there_are() -> None:
    config = replace(TINY["dbrx"], vocab_size=11)
    engine = Engine(TorchRunner(Transformer.from_parameters(config, random_parameters(config)), 8))
    engine.submit(Request(prompt=(1, 2), params=SamplingParams(max_new_tokens=1, logprobs=20, prompt_logprobs=True)))
    [(_, event)] = engine.step()
    assert isinstance(event, TokenEvent) and event.prompt is not None
    assert len(event.top_logprobs) == 11 and len(event.prompt.top_logprobs[0]) == 11


# generate_many -------------------------------------------------------------------------------------------------------


def llm(fails: Callable[[int], BaseException | None]) -> LLM:
    """A model whose detokeniser may fail at a token."""
    base = new_engine()
    tokenizer = Tokenizer(Letters(), special_ids={})
    real = tokenizer.token_bytes

    def token_bytes(token_id: int) -> bytes:
        error = fails(token_id)
        if error is not None:
            raise error
        return real(token_id)

    tokenizer.token_bytes = token_bytes  # type: ignore[method-assign]
    return LLM(base.runner, tokenizer)


def test_generate_many_gives_all_answers_and_says_which_failed() -> None:
    params = replace(GOOD.params, max_new_tokens=8)
    prompts = [[1, 2, 3], [20, 21], [30, 31, 32]]
    whole = llm(lambda token: None).generate_many(prompts, params)
    # A token that only one of them says.
    bad = next(
        t
        for t in whole[1].token_ids[2:]
        if t not in {*whole[0].token_ids, *whole[2].token_ids, *whole[1].token_ids[:2]}
    )
    error, told = KeyError("no text"), []
    broken = llm(lambda token: error if token == bad else None)
    many = broken.generate_many(prompts, params, progress=lambda done, n: told.append((done, n)))
    for i in (0, 2):
        assert (many[i].token_ids, many[i].text, many[i].error) == (whole[i].token_ids, whole[i].text, None)
    at = whole[1].token_ids.index(bad)
    assert many[1].finish_reason == "error" and many[1].token_ids == whole[1].token_ids[:at]
    assert isinstance(many[1].error, AnswerError) and many[1].error.__cause__ is error
    assert told == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(AnswerError):
        broken.generate(prompts[1], params)
    assert broken.generate(prompts[0], params).text == whole[0].text, "it goes on"


def test_generate_many_takes_an_answer_that_failed_before_its_first_token() -> None:
    many = llm(lambda token: ValueError("never")).generate_many([[1], [2]], GOOD.params)
    assert [(one.text, one.token_ids, one.finish_reason) for one in many] == [("", [], "error")] * 2
    assert all(isinstance(one.error, QuadrigaError) and one.tokens_per_s == 0 for one in many)
