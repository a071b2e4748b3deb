"""States of recurrent layers on disk: a conversation goes on after a restart as if it had never been stopped."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from quadriga.engine.engine import Engine
from quadriga.engine.request import Request, SamplingParams
from tests.engine.test_engine import drain
from tests.engine.test_states import NAMES, compiled

PROMPT = tuple((7 * i) % 90 for i in range(100))
"""Six whole blocks, and four tokens."""


class Counted:
    """An engine, and how many tokens it has computed."""

    def __init__(self, name: str, folder: Path | None) -> None:
        runner: Any = compiled(name)
        self.n_tokens, forward = 0, runner.forward

        def counted(batch: Any, **wanted: Any) -> Any:
            self.n_tokens += len(batch.tokens)
            return forward(batch, **wanted)

        runner.forward = counted
        self.engine = Engine(runner)
        if folder is not None:
            self.engine.keep_prefixes(folder, 1 << 30)

    def ask(self, prompt: tuple[int, ...], n: int = 20) -> tuple[tuple[int, ...], int, int]:
        """(tokens, tokens of the prompt that were known, tokens computed)."""
        before = self.n_tokens
        params = SamplingParams(max_new_tokens=n, ignore_eos=True)
        number = self.engine.submit(Request(prompt=prompt, params=params))
        events: Any = drain(self.engine)[number]
        self.engine.scheduler.check()
        tokens = tuple(event.token_id for event in events)
        return tokens, events[0].prompt.n_cached_tokens, self.n_tokens - before


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_goes_on_after_a_restart(name: str, tmp_path: Path) -> None:
    answer, _, n_alone = Counted(name, None).ask(PROMPT)
    assert n_alone == 100 + 19
    first = Counted(name, tmp_path)
    assert first.ask(PROMPT)[0] == answer
    first.engine.close()
    again = Counted(name, tmp_path)
    assert again.ask(PROMPT) == (answer, 96, 4 + 19), "its last whole block's state was kept"
    longer = (*PROMPT, *answer, 5, 6, 7)  # the next turn
    again.engine.close()
    third = Counted(name, tmp_path)
    assert third.ask(longer) == (Counted(name, None).ask(longer)[0], 112, 11 + 19), "and the answer's"
    third.engine.close()
    disk = third.engine.disk
    assert disk is not None and disk.n_refused == 0


def test_a_broken_state_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = NAMES[0]
    first = Counted(name, tmp_path)
    answer = first.ask(PROMPT)[0]
    first.engine.close()
    runner: Any = first.engine.runner
    size = len(runner.read_state(0)) + 32
    states = [path for path in tmp_path.iterdir() if path.stat().st_size == size]
    assert len(states) == 2 and size != len(runner.read_block(0)) + 32, "the prompt's and the answer's"
    for path in states:
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    second = Counted(name, tmp_path)
    with caplog.at_level(logging.WARNING):
        assert second.ask(PROMPT) == (answer, 0, 100 + 19)
    assert "ignored" in caplog.text
    second.engine.close()
