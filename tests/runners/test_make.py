"""How large a cache is where nobody says it, and where somebody does."""

from __future__ import annotations

import pytest

from quadriga import runtime
from quadriga.errors import ConfigError
from quadriga.model import cost
from quadriga.model.families import preset
from quadriga.runners.make import cache_size, n_blocks


def test_a_cache_holds_contexts_as_long_as_the_windows_let_them_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "memory_bytes", lambda: (10**15, 10**15))
    assert n_blocks(preset("dbrx-132b"), 1000, None, 4) == 4 * 2048
    # A window of 4096 may lie in 257 blocks; a prompt's pass of 2048 tokens holds 128 more until it is over.
    assert n_blocks(preset("mistral-7b-v0.1"), 1000, None, 4) == 4 * 257 + 128
    assert n_blocks(preset("gpt-oss-20b"), 1000, None, 2) == 2 * (8192 + 9) + 128


def test_a_cache_is_at_most_a_quarter_of_the_free_memory_and_one_block_a_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "memory_bytes", lambda: (10**9, 10**6))
    assert n_blocks(preset("gpt-oss-20b"), 1000, None, 4) == 250
    assert n_blocks(preset("gpt-oss-20b"), 10**9, None, 4) == 2
    assert n_blocks(preset("gpt-oss-20b"), 1000, 10_500, 4) == 10
    with pytest.raises(ConfigError, match="at least one block of 16 tokens, 2 x 1000 bytes; got 1999"):
        n_blocks(preset("gpt-oss-20b"), 1000, 1999, 4)
    with pytest.raises(ConfigError, match="at least one block of 16 tokens, 1000 bytes; got 999"):
        n_blocks(preset("dbrx-132b"), 1000, 999, 4)


def test_a_device_s_cache_takes_what_the_weights_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three quarters of it, whatever the host has; half of that for states where a model has them."""
    monkeypatch.setattr(runtime, "memory_bytes", lambda: (10**15, 10**15))
    assert cache_size(preset("dbrx-132b"), 1000, None, 2, 10**6).n_blocks == 750
    assert cache_size(preset("dbrx-132b"), 1000, None, 2, 10**12).n_blocks == 2 * 2048
    assert cache_size(preset("dbrx-132b"), 1000, 10_500, 2, 10**6).n_blocks == 10
    recurrent = preset("qwen3-next-80b-a3b")
    slot = cost.state_bytes(recurrent)
    size = cache_size(recurrent, slot, None, 2, 80 * slot)
    assert (size.n_slots, size.n_blocks) == (30, 30)
