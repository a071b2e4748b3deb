"""Answers that must follow a grammar: JSON schemas, regular expressions, Lark grammars, compiled by llguidance.

    source ──► tried in a child process ──► compiled, with the tokens it begins with ──► kept, by its text
                                                                │ a copy for every answer
                                                                ▼
    allowed() ─► a token is chosen ─► accept() ─► the next mask is computed beside the next pass ─► allowed() ─► ...

A compiled :class:`Grammar` says before every token which ones may come next. What a grammar may cost is bounded three
times: compiling by processor time, memory and depth (``grammar_trial``), every step by llguidance's own counts
(:data:`LIMITS`), and, as these do not weigh everything, by its processor time (:data:`STEP_CPU_S`). Over a bound there
is a GrammarError for that answer alone. llguidance computes outside the interpreter's lock.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, Literal

import llguidance
import numpy as np
from numpy.typing import NDArray

from quadriga.errors import GrammarError
from quadriga.runtime import Lane
from quadriga.text.grammar_child import compile_matcher
from quadriga.text.grammar_close import Closers, Closing
from quadriga.text.grammar_trial import NICE, Trial, first_line
from quadriga.text.schema_formats import without_unknown
from quadriga.text.tokenizer import Tokenizer

Mask = NDArray[np.bool_]
"""(V,): which tokens may come next."""

Kind = Literal["json", "regex", "lark"]

MAX_GRAMMAR_BYTES = 1 << 20

LIMITS = {
    "max_items_in_row": 2_000,
    "step_max_items": 8_000,
    "step_lexer_fuel": 100_000,
    "initial_lexer_fuel": 1_000_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 50_000,
}
"""llguidance's limits. An object of 480 optional properties takes 2,000 items in a step and 2 ms; 200 optional parts in
a row, each of one letter, over 10,000 and 17 ms. A lexer state takes up to 2 kB."""

STEP_CPU_S = 0.1
"""Processor time of a step, 50 times what the largest honest schema tried here takes."""

SLOW_CPU_S = 0.005
"""A grammar with a step above this is :attr:`Grammar.slow` from then on."""

KEPT = 256
KEPT_BYTES = 16 << 20
"""Grammars that stay compiled, the last used ones, and their texts' bytes in all."""


class Grammars:
    """Compiles grammars for one vocabulary.

    Args:
        tokenizer: the vocabulary.
        vocab_size: rows of the model's head, at least the vocabulary.
        end_ids: tokens that end an answer.
        clock: seconds of processor time of the thread that asks.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        end_ids: frozenset[int],
        *,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._vocab_size, self._end, self._clock = vocab_size, sorted(end_ids), clock
        raw = [tokenizer.token_bytes(i) if i < tokenizer.n_vocab else b"" for i in range(vocab_size)]
        words = _Words(raw, tokenizer, self._end)
        self._tokens = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(words), n_vocab=vocab_size, eos_token=self._end
        )
        self._closers = Closers(words.tokens, vocab_size)
        self.trial = Trial(words.as_json(), LIMITS)
        self._compiler, self._masks = Lane("grammar", nice=NICE), Lane("masks", n_threads=2)
        self._kept: OrderedDict[tuple[bytes, str, str], _Compiled | GrammarError] = OrderedDict()
        self._lock = threading.Lock()

    def close(self) -> None:
        """End the threads and the helper process; nothing is compiled any more."""
        self._compiler.close()
        self._masks.close()
        self.trial.close()

    @staticmethod
    def text_of(source: str | dict[str, Any]) -> str:
        """A source as text.

        Raises:
            GrammarError: it is too large.
        """
        text = source if isinstance(source, str) else without_unknown(json.dumps(source))
        if len(text) > MAX_GRAMMAR_BYTES:
            raise GrammarError(f"a grammar may have {MAX_GRAMMAR_BYTES} bytes, got {len(text)}")
        return text

    def known(self, kind: Kind, text: str, salt: bytes = b"") -> Grammar | None:
        """A fresh matcher of a grammar that is compiled already, or None; takes microseconds.

        Raises:
            GrammarError: it was tried before, and cannot be used.
        """
        with self._lock:
            found = self._kept.get((salt, kind, text))
            if found is not None:
                self._kept.move_to_end((salt, kind, text))
        if isinstance(found, GrammarError):
            raise GrammarError(str(found))
        return None if found is None else self._fresh(found)

    def compile(self, kind: Kind, source: str | dict[str, Any], salt: bytes = b"") -> Grammar:
        """A fresh matcher; waits for it to be compiled.

        Args:
            kind: what ``source`` is: a JSON schema (a dict, or {} for any JSON object), a regular expression, Lark.
            salt: compiled grammars are shared by equal salts only.

        Raises:
            GrammarError: the grammar is too large, malformed, or asks for what is not supported.
        """
        text = self.text_of(source)
        return self.known(kind, text, salt) or self.submit(kind, text, salt).result()

    def submit(self, kind: Kind, text: str, salt: bytes = b"") -> Future[Grammar]:
        """:meth:`compile` in a thread that gives way to others, one grammar after another."""
        return self._compiler.submit(self._compile, kind, text, salt)

    def _compile(self, kind: Kind, text: str, salt: bytes) -> Grammar:
        known = self.known(kind, text, salt)
        if known is not None:
            return known
        try:
            self.trial.check(kind, text)
            compiled = self._compiled(kind, text)
        except GrammarError as error:
            self._keep((salt, kind, text), error)
            raise
        self._keep((salt, kind, text), compiled)
        return self._fresh(compiled)

    def _compiled(self, kind: Kind, text: str) -> _Compiled:
        try:
            matcher = compile_matcher(self._tokens, kind, text, LIMITS)
        except ValueError as error:
            raise GrammarError(f"the grammar cannot be read: {first_line(str(error))}") from None
        if matcher.is_error():
            raise GrammarError(f"the grammar cannot be used: {first_line(matcher.get_error())}")
        compiled = _Compiled(matcher)
        compiled.first = _mask(compiled, matcher, self._vocab_size, self._clock)
        return compiled

    def _fresh(self, compiled: _Compiled) -> Grammar:
        return Grammar(compiled, self._vocab_size, self._masks, self._clock, self._closers)

    def _keep(self, key: tuple[bytes, str, str], value: _Compiled | GrammarError) -> None:
        with self._lock:
            self._kept[key] = value
            while len(self._kept) > KEPT or sum(len(text) for _, _, text in self._kept) > KEPT_BYTES:
                self._kept.popitem(last=False)


class _Compiled:
    """A grammar before its first token."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher
        self.first: Mask | None = None
        self.slow = False


class Grammar:
    """One answer on its way through a grammar; an ``engine.request.Constraint``. One thread at a time uses it."""

    def __init__(
        self,
        compiled: _Compiled,
        vocab_size: int,
        lane: Lane,
        clock: Callable[[], float],
        closers: Closers,
        closes: bool = False,
    ) -> None:
        self._compiled, self._matcher = compiled, compiled.matcher.deep_copy()
        self._vocab_size, self._lane, self._clock, self._closers = vocab_size, lane, clock, closers
        self._closing = Closing(closers) if closes else None
        self._next: Mask | Future[Mask] | None = compiled.first

    @property
    def slow(self) -> bool:
        """A step of this grammar has taken so long that others should not wait for one."""
        return self._compiled.slow

    @property
    def ready(self) -> bool:
        """:meth:`allowed` answers at once."""
        return isinstance(self._next, np.ndarray) or (isinstance(self._next, Future) and self._next.done())

    def copy(self, *, closes: bool = False) -> Grammar:
        """Another answer at the grammar's beginning.

        Args:
            closes: of JSON: it is brought to its end before its budget of tokens is used up; see :meth:`choose`.
        """
        return Grammar(self._compiled, self._vocab_size, self._lane, self._clock, self._closers, closes)

    def choose(self, token_id: int, left: int) -> int:
        """The token to go on with in place of one that was chosen; another one only where the answer must be closed.

        Args:
            left: tokens that may still come, this one included.
        """
        if self._closing is None:
            return token_id
        self._settle()
        return self._closing.choose(self._matcher, token_id, left)

    def allowed(self) -> Mask:
        """(V,) bool: tokens that may come next, at least one.

        Raises:
            GrammarError: the grammar ran out of its limits, or no token of the vocabulary may follow.
        """
        if isinstance(self._next, Future):
            self._next = self._next.result()
        if self._next is None:
            self._next = self._mask()
        return self._next

    def accept(self, token_id: int) -> bool:
        """Go on by a token; True if the answer is complete and nothing may follow."""
        self._settle()
        self._matcher.consume_token(token_id)
        if self._closing is not None:
            self._closing.accept(token_id)
        if self._matcher.is_stopped() and not self._matcher.is_error():
            return True
        # While the model computes; a slow one's mask waits until it is asked for, where nobody else waits.
        self._next = None if self.slow else self._lane.submit(self._mask)
        return False

    def _settle(self) -> None:
        """Wait for a mask that is being made: the matcher is one thread's at a time."""
        if isinstance(self._next, Future):
            wait([self._next])

    def _mask(self) -> Mask:
        return _mask(self._compiled, self._matcher, self._vocab_size, self._clock)


def _mask(compiled: _Compiled, matcher: Any, vocab_size: int, clock: Callable[[], float]) -> Mask:
    started = clock()
    raw = matcher.compute_logit_bias()
    took = clock() - started
    compiled.slow = compiled.slow or took > SLOW_CPU_S
    if matcher.is_error():
        raise GrammarError(f"the grammar failed: {first_line(matcher.get_error())}")
    if took > STEP_CPU_S:
        raise GrammarError(
            f"a step of the grammar took {took:.2g} s of processor time and may take {STEP_CPU_S:g} s: what may follow "
            "here can be read in too many ways. Make the grammar less ambiguous."
        )
    mask: Mask = np.frombuffer(raw, dtype=np.uint8)[:vocab_size] > 0
    if not mask.any():
        raise GrammarError("the grammar has come to a place where no token of this vocabulary may follow")
    return mask


class _Words:
    """A vocabulary as llguidance wants to see it."""

    def __init__(self, raw: list[bytes], tokenizer: Tokenizer, end: list[int]) -> None:
        # Tokens without text (special ones, spare rows) are no part of any grammar.
        self.special_token_ids = [i for i, token in enumerate(raw) if not token]
        self.tokens = [token or b"\xff[%d]" % i for i, token in enumerate(raw)]
        self.eos_token_id, self.bos_token_id = end[0], tokenizer.bos_id
        self._end, self._tokenizer = end, tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def as_json(self) -> dict[str, Any]:
        """For ``grammar_trial``."""
        tokens = [token.decode("latin-1") for token in self.tokens]
        return {"tokens": tokens, "special": self.special_token_ids, "end": self._end, "bos": self.bos_token_id}
