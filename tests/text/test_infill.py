"""Prompts to fill in the middle: each kind of marks in its order, behind what every prompt begins with."""

from __future__ import annotations

import pytest

from quadriga.text.infill import _NAMES, Marks, marks_of
from quadriga.text.tokenizer import Tokenizer


class Letters:
    """Bytes, then <s> and three marks."""

    n_vocab = 260

    def encode(self, text: str, allow_special: bool) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


@pytest.mark.parametrize("names", _NAMES, ids=lambda names: names[0])
def test_marks_are_found_by_their_names(names: tuple[str, str, str | None]) -> None:
    special = {name: 257 + i for i, name in enumerate(names) if name is not None}
    tokenizer = Tokenizer(Letters(), special_ids=special)
    assert marks_of(tokenizer) == Marks(257, 258, None if names[2] is None else 259)
    for missing in special:
        assert marks_of(Tokenizer(Letters(), special_ids={k: i for k, i in special.items() if k != missing})) is None


@pytest.mark.parametrize("middle", [259, None])
def test_a_prompt_has_its_parts_in_the_models_order(middle: int | None) -> None:
    """Most models read before, behind, middle; Codestral what is behind first, and goes on with what is before."""
    tokenizer = Tokenizer(Letters(), special_ids={"<s>": 256}, bos_id=256, add_bos=True)
    before, after = [257, *b"f(x"], [258, *b"):"]
    wanted = [*before, *after, 259] if middle else [*after, *before]
    marks = Marks(257, 258, middle)
    assert marks.prompt(tokenizer, "f(x", "):") == [256, *wanted]
    assert marks.prompt(tokenizer, "f(x", "):", "y") == [256, *wanted, *b"y"]
