"""Ids of the embedding that no token has: never chosen, never listed, whatever the model thinks of them.

The head of the model here likes them best: 5 and 40 are holes of the vocabulary, 90 and above only pad the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from quadriga import LLM
from quadriga.engine.engine import Engine
from quadriga.engine.request import Request, SamplingParams, TokenEvent
from quadriga.errors import RequestError, TokenizerError
from quadriga.kernels.arrays import arrays
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.runners.base import Runner
from quadriga.runners.compiled import CompiledModel, pack_parameters
from quadriga.runners.torch import TorchRunner
from quadriga.text.grammar import Grammars, Mask
from quadriga.text.tokenizer import Tokenizer
from tests.checkpoint.models import TINY

HOLES = frozenset({5, 40})
UNUSED = HOLES | frozenset(range(90, 97))
END = 7
CONFIG = replace(TINY["dbrx"], max_seq_len=400)
FREE = SamplingParams(max_new_tokens=24, ignore_eos=True)


class Holey:
    """90 ids, of which two have no token: 0..31 are special-looking words, the others printable characters."""

    n_vocab = 90

    def encode(self, text: str, allow_special: bool) -> list[int]:
        return [ord(c) - 32 + 8 for c in text]

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in HOLES:
            raise TokenizerError(f"token id {token_id} is one of the vocabulary's unused ids")
        return b"<%d>" % token_id if token_id < 8 else bytes([token_id + 32 - 8])


def holey(**options: object) -> Tokenizer:
    return Tokenizer(Holey(), special_ids={"<end>": END}, eos_ids=[END], **options)  # type: ignore[arg-type]


def parameters() -> dict[str, torch.Tensor]:
    made = random_parameters(CONFIG, std=0.3)
    head = made["lm_head.weight"]
    # Of nine directions thirty times as long as a token's, one is nearly always far above every token.
    head[sorted(UNUSED)] = 30 * head.std() * torch.randn(9, CONFIG.d_model, generator=torch.Generator().manual_seed(1))
    return made


def compiled() -> CompiledModel:
    return CompiledModel(CONFIG, pack_parameters(arrays(parameters()), "q8"), threads=1, n_blocks=60)


def plain() -> TorchRunner:
    return TorchRunner(Transformer.from_parameters(CONFIG, parameters()), 60)


RUNNERS = {"compiled": compiled, "torch": plain}


def events_of(engine: Engine, request: Request) -> list[TokenEvent]:
    engine.submit(request)
    events: list[TokenEvent] = []
    while engine.has_work:
        for _, event in engine.step():
            assert isinstance(event, TokenEvent), event
            events.append(event)
    return events


def make(name: str, **options: object) -> Engine:
    runner: Runner = RUNNERS[name]()
    return Engine(runner, holey(), end_ids=frozenset({END}), **options)  # type: ignore[arg-type]


class Anything:
    """A grammar that forbids nothing."""

    def allowed(self) -> Mask:
        return np.ones(97, dtype=np.bool_)

    def accept(self, token_id: int) -> bool:
        return False


class Only(Anything):
    """A grammar that wants one id."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted

    def allowed(self) -> Mask:
        return np.arange(97) == self.wanted


@pytest.mark.parametrize("name", RUNNERS)
def test_the_model_here_likes_them_best(name: str) -> None:
    logits, _ = make(name).score([1, 2, 3, 4])
    assert {int(best) for best in logits.argmax(-1)} <= UNUSED


@pytest.mark.parametrize("name", RUNNERS)
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 100.0, "seed": 3},
        {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_p": 0.01, "seed": 4},
        {"repetition_penalty": 1.3, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"speculate": 4, "logit_bias": {20: 30.0, 21: 29.5}},
        {"logprobs": 20, "prompt_logprobs": True},
        {"logit_bias": {9: 100.0}},
    ],
    ids=str,
)
@pytest.mark.parametrize("grammar", [False, True], ids=["free", "grammar"])
def test_they_are_never_chosen_nor_listed(name: str, params: dict[str, object], grammar: bool) -> None:
    request = Request(
        prompt=(20, 21, 20, 21, 20, 21, 30, 31),
        params=replace(FREE, **params),  # type: ignore[arg-type]
        constraint=Anything() if grammar else None,
    )
    events = events_of(make(name), request)
    assert len(events) == 24
    listed = [token for event in events for token, _ in event.top_logprobs]
    report = events[0].prompt
    assert report is not None
    listed += [token for row in report.top_logprobs for token, _ in row]
    assert bool(listed) == ("logprobs" in params)
    chosen = [event.token_id for event in events]
    assert not UNUSED & {*chosen, *listed}
    assert all(-1e9 < event.logprob <= 0 for event in events), "the model's own opinion: low, and finite"


@pytest.mark.parametrize("name", RUNNERS)
def test_log_probabilities_stay_the_models(name: str) -> None:
    engine = make(name)
    first = events_of(engine, Request(prompt=(1, 2, 3), params=replace(FREE, logprobs=2, max_new_tokens=1)))[0]
    expected = torch.from_numpy(engine.score([1, 2, 3])[0])[-1].log_softmax(-1)
    expected[sorted(UNUSED)] = -torch.inf
    values, ids = expected.topk(2)
    assert [token for token, _ in first.top_logprobs] == ids.tolist()
    assert [p for _, p in first.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
    assert (first.token_id, first.logprob) == first.top_logprobs[0]


def test_a_bias_on_one_is_refused_and_a_stop_at_one_is_not() -> None:
    engine = make("compiled")
    for token in (5, 90, 96):
        with pytest.raises(RequestError, match=rf"no token of this vocabulary has the ids \[{token}\]"):
            engine.submit(Request(prompt=(1,), params=SamplingParams(logit_bias={token: -1.0, 9: 1.0})))
    assert not engine.has_work
    assert len(events_of(engine, Request(prompt=(1,), params=replace(FREE, stop_ids=(5, 90))))) == 24


def test_a_grammar_that_wants_one_ends_its_request() -> None:
    engine = make("compiled")
    engine.submit(Request(prompt=(1,), params=FREE, constraint=Only(40)))
    [(_, error)] = engine.step()
    assert isinstance(error, RequestError) and "no token of this vocabulary may follow" in str(error)
    assert not engine.has_work


@pytest.mark.parametrize("name", RUNNERS)
def test_a_prompt_may_contain_them(name: str) -> None:
    prompt = (20, 5, 21, 90, 96, 22, 5, 21)
    params = replace(FREE, logprobs=3, prompt_logprobs=True, speculate=4, stop=("never said",))
    events = events_of(make(name), Request(prompt=prompt, params=params))
    assert len(events) == 24 and not UNUSED & {event.token_id for event in events}
    report = events[0].prompt
    assert report is not None and len(report.logprobs) == 7
    expected = torch.from_numpy(make(name).score(prompt)[0]).log_softmax(-1)[torch.arange(7), torch.tensor(prompt[1:])]
    assert list(report.logprobs) == pytest.approx(expected.tolist(), abs=1e-3), "finite: the model's own"


@pytest.mark.parametrize("end", [95, 40], ids=["padding", "hole"])
def test_an_end_that_the_vocabulary_does_not_list_still_ends(end: int) -> None:
    engine = Engine(compiled(), holey(), end_ids=frozenset({end}))
    bias = {token: -100.0 for token in range(90) if token not in HOLES}
    last = events_of(engine, Request(prompt=(1, 2), params=SamplingParams(logit_bias=bias)))[-1]
    assert (last.token_id, last.finish_reason, last.text) == (end, "stop", "")
    told_on = events_of(engine, Request(prompt=(1, 2), params=replace(FREE, logit_bias=bias)))
    assert {event.token_id for event in told_on} == {end} and "".join(event.text for event in told_on) == ""


def test_generate_many_never_says_them_and_keeps_the_batch() -> None:
    llm = LLM(compiled(), holey())
    prompts: list[Sequence[int]] = [[20, 21, 22], [5, 90], [30]]
    many = llm.generate_many(prompts, replace(FREE, temperature=1.0, seed=5))
    assert [one.finish_reason for one in many] == ["length"] * 3
    assert not UNUSED & {token for one in many for token in one.token_ids}
    assert [llm.tokenizer.decode(one.token_ids) for one in many if llm.tokenizer] == [one.text for one in many]


@pytest.mark.parametrize("declared", [True, False], ids=["listed", "asked"])
def test_the_tokenizer_knows_them(declared: bool) -> None:
    tokenizer = holey(unused_ids=sorted(HOLES)) if declared else holey()
    assert tokenizer.unused_ids == HOLES
    assert tokenizer.unused_rows(97) == sorted(UNUSED) and tokenizer.unused_rows(90) == [5, 40]
    assert [tokenizer.is_token(i) for i in (4, 5, 6, 89, 90, -1)] == [True, False, True, True, False, False]
    assert tokenizer.token_bytes(5) == b""
    with pytest.raises(TokenizerError, match="5 is one of the vocabulary's unused ids"):
        tokenizer.decode([6, 5])


def test_a_grammar_over_such_a_vocabulary_works_and_never_allows_them() -> None:
    grammars = Grammars(holey(), 97, frozenset({END}))
    engine = make("compiled")
    ids = []
    for event in events_of(
        engine, Request(prompt=(1,), params=SamplingParams(), constraint=grammars.compile("regex", "[0-9]{3}"))
    ):
        ids.append(event.token_id)
    assert holey().decode([i for i in ids if i != END]).isdigit() and len(ids) in (3, 4)
    # Lark can name an id by number; an unused one is no way on either.
    grammar = grammars.compile("lark", 'start: <[40]> | "a"')
    allowed = grammar.allowed()
    event = events_of(engine, Request(prompt=(1,), params=SamplingParams(max_new_tokens=1), constraint=grammar))[0]
    assert bool(allowed[40]) and event.token_id == Holey().encode("a", False)[0]
