"""The files of a vocabulary in a checkpoint's folder, bounded in size and depth, and what those beside it say."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga.errors import TokenizerError
from quadriga.text.added_tokens import Declared

logger = logging.getLogger(__name__)

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "tekken.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""What may belong to a vocabulary in a checkpoint's folder, besides *.tiktoken."""

_MAX_FILE_BYTES = 64 << 20  # the largest published tokenizer.json is about 35 MB
_MAX_JSON_DEPTH = 32


TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
"""Where transformers saves the template for conversations with tools, beside chat_template.jinja."""


@dataclass(frozen=True)
class Templates:
    """The chat templates of a checkpoint."""

    chat: str | None = None
    """For conversations; None: there is none."""
    tools: str | None = None
    """For conversations with tools, where that is another one; its name is "tool_use" in every format."""


@dataclass(frozen=True)
class Folder:
    """What the files beside a vocabulary say of its tokens."""

    config: Mapping[str, Any]
    """tokenizer_config.json."""
    tokens: Declared
    """Added tokens and roles, as all files together declare them."""
    kind: str
    """The tokenizer's class in transformers, without "Fast"; empty where no file says it."""
    templates: Templates
    """The chat templates."""
    generation_eos: list[int]
    """eos_token_id of generation_config.json."""
    n_rows: int | None
    """Tokens the model has a row for; None: not known."""


def read_bytes(path: Path) -> bytes:
    """A tokenizer's file, bounded in size.

    Raises:
        TokenizerError: it cannot be read, or is too large.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise TokenizerError(f"{path.name} has {size} bytes; tokenizer files are at most {_MAX_FILE_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot read {path}: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A tokenizer's JSON file, bounded in size and depth.

    Raises:
        TokenizerError: it cannot be read, or is no JSON object.
    """
    raw = read_bytes(path)
    depth = deepest = 0
    for bracket in re.finditer(rb'"(?:[^"\\]|\\.)*+"|[\[{]|[\]}]', raw, re.DOTALL):
        first = bracket.group()[0]
        if first in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif first in b"]}":
            depth -= 1
    if deepest > _MAX_JSON_DEPTH:
        raise TokenizerError(f"{path.name} nests {deepest} levels deep; tokenizer files need at most {_MAX_JSON_DEPTH}")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path.name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path.name} must be a JSON object")
    return value


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As :func:`read_json`; empty where there is no such file."""
    return read_json(path) if path.exists() else {}


def chat_templates(path: Path, config: Mapping[str, Any]) -> Templates:
    """The templates of a folder: chat_template.jinja and those beside it, else those of tokenizer_config.json.

    Raises:
        TokenizerError: one is no text.
    """
    files = {"default": path / "chat_template.jinja", "tool_use": path / TOOL_TEMPLATE}
    named: dict[str, Any] = {name: _template_file(file) for name, file in files.items() if file.exists()}
    template = config.get("chat_template")
    if not named and isinstance(template, list):
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
    elif not named:
        named = {"default": template}
    if not all(text is None or isinstance(text, str) for text in named.values()):
        raise TokenizerError("chat_template in tokenizer_config.json must be a string or a list of named templates")
    if named and "default" not in named:  # transformers asks for a name then
        logger.warning("of the chat templates %s none is called default: none is used", ", ".join(map(repr, named)))
        named = {}
    return Templates(named.get("default"), named.get("tool_use"))


def _template_file(file: Path) -> str:
    try:
        return read_bytes(file).decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{file.name} must be UTF-8: {error}") from None


def generation_eos(path: Path) -> list[int]:
    """The end tokens of generation_config.json; empty where there is none, which LLaMA-1's files write as -1.

    Raises:
        TokenizerError: they are no token ids.
    """
    file = path / "generation_config.json"
    value = read_json(file).get("eos_token_id") if file.exists() else None
    ids = value if isinstance(value, list) else [] if value in (None, -1) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise TokenizerError(f"eos_token_id in generation_config.json must be token ids, got {value!r}")
    return ids
