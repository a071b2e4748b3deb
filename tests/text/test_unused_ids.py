"""Which ids of a vocabulary no token has, in every form a vocabulary comes in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quadriga.errors import TokenizerError
from quadriga.text import gguf_vocabulary
from quadriga.text.stream import Detokenizer
from quadriga.text.tokenizer import Tokenizer, load_directory, load_gguf, load_sentencepiece, load_tiktoken
from tests.paths import data
from tests.text import vocabularies


def test_those_of_dbrx() -> None:
    tokenizer = load_tiktoken(data("tokenizers/cl100k_base.tiktoken"))
    assert tokenizer.unused_ids == {100256, *range(100261, 100276)}
    assert tokenizer.unused_rows(100352) == [100256, *range(100261, 100276), *range(100280, 100352)]
    assert tokenizer.token_bytes(100256) == b"" and not tokenizer.is_token(100300)


def padded_gguf() -> dict[str, Any]:
    """A byte-level vocabulary as converters write one with holes: entries of the kind "unused"."""
    table = vocabularies.gguf_bpe()
    n = len(table["tokenizer.ggml.tokens"])
    return table | {
        "tokenizer.ggml.tokens": [*table["tokenizer.ggml.tokens"], f"[PAD{n}]", f"[PAD{n + 1}]"],
        "tokenizer.ggml.token_type": [*table["tokenizer.ggml.token_type"], 5, 5],
    }


def test_those_of_gguf_are_its_entries_of_that_kind() -> None:
    plain, padded = load_gguf(vocabularies.gguf_bpe()), load_gguf(padded_gguf())
    assert plain is not None and padded is not None
    n = plain.n_vocab
    assert plain.unused_ids == frozenset() and padded.unused_ids == {n, n + 1}
    assert padded.token_bytes(n) == b"" and padded.token_text(n) == f"[PAD{n}]"
    text = f"any text, [PAD{n}] too"
    assert padded.encode(text) == plain.encode(text) and padded.decode(padded.encode(text)) == text


def test_those_of_sentencepiece_are_its_pieces_of_that_kind(tmp_path: Path) -> None:
    path = vocabularies.sentencepiece_model(tmp_path)
    table = {key: value for key, (_, value) in (gguf_vocabulary.from_directory(path.parent) or {}).items()}
    plain = load_gguf(table)
    table["tokenizer.ggml.tokens"] = [*table["tokenizer.ggml.tokens"], "[PAD400]"]
    table["tokenizer.ggml.scores"] = [*table["tokenizer.ggml.scores"], -1e4]
    table["tokenizer.ggml.token_type"] = [*table["tokenizer.ggml.token_type"], 5]
    padded = load_gguf(table)
    assert plain is not None and padded is not None
    assert plain.unused_ids == load_sentencepiece(path).unused_ids == frozenset()
    assert padded.unused_ids == {padded.n_vocab - 1} and padded.n_vocab == plain.n_vocab + 1


def test_those_of_a_tokenizer_json_are_the_ids_it_leaves_out(tmp_path: Path) -> None:
    vocabularies.write_bpe(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    last = max(vocab, key=vocab.__getitem__)
    hole = vocab[last]
    vocab[last] = hole + 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_directory(tmp_path)
    assert tokenizer is not None and tokenizer.unused_ids == {hole} and tokenizer.n_vocab == hole + 2
    with pytest.raises(TokenizerError, match=f"{hole} is one of the vocabulary's unused ids"):
        tokenizer.decode([hole])


class Gaps:
    """Six ids, of which the odd ones are none."""

    n_vocab = 6

    def encode(self, text: str, allow_special: bool) -> list[int]:
        return [0] * len(text)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id % 2:
            raise TokenizerError("no such token")
        return b"x"


def test_a_vocabulary_that_lists_none_is_asked_about_each() -> None:
    tokenizer = Tokenizer(Gaps(), special_ids={"<s>": 3})
    assert tokenizer.unused_ids == {1, 5}, "a special token is one, whatever its bytes"
    assert [tokenizer.unused_rows(n) for n in (1, 4, 6, 9)] == [[], [1], [1, 5], [1, 5, 6, 7, 8]]
    assert Tokenizer(Gaps(), special_ids={"<s>": 3}, unused_ids=[1, 3, 5]).unused_ids == {1, 5}
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token)[0] for token in (0, 1, 3, 5, 6, 99, 2)]
    assert pieces == ["x", "", "", "", "", "", "x"], "ids without a token add nothing to a text"
