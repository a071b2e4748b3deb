"""Added tokens: texts with an id of their own beside a vocabulary's pieces, and which of them are control tokens.

Checkpoints declare them in several places: ``added_tokens`` of tokenizer.json, ``added_tokens_decoder`` of
tokenizer_config.json, added_tokens.json, special_tokens_map.json, token types of a GGUF file. This module reads the
small files and finds the tokens in a text. It is no tokeniser: what lies between them is a vocabulary's business.

A control token ends turns, begins roles and so on. It is written by templates, never typed by users, whatever its file
says about it: converters of 2023 marked such tokens as ordinary, so the shape of its name counts as well.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from quadriga.errors import TokenizerError
from quadriga.text.template_variables import OF_CLASS

logger = logging.getLogger(__name__)

_MAX_ID = 2**24
_MAX_GAP = 2**17
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")

_CONTROL = re.compile(r"<\|.+\|>|<｜.+｜>|</?(?:start|end)_of_turn>|<EOT>", re.DOTALL)
"""<|im_end|>, DeepSeek's <｜User｜>, Gemma's turns: control tokens by their text, as llama.cpp's converter has it."""

_BRACKETED = re.compile(r"▁?[<\[{].*[>\]}]", re.DOTALL)
"""A name, not a word: <s>, [INST]."""

END_OF_TURN = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<EOT>",
    "<｜end▁of▁sentence｜>",
)
"""Control tokens whatever type a GGUF file gives them (llama.cpp's src/llama-vocab.cpp)."""


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """One added token; the flags mean what they mean in the tokenizers library."""

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    """Takes the white space before it along."""
    rstrip: bool = False
    """Takes the white space after it along."""
    single_word: bool = False
    """Only where no letter or digit touches it."""
    normalized: bool = False
    """Looked for after normalisation of the text, not before."""

    @property
    def control(self) -> bool:
        """True if only a template may write it."""
        return self.special or looks_like_control(self.content)

    def as_json(self) -> dict[str, Any]:
        """Its entry in a tokenizer.json."""
        return {"id": self.id, "content": self.content, **{flag: getattr(self, flag) for flag in _FLAGS}}


def looks_like_control(text: str) -> bool:
    """True for the texts that are control tokens in every published vocabulary that has them."""
    return _CONTROL.fullmatch(text) is not None


class Splitter:
    """Finds added tokens in a text as the tokenizers library does: the leftmost, of these the longest."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._tokens = {token.content: token for token in tokens if token.content}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def split(self, text: str, typed: Sequence[tuple[int, int]] = ()) -> list[str | int]:
        """The text in order: strings between added tokens (none is empty), and the tokens' ids.

        Args:
            text: any text.
            typed: half-open ranges of characters, in order, in which no control token is looked for.
        """
        parts: list[str | int] = []
        at = 0
        for match in self._pattern.finditer(text) if self._pattern is not None else ():
            token = self._tokens[match.group()]
            start, stop = match.span()
            if token.single_word and not _stands_alone(text, start, stop):
                continue
            if typed and token.control and _touches(start, stop, typed):
                continue
            while token.lstrip and start > at and _is_space(text[start - 1]):
                start -= 1
            while token.rstrip and stop < len(text) and _is_space(text[stop]):
                stop += 1
            if start > at:
                parts.append(text[at:start])
            parts.append(token.id)
            # White space that a token took along can be a token of its own all the same: so it is in the library.
            at = stop
        if at < len(text):
            parts.append(text[at:])
        return parts


def _touches(start: int, stop: int, ranges: Sequence[tuple[int, int]]) -> bool:
    before_stop = bisect_left(ranges, (stop, 0))
    return before_stop > 0 and ranges[before_stop - 1][1] > start


def _stands_alone(text: str, start: int, stop: int) -> bool:
    return not (start > 0 and _is_word(text[start - 1])) and not (stop < len(text) and _is_word(text[stop]))


def _is_word(character: str) -> bool:
    """Unicode's word characters (UTS 18, annex C), which Python's \\w leaves without the combining marks."""
    return unicodedata.category(character)[0] in "LM" or unicodedata.category(character) in ("Nd", "Nl", "Pc")


def _is_space(character: str) -> bool:
    """Unicode's White_Space; Python counts the four information separators too."""
    return character.isspace() and character not in "\x1c\x1d\x1e\x1f"


# Declarations --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Declared:
    """What the small files beside a vocabulary say about single tokens."""

    tokens: tuple[AddedToken, ...] = ()
    """Of tokenizer_config.json, with their flags."""
    bare: tuple[AddedToken, ...] = ()
    """Of added_tokens.json, which knows texts and ids only."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """"bos_token" and so on -> text."""
    usual: Mapping[str, str] = field(default_factory=dict)
    """The same of tokens that the tokenizer's class has where its configuration is silent, if the file has them."""
    special: frozenset[str] = frozenset()
    """Texts that are special tokens because they have a role, or are listed as additional ones."""

    def merged(
        self,
        own: Iterable[AddedToken],
        vocabulary: Callable[[str], int | None],
        is_word: Callable[[str], bool],
        where: str,
    ) -> list[AddedToken]:
        """A vocabulary file's own added tokens and these, in order of their ids: no id and no text twice.

        As transformers has it: the flags of tokenizer_config.json win, a token with a role is an added token and
        special, and a text that the vocabulary has keeps the vocabulary's id. One exception: a word that anybody
        writes ("!" to fill up lines) is text, whatever its role.

        Args:
            own: the file's added tokens.
            vocabulary: the id of one of the file's other tokens, or None.
            is_word: True for one of these that ordinary text gives.
            where: what errors call the file.

        Raises:
            TokenizerError: an id has two texts.
        """
        tokens = [*own, *self.tokens]
        known = {token.content for token in tokens}
        tokens += [token for token in self.bare if token.content not in known]
        known |= {token.content for token in self.bare}
        ids = {text: vocabulary(text) for text in sorted({*known, *self.special})}
        tokens += [AddedToken(id=i, content=text) for text, i in ids.items() if i is not None and text not in known]
        first = [AddedToken(id=i, content=text) for text, i in ids.items() if i is not None]
        return sorted((self._judged(token, is_word) for token in _distinct([*first, *tokens], where)), key=_by_id)

    def _judged(self, token: AddedToken, is_word: Callable[[str], bool]) -> AddedToken:
        special = token.special or token.content in self.special
        if special and _BRACKETED.fullmatch(token.content) is None and is_word(token.content):
            special = False
        return replace(token, special=special)


def declared(
    config: Mapping[str, Any], added_tokens: Mapping[str, Any], special_tokens_map: Mapping[str, Any], kind: str = ""
) -> Declared:
    """Read tokenizer_config.json, added_tokens.json and special_tokens_map.json ({} where there is none).

    ``kind`` is the tokenizer's class (``template_variables.class_of``).

    As transformers does: special_tokens_map.json counts only where tokenizer_config.json has no
    ``added_tokens_decoder``, and then it wins.

    Raises:
        TokenizerError: an entry of the wrong kind.
    """
    decoder = config.get("added_tokens_decoder")
    named = {**config, **special_tokens_map} if decoder is None else config
    roles = {key: _text_of(named[key], key) for key in _ROLES if _given(named.get(key))}
    more = named.get("additional_special_tokens") or []
    if not isinstance(more, list):
        raise TokenizerError("additional_special_tokens must be a list of tokens")
    usual = {role: text for role, text in OF_CLASS.get(kind, {}).items() if role not in named}
    listed = [_text_of(token, "additional_special_tokens") for token in more]
    special = frozenset([*roles.values(), *usual.values(), *listed])
    bare = _of_added_tokens_json(added_tokens, special)
    return Declared(tuple(_of_decoder(decoder or {})), tuple(bare), roles, usual, special)


def within_rows(tokens: Sequence[AddedToken], n_rows: int | None, name: str) -> tuple[list[AddedToken], frozenset[str]]:
    """The tokens that a model of ``n_rows`` has, and the texts of the others (one logged line)."""
    kept = [token for token in tokens if n_rows is None or token.id < n_rows]
    beyond = [token.content for token in tokens if n_rows is not None and token.id >= n_rows]
    if beyond:
        message = "%s: the model has %d tokens, so these added ones are left out: %s"
        logger.warning(message, name, n_rows, ", ".join(map(repr, beyond[:5])))
    return kept, frozenset(beyond)


def check_gap(n_words: int, tokens: Sequence[AddedToken], name: str) -> None:
    """Refuse ids so far behind a vocabulary of ``n_words`` that the room between must be a mistake, or an attack.

    Raises:
        TokenizerError: there is one.
    """
    for token in tokens:
        if token.id >= n_words + _MAX_GAP:
            raise TokenizerError(
                f"{name}: the added token {token.content!r} has the id {token.id} behind a vocabulary of {n_words}. At "
                f"most {_MAX_GAP} ids may lie unused between."
            )


def added_token(entry: object, token_id: object, where: str) -> AddedToken:
    """One entry of a file, checked.

    Raises:
        TokenizerError: no text, flags that are none, or an id that cannot be.
    """
    if not isinstance(entry, Mapping) or not _is_text(entry.get("content")):
        raise TokenizerError(f"{where}: every added token needs a text and an id below 2^24")
    if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < _MAX_ID:
        raise TokenizerError(f"{where}: every added token needs a text and an id below 2^24; got {token_id!r}")
    flags = {flag: entry.get(flag, False) for flag in _FLAGS}
    wrong = [flag for flag, value in flags.items() if not isinstance(value, bool)]
    if wrong:
        raise TokenizerError(f"{where}: {wrong[0]} of the added token {entry['content']!r} must be true or false")
    if "normalized" not in entry:
        flags["normalized"] = not flags["special"]
    return AddedToken(id=token_id, content=entry["content"], **flags)


def _of_added_tokens_json(table: Mapping[str, Any], special: frozenset[str]) -> list[AddedToken]:
    entries = [({"content": text, "special": text in special}, token_id) for text, token_id in table.items()]
    return [added_token(entry, token_id, "added_tokens.json") for entry, token_id in entries]


def _of_decoder(table: object) -> list[AddedToken]:
    where = "added_tokens_decoder in tokenizer_config.json"
    if not isinstance(table, Mapping):
        raise TokenizerError(f"{where} must be an object from ids to tokens")
    return [added_token(entry, int(key) if str(key).isdecimal() else key, where) for key, entry in table.items()]


def _by_id(token: AddedToken) -> int:
    return token.id


def _distinct(tokens: Iterable[AddedToken], where: str) -> list[AddedToken]:
    """Each token once. The later entry of a text wins, but never with another id: the first id is in use."""
    by_text: dict[str, AddedToken] = {}
    for token in tokens:
        if not token.content:
            continue
        known = by_text.get(token.content)
        if known is not None and known.id != token.id:
            message = "%s: the added token %r is there with the ids %d and %d; the first is used"
            logger.warning(message, where, token.content, known.id, token.id)
            token = replace(token, id=known.id)
        by_text[token.content] = token
    by_id: dict[int, AddedToken] = {}
    for token in by_text.values():
        other = by_id.setdefault(token.id, token)
        if other is not token:
            raise TokenizerError(f"{where}: the id {token.id} is both {other.content!r} and {token.content!r}")
    return list(by_text.values())


def _given(value: object) -> bool:
    return bool(value.get("content") if isinstance(value, Mapping) else value)


def _text_of(value: object, key: str) -> str:
    text = value.get("content") if isinstance(value, Mapping) else value
    if not _is_text(text):
        raise TokenizerError(f"{key} in tokenizer_config.json must be a text or a token, got {value!r:.80}")
    return str(text)


def _is_text(value: object) -> bool:
    """True for a text with bytes: JSON may hold half of a character, which has none."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
