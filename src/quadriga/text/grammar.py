"""Answers that must follow a grammar: JSON schemas, regular expressions, Lark grammars, compiled by llguidance.

A compiled :class:`Grammar` says before every token which ones may come next. Compilation and every step run within
llguidance's limits, so a hostile grammar is an error, not a hang.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import llguidance
import torch
from torch import Tensor

from quadriga.errors import RequestError
from quadriga.text.tokenizer import Tokenizer

Kind = Literal["json", "regex", "lark"]

MAX_GRAMMAR_BYTES = 1 << 20


class Grammars:
    """Compiles grammars for one vocabulary.

    Args:
        tokenizer: the vocabulary.
        vocab_size: rows of the model's head, at least the vocabulary.
        end_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._vocab_size, self._end = vocab_size, sorted(end_ids)
        raw = [tokenizer.token_bytes(i) if i < tokenizer.n_vocab else b"" for i in range(vocab_size)]
        self._tokens = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Words(raw, tokenizer, self._end)), n_vocab=vocab_size, eos_token=self._end
        )

    def compile(self, kind: Kind, source: str | dict[str, Any]) -> Grammar:
        """A fresh matcher.

        Args:
            kind: what ``source`` is: a JSON schema (a dict, or {} for any JSON object), a regular expression, Lark.

        Raises:
            RequestError: the grammar is too large, malformed, or asks for what is not supported.
        """
        text = source if isinstance(source, str) else json.dumps(source)
        if len(text) > MAX_GRAMMAR_BYTES:
            raise RequestError(f"a grammar may have {MAX_GRAMMAR_BYTES} bytes, got {len(text)}")
        matcher_of = llguidance.LLMatcher
        try:
            if kind == "json":
                grammar = matcher_of.grammar_from_json_schema(text)
            else:
                grammar = matcher_of.grammar_from_regex(text) if kind == "regex" else matcher_of.grammar_from_lark(text)
        except ValueError as error:
            raise RequestError(f"the grammar cannot be read: {error}") from None
        matcher = matcher_of(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(f"the grammar cannot be used: {_first_line(matcher.get_error())}")
        return Grammar(matcher, self._vocab_size, self._end)


class Grammar:
    """One answer on its way through a grammar; an ``engine.request.Constraint``."""

    def __init__(self, matcher: Any, vocab_size: int, end: list[int]) -> None:
        self._matcher, self._vocab_size, self._end = matcher, vocab_size, end

    def allowed(self) -> Tensor:
        """(V,) bool: tokens that may come next.

        Raises:
            RequestError: the grammar ran out of its limits.
        """
        if self._matcher.is_error():
            raise RequestError(f"the grammar failed: {_first_line(self._matcher.get_error())}")
        mask = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)[: self._vocab_size]
        return mask > 0

    def accept(self, token_id: int) -> bool:
        """Go on by a token; True if the answer is complete and nothing may follow."""
        self._matcher.consume_token(token_id)
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()


class _Words:
    """A vocabulary as llguidance wants to see it."""

    def __init__(self, raw: list[bytes], tokenizer: Tokenizer, end: list[int]) -> None:
        # Tokens without text (special ones, spare rows) are no part of any grammar.
        self.special_token_ids = [i for i, token in enumerate(raw) if not token]
        self.tokens = [token or b"\xff[%d]" % i for i, token in enumerate(raw)]
        self.eos_token_id, self.bos_token_id = end[0], tokenizer.bos_id
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0][:300] if message.strip() else "no reason given"
