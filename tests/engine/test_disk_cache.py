"""Prefixes on disk: found after a restart bit for bit, never where anything differs, within their size."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quadriga import LLM, SamplingParams
from quadriga.engine.disk_cache import DiskCache
from quadriga.errors import ConfigError
from tests.server.conftest import tiny_llm

PROMPT = [(7 * i) % 250 for i in range(100)]
"""Six full blocks, and four tokens."""
PARAMS = SamplingParams(max_new_tokens=20, logprobs=3)


class Counted:
    """A model, and how many tokens it has computed."""

    def __init__(self, folder: Path | None, max_bytes: int = 1 << 30, **options: Any) -> None:
        self.llm: LLM = tiny_llm(**options)
        self.n_tokens = 0
        runner, forward = self.llm.engine.runner, self.llm.engine.runner.forward

        def counted(batch: Any, **wanted: Any) -> Any:
            self.n_tokens += len(batch.tokens)
            return forward(batch, **wanted)

        runner.forward = counted  # type: ignore[method-assign]
        if folder is not None:
            self.llm.engine.keep_prefixes(folder, max_bytes)

    def ask(self, prompt: list[int] = PROMPT) -> tuple[list[int], list[float], int, int]:
        """(tokens, log-probabilities, tokens found in the cache, tokens computed)."""
        before = self.n_tokens
        answer = self.llm.generate(prompt, PARAMS)
        return answer.token_ids, answer.logprobs, answer.n_cached_tokens, self.n_tokens - before

    def end(self) -> DiskCache:
        disk = self.llm.engine.disk
        assert disk is not None
        disk.close()
        self.llm.engine.scheduler.check()
        return disk


def test_a_restart_computes_only_what_is_new(tmp_path: Path) -> None:
    alone = Counted(None).ask()
    first = Counted(tmp_path)
    assert first.ask() == alone and alone[2:] == (0, 100 + 19)
    first.end()
    again = Counted(tmp_path)
    tokens, logprobs, n_cached, n_computed = again.ask()
    assert (tokens, logprobs) == alone[:2], "bit for bit"
    assert (n_cached, n_computed) == (96, 4 + 19)
    longer = [*PROMPT, *tokens, 5, 6, 7]  # the next turn of the conversation
    assert again.ask(longer)[:2] == Counted(None).ask(longer)[:2]
    assert again.end().n_refused == 0


def test_what_memory_lets_go_comes_back_from_the_disk(tmp_path: Path) -> None:
    small = Counted(tmp_path, n_blocks=9)
    first = small.ask()
    for start in (100, 150, 200):
        small.ask([start + i % 50 for i in range(100)])
    again = small.ask()
    assert again[:2] == first[:2] and again[2] == 96
    assert small.end().n_loaded >= 6


@pytest.mark.parametrize("fault", ["flipped", "short", "empty", "swapped", "gone"])
def test_a_broken_file_is_ignored_with_a_line_in_the_log(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = Counted(tmp_path)
    alone = first.ask()
    first.end()
    second = Counted(tmp_path)
    disk = second.llm.engine.disk
    assert disk is not None
    files = sorted(tmp_path.iterdir())
    raws = [path.read_bytes() for path in files]
    for i, path in enumerate(files):
        raw = bytearray(raws[i])
        raw[len(raw) // 2] ^= 1
        changed = {"flipped": bytes(raw), "short": raws[i][:-1], "empty": b"", "swapped": raws[i - 1]}
        if fault == "gone":
            path.unlink()
        else:
            path.write_bytes(changed[fault])
    with caplog.at_level(logging.WARNING):
        assert second.ask() == alone, "as if nothing had been there"
    assert disk.n_loaded == 0 and disk.n_refused >= 1 and "ignored" in caplog.text
    second.end()
    third = Counted(tmp_path)
    assert third.ask()[:3] == (*alone[:2], 96), "they were written again"
    third.end()


def test_other_weights_other_tenants_and_other_caches_find_nothing(tmp_path: Path) -> None:
    one = Counted(tmp_path)
    one.ask()
    one.end()
    runner: Any = one.llm.engine.runner
    same, other = tiny_llm().engine.runner.identity(), tiny_llm(n_rows=258).engine.runner.identity()  # type: ignore[attr-defined]
    assert same == runner.identity() and other != same
    part = next(p for p in runner.parameters.values() if not isinstance(p, (list, np.ndarray)))
    raw = part.data.reshape(-1).view(np.uint8)
    raw[0] ^= 1
    assert runner.identity() != same, "a weight that was changed in memory is another model"
    raw[0] ^= 1
    disk = DiskCache(tmp_path, 1 << 30, b"another model", runner)
    keys = sorted(path.name for path in tmp_path.iterdir())
    assert keys and not any(disk.has(bytes.fromhex(name)[:16]) for name in keys)
    disk.close()


def test_the_size_holds_and_what_was_used_last_stays(tmp_path: Path) -> None:
    one = Counted(tmp_path)
    one.ask()
    one.end()
    size = next(tmp_path.iterdir()).stat().st_size
    n_before = len(list(tmp_path.iterdir()))
    assert n_before == 7, "six blocks of the prompt, one of the answer"
    two = Counted(tmp_path, max_bytes=8 * size)
    two.ask()  # the prompt's files are used
    two.ask([3] * 64)
    two.end()
    left = list(tmp_path.iterdir())
    assert len(left) <= 8 and sum(path.stat().st_size for path in left) <= 8 * size
    three = Counted(tmp_path, max_bytes=2 * size)
    three.end()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_model_that_has_no_blocks_to_keep_says_so(tmp_path: Path) -> None:
    llm = tiny_llm()
    llm.engine.runner = object()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="kernels"):
        llm.engine.keep_prefixes(tmp_path, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        tiny_llm().engine.keep_prefixes(tmp_path / "file", 1)
