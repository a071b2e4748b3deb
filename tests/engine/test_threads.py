"""One LLM in several threads, as in a web application or a pool: nothing hangs, everyone gets what it gets alone."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from quadriga import LLM, SamplingParams
from quadriga.engine.inbox import Answer
from quadriga.engine.text_model import TextModel
from quadriga.errors import EngineError, HardwareError, RequestError
from quadriga.kernels.arrays import arrays
from quadriga.kernels.pass_batch import PassBatch
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.runners.base import PassResult
from quadriga.runners.compiled import CompiledModel, pack_parameters
from quadriga.runners.torch import TorchRunner
from quadriga.text.tokenizer import Tokenizer
from tests.checkpoint.models import TINY
from tests.engine.test_llm import Letters
from tests.threads import MOST_SECONDS, all_at_once, until

CONFIG = TINY["dbrx"]
LONG = SamplingParams(max_new_tokens=12, ignore_eos=True)
PROMPTS = [[3, 1, 4], [2, 7, 1, 8], [9] * 20, [5, 77, 13]]


def compiled() -> CompiledModel:
    return CompiledModel(
        CONFIG, pack_parameters(arrays(random_parameters(CONFIG, std=0.4)), "q8"), threads=2, n_blocks=40
    )


def llm_on(runner: object) -> LLM:
    return LLM(runner, Tokenizer(Letters(), special_ids={}, bos_id=5, eos_ids=(7,), add_bos=True))  # type: ignore[arg-type]


class Gate:
    """A runner whose passes wait until they are let through, or fail when they are told to."""

    def __init__(self) -> None:
        self._runner = compiled()
        self.open = threading.Event()
        self.inside = threading.Event()
        """Set once a pass has begun."""
        self.failures = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)

    def forward(self, batch: PassBatch, **wanted: Any) -> PassResult:
        self.inside.set()
        assert self.open.wait(MOST_SECONDS)
        if self.failures:
            self.failures -= 1
            raise HardwareError("out of memory, as it was asked to be")
        return self._runner.forward(batch, **wanted)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def gated(gate: Gate) -> LLM:
    return llm_on(gate)


@pytest.fixture(scope="module", params=["compiled", "torch"])
def shared(request: pytest.FixtureRequest) -> LLM:
    if request.param == "compiled":
        return llm_on(compiled())
    model = Transformer.from_parameters(CONFIG, random_parameters(CONFIG, std=0.4)).eval()
    return llm_on(TorchRunner(model, 40))


def at_rest(llm: LLM) -> bool:
    """Nothing is left of anything that was asked."""
    stats = llm.engine.stats()
    llm.engine.scheduler.check()
    return not (stats.n_running or stats.n_waiting or stats.kv_blocks_used or llm._inboxes or llm._turns.n_waiting)


@pytest.mark.parametrize("run", range(50))
def test_four_threads_generate(run: int, shared: LLM) -> None:
    """Stood still for ever, or ended in a segmentation fault, one run in four."""
    alone = [shared.generate(prompt, LONG).token_ids for prompt in PROMPTS]
    together: dict[int, list[int]] = {}

    def one(i: int) -> Callable[[], None]:
        def go() -> None:
            together[i] = shared.generate(PROMPTS[i], LONG).token_ids

        return go

    all_at_once(*(one(i) for i in range(4)))
    assert [together[i] for i in range(4)] == alone
    assert at_rest(shared)


def test_threads_share_passes(gate: Gate, gated: LLM) -> None:
    """While one is in its first pass three others ask: no more passes than the longest needs, and theirs to come in."""

    def one(prompt: Sequence[int]) -> Callable[[], None]:
        def go() -> None:
            assert len(gated.generate(prompt, LONG).token_ids) == 12

        return go

    def late(prompt: Sequence[int]) -> Callable[[], None]:
        def go() -> None:
            assert gate.inside.wait(MOST_SECONDS)
            one(prompt)()

        return go

    def watch() -> None:
        until(lambda: gated._turns.n_waiting == 3)
        gate.open.set()

    all_at_once(one(PROMPTS[0]), late(PROMPTS[1]), late(PROMPTS[2]), late(PROMPTS[3]), watch)
    assert gated.engine.stats().n_steps <= 12 + 3
    assert at_rest(gated)


@pytest.mark.parametrize("run", range(5))
def test_everything_at_once(run: int, shared: LLM) -> None:
    """All that a model can be asked, beside each other, gives what it gives alone."""
    sampled = SamplingParams(max_new_tokens=9, temperature=1.0, seed=run, ignore_eos=True)
    pairs = [(PROMPTS[0], [4, 5]), (PROMPTS[0], [6]), (PROMPTS[2], [1, 2, 3])]
    questions: dict[str, Callable[[], object]] = {
        "generate": lambda: shared.generate(PROMPTS[2], sampled).token_ids,
        "many": lambda: [c.token_ids for c in shared.generate_many(PROMPTS, sampled)],
        "stream": lambda: [e.token_id for e in shared.stream(PROMPTS[1], sampled)],
        "guesses": lambda: (
            shared.generate([1, 2, 3] * 9, SamplingParams(max_new_tokens=12, speculate=4, ignore_eos=True)).token_ids
        ),
        "logits": lambda: shared.logits(PROMPTS[3]).tolist(),
        "routing": lambda: [layer.expert_ids.tolist() for layer in shared.routing(PROMPTS[3])],
        "embed": lambda: shared.embed("a text").tolist(),
        "likelihood": lambda: shared.loglikelihood([1, 2], [3]),
        "score": lambda: shared.score(pairs),
    }
    alone = {name: ask() for name, ask in questions.items()}
    if isinstance(shared.runner, CompiledModel):
        same = lambda a, b: a == b  # noqa: E731
    else:  # plain torch's sums depend on what shares the batch
        same = lambda a, b: torch.allclose(_numbers(a), _numbers(b), atol=1e-4)  # noqa: E731

    def one(name: str) -> Callable[[], None]:
        def go() -> None:
            for _ in range(3):
                assert same(questions[name](), alone[name]), name

        return go

    all_at_once(*(one(name) for name in questions))
    assert at_rest(shared)


def _numbers(answer: object) -> torch.Tensor:
    """Every number of an answer, in order."""
    found: list[float] = []

    def collect(value: object) -> None:
        if isinstance(value, (int, float)):
            found.append(float(value))
        else:
            for one in value.logprobs if hasattr(value, "logprobs") else value:  # type: ignore[attr-defined]
                collect(one)

    collect(answer)
    return torch.tensor(found)


def test_two_threads_read_one_answer() -> None:
    llm = llm_on(compiled())
    answer, read = llm.stream(PROMPTS[0], LONG), []

    def reader() -> None:
        read.extend(event.token_id for event in answer)

    all_at_once(reader, reader)
    assert sorted(read) == sorted(llm.generate(PROMPTS[0], LONG).token_ids)
    assert at_rest(llm)


# Answers that are not read to their end --------------------------------------------------------------------------------


@pytest.mark.parametrize("n_read", [0, 1, 3])
@pytest.mark.parametrize("end", ["dropped", "closed", "thrown", "exhausted"])
def test_an_answer_that_is_left_frees_its_blocks(end: str, n_read: int) -> None:
    """Also before its first token, where a generator's own end would not run."""
    llm = llm_on(compiled())
    answer = llm.stream(PROMPTS[2], LONG)
    for _ in range(n_read):
        next(answer)
    if end == "closed":
        answer.close()
        assert list(answer) == []
    elif end == "thrown":
        with pytest.raises(ValueError):
            answer.throw(ValueError())
    elif end == "exhausted":
        assert len(list(answer)) == 12 - n_read
        with pytest.raises(StopIteration):
            next(answer)
    del answer
    gc.collect()
    assert at_rest(llm) and not llm.engine.has_work


def test_an_answer_that_is_left_while_others_compute(gate: Gate, gated: LLM) -> None:
    """Its thread does not wait for the pass; the next pass is without it."""
    answers: list[Answer] = [gated.stream(PROMPTS[2], LONG)]

    def other() -> None:
        gated.generate(PROMPTS[0], LONG)

    def leave() -> None:
        assert gate.inside.wait(MOST_SECONDS)
        answers.clear()
        gc.collect()
        assert gated.engine.has_work, "it did not wait: the pass has not even begun to compute"
        gate.open.set()

    all_at_once(other, leave)
    assert at_rest(gated)
    assert gated.engine.stats().n_generated_tokens == 12 + 1, "a pass with both, then the one alone"


def test_closing_an_answer_ends_the_thread_that_reads_it(gate: Gate, gated: LLM) -> None:
    answer, read = gated.stream(PROMPTS[0], LONG), list[int]()

    def other() -> None:
        gated.generate(PROMPTS[1], SamplingParams(max_new_tokens=50, ignore_eos=True))

    def reader() -> None:
        assert gate.inside.wait(MOST_SECONDS)
        read.extend(event.token_id for event in answer)

    def closer() -> None:
        until(lambda: gated._turns.n_waiting == 1)
        answer.close()
        gate.open.set()

    all_at_once(other, reader, closer)
    assert len(read) <= 1
    assert at_rest(gated)


# What goes wrong for one does not go wrong for the others -----------------------------------------------------------------


def test_a_pass_that_fails_is_an_error_for_who_ran_it(gate: Gate, gated: LLM) -> None:
    ended: list[str] = []
    gate.failures = 1

    def one(prompt: Sequence[int]) -> Callable[[], None]:
        def go() -> None:
            try:
                assert len(gated.generate(prompt, LONG).token_ids) == 12
                ended.append("well")
            except HardwareError as error:
                ended.append(str(error))

        return go

    def late(prompt: Sequence[int]) -> Callable[[], None]:
        def go() -> None:
            assert gate.inside.wait(MOST_SECONDS)
            one(prompt)()

        return go

    def watch() -> None:
        until(lambda: gated._turns.n_waiting == 2)
        gate.open.set()

    all_at_once(one(PROMPTS[0]), late(PROMPTS[1]), late(PROMPTS[2]), watch)
    assert sorted(ended) == ["out of memory, as it was asked to be", "well", "well"]
    assert at_rest(gated)
    expected = llm_on(compiled()).generate(PROMPTS[0], LONG).token_ids
    assert gated.generate(PROMPTS[0], LONG).token_ids == expected


def test_of_many_prompts_all_run_or_none(shared: LLM) -> None:
    with pytest.raises(RequestError, match="no room for an answer"):
        shared.generate_many([PROMPTS[0], [1] * 64, PROMPTS[1]], LONG)
    assert at_rest(shared)


def test_a_request_that_somebody_else_cancelled_is_an_error_not_a_wait(shared: LLM) -> None:
    answer = shared.stream(PROMPTS[0], LONG)
    (request_id,) = shared._inboxes
    shared.engine.cancel(request_id)
    with pytest.raises(EngineError, match="not in the engine any more"):
        next(answer)
    assert at_rest(shared)


def test_a_callback_that_asks_the_model_within_its_turn_is_an_error_not_a_wait(shared: LLM) -> None:
    with pytest.raises(EngineError, match="would wait"):
        shared.score([(PROMPTS[0], [4, 5])], done=lambda n: shared.generate(PROMPTS[1], LONG))
    assert at_rest(shared)
    heard: list[int] = []
    params = SamplingParams(max_new_tokens=2, ignore_eos=True)
    shared.generate_many(
        PROMPTS[:2], params, progress=lambda n, of: heard.append(len(shared.generate(PROMPTS[3], params).token_ids))
    )
    assert heard == [2, 2], "progress is told outside of a turn"


# One is not several -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", ["hello", b"hello", [1, 2, 3], range(3), torch.tensor([1, 2])])
def test_one_prompt_is_not_several(shared: LLM, one: object) -> None:
    with pytest.raises(RequestError, match=r"must be several|must be text or a list of token ids"):
        shared.generate_many(one)  # type: ignore[arg-type]


def test_one_text_is_not_several_anywhere(shared: LLM) -> None:
    with pytest.raises(RequestError, match="adapters must be several"):
        shared.generate_many(PROMPTS[:2], adapters="ab")
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]
    texts = TextModel(shared)
    with pytest.raises(RequestError, match="prompts must be several"):
        texts.generate("hello", max_new_tokens=2)
    with pytest.raises(RequestError, match="stop must be several"):
        texts.generate(["hello"], max_new_tokens=2, stop="END")
    with pytest.raises(RequestError, match="texts must be several"):
        texts.rolling("hello")
    with pytest.raises(RequestError, match="requests must be several"):
        texts.loglikelihoods("hello")  # type: ignore[arg-type]
