"""Lower bounds of token counts: never above the truth, and nothing claimed of vocabularies that lose text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadriga.text.decoders import byte_alphabet
from quadriga.text.least_tokens import LeastTokens
from quadriga.text.tokenizer import Tokenizer, load_directory, load_gguf, load_sentencepiece, load_tiktoken
from tests.paths import data
from tests.text import vocabularies


def from_spec(folder: Path, spec: dict[str, Any]) -> Tokenizer:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text("{}")
    tokenizer = load_directory(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("vocabularies")
    spec = vocabularies.bpe()
    holes = json.loads(json.dumps(spec))
    holes["model"]["merges"] = []
    for letter, byte in byte_alphabet().items():
        if byte in (0x07, 0xF0):  # a control character, and what faces begin with: such bytes have no token
            del holes["model"]["vocab"][letter]
    gguf = load_gguf(vocabularies.gguf_bpe())
    assert gguf is not None
    broken = from_spec(folder / "holes", holes)
    assert broken.encode("\x07") == [], "the library leaves out what it has no token for"
    return {
        "json": from_spec(folder / "json", spec),
        "holes": broken,
        "gguf": gguf,
        "spm": load_sentencepiece(vocabularies.sentencepiece_model(folder)),
    }


PIECES = [
    "a",
    "word",
    " ",
    "    ",
    "\n",
    "\t",
    "7",
    "12",
    "é",
    "网络",
    "🙂",
    "▁",
    "\x07",
    "\0",
    "<|im_end|>",
    "it's",
    "--",
    "\u0301",
]
TEXTS = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60),
    st.lists(st.sampled_from(PIECES), max_size=40).map("".join),
    st.tuples(st.sampled_from(PIECES), st.integers(1, 400)).map(lambda pair: pair[0] * pair[1]),
)


@pytest.mark.parametrize("kind", ["json", "holes", "gguf", "spm"])
def test_no_text_has_fewer_tokens(kinds: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = kinds[kind]
    least = LeastTokens(tokenizer)

    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        bound = least.of(text)
        assert bound <= len(tokenizer.encode(text))
        assert bound <= len(tokenizer.encode(text, allow_special=True))

    check()


@pytest.mark.parametrize("kind", ["json", "holes", "gguf", "spm"])
@pytest.mark.parametrize("text", ["word " * 4000, "a" * 20_000, "7" * 20_000, " " * 20_000, "网络" * 4000], ids=repr)
def test_long_texts_are_known_to_be_long(kinds: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = kinds[kind]
    n = len(tokenizer.encode(text))
    assert n / 16 < LeastTokens(tokenizer).of(text) <= n


def test_published_vocabularies_are_known_too() -> None:
    least = LeastTokens(load_tiktoken(data("tokenizers/cl100k_base.tiktoken")))
    assert least.of("hello world " * 1500) == 1000  # no token has more than three words
    assert least.of(" " * 12_800) == 100
    assert least.of("7" * 3_000) == 1000


LOSSY: dict[str, Any] = {
    "lower case": {"normalizer": {"type": "Lowercase"}},
    "accents": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]}},
    "white space": {"normalizer": {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "}},
    "ends": {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
}


@pytest.mark.parametrize("name", LOSSY)
def test_nothing_is_claimed_where_text_gets_lost(tmp_path: Path, name: str) -> None:
    least = LeastTokens(from_spec(tmp_path / "lossy", vocabularies.bpe() | LOSSY[name]))
    assert least.of("Grüße, wörld\n\n" * 1000) == 0
    if name != "accents":  # they are none in ASCII
        assert least.of("A " * 1000) == 0


def test_a_composing_normaliser_is_certain_for_ascii_only(tmp_path: Path) -> None:
    tokenizer = from_spec(tmp_path / "nfc", vocabularies.bpe() | {"normalizer": {"type": "NFC"}})
    least = LeastTokens(tokenizer)
    assert least.of("word " * 1000) > 0
    assert least.of("e\u0301" * 1000) == 0


@pytest.mark.parametrize("special", [False, True])
def test_a_token_that_swallows_spaces_is_noticed(tmp_path: Path, special: bool) -> None:
    spec = vocabularies.bpe()
    number = len(spec["model"]["vocab"])
    hungry = {"id": number, "content": "<gap>", "special": special, "lstrip": True, "rstrip": True}
    hungry |= {"normalized": False, "single_word": False}
    tokenizer = from_spec(tmp_path / "hungry", spec | {"added_tokens": [*spec["added_tokens"], hungry]})
    text = "<gap>" + " " * 10_000
    assert len(tokenizer.encode(text, allow_special=True)) == 1
    assert LeastTokens(tokenizer).of(text) == 0


def test_words_that_are_not_known_may_be_one_token(tmp_path: Path) -> None:
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2, **{chr(code): code for code in range(3, 97)}, " ": 97}
    model = {"type": "WordPiece", "vocab": vocabulary, "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    model["max_input_chars_per_word"] = 100
    spec = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}}
    tokenizer = from_spec(tmp_path / "pieces", spec | {"post_processor": None, "decoder": None, "model": model})
    assert LeastTokens(tokenizer).of("a" * 10_000) == 0


class Phrases:
    """A vocabulary of bytes, ``x y`` and SentencePiece's ``▁``, of which eight are one token of as many spaces."""

    tokens: tuple[bytes, ...] = (*(bytes([i]) for i in range(256)), b"z", b"x y", b" " * 8)
    n_vocab = len(tokens)

    def encode(self, text: str, allow_special: bool) -> list[int]:
        ids: list[int] = []
        raw = text.replace("\u2581", " ").encode()
        while raw:
            long = next((i for i in (257, 258) if raw.startswith(self.tokens[i])), raw[0])
            ids.append(long)
            raw = raw[len(self.tokens[long]) :]
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id]


@pytest.mark.parametrize(
    ("text", "least"), [("x y" * 20, 20), ("\u2581" * 80, 0), ("a\u2581" * 80, 40), ("ab" * 40, 40)]
)
def test_words_of_a_phrase_and_spaces_of_sentencepiece_prove_no_more_than_is_true(text: str, least: int) -> None:
    """``x y`` begins a word though the token before it in the table ends with a letter; ``▁`` is no three bytes."""
    tokenizer = Tokenizer(Phrases(), special_ids={})
    assert LeastTokens(tokenizer).of(text) == least <= len(tokenizer.encode(text))
