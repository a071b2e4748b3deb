"""What a GGUF file's vocabulary leaves out is what llama.cpp takes for it, and it is said."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from quadriga.errors import TokenizerError
from quadriga.text import gguf_spec
from quadriga.text.decoders import byte_alphabet
from quadriga.text.pretokenize import GGUF_PATTERNS, pattern_of_vocabulary
from quadriga.text.tokenizer import Tokenizer, load_gguf
from tests.golden import vocabularies as golden
from tests.text import vocabularies

BYTES = {value: character for character, value in byte_alphabet().items()}


def _bpe(**changes: Any) -> dict[str, Any]:
    table = vocabularies.gguf_bpe() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in table.items() if value is not None}


def _load(metadata: dict[str, Any]) -> Tokenizer:
    tokenizer = load_gguf(metadata)
    assert tokenizer is not None
    return tokenizer


def _library(patterns: tuple[str, ...]) -> Any:
    """The same vocabulary in the tokenizers library, split by patterns one after the other."""
    model = vocabularies.bpe()["model"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    library = tokenizers.Tokenizer(models.BPE(model["vocab"], merges))
    splits = [pre_tokenizers.Split(tokenizers.Regex(p), behavior="isolated") for p in patterns]
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    return library


# src/llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_DEFAULT; its second pattern leaves a last run of spaces to itself.
LLAMA_CPP_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)


@pytest.mark.parametrize("pre", [None, "default"])
def test_a_vocabulary_without_a_rule_is_split_as_llama_cpp_splits_it(
    pre: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = _load(_bpe(pre=pre))
    library = _library(LLAMA_CPP_DEFAULT)
    for text in (*vocabularies.TEXTS, "HELLO'S 1234567\n\n  x=\t1", " (a)  b\n", "the quick, 12 3456!  "):
        assert tokenizer.encode(text) == library.encode(text).ids, text
    assert ("tokenizer.ggml.pre" in caplog.text) == (pre is None)
    if pre is None:
        assert "llama.cpp" in caplog.text


@pytest.mark.parametrize(("architecture", "pre"), [("dbrx", "dbrx"), ("mpt", "mpt")])
def test_the_architecture_says_the_rule_where_all_its_models_have_one(
    architecture: str, pre: str, caplog: pytest.LogCaptureFixture
) -> None:
    silent = _load(_bpe(pre=None) | {"general.architecture": architecture})
    named = _load(_bpe(pre=pre))
    for text in (*vocabularies.TEXTS, "HELLO'S 1234567 e\u0301"):
        assert silent.encode(text) == named.encode(text)
    assert f"those of '{pre}'" in caplog.text


def _words(*more: str) -> list[str]:
    """A vocabulary large enough to tell by, in GPT-2's alphabet: words that every rule leaves whole, and more."""
    letters = "abcdefghijklmnopqrst"
    words = [f" {a}{b}{c}" for a in letters for b in letters for c in letters]
    return ["".join(BYTES[b] for b in word.encode()) for word in [*words, *more]]


CODE = [f"({a}{b}" for a in "abcdefgh" for b in "abcdefgh"] + [");\n", "{\n\n", "\n\n"] * 9
BLOCKS = ["\n" + " " * n for n in range(1, 60)] + [" \n "]


@pytest.mark.parametrize(
    ("more", "pre"),
    [
        ([*CODE, *(str(n) for n in range(100, 999))], "llama-bpe"),
        ([*CODE, *"0123456789"], "qwen2"),
        ([*BLOCKS, *"0123456789"], "smollm"),
        ([*BLOCKS, *(f" {n}" for n in range(1000, 3000))], "gpt-2"),
    ],
)
def test_a_large_vocabulary_says_the_rule_it_was_trained_with(more: list[str], pre: str) -> None:
    assert pattern_of_vocabulary(_words(*more)) == pre


def test_a_vocabulary_that_leaves_it_open_says_nothing() -> None:
    assert pattern_of_vocabulary(_words(*CODE[:64])[:4000]) is None, "too few"
    assert pattern_of_vocabulary(_words("0")) is None, "two rules fit"
    assert pattern_of_vocabulary([]) is None


def test_llama_3_begins_every_text_with_bos_unless_the_file_says_otherwise() -> None:
    assert _load(_bpe(pre="llama-bpe")).prefix_ids == [1]
    assert _load(_bpe(pre="llama-bpe", add_bos_token=False)).prefix_ids == []
    assert _load(_bpe(pre="gpt-2")).prefix_ids == []
    assert _load(_bpe(pre="gpt-2", add_bos_token=True)).prefix_ids == [1]
    assert _load(_bpe(pre="glm4")).prefix_ids == _load(_bpe(pre="chatglm-bpe")).prefix_ids == []


def test_rules_that_several_families_share() -> None:
    patterns = {name: GGUF_PATTERNS[name].patterns for name in GGUF_PATTERNS}
    assert patterns["glm4"] == patterns["chatglm-bpe"] == patterns["llama-bpe"]
    assert patterns["minimax-m2"] == patterns["gpt-4o"]
    assert patterns["hunyuan"] == patterns["qwen2"] and GGUF_PATTERNS["hunyuan"].normalizer is None


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("qwen2", "\u0e17\u0e35\u0e48 x", ["\u0e17", "\u0e35\u0e48", " x"]),  # a Thai letter and its two marks
        ("qwen35", "\u0e17\u0e35\u0e48 x", ["\u0e17\u0e35\u0e48", " x"]),
        ("qwen35", "it's 42!\n", ["it", "'s", " ", "4", "2", "!\n"]),
        ("tekken", "getHTTP's 42", ["get", "HTTP", "'s", " ", "4", "2"]),
        ("gpt-4o", "getHTTP's 42", ["get", "HTTP's", " ", "42"]),
        ("seed-coder", "a;\nb", ["a", ";", "\n", "b"]),
        ("qwen2", "a;\nb", ["a", ";\n", "b"]),
        ("bailingmoe", "a\n\n\nb", ["a", "\n\n\n", "b"]),
        ("smaug-bpe", "1234", ["123", "4"]),
        ("lfm2", "1234", ["123", "4"]),
        ("mellum2", "12 a", ["1", "2", " a"]),
        ("deepseek-coder", "don't 42\n\u4e16\u754c x", ["don", "'", "t", " ", "4", "2", "\n", "\u4e16\u754c", " x"]),
        ("minicpm5", "it'S 1234;\n", ["it", "'S", " ", "123", "4", ";\n"]),
        (
            "kimi-k2",
            "getHTTP's x\u6f22\u5b57a 1234;\n/",
            ["get", "HTTP's", " x", "\u6f22\u5b57", "a", " ", "123", "4", ";\n", "/"],
        ),
        ("hunyuan-dense", "x1234", ["x", "123", "4"]),
        ("kormo", "e\u0301 12", ["e", "\u0301", " ", "1", "2"]),
    ],
)
def test_where_rules_cut(pre: str, text: str, words: list[str]) -> None:
    parts = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in GGUF_PATTERNS[pre].patterns]
    assert [word for word, _ in pre_tokenizers.Sequence(parts).pre_tokenize_str(text)] == words


def test_what_stands_around_a_text(caplog: pytest.LogCaptureFixture) -> None:
    assert _load(_bpe(add_eos_token=True)).suffix_ids == [2]
    assert "after every prompt" in caplog.text
    assert _load(_spm()).prefix_ids == [1]
    assert _load(_spm(add_bos_token=False)).prefix_ids == []
    assert _load(_spm(add_eos_token=True)).suffix_ids == [2]


def _spm(added: list[tuple[str, int]] | None = None, **changes: Any) -> dict[str, Any]:
    rows = [(p.text, p.score, p.kind) for p in golden.model().pieces]
    rows += [(text, -1000.0, kind) for text, kind in added or []]
    table: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text for text, _, _ in rows],
        "tokenizer.ggml.scores": [score for _, score, _ in rows],
        "tokenizer.ggml.token_type": [kind for _, _, kind in rows],
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }
    return {key: value for key, value in table.items() if value is not None}


def test_a_space_before_the_first_word_and_after_special_tokens_unless_the_file_says_otherwise() -> None:
    the, word = (next(i for i, p in enumerate(golden.model().pieces) if p.text == t) for t in ("▁the", "word"))
    mark, n = ("<|a|>", 3), golden.N
    assert _load(_spm([mark])).encode("the<|a|>the", allow_special=True) == [the, n, the]
    bare = _load(_spm([mark], add_space_prefix=False))
    assert bare.encode("word<|a|>word", allow_special=True) == [word, n, word]
    assert bare.decode([the]) == " the"


def test_types_of_tokens_mean_what_they_mean_in_llama_cpp() -> None:
    n = golden.N
    tokenizer = _load(_spm([("<c>", 3), ("<u>", 4), ("<n>", 5), ("  x", 4)], unknown_token_id=0))
    assert n not in tokenizer.encode("<c>")
    assert tokenizer.encode("<c>", allow_special=True) == [n]
    assert tokenizer.encode("<u>") == [n + 1], "a user-defined token is text like any other"
    assert tokenizer.decode([n + 1]) == "<u>"
    assert n + 2 not in tokenizer.encode("<n>", allow_special=True), "an unused one is never written"
    assert n + 3 in tokenizer.encode("a  xb")
    assert tokenizer.decode([13, n + 3]) == "\n  x"
    assert tokenizer.decode([3 + 0x41]) == "A", "a byte"
    assert tokenizer.special_ids.keys() >= {"<unk>", "<s>", "</s>", "<c>"}


def test_a_file_without_types_is_read_by_the_texts() -> None:
    without = _load(_spm(token_type=None))
    with_types = _load(_spm())
    for text in golden.TEXTS:
        assert without.encode(text) == with_types.encode(text)
    assert without.special_ids == with_types.special_ids


def test_empty_tokens_are_unused_and_doubled_ones_an_error() -> None:
    tokenizer = _load(_spm([("", 1), ("<|a|>", 3)]))
    assert tokenizer.encode("<|a|>", allow_special=True) == [golden.N + 1]
    with pytest.raises(TokenizerError, match="the"):
        load_gguf(_spm([("▁the", 1)]))
    tokens = vocabularies.gguf_bpe()["tokenizer.ggml.tokens"]
    with pytest.raises(TokenizerError, match="twice: 'a'"):
        load_gguf(_bpe(tokens=[*tokens, "a"], token_type=[1] * (len(tokens) + 1)))


def test_a_role_makes_a_token_special_if_it_is_a_name_and_no_word() -> None:
    tokens = vocabularies.gguf_bpe()["tokenizer.ggml.tokens"]
    exclamation = tokens.index("!")
    tokenizer = _load(_bpe(padding_token_id=exclamation, token_type=[1] * len(tokens)))
    assert tokenizer.pad_id == exclamation
    assert tokenizer.decode(tokenizer.encode("a!")) == "a!"
    assert tokenizer.special_ids["<|im_end|>"] == 2, "the eos token, whose type is that of a word"
    assert tokenizer.eos_ids == (2,)


def test_gemma_4s_vocabulary_marks_spaces_and_writes_what_is_no_piece_in_bytes() -> None:
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "a", "b", "ab", "▁ab", "\n", "\n\n", "<|turn>", "é"]
    kinds = [3, 3, 3, 2, *([6] * 256), *([1] * 7), 3, 1]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [0.0] * len(words),
        "tokenizer.ggml.merges": ["a b", "▁ ab", "\n \n"],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer, ids = _load(metadata), {word: i for i, word in enumerate(words)}
    pieces = ["ab", "▁ab", "▁", "▁", "a", "\n\n", "é", "<0xC3>", "<0x9F>"]
    assert tokenizer.prefix_ids == [2]
    assert tokenizer.encode("ab ab  a\n\néß") == [ids[piece] for piece in pieces]
    assert tokenizer.decode([ids[piece] for piece in pieces]) == "ab ab  a\n\néß"
    assert ids["<|turn>"] not in tokenizer.encode("<|turn>"), "what a user types is no control token"
    with pytest.raises(TokenizerError, match=r"merges must be pairs"):
        load_gguf(metadata | {"tokenizer.ggml.merges": ["ab"]})


def test_a_unigram_vocabulary_is_a_unigram_vocabulary() -> None:
    rows = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("▁", -3.0, 1), ("a", -2.0, 1), ("b", -2.0, 1)]
    rows += [("▁a", -9.0, 1), ("ab", -2.5, 1)]  # as bpe, "ab" would be "▁" "ab"; by probability "▁a" never pays
    table: dict[str, Any] = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": [text for text, _, _ in rows],
        "tokenizer.ggml.scores": [score for _, score, _ in rows],
        "tokenizer.ggml.token_type": [kind for _, _, kind in rows],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.remove_extra_whitespaces": True,
        "tokenizer.ggml.add_space_prefix": True,
    }
    tokenizer = _load(table)
    assert tokenizer.encode("ab  a ") == [3, 7, 3, 4]
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ([], [1])
    assert gguf_spec.sentencepiece(gguf_spec.tokens_of(table), table).remove_extra_whitespaces


def test_every_rule_is_a_pattern_that_the_library_reads() -> None:
    for split in GGUF_PATTERNS.values():
        for pattern in split.patterns:
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")


def cut(name: str, text: str) -> list[str]:
    parts = [pre_tokenizers.Split(tokenizers.Regex(p), behavior="isolated") for p in GGUF_PATTERNS[name].patterns]
    return [part for part, _ in pre_tokenizers.Sequence(parts).pre_tokenize_str(text)]


def test_deepseeks_rules_by_hand() -> None:
    """The tokenizer.json files of DeepSeek-V2-Lite and DeepSeek-V3. V2's marks have ASCII's letters among them, which are
    cut out of words with others."""
    text = "Don't go 12345日本語です x+y.\n\n  été ΰ"
    assert cut("deepseek-llm", text) == [
        *("Don", "'", "t", " go", " ", "1", "2", "3", "4", "5", "日本語です", " x", "+", "y", ".", "\n", "\n", " "),
        *(" é", "t", "é", " ΰ"),
    ]
    assert cut("deepseek-v3", text) == [
        *("Don", "'t", " go", " ", "123", "45", "日本語です", " x", "+y", ".\n\n", " ", " été", " ΰ"),
    ]


def test_gpt_4os_rule_cuts_words_at_capitals_and_keeps_their_endings() -> None:
    """openai/tiktoken's o200k_base, by hand."""
    cut = pre_tokenizers.Split(tokenizers.Regex(GGUF_PATTERNS["gpt-4o"].patterns[0]), behavior="isolated")
    parts = [text for text, _ in cut.pre_tokenize_str("HelloWorld, DON'T 12345 x//\n\n  yЖж été")]
    assert parts == ["Hello", "World", ",", " DON'T", " ", "123", "45", " x", "//\n\n", " ", " y", "Жж", " été"]


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"add_bos_token": "false"}, "add_bos_token must be true or false, got 'false'"),
    ({"add_eos_token": 1}, "add_eos_token must be true or false, got '1'"),
    ({"bos_token_id": True}, "bos_token_id must be below"),
    ({"eos_token_id": 1.0}, "eos_token_id must be below"),
    ({"padding_token_id": -1}, "padding_token_id must be below"),
]


@pytest.mark.parametrize(("changes", "message"), HOSTILE)
def test_values_of_other_types_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        load_gguf(_bpe(**changes))


@pytest.mark.parametrize("kind", [7, -1, "1", None, 1.0, True])
def test_types_of_tokens_are_numbers_that_mean_something(kind: Any) -> None:
    kinds = [*vocabularies.gguf_bpe()["tokenizer.ggml.token_type"]]
    kinds[3] = kind
    with pytest.raises(TokenizerError, match="token_type must be numbers from 0 to 6"):
        load_gguf(_bpe(token_type=kinds))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_space_prefix": 0}, "add_space_prefix must be true or false, got '0'"),
        ({"remove_extra_whitespaces": "yes"}, "remove_extra_whitespaces must be true or false"),
        ({"scores": "nan"}, "scores must be numbers, got nan"),
        ({"scores": "text"}, "scores must be numbers, got x"),
    ],
)
def test_sentencepiece_vocabularies_likewise(changes: dict[str, Any], message: str) -> None:
    scores = [*_spm()["tokenizer.ggml.scores"]]
    scores[5] = {"nan": float("nan"), "text": "x"}.get(str(changes.get("scores")), scores[5])
    values = changes | {"scores": scores}
    with pytest.raises(TokenizerError, match=message):
        load_gguf(_spm(**values))


def test_keys_that_nobody_reads_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    _load(_bpe(fim_pre_token_id=3, add_sep_token=False, cls_token_id=2))
    assert "not read" not in caplog.text
    _load(_bpe(lowercase=True, suppress_tokens=[1]))
    assert caplog.text.count("not read: tokenizer.ggml.lowercase, tokenizer.ggml.suppress_tokens") == 1


def test_unigrams_have_no_space_before_them_unless_the_file_says_so() -> None:
    """As llama.cpp has it, where files of model "llama" have one; converters write the key."""
    assert gguf_spec.sentencepiece(gguf_spec.tokens_of(_spm()), _spm()).add_space_prefix
    silent, said = _spm(model="t5"), _spm(model="t5", add_space_prefix=True)
    assert not gguf_spec.sentencepiece(gguf_spec.tokens_of(silent), silent).add_space_prefix
    assert gguf_spec.sentencepiece(gguf_spec.tokens_of(said), said).add_space_prefix
