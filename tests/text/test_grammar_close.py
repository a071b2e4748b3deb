"""Calls that are closed before their budget ends."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from quadriga.text.grammar import Grammar, Grammars
from quadriga.text.tokenizer import Tokenizer

COMPACT = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
MANY = [b'"}', b'"}}]', b", ", b'": "', b"}]"]


class Bytes:
    """One token a byte, some of several, and one end token."""

    n_vocab = 257 + len(MANY)

    def encode(self, text: str, allow_special: bool) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"" if token_id == 256 else MANY[token_id - 257]


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    tokenizer = Tokenizer(Bytes(), special_ids={"<|end|>": 256}, eos_ids=(256,))
    one = Grammars(tokenizer, Bytes.n_vocab, frozenset({256}))
    yield one
    one.trial.close()


def array(arguments: dict[str, Any]) -> dict[str, Any]:
    call = {"type": "object", "properties": {"name": {"const": "f"}, "arguments": arguments}}
    return {"type": "array", "items": call | {"required": ["name", "arguments"]}, "minItems": 1, **COMPACT}


SCHEMAS: dict[str, dict[str, Any]] = {
    "a text": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
    "anything": {"type": "object"},
    "numbers and choices": {
        "type": "object",
        "properties": {"n": {"type": "number"}, "c": {"enum": ["north", "south"]}, "d": {"type": "string"}},
        "required": ["n", "c", "d"],
    },
    "long texts and lists": {
        "type": "object",
        "properties": {
            "t": {"type": "string", "minLength": 12},
            "l": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}, "minItems": 2},
            "x": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2}$"},
        },
        "required": ["t", "l", "x"],
    },
}


def written(grammar: Grammar, budget: int, rng: random.Random) -> tuple[str, bool]:
    """An answer of a model that draws blindly from what may follow, opening more often than closing."""
    out = b""
    for left in range(budget, 0, -1):
        allowed = np.flatnonzero(grammar.allowed())
        likes = [t for t in allowed.tolist() if Bytes.token_bytes(Bytes(), t) in (b"\\", b"[", b"{", b"x", b"9", b'"')]
        token = grammar.choose(rng.choice(likes or allowed.tolist()), left)
        out += Bytes.token_bytes(Bytes(), token)
        if grammar.accept(token):
            return out.decode(errors="replace"), True
    return out.decode(errors="replace"), False


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_is_complete_at_its_last_token_at_the_latest(grammars: Grammars, name: str) -> None:
    compiled = grammars.compile("json", array(SCHEMAS[name]))
    shortest = next(n for n in range(1, 300) if written(compiled.copy(closes=True), n, random.Random(0))[1])
    for budget in (*range(shortest, shortest + 20), 200):
        for seed in range(5):
            text, complete = written(compiled.copy(closes=True), budget, random.Random(seed))
            assert complete, (budget, text)
            assert json.loads(text)[0]["name"] == "f"
    cut = [written(compiled.copy(), shortest + 5, random.Random(seed))[1] for seed in range(5)]
    assert not all(cut), "left alone it would have been cut"


def test_what_has_room_is_left_alone(grammars: Grammars) -> None:
    compiled = grammars.compile("json", array(SCHEMAS["a text"]))
    guided, free = (
        written_of(compiled.copy(closes=closes), b'[{"name": "f", "arguments": {"a": "hi"}}]') for closes in (1, 0)
    )
    assert guided == free


def written_of(grammar: Grammar, text: bytes) -> list[int]:
    """What becomes of an answer that is meant to be this text and has room for it."""
    out = []
    for i, byte in enumerate(text):
        out.append(grammar.choose(byte, len(text) - i))
        grammar.accept(out[-1])
    return out
