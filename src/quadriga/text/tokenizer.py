"""One Tokenizer over four kinds of vocabulary: tiktoken ranks, tokenizer.json, SentencePiece, GGUF.

The algorithms are the well-kept libraries' (tiktoken, tokenizers, sentencepiece). What is ours is the border: files are
checked before a library sees them, typed special tokens stay text unless the caller says otherwise, and every token has
its exact bytes, which is what incremental detokenising needs.

    encode("<|im_end|>")                      -> several ids, ordinary text: user content can never end a turn
    encode("<|im_end|>", allow_special=True)  -> one id: only templates do this
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from quadriga.errors import TokenizerError
from quadriga.text import gguf_spec, sentencepiece_model, template_variables
from quadriga.text.added_tokens import (
    AddedToken,
    Declared,
    Splitter,
    check_gap,
    declared,
    looks_like_control,
    within_rows,
)
from quadriga.text.pretokenize import CL100K_PATTERN, GGUF_PATTERNS
from quadriga.text.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceVocabulary,
)
from quadriga.text.tokenizers_json import TokenizersVocabulary

logger = logging.getLogger(__name__)

CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
"""Of the published cl100k_base.tiktoken, 1,681,126 bytes."""

CL100K_SPECIALS = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}
DBRX_SPECIALS = {**CL100K_SPECIALS, "<|pad|>": 100277, "<|im_start|>": 100278, "<|im_end|>": 100279}
"""DBRX adds three to GPT-4's; ids 100280..100351 only pad the embedding table."""

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
"""What may belong to a vocabulary in a checkpoint's folder, besides *.tiktoken."""

_MAX_FILE_BYTES = 64 << 20  # the largest published tokenizer.json is about 35 MB
_MAX_JSON_DEPTH = 32
_JOINED = 1 << 15
_MAX_TEMPLATE_BYTES = 200_000


class Vocabulary(Protocol):
    """What a library must do for :class:`Tokenizer`.

    Three things more where the place in a text matters, as it does where a space is written before the first word:

        encode_runs(runs, continues=False)   ids of a text in order: ids that are there already, and typed text
                                             between them; ``continues``: other text stands before it
        opening                              0, or what first_bytes is given for the first token of a text
        first_bytes(token_id, opening)       (bytes of a token before which there is no text, opening for the next)
    """

    n_vocab: int

    def encode(self, text: str, allow_special: bool) -> list[int]:
        """Ids of non-empty valid text."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes a token stands for; a special token's own name.

        Raises:
            TokenizerError: no token has this id.
        """
        ...


class Tokenizer:
    """Text to ids and back.

    Attributes:
        n_vocab: ids are 0 .. n_vocab-1.
        special_ids: special token text -> id.
        bos_id, pad_id: or None where the vocabulary has none.
        eos_ids: ids that end an answer, the eos token's first; DBRX has two.
        prefix_ids: put before a plain prompt ([bos_id] where the model was trained so, else empty).
        suffix_ids: put after a plain prompt; empty for nearly every model that generates.
        added: the tokens that are looked for before anything else, with their flags.
        chat_template: the checkpoint's own template, or None.
        template_variables: the special tokens it may name: bos_token, eos_token and others.
        unused_ids: ids below n_vocab that no token has; left out, the vocabulary is asked about every id, once.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        special_ids: Mapping[str, int],
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        pad_id: int | None = None,
        add_bos: bool = False,
        prefix_ids: Sequence[int] = (),
        suffix_ids: Sequence[int] = (),
        chat_template: str | None = None,
        template_variables: Mapping[str, str | list[str]] | None = None,
        added: Iterable[AddedToken] = (),
        unused_ids: Iterable[int] | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._unused_ids = unused_ids
        self.n_vocab = vocabulary.n_vocab
        self.special_ids = dict(special_ids)
        self.bos_id, self.pad_id = bos_id, pad_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        if add_bos and bos_id is None:
            raise TokenizerError("the tokenizer asks for a bos token before every prompt but names none")
        self.prefix_ids = list(prefix_ids) or ([bos_id] if add_bos and bos_id is not None else [])
        self.suffix_ids = list(suffix_ids)
        if chat_template is not None and len(chat_template.encode(errors="replace")) > _MAX_TEMPLATE_BYTES:
            raise TokenizerError(f"the chat template is over {_MAX_TEMPLATE_BYTES} bytes; that is no template")
        self.chat_template = chat_template
        if template_variables is None:
            template_variables = self._tokens_by_id()
        self.template_variables = dict(template_variables)
        self.added = tuple(added)
        flags = {text: AddedToken(id=i, content=text, special=True) for text, i in self.special_ids.items()}
        flags |= {token.content: token for token in self.added if token.content in flags}
        plain = (token for token in self.added if token.content not in flags and not token.normalized)
        self._splitter = Splitter([*flags.values(), *plain])
        # A control token by its looks alone is shown, as transformers shows it; what its file calls special is not.
        self._special = frozenset(token.id for token in flags.values() if token.special)
        named = {"bos_id": (bos_id,), "eos_ids": self.eos_ids, "pad_id": (pad_id,)}
        affixes = {"prefix_ids": self.prefix_ids, "suffix_ids": self.suffix_ids}
        for name, ids in {**named, "special_ids": self._special, **affixes}.items():
            outside = [i for i in ids if i is not None and not 0 <= i < self.n_vocab]
            if outside:
                raise TokenizerError(f"{name} must be below the vocabulary's {self.n_vocab} tokens, got {outside[:4]}")
        self._runs: Callable[..., list[int]] | None = getattr(vocabulary, "encode_runs", None)
        self._opening: int = getattr(vocabulary, "opening", 0)
        self._first_bytes: Callable[[int, int], tuple[bytes, int]] | None = getattr(vocabulary, "first_bytes", None)

    @cached_property
    def unused_ids(self) -> frozenset[int]:
        """Ids below ``n_vocab`` that stand for no token: holes between ranks, entries that only fill the table."""
        if self._unused_ids is not None:
            return frozenset(self._unused_ids) - self._special
        return frozenset(i for i in range(self.n_vocab) if i not in self._special and not self._has(i))

    def _has(self, token_id: int) -> bool:
        try:
            self._vocabulary.token_bytes(token_id)
        except TokenizerError:
            return False
        return True

    def is_token(self, token_id: int) -> bool:
        """True if a token has this id. Models often have more rows than that: holes, and padding after the last id."""
        return 0 <= token_id < self.n_vocab and token_id not in self.unused_ids

    def unused_rows(self, n_rows: int) -> list[int]:
        """The ids below a model's ``n_rows`` that no token has, in order."""
        return [*sorted(i for i in self.unused_ids if i < n_rows), *range(self.n_vocab, n_rows)]

    @cached_property
    def _silent(self) -> frozenset[int]:
        return self._special | self.unused_ids

    def _tokens_by_id(self) -> dict[str, str]:
        """bos_token and eos_token by what the vocabulary calls them."""
        names = {token_id: text for text, token_id in self.special_ids.items()}
        ids = {"bos_token": self.bos_id, "eos_token": next(iter(self.eos_ids), None)}
        return {variable: names[i] for variable, i in ids.items() if i in names}

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of ``text``; nothing is prepended.

        Args:
            text: any valid Unicode.
            allow_special: True turns special-token strings inside the text into their ids. Never for users' words.

        Raises:
            TokenizerError: the text holds lone surrogates, so it has no bytes.
        """
        return self._vocabulary.encode(_valid(text), allow_special) if text else []

    def encode_prompt(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of a whole prompt: with what the model wants before and after a text, unless the text has it already.

        Args:
            text: any valid Unicode.
            allow_special: as for encode; True for text that a program has rendered with the model's own marks.

        Raises:
            TokenizerError: as for encode.
        """
        ids = self.encode(text, allow_special=allow_special)
        before, after = self.prefix_ids, self.suffix_ids
        begun = ids[: len(before)] == before
        ended = bool(after) and ids[-len(after) :] == after
        return [*([] if begun else before), *ids, *([] if ended else after)]

    def encode_mixed(self, text: str, typed: Sequence[tuple[int, int]]) -> list[int]:
        """Ids of a text in which special tokens count, except where users typed them.

        Args:
            text: any valid Unicode.
            typed: half-open ranges of its characters, in order: what users typed stays text.

        Raises:
            TokenizerError: as for encode.
        """
        return self._encode_runs(self._splitter.split(_valid(text), typed))

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of typed text that continues a text: no space is put before its first word.

        Raises:
            TokenizerError: as for encode.
        """
        return self._encode_runs([_valid(text)], continues=True) if text else []

    def _encode_runs(self, runs: Sequence[str | int], *, continues: bool = False) -> list[int]:
        if self._runs is not None:
            return self._runs(runs, continues=continues)
        return [i for run in runs for i in ([run] if isinstance(run, int) else self._vocabulary.encode(run, False))]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token adds to a text; none for special tokens and for ids that no token has.

        Raises:
            TokenizerError: the id is outside the vocabulary.
        """
        if not 0 <= token_id < self.n_vocab:
            raise TokenizerError(f"token ids are 0 to {self.n_vocab - 1}, got {token_id}")
        return b"" if token_id in self._silent else self._vocabulary.token_bytes(token_id)

    def opening(self, after: Iterable[int] = ()) -> int:
        """What :meth:`first_bytes` is given for the token that follows the ids ``after``; 0 if these hold text.

        SentencePiece writes a space before the first word of a text. It belongs to no text where nothing stands
        before it, and is a space like any other where something does: an answer continues its prompt.
        """
        opening = self._opening
        for token_id in after:
            if not opening:
                break
            if token_id < self.n_vocab:
                _, opening = self.first_bytes(token_id, opening)
        return opening

    def first_bytes(self, token_id: int, opening: int) -> tuple[bytes, int]:
        """The bytes of a token before which there is no text yet, and ``opening`` for the next; 0: the text has begun.

        Raises:
            TokenizerError: as for token_bytes.
        """
        raw = self.token_bytes(token_id)
        if not opening or self._first_bytes is None or token_id in self._silent:
            return raw, opening
        return self._first_bytes(token_id, opening)

    def token_text(self, token_id: int) -> str:
        """One token as a person may look at it: special tokens by name, partial characters as U+FFFD."""
        if not 0 <= token_id < self.n_vocab:
            raise TokenizerError(f"token ids are 0 to {self.n_vocab - 1}, got {token_id}")
        return self._vocabulary.token_bytes(token_id).decode("utf-8", errors="replace")

    def decode(self, ids: Sequence[int], *, after: Iterable[int] = ()) -> str:
        """The text of ``ids`` without special tokens; bytes that form no character become U+FFFD.

        Args:
            ids: the tokens.
            after: those before them, of which nothing is shown: a prompt's, where ``ids`` is its answer.

        Raises:
            TokenizerError: an id is outside the vocabulary, or one that no token has.
        """
        opening, first = self.opening(after), list[bytes]()
        known: dict[int, bytes] = {}  # a vocabulary takes some microseconds to say what a token is
        for n, token_id in enumerate(ids):
            if not opening:
                ids = ids[n:]
                break
            if token_id in self.unused_ids:
                raise TokenizerError(f"token id {token_id} is one of the vocabulary's unused ids")
            raw, opening = self.first_bytes(token_id, opening)
            first.append(raw)
        else:
            ids = ()
        for token_id in ids:
            if token_id not in known:
                if token_id in self.unused_ids:
                    raise TokenizerError(f"token id {token_id} is one of the vocabulary's unused ids")
                known[token_id] = self.token_bytes(token_id)
        # In groups: one join of a million pieces would let no other thread run.
        groups = (ids[start : start + _JOINED] for start in range(0, len(ids), _JOINED))
        rest = [b"".join([known[token_id] for token_id in group]) for group in groups]
        return b"".join([*first, *rest]).decode("utf-8", errors="replace")


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text must be valid Unicode; character {error.start} is the lone surrogate {text[error.start]!r}"
        ) from None
    return text


# Loading -------------------------------------------------------------------------------------------------------------


def load_directory(
    path: Path, cl100k_ranks: Callable[[], Path] | None = None, *, n_rows: int | None = None
) -> Tokenizer | None:
    """The tokenizer that lies beside a checkpoint's weights, or None if there is none.

    Looks for tokenizer.json, then a *.tiktoken rank file, then tokenizer.model; then, where tokenizer_config.json says
    the vocabulary is tiktoken's (DBRX's first release ships no file), asks ``cl100k_ranks`` for the rank file.

    Args:
        path: the checkpoint's folder.
        cl100k_ranks: gives GPT-4's rank file.
        n_rows: tokens the model has. Added tokens beyond can never be used and are left out, with a logged line.

    Raises:
        TokenizerError: a file is malformed, too large, or names tokens that do not exist.
    """
    config = _read_json_if_there(path / "tokenizer_config.json")
    others = [_read_json_if_there(path / name) for name in ("special_tokens_map.json", "config.json")]
    tokenizer = _load_vocabulary(path, config, others[0], cl100k_ranks, n_rows)
    if tokenizer is not None:
        variables, complete = template_variables.from_files(config, *others)
        tokenizer.template_variables = variables if complete else {**tokenizer._tokens_by_id(), **variables}
    return tokenizer


def _load_vocabulary(
    path: Path,
    config: Mapping[str, Any],
    special_tokens_map: Mapping[str, Any],
    cl100k_ranks: Callable[[], Path] | None,
    n_rows: int | None,
) -> Tokenizer | None:
    template = _chat_template(path, config)
    beside = declared(config, _read_json_if_there(path / "added_tokens.json"), special_tokens_map)
    folder = _Folder(config, beside, template, _generation_eos(path), n_rows)
    if (path / "tokenizer.json").exists():
        return _from_tokenizer_json(read_json(path / "tokenizer.json"), "tokenizer.json", folder)
    for ranks in sorted(path.glob("*.tiktoken")):
        return load_tiktoken(ranks, chat_template=template)
    if (path / "tokenizer.model").exists():
        return _from_sentencepiece(path / "tokenizer.model", folder)
    if "tiktoken" in str(config.get("tokenizer_class", "")).lower() and cl100k_ranks is not None:
        return load_tiktoken(cl100k_ranks(), chat_template=template)
    return None


def load_tiktoken(
    path: Path, *, special_ids: Mapping[str, int] = DBRX_SPECIALS, chat_template: str | None = None
) -> Tokenizer:
    """GPT-4's cl100k_base from a local rank file, with DBRX's special tokens unless told otherwise.

    Raises:
        TokenizerError: the file is not the published one (its sha256 differs).
    """
    raw = read_bytes(path)
    digest = hashlib.sha256(raw).hexdigest()
    if digest != CL100K_SHA256:
        raise TokenizerError(
            f"{path.name} must be the published cl100k_base ranks with sha256 {CL100K_SHA256[:12]}..., got "
            f"{digest[:12]}... ({len(raw)} bytes). Get it again: `quadriga pull cl100k_base`."
        )
    ends = [special_ids[name] for name in ("<|endoftext|>", "<|im_end|>") if name in special_ids]
    ranks = _parse_ranks(raw)
    vocabulary = _Tiktoken(ranks, special_ids)
    return Tokenizer(
        vocabulary,
        special_ids=special_ids,
        bos_id=special_ids["<|endoftext|>"],
        eos_ids=ends,
        pad_id=special_ids.get("<|pad|>"),
        chat_template=chat_template,
        unused_ids=set(range(vocabulary.n_vocab)) - set(ranks.values()) - set(special_ids.values()),
    )


def load_tokenizer_json(path: Path) -> Tokenizer:
    """A tokenizers-library file by itself, without the configuration that usually lies beside it."""
    return _from_tokenizer_json(read_json(path), path.name, _Folder({}, Declared(), None, [], None))


def load_sentencepiece(
    path: Path, *, config: Mapping[str, Any] | None = None, chat_template: str | None = None
) -> Tokenizer:
    """A SentencePiece model. Control pieces are its special tokens; a LLaMA-style model prepends bos."""
    config = config or {}
    return _from_sentencepiece(path, _Folder(config, declared(config, {}, {}), chat_template, [], None))


def load_gguf(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The vocabulary inside a GGUF file's metadata, or None if it carries none.

    Raises:
        TokenizerError: an unknown model or pre-tokeniser, or lists of different lengths.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or kind in ("no_vocab", "none"):
        return None
    if kind != "gpt2" and kind not in gguf_spec.SENTENCEPIECE:
        raise TokenizerError(f"tokenizer.ggml.model must be 'gpt2', 'llama' or 't5', got {kind!r}")
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise TokenizerError("tokenizer.chat_template must be a string")
    tokens, name = gguf_spec.tokens_of(metadata), "the GGUF vocabulary"
    bos, ends = tokens.roles.get("bos"), tokens.ends
    vocabulary: TokenizersVocabulary | SentencePieceVocabulary
    if kind == "gpt2":
        pre = gguf_spec.pre_of(tokens, metadata)
        vocabulary = TokenizersVocabulary(gguf_spec.bpe_spec(tokens, metadata, pre), name)
        add_bos = GGUF_PATTERNS[pre].add_bos and bos is not None
    else:
        model = gguf_spec.sentencepiece(tokens, metadata)
        vocabulary = SentencePieceVocabulary(model, name, added=tokens.added)
        bos = vocabulary.bos if bos is None else bos
        ends = ends or [i for i in (vocabulary.eos,) if i is not None]
        add_bos = kind == "llama" and bos is not None
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", kind == "t5"))
    return Tokenizer(
        vocabulary,
        special_ids=vocabulary.special_ids,
        added=tokens.added,
        bos_id=bos,
        eos_ids=ends,
        pad_id=tokens.roles.get("padding"),
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)),
        suffix_ids=_suffix(ends[:1] if add_eos else [], name),
        chat_template=template,
        # Converters fill holes with entries of this kind, named [PAD100256] and so on.
        unused_ids=[i for i, token_kind in enumerate(tokens.kinds) if token_kind == UNUSED],
        template_variables=template_variables.from_gguf(metadata, tokens.texts, bos, next(iter(ends), None)),
    )


@dataclass(frozen=True)
class _Folder:
    """What lies beside a vocabulary file."""

    config: Mapping[str, Any]
    tokens: Declared
    template: str | None
    generation_eos: list[int]
    n_rows: int | None


def _from_tokenizer_json(spec: Mapping[str, Any], name: str, folder: _Folder) -> Tokenizer:
    vocabulary = TokenizersVocabulary(spec, name, beside=folder.tokens, n_rows=folder.n_rows)
    roles = _roles(folder.tokens, vocabulary.token_id, vocabulary.left_out, name)
    bos, eos = roles.get("bos_token"), roles.get("eos_token")
    prefix, suffix = vocabulary.affixes(name)
    add_bos, add_eos = _asked_for(folder.config, prefix, suffix)
    if bos is None and prefix:
        bos = prefix[0]
    end = [] if eos is None else [eos]
    return Tokenizer(
        vocabulary,
        special_ids=vocabulary.special_ids,
        added=vocabulary.added,
        bos_id=bos,
        eos_ids=_ends(folder, eos, vocabulary.special_ids),
        pad_id=roles.get("pad_token"),
        add_bos=add_bos,
        prefix_ids=prefix if add_bos else (),
        suffix_ids=_suffix((suffix or end) if add_eos else [], name),
        chat_template=folder.template,
        unused_ids=vocabulary.unused_ids,
    )


def _from_sentencepiece(path: Path, folder: _Folder) -> Tokenizer:
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
    roles = _roles(folder.tokens, ids.get, left_out, name)
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
        eos_ids=[*_ends(folder, eos, special), *([] if vocabulary.eos is None else [vocabulary.eos])],
        pad_id=roles.get("pad_token", vocabulary.pad),
        add_bos=bool(add_bos) and bos is not None,
        suffix_ids=_suffix([eos] if add_eos and eos is not None else [], name),
        chat_template=folder.template,
        unused_ids=vocabulary.unused_ids,
    )


def _roles(
    tokens: Declared, token_id: Callable[[str], int | None], left_out: frozenset[str], name: str
) -> dict[str, int]:
    """The ids of the tokens that begin and end texts and fill up lines.

    Raises:
        TokenizerError: a bos or eos token that does not exist.
    """
    found: dict[str, int] = {}
    for role in ("bos_token", "eos_token", "pad_token"):
        text = tokens.roles.get(role)
        if text is None or text in left_out:
            continue
        if (i := token_id(text)) is not None:
            found[role] = i
        elif role == "pad_token":  # transformers would make one up, which the model has no row for
            logger.warning("tokenizer_config.json names pad_token %r, which is not in %s: left out", text, name)
        else:
            raise TokenizerError(f"tokenizer_config.json names {role} {text!r}, which is not in {name}")
    for role, text in tokens.usual.items():
        if (i := token_id(text)) is not None:
            found[role] = i
    return found


def _ends(folder: _Folder, eos: int | None, special_ids: Mapping[str, int]) -> list[int]:
    """Ids that end an answer."""
    ends = [*([] if eos is None else [eos]), *folder.generation_eos]
    chatml = "<|im_end|>" in special_ids and "<|im_start|>" in special_ids
    if chatml and folder.template and "<|im_end|>" in folder.template:
        ends.append(special_ids["<|im_end|>"])  # ChatML: the end of a turn ends an answer (DBRX's generation config)
    return ends


_LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
"""Classes of transformers that put bos before every text unless told otherwise, whatever the post-processor says."""


def _asked_for(config: Mapping[str, Any], prefix: list[int], suffix: list[int]) -> tuple[bool, bool]:
    """Whether a bos token goes before a text, and an eos token after it.

    As transformers has it: LLaMA's classes go by their flags alone, the general class by the file's post-processor.
    """
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    if kind == "PreTrainedTokenizer" and (prefix or suffix):
        return bool(prefix), bool(suffix)
    llama = kind in _LLAMA_CLASSES
    bos = bool(config.get("add_bos_token", True if llama else prefix))
    return bos, bool(config.get("add_eos_token", False if llama else suffix))


def _suffix(ids: list[int], name: str) -> list[int]:
    if ids:
        message = "%s puts the end token %s after every prompt: a plain prompt's answer begins after an end"
        logger.warning(message, name, ids)
    return ids


# tiktoken ------------------------------------------------------------------------------------------------------------


class _Tiktoken:
    def __init__(self, ranks: dict[bytes, int], special_ids: Mapping[str, int]) -> None:
        import tiktoken

        self._encoding = tiktoken.Encoding(
            "cl100k", pat_str=CL100K_PATTERN, mergeable_ranks=ranks, special_tokens=dict(special_ids)
        )
        self.n_vocab = max(special_ids.values()) + 1

    def encode(self, text: str, allow_special: bool) -> list[int]:
        if allow_special:
            return self._encoding.encode(text, allowed_special="all")
        return self._encoding.encode(text, disallowed_special=())

    def token_bytes(self, token_id: int) -> bytes:
        try:
            return bytes(self._encoding.decode_single_token_bytes(token_id))
        except KeyError:
            raise TokenizerError(f"token id {token_id} is one of the vocabulary's unused ids") from None


def _parse_ranks(raw: bytes) -> dict[bytes, int]:
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in raw.splitlines() if line)}


# Files ---------------------------------------------------------------------------------------------------------------


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


def _read_json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    if (path / "chat_template.jinja").exists():
        try:
            return read_bytes(path / "chat_template.jinja").decode()
        except UnicodeDecodeError as error:
            raise TokenizerError(f"chat_template.jinja must be UTF-8: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates; "default" is the chat one
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    if template is not None and not isinstance(template, str):
        raise TokenizerError("chat_template in tokenizer_config.json must be a string or a list of named templates")
    return template


def _generation_eos(path: Path) -> list[int]:
    file = path / "generation_config.json"
    value = read_json(file).get("eos_token_id") if file.exists() else None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise TokenizerError(f"eos_token_id in generation_config.json must be token ids, got {value!r}")
    return ids
