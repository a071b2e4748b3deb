"""Which vocabulary a checkpoint's folder holds, and the Tokenizer it makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from quadriga.text import template_variables
from quadriga.text.added_tokens import declared
from quadriga.text.tokenizer.base import Tokenizer
from quadriga.text.tokenizer.files import (
    Folder,
    chat_templates,
    generation_eos,
    read_bytes,
    read_json,
    read_json_if_there,
)
from quadriga.text.tokenizer.huggingface import as_configured, from_tokenizer_json
from quadriga.text.tokenizer.ranks import TEKKEN, from_llama3, from_tekken, is_ranks
from quadriga.text.tokenizer.sentencepiece import from_sentencepiece
from quadriga.text.tokenizer.tiktoken import load_tiktoken


def load_directory(
    path: Path, cl100k_ranks: Callable[[], Path] | None = None, *, n_rows: int | None = None
) -> Tokenizer | None:
    """The tokenizer that lies beside a checkpoint's weights, or None if there is none.

    Looks for tokenizer.json, then a *.tiktoken rank file, tekken.json and tokenizer.model; then, where
    tokenizer_config.json says the vocabulary is tiktoken's (DBRX's first release ships no file), asks ``cl100k_ranks``
    for the rank file.

    Args:
        path: the checkpoint's folder.
        cl100k_ranks: gives GPT-4's rank file.
        n_rows: tokens the model has. Added tokens beyond can never be used and are left out, with a logged line.

    Raises:
        TokenizerError: a file is malformed, too large, or names tokens that do not exist.
    """
    config = read_json_if_there(path / "tokenizer_config.json")
    special_tokens_map, model_config = (
        read_json_if_there(path / name) for name in ("special_tokens_map.json", "config.json")
    )
    kind = template_variables.class_of(config, model_config)
    beside = declared(config, read_json_if_there(path / "added_tokens.json"), special_tokens_map, kind)
    folder = Folder(config, beside, kind, chat_templates(path, config), generation_eos(path), n_rows)
    tokenizer = _load_vocabulary(path, folder, cl100k_ranks)
    if tokenizer is not None:
        variables, complete = template_variables.from_files(config, special_tokens_map, model_config)
        tokenizer.template_variables = variables if complete else {**tokenizer.tokens_by_id(), **variables}
    return tokenizer


def tokenizer_json(path: Path) -> dict[str, Any]:
    """The tokenizer.json of a folder as transformers runs it beside the folder's other files.

    Raises:
        TokenizerError: a file cannot be read, or is malformed.
    """
    config = read_json_if_there(path / "tokenizer_config.json")
    kind = template_variables.class_of(config, read_json_if_there(path / "config.json"))
    return as_configured(read_json(path / "tokenizer.json"), config, kind, "tokenizer.json")


def _load_vocabulary(path: Path, folder: Folder, cl100k_ranks: Callable[[], Path] | None) -> Tokenizer | None:
    config, template = folder.config, folder.templates.chat
    if (path / "tokenizer.json").exists():
        spec = as_configured(read_json(path / "tokenizer.json"), config, folder.kind, "tokenizer.json")
        return from_tokenizer_json(spec, "tokenizer.json", folder)
    for ranks in sorted(path.glob("*.tiktoken")):
        return load_tiktoken(ranks, chat_template=template)
    if (path / TEKKEN).exists():
        return from_tekken(path / TEKKEN, folder)
    if (model := path / "tokenizer.model").exists():
        return from_llama3(model, folder) if is_ranks(read_bytes(model)) else from_sentencepiece(model, folder)
    if "tiktoken" in str(config.get("tokenizer_class", "")).lower() and cl100k_ranks is not None:
        return load_tiktoken(cl100k_ranks(), chat_template=template)
    return None
