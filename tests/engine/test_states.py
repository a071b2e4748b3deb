"""Models with recurrent layers in the engine: a state in a slot beside the blocks, wherever a sequence is cut, kept, shared
with others or put back. On the CPU's kernels the comparison is of bits.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from quadriga import LLM
from quadriga.engine import scoring
from quadriga.engine.engine import Engine
from quadriga.engine.request import Embed, Embedding, Request, SamplingParams
from quadriga.engine.scoring import score
from quadriga.errors import BusyError, ConfigError
from quadriga.kernels.arrays import arrays
from quadriga.model import cost
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.runners.base import Runner
from quadriga.runners.compiled import CompiledModel, pack_parameters
from quadriga.runners.make import cache_size
from quadriga.runners.torch import TorchRunner
from tests.checkpoint.models import TINY
from tests.engine.test_engine import drain, request, same
from tests.engine.test_scoring import ids

NAMES = ["lfm2moe", "qwen35moe", "granitehybrid", "nemotron_h"]


def compiled(name: str, n_blocks: int = 60, n_slots: int = 12, threads: int = 1) -> CompiledModel:
    config = replace(TINY[name], max_seq_len=400)
    parameters = pack_parameters(arrays(random_parameters(config, std=0.3)), "q4")
    return CompiledModel(config, parameters, threads=threads, n_blocks=n_blocks, n_slots=n_slots)


def plain(name: str) -> TorchRunner:
    config = replace(TINY[name], max_seq_len=400)
    return TorchRunner(Transformer.from_parameters(config, random_parameters(config, std=0.3)), 60, n_slots=12)


def solo(name: str, one: Request) -> list[object]:
    engine = Engine(compiled(name), prefix_cache=False)
    number = engine.submit(replace(one, params=replace(one.params, speculate=0)))
    return list(drain(engine)[number])


@pytest.mark.parametrize("name", NAMES)
def test_crowded_chunked_preempted_cached_and_guessed_answers_are_the_solo_ones(name: str) -> None:
    engine = Engine(compiled(name, n_blocks=14, n_slots=30), max_batch_tokens=23, max_sequences=5)
    mostly_3 = SamplingParams(max_new_tokens=30, speculate=4, temperature=1.0, logit_bias={3: 7.0}, ignore_eos=True)
    says_again = [Request(prompt=(7, 8, 9, i), params=replace(mostly_3, seed=i)) for i in range(3)]
    wanted = {engine.submit(one): one for one in (*(request(seed) for seed in range(21)), *says_again)}
    answers = drain(engine)
    stats = engine.stats()
    assert stats.n_preemptions > 0 and stats.n_cached_tokens > 0
    assert stats.n_guessed > stats.n_guessed_right > 0, "some guesses were wrong, and their states not taken over"
    for number, one in wanted.items():
        assert same(answers[number], solo(name, one)), f"request {number}"  # type: ignore[arg-type]
    engine.scheduler.check()


@pytest.mark.parametrize("name", NAMES)
def test_texts_become_the_same_vectors_in_a_crowd(name: str) -> None:
    def vectors(engine: Engine, texts: list[list[int]]) -> list[np.ndarray]:
        numbers = [engine.submit(Embed(prompt=tuple(text))) for text in texts]
        made = dict(event for _ in range(200) if engine.has_work for event in engine.step())
        return [event.vector for n in numbers if isinstance(event := made[n], Embedding)]

    texts = [ids(n, n) for n in (1, 16, 33, 120)]
    together = vectors(Engine(compiled(name), max_batch_tokens=17, max_sequences=4), texts)
    for text, vector in zip(texts, together, strict=True):
        (alone,) = vectors(Engine(compiled(name)), [text])
        assert np.array_equal(alone, vector)


@pytest.mark.parametrize("make", [compiled, plain])
@pytest.mark.parametrize("name", NAMES)
def test_continuations_are_scored_as_if_each_were_alone(
    name: str, make: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(make(name), None)  # type: ignore[operator]
    shared = ids(34, 5)
    pairs = [([*shared[:cut], *ids(n, n)], ids(m, m)) for cut in (34, 18, 0) for n in (1, 9, 20) for m in (1, 3, 19)]
    expected = []
    for context, after in pairs:
        rows = llm.logits([*context, *after])[len(context) - 1 : -1].astype(np.float64)
        expected.append([float(row[t] - np.log(np.exp(row).sum())) for row, t in zip(rows, after, strict=True)])
    for tokens in (1024, 7):
        monkeypatch.setattr(scoring, "PASS_TOKENS", tokens)
        for one, wanted in zip(score(llm.engine, pairs), expected, strict=True):
            assert one.logprobs == pytest.approx(wanted, abs=3e-4)
    states = llm.engine.scheduler.states
    assert states is not None and states.n_free == 12, "every slot came back"


def test_what_contexts_share_is_computed_once() -> None:
    llm, seen = LLM(compiled("lfm2moe"), None), list[int]()
    forward = llm.runner.forward
    llm.runner.forward = lambda batch, **wanted: seen.append(len(batch.tokens)) or forward(batch, **wanted)  # type: ignore[func-returns-value, method-assign]
    base = ids(48, 6)
    score(llm.engine, [(base, [1, 5, 6]), ([*base[:32], 9, 9], [2, 7])])
    assert sum(seen) == 48 + 2 + 2 + 1, "the first 32 once, both ends, the continuations but their last"


def test_the_next_turn_of_a_conversation_reads_its_own_tokens_only() -> None:
    engine = Engine(compiled("lfm2moe"))
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    first = engine.submit(Request(prompt=tuple(ids(21, 1)), params=params))
    said = [*ids(21, 1), *(event.token_id for event in drain(engine)[first])]
    second = engine.submit(Request(prompt=(*said, *ids(7, 2)), params=params))
    answer = drain(engine)[second]
    assert answer[0].prompt is not None and answer[0].prompt.n_cached_tokens == 48, "of 50 positions, whole blocks"
    assert same(answer, solo("lfm2moe", Request(prompt=(*said, *ids(7, 2)), params=params)))  # type: ignore[arg-type]


def test_logits_need_a_slot_and_give_it_back() -> None:
    engine = Engine(compiled("lfm2moe", n_slots=2), max_sequences=1)
    whole, _ = engine.score(ids(40, 3))
    cut, _ = engine.score(ids(40, 3), chunk=9)
    assert np.array_equal(whole, cut)
    states = engine.scheduler.states
    assert states is not None
    taken = [states.take(), states.take()]
    with pytest.raises(BusyError, match="no place is free"):
        engine.score([1, 2])
    for slot in taken:
        assert slot is not None
        states.give(slot)
    assert np.array_equal(engine.score(ids(40, 3))[0], whole)


def test_memory_is_shared_out_between_blocks_and_slots() -> None:
    config = TINY["lfm2moe"]
    slot, block = cost.state_bytes(config), 512
    assert slot == 4 * 2 * 2 * 48, "float32, two layers, two positions of 48 channels"
    size = cache_size(config, block, 20 * slot, 4)
    assert size.n_slots == 10 and size.n_blocks * block <= 10 * slot
    with pytest.raises(ConfigError, match="at least two recurrent states"):
        cache_size(config, block, 2 * slot, 4)
    assert cache_size(TINY["dbrx"], block, 10 * block, 4).n_slots == 0


def test_a_runner_says_how_many_slots_it_has() -> None:
    runners: list[Runner] = [compiled("lfm2moe"), plain("lfm2moe")]
    for runner in runners:
        assert (runner.n_slots, runner.state_bytes) == (12, 12 * 4 * 2 * 2 * 48)
    assert Engine(runners[0]).scheduler.max_sequences == 6
