"""Every kind of vocabulary against the library it comes from: ids, text, and text as it streams, on random strings."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from quadriga.text import gguf_vocabulary
from quadriga.text.pretokenize import GGUF_PATTERNS
from quadriga.text.stream import Detokenizer
from quadriga.text.tokenizer import TiktokenVocabulary, Tokenizer, load_directory, load_gguf, load_sentencepiece
from tests.text import vocabularies

CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
PLAIN = ["<tool>", "\n\n\n", "    ", "word", "Ŵnit"]
PARTS = [
    *("a", "b", "the", "The", "THE", "quick", "brown", "fox", "return", "def f(x):", "12", "345", "0", "I'll", "DON'T"),
    *(" ", " ", " ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", " \n ", "\u00a0", "\u3000", "\u2028"),
    *(".", ",", "!", "?!", "...", "(", ")", "{'a': 1}", "<", ">", "|", "#", "=", "+=", "->", "▁", "▁▁", "\x00", "\x7f"),
    *("ü", "é", "e\u0301", "naïve", "ß", "İ", "ﬁ", "Å", "①", "½", "ａ", "ǅ", "\u0301", "\u200d", "\ufeff", "\u200b"),
    *("你好", "世界", "日本語", "한국어", "สวัสดี", "नमस्ते", "مرحبا", "שלום", "🙂", "👩‍👩‍👧", "🇩🇪", "𝔘𝔫𝔦", "\U0010ffff"),
    *("<0x41>", "<0xE4>", "<0x0A>", "[INST]", "<unk>", "<|im", "_end|>", "<|x|>"),
]


def strings(n: int, *, control: bool, seed: int = 1) -> list[str]:
    """Random texts; with ``control`` also the names of control and added tokens."""
    chance = random.Random(seed)
    parts = [*PARTS, *(PLAIN + CONTROL) * 2] if control else PARTS
    found = ["".join(chance.choices(parts, k=chance.randint(1, 12))) for _ in range(n * 4 // 5)]
    while len(found) < n:
        points = [chance.choice((0x20, 0x7F, 0x250, 0x3100, 0xD7FF, 0x1FAFF)) for _ in range(chance.randint(1, 9))]
        found.append("".join(chr(chance.randint(0x20, top)) for top in points if top > 0).replace("\ufdd0", ""))
    return [text for text in found if not any(0xD800 <= ord(c) < 0xE000 for c in text)]


@dataclass(frozen=True)
class Kind:
    """A vocabulary, and what its library makes of a text and of ids."""

    ours: Tokenizer
    typed: Callable[[str], list[int]]
    """Ids where control tokens are text."""
    meant: Callable[[str], list[int]] | None
    """Ids where they count."""
    decode: Callable[[list[int]], str]
    has: Callable[[int], bool] = lambda token_id: True
    """False for ids whose text the library makes up."""
    spells: Callable[[list[int]], bool] = lambda ids: True
    """False for ids that the library writes in another way than their file."""


def streamed(tokenizer: Tokenizer, ids: list[int], after: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer, after=after)
    return "".join(detokenizer.push(i)[0] for i in ids) + detokenizer.finish()


def check(kind: Kind, texts: list[str], seed: int = 2) -> None:
    chance = random.Random(seed)
    ours = kind.ours
    for text in texts:
        ids = ours.encode(text)
        assert ids == kind.typed(text), text
        assert ours.encode_mixed(text, [(0, len(text))]) == ids, text
        whole = kind.decode(ids)
        if kind.spells(ids) and (
            "\ufffd" not in whole or "\ufffd" in text
        ):  # how many marks stand for broken bytes is each library's own
            assert ours.decode(ids) == whole, (text, ids)
        whole = ours.decode(ids)
        assert streamed(ours, ids, []) == whole, (text, ids)
        cut = chance.randint(0, len(ids))
        before, after = ours.decode(ids[:cut]), ours.decode(ids[cut:], after=ids[:cut])
        if "\ufffd" not in before + after or "\ufffd" in text:
            assert before + after == whole, (text, ids, cut)
        assert streamed(ours, ids[cut:], ids[:cut]) == after, (text, ids, cut)
        if kind.meant is not None:
            meant = ours.encode(text, allow_special=True)
            assert meant == kind.meant(text), text
            assert ours.encode_mixed(text, []) == meant, text
            assert streamed(ours, meant, []) == ours.decode(meant), (text, meant)
            if kind.spells(meant) and "\ufffd" not in kind.decode(meant):
                assert ours.decode(meant) == kind.decode(meant), (text, meant)
    for _ in range(100):
        ids = [i for i in (chance.randrange(ours.n_vocab) for _ in range(chance.randint(1, 6))) if kind.has(i)]
        if kind.spells(ids) and "\ufffd" not in kind.decode(ids):
            assert ours.decode(ids) == kind.decode(ids), ids
        assert streamed(ours, ids, []) == ours.decode(ids), ids


# tokenizer.json ------------------------------------------------------------------------------------------------------


def _flags(content: str, token_id: int, **flags: bool) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": content,
        "special": False,
        "normalized": False,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
        **flags,
    }


def _added(first: int) -> list[dict[str, Any]]:
    return [
        _flags("<s>", first, special=True),
        _flags("</s>", first + 1, special=True, rstrip=True),
        _flags("<|im_start|>", first + 2, special=True, lstrip=True),
        _flags("<|im_end|>", first + 3, special=True),
        _flags("<tool>", first + 4, lstrip=True, rstrip=True),
        _flags("\n\n\n", first + 5),
        _flags("    ", first + 6),
        _flags("word", first + 7, single_word=True),
        _flags("Ŵnit", first + 8, normalized=True),
    ]


def _spec(
    model: Any, normalizer: Any = None, pre_tokenizer: Any = None, decoder: Any = None, added: bool = True
) -> dict[str, Any]:
    tokenizer = tokenizers.Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        tokenizer.decoder = decoder
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    if added:
        spec["added_tokens"] = _added(tokenizer.get_vocab_size())
    return spec


def _byte_level(**more: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    spec = vocabularies.bpe([])["model"]
    return spec["vocab"], [tuple(m.split(" ") if isinstance(m, str) else m) for m in spec["merges"]]


def _pieces(byte_fallback: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of marks for spaces, with the merges that joining by the lowest id gives."""
    words = ["▁", "▁▁", "▁▁▁▁", "▁t", "▁th", "▁the", "th", "he", "the", "in", "qu", "ic", "re", "ret", "▁b", "▁f"]
    letters = [c for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'()\n" if c not in words]
    names = ["<unk>", *([f"<0x{b:02X}>" for b in range(256)] if byte_fallback else []), *letters, *words]
    vocab = {text: i for i, text in enumerate(dict.fromkeys(names))}
    merges = [
        (text[:cut], text[cut:])
        for text in words
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    return vocab, merges


def _splits(name: str) -> Any:
    split = [pre_tokenizers.Split(tokenizers.Regex(p), behavior="isolated") for p in GGUF_PATTERNS[name].patterns]
    return pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _legacy_decoder() -> Any:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(steps)


def _llama(
    pre_tokenizer: Any, normalizer: Any, decoder: Any, byte_fallback: bool = True, unk: str | None = "<unk>"
) -> Any:
    vocab, merges = _pieces(byte_fallback)
    model = models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=byte_fallback)
    return _spec(model, normalizer, pre_tokenizer, decoder)


def _prepend() -> Any:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def _metaspace(scheme: str, split: bool = False) -> Any:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)


def _unigram(byte_fallback: bool) -> Any:
    vocab, _ = _pieces(byte_fallback)
    return models.Unigram([(text, -float(i) / 50) for text, i in vocab.items()], 0, byte_fallback)


JSON: dict[str, Callable[[], dict[str, Any]]] = {
    "gpt-2": lambda: _spec(models.BPE(*_byte_level()), None, pre_tokenizers.ByteLevel(False), decoders.ByteLevel()),
    "gpt-2 with a first space": lambda: _spec(
        models.BPE(*_byte_level()), None, pre_tokenizers.ByteLevel(True), decoders.ByteLevel()
    ),
    "llama-3": lambda: _spec(
        models.BPE(*_byte_level(), ignore_merges=True), None, _splits("llama-bpe"), decoders.ByteLevel()
    ),
    "qwen2": lambda: _spec(models.BPE(*_byte_level()), normalizers.NFC(), _splits("qwen2"), decoders.ByteLevel()),
    "nfkc": lambda: _spec(models.BPE(*_byte_level()), normalizers.NFKC(), _splits("smollm"), decoders.ByteLevel()),
    "lower case": lambda: _spec(
        models.BPE(*_byte_level()),
        normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]),
        pre_tokenizers.ByteLevel(False),
        decoders.ByteLevel(),
    ),
    "llama-2, legacy": lambda: _llama(None, _prepend(), _legacy_decoder()),
    "metaspace first": lambda: _llama(_metaspace("first"), None, _legacy_decoder()),
    "metaspace always": lambda: _llama(_metaspace("always"), None, _legacy_decoder()),
    "metaspace never": lambda: _llama(
        _metaspace("never"), None, decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    ),
    "metaspace decoder": lambda: _llama(_metaspace("always", True), None, decoders.Metaspace(prepend_scheme="always"), False),
    "metaspace decoder, first": lambda: _llama(
        _metaspace("first", True), None, decoders.Metaspace(prepend_scheme="first"), False
    ),
    "metaspace decoder, never": lambda: _llama(
        _metaspace("never", True), None, decoders.Metaspace(prepend_scheme="never"), False
    ),
    "strip two": lambda: _llama(
        None,
        _prepend(),
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 2, 0)]
        ),
    ),
    "strip each token": lambda: _llama(
        None, _prepend(), decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]), False
    ),
    "no bytes": lambda: _llama(None, _prepend(), _legacy_decoder(), byte_fallback=False),
    "no bytes, no unknown": lambda: _llama(None, _prepend(), _legacy_decoder(), byte_fallback=False, unk=None),
    "no decoder": lambda: _llama(pre_tokenizers.Whitespace(), None, None, byte_fallback=False),
    "unigram": lambda: _spec(
        _unigram(False), None, _metaspace("always", True), decoders.Metaspace(prepend_scheme="always")
    ),
    "unigram with bytes": lambda: _spec(_unigram(True), None, _metaspace("first"), _legacy_decoder()),
    "nmt": lambda: _spec(
        _unigram(False),
        normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]),
        _metaspace("always", True),
        decoders.Metaspace(prepend_scheme="always"),
    ),
}  # fmt: skip


def _json_kind(spec: dict[str, Any], folder: Path) -> Kind:
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    ours = load_directory(folder)
    assert ours is not None
    plain, full = (tokenizers.Tokenizer.from_str(json.dumps(spec)) for _ in range(2))
    plain.encode_special_tokens = True
    # tokenizers 0.23 writes an added token as the normalizer leaves it, 0.22 as the file declares it; so do we.
    respelt = {token["id"] for token in spec["added_tokens"] if full.id_to_token(token["id"]) != token["content"]}
    assert [ours.decode([i]) for i in respelt] == [t["content"] for t in spec["added_tokens"] if t["id"] in respelt]
    return Kind(
        ours,
        typed=lambda text: plain.encode(text, add_special_tokens=False).ids,
        meant=lambda text: full.encode(text, add_special_tokens=False).ids,
        decode=lambda ids: full.decode(ids, skip_special_tokens=True),
        spells=respelt.isdisjoint,
    )


@pytest.mark.parametrize("name", JSON)
def test_tokenizer_json_is_the_tokenizers_library(name: str, tmp_path: Path) -> None:
    check(_json_kind(JSON[name](), tmp_path), strings(150, control=True))


def test_a_typed_piece_of_a_unigram_vocabulary_is_no_control_token(tmp_path: Path) -> None:
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "<>/s▁aunk")]
    spec = _spec(models.Unigram(vocab, 0, False), None, _metaspace("always", True), decoders.Metaspace(), added=False)
    spec["added_tokens"] = [_flags(text, i, special=True) for i, text in enumerate(("<unk>", "<s>", "</s>"))]
    ours = _json_kind(spec, tmp_path).ours
    assert ours.encode("a<s>a</s>", allow_special=True).count(1) == 1
    assert not {0, 1, 2} & set(ours.encode("a<s>a</s><unk>"))
    assert ours.decode(ours.encode("a<s>a</s><unk>s")) == "a<s>a</s><unk>s"


def test_a_word_that_ignores_merges_is_no_control_token(tmp_path: Path) -> None:
    vocab, merges = _byte_level()
    spec = _spec(models.BPE({**vocab, "STOP": len(vocab)}, merges, ignore_merges=True), None, _splits("llama-bpe"))
    spec["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    spec["added_tokens"] = [_flags("[STOP]", len(vocab) + 1, special=True)]
    ours = _json_kind(spec, tmp_path).ours
    assert ours.encode("STOP") == [len(vocab)]
    assert len(vocab) + 1 not in ours.encode("[STOP]")


# SentencePiece -------------------------------------------------------------------------------------------------------

TRAINED: dict[str, dict[str, Any]] = {
    "llama": {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "grok": {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "defaults": {},
    "unigram": {"model_type": "unigram", "vocab_size": 90},
    "unigram with bytes": {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "nfkc"},
    "own symbols": {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<tool>", "word", "\n\n\n"],
    },
    "lower case": {"normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": True, "add_dummy_prefix": False},
}


def _train(folder: Path, **options: Any) -> Path:
    # The vocabulary is small, the texts are many kinds: what it has no piece for is the interesting part.
    sentences = [part for text in vocabularies.TEXTS for part in text.split("\n") if part] * 4
    defaults = {"vocab_size": 400, "model_type": "bpe", "character_coverage": 0.98, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "tokenizer"),
        minloglevel=2,
        **{**defaults, **options},
    )
    return folder / "tokenizer.model"


def _sentencepiece_kind(path: Path, ours: Tokenizer) -> Kind:
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    unknown = library.unk_id()
    return Kind(
        ours,
        typed=library.EncodeAsIds,
        meant=None,
        decode=lambda ids: library.DecodeIds([i for i in ids if i != unknown]),
        has=lambda token_id: token_id != unknown,
    )


@pytest.mark.parametrize("name", TRAINED)
def test_a_sentencepiece_model_is_the_sentencepiece_library(name: str, tmp_path: Path) -> None:
    path = _train(tmp_path, **TRAINED[name])
    check(_sentencepiece_kind(path, load_sentencepiece(path)), strings(150, control=True))


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "own symbols"])
def test_a_sentencepiece_model_is_the_same_in_gguf_and_back(name: str, tmp_path: Path) -> None:
    path = _train(tmp_path, **TRAINED[name])
    table = gguf_vocabulary.from_directory(tmp_path)
    assert table is not None
    metadata = {key: value for key, (_, value) in table.items()}
    in_gguf = load_gguf(metadata)
    assert in_gguf is not None
    check(_sentencepiece_kind(path, in_gguf), strings(100, control=True))
    back = tmp_path / "back"
    back.mkdir()
    for file, content in gguf_vocabulary.to_files(metadata).items():
        (back / file).write_bytes(content)
    again = load_directory(back)
    assert again is not None
    check(_sentencepiece_kind(path, again), strings(100, control=True))
    assert (again.bos_id, again.eos_ids, again.special_ids) == (in_gguf.bos_id, in_gguf.eos_ids, in_gguf.special_ids)


# The others ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", sorted(GGUF_PATTERNS))
def test_a_byte_level_vocabulary_in_gguf_is_the_tokenizers_library(pre: str, tmp_path: Path) -> None:
    metadata = vocabularies.gguf_bpe() | {"tokenizer.ggml.pre": pre}
    ours = load_gguf(metadata)
    assert ours is not None
    spec = vocabularies.bpe()
    split = GGUF_PATTERNS[pre]
    library = tokenizers.Tokenizer(
        models.BPE.from_file(*_model_files(spec["model"], tmp_path), ignore_merges=split.whole_words)
    )
    library.pre_tokenizer = _splits(pre)
    library.decoder = decoders.ByteLevel()
    if split.normalizer == "NFC":
        library.normalizer = normalizers.NFC()
    library.add_special_tokens(vocabularies.SPECIALS)
    plain = tokenizers.Tokenizer.from_str(library.to_str())
    plain.encode_special_tokens = True
    kind = Kind(
        ours,
        typed=lambda text: plain.encode(text).ids,
        meant=lambda text: library.encode(text).ids,
        decode=lambda ids: library.decode(ids, skip_special_tokens=True),
    )
    check(kind, strings(100, control=True))


def _model_files(model: dict[str, Any], folder: Path) -> tuple[str, str]:
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(merges))
    return str(folder / "vocab.json"), str(folder / "merges.txt")


def test_ranks_are_the_tiktoken_library() -> None:
    ranks = {bytes([b]): b for b in range(256)}
    for word in (b"th", b"the", b" the", b"in", b"qu", b"ret", b"    ", b"\n\n", "你".encode(), b"<|"):
        for cut in range(2, len(word) + 1):
            ranks.setdefault(word[:cut], len(ranks))
    special = {text: len(ranks) + i for i, text in enumerate(CONTROL)}
    vocabulary = TiktokenVocabulary(ranks, special)
    library = tiktoken.Encoding(
        "small", pat_str=vocabulary._encoding._pat_str, mergeable_ranks=ranks, special_tokens=special
    )
    kind = Kind(
        Tokenizer(vocabulary, special_ids=special),
        typed=lambda text: library.encode(text, disallowed_special=()),
        meant=lambda text: library.encode(text, allowed_special="all"),
        decode=lambda ids: library.decode([i for i in ids if i < len(ranks)], errors="replace"),
    )
    check(kind, strings(200, control=True))
