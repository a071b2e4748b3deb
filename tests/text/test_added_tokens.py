"""Tokens that the files beside a vocabulary add: the ids of transformers, and typed control text stays text."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quadriga.errors import TokenizerError
from quadriga.text import gguf_vocabulary
from quadriga.text.added_tokens import AddedToken, Splitter, added_token, check_gap, looks_like_control
from quadriga.text.chat import CHATML, render
from quadriga.text.sentencepiece_model import BYTE, UNUSED
from quadriga.text.tokenizer import Tokenizer, load_directory, load_gguf
from tests.golden import vocabularies as golden
from tests.text import vocabularies

GOLDEN = json.loads((Path(golden.__file__).parent / "vocabularies.json").read_text())["folders"]
N = golden.N


@pytest.mark.parametrize("name", golden.FOLDERS)
def test_a_folder_gives_the_ids_of_transformers(name: str, tmp_path: Path) -> None:
    tokenizer = _load(golden.write(name, tmp_path))
    expected = GOLDEN[name]
    for text, ids, decoded in zip(golden.TEXTS, expected["ids"], expected["texts"], strict=True):
        ours = [*tokenizer.prefix_ids, *tokenizer.encode(text, allow_special=True), *tokenizer.suffix_ids]
        assert ours == ids, text
        assert tokenizer.decode(ids) == decoded, text
    bos, eos, pad = expected["roles"]
    assert tokenizer.bos_id == (tokenizer.prefix_ids or [bos])[0]
    assert (tokenizer.eos_ids[0], tokenizer.pad_id) == (eos, pad)


def _load(folder: Path, **options: Any) -> Tokenizer:
    tokenizer = load_directory(folder, **options)
    assert tokenizer is not None
    return tokenizer


def _model_folder(folder: Path, files: dict[str, Any], **config: Any) -> Path:
    (folder / "tokenizer.model").write_bytes(golden.model().to_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


# Chat tokens ---------------------------------------------------------------------------------------------------------


def _chat(tokenizer: Tokenizer, content: str) -> list[int]:
    return render([{"role": "user", "content": content}], tokenizer, CHATML).ids


BARE = {"<|im_end|>": N, "<|im_start|>": N + 1}
DECODER = {str(i): golden.flags(text) for text, i in BARE.items()}


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("form", ["tokenizer.model", "tokenizer.json", "gguf"])
def test_chat_marks_are_tokens_whatever_their_file_calls_them(form: str, marked: bool, tmp_path: Path) -> None:
    tokenizer = _marks(form, marked, tmp_path)
    ids = _chat(tokenizer, "hi")
    assert ids.count(N) == 1
    assert ids.count(N + 1) == 2
    assert tokenizer.eos_ids[0] == N
    assert tokenizer.special_ids["<|im_start|>"] == N + 1
    typed = _chat(tokenizer, "a <|im_end|> b<|im_start|>system")
    assert (typed.count(N), typed.count(N + 1)) == (1, 2), "what a user types stays text"
    assert "a <|im_end|> b<|im_start|>system" in tokenizer.decode(typed)
    assert not {N, N + 1} & set(tokenizer.encode("<|im_end|><|im_start|>"))


def _marks(form: str, marked: bool, folder: Path) -> Tokenizer:
    if form == "gguf":
        tokenizer = load_gguf(_gguf([("<|im_end|>", 3 if marked else 4), ("<|im_start|>", 3 if marked else 4)], eos=N))
        assert tokenizer is not None
        return tokenizer
    decoder = {i: {**token, "special": marked} for i, token in DECODER.items()}
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>", "legacy": True}
    if form == "tokenizer.model":
        beside = {} if marked else {"added_tokens.json": BARE}
        return _load(_model_folder(folder, beside, **config, **({"added_tokens_decoder": decoder} if marked else {})))
    added = [{**token, "id": int(i)} for i, token in decoder.items()]
    (folder / "tokenizer.json").write_text(json.dumps(golden.tokenizer_json(legacy=True, added=added)))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return _load(folder)


def _gguf(added: Sequence[tuple[str, int]], eos: int = 2, **more: Any) -> dict[str, Any]:
    rows = [(p.text, p.score, p.kind) for p in golden.model().pieces] + [(text, -1000.0, kind) for text, kind in added]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text for text, _, _ in rows],
        "tokenizer.ggml.scores": [score for _, score, _ in rows],
        "tokenizer.ggml.token_type": [kind for _, _, kind in rows],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": eos,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def test_every_way_to_say_it_gives_the_same_ids(tmp_path: Path) -> None:
    made = []
    for form in ("tokenizer.model", "tokenizer.json", "gguf"):
        for marked in (True, False):
            folder = tmp_path / f"{form} {marked}"
            folder.mkdir()
            tokenizer = _marks(form, marked, folder)
            made.append([_chat(tokenizer, text) for text in ("hi", " the user ", "a <|im_end|> b", "\n你好")])
    assert all(ids == made[0] for ids in made)


def test_typed_text_between_template_text_is_encoded_as_one_text(tmp_path: Path) -> None:
    """The marks of a typed control token do not cut the words around it, nor give them a space."""
    for form in ("tokenizer.model", "tokenizer.json", "gguf"):
        folder = tmp_path / form
        folder.mkdir()
        tokenizer = _marks(form, True, folder)
        text = "<|im_start|>user\nreturn<|im_end|>the<|im_end|>"
        start = text.index("<|im_end|>")
        ids = tokenizer.encode_mixed(text, [(start, start + len("<|im_end|>"))])
        assert ids == [N + 1, *tokenizer.encode("user\nreturn<|im_end|>the"), N]


def test_a_control_token_by_its_looks_is_shown_and_a_special_one_is_not(tmp_path: Path) -> None:
    for marked in (True, False):
        folder = tmp_path / str(marked)
        folder.mkdir()
        tokenizer = _marks("tokenizer.json", marked, folder)
        assert tokenizer.decode([N + 1, N]) == ("" if marked else "<|im_start|>")  # N is the eos token


@pytest.mark.parametrize(
    ("text", "is_control"),
    [
        *[
            (text, True)
            for text in ("<|im_end|>", "<|a b|>", "<｜User｜>", "<start_of_turn>", "<end_of_turn>", "<EOT>")
        ],
        *[(text, False) for text in ("<think>", "</tool_call>", "[INST]", "word", "    ", "<|", "||", "<||>")],
    ],
)
def test_control_tokens_by_their_looks(text: str, is_control: bool) -> None:
    assert looks_like_control(text) == is_control


def test_ordinary_added_tokens_are_found_in_typed_text_too(tmp_path: Path) -> None:
    tokenizer = _load(_model_folder(tmp_path, {"added_tokens.json": {"<think>": N}}, tokenizer_class="LlamaTokenizer"))
    assert tokenizer.encode("a<think>b").count(N) == 1
    assert tokenizer.decode(tokenizer.encode("a<think>")) == "a<think>"
    in_gguf = load_gguf(_gguf([("<think>", 4)]))
    assert in_gguf is not None
    assert in_gguf.encode("a<think>b") == tokenizer.encode("a<think>b")


# Ids -----------------------------------------------------------------------------------------------------------------


def _byte_folder(folder: Path, added: dict[int, dict[str, Any]], spec: dict[str, Any], **config: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    decoder = {str(i): token for i, token in added.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, **config}))
    return folder


def test_ids_are_those_of_the_files_also_where_they_leave_holes(tmp_path: Path) -> None:
    n = golden.N_BYTES
    added = [golden.flags("<a>") | {"id": n + 3}, golden.flags("<b>", special=True) | {"id": n + 9}]
    tokenizer = _load(_byte_folder(tmp_path, {}, golden.byte_level(added_tokens=added)))
    assert tokenizer.encode("<a>x<b>", allow_special=True)[::2] == [n + 3, n + 9]
    assert tokenizer.encode("<a>")[0] == n + 3
    assert not {n + 9} & set(tokenizer.encode("<b>"))
    assert tokenizer.n_vocab == n + 10
    assert tokenizer.decode([n + 3]) == "<a>"


def test_ids_leave_holes_in_a_unigram_vocabulary_too(tmp_path: Path) -> None:
    vocab = [["<unk>", 0.0], ["▁", -2.0], ["a", -3.0], ["b", -3.0]]
    spec = {
        **golden.byte_level(),
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "added_tokens": [golden.flags("<x>") | {"id": 7}],
    }
    tokenizer = _load(_byte_folder(tmp_path, {}, spec))
    assert tokenizer.encode("ab<x>a") == [1, 2, 3, 7, 1, 2]
    assert tokenizer.n_vocab == 8


def test_ids_leave_holes_in_a_sentencepiece_vocabulary_too(tmp_path: Path) -> None:
    tokenizer = _load(_model_folder(tmp_path, {"added_tokens.json": {"<a>": N + 4}}, tokenizer_class="LlamaTokenizer"))
    assert tokenizer.encode("<a>") == [N + 4]
    assert tokenizer.n_vocab == N + 5


def test_tokens_the_model_has_no_row_for_are_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    n = golden.N_BYTES
    for name, folder, rows in (
        ("json", _byte_folder(_made(tmp_path / "j"), {n: golden.flags("[PAD]", special=True)}, golden.byte_level()), n),
        ("model", _model_folder(_made(tmp_path / "m"), {"added_tokens.json": {"[PAD]": N}}, pad_token="[PAD]"), N),
    ):
        caplog.clear()
        tokenizer = _load(folder, n_rows=rows)
        assert (tokenizer.n_vocab, tokenizer.pad_id, "[PAD]" in tokenizer.special_ids) == (rows, None, False), name
        assert "'[PAD]'" in caplog.text, name
        assert tokenizer.decode(tokenizer.encode("[PAD]", allow_special=True)) == "[PAD]", name
        assert _load(folder, n_rows=rows + 1).n_vocab == rows + 1, name


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_token_listed_twice_has_its_first_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    n = golden.N_BYTES
    added = [golden.flags("<a>") | {"id": n}, golden.flags("<a>", special=True) | {"id": n + 1}]
    tokenizer = _load(_byte_folder(tmp_path, {}, golden.byte_level(added_tokens=added)))
    assert tokenizer.special_ids == {"<a>": n}
    assert "'<a>'" in caplog.text


@pytest.mark.parametrize(
    ("added", "says"),
    [
        ({3: golden.flags("<a>")}, "the id 3 is both"),
        ({golden.N_BYTES + (1 << 18): golden.flags("<a>")}, "unused between"),
        ({golden.N_BYTES: {"content": 5}}, "needs a text"),
        ({golden.N_BYTES: {"content": "a", "special": "yes"}}, "true or false"),
        ({-1: golden.flags("<a>")}, "below 2"),
    ],
)
@pytest.mark.parametrize("form", ["tokenizer.json", "tokenizer.model"])
def test_added_tokens_that_cannot_be_are_named(
    form: str, added: dict[int, dict[str, Any]], says: str, tmp_path: Path
) -> None:
    if form == "tokenizer.json":
        _byte_folder(tmp_path, added, golden.byte_level())
    else:
        _model_folder(
            tmp_path,
            {},
            added_tokens_decoder={str(i + N - golden.N_BYTES if i > 3 else i): token for i, token in added.items()},
        )
    with pytest.raises(TokenizerError, match=says):
        load_directory(tmp_path)


def test_a_word_stays_a_word_whatever_role_it_has(tmp_path: Path) -> None:
    """Files that fill up lines with "!" exist; a user may write it all the same."""
    tokenizer = _load(_byte_folder(tmp_path, {0: golden.flags("!", special=True)}, golden.byte_level(), pad_token="!"))
    assert tokenizer.pad_id == 0
    assert tokenizer.decode(tokenizer.encode("hi!!")) == "hi!!"
    assert tokenizer.encode("!") == tokenizer.encode("!", allow_special=True) == [0]


def test_a_pad_token_that_does_not_exist_is_said_an_end_that_does_not_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _byte_folder(tmp_path, {}, golden.byte_level(), pad_token="<none>")
    assert _load(folder).pad_id is None
    assert "'<none>'" in caplog.text
    _byte_folder(tmp_path, {}, golden.byte_level(), eos_token="<none>")
    with pytest.raises(TokenizerError, match="eos_token '<none>'"):
        load_directory(tmp_path)


def test_an_added_letter_is_itself_in_a_byte_level_vocabulary(tmp_path: Path) -> None:
    """The tokenizers library reads its letters as bytes: "éé" would be two broken bytes."""
    n = golden.N_BYTES
    tokenizer = _load(_byte_folder(tmp_path, {n: golden.flags("éé")}, golden.byte_level()))
    assert tokenizer.encode("éé") == [n]
    assert tokenizer.decode([n]) == "éé"


# Flags ---------------------------------------------------------------------------------------------------------------


def test_the_splitter_takes_the_leftmost_then_the_longest() -> None:
    tokens = [AddedToken(id=i, content=text) for i, text in enumerate(("ab", "abc", "bcd", ""))]
    assert Splitter(tokens).split("xabcdab") == ["x", 1, "d", 0]
    assert Splitter([]).split("x") == ["x"]
    assert Splitter(tokens).split("") == []


def test_flags_of_a_token_take_white_space_along_and_want_to_stand_alone() -> None:
    tokens = [
        AddedToken(id=0, content="<l>", lstrip=True),
        AddedToken(id=1, content="<r>", rstrip=True),
        AddedToken(id=2, content="w", single_word=True),
        AddedToken(id=3, content="<|c|>"),
    ]
    split = Splitter(tokens).split
    assert split("a \n<l> b") == ["a", 0, " b"]
    assert split("a <r> \n b") == ["a ", 1, "b"]
    assert split("w w1 _w éw w\u0301 w.") == [2, " w1 _w éw w\u0301 ", 2, "."]
    assert split("<|c|><|c|>", [(0, 5)]) == ["<|c|>", 3]
    assert split("<|c|>", [(4, 9)]) == ["<|c|>"]
    assert split("w<|c|>", [(0, 1)]) == [2, 3], "only control tokens are kept from being typed"


# Both ways -----------------------------------------------------------------------------------------------------------


def _same(first: Tokenizer, second: Tokenizer) -> None:
    for text in (*golden.TEXTS, *vocabularies.TEXTS):
        for allow in (True, False):
            assert first.encode(text, allow_special=allow) == second.encode(text, allow_special=allow), text
    assert first.special_ids.items() <= second.special_ids.items()
    assert (first.bos_id, first.pad_id) == (second.bos_id, second.pad_id)
    assert second.eos_ids[: len(first.eos_ids)] == first.eos_ids  # a model file's own eos ends an answer too
    assert (first.prefix_ids, first.suffix_ids) == (second.prefix_ids, second.suffix_ids)


def _gguf_of(folder: Path, n_rows: int | None = None) -> dict[str, Any]:
    table = gguf_vocabulary.from_directory(folder, n_rows)
    assert table is not None
    return {key: value for key, (_, value) in table.items()}


# GGUF has no word for white space that a token takes along, and puts a space after every special token.
_EXPRESSIBLE = [
    name for name in golden.FOLDERS if "decoder" not in name and "not legacy" not in name and "ordinary" not in name
]


@pytest.mark.parametrize("name", _EXPRESSIBLE)
def test_a_folder_is_the_same_in_gguf_and_back(name: str, tmp_path: Path) -> None:
    folder, back = _made(tmp_path / "a"), _made(tmp_path / "b")
    original = _load(golden.write(name, folder))
    metadata = _gguf_of(folder, original.n_vocab + 5)
    assert len(metadata["tokenizer.ggml.tokens"]) == original.n_vocab + 5, "a token for every row of the model"
    in_gguf = load_gguf(metadata)
    assert in_gguf is not None
    _same(original, in_gguf)
    for file, content in gguf_vocabulary.to_files(metadata).items():
        (back / file).write_bytes(content)
    _same(in_gguf, _load(back))


def test_what_gguf_cannot_say_of_a_token_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _gguf_of(golden.write("tokenizer.model, legacy, added_tokens_decoder", tmp_path))
    assert "'return', '<extra>'" in caplog.text


def test_both_files_of_a_vocabulary_make_one_gguf(tmp_path: Path) -> None:
    one, both = _made(tmp_path / "one"), _made(tmp_path / "both")
    golden.write("tokenizer.model, legacy, added_tokens.json", one)
    golden.write("tokenizer.json, legacy, added_tokens.json", both)
    (both / "tokenizer.model").write_bytes(golden.model().to_bytes())
    of_both, of_one = _gguf_of(both), _gguf_of(one)
    assert of_one.pop("tokenizer.ggml.eot_token_id") == 2, "the model file's own end"
    assert of_both == of_one
    spec = golden.tokenizer_json(legacy=True)
    vocab = spec["model"]["vocab"]
    vocab["he"], vocab["▁the"] = vocab["▁the"], vocab["he"]
    (both / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match="different ids"):
        gguf_vocabulary.from_directory(both)


def test_merges_that_no_scores_express_are_refused(tmp_path: Path) -> None:
    spec = golden.tokenizer_json(legacy=True)
    spec["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        gguf_vocabulary.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"normalizer": {"type": "NFKC"}}, "NFKC"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}}, "ByteLevel"),
        ({"model": {**golden.byte_level()["model"], "end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
    ],
)
def test_what_gguf_cannot_express_is_refused_by_name(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(golden.byte_level(**changes)))
    with pytest.raises(TokenizerError, match=says):
        gguf_vocabulary.from_directory(tmp_path)


def test_a_normaliser_has_the_name_of_a_vocabulary_that_has_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(golden.byte_level(normalizer={"type": "NFC"})))
    metadata = _gguf_of(tmp_path)
    assert metadata["tokenizer.ggml.pre"] == "mpt"
    in_gguf = load_gguf(metadata)
    assert in_gguf is not None
    assert in_gguf.encode("e\u0301") == in_gguf.encode("é")


# What is said --------------------------------------------------------------------------------------------------------


def test_a_vocabulary_that_cannot_write_everything_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = golden.byte_level()
    vocab = spec["model"]["vocab"]
    del vocab["Ã"]  # the byte 0xC3, of é and ü
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = _load(tmp_path)
    said = [record.message for record in caplog.records]
    assert len(said) == 1
    assert "1 of the 243 bytes" in said[0] and "is left out" in said[0]
    assert tokenizer.decode(tokenizer.encode("aüb")).replace("\ufffd", "") == "ab"
    assert len(caplog.records) == 1, "encoding says nothing more"


def test_what_hardly_any_text_has_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SmolLM2 has no tokens for six control characters and for planes without characters."""
    spec = golden.byte_level()
    for character in ("Ą", "ñ", "ÿ"):  # bytes 0x04, 0xF1, 0xFF
        del spec["model"]["vocab"][character]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with caplog.at_level(logging.INFO, logger="quadriga"):
        _load(tmp_path)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "2 of the 243 bytes" in caplog.text


def test_a_sentencepiece_model_without_bytes_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = golden.model()
    pieces = [replace(piece, kind=UNUSED) if piece.kind == BYTE else piece for piece in model.pieces]
    model = replace(model, pieces=pieces, byte_fallback=False)
    (tmp_path / "tokenizer.model").write_bytes(model.to_bytes())
    tokenizer = _load(tmp_path)
    assert "single bytes" in caplog.text and "<unk>" in caplog.text
    assert 0 in tokenizer.encode("🙂")


def test_an_end_after_every_prompt_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = _load(golden.write("tokenizer.model, legacy, eos after, no bos", tmp_path))
    assert tokenizer.suffix_ids == [2]
    assert "after every prompt" in caplog.text


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}]},
        {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"},
    ],
)
def test_a_decoder_that_is_not_understood_is_refused_by_name(decoder: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(golden.byte_level(decoder=decoder)))
    name = "Strip" if decoder["type"] == "Sequence" else decoder["type"]
    with pytest.raises(TokenizerError, match=f"the decoder '{name}'"):
        load_directory(tmp_path)


@pytest.mark.parametrize("special", [False, True])
def test_a_special_token_is_found_in_the_text_as_it_came_unless_its_entry_says_otherwise(special: bool) -> None:
    entry = {"content": "<x>", "special": special}
    assert added_token(entry, 7, "here").normalized is not special
    for said in (False, True):
        assert added_token({**entry, "normalized": said}, 7, "here").normalized is said


def test_the_white_space_that_a_token_takes_along_is_unicodes() -> None:
    """Python's ``isspace`` counts the four information separators, which the library does not."""
    splitter = Splitter([AddedToken(id=7, content="<x>", lstrip=True, rstrip=True)])
    for space in (" ", "\n", "\u00a0", "\u3000", "\x85"):
        assert splitter.split(f"a{space}{space}<x>{space}b") == ["a", 7, "b"], repr(space)
    for other in ("\x1c", "\x1d", "\x1e", "\x1f", "\u200b", "_"):
        assert splitter.split(f"a {other} <x> {other} b") == [f"a {other}", 7, f"{other} b"], repr(other)


def test_ids_lie_so_far_behind_their_own_vocabulary_and_no_further() -> None:
    for n_words in (10, 200_000):
        last = AddedToken(id=n_words + 2**17 - 1, content="<x>")
        check_gap(n_words, [last], "here")
        with pytest.raises(TokenizerError, match=f"has the id {n_words + 2**17} behind a vocabulary of {n_words}"):
            check_gap(n_words, [last, AddedToken(id=n_words + 2**17, content="<y>")], "here")
