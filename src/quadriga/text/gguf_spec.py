"""A GGUF file's vocabulary in the form that the libraries read: a tokenizer.json, or a SentencePiece model.

What a file leaves out is what llama.cpp takes for it (src/llama-vocab.cpp), for such files were made to be read there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quadriga.errors import TokenizerError
from quadriga.text.added_tokens import END_OF_TURN, AddedToken
from quadriga.text.pretokenize import GGUF_PATTERNS, pattern_of_vocabulary
from quadriga.text.sentencepiece_model import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Model,
    Piece,
)

logger = logging.getLogger(__name__)

ROLES = ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask")
"""Of ``tokenizer.ggml.ROLE_token_id``; the misspelling is the format's."""
_PREFIX = "tokenizer.ggml."
_KINDS = range(7)
"""Of ``tokenizer.ggml.token_type``: 0 is no type, which llama.cpp takes for an ordinary token; then NORMAL to BYTE."""
_READ = (
    *("model", "pre", "tokens", "token_type", "scores", "merges", "precompiled_charsmap"),
    *("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces"),
)
_HARMLESS = (
    "token_type_count",  # of BERT's segments
    "add_sep_token",  # between two texts
    "cls_token_id",
    # Where a middle is to be filled in; found by name.
    *(f"{part}_token_id" for part in ("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep")),
    *(f"{part}_token_id" for part in ("prefix", "suffix", "middle")),
)
"""Keys that change no ids of one text."""
SENTENCEPIECE = {"llama": BPE, "t5": UNIGRAM}
"""``tokenizer.ggml.model`` of SentencePiece vocabularies."""

NO_VOCABULARY = ("no_vocab", "none")
"""``tokenizer.ggml.model`` of a file without a vocabulary; we write the first: llama.cpp refuses a missing key."""
_OF_ARCHITECTURE = {"dbrx": "dbrx", "mpt": "mpt"}
"""Architectures whose released models share one vocabulary."""


@dataclass(frozen=True)
class Tokens:
    """The lists of a GGUF file's vocabulary, checked, and the tokens with a role."""

    texts: list[str]
    kinds: list[int]
    roles: dict[str, int]

    @property
    def ends(self) -> list[int]:
        """Ids that end a turn by their role."""
        return list(dict.fromkeys(self.roles[role] for role in ("eos", "eot", "eom") if role in self.roles))

    @cached_property
    def added(self) -> list[AddedToken]:
        """The tokens that are looked for before anything else."""
        of_role = set(self.roles.values())
        rows = enumerate(zip(self.texts, self.kinds, strict=True))
        return [
            AddedToken(id=i, content=text, special=kind != USER_DEFINED or i in of_role or text in END_OF_TURN)
            for i, (text, kind) in rows
            if kind in (UNKNOWN, CONTROL, USER_DEFINED) or (i in of_role and _is_name(text))
        ]


def tokens_of(metadata: Mapping[str, Any]) -> Tokens:
    """The lists of a GGUF vocabulary.

    Raises:
        TokenizerError: lists of different lengths, or ids that no token has.
    """
    texts = string_list(metadata, "tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type")
    if kinds is None:
        kinds = [_kind_by_text(text) for text in texts]
    if not isinstance(kinds, list) or len(kinds) != len(texts):
        raise TokenizerError(f"tokenizer.ggml.token_type must have {len(texts)} entries")
    if strange := [kind for kind in kinds if type(kind) is not int or kind not in _KINDS]:
        raise TokenizerError(
            f"tokenizer.ggml.token_type must be numbers from {min(_KINDS)} to {max(_KINDS)}, got {str(strange[0])[:40]}"
        )
    _log_unread(metadata)
    roles: dict[str, int] = {}
    for role in ROLES:
        value = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if value is not None and not (type(value) is int and 0 <= value < len(texts)):
            raise TokenizerError(f"tokenizer.ggml.{role}_token_id must be below {len(texts)}, got {value!r}")
        if value is not None:
            roles[role] = value
    texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(texts)]
    kinds = [kind if given else UNUSED for kind, given in zip(kinds, metadata["tokenizer.ggml.tokens"], strict=True)]
    return Tokens(texts, kinds, roles)


def _log_unread(metadata: Mapping[str, Any]) -> None:
    """Name the keys about the vocabulary that nobody here knows: they may change its ids."""
    known = {f"{_PREFIX}{key}" for key in (*_READ, *_HARMLESS)} | {f"{_PREFIX}{role}_token_id" for role in ROLES}
    unread = sorted(key for key in metadata if key.startswith(_PREFIX) and key not in known)
    if unread:
        logger.warning("keys of the GGUF vocabulary that are not read: %s", ", ".join(unread)[:400])


def flag(metadata: Mapping[str, Any], key: str, otherwise: bool) -> bool:
    """A truth value of the vocabulary's.

    Args:
        key: behind ``tokenizer.ggml.``.
        otherwise: what a file means that leaves it out.

    Raises:
        TokenizerError: it is of another type.
    """
    value = metadata.get(_PREFIX + key, otherwise)
    if not isinstance(value, bool):
        raise TokenizerError(f"{_PREFIX}{key} must be true or false, got {str(value)[:40]!r}")
    return value


def bpe_spec(tokens: Tokens, metadata: Mapping[str, Any], pre: str) -> dict[str, Any]:
    """A GGUF 'gpt2' vocabulary in the form of a tokenizer.json; ``pre`` as :func:`pre_of` gives it.

    Raises:
        TokenizerError: lists that do not fit together.
    """
    split = GGUF_PATTERNS[pre]
    vocab, merges = _words_and_merges(tokens, metadata)
    splits: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in split.patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [token.as_json() for token in tokens.added],
        "normalizer": None if split.normalizer is None else {"type": split.normalizer},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges,
            "ignore_merges": split.whole_words,
            "fuse_unk": False,
            "byte_fallback": False,
        },
    }


def _words_and_merges(tokens: Tokens, metadata: Mapping[str, Any]) -> tuple[dict[str, int], list[str]]:
    merges = string_list(metadata, "tokenizer.ggml.merges")
    if any(merge.count(" ") != 1 for merge in merges):
        raise TokenizerError("tokenizer.ggml.merges must be pairs separated by one space")
    vocab = dict(zip(tokens.texts, range(len(tokens.texts)), strict=True))
    if len(vocab) != len(tokens.texts):
        twice = next(text for i, text in enumerate(tokens.texts) if vocab[text] != i)
        raise TokenizerError(f"tokenizer.ggml.tokens lists a token twice: {twice!r}")
    return vocab, merges


def gemma4_spec(tokens: Tokens, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A GGUF 'gemma4' vocabulary as a tokenizer.json: spaces are marked, what is no piece is written in bytes.

    llama.cpp merges runs of line ends and what stands between them apart (llama-vocab.cpp); the published
    tokenizer.json merges a text as a whole, which is the same, for no merge crosses the two.

    Raises:
        TokenizerError: lists that do not fit together.
    """
    vocab, merges = _words_and_merges(tokens, metadata)
    unknown = tokens.roles.get("unknown")
    marked = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "version": "1.0",
        "added_tokens": [token.as_json() for token in tokens.added],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [marked, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges,
            "unk_token": None if unknown is None else tokens.texts[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def sentencepiece(tokens: Tokens, metadata: Mapping[str, Any]) -> Model:
    """A GGUF 'llama' or 't5' vocabulary in the form of a SentencePiece model.

    LLaMA and Grok-1 normalise nothing, so that is what a file means that says nothing of it.

    Raises:
        TokenizerError: lists that do not fit together.
    """
    model = metadata["tokenizer.ggml.model"]
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens.texts):
        raise TokenizerError(
            f"tokenizer.ggml.scores must have {len(tokens.texts)} numbers; a {model!r} vocabulary needs them"
        )
    if strange := [score for score in scores if type(score) not in (int, float) or score != score]:
        raise TokenizerError(f"tokenizer.ggml.scores must be numbers, got {str(strange[0])[:40]}")
    control = {token.id for token in tokens.added if token.control}
    kinds = [
        CONTROL if i in control and kind in (NORMAL, USER_DEFINED) else kind for i, kind in enumerate(tokens.kinds)
    ]
    charsmap = metadata.get("tokenizer.ggml.precompiled_charsmap") or []
    if not isinstance(charsmap, list) or not all(isinstance(b, int) and -128 <= b < 256 for b in charsmap):
        raise TokenizerError("tokenizer.ggml.precompiled_charsmap must be a list of bytes")
    return Model(
        [Piece(*row) for row in zip(tokens.texts, scores, kinds, strict=True)],
        model_type=SENTENCEPIECE[model],
        byte_fallback=BYTE in kinds,
        add_space_prefix=flag(metadata, "add_space_prefix", otherwise=model == "llama"),
        remove_extra_whitespaces=flag(metadata, "remove_extra_whitespaces", otherwise=False),
        charsmap=bytes(b & 0xFF for b in charsmap),
    )


def pre_of(tokens: Tokens, metadata: Mapping[str, Any]) -> str:
    """How the file's vocabulary cuts text, a name in GGUF_PATTERNS.

    Files of early 2024 do not say it. Then the architecture does, or the tokens do, which no rule of their own may cut;
    else it is llama.cpp's default, with a warning, as there.

    Raises:
        TokenizerError: an unknown name.
    """
    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None:
        words = [text for text, kind in zip(tokens.texts, tokens.kinds, strict=True) if kind == NORMAL]
        pre = _OF_ARCHITECTURE.get(str(metadata.get("general.architecture"))) or pattern_of_vocabulary(words)
        if pre is None:
            pre = "default"
            logger.warning(
                "the GGUF file has no tokenizer.ggml.pre, so nobody knows how its text was split: taken for %r, as "
                "llama.cpp does. Answers may be worse than the model's. Convert the model again, or set the key.",
                pre,
            )
        else:
            logger.warning("the GGUF file has no tokenizer.ggml.pre; its tokens are those of %r", pre)
    if not isinstance(pre, str) or pre not in GGUF_PATTERNS:
        raise TokenizerError(
            f"tokenizer.ggml.pre must be one of {', '.join(sorted(GGUF_PATTERNS))}; got {pre!r}. Its text would be "
            "split wrongly, so it is refused. Convert the model's safetensors with its tokenizer.json instead."
        )
    return pre


def _kind_by_text(text: str) -> int:
    """The type of a token in a file without types."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return BYTE
    return {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}.get(text, NORMAL)


def _is_name(text: str) -> bool:
    return len(text) > 2 and text[0] in "<[" and text[-1] in ">]"


def string_list(metadata: Mapping[str, Any], key: str) -> list[str]:
    """A list of strings of a GGUF file.

    Raises:
        TokenizerError: it is none.
    """
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise TokenizerError(f"{key} must be a list of strings")
    return values
