"""Detokenising as tokens come: the pieces are the whole, characters are never cut, stop strings never show."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadriga.text.stream import Detokenizer
from quadriga.text.tokenizer import Tokenizer, load_gguf, load_sentencepiece
from tests.text import vocabularies


class Bytes:
    """A vocabulary of the 256 bytes."""

    n_vocab = 256

    def encode(self, text: str, allow_special: bool) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


BYTES = Tokenizer(Bytes(), special_ids={})


def run(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    detokenizer = Detokenizer(tokenizer, stop)
    pieces = []
    for i in ids:
        text, hit = detokenizer.push(i)
        pieces.append(text)
        if hit:
            return pieces, True
    return [*pieces, detokenizer.finish()], False


@given(st.lists(st.integers(0, 255), max_size=60))
def test_any_bytes_come_out_as_decode_has_them(ids: list[int]) -> None:
    assert "".join(run(BYTES, ids)[0]) == BYTES.decode(ids)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_ids_of_a_real_vocabulary(real: tuple[Tokenizer, ...], data: st.DataObject) -> None:
    for tokenizer in real:
        ids = data.draw(st.lists(st.integers(0, tokenizer.n_vocab - 1), max_size=30))
        assert "".join(run(tokenizer, ids)[0]) == tokenizer.decode(ids)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, ...]:
    folder: Path = tmp_path_factory.mktemp("spm")
    gguf = load_gguf(vocabularies.gguf_bpe())
    assert gguf is not None
    return gguf, load_sentencepiece(vocabularies.sentencepiece_model(folder))


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
def test_no_piece_holds_part_of_a_character(text: str) -> None:
    for piece in run(BYTES, list(text.encode()))[0]:
        assert "�" not in piece or "�" in text


@given(st.text(alphabet="abx", max_size=40), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_the_answer_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    pieces, hit = run(BYTES, list(text.encode()), tuple(stops))
    # Character by character, the first stop string to be completed ends the answer at its own start.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    first = min((e for e, _ in ends), default=None)
    expected = text if first is None else text[: min(text.find(s) for s in stops if s in text[:first])]
    assert hit == (first is not None)
    assert "".join(pieces) == expected
    shown = ""
    for piece in pieces:
        shown += piece
        assert expected.startswith(shown)


def test_a_stop_string_inside_one_token() -> None:
    class Words(Bytes):
        def token_bytes(self, token_id: int) -> bytes:
            return b"end. STOP more"

    assert run(Tokenizer(Words(), special_ids={}), [0], ("STOP",)) == (["end. "], True)


def test_special_tokens_are_silent() -> None:
    tokenizer = Tokenizer(Bytes(), special_ids={"!": 33})
    assert run(tokenizer, list(b"a!b"))[0] == ["a", "", "b", ""]


def test_work_per_token_does_not_grow_with_the_answer() -> None:
    detokenizer = Detokenizer(BYTES, ("never to be seen",))
    for i in range(20_000):
        detokenizer.push(97 + i % 26)
        assert len(detokenizer._held) < len("never to be seen")


def test_a_stop_string_that_may_not_stop_yet_is_text() -> None:
    detokenizer = Detokenizer(BYTES, stop=["ab"])
    said = ""
    for i, letter in enumerate(b"xabyab"):
        text, hit = detokenizer.push(letter, may_stop=i > 3)
        said += text
        assert hit == (i == 5)
    assert said == "xaby"
