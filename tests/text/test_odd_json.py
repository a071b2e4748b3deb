"""Small files of a checkpoint with a value of another type anywhere are errors of ours that name it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quadriga.errors import CheckpointError, TokenizerError
from quadriga.io.suggested import of_config
from quadriga.text.tokenizer import load_directory
from tests.text import vocabularies
from tests.text.test_against_libraries import JSON

UNIGRAM = "unigram with bytes"


def changed(path: tuple[Any, ...], value: object, kind: str = "") -> dict[str, Any]:
    spec = JSON[kind]() if kind else vocabularies.bpe()
    place: Any = spec
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return spec


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (changed(("normalizer",), ["x"]), "normalizer must be an object or null"),
        (changed(("decoder",), "ByteLevel"), "decoder must be an object or null"),
        (changed(("model", "unk_token"), []), "unk_token must be a text or null"),
        (changed(("model", "vocab"), {"x": None}), "must map texts to ids"),
        (changed(("model", "vocab"), [None]), "must be of pairs"),
        (changed(("model", "vocab"), ["x"]), "must be of pairs"),
        (changed(("model", "vocab"), [{"content": "x"}]), "must be of pairs"),
        (changed(("model", "merges"), None), "merges must be a list of pairs"),
        (changed(("model", "merges", 0), "ab"), "merges must be a list of pairs"),
        (changed(("model", "merges", 0), ["a", None]), "merges must be a list of pairs"),
        # The library panics here, which Python sees as no Exception.
        (changed(("model", "continuing_subword_prefix"), "x"), "not a tokenizer the tokenizers library can read"),
        (changed(("added_tokens", 0, "content"), "\ud800"), "needs a text"),
    ],
)
def test_a_tokenizer_json_of_other_types(tmp_path: Path, spec: dict[str, Any], says: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match=says):
        load_directory(tmp_path)


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token"])
@pytest.mark.parametrize("value", ["\ud800", {"content": "<|im_end|>\udfff"}])
def test_half_of_a_character_is_no_token(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(TokenizerError, match=f"{name} in tokenizer_config.json must be a text or a token"):
        load_directory(vocabularies.write_bpe(tmp_path, **{name: value}))


def test_a_text_that_a_vocabulary_cannot_write_is_an_error_of_ours(tmp_path: Path) -> None:
    spec = changed(("model", "unk_id"), None, UNIGRAM)
    spec["model"]["byte_fallback"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_directory(tmp_path)
    assert tokenizer is not None and tokenizer.encode("the")
    with pytest.raises(TokenizerError, match="the vocabulary cannot write '世界'"):
        tokenizer.encode("世界")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**400, True, "0.5", [0.5]])
def test_sampling_that_is_no_number(value: object) -> None:
    for name in ("top_k", "temperature"):
        with pytest.raises(CheckpointError, match=f"{name} in generation_config.json must be a number"):
            of_config({name: value})


@pytest.mark.parametrize(("value", "ends"), [(-1, (1,)), (None, (1,)), (2, (1, 2)), ([2, 0], (1, 2, 0))])
def test_no_end_token_is_written_as_minus_one(tmp_path: Path, value: object, ends: tuple[int, ...]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    tokenizer = load_directory(vocabularies.write_bpe(tmp_path, eos_token="<|im_start|>"))
    assert tokenizer is not None and tokenizer.eos_ids == ends


@pytest.mark.parametrize("value", [True, [-1], [True], "2", [None]])
def test_end_tokens_that_are_no_ids(tmp_path: Path, value: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(TokenizerError, match=r"eos_token_id in generation_config.json must be token ids"):
        load_directory(vocabularies.write_bpe(tmp_path))
