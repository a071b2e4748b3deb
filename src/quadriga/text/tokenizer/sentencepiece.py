"""tokenizer.model, SentencePiece's file, with the tokens that the files beside it add."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quadriga.text import sentencepiece_model
from quadriga.text.added_tokens import AddedToken, check_gap, declared, looks_like_control, within_rows
from quadriga.text.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceVocabulary,
)
from quadriga.text.template_variables import class_of
from quadriga.text.tokenizer.base import Tokenizer
from quadriga.text.tokenizer.files import Folder, Templates, read_bytes
from quadriga.text.tokenizer.roles import ends_of, logged_suffix, roles_of


def load_sentencepiece(
    path: Path, *, config: Mapping[str, Any] | None = None, chat_template: str | None = None
) -> Tokenizer:
    """A SentencePiece model. Control pieces are its special tokens; a LLaMA-style model prepends bos."""
    config = config or {}
    kind = class_of(config, {})
    beside = declared(config, {}, {}, kind)
    return from_sentencepiece(path, Folder(config, beside, kind, Templates(chat_template), [], None))


def from_sentencepiece(path: Path, folder: Folder) -> Tokenizer:
    """A SentencePiece model with the tokens that the files beside it add.

    By itself it is read as the sentencepiece library reads it. With a configuration it is a LLaMA-style tokenizer of
    transformers, where every added token splits the text.
    """
    name, config = path.name, folder.config
    model = sentencepiece_model.parse(read_bytes(path), name)
    own = [
        AddedToken(id=i, content=piece.text, special=piece.kind != USER_DEFINED)
        for i, piece in enumerate(model.pieces)
        if piece.kind in (UNKNOWN, CONTROL)
        or (piece.kind == USER_DEFINED and (config or looks_like_control(piece.text)))
    ]
    words = {piece.text: i for i, piece in enumerate(model.pieces) if piece.kind in (NORMAL, BYTE)}
    merged = folder.tokens.merged(own, words.get, words.__contains__, name)
    tokens, left_out = within_rows(merged, folder.n_rows, name)
    check_gap(len(model.pieces), tokens, name)
    model = sentencepiece_model.with_tokens(model, tokens, name)
    if config.get("add_prefix_space") is False:
        model = replace(model, add_space_prefix=False)
    vocabulary = SentencePieceVocabulary(model, name, added=tokens, every=config.get("legacy") is not False)
    special = vocabulary.special_ids
    ids = {**words, **{token.content: token.id for token in tokens}}
    roles = roles_of(folder.tokens, ids.get, left_out, name)
    # Grok-1's file names its controls by text only; LLaMA's by id.
    bos = roles.get("bos_token", vocabulary.bos if vocabulary.bos is not None else special.get("[BOS]"))
    eos = roles.get("eos_token", vocabulary.eos if vocabulary.eos is not None else special.get("[EOS]"))
    add_bos = config.get("add_bos_token", bos is not None and model.pieces[bos].text == "<s>")
    add_eos = bool(config.get("add_eos_token", False))
    return Tokenizer(
        vocabulary,
        special_ids=special,
        added=tokens,
        bos_id=bos,
        eos_ids=[*ends_of(folder, eos, special), *([] if vocabulary.eos is None else [vocabulary.eos])],
        pad_id=roles.get("pad_token", vocabulary.pad),
        add_bos=bool(add_bos) and bos is not None,
        suffix_ids=logged_suffix([eos] if add_eos and eos is not None else [], name),
        chat_template=folder.templates.chat,
        tool_template=folder.templates.tools,
        unused_ids=vocabulary.unused_ids,
    )
