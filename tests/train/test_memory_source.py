"""Documents in memory: each occurs once per epoch, complete, in a new order, and no target crosses its end."""

from __future__ import annotations

from itertools import pairwise

import torch

from quadriga.train.batch import IGNORE
from quadriga.train.memory_source import MemorySource

LENGTHS = [5, 1, 13, 8, 3, 22, 2, 9]
"""63 tokens, not a multiple of a row, so that epochs start and documents are cut anywhere."""
DOCUMENTS = [("ab"[i % 2], list(range(100 * i, 100 * i + n))) for i, n in enumerate(LENGTHS)]


def stream(source: MemorySource, n_steps: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """Tokens, targets, positions and each token's domain, of all rows in order."""
    tokens, targets, positions, domains = [], [], [], []
    for step in range(n_steps):
        batch = source.rows(step, 0, 3)
        assert batch.bounds[-1] == len(batch.tokens) == 3 * 8
        assert {0, 8, 16, 24} <= set(batch.bounds.tolist()), "no document crosses a row"
        tokens += batch.tokens.tolist()
        targets += batch.targets.tolist()
        positions += batch.positions.tolist()
        for (first, last), domain in zip(pairwise(batch.bounds.tolist()), batch.domains.tolist(), strict=True):
            domains += [domain] * (last - first)
            assert batch.positions[first:last].tolist() == list(range(last - first))
    return tokens, targets, positions, domains


def test_every_document_comes_once_an_epoch_in_another_order() -> None:
    source = MemorySource(DOCUMENTS, n_rows=3, seq_len=8, seed=4)
    tokens, targets, _, domains = stream(source, 11)
    orders = []
    for epoch in range(4):
        part = tokens[63 * epoch : 63 * (epoch + 1)]
        order = [token // 100 for i, token in enumerate(part) if token % 100 == 0]
        assert sorted(order) == list(range(8))
        assert part == [token for i in order for token in DOCUMENTS[i][1]], "whole, one after the other"
        orders.append(tuple(order))
    assert len(set(orders)) == 4 and all(order != tuple(range(8)) for order in orders)
    for token, target, domain in zip(tokens, targets, domains, strict=True):
        i, place = divmod(token, 100)
        assert target == (IGNORE if place == LENGTHS[i] - 1 else token + 1)
        assert domain == i % 2


def test_rows_are_a_function_of_seed_and_step() -> None:
    one, again, other = (MemorySource(DOCUMENTS, n_rows=3, seq_len=8, seed=seed) for seed in (4, 4, 5))
    for step in (7, 0, 3):
        whole = again.rows(step, 0, 3)
        assert torch.equal(one.rows(step, 0, 3).tokens, whole.tokens)
        parts = [one.rows(step, row, row + 1) for row in range(3)]
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert not torch.equal(one.rows(0, 0, 3).tokens, other.rows(0, 0, 3).tokens)
