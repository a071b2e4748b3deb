"""Vocabularies of ranks, LLaMA 3's and Mistral's own, beside the tokenizers library's merges of the same words."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from quadriga.errors import TokenizerError
from quadriga.text.gguf_vocabulary import from_directory
from quadriga.text.pretokenize import GGUF_PATTERNS
from quadriga.text.tokenizer import load_directory
from quadriga.text.tokenizer.ranks import is_ranks
from tests.text import vocabularies

TEXTS = [*vocabularies.TEXTS, "I'LL say: don't\r\n\r\n  stop 1234567", "  two", "naïve ÉCOLE 你好🙂\u0301", ""]


def trained(pattern: str) -> tuple[list[bytes], tokenizers.Tokenizer]:
    """Words by rank, bytes first, and the library's tokenizer of the same merges; a word's id there is its rank."""
    cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    before = tokenizers.pre_tokenizers.Sequence([cut, byte_level])
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = before
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(TEXTS, trainer)
    model = json.loads(library.to_str())["model"]
    plain = tokenizers.decoders.ByteLevel()
    by_character = {plain_character(byte): bytes([byte]) for byte in range(256)}
    assert plain.decode(["Ġ"]) == " "
    merged = sorted((word for word in model["vocab"] if len(word) > 1), key=model["vocab"].__getitem__)
    names = [*by_character, *merged]
    again = tokenizers.models.BPE(
        vocab={name: i for i, name in enumerate(names)},
        merges=[tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]],
        ignore_merges=True,
    )
    library = tokenizers.Tokenizer(again)
    library.pre_tokenizer = before
    return [b"".join(by_character[c] for c in name) for name in names], library


def plain_character(byte: int) -> str:
    """GPT-2's character for a byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in shown else chr(256 + [b for b in range(256) if b not in shown].index(byte))


LLAMA3 = GGUF_PATTERNS["llama-bpe"].patterns[0]
TEKKEN = GGUF_PATTERNS["tekken"].patterns[0]


def llama3(words: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(words))


def tekken(words: list[bytes], **changes: Any) -> dict[str, Any]:
    n_special = 30
    config = {
        "pattern": TEKKEN,
        "num_vocab_tokens": len(words),
        "default_vocab_size": len(words) - 5 + n_special,
        "default_num_special_tokens": n_special,
        "version": "v3",
    }
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(word).decode(), "token_str": None} for i, word in enumerate(words)
    ]
    return {"config": config | changes.pop("config", {}), "vocab": vocab} | changes


def test_llama3s_own_file(tmp_path: Path) -> None:
    words, library = trained(LLAMA3)
    (tmp_path / "tokenizer.model").write_bytes(llama3(words))
    n = len(words)
    tokenizer = load_directory(tmp_path, n_rows=n + 256)
    assert tokenizer is not None and tokenizer.n_vocab == n + 256
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == library.encode(text).ids, text
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.prefix_ids) == (n, (n + 1, n + 9, n + 8), [n])
    assert tokenizer.special_ids["<|start_header_id|>"] == n + 6 and tokenizer.special_ids["<|python_tag|>"] == n + 10
    assert tokenizer.special_ids["<|reserved_special_token_0|>"] == n + 2
    assert tokenizer.special_ids["<|reserved_special_token_247|>"] == n + 255
    assert tokenizer.encode("a<|eot_id|>", allow_special=True)[-1] == n + 9
    assert n + 9 not in tokenizer.encode("a<|eot_id|>")
    with pytest.raises(TokenizerError, match=rf"{n} ranks, and with LLaMA 3's 256 special tokens not the model's 300"):
        load_directory(tmp_path, n_rows=300)
    with pytest.raises(TokenizerError, match=r"needs merges, which a file of ranks lacks"):
        from_directory(tmp_path, n + 256)


def test_mistrals_own_file(tmp_path: Path) -> None:
    words, library = trained(TEKKEN)
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(words)))
    tokenizer = load_directory(tmp_path)
    assert tokenizer is not None and tokenizer.n_vocab == len(words) - 5 + 30
    known = 0
    for text in TEXTS:
        expected = library.encode(text).ids
        if max(expected, default=0) < len(words) - 5:  # five words more are in the file and not in the model
            known += 1
            assert tokenizer.encode(text) == [30 + i for i in expected], text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert known >= 3
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id, tokenizer.prefix_ids) == (1, (2,), 11, [1])
    assert tokenizer.special_ids["[INST]"] == 3 and tokenizer.special_ids["<SPECIAL_29>"] == 29
    assert tokenizer.encode("[INST]x[/INST]", allow_special=True)[::2] == [3, 4]
    listed = [{"rank": i, "token_str": f"<{i}>", "is_control": True} for i in range(1, 30)]
    listed[0]["token_str"], listed[1]["token_str"] = "</s>", "<s>"
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(words, special_tokens=listed)))
    tokenizer = load_directory(tmp_path)
    assert tokenizer is not None
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (2, (1,), None)
    assert tokenizer.special_ids["<29>"] == 29 and tokenizer.special_ids["<SPECIAL_0>"] == 0


BYTES = [bytes([i]) for i in range(256)] + [b"a" * n for n in range(2, 10)]


def odd(**changes: Any) -> dict[str, Any]:
    return tekken(BYTES, **changes)


BAD = {
    "no config": ({"config": 3}, "must have an object 'config'"),
    "a count that is text": (odd(config={"default_vocab_size": "9"}), "default_vocab_size must be a whole number"),
    "all special": (odd(config={"default_num_special_tokens": 900}), "cannot be special"),
    "too few": (odd(vocab=[]), "'vocab' of 259 tokens or more"),
    "no bytes": (odd(vocab=[{"rank": 0}] * 264), "needs a rank and token_bytes"),
    "not base64": (odd(vocab=[{"rank": 0, "token_bytes": "é"}] * 264), "is not base64"),
    "the same twice": (odd(vocab=[{"rank": 0, "token_bytes": "YQ=="}] * 264), "each once"),
    "a rule that is none": (odd(config={"pattern": "("}), "config.pattern cannot be used"),
    "no rule": (odd(config={"pattern": None}), "config.pattern must be a text"),
    "special tokens of one name": (
        odd(special_tokens=[{"rank": i, "token_str": "x"} for i in (1, 2)]),
        "two special tokens have one name",
    ),
    "no room": (odd(special_tokens=[{"rank": 30, "token_str": "x"}]), "ranks up to 30, and room for 30"),
    "special tokens that are text": (odd(special_tokens="x"), "must be a list of objects"),
    "one without a text": (odd(special_tokens=[{"rank": 1}]), "needs a token_str"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_tekken_file_cannot_say(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=message):
        load_directory(tmp_path)


def test_a_byte_without_a_token_is_named(tmp_path: Path) -> None:
    words = [word for word in BYTES if word != b"\x80"]
    (tmp_path / "tokenizer.model").write_bytes(llama3(words))
    with pytest.raises(TokenizerError, match="no token for the byte 128"):
        load_directory(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(llama3(BYTES) + b"what\n")
    with pytest.raises(TokenizerError, match="line 265 must be base64 and a rank, got b'what'"):
        load_directory(tmp_path)
    assert not is_ranks(b"\x0a\x0e\x0a\x05<unk>") and is_ranks(b"IQ== 0\nIg== 1\n")
