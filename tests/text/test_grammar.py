"""Grammars: what they may cost, where it is paid, and what is kept of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from quadriga.errors import BusyError, GrammarError
from quadriga.text import grammar as grammars_module
from quadriga.text import grammar_trial
from quadriga.text.grammar import STEP_CPU_S, Grammars
from quadriga.text.grammar_trial import Trial
from quadriga.text.tokenizer import Tokenizer
from tests.waiting import HANG_S, until


class Bytes:
    """One token a byte, and one end token."""

    n_vocab = 257

    def encode(self, text: str, allow_special: bool) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


class Cpu:
    """A processor clock: every step takes what the test says."""

    def __init__(self) -> None:
        self.now, self.step = 0.0, 0.0
        self.reads = 0

    def __call__(self) -> float:
        self.reads += 1
        if self.reads % 2 == 0:  # read before and after a step
            self.now += self.step
        return self.now


def made(clock: Cpu | None = None) -> Grammars:
    tokenizer = Tokenizer(Bytes(), special_ids={"<|end|>": 256}, eos_ids=(256,))
    return Grammars(tokenizer, 257, frozenset({256}), clock=clock or Cpu())


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    """Shared by tests that change nothing."""
    one = made()
    yield one
    one.trial.close()


def chain(n: int) -> str:
    """Rules that each begin with the next, round and round."""
    return "start: a0\n" + "\n".join(f'a{i}: a{(i + 1) % n} | "x"' for i in range(n))


def nullable(n: int) -> str:
    """Parts that each may be missing, so that anything may be any of them."""
    return "start: " + " ".join(f"a{i}" for i in range(n)) + "\n" + "\n".join(f'a{i}: "x"? | "a"' for i in range(n))


def options(n: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(n)}}


HOSTILE = {
    "a chain of rules that fills the stack": ("lark", chain(20_000)),
    "thousands of parts that may be missing": ("lark", nullable(3000)),
    "patterns that are compared pair by pair": (
        "json",
        {"type": "object", "patternProperties": {f"^a{i}[a-z]*$": {"type": "integer"} for i in range(1000)}},
    ),
    "an intersection of many": (
        "lark",
        "start: X\nX: /(?s:.*)/ & " + " & ".join(f"/(?s:.*)w{i}(?s:.*)/" for i in range(40)),
    ),
    "one letter more than may be": ("regex", "a" * ((1 << 20) + 1)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_grammar_is_refused_with_the_reason_and_the_next_one_is_compiled(what: str) -> None:
    one = made()
    kind, source = HOSTILE[what]
    try:
        with pytest.raises(GrammarError) as refused:
            one.compile(kind, source)  # type: ignore[arg-type]
        assert str(refused.value).startswith(("the grammar", "a grammar")) and "\n" not in str(refused.value)
        assert one.compile("regex", "[ab]+").allowed().nonzero()[0].tolist() == [97, 98]
    finally:
        one.trial.close()


def test_what_was_refused_is_not_tried_again() -> None:
    one = made()
    try:
        for _ in range(3):
            with pytest.raises(GrammarError, match="nested too deeply"):
                one.compile("lark", chain(20_000))
        assert one.trial.n_started == 1
        one.compile("regex", "a")
        assert one.trial.n_started == 2
        one.compile("regex", "a")
        assert one.trial.n_started == 2
    finally:
        one.trial.close()


def test_processor_time_and_memory_are_bounded_by_the_kernel(grammars: Grammars) -> None:
    kind, source = HOSTILE["an intersection of many"]
    setup = {key: grammars.trial._setup[key] for key in ("tokens", "special", "end", "bos")}
    quick = Trial(setup, grammars_module.LIMITS, cpu_s=0.05)
    small = Trial(setup, grammars_module.LIMITS, memory_bytes=64 << 20)
    try:
        with pytest.raises(GrammarError, match=r"more than 0\.05 s of processor time"):
            quick.check(kind, str(source))
        quick.check("regex", "ab")
        with pytest.raises(GrammarError, match=r"MB of memory|processor time|too deeply|memory"):
            small.check("lark", "start: " + " | ".join(f'"w{i}"' for i in range(120_000)))
        small.check("regex", "ab")
    finally:
        quick.close()
        small.close()


def test_a_child_that_somebody_ended_is_replaced(grammars: Grammars) -> None:
    setup = {key: grammars.trial._setup[key] for key in ("tokens", "special", "end", "bos")}
    trial = Trial(setup, grammars_module.LIMITS)
    try:
        trial.check("regex", "a")
        child = trial._child
        assert child is not None
        os.kill(child.pid, signal.SIGKILL)
        assert until(lambda: child.poll() is not None)
        trial.check("regex", "a")
        assert trial.n_started == 2
    finally:
        trial.close()


def test_a_child_that_does_not_answer_is_no_fault_of_the_grammar(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = {key: grammars.trial._setup[key] for key in ("tokens", "special", "end", "bos")}
    trial = Trial(setup, grammars_module.LIMITS)
    trial.check("regex", "a")
    child = trial._child
    assert child is not None
    os.kill(child.pid, signal.SIGSTOP)
    monkeypatch.setattr(grammar_trial, "_GUARD_S", 0.0)
    with pytest.raises(BusyError, match="does not answer"):
        trial.check("regex", "a")
    monkeypatch.undo()
    trial.check("regex", "a")
    trial.close()


def test_an_answer_follows_its_grammar_to_its_end(grammars: Grammars) -> None:
    one = grammars.compile("regex", "ab?c")
    said = b""
    while True:
        allowed = one.allowed().nonzero()[0].tolist()
        said += bytes(allowed[-1:])
        if one.accept(allowed[-1]):
            break
    assert said == b"ac"
    again = one.copy()
    assert again.ready and again.allowed().nonzero()[0].tolist() == [97], "a copy is at the beginning"


def test_the_next_mask_is_computed_by_another_thread(grammars: Grammars) -> None:
    one = grammars.compile("json", {"type": "object"})
    assert one.ready, "the first is kept with the grammar"
    one.accept(ord("{"))
    assert until(lambda: one.ready)
    assert ord("}") in one.allowed().nonzero()[0].tolist()


def test_a_step_over_its_processor_time_is_an_error_and_the_grammar_is_slow_for_all() -> None:
    clock = Cpu()
    one = made(clock)
    try:
        first, second = one.compile("regex", "[ab]+c"), one.compile("regex", "[ab]+c")
        clock.step = 0.02
        first.accept(97)
        first.allowed()
        assert first.slow and second.slow, "others of it are not computed where somebody waits"
        second.accept(97)
        assert not second.ready
        clock.step = STEP_CPU_S * 1.01
        with pytest.raises(GrammarError, match=r"may take 0\.1 s"):
            second.allowed()
        clock.step = 0.0
        first.accept(98)
        assert first.allowed().any(), "the other answer goes on"
        assert not one.compile("regex", "[xy]+").slow
    finally:
        one.trial.close()


def test_a_grammar_at_its_limits_while_it_is_followed_is_an_error(grammars: Grammars) -> None:
    one = grammars.compile("json", options(700))
    one.allowed()
    one.accept(ord("{"))
    with pytest.raises(GrammarError, match="max is 2000"):
        one.allowed()


def test_a_place_where_nothing_may_follow_is_an_error() -> None:
    class Digits(Bytes):
        def token_bytes(self, token_id: int) -> bytes:
            return b"%d" % (token_id % 10) if token_id < 256 else b""

    tokenizer = Tokenizer(Digits(), special_ids={"<|end|>": 256}, eos_ids=(256,))
    one = Grammars(tokenizer, 257, frozenset({256}))
    try:
        with pytest.raises(GrammarError):
            one.compile("regex", "[a-z]+").allowed()
    finally:
        one.trial.close()


def test_what_is_kept_is_bounded_and_shared_by_equal_salts_only(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars_module, "KEPT", 4)
    for i in range(6):
        grammars.compile("regex", f"kept{i}", b"one")
    assert len(grammars._kept) == 4
    assert grammars.known("regex", "kept5", b"one") is not None
    assert grammars.known("regex", "kept5", b"two") is None and grammars.known("regex", "kept0", b"one") is None
    monkeypatch.setattr(grammars_module, "KEPT_BYTES", 12)
    grammars.compile("regex", "kept6", b"one")
    assert sum(len(text) for _, _, text in grammars._kept) <= 12
    assert HANG_S
