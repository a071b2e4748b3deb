"""Vocabularies of ranks in the developers' own folders: LLaMA 3's tokenizer.model, and Mistral's tekken.json.

    tokenizer.model   lines of base64 and rank, as tiktoken's; the special tokens stand behind them and in no file
    tekken.json       cutting rule, ranks and, in newer ones, special tokens, which come before all others

Sources: meta-llama/llama-models' tokenizer.py and mistralai/mistral-common's tekken.py, for names and numbers.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quadriga.errors import TokenizerError
from quadriga.text.pretokenize import GGUF_PATTERNS
from quadriga.text.tokenizer.base import Tokenizer
from quadriga.text.tokenizer.files import Folder, read_bytes, read_json
from quadriga.text.tokenizer.tiktoken import TiktokenVocabulary

TEKKEN = "tekken.json"

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")
_LLAMA3_SPECIALS = 256
_LLAMA3_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
"""Of LLaMA 3.1 to 3.3. LLaMA 3 has the same where it uses them; numbers 4, 8 and 10 are reserved there."""

_MISTRAL_SPECIALS = (
    ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
    + ["[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"]
    + ["[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]
)
"""Of files that do not list theirs."""


def is_ranks(raw: bytes) -> bool:
    """True if a tokenizer.model is LLaMA 3's kind and not SentencePiece's."""
    return _LINE.match(raw) is not None


def from_llama3(path: Path, folder: Folder) -> Tokenizer:
    """LLaMA 3's tokenizer.model, which does not name its special tokens.

    Raises:
        TokenizerError: lines that are no ranks, or more or fewer tokens than the model has rows.
    """
    raw, name = read_bytes(path), path.name
    pairs = []
    for number, line in enumerate(raw.splitlines(), 1):
        if line:
            if not _LINE.fullmatch(line + b"\n"):
                raise TokenizerError(f"{name}: line {number} must be base64 and a rank, got {line[:40]!r}")
            token, rank = line.split()
            pairs.append((_decoded(token, f"{name}: line {number}"), int(rank)))
    ranks = _ranks(pairs, 0, name)
    if folder.n_rows is not None and folder.n_rows != len(ranks) + _LLAMA3_SPECIALS:
        raise TokenizerError(
            f"{name} has {len(ranks)} ranks, and with LLaMA 3's {_LLAMA3_SPECIALS} special tokens not the model's "
            f"{folder.n_rows} rows. Put the model's tokenizer.json beside it."
        )
    reserved = (number for number in range(_LLAMA3_SPECIALS) if number not in _LLAMA3_NAMED)
    names = _LLAMA3_NAMED | {at: f"<|reserved_special_token_{i}|>" for i, at in enumerate(reserved)}
    specials = {text: len(ranks) + at for at, text in sorted(names.items())}
    return _tokenizer(
        TiktokenVocabulary(ranks, specials, _pattern("llama-bpe")),
        specials,
        folder,
        bos="<|begin_of_text|>",
        ends=("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"),
        pad="<|finetune_right_pad_id|>",
    )


def from_tekken(path: Path, folder: Folder) -> Tokenizer:
    """Mistral's tekken.json: an ordinary token's id is its rank behind the special tokens.

    Raises:
        TokenizerError: a key that is missing or of another type, more tokens promised than there are, or a cutting
            rule that cannot be used.
    """
    spec, name = read_json(path), path.name
    config = spec.get("config")
    if not isinstance(config, dict):
        raise TokenizerError(f"{name} must have an object 'config'")
    n_special, n_all = (_count(config, key, name) for key in ("default_num_special_tokens", "default_vocab_size"))
    if not 0 < n_special < n_all:
        raise TokenizerError(f"{name}: of {n_all} tokens {n_special} cannot be special")
    n_ranks = n_all - n_special
    vocab = spec.get("vocab")
    if not isinstance(vocab, list) or len(vocab) < n_ranks:
        raise TokenizerError(f"{name} must have a 'vocab' of {n_ranks} tokens or more")
    ranks = _ranks([_entry(entry, name) for entry in vocab[:n_ranks]], n_special, name)
    specials = _mistral_specials(spec.get("special_tokens"), n_special, name)
    pattern = config.get("pattern")
    if not isinstance(pattern, str):
        raise TokenizerError(f"{name}: config.pattern must be a text, got {pattern!r}")
    try:
        vocabulary = TiktokenVocabulary(ranks, specials, pattern)
    except ValueError as error:  # the library's own error of a rule that it cannot compile
        raise TokenizerError(f"{name}: config.pattern cannot be used: {error}") from None
    return _tokenizer(vocabulary, specials, folder, bos="<s>", ends=("</s>",), pad="<pad>")


def _tokenizer(
    vocabulary: TiktokenVocabulary,
    specials: Mapping[str, int],
    folder: Folder,
    *,
    bos: str,
    ends: Iterable[str],
    pad: str,
) -> Tokenizer:
    return Tokenizer(
        vocabulary,
        special_ids=specials,
        bos_id=specials.get(bos),
        eos_ids=[*(specials[end] for end in ends if end in specials), *folder.generation_eos],
        pad_id=specials.get(pad),
        add_bos=bos in specials,
        chat_template=folder.templates.chat,
        tool_template=folder.templates.tools,
        unused_ids=(),
    )


def _pattern(name: str) -> str:
    (pattern,) = GGUF_PATTERNS[name].patterns
    return pattern


def _ranks(pairs: list[tuple[bytes, int]], first: int, name: str) -> dict[bytes, int]:
    """Token -> id, from (token, rank): every rank from 0 once, and every byte alone among the tokens."""
    ranks = {token: first + rank for token, rank in pairs}
    if sorted(ranks.values()) != list(range(first, first + len(pairs))):
        raise TokenizerError(f"{name}: its {len(pairs)} tokens must differ and have the ranks from 0 on, each once")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(f"{name} has no token for the byte {missing[0]}; text with it could not be written")
    return ranks


def _entry(entry: Any, name: str) -> tuple[bytes, int]:
    if not isinstance(entry, dict) or not isinstance(entry.get("token_bytes"), str):
        raise TokenizerError(f"{name}: every token needs a rank and token_bytes, got {str(entry)[:60]}")
    return _decoded(entry["token_bytes"].encode(errors="replace"), name), _count(entry, "rank", name)


def _decoded(token: bytes, where: str) -> bytes:
    try:
        return base64.b64decode(token, validate=True)
    except (binascii.Error, ValueError):
        raise TokenizerError(f"{where}: {token[:40]!r} is not base64") from None


def _count(values: Mapping[str, Any], key: str, name: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 24:
        raise TokenizerError(f"{name}: {key} must be a whole number below 2^24, got {value!r}")
    return value


def _mistral_specials(listed: Any, n: int, name: str) -> dict[str, int]:
    """Text -> id of the special tokens, those that the file leaves out by their usual names."""
    names = dict(enumerate(_MISTRAL_SPECIALS)) if listed is None else {}
    if listed is not None:
        if not isinstance(listed, list) or not all(isinstance(token, dict) for token in listed):
            raise TokenizerError(f"{name}: special_tokens must be a list of objects")
        for token in listed:
            text = token.get("token_str")
            if not isinstance(text, str) or not text:
                raise TokenizerError(f"{name}: every special token needs a token_str, got {str(token)[:60]}")
            names[_count(token, "rank", name)] = text
    if any(rank >= n for rank in names):
        raise TokenizerError(f"{name} has special tokens of ranks up to {max(names)}, and room for {n}")
    specials = {names.get(i, f"<SPECIAL_{i}>"): i for i in range(n)}
    if len(specials) != n:
        raise TokenizerError(f"{name}: two special tokens have one name")
    return specials
