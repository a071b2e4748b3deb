"""Vocabularies: published ids, round trips, and files that want to do harm."""

from __future__ import annotations

import json
import os
from base64 import b64encode
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadriga.errors import TokenizerError
from quadriga.text import gguf_vocabulary, tokenizers_json
from quadriga.text.tokenizer import (
    TiktokenVocabulary,
    Tokenizer,
    load_directory,
    load_gguf,
    load_sentencepiece,
    load_tiktoken,
    load_tokenizer_json,
)
from tests.paths import data
from tests.text import vocabularies


@pytest.fixture(scope="module")
def cl100k() -> Tokenizer:
    return load_tiktoken(data("tokenizers/cl100k_base.tiktoken"))


@pytest.fixture(scope="module")
def grok() -> Tokenizer:
    return load_sentencepiece(data("tokenizers/grok-1.tokenizer.model"))


# Ids verified against tiktoken 0.14.0's own cl100k_base (SPEC 1.6).
CL100K = {
    "hello world": [15339, 1917],
    "Databricks was founded in ": [35, 2143, 78889, 574, 18538, 304, 220],
    "What is Machine Learning?": [3923, 374, 13257, 21579, 30],
    "12345678": [4513, 10961, 2495],
    "  leading": [220, 6522],
    "I'll don't": [40, 3358, 1541, 956],
    "\n\n\n": [1432],
    "def f(x):\n    return x**2\n": [755, 282, 2120, 997, 262, 471, 865, 334, 17, 198],
    "🙂é": [9468, 19044, 978],
    "你好,世界": [57668, 53901, 11, 3574, 244, 98220],
    "人工智能是什么？": [17792, 49792, 45114, 118, 27327, 21043, 6271, 222, 82696, 11571],
}


@pytest.mark.parametrize("text", CL100K)
def test_cl100k_gives_the_published_ids(cl100k: Tokenizer, text: str) -> None:
    assert cl100k.encode(text) == CL100K[text]
    assert cl100k.decode(CL100K[text]) == text


def test_dbrx_has_its_three_tokens_and_two_ends(cl100k: Tokenizer) -> None:
    names = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
    assert [cl100k.special_ids[n] for n in names] == [100257, 100277, 100278, 100279]
    assert cl100k.eos_ids == (100257, 100279)
    assert (cl100k.pad_id, cl100k.n_vocab, cl100k.prefix_ids) == (100277, 100280, [])
    assert cl100k.encode("<|im_end|>", allow_special=True) == [100279]


class Letters:
    """A vocabulary of the 256 bytes and one more."""

    n_vocab = 257

    def encode(self, text: str, allow_special: bool) -> list[int]:
        if allow_special and text.startswith("<s>"):
            return [256, *text[3:].encode()]
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<s>"


def test_a_prompt_begins_once() -> None:
    tokenizer = Tokenizer(Letters(), special_ids={"<s>": 256}, bos_id=256, add_bos=True)
    assert tokenizer.prefix_ids == [256]
    assert tokenizer.encode_prompt("a") == [256, 97]
    assert tokenizer.encode_prompt("<s>a", allow_special=True) == [256, 97], "it has begun already"
    assert tokenizer.encode_prompt("<s>a") == [256, *b"<s>a"], "typed, it is text"
    assert tokenizer.encode("a") == [97]
    assert Tokenizer(Letters(), special_ids={"<s>": 256}, bos_id=256).encode_prompt("a") == [97]
    pair = Tokenizer(Letters(), special_ids={"<s>": 256}, prefix_ids=[256, 97], suffix_ids=[98, 99])
    assert pair.encode_prompt("<s>abc", allow_special=True) == [256, *b"abc"], "both are there"
    assert pair.encode_prompt("<s>xac", allow_special=True) == [256, 97, 256, *b"xacbc"], "of both one is"


def test_typed_special_tokens_are_text_in_ranks_too() -> None:
    vocabulary = TiktokenVocabulary({bytes([b]): b for b in range(256)}, {"<|im_end|>": 256})
    assert vocabulary.encode("a<|im_end|>", False) == list(b"a<|im_end|>")
    assert vocabulary.encode("a<|im_end|>", True) == [97, 256]


@pytest.mark.parametrize("kind", ["json", "gguf", "spm", "spm in gguf"])
def test_special_tokens_have_names_and_no_text(kinds: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = kinds[kind]
    assert tokenizer.special_ids
    word = tokenizer.encode("fox")
    for name, token_id in tokenizer.special_ids.items():
        assert tokenizer.token_bytes(token_id) == b"" and tokenizer.token_text(token_id) == name
        assert tokenizer.decode([token_id, *word, token_id]) == "fox"
    for outside in (-1, tokenizer.n_vocab):
        with pytest.raises(TokenizerError, match="token ids are 0 to"):
            tokenizer.token_bytes(outside)


def test_a_rank_file_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    lines = [b64encode(bytes([b])) + b" %d" % b for b in range(256)]
    (tmp_path / "cl100k_base.tiktoken").write_bytes(b"\n".join(lines))
    with pytest.raises(TokenizerError, match="sha256"):
        load_directory(tmp_path)


def test_files_too_deep_or_too_large_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": ' + "[" * 40 + "]" * 40 + "}")
    with pytest.raises(TokenizerError, match="nests 41 levels deep"):
        load_directory(tmp_path)
    path.write_text('{"model": "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["}')
    with pytest.raises(TokenizerError, match="an object with a 'model'"):
        load_directory(tmp_path)
    os.truncate(path, (64 << 20) + 1)
    with pytest.raises(TokenizerError, match="are at most"):
        load_directory(tmp_path)


@pytest.mark.parametrize("last", ["default", "tool_use"])
def test_of_named_templates_the_default_is_the_chat_one(tmp_path: Path, last: str) -> None:
    named = [{"name": "default", "template": "the chat one"}, {"name": "tool_use", "template": "another"}]
    folder = vocabularies.write_bpe(tmp_path, chat_template=named if last == "tool_use" else named[::-1])
    tokenizer = load_directory(folder)
    assert tokenizer is not None and tokenizer.chat_template == "the chat one"


def test_every_end_that_a_gguf_file_names_is_one() -> None:
    table = vocabularies.gguf_bpe()
    roles = {"eos": 2, "eot": 40, "eom": 41}
    tokenizer = load_gguf(table | {f"tokenizer.ggml.{role}_token_id": i for role, i in roles.items()})
    assert tokenizer is not None and tokenizer.eos_ids == (2, 40, 41)


def test_a_whole_word_is_one_token_where_the_rule_says_so() -> None:
    """As tiktoken has it: a word of the vocabulary needs no merges that lead to it."""
    table = vocabularies.gguf_bpe()
    tokens, kinds = table["tokenizer.ggml.tokens"], table["tokenizer.ggml.token_type"]
    table |= {"tokenizer.ggml.tokens": [*tokens, "\u0120zqxj"], "tokenizer.ggml.token_type": [*kinds, 1]}
    for pre, whole in (("llama-bpe", True), ("dbrx", True), ("gpt-2", False), ("glm4", False), ("qwen2", False)):
        tokenizer = load_gguf(table | {"tokenizer.ggml.pre": pre})
        assert tokenizer is not None
        assert (tokenizer.encode(" zqxj") == [len(tokens)]) == whole, pre


def test_unused_ids_of_cl100k_are_named(cl100k: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="100256 is one of the vocabulary's unused ids"):
        cl100k.decode([100256])


def test_a_changed_rank_file_is_refused(tmp_path: Path) -> None:
    raw = bytearray(data("tokenizers/cl100k_base.tiktoken").read_bytes())
    raw[0] ^= 1
    (tmp_path / "cl100k_base.tiktoken").write_bytes(raw)
    with pytest.raises(TokenizerError, match="sha256"):
        load_directory(tmp_path)


# SPEC 3.4, verified with the published model file.
def test_grok_gives_the_published_ids(grok: Tokenizer) -> None:
    assert grok.n_vocab == 131_072
    assert grok.encode("hello world") == [21560, 1135]
    sentence = "The answer to life the universe and everything is of course"
    assert grok.encode(sentence) == [422, 3033, 356, 1180, 333, 9072, 360, 2175, 391, 359, 1805]
    assert grok.decode(grok.encode(sentence)) == sentence
    assert (grok.bos_id, grok.eos_ids) == (1, (2,))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("vocabularies")
    spm = load_sentencepiece(vocabularies.sentencepiece_model(folder))
    kept = gguf_vocabulary.from_directory(folder)
    assert kept is not None
    vocabularies.write_bpe(folder)
    gguf = load_gguf(vocabularies.gguf_bpe())
    assert gguf is not None
    spm_in_gguf = load_gguf({key: value for key, (_, value) in kept.items()})
    assert spm_in_gguf is not None
    return {
        "json": load_tokenizer_json(folder / "tokenizer.json"),
        "gguf": gguf,
        "spm": spm,
        "spm in gguf": spm_in_gguf,
    }


@pytest.mark.parametrize("kind", ["json", "gguf", "spm", "spm in gguf"])
def test_any_text_survives(kinds: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = kinds[kind]

    @settings(max_examples=150, deadline=None)
    @given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), max_size=40))
    def check(text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text)) == text

    check()


def test_a_vocabulary_is_the_same_in_json_and_gguf(kinds: dict[str, Tokenizer]) -> None:
    for text in vocabularies.TEXTS:
        assert kinds["gguf"].encode(text) == kinds["json"].encode(text)
        assert kinds["spm in gguf"].encode(text) == kinds["spm"].encode(text)


@pytest.mark.parametrize("kind", ["json", "gguf"])
def test_typed_special_tokens_stay_text(kinds: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = kinds[kind]
    typed = "hi <|im_end|><|im_start|>system"
    ids = tokenizer.encode(typed)
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(ids) == typed
    meant = tokenizer.encode(typed, allow_special=True)
    assert [i for i in meant if i in tokenizer.special_ids.values()] == [2, 1]


def test_typed_control_pieces_stay_text(kinds: dict[str, Tokenizer], grok: Tokenizer) -> None:
    for tokenizer, name in ((kinds["spm"], "</s>"), (grok, "[EOS]")):
        assert tokenizer.special_ids[name] not in tokenizer.encode(f"a {name} b")
        assert tokenizer.encode(f"a{name}", allow_special=True)[-1] == tokenizer.special_ids[name]


def test_text_without_bytes_is_an_error(kinds: dict[str, Tokenizer]) -> None:
    for tokenizer in kinds.values():
        with pytest.raises(TokenizerError, match="lone surrogate"):
            tokenizer.encode("ok\ud800")
        assert tokenizer.encode("") == []


def test_ids_outside_the_vocabulary_are_named(kinds: dict[str, Tokenizer]) -> None:
    for tokenizer in kinds.values():
        for bad in (-1, tokenizer.n_vocab):
            with pytest.raises(TokenizerError, match=rf"0 to {tokenizer.n_vocab - 1}, got {bad}"):
                tokenizer.token_bytes(bad)


def test_the_configuration_beside_it_is_read(tmp_path: Path) -> None:
    vocabularies.write_bpe(
        tmp_path,
        bos_token="<|im_start|>",
        eos_token={"content": "<|endoftext|>"},
        add_bos_token=True,
        chat_template="x",
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    tokenizer = load_directory(tmp_path)
    assert tokenizer is not None
    assert (tokenizer.bos_id, tokenizer.prefix_ids, tokenizer.eos_ids) == (1, [1], (0, 2))
    assert tokenizer.chat_template == "x"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|nope|>"}')
    with pytest.raises(TokenizerError, match="nope"):
        load_directory(tmp_path)


def test_an_empty_folder_has_no_tokenizer(tmp_path: Path) -> None:
    assert load_directory(tmp_path) is None


HOSTILE_JSON = {
    "not json": "{",
    "a list": "[]",
    "no model": "{}",
    "brackets": "[" * 200_000,
    "deep": '{"model":' * 5000 + "1" + "}" * 5000,
    "model of no kind": '{"model": {"type": "Nope"}}',
    "empty vocabulary": '{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
    "merge of nothing": '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}}',
    "negative id": '{"added_tokens": [{"id": -5, "content": "a"}], "model": {"type": "BPE", "vocab": {}, "merges": []}}',
    "huge id": '{"added_tokens": [{"id": 99999999999, "content": "a"}], "model": {"type": "BPE"}}',
    "added is a string": '{"added_tokens": "x", "model": {"type": "BPE", "vocab": {}, "merges": []}}',
    "bad regex": json.dumps(
        {
            "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        }
    ),
}


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_hostile_tokenizer_files_end_in_one_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer.json").write_text(HOSTILE_JSON[name])
    with pytest.raises(TokenizerError):
        load_directory(tmp_path)


def test_hostile_sentencepiece_files_end_in_one_error(tmp_path: Path) -> None:
    good = vocabularies.sentencepiece_model(tmp_path).read_bytes()
    for raw in (b"", b"\x00" * 100, good[: len(good) // 2], b"\xff" * 1000):
        (tmp_path / "tokenizer.model").write_bytes(raw)
        with pytest.raises(TokenizerError):
            load_sentencepiece(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "'gpt2', 'llama', 't5' or 'gemma4'"),
        ({"tokenizer.ggml.pre": "mystery"}, "mystery"),
        ({"tokenizer.ggml.pre": ["gpt-2"]}, "tokenizer.ggml.pre must be one of"),
        ({"tokenizer.ggml.tokens": None}, "list of strings"),
        ({"tokenizer.ggml.token_type": [1]}, "entries"),
        ({"tokenizer.ggml.merges": ["abc"]}, "pairs"),
        ({"tokenizer.ggml.eos_token_id": 10**9}, "eos_token_id"),
        ({"tokenizer.chat_template": 5}, "string"),
        ({"tokenizer.chat_template": "x" * 200_001}, "no template"),
        ({"tokenizer.ggml.model": "llama"}, "scores"),
    ],
)
def test_gguf_vocabularies_that_do_not_fit_are_named(change: dict[str, object], says: str) -> None:
    with pytest.raises(TokenizerError, match=says):
        load_gguf(vocabularies.gguf_bpe() | change)


def test_gguf_to_files_to_gguf(tmp_path: Path) -> None:
    metadata = vocabularies.gguf_bpe() | {"tokenizer.chat_template": "{{ messages }}"}
    for name, content in gguf_vocabulary.to_files(metadata).items():
        (tmp_path / name).write_bytes(content)
    back = gguf_vocabulary.from_directory(tmp_path)
    assert back is not None
    for key, value in metadata.items():
        assert back[key][1] == value, key
    first, second = load_gguf(metadata), load_directory(tmp_path)
    assert first is not None
    assert second is not None
    for text in vocabularies.TEXTS:
        assert first.encode(text) == second.encode(text)
    assert second.chat_template == "{{ messages }}"
    assert second.eos_ids == first.eos_ids


def test_a_chat_builds_one_vocabulary_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building one of 50,000 words takes a tenth of a second of a chat's start."""
    built = []
    load = tokenizers_json._load
    monkeypatch.setattr(tokenizers_json, "_load", lambda spec, name: (built.append(name), load(spec, name))[1])
    tokenizer = load_gguf(vocabularies.gguf_bpe())
    assert tokenizer is not None
    end = tokenizer.special_ids["<|im_end|>"]
    text = "<|im_end|> typed<|im_end|>"
    ids = tokenizer.encode_mixed(text, [(0, 16)])
    assert ids[-1] == end and end not in ids[:-1]
    assert b"".join(map(tokenizer.token_bytes, ids)) == b"<|im_end|> typed", "a control token has no text"
    assert len(built) == 1
    assert tokenizer.encode("<|im_end|>", allow_special=True) == [end] and len(built) == 2
