"""The sampler against naive statements of what each parameter means."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quadriga.engine.request import SamplingParams
from quadriga.engine.sampler import Sampler, Unused
from quadriga.engine.truncation import Floats, excluded, kept, pick, typical, uniforms
from quadriga.errors import RequestError

LOGITS = np.array([1.0, 3.0, -2.0, 2.5, 0.0], dtype=np.float32)


def log_softmax(row: Floats) -> Floats:
    return row - np.log(np.exp(row.astype(np.float64)).sum())


def sampler(prompt: list[int] | None = None, vocab_size: int = 5, **params: object) -> Sampler:
    return Sampler(SamplingParams(**params), prompt or [], vocab_size)  # type: ignore[arg-type]


def test_greedy_takes_the_best_and_reports_its_own_probability() -> None:
    chosen = sampler(logprobs=2).sample(LOGITS)
    expected = [x - math.log(sum(math.exp(y) for y in LOGITS.tolist())) for x in LOGITS.tolist()]
    assert chosen.token_id == 1
    assert chosen.logprob == pytest.approx(expected[1], abs=1e-6)
    assert [token for token, _ in chosen.top_logprobs] == [1, 3]
    assert chosen.top_logprobs[1][1] == pytest.approx(expected[3], abs=1e-6)


def test_same_seed_same_tokens_and_another_seed_differs() -> None:
    flat = np.zeros(1000, dtype=np.float32)
    draws = [
        [s.sample(flat).token_id for _ in range(8)]
        for s in (sampler(vocab_size=1000, temperature=1.0, seed=seed) for seed in (7, 7, 8))
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]  # odds of a false alarm: 1000^-8
    zero = [
        [s.sample(flat).token_id for _ in range(8)]
        for s in (sampler(vocab_size=1000, temperature=1.0, seed=0) for _ in range(2))
    ]
    assert zero[0] == zero[1], "0 is a seed"


def test_draws_follow_the_distribution() -> None:
    s = sampler(temperature=2.0, seed=1)
    counts = np.bincount([s.sample(LOGITS).token_id for _ in range(4000)], minlength=5)
    expected = np.exp(log_softmax(LOGITS / 2)) * 4000
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 23.5  # 4 degrees of freedom: false alarm 1 in 10^4, and the seed is fixed


LETTERS = np.array([2.0, 1.4, 1.0, 0.2, -0.3, -1.0, -2.0, 0.6], dtype=np.float32)
"""Temperature decides who is kept: top_p of 0.7 keeps 3 of these at 1 and 5 at 2.5."""


def naive(logits: Floats, temperature: float, top_k: int, top_p: float, min_p: float) -> Floats:
    """The distribution that the parameters document: temperature first, then who is kept."""
    p = [math.exp(x / temperature) for x in logits.tolist()]
    p = [x / sum(p) for x in p]
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    kept = order[:top_k] if top_k else order
    total, mass, reached = sum(p[i] for i in kept), 0.0, []
    for i in kept:
        if mass < top_p * total:
            reached.append(i)
        mass += p[i]
    kept = [i for i in reached if p[i] >= min_p * p[order[0]]]
    return np.array([p[i] / sum(p[j] for j in kept) if i in kept else 0.0 for i in range(len(p))])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (2.5, 0, 0.7, 0.0),
        (0.5, 0, 0.7, 0.0),
        (2.5, 6, 0.8, 0.0),
        (2.5, 0, 1.0, 0.4),
        (0.6, 3, 1.0, 0.0),
        (2.5, 6, 0.9, 0.5),
    ],
)
def test_draws_with_temperature_and_truncation_together(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    s = sampler(vocab_size=8, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=1)
    expected = naive(LETTERS, temperature, top_k, top_p, min_p)
    drawn = np.bincount([s.sample(LETTERS).token_id for _ in range(4000)], minlength=8)
    assert not drawn[expected == 0].any(), "only who is kept is drawn"
    here = expected > 0
    assert 2 <= int(here.sum()) < 8
    chi2 = float(((drawn - 4000 * expected)[here] ** 2 / (4000 * expected)[here]).sum())
    assert chi2 < 29.9  # up to 7 degrees of freedom: false alarm 1 in 10^4, and the seed is fixed


def test_what_is_reported_is_the_models_own_opinion_whatever_the_sampler_does() -> None:
    """Bias, penalties, temperature, truncation and a grammar move the choice; the numbers stay those of the logits."""
    allowed = np.array([True, False, True, True, True])
    s = sampler(
        prompt=[3], logit_bias={1: 50.0, 2: 9.0}, repetition_penalty=1.7, presence_penalty=1.0, temperature=0.3, top_k=2,
        logprobs=5, seed=1,
    )  # fmt: skip
    own = log_softmax(LOGITS)
    order = (-own).argsort().tolist()
    for log_sum in (None, float(LOGITS[0] - own[0])):
        chosen = s.sample(LOGITS, best=1, log_sum=log_sum, allowed=allowed)
        assert chosen.token_id == 2, "the bias decides among the allowed"
        assert chosen.logprob == pytest.approx(float(own[2]), abs=1e-6)
        assert [token for token, _ in chosen.top_logprobs] == order
        assert [p for _, p in chosen.top_logprobs] == pytest.approx(own[order].tolist(), abs=1e-6)


def test_a_known_best_token_counts_for_untouched_logits_only() -> None:
    assert sampler().sample(LOGITS, best=1).token_id == 1
    assert sampler(logit_bias={4: 9.0}).sample(LOGITS, best=1).token_id == 4
    assert sampler(prompt=[1], repetition_penalty=3.0).sample(LOGITS, best=1).token_id == 3
    assert sampler().sample(LOGITS, best=1, allowed=np.array([True, False, True, False, True])).token_id == 0


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits = np.zeros(40, dtype=np.float32)
    logits[[17, 5, 39]] = 2.0
    assert sampler(vocab_size=40).sample(logits).token_id == 5
    assert sampler(vocab_size=40, logit_bias={5: -1.0}).sample(logits).token_id == 17


def test_penalties_and_bias_add_up_on_the_penalised_logits() -> None:
    s = sampler(
        prompt=[0, 2],
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={1: -0.5, 2: 1.0},
    )
    assert s._said is not None
    for token in (1, 1, 3):
        s._said.add(token)
    assert s._adjust(LOGITS).tolist() == pytest.approx([0.5, 1.5 - 0.5 - 0.5 - 0.5, -4.0 + 1.0, 1.25 - 0.5 - 0.25, 0.0])


def ids_kept(weights: Floats, top_k: int, top_p: float, min_p: float) -> list[int]:
    ids = kept(weights, top_k, top_p, min_p)
    return list(range(len(weights))) if ids is None else ids.tolist()


def test_equal_probabilities_keep_the_lower_ids() -> None:
    flat = np.full(64, 1 / 64)
    assert ids_kept(flat, 3, 1.0, 0.0) == [0, 1, 2]
    assert ids_kept(flat, 0, 4 / 64, 0.0) == [0, 1, 2, 3]
    assert ids_kept(flat, 0, 1.0, 1.0) == list(range(64)), "as probable as the best is enough"
    assert ids_kept(np.array([1.0, 3.0, 1.0, 3.0, 1.0]), 4, 1.0, 0.0) == [1, 3, 0, 2]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_answer() -> None:
    s = sampler(prompt=[1, 2], repetition_penalty=2.0)
    assert s._adjust(LOGITS).tolist() == [1.0, 1.5, -4.0, 2.5, 0.0]
    assert s.sample(LOGITS).token_id == 3
    assert s._adjust(LOGITS).tolist() == [1.0, 1.5, -4.0, 1.25, 0.0]


def test_presence_and_frequency_penalties_count_the_answer_only() -> None:
    s = sampler(prompt=[1, 1, 1], presence_penalty=0.5, frequency_penalty=0.25)
    assert s._adjust(LOGITS).tolist() == LOGITS.tolist()
    assert [s.sample(LOGITS).token_id for _ in range(2)] == [1, 3]  # 3.0 falls to 2.25 after one use
    assert s._adjust(LOGITS).tolist() == [1.0, 2.25, -2.0, 1.75, 0.0]
    s.sample(LOGITS)
    assert s._adjust(LOGITS).tolist() == [1.0, 2.0, -2.0, 1.75, 0.0]


def test_logit_bias_moves_the_choice_but_not_the_reported_probability() -> None:
    plain, biased = sampler().sample(LOGITS), sampler(logit_bias={1: -100.0}).sample(LOGITS)
    assert (plain.token_id, biased.token_id) == (1, 3)
    assert biased.logprob == pytest.approx(plain.logprob - 0.5, abs=1e-6)


def test_truncation_by_hand() -> None:
    probs = np.array([0.1, 0.4, 0.3, 0.2])
    assert ids_kept(probs, 2, 1.0, 0.0) == [1, 2]
    assert ids_kept(probs, 0, 0.7, 0.0) == [1, 2]
    assert ids_kept(probs, 0, 0.71, 0.0) == [1, 2, 3]
    assert ids_kept(probs, 0, 1.0, 0.5) == [1, 2, 3]
    assert ids_kept(probs, 0, 1e-9, 0.0) == [1]


def test_typical_tokens_by_hand() -> None:
    """Entropy of (.5, .25, .125, .125) is 1.75 bits: information of 2 bits is nearest, then of 1, then of 3."""
    probs = np.array([0.125, 0.5, 0.25, 0.125])
    logs = np.log(probs)
    assert typical(probs, logs, 0.2).tolist() == [2]
    assert typical(probs, logs, 0.25).tolist() == [2]
    assert typical(probs, logs, 0.3).tolist() == [2, 1]
    assert typical(probs, logs, 0.76).tolist() == [2, 1, 0]
    assert typical(probs, logs, 0.99).tolist() == [2, 1, 0, 3]


def test_the_best_choices_excluded_by_hand() -> None:
    probs = np.array([0.1, 0.4, 0.25, 0.25, 0.0])
    assert sorted(excluded(probs, 0.2).tolist()) == [1, 2], "the last of equal ones stays"
    assert excluded(probs, 0.3).tolist() == [], "one alone is no choice"
    assert sorted(excluded(probs, 0.0).tolist()) == [1, 2, 3]
    always = sampler(temperature=1.0, xtc_probability=1.0, xtc_threshold=0.1, seed=1)
    assert {always.sample(LOGITS).token_id for _ in range(30)} <= {0, 2, 3, 4}, "the best is never taken"


@given(
    st.lists(st.floats(0.001, 1.0), min_size=1, max_size=30),
    st.integers(0, 31),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
)
def test_truncation_against_a_loop(weights: list[float], top_k: int, top_p: float, min_p: float) -> None:
    probs = np.array(weights) / sum(weights)
    order = sorted(range(len(weights)), key=lambda i: (-float(probs[i]), i))
    if top_k:
        order = order[:top_k]
    total = sum(float(probs[i]) for i in order)
    survivors, mass = [], 0.0
    for i in order:
        if abs(mass - top_p * total) < 1e-12 and top_p < 1.0:
            return  # a tie at the border may fall either way by rounding
        if top_p == 1.0 or mass < top_p * total:
            survivors.append(i)
        mass += float(probs[i])
    survivors = [i for i in survivors if float(probs[i]) >= min_p * float(probs[order[0]])]
    assert sorted(ids_kept(probs, top_k, top_p, min_p)) == sorted(survivors)


def sorted_whole(weights: Floats, top_k: int, top_p: float, min_p: float) -> list[int]:
    """What :func:`kept` is to find, by a stable sort of everything."""
    order = np.argsort(-weights, kind="stable")
    order = order[:top_k] if top_k else order
    ordered = weights[order].astype(np.float64)
    total = ordered.cumsum()[-1] if top_k else weights.sum(dtype=np.float64)
    before = np.concatenate([[0.0], ordered.cumsum()[:-1]])
    stays = (before < top_p * total) | (top_p == 1.0)
    stays[0] = True
    found: list[int] = order[stays & (weights[order] >= min_p * weights[order[0]])].tolist()
    return found


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 4.0, 12.0])
def test_selecting_a_part_of_a_large_vocabulary_finds_what_sorting_it_finds(scale: float) -> None:
    """Flat and steep, with many equal weights: every stage of the selection is used by one of these."""
    draw = np.random.default_rng(int(scale * 10))
    logits = np.round(draw.standard_normal(30_000) * scale, 1).astype(np.float32)
    weights = np.exp(logits - logits.max())
    for top_k in (0, 1, 50, 29_999, 40_000):
        for top_p in (1e-6, 0.3, 0.95, 0.999999, 1 - 1e-12, 1.0):
            for min_p in (0.0, 0.05, 1.0) if top_k or top_p < 1.0 else (0.05, 1.0):
                assert ids_kept(weights, top_k, top_p, min_p) == sorted_whole(weights, top_k, top_p, min_p)


@pytest.mark.parametrize("n", [1, 5, 255, 256, 257, 1000])
def test_a_place_in_the_summed_weights_is_a_token(n: int) -> None:
    weights = np.random.default_rng(n).random(n).astype(np.float32)
    weights[n // 3 : n // 2] = 0.0
    ends = weights.cumsum(dtype=np.float64)
    for at in np.arange(0.0005, 1.0, 0.001).tolist():
        assert pick(weights, at) == int((ends <= at * ends[-1]).sum())
    last = int(np.flatnonzero(weights)[-1])
    assert pick(weights, 1 - 2**-53) == last and weights[pick(weights, 0.0)] > 0


def test_draws_from_a_large_vocabulary_follow_the_distribution() -> None:
    """By thirds of a hundred sums each: the two stages of a draw and the place between them."""
    logits = np.random.default_rng(3).standard_normal(9000).astype(np.float32)
    s = sampler(vocab_size=9000, temperature=1.0, seed=5)
    counts = np.bincount([s.sample(logits).token_id // 300 for _ in range(6000)], minlength=30)
    expected = np.exp(log_softmax(logits)).reshape(30, 300).sum(1) * 6000
    assert float(((counts - expected) ** 2 / expected).sum()) < 66.2  # 29 degrees of freedom: 1 in 10^4


def test_a_draw_depends_on_seed_and_position_only() -> None:
    flat, row = np.zeros(1000, dtype=np.float32), np.linspace(0, 1, 1000, dtype=np.float32)
    one, other = sampler(vocab_size=1000, temperature=1.0, seed=3), sampler(vocab_size=1000, temperature=1.0, seed=3)
    one.sample(flat)
    other.sample(row)
    assert one.sample(flat) == other.sample(flat), "what was drawn before does not matter, how often does"
    numbers = [x for seed in (0, 1, 2**63 - 1) for position in range(50) for x in uniforms(seed, position)]
    assert len(set(numbers)) == 300 and all(0 <= x < 1 for x in numbers) and 0.4 < sum(numbers) / 300 < 0.6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_are_an_error_not_a_token(bad: float) -> None:
    with pytest.raises(RequestError, match="not finite"):
        sampler().sample(np.array([0.0, bad, 1.0, 0.0, 0.0], dtype=np.float32))


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"typical_p": 0.0}, "typical_p"),
        ({"typical_p": 1.5}, "typical_p"),
        ({"xtc_probability": -0.1}, "xtc_probability"),
        ({"xtc_threshold": float("nan")}, "xtc_threshold"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"stop": ("",)}, "stop"),
        ({"seed": -1}, "seed"),
        ({"logit_bias": {3: 101.0}}, "logit_bias"),
        ({"logprobs": -2}, "logprobs"),
        ({"allowed_token_ids": (-1,)}, "allowed_token_ids"),
        ({"allowed_token_ids": 5}, "allowed_token_ids"),
        ({"bad_words": ("",)}, "bad_words"),
        ({"bad_words": (5,)}, "bad_words"),
    ],
)
def test_impossible_parameters_are_named(params: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        SamplingParams(**params)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "params",
    [{name: value} for name in ("temperature", "top_p", "min_p") for value in (10**400, -(10**400), 10**5000)]
    + [{"seed": 10**5000}, {"top_k": -(10**5000)}],
    ids=lambda p: f"{next(iter(p))} of many digits",
)
def test_numbers_beyond_any_float_are_named_too(params: dict[str, int]) -> None:
    with pytest.raises(RequestError, match=next(iter(params))):
        SamplingParams(**params)  # type: ignore[arg-type]


# Extremes ------------------------------------------------------------------------------------------------------------

TINY_TEMPERATURES = [9e-6, 1e-30, 1e-38, 1e-45, 1e-46, 1e-300, 5e-324]


@pytest.mark.parametrize("temperature", TINY_TEMPERATURES)
def test_a_temperature_near_nothing_is_greedy(temperature: float) -> None:
    s = sampler(temperature=temperature, seed=1)
    assert [s.sample(LOGITS).token_id for _ in range(20)] == [1] * 20


@pytest.mark.parametrize("top_p", [1e-10, 1e-46, 1e-300, 5e-324])
def test_a_top_p_near_nothing_is_greedy(top_p: float) -> None:
    s = sampler(temperature=1.0, top_p=top_p, seed=1)
    assert [s.sample(LOGITS).token_id for _ in range(20)] == [1] * 20


def extremes(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers of a range, its ends, and those that float32 rounds to nothing."""
    odd = [x for x in (low, high, 0.0, 5e-324, 1e-300, 1e-46, 1e-45, 1e-38, 1e-5, 1 - 1e-16, 1.0) if low <= x <= high]
    return st.sampled_from(odd) | st.floats(low, high)


LARGEST = float(np.finfo(np.float32).max)
logit = st.sampled_from([0.0, LARGEST, -LARGEST, 1e37, -1e37, 1e-45, -1e-45, 1.0]) | st.floats(
    -LARGEST, LARGEST, width=32
)
N = 9
parameters = st.fixed_dictionaries(
    {
        "temperature": extremes(0.0, 100.0),
        "top_k": st.integers(0, 12) | st.just(2**31 - 1),
        "top_p": extremes(5e-324, 1.0),
        "min_p": extremes(0.0, 1.0),
        "repetition_penalty": extremes(0.01, 100.0),
        "presence_penalty": extremes(-100.0, 100.0),
        "frequency_penalty": extremes(-100.0, 100.0),
        "logit_bias": st.dictionaries(st.integers(0, N - 3), extremes(-100.0, 100.0), max_size=N),
        "logprobs": st.sampled_from([0, 3, 20]),
        "seed": st.sampled_from([0, 1, 2**63 - 1]),
    }
)


@settings(max_examples=200, deadline=None)
@given(
    params=parameters,
    logits=st.lists(logit, min_size=N, max_size=N),
    prompt=st.lists(st.integers(0, N - 1), max_size=4),
    allowed=st.none() | st.sets(st.integers(0, N - 3), min_size=1),
)
@example(params={"temperature": 1e-38}, logits=[1.0] * N, prompt=[], allowed=None)
@example(params={"temperature": 1.0, "top_p": 1e-46}, logits=[1.0] * N, prompt=[], allowed=None)
@example(params={"temperature": 1e-5}, logits=[LARGEST, *[-LARGEST] * (N - 1)], prompt=[], allowed={3, 4})
@example(params={"repetition_penalty": 0.01, "temperature": 1.0}, logits=[1e37] * N, prompt=[0, 1], allowed=None)
@example(params={"repetition_penalty": 100.0}, logits=[-1e37] * N, prompt=[*range(N)], allowed={2})
@example(params={"frequency_penalty": 100.0, "logprobs": 20}, logits=[-LARGEST] * N, prompt=[], allowed={5})
def test_whatever_the_parameters_a_token_that_may_be_chosen_comes_with_a_finite_probability(
    params: dict[str, object], logits: list[float], prompt: list[int], allowed: set[int] | None
) -> None:
    unused = Unused([N - 2, N - 1])
    s = Sampler(SamplingParams(**params), prompt, N, unused)  # type: ignore[arg-type]
    row = np.array(logits, dtype=np.float32)
    mask = None if allowed is None else np.array([i in allowed for i in range(N)])
    for best in (None, int(row.argmax())):
        for _ in range(3):
            chosen = s.sample(row, best, None, mask)
            assert chosen.token_id in (set(range(N - 2)) if allowed is None else allowed)
            assert math.isfinite(chosen.logprob)
            assert all(token < N - 2 and math.isfinite(p) for token, p in chosen.top_logprobs)
            n = min(int(str(params.get("logprobs", 0))), N - 2)
            listed = {token for token, _ in chosen.top_logprobs[:n]}
            assert len(chosen.top_logprobs) == n + (n > 0 and chosen.token_id not in listed)


def test_token_ids_outside_the_vocabulary_are_named() -> None:
    with pytest.raises(RequestError, match=r"below the vocabulary's 5, got \[5\]"):
        sampler(logit_bias={5: 1.0})


def test_what_the_caller_changes_later_changes_nothing() -> None:
    bias, stop, ids = {1: 5.0}, ["a"], [3]
    params = SamplingParams(logit_bias=bias, stop=stop, stop_ids=ids)  # type: ignore[arg-type]
    bias[2], stop[0], ids[0] = 9.0, "b", 4
    assert dict(params.logit_bias) == {1: 5.0} and params.stop == ("a",) and params.stop_ids == (3,)
    with pytest.raises(TypeError):
        params.logit_bias[1] = 0.0  # type: ignore[index]
    none = SamplingParams(logit_bias=None, stop=None, stop_ids=None)  # type: ignore[arg-type]
    assert (dict(none.logit_bias), none.stop, none.stop_ids) == ({}, (), ())
    assert replace(params, seed=1).stop == ("a",)


@pytest.mark.parametrize(
    "wrong", [{"ignore_eos": "no"}, {"prompt_logprobs": 1}, {"stop": 5}, {"stop_ids": 5}, {"logit_bias": [1]}]
)
def test_fields_of_another_type_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        SamplingParams(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_tokens_are_not_chosen_too_early(temperature: float) -> None:
    params = SamplingParams(min_new_tokens=3, temperature=temperature, seed=2)
    logits = np.array([0.0, 30.0, 1.0, 29.0, 2.0], dtype=np.float32)
    one = Sampler(params, [], 5, Unused([0]), ends=(1, 3, 77))
    chosen = [one.sample(logits, 1, 30.5).token_id for _ in range(4)]
    assert set(chosen[:3]) <= {2, 4} and chosen[3] in (1, 3)
    ends_only = np.array([False, True, False, False, False])
    assert Sampler(params, [], 5, ends=(1,)).sample(logits, allowed=ends_only).token_id == 1, (
        "a complete answer may end"
    )
    with pytest.raises(RequestError, match="min_new_tokens"):
        SamplingParams(min_new_tokens=5, max_new_tokens=4)


def test_the_chosen_token_is_among_the_alternatives() -> None:
    logits = np.array([5.0, 4.0, 3.0, 0.0], dtype=np.float32)
    one = Sampler(SamplingParams(logprobs=2, logit_bias={3: 50.0}), [], 4).sample(logits)
    assert [token for token, _ in one.top_logprobs] == [0, 1, 3] and one.top_logprobs[2][1] == one.logprob
