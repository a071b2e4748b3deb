"""Vocabularies across the border between GGUF files and directories, in both directions.

    to_files          GGUF metadata -> tokenizer.json or tokenizer.model, and tokenizer_config.json
    from_directory    those files -> GGUF metadata, as llama.cpp reads it

A vocabulary whose splitting pattern GGUF has no name for is refused, not approximated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quadriga.errors import TokenizerError
from quadriga.text import tokenizer as loading
from quadriga.text.pretokenize import CL100K_PATTERN, GGUF_PATTERNS

Entry = tuple[str, Any]
"""(GGUF type, value)."""


def to_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer files other programs expect, from a GGUF file's metadata; empty if it has no vocabulary."""
    tokenizer = loading.load_gguf(metadata)
    if tokenizer is None:
        return {}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(tokenizer.prefix_ids),
        **{name: text or None for name, text in tokenizer.template_variables.items()},
        "chat_template": tokenizer.chat_template,
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer_config.json": _json({k: v for k, v in config.items() if v is not None})}
    if metadata["tokenizer.ggml.model"] == "gpt2":
        files["tokenizer.json"] = _json(loading.gguf_bpe_spec(metadata))
    else:
        files["tokenizer.model"] = loading.gguf_sentencepiece(metadata)
    return files


def from_directory(path: Path) -> dict[str, Entry] | None:
    """GGUF metadata for the tokenizer that lies in ``path``, or None if there is none.

    Raises:
        TokenizerError: GGUF cannot express it.
    """
    tokenizer = loading.load_directory(path)
    if tokenizer is None:
        return None
    if (path / "tokenizer.json").exists():
        table = _from_tokenizer_json(loading.read_json(path / "tokenizer.json"))
    elif (path / "tokenizer.model").exists():
        table = _from_sentencepiece(path / "tokenizer.model")
    else:
        raise TokenizerError(
            "a GGUF file needs merges, which a tiktoken rank file lacks. Put the model's tokenizer.json beside it."
        )
    ids = {"bos": tokenizer.bos_id, "eos": next(iter(tokenizer.eos_ids), None), "padding": tokenizer.pad_id}
    for name, token_id in ids.items():
        if token_id is not None:
            table[f"tokenizer.ggml.{name}_token_id"] = ("uint32", token_id)
    table["tokenizer.ggml.add_bos_token"] = ("bool", bool(tokenizer.prefix_ids))
    if tokenizer.chat_template is not None:
        table["tokenizer.chat_template"] = ("string", tokenizer.chat_template)
    return table


def _from_tokenizer_json(spec: dict[str, Any]) -> dict[str, Entry]:
    model = spec.get("model", {})
    if model.get("type") != "BPE":
        raise TokenizerError(f"GGUF holds byte-level BPE and SentencePiece vocabularies, not {model.get('type')!r}")
    pre = _pre_name(spec.get("pre_tokenizer"))
    by_id: dict[int, tuple[str, int]] = {i: (text, 1) for text, i in model["vocab"].items()}
    for token in spec.get("added_tokens") or []:
        by_id[token["id"]] = (token["content"], 3 if token.get("special") else 4)
    n_vocab = max(by_id) + 1
    rows = [by_id.get(i, (f"[PAD{i}]", 5)) for i in range(n_vocab)]  # 5: unused
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", pre),
        "tokenizer.ggml.tokens": ("string", [text for text, _ in rows]),
        "tokenizer.ggml.token_type": ("int32", [kind for _, kind in rows]),
        "tokenizer.ggml.merges": ("string", merges),
    }


def _pre_name(pre_tokenizer: dict[str, Any] | None) -> str:
    """GGUF's name for a splitting rule, found by comparing the patterns themselves."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    patterns: list[str] = []
    for step in steps:
        match step.get("type"):
            case "Split":
                patterns.append(str(step.get("pattern", {}).get("Regex")))
            case "Digits" if step.get("individual_digits"):
                patterns.append(r"\p{N}")
            case "ByteLevel":
                if step.get("use_regex", True):
                    patterns.extend(GGUF_PATTERNS["gpt-2"].patterns)
            case other:
                raise TokenizerError(f"GGUF has no name for the pre-tokeniser {other!r}")
    if patterns == [CL100K_PATTERN]:
        return "dbrx"
    for name, split in GGUF_PATTERNS.items():
        if list(split.patterns) == patterns and name != "default":
            return name
    raise TokenizerError(f"GGUF has no name for this vocabulary's splitting pattern: {str(patterns)[:200]}")


def _from_sentencepiece(path: Path) -> dict[str, Entry]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    model.Load(str(path))
    n = model.GetPieceSize()

    def kind(i: int) -> int:
        if model.IsUnknown(i):
            return 2
        if model.IsControl(i):
            return 3
        return 5 if model.IsUnused(i) else 6 if model.IsByte(i) else 1

    return {
        "tokenizer.ggml.model": ("string", "llama"),
        "tokenizer.ggml.pre": ("string", "default"),
        "tokenizer.ggml.tokens": ("string", [model.IdToPiece(i) for i in range(n)]),
        "tokenizer.ggml.scores": ("float32", [model.GetScore(i) for i in range(n)]),
        "tokenizer.ggml.token_type": ("int32", [kind(i) for i in range(n)]),
        "tokenizer.ggml.add_space_prefix": ("bool", model.EncodeAsPieces("a")[0].startswith("▁")),
    }


def _json(value: object) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
