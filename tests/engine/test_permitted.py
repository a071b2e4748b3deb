"""Permitted tokens and bad words, in NumPy, in the kernels and through the engine; n answers; whole distributions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from quadriga import LLM, SamplingParams
from quadriga.engine.permitted import bad_sequences
from quadriga.engine.request import Request, seed_of
from quadriga.engine.sampler import Sample, Sampler, Unused
from quadriga.engine.truncation import Floats
from quadriga.errors import RequestError
from quadriga.kernels.cpu import library as cpu
from quadriga.kernels.cpu.sampling import RowSampler
from quadriga.nn.transformer import Transformer, random_parameters
from quadriga.runners.torch import TorchRunner
from quadriga.text.tokenizer import Tokenizer
from tests.checkpoint.models import TINY
from tests.engine.test_llm import Letters

LOGITS = np.array([1.0, 3.0, -2.0, 2.5, 0.0], dtype=np.float32)

Choose = Callable[[Sampler, Floats], Sample]


def in_numpy(one: Sampler, logits: Floats) -> Sample:
    """The best index is given, as the engine does: what is known of untouched logits must not decide."""
    return one.sample(logits, best=int(logits.argmax()))


def in_kernels(one: Sampler, logits: Floats) -> Sample:
    (chosen,) = RowSampler(cpu.Context(1)).sample(logits[None], [0], [one.ask()])
    return one.take(chosen, logits)


@pytest.fixture(params=[in_numpy, in_kernels])
def choose(request: pytest.FixtureRequest) -> Choose:
    """One of the two samplers."""
    chosen: Choose = request.param
    return chosen


@pytest.fixture(scope="module")
def tiny() -> LLM:
    config = TINY["dbrx"]
    model = Transformer.from_parameters(config, random_parameters(config, std=0.4)).eval()
    return LLM(TorchRunner(model), Tokenizer(Letters(), special_ids={}, bos_id=5, eos_ids=(7,), add_bos=True))


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_only_allowed_tokens_are_chosen_with_the_model_s_own_probability(choose: Choose, temperature: float) -> None:
    one = Sampler(SamplingParams(allowed_token_ids=(4, 2), temperature=temperature, seed=3, logprobs=2), [], 5)
    said = [choose(one, LOGITS) for _ in range(30)]
    assert {s.token_id for s in said} == ({4} if temperature == 0 else {2, 4})
    whole = np.log(np.exp(LOGITS.astype(np.float64)).sum())
    assert all(s.logprob == pytest.approx(float(LOGITS[s.token_id]) - whole, abs=1e-6) for s in said)
    assert [token for token, _ in said[0].top_logprobs][:2] == [1, 3], "alternatives are of the whole vocabulary"


def test_a_bad_word_is_forbidden_where_it_would_be_complete(choose: Choose) -> None:
    one = Sampler(SamplingParams(), [1, 3], 5, bad=[(1, 3), (3, 1, 1)])
    up = LOGITS.copy()
    up[3] = 9.0
    steps = [up, LOGITS, LOGITS, LOGITS, up, up]  # 3; 1; 1 would be 3 1 1, so 3 - but 1 3 is bad too: 0; 1; 0; 3
    assert [choose(one, row).token_id for row in steps] == [3, 1, 0, 1, 1, 1]


def test_a_bad_word_of_one_token_is_never_chosen(choose: Choose) -> None:
    one = Sampler(SamplingParams(), [], 5, bad=[(1,), (3,)])
    assert [choose(one, LOGITS).token_id for _ in range(2)] == [0, 0]


def test_what_leaves_nothing_is_an_error_that_says_so(choose: Choose) -> None:
    one = Sampler(SamplingParams(allowed_token_ids=(1,)), [], 5, bad=[(1, 1)])
    assert choose(one, LOGITS).token_id == 1
    with pytest.raises(RequestError, match="allowed_token_ids and bad_words leave no token"):
        choose(one, LOGITS)


def test_allowed_ids_must_be_tokens() -> None:
    with pytest.raises(RequestError, match=r"below the vocabulary's 5, got \[5\]"):
        Sampler(SamplingParams(allowed_token_ids=(5,)), [], 5)
    with pytest.raises(RequestError, match="allowed_token_ids must name tokens"):
        Sampler(SamplingParams(allowed_token_ids=(2,)), [], 5, Unused([2]))


def test_all_of_the_vocabulary_is_listed(choose: Choose) -> None:
    for n in (-1, 5, 1000):
        top = choose(Sampler(SamplingParams(logprobs=n), [], 5, Unused([2])), LOGITS).top_logprobs
        assert [token for token, _ in top] == [1, 3, 0, 4]
    big = np.random.default_rng(0).normal(size=3000).astype(np.float32)
    top = choose(Sampler(SamplingParams(logprobs=-1), [], 3000), big).top_logprobs
    assert [token for token, _ in top] == np.argsort(-big, kind="stable").tolist()
    assert sum(np.exp([logprob for _, logprob in top])) == pytest.approx(1, abs=1e-5)


def test_words_are_tokens_at_the_start_and_after_a_space() -> None:
    tokenizer = Tokenizer(Letters(), special_ids={}, bos_id=5, eos_ids=(7,), add_bos=True)
    a, b = ord("a") - 32, ord("b") - 32
    assert bad_sequences(("ab", "b", "ab"), tokenizer) == [(a, b), (0, a, b), (b,), (0, b)]


def test_the_offline_api_keeps_to_both(tiny: LLM) -> None:
    free = tiny.generate([3, 1, 4], SamplingParams(max_new_tokens=12, ignore_eos=True))
    word = free.text[2:4]
    assert len(word) == 2
    kept = tiny.generate([3, 1, 4], SamplingParams(max_new_tokens=12, ignore_eos=True, bad_words=(word,)))
    assert word not in kept.text and kept.text[:3] == free.text[:3]
    guessed = tiny.generate(
        [3, 1, 4], SamplingParams(max_new_tokens=12, ignore_eos=True, bad_words=(word,), speculate=4)
    )
    assert guessed.token_ids == kept.token_ids
    ids = (11, 30, 42)
    params = SamplingParams(max_new_tokens=12, allowed_token_ids=ids, temperature=2.0, seed=1, ignore_eos=True)
    assert set(tiny.generate([3, 1, 4], params).token_ids) <= set(ids)


def test_neither_goes_beside_a_grammar_and_words_need_a_tokenizer(tiny: LLM) -> None:
    class Anything:
        def allowed(self) -> np.ndarray:
            return np.ones(97, dtype=bool)

        def accept(self, token_id: int) -> bool:
            return False

    for params in (SamplingParams(allowed_token_ids=(1,)), SamplingParams(bad_words=("x",))):
        with pytest.raises(RequestError, match="beside a grammar"):
            tiny.engine.submit(Request(prompt=(1,), params=params, constraint=Anything()))
    with pytest.raises(RequestError, match="no tokenizer"):
        LLM(tiny.runner, None).generate([1], SamplingParams(bad_words=("x",)))


def test_n_answers_to_each_prompt_are_those_of_their_seeds(tiny: LLM) -> None:
    params = SamplingParams(max_new_tokens=6, temperature=1.5, seed=9, ignore_eos=True)
    answers = tiny.generate_many([[3, 1, 4], [2, 7]], params, n=3)
    assert len(answers) == 6 and len({tuple(a.token_ids) for a in answers[:3]}) == 3
    for i, answer in enumerate(answers):
        alone = SamplingParams(max_new_tokens=6, temperature=1.5, seed=seed_of(9, i % 3), ignore_eos=True)
        assert answer.token_ids == tiny.generate([[3, 1, 4], [2, 7]][i // 3], alone).token_ids
    assert answers[0].token_ids == tiny.generate([3, 1, 4], params).token_ids
    for wrong in (0, -1, True, 1.0):
        with pytest.raises(RequestError, match="n must be"):
            tiny.generate_many([[1]], n=wrong)  # type: ignore[arg-type]


def test_a_completion_has_the_whole_distributions(tiny: LLM) -> None:
    done = tiny.generate([3, 1, 4], SamplingParams(max_new_tokens=2, logprobs=-1, ignore_eos=True))
    logits = tiny.logits([3, 1, 4, done.token_ids[0]]).astype(np.float64)
    for row, top in zip(logits[-2:], done.top_logprobs, strict=True):
        expected = row - np.log(np.exp(row).sum())
        assert len(top) == len(row)
        assert all(logprob == pytest.approx(expected[token], abs=1e-4) for token, logprob in top)
    assert tiny.generate([3, 1, 4], SamplingParams(max_new_tokens=2)).top_logprobs == []
    prompt = tiny.stream([3, 1, 4], SamplingParams(max_new_tokens=1, logprobs=-1, prompt_logprobs=True))
    report = next(prompt).prompt
    assert report is not None and [len(top) for top in report.top_logprobs] == [logits.shape[1]] * 2
