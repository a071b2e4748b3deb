"""MinHash compared with exact sets, clusters with a plain union-find."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadriga.train.corpus.minhash import band_keys, clusters, pairs_with_equal_keys, signature, signature_of
from quadriga.train.corpus.words import mix, words
from tests.train.corpora import prose


@pytest.mark.parametrize("jaccard", [0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
def test_equal_signature_values_estimate_the_jaccard_index(jaccard: float) -> None:
    size, n = 2048, 900
    shared = round(jaccard * n)
    numbers = mix(np.arange(2 * n, dtype=np.uint64))
    a, b = numbers[:n], np.concatenate((numbers[:shared], numbers[n : 2 * n - shared]))
    exact = len(np.intersect1d(a, b)) / len(np.union1d(a, b))
    estimate = (signature_of(a, size, 1) == signature_of(b, size, 1)).mean()
    # Five standard deviations of a binomial, plus collisions of 32-bit values.
    assert abs(estimate - exact) <= 5 * np.sqrt(exact * (1 - exact) / size) + 1e-6


def test_a_signature_ignores_order_case_and_punctuation_but_not_words() -> None:
    text = prose(3, 200)
    one = signature(words(text), 5, 112, 1)
    assert np.array_equal(one, signature(words(text.upper().replace(".", " !")), 5, 112, 1))
    other = signature(words(prose(4, 200)), 5, 112, 1)
    assert (one == other).mean() < 0.05
    edited = text.replace(text.split()[100], "replaced", 1)
    assert (one == signature(words(edited), 5, 112, 1)).mean() > 0.8
    assert not np.array_equal(one, signature(words(text), 5, 112, 2))
    assert len(signature(words("two words"), 5, 112, 1)) == len(signature(words(""), 5, 112, 1)) == 112


def test_bands_match_with_the_predicted_probability() -> None:
    bands, rows, n = 14, 8, 400
    draw = np.random.default_rng(0)
    for similarity in (0.5, 0.7, 0.85):
        a = draw.integers(0, 2**32, (n, bands * rows), dtype=np.uint32)
        b = np.where(draw.random(a.shape) < similarity, a, a + np.uint32(1))
        met = (band_keys(a, bands, rows) == band_keys(b, bands, rows)).any(axis=0).mean()
        expected = 1 - (1 - similarity**rows) ** bands
        assert abs(met - expected) < 5 * np.sqrt(expected * (1 - expected) / n)


@given(st.lists(st.integers(0, 5), max_size=20))
@settings(max_examples=60, deadline=None)
def test_pairs_join_all_that_share_a_key(keys: list[int]) -> None:
    documents = np.arange(len(keys)) + 100
    pairs = pairs_with_equal_keys(np.array(keys, dtype=np.uint64), documents)
    expected = {(keys.index(key) + 100, i + 100) for i, key in enumerate(keys) if keys.index(key) != i}
    assert set(map(tuple, pairs.tolist())) == expected and len(pairs) == len(expected)


@given(n=st.integers(1, 30), data=st.data())
@settings(max_examples=80, deadline=None)
def test_clusters_are_those_of_a_union_find(n: int, data: st.DataObject) -> None:
    pairs = data.draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=40))
    parent = list(range(n))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    found = clusters(np.array(pairs, dtype=np.int64).reshape(-1, 2), n)
    assert found.tolist() == [root(i) for i in range(n)]


def test_a_long_chain_is_one_cluster() -> None:
    n = 5000
    pairs = np.stack((np.arange(n - 1), np.arange(1, n)), axis=1)
    assert clusters(pairs[np.random.default_rng(1).permutation(n - 1)], n).max() == 0
