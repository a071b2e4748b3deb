"""bos_token and its kin in templates: what transformers 4.57.6 calls ``special_tokens_map`` for the same files.

The expected values were read off ``AutoTokenizer.from_pretrained(folder).special_tokens_map`` with these very files.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quadriga.errors import TemplateError, TokenizerError
from quadriga.hub import catalogue
from quadriga.io.convert import convert
from quadriga.io.open import open_checkpoint
from quadriga.text.chat import render
from quadriga.text.tokenizer import Tokenizer, load_directory, load_gguf
from tests.checkpoint.models import TINY, write_hf
from tests.text import vocabularies

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>", "<pad>", "<img>"]
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
LLAMA = {"model_type": "llama"}
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
MESSAGE = [{"role": "user", "content": "Hi"}]
ENDS = "<|endoftext|>"


def folder(path: Path, **files: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(vocabularies.bpe(SPECIALS)))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def loaded(path: Path) -> Tokenizer:
    tokenizer = load_directory(path)
    assert tokenizer is not None
    return tokenizer


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as named": (
        {"tokenizer_config": {**FAST, "bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>", "unk_token": "<unk>"}},
        {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "<pad>"},
    ),
    "null is unset": ({"tokenizer_config": {**FAST, "bos_token": None, "eos_token": "</s>"}}, {"eos_token": "</s>"}),
    "empty is unset": ({"tokenizer_config": {**FAST, "bos_token": "", "eos_token": "</s>"}}, {"eos_token": "</s>"}),
    "as objects": (
        {
            "tokenizer_config": {
                **FAST,
                "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", **FLAGS},
                "additional_special_tokens": ["<img>", {"content": "<|im_start|>", **FLAGS}],
            }
        },
        {"eos_token": "<|im_end|>", "additional_special_tokens": ["<img>", "<|im_start|>"]},
    ),
    "all the others": (
        {"tokenizer_config": {**FAST, "sep_token": "<s>", "cls_token": "</s>", "mask_token": "<img>"}},
        {"sep_token": "<s>", "cls_token": "</s>", "mask_token": "<img>"},
    ),
    "tokens of one model": (
        {"tokenizer_config": {**FAST, "eos_token": "</s>", "extra_special_tokens": {"image_token": "<img>"}}},
        {"eos_token": "</s>", "image_token": "<img>"},
    ),
    "no token but a switch": ({"tokenizer_config": {**FAST, "add_bos_token": False, "add_eos_token": False}}, {}),
    "LLaMA's class": ({"tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}}, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "its fast twin, partly named": (
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "<|im_end|>"}},
        {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"},
    ),
    "a null over the class's": (
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "unk_token": None}},
        {"bos_token": "<s>", "eos_token": "</s>"},
    ),
    "GPT-2's class": ({"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}}, {"bos_token": ENDS, "eos_token": ENDS, "unk_token": ENDS}),
    "Qwen2's class": (
        {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>"}},
        {"eos_token": "<|im_end|>", "unk_token": ENDS, "pad_token": ENDS},
    ),
    "a class by the model's type": ({"tokenizer_config": {"model_max_length": 5}, "config": {"model_type": "dbrx"}}, {"bos_token": ENDS, "eos_token": ENDS, "unk_token": ENDS}),
    "special_tokens_map.json of an old checkpoint": (
        {
            "tokenizer_config": {**FAST, "eos_token": "</s>", "additional_special_tokens": ["<img>"]},
            "special_tokens_map": {"eos_token": "<|im_end|>", "pad_token": {"content": "<pad>", **FLAGS}, "additional_special_tokens": ["<img>", "<s>"]},
        },
        {"eos_token": "<|im_end|>", "pad_token": "<pad>", "additional_special_tokens": ["<img>", "<s>"]},
    ),
    "special_tokens_map.json of a newer one": (
        {
            "tokenizer_config": {**FAST, "eos_token": "</s>", "added_tokens_decoder": {"2": {"content": "<|im_end|>", "special": True, **FLAGS}}},
            "special_tokens_map": {"eos_token": "<|im_end|>", "pad_token": "<pad>"},
        },
        {"eos_token": "</s>"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_variables_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    files, expected = CASES[name]
    tokenizer = loaded(folder(tmp_path, **{"config": LLAMA, **files}))
    assert tokenizer.template_variables == expected


def test_files_that_name_no_class_leave_the_vocabulary_s_own_tokens(tmp_path: Path) -> None:
    assert loaded(folder(tmp_path, generation_config={"eos_token_id": 2})).template_variables == {
        "eos_token": "<|im_end|>"
    }


def test_what_is_unset_is_undefined_and_absent_tools_are_none(tmp_path: Path) -> None:
    tokenizer = loaded(folder(tmp_path, config=LLAMA, tokenizer_config={**FAST, "eos_token": "</s>"}))
    text = render(
        MESSAGE,
        tokenizer,
        "{{ tools is none }}{{ tools is defined }}{{ documents is none }}{{ bos_token is defined }}[{{ bos_token }}]{{ eos_token }}",
    ).text
    assert text == "TrueTrueTrueFalse[]</s>"
    with pytest.raises(TemplateError, match="'bos_token' is undefined"):
        render(MESSAGE, tokenizer, "{{ bos_token + 'x' }}")


def test_eos_token_is_the_tokenizer_s_not_the_first_of_generation_config(tmp_path: Path) -> None:
    tokenizer = loaded(
        folder(
            tmp_path,
            config=LLAMA,
            tokenizer_config={**FAST, "eos_token": "<|im_end|>"},
            generation_config={"eos_token_id": [0, 2]},
        )
    )
    assert render(MESSAGE, tokenizer, "{{ messages[0].content + eos_token }}").text == "Hi<|im_end|>"
    assert tokenizer.eos_ids == (2, 0)  # either ends an answer


def test_eos_token_stays_through_every_conversion(tmp_path: Path) -> None:
    base = tmp_path / "hf"
    write_hf(base, replace(TINY["llama2"], vocab_size=448))
    folder(
        base,
        tokenizer_config={
            **FAST,
            "bos_token": "<s>",
            "eos_token": "<|im_end|>",
            "chat_template": "{{ messages[0].content + eos_token }}",
        },
        generation_config={"eos_token_id": [0, 2], "bos_token_id": 3},
    )
    convert(base, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "out.gguf", to="gguf")
    convert(tmp_path / "out.gguf", tmp_path / "back", to="hf")
    for place in ("hf", "ours", "out.gguf", "back"):
        checkpoint = open_checkpoint(tmp_path / place)
        tokenizer = checkpoint.load_tokenizer(catalogue.cl100k_ranks)
        assert tokenizer is not None
        assert render(MESSAGE, tokenizer).text == "Hi<|im_end|>", place
        assert tokenizer.template_variables["bos_token"] == "<s>"
        assert tokenizer.eos_ids[0] == 2
        assert {*checkpoint.config.eos_ids, *tokenizer.eos_ids} == {0, 2}, place
        checkpoint.close()


def test_a_gguf_file_names_its_tokens_by_id() -> None:
    metadata = vocabularies.gguf_bpe() | {"tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.seperator_token_id": 1}
    tokenizer = load_gguf(metadata)
    assert tokenizer is not None
    expected = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": ENDS, "unk_token": ENDS}
    assert tokenizer.template_variables == {**expected, "sep_token": "<|im_start|>"}


def test_a_gguf_file_without_bos_has_an_empty_one_as_in_llama_cpp() -> None:
    metadata = vocabularies.gguf_bpe()
    del metadata["tokenizer.ggml.bos_token_id"]
    tokenizer = load_gguf(metadata)
    assert tokenizer is not None
    assert render(MESSAGE, tokenizer, "{{ bos_token + messages[0].content + eos_token }}").text == "Hi<|im_end|>"


def test_sentencepiece_s_eos_may_be_another_than_its_model_file_says(tmp_path: Path) -> None:
    vocabularies.sentencepiece_model(tmp_path)
    assert loaded(tmp_path).template_variables["eos_token"] == "</s>"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "eos_token": "<unk>"})
    )
    tokenizer = loaded(tmp_path)
    assert tokenizer.template_variables == {"bos_token": "<s>", "eos_token": "<unk>", "unk_token": "<unk>"}
    assert tokenizer.eos_ids == (tokenizer.special_ids["<unk>"], tokenizer.special_ids["</s>"])


def test_a_template_file_that_is_no_utf_8_is_one_error(tmp_path: Path) -> None:
    folder(tmp_path, config=LLAMA)
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ '\xff' }}")
    with pytest.raises(TokenizerError, match="UTF-8"):
        load_directory(tmp_path)


def test_a_template_may_hold_half_a_surrogate_pair(tmp_path: Path) -> None:
    """JSON can; it has no bytes of its own, so what it prints is refused where it is encoded."""
    (tmp_path / "x").mkdir()
    base = folder(
        tmp_path / "x", config=LLAMA, tokenizer_config={**FAST, "chat_template": "{{ messages[0].content }}\ud800"}
    )
    with pytest.raises(TokenizerError, match="surrogate"):
        render(MESSAGE, loaded(base))
