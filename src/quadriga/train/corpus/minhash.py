"""Near duplicates by MinHash signatures, bands and clusters. In NumPy, without Python loops over words or documents.

    signature_j(A) = min over shingles x of A of  (a_j x + b_j mod 2^64) >> 32           P(equal) = Jaccard(A, B)
    band b             = a hash of ``rows`` neighbouring values; documents with an equal band become a candidate pair
    clusters           = connected components of the candidate pairs whose signatures agree enough

Broder 1997; banding and its S-curve: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4. The hash family is
multiply-shift (Dietzfelbinger et al. 1997).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from quadriga.train.corpus.words import U64, Words, mix

_BLOCK = 512
"""Shingles hashed at once: 512 x 112 x 8 B fit into the L2 cache."""

Signatures = npt.NDArray[np.uint32]


def signature(words: Words, ngram: int, size: int, seed: int) -> Signatures:
    """MinHash (size,) of a text's distinct word n-grams; a text of fewer than n words counts as one n-gram."""
    shingles = words.ngrams(ngram)
    if len(shingles) == 0:
        shingles = words.ngrams(len(words)) if len(words) else np.zeros(1, dtype=np.uint64)
    return signature_of(np.unique(shingles), size, seed)


def signature_of(shingles: U64, size: int, seed: int) -> Signatures:
    """MinHash (size,) of a non-empty set of 64-bit numbers."""
    a, b = _family(size, seed)
    low = np.full(size, 0xFFFFFFFF, dtype=np.uint64)
    for start in range(0, len(shingles), _BLOCK):
        hashed = shingles[start : start + _BLOCK, None] * a
        hashed += b
        hashed >>= np.uint64(32)
        np.minimum(low, hashed.min(axis=0), out=low)
    return low.astype(np.uint32)


@lru_cache(maxsize=4)
def _family(size: int, seed: int) -> tuple[U64, U64]:
    numbers = mix(mix(np.arange(2 * size, dtype=np.uint64) + np.uint64(1)) + np.uint64(seed))
    return numbers[:size] | np.uint64(1), numbers[size:]


def band_keys(signatures: Signatures, bands: int, rows: int) -> U64:
    """Band keys (bands, documents) of signatures (documents, bands * rows)."""
    parts = signatures.astype(np.uint64).reshape(len(signatures), bands, rows)
    keys = np.zeros((len(signatures), bands), dtype=np.uint64)
    for r in range(rows):
        keys = mix(keys + parts[:, :, r] + np.uint64(r + 1))
    return np.ascontiguousarray(keys.T)


def pairs_with_equal_keys(keys: U64, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Candidate pairs (pairs, 2): for each key that several documents have, the first of them with each other one."""
    order = np.argsort(keys, kind="stable")
    keys, documents = keys[order], documents[order]
    if len(keys) == 0:
        return np.empty((0, 2), dtype=np.int64)
    opens = np.concatenate(([True], keys[1:] != keys[:-1]))
    first = documents[np.flatnonzero(opens)[np.cumsum(opens) - 1]]
    return np.stack((first[~opens], documents[~opens]), axis=1)


def clusters(pairs: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.int64]:
    """For each of n documents, the smallest document it is connected with (itself if none): (n,).

    Each round gives both ends of every pair the smaller label and then replaces labels by their labels' labels;
    distances halve each round, so a few rounds suffice.
    """
    label = np.arange(n)
    a, b = pairs[:, 0], pairs[:, 1]
    while len(a):
        low = np.minimum(label[a], label[b])
        np.minimum.at(label, label[a], low)
        np.minimum.at(label, label[b], low)
        while True:
            further = label[label]
            if np.array_equal(further, label):
                break
            label = further
        open_pairs = label[a] != label[b]
        a, b = a[open_pairs], b[open_pairs]
    return label
