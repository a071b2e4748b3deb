"""The first space of a continuation: SentencePiece's belongs to no text that begins, and to every text that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quadriga.text.stream import Detokenizer, Offsets
from quadriga.text.tokenizer import Tokenizer, load_directory
from tests.golden import vocabularies as golden

FORMS: dict[str, Callable[[Path], object]] = {
    "tokenizer.model": lambda folder: (folder / "tokenizer.model").write_bytes(golden.model().to_bytes()),
    "tokenizer.json, legacy": lambda folder: _json(folder, legacy=True),
    "tokenizer.json": lambda folder: _json(folder, legacy=False),
}


def _json(folder: Path, *, legacy: bool) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(golden.tokenizer_json(legacy=legacy)))


@pytest.fixture(params=FORMS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    FORMS[request.param](tmp_path)
    made = load_directory(tmp_path)
    assert made is not None
    return made


def _id(tokenizer: Tokenizer, piece: str) -> int:
    return next(i for i, p in enumerate(golden.model().pieces) if p.text == piece)


def streamed(tokenizer: Tokenizer, ids: list[int], after: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer, after=after)
    return "".join(detokenizer.push(i)[0] for i in ids) + detokenizer.finish()


def test_a_continuation_keeps_its_first_space(tokenizer: Tokenizer) -> None:
    space, the, bos = _id(tokenizer, "▁"), _id(tokenizer, "▁the"), 1
    prompt = [bos, *tokenizer.encode("def f(x):\n")]
    for decode in (lambda ids, after: tokenizer.decode(ids, after=after), lambda i, a: streamed(tokenizer, i, a)):
        assert decode([space] * 4, prompt) == "    "
        assert decode([the], prompt) == " the"
        assert decode([the], [bos, *tokenizer.encode("hello")]) == " the"


def test_a_text_that_begins_has_no_first_space(tokenizer: Tokenizer) -> None:
    space, the, bos = _id(tokenizer, "▁"), _id(tokenizer, "▁the"), 1
    for decode in (lambda ids, after: tokenizer.decode(ids, after=after), lambda i, a: streamed(tokenizer, i, a)):
        for after in ([], [bos], [bos, 2, bos]):
            assert decode([the], after) == "the", after
            assert decode([space] * 4, after) == "   ", after
            assert decode([bos, the], after) == "the", after
            assert decode([the, bos, the], after) == "the the", after


def test_where_the_space_of_a_beginning_is_a_token_of_its_own_the_text_has_begun(tokenizer: Tokenizer) -> None:
    space, the = _id(tokenizer, "▁"), _id(tokenizer, "▁the")
    assert tokenizer.decode([the], after=[1, space]) == streamed(tokenizer, [the], [1, space]) == " the"


def test_prompt_and_continuation_are_together_the_text(tokenizer: Tokenizer) -> None:
    for text in ("hello World\n    return re", " the user", "你好 the 🙂é  return"):
        ids = [*tokenizer.prefix_ids, *tokenizer.encode(text)]
        whole = tokenizer.decode(ids)
        for cut in range(len(ids) + 1):
            before, after = tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut:], after=ids[:cut])
            if "\ufffd" not in before + after:
                assert before + after == whole, (text, cut)
            assert streamed(tokenizer, ids[cut:], ids[:cut]) == after


def test_a_continuation_is_encoded_without_a_space_of_its_own(tokenizer: Tokenizer) -> None:
    for text in ("the", "return\n", "World hello"):
        assert tokenizer.decode(tokenizer.encode_continuation(text), after=tokenizer.encode("x")) == text
    assert tokenizer.encode_continuation(" the") == [_id(tokenizer, "▁the")]
    assert tokenizer.encode_continuation("") == []


def test_tokens_begin_where_their_text_does(tokenizer: Tokenizer) -> None:
    text = "hello 你 World\n  the é!"
    ids = [1, *tokenizer.encode(text), 2]
    offsets = Offsets(tokenizer)
    places = [offsets.push(i) for i in ids]
    decoded = tokenizer.decode(ids)
    assert decoded == text
    assert places[:2] == [0, 0], "bos is no part of the text"
    assert places[-1] == len(text)
    for place, token_id, next_place in zip(places, ids, [*places[1:], len(text)], strict=True):
        part = tokenizer.token_bytes(token_id).decode(errors="ignore")
        if place == 0:
            part = part.removeprefix(" ")
        if part:
            assert decoded[place:next_place] == part, (place, part)


def test_offsets_of_a_continuation_count_its_space(tokenizer: Tokenizer) -> None:
    the = _id(tokenizer, "▁the")
    offsets = Offsets(tokenizer, after=[1, *tokenizer.encode("hello")])
    assert [offsets.push(the), offsets.push(the), offsets.push(2)] == [0, 4, 8]


def test_a_stop_string_may_begin_with_the_first_space(tokenizer: Tokenizer) -> None:
    the = _id(tokenizer, "▁the")
    assert Detokenizer(tokenizer, (" the",), after=tokenizer.encode("hello")).push(the) == ("", True)
    assert Detokenizer(tokenizer, (" the",)).push(the) == ("the", False)
