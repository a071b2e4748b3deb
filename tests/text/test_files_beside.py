"""What the small files beside a tokenizer.json say about the whole of it: its class, its first space, its templates.

Expected ids are those of transformers 4.57.6, ``AutoTokenizer.from_pretrained(folder)``, with these very files.
"""

from __future__ import annotations

import json
import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from quadriga.errors import TokenizerError
from quadriga.hub import catalogue
from quadriga.io.convert import convert
from quadriga.io.open import open_checkpoint
from quadriga.text import gguf_vocabulary
from quadriga.text.chat import render
from quadriga.text.template_abilities import abilities
from quadriga.text.tokenizer import Tokenizer, load_directory, load_gguf
from tests.checkpoint.models import TINY, write_hf
from tests.text import vocabularies

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHAT = "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + m.content }}{% endfor %}"
TOOL_USE = (
    "{{ 'tools: ' + tools | tojson }}{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)
NAMED = [{"name": "tool_use", "template": TOOL_USE}, {"name": "default", "template": CHAT}]
TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "Hi"}


def folder(path: Path, *, spec: dict[str, Any] | None = None, model_type: str = "", **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(spec or vocabularies.bpe(SPECIALS)))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if model_type:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


def loaded(path: Path) -> Tokenizer:
    tokenizer = load_directory(path)
    assert tokenizer is not None
    return tokenizer


def prefixed(add_prefix_space: bool) -> dict[str, Any]:
    spec = vocabularies.bpe(SPECIALS)
    spec["pre_tokenizer"]["add_prefix_space"] = add_prefix_space
    return spec


@pytest.mark.parametrize(
    ("config", "model_type", "begins"),
    [
        ({}, "llama", True),
        ({}, "deepseek_v3", True),
        ({}, "qwen2", False),
        ({"add_bos_token": False}, "llama", False),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, "llama", False),
        ({"tokenizer_class": "LlamaTokenizerFast"}, "qwen2", True),
    ],
)
def test_the_class_of_the_model_type_counts_where_no_file_names_one(
    tmp_path: Path, config: dict[str, Any], model_type: str, begins: bool
) -> None:
    tokenizer = loaded(folder(tmp_path / "x", model_type=model_type, **config))
    words = tokenizer.encode("The fox")
    assert tokenizer.encode_prompt("The fox") == ([0] if begins else []) + words


def test_a_class_by_model_type_asks_for_no_token_that_is_not_there(tmp_path: Path) -> None:
    tokenizer = loaded(folder(tmp_path / "x", spec=vocabularies.bpe(["<|a|>"]), model_type="llama"))
    assert tokenizer.encode_prompt("The fox") == tokenizer.encode("The fox")


@pytest.mark.parametrize(
    ("stored", "config", "space"),
    [
        (False, {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True}, True),
        (False, {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": True}, True),
        (True, {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False}, False),
        (True, {"tokenizer_class": "PreTrainedTokenizerFast"}, False),
        (True, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, True),
        (True, {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, True),
        (True, {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": None}, False),  # as version 5 writes it
        (True, {"tokenizer_class": "TokenizersBackend"}, True),
        (True, {}, True),  # no configuration at all: the file is all there is
    ],
)
def test_a_first_space_is_the_configurations(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stored: bool, config: dict[str, Any], space: bool
) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = loaded(folder(tmp_path / "x", spec=prefixed(stored), **config))
    plain = loaded(folder(tmp_path / "plain", spec=prefixed(False)))
    assert (
        tokenizer.encode("fox") == plain.encode(" fox" if space else "fox") != plain.encode("fox" if space else " fox")
    )
    assert ("add_prefix_space" in caplog.text) == (stored != space)


def test_a_first_space_that_is_no_switch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"add_prefix_space in tokenizer_config.json must be true or false"):
        load_directory(folder(tmp_path / "x", add_prefix_space="yes"))


def test_gguf_is_made_of_what_the_files_come_to(tmp_path: Path) -> None:
    """A first space that the configuration takes back is no reason to refuse; one it asks for cannot be written."""
    table = gguf_vocabulary.from_directory(folder(tmp_path / "x", spec=prefixed(True), add_prefix_space=False))
    assert table is not None
    again = load_gguf({key: value for key, (_, value) in table.items()})
    assert again is not None and again.encode("fox") == loaded(tmp_path / "x").encode("fox")
    with pytest.raises(TokenizerError, match="ByteLevel"):
        gguf_vocabulary.from_directory(folder(tmp_path / "y", spec=prefixed(False), add_prefix_space=True))


def test_a_text_has_one_list_of_ids_whatever_dropout_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = vocabularies.bpe(SPECIALS)
    spec["model"]["dropout"] = 0.5
    with caplog.at_level(logging.WARNING):
        tokenizer = loaded(folder(tmp_path / "x", spec=spec))
    assert "the dropout of 0.5 is left out" in caplog.text
    whole = loaded(folder(tmp_path / "y")).encode(vocabularies.TEXTS[0])
    assert all(tokenizer.encode(vocabularies.TEXTS[0]) == whole for _ in range(5))


# Templates -----------------------------------------------------------------------------------------------------------


def _as_files(path: Path) -> Path:
    folder(path)
    (path / "additional_chat_templates").mkdir()
    (path / "chat_template.jinja").write_text(CHAT)
    (path / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_USE)
    return path


@pytest.mark.parametrize("form", ["list", "files", "gguf"])
def test_a_template_for_tools_is_used_with_tools(tmp_path: Path, form: str) -> None:
    if form == "gguf":
        table = gguf_vocabulary.from_directory(folder(tmp_path / "x", chat_template=NAMED))
        assert table is not None and table["tokenizer.chat_templates"] == ("string", ["tool_use"])
        tokenizer = load_gguf({key: value for key, (_, value) in table.items()})
        assert tokenizer is not None
    else:
        tokenizer = loaded(
            _as_files(tmp_path / "x") if form == "files" else folder(tmp_path / "x", chat_template=NAMED)
        )
    assert render([USER], tokenizer).text == "<|im_start|>user Hi"
    described = json.dumps([TOOL])
    assert render([USER], tokenizer, tools=[TOOL]).text == f"tools: {described}<|im_start|>user Hi"
    call = {"id": "1", "type": "function", "function": {"name": "rain", "arguments": {"at": "noon"}}}
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "wet"}]
    assert 'rain{"at": "noon"}<|im_start|>tool wet' in render(turns, tokenizer, tools=[TOOL]).text
    able = abilities(tokenizer)
    assert able.tools and able.source == TOOL_USE
    assert not abilities(loaded(folder(tmp_path / "y", chat_template=CHAT))).tools


def test_templates_without_a_default_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = loaded(folder(tmp_path / "x", chat_template=[{"name": "rag", "template": CHAT}]))
    assert tokenizer.chat_template is None and "'rag' none is called default" in caplog.text


def test_conversions_keep_both_templates(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    write_hf(tmp_path / "hf", TINY["llama2"])
    _as_files(tmp_path / "hf")
    for to in ("hf", "quadriga"):
        (tmp_path / f"to {to}").mkdir()
        convert(tmp_path / "hf", tmp_path / f"to {to}" / "out", to=to)
        with closing(open_checkpoint(tmp_path / f"to {to}" / "out")) as opened:
            tokenizer = opened.load_tokenizer(catalogue.cl100k_ranks)
        assert tokenizer is not None and (tokenizer.chat_template, tokenizer.tool_template) == (CHAT, TOOL_USE)


def test_a_gguf_files_two_templates_become_a_list_with_names(tmp_path: Path) -> None:
    table = vocabularies.gguf_bpe()
    table |= {"tokenizer.chat_template": CHAT, "tokenizer.chat_template.tool_use": TOOL_USE}
    for name, content in gguf_vocabulary.to_files(table).items():
        (tmp_path / name).write_bytes(content)
    tokenizer = loaded(tmp_path)
    assert (tokenizer.chat_template, tokenizer.tool_template) == (CHAT, TOOL_USE)
