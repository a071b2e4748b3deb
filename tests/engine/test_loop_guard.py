"""Answers in circles are noticed, lists and tables are not."""

from __future__ import annotations

import random

import pytest

from quadriga.engine.loop_guard import COPIES, MAX_PERIOD, TOKENS, LoopGuard


def ends_at(tokens: list[int]) -> int | None:
    """After how many tokens the answer counts as going in circles."""
    guard = LoopGuard()
    return next((i + 1 for i, token in enumerate(tokens) if guard.push(token)), None)


@pytest.mark.parametrize("period", [1, 2, 7, 31, MAX_PERIOD])
def test_a_loop_ends_after_so_many_copies_and_tokens(period: int) -> None:
    rng = random.Random(period)
    begin, loop = [rng.randrange(100, 1000) for _ in range(40)], list(range(period))
    assert ends_at(begin + loop * 500) == 40 + max(COPIES * period, TOKENS)


def test_what_is_no_loop_goes_on() -> None:
    rng = random.Random(0)
    assert ends_at([rng.randrange(50) for _ in range(20_000)]) is None
    assert ends_at([0] * (TOKENS - 1) + [1] + [0] * (TOKENS - 1)) is None
    longer = list(range(MAX_PERIOD + 1))
    assert ends_at(longer * 50) is None, "longer than what is looked for"
    assert ends_at([token for n in range(3000) for token in (1, 2, 3, 1000 + n)]) is None, "a table counts on"
