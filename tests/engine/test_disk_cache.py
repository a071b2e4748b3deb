"""Prefixes on disk: found after a restart bit for bit, never where anything differs, within their size."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quadriga import LLM, SamplingParams
from quadriga.engine import disk_cache
from quadriga.engine.disk_cache import DiskCache, StateFiles
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


class Memory:
    """Blocks, or slots, as plain bytes."""

    def __init__(self, **content: int) -> None:
        self.content = {i: bytes([i]) * n for i, n in enumerate(content.values())}
        self.n_read = 0

    def read_block(self, block: int) -> bytes:
        self.n_read += 1
        return self.content[block]

    def write_block(self, block: int, content: bytes) -> None:
        self.content[block] = content

    read_state, write_state = read_block, write_block


A, B, C = b"a" * 16, b"b" * 16, b"c" * 16
SIZE = 32 + 100
"""Of a file: a hash and a block."""


def opened(folder: Path, n_files: float, memory: Memory | None = None) -> DiskCache:
    return DiskCache(folder, int(n_files * SIZE), b"a model", memory or Memory(a=100, b=100, c=100))


def keep(folder: Path, *keys: bytes) -> dict[bytes, Path]:
    """Write blocks; where each lies."""
    where = {}
    for number, key in enumerate(keys):
        disk = opened(folder, 9)
        before = set(folder.iterdir())
        disk.store(key, number)
        disk.close()
        (where[key],) = set(folder.iterdir()) - before
    return where


def known(folder: Path, n_files: float) -> list[bytes]:
    """What is left when a cache of so many files is opened."""
    disk = opened(folder, n_files)
    left = [key for key in (A, B, C) if disk.has(key)]
    disk.close()
    return left


def test_of_what_lies_there_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    where = keep(tmp_path, A, B, C)
    for age_s, key in ((300, B), (200, C), (100, A)):
        os.utime(where[key], (1e9 - age_s, 1e9 - age_s))
    assert known(tmp_path, 3) == [A, B, C] and known(tmp_path, 2.9) == [A, C]
    disk = opened(tmp_path, 9)
    assert disk.load(C, 0)
    disk.close()
    assert where[C].stat().st_mtime > 1.5e9, "its use outlasts the process"
    os.utime(where[A], (2e9, 2e9))
    os.utime(where[C], (2.1e9, 2.1e9))
    assert known(tmp_path, 1) == [C]


def test_what_was_cut_off_is_cleared_away_and_others_files_are_not(tmp_path: Path) -> None:
    (tmp_path / f"{'0' * 64}.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_bytes(b"of somebody")
    (tmp_path / ("1" * 64)).mkdir()
    opened(tmp_path, 0).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1" * 64, "notes.txt"]


def test_the_folder_is_for_its_user_alone(tmp_path: Path) -> None:
    opened(tmp_path / "one" / "two", 1).close()
    assert stat.S_IMODE((tmp_path / "one" / "two").stat().st_mode) == 0o700


def test_a_file_that_is_written_anew_counts_once(tmp_path: Path) -> None:
    keep(tmp_path, A, B)
    disk = opened(tmp_path, 2)
    disk.n_refused = 1  # one file was broken: others are not trusted until they were seen
    disk.store(A, 0)
    disk.close()
    assert disk.has(A) and disk.has(B), "three times the bytes would have cost one of them"


def test_copies_that_wait_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache, "MAX_PENDING_BYTES", 250)
    monkeypatch.setattr(DiskCache, "_write", lambda self: None)  # nothing is ever written
    memory = Memory(a=100, b=100, c=100)
    disk = opened(tmp_path, 9, memory)
    for number in range(9):
        disk.store(bytes([number]) * 16, number % 3)
        disk.store(bytes([number]) * 16, number % 3)  # it waits already
    assert memory.n_read == 3, "300 bytes wait, and that is enough"


def test_room_for_copies_comes_back_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache, "MAX_PENDING_BYTES", 0)
    disk = opened(tmp_path, 9)
    disk._queue.put(None)
    disk._writer.join()
    for number, key in enumerate((A, B, C)):
        disk.store(key, number)
        disk._queue.put(None)
        disk._write()  # in this thread, so that nothing need be waited for
    assert [disk.has(key) for key in (A, B, C)] == [True, True, True]


def test_a_state_is_no_block(tmp_path: Path) -> None:
    """The block that ends where a state is has the same key."""
    memory = Memory(block=100, state=77)
    disk = opened(tmp_path, 9, memory)
    states = StateFiles(disk, memory)
    disk.store(A, 0)
    disk.close()
    assert disk.has(A) and not states.has(A) and not states.load(A, 1)
    again = opened(tmp_path, 9, memory)
    states = StateFiles(again, memory)
    states.store(A, 1)
    again.close()
    memory.content = {}
    assert again.load(A, 0) and states.load(A, 1)
    assert memory.content == {0: bytes([0]) * 100, 1: bytes([1]) * 77}
