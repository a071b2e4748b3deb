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
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

from quadriga.errors import TokenizerError
from quadriga.text import template_variables
from quadriga.text.pretokenize import CL100K_PATTERN, GGUF_PATTERNS

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

_MAX_FILE_BYTES = 64 << 20  # the largest published tokenizer.json is about 35 MB
_MAX_JSON_DEPTH = 32
_JOINED = 1 << 15
_MAX_TEMPLATE_BYTES = 200_000


class Vocabulary(Protocol):
    """What a library must do for :class:`Tokenizer`."""

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
        chat_template: the checkpoint's own template, or None.
        template_variables: the special tokens it may name: bos_token, eos_token and others.
        strip_leading_space: the vocabulary writes a space before the first word (SentencePiece), decoding drops it.
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
        chat_template: str | None = None,
        template_variables: Mapping[str, str | list[str]] | None = None,
        strip_leading_space: bool = False,
        unused_ids: Iterable[int] | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._unused_ids = unused_ids
        self.n_vocab = vocabulary.n_vocab
        self.special_ids = dict(special_ids)
        self._special = frozenset(self.special_ids.values())
        self.bos_id, self.pad_id = bos_id, pad_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        if add_bos and bos_id is None:
            raise TokenizerError("the tokenizer asks for a bos token before every prompt but names none")
        self.prefix_ids = [bos_id] if add_bos and bos_id is not None else []
        if chat_template is not None and len(chat_template.encode(errors="replace")) > _MAX_TEMPLATE_BYTES:
            raise TokenizerError(f"the chat template is over {_MAX_TEMPLATE_BYTES} bytes; that is no template")
        self.chat_template = chat_template
        if template_variables is None:
            template_variables = self._tokens_by_id()
        self.template_variables = dict(template_variables)
        self.strip_leading_space = strip_leading_space
        named = {"bos_id": (bos_id,), "eos_ids": self.eos_ids, "pad_id": (pad_id,), "special_ids": self._special}
        for name, ids in named.items():
            outside = [i for i in ids if i is not None and not 0 <= i < self.n_vocab]
            if outside:
                raise TokenizerError(f"{name} must be below the vocabulary's {self.n_vocab} tokens, got {outside[:4]}")

    def _tokens_by_id(self) -> dict[str, str]:
        """bos_token and eos_token by what the vocabulary calls them."""
        names = {token_id: text for text, token_id in self.special_ids.items()}
        ids = {"bos_token": self.bos_id, "eos_token": next(iter(self.eos_ids), None)}
        return {variable: names[i] for variable, i in ids.items() if i in names}

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

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of ``text``; nothing is prepended.

        Args:
            text: any valid Unicode.
            allow_special: True turns special-token strings inside the text into their ids. Never for users' words.

        Raises:
            TokenizerError: the text holds lone surrogates, so it has no bytes.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text must be valid Unicode; character {error.start} is the lone surrogate {text[error.start]!r}"
            ) from None
        return self._vocabulary.encode(text, allow_special) if text else []

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token adds to a text; none for special tokens and for ids that no token has.

        Raises:
            TokenizerError: the id is outside the vocabulary.
        """
        if not 0 <= token_id < self.n_vocab:
            raise TokenizerError(f"token ids are 0 to {self.n_vocab - 1}, got {token_id}")
        return b"" if token_id in self._silent else self._vocabulary.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """One token as a person may look at it: special tokens by name, partial characters as U+FFFD."""
        if not 0 <= token_id < self.n_vocab:
            raise TokenizerError(f"token ids are 0 to {self.n_vocab - 1}, got {token_id}")
        return self._vocabulary.token_bytes(token_id).decode("utf-8", errors="replace")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens; bytes that form no character become U+FFFD.

        Raises:
            TokenizerError: an id is outside the vocabulary, or one that no token has.
        """
        known: dict[int, bytes] = {}  # a vocabulary takes some microseconds to say what a token is
        for token_id in ids:
            if token_id not in known:
                if token_id in self.unused_ids:
                    raise TokenizerError(f"token id {token_id} is one of the vocabulary's unused ids")
                known[token_id] = self.token_bytes(token_id)
        # In groups: one join of a million pieces would let no other thread run.
        groups = (ids[start : start + _JOINED] for start in range(0, len(ids), _JOINED))
        raw = b"".join([b"".join([known[token_id] for token_id in group]) for group in groups])
        if self.strip_leading_space:
            raw = raw.removeprefix(b" ")
        return raw.decode("utf-8", errors="replace")


# Loading -------------------------------------------------------------------------------------------------------------


def load_directory(path: Path, cl100k_ranks: Callable[[], Path] | None = None) -> Tokenizer | None:
    """The tokenizer that lies beside a checkpoint's weights, or None if there is none.

    Looks for tokenizer.json, then a *.tiktoken rank file, then tokenizer.model; then, where tokenizer_config.json says
    the vocabulary is tiktoken's (DBRX's first release ships no file), asks ``cl100k_ranks`` for the rank file.

    Raises:
        TokenizerError: a file is malformed, too large, or names tokens that do not exist.
    """
    config = _read_json_if_there(path / "tokenizer_config.json")
    tokenizer = _load_vocabulary(path, config, cl100k_ranks)
    if tokenizer is not None:
        others = [_read_json_if_there(path / name) for name in ("special_tokens_map.json", "config.json")]
        variables, complete = template_variables.from_files(config, *others)
        tokenizer.template_variables = variables if complete else {**tokenizer._tokens_by_id(), **variables}
        eos = tokenizer.special_ids.get(str(variables.get("eos_token")))
        tokenizer.eos_ids = tuple(dict.fromkeys((*(() if eos is None else (eos,)), *tokenizer.eos_ids)))
    return tokenizer


def _load_vocabulary(
    path: Path, config: Mapping[str, Any], cl100k_ranks: Callable[[], Path] | None
) -> Tokenizer | None:
    template = _chat_template(path, config)
    if (path / "tokenizer.json").exists():
        return _from_tokenizer_json(path / "tokenizer.json", config, template, _generation_eos(path))
    for ranks in sorted(path.glob("*.tiktoken")):
        return load_tiktoken(ranks, chat_template=template)
    if (path / "tokenizer.model").exists():
        return load_sentencepiece(path / "tokenizer.model", config=config, chat_template=template)
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
    raw = _read_bytes(path)
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
    return _from_tokenizer_json(path, {}, None, [])


def load_sentencepiece(
    path: Path, *, config: Mapping[str, Any] | None = None, chat_template: str | None = None
) -> Tokenizer:
    """A SentencePiece model. Control pieces are its special tokens; a LLaMA-style model prepends bos."""
    config = config or {}
    vocabulary = _SentencePiece(_read_bytes(path), path.name)
    return vocabulary.tokenizer(
        add_bos=bool(config.get("add_bos_token", vocabulary.piece_is("<s>", vocabulary.bos))),
        chat_template=chat_template,
    )


def load_gguf(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The vocabulary inside a GGUF file's metadata, or None if it carries none.

    Raises:
        TokenizerError: an unknown model or pre-tokeniser, or lists of different lengths.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model is None or model == "no_vocab":
        return None
    tokens = _string_list(metadata, "tokenizer.ggml.tokens")

    def token_id(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and not (isinstance(value, int) and 0 <= value < len(tokens)):
            raise TokenizerError(f"tokenizer.ggml.{name}_token_id must be below {len(tokens)}, got {value!r}")
        return value

    bos, pad = token_id("bos"), token_id("padding")
    eos = [i for i in (token_id("eos"), token_id("eot"), token_id("eom")) if i is not None]
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise TokenizerError("tokenizer.chat_template must be a string")
    tokenizer: Tokenizer
    if model == "gpt2":
        vocabulary = _HuggingFace(gguf_bpe_spec(metadata), "the GGUF vocabulary")
        tokenizer = Tokenizer(
            vocabulary,
            special_ids=vocabulary.special_ids,
            bos_id=bos,
            eos_ids=eos,
            pad_id=pad,
            add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
            chat_template=template,
            # Converters fill holes with entries of this kind, named [PAD100256] and so on.
            unused_ids=[i for i, kind in enumerate(_token_types(metadata)) if kind == _UNUSED],
        )
    elif model == "llama":
        tokenizer = _SentencePiece(gguf_sentencepiece(metadata), "the GGUF vocabulary").tokenizer(
            add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", True)),
            chat_template=template,
            bos=bos,
            eos=eos,
            pad=pad,
        )
    else:
        raise TokenizerError(f"tokenizer.ggml.model must be 'gpt2' or 'llama', got {model!r}")
    tokenizer.template_variables = template_variables.from_gguf(
        metadata, tokens, tokenizer.bos_id, next(iter(tokenizer.eos_ids), None)
    )
    return tokenizer


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


# tokenizers ----------------------------------------------------------------------------------------------------------


class _HuggingFace:
    """A tokenizers-library vocabulary, held twice: once as it is, once without the tokens marked special."""

    def __init__(self, spec: dict[str, Any], name: str) -> None:
        import tokenizers

        added = spec.get("added_tokens") or []
        plain = {
            **spec,
            "added_tokens": [token for token in added if not token.get("special")],
            "post_processor": None,
            "truncation": None,
            "padding": None,
        }
        try:
            self._full = tokenizers.Tokenizer.from_str(json.dumps({**spec, "truncation": None, "padding": None}))
            self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        except Exception as error:  # the library raises bare Exception with its parser's words
            raise TokenizerError(f"{name} is not a tokenizer the tokenizers library can read: {error}") from None
        self.special_ids = {token["content"]: token["id"] for token in added if token.get("special")}
        used = set(self._full.get_vocab(with_added_tokens=True).values())
        self.n_vocab = max(used, default=-1) + 1
        self.unused_ids = set(range(self.n_vocab)) - used
        if self.n_vocab == 0:
            raise TokenizerError(f"{name} has an empty vocabulary")
        decoder = json.dumps(spec.get("decoder")) + json.dumps(spec.get("pre_tokenizer"))
        self._byte_level = "ByteLevel" in decoder
        self.strips_space = "Metaspace" in decoder or ("Strip" in decoder and "▁" in decoder)
        self._added: dict[int, str] = {token["id"]: token["content"] for token in added}

    def encode(self, text: str, allow_special: bool) -> list[int]:
        tokenizer = self._full if allow_special else self._plain
        # The batch call leaves out offsets, which nobody here asks for: 1.4 times as fast.
        ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def prefix(self) -> list[int]:
        """Ids the file's own post-processor puts before a text."""
        bare = self._full.encode("a", add_special_tokens=False).ids
        dressed = self._full.encode("a", add_special_tokens=True).ids
        return next((list(dressed[:n]) for n in range(len(dressed)) if dressed[n : n + len(bare)] == bare), [])

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._full.id_to_token(token_id)
        if token is None:
            raise TokenizerError(f"token id {token_id} is one of the vocabulary's unused ids")
        if self._byte_level:
            alphabet = _byte_alphabet()
            known = all(c in alphabet for c in token)
            return bytes([alphabet[c] for c in token]) if known else bytes(token.encode())
        return _piece_bytes(token)


def _from_tokenizer_json(
    path: Path, config: Mapping[str, Any], template: str | None, generation_eos: list[int]
) -> Tokenizer:
    spec = read_json(path)
    if not isinstance(spec.get("model"), dict):
        raise TokenizerError(f"{path.name} must be an object with a 'model'; it is not a tokenizers file")
    added = spec.get("added_tokens") or []
    shaped = isinstance(added, list) and all(
        isinstance(t, dict) and isinstance(t.get("id"), int) and isinstance(t.get("content"), str) for t in added
    )
    if not shaped or any(not 0 <= t["id"] < 2**24 for t in added):
        raise TokenizerError(f"{path.name}: every added token needs a text and an id below 2^24")
    vocabulary = _HuggingFace(spec, path.name)
    special = dict(vocabulary.special_ids)

    def named(key: str) -> int | None:
        value = config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if not text:
            return None
        token_id = vocabulary._full.token_to_id(str(text))
        if token_id is None:
            raise TokenizerError(f"tokenizer_config.json names {key} {text!r}, which is not in {path.name}")
        return int(token_id)

    bos, eos = named("bos_token"), named("eos_token")
    prefix = vocabulary.prefix()
    add_bos = bool(config["add_bos_token"]) if "add_bos_token" in config else bool(prefix)
    if bos is None and prefix:
        bos = prefix[0]
    ends = [*([] if eos is None else [eos]), *generation_eos]
    if "<|im_end|>" in special and "<|im_start|>" in special and template and "<|im_end|>" in template:
        ends.append(special["<|im_end|>"])  # ChatML: the end of a turn ends an answer (DBRX's generation config)
    return Tokenizer(
        vocabulary,
        special_ids=special,
        bos_id=bos,
        eos_ids=ends,
        pad_id=named("pad_token"),
        add_bos=add_bos,
        chat_template=template,
        strip_leading_space=vocabulary.strips_space,
        unused_ids=vocabulary.unused_ids,
    )


def gguf_bpe_spec(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A GGUF 'gpt2' vocabulary in the form of a tokenizer.json.

    Raises:
        TokenizerError: an unknown splitting pattern, or lists that do not fit together.
    """
    tokens, types = _string_list(metadata, "tokenizer.ggml.tokens"), _token_types(metadata)
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in GGUF_PATTERNS:
        raise TokenizerError(
            f"tokenizer.ggml.pre must be one of {', '.join(sorted(GGUF_PATTERNS))}; got {pre!r}. Its text would be "
            "split wrongly, so it is refused. Convert the model's safetensors with its tokenizer.json instead."
        )
    merges = _string_list(metadata, "tokenizer.ggml.merges")
    if any(merge.count(" ") != 1 for merge in merges):
        raise TokenizerError("tokenizer.ggml.merges must be pairs separated by one space")
    flags = {"normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    added = [
        {"id": i, "content": text, "special": kind in (_UNKNOWN, _CONTROL), **flags}
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    splits: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in GGUF_PATTERNS[pre].patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(vocab) != len(tokens):
        raise TokenizerError("tokenizer.ggml.tokens lists a token twice")
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges,
            "ignore_merges": GGUF_PATTERNS[pre].whole_words,
            "fuse_unk": False,
            "byte_fallback": False,
        },
    }


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one visible character (GPT-2): printable Latin-1 as is, others from U+0100."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(hidden)}


# SentencePiece -------------------------------------------------------------------------------------------------------

# Piece types, the same numbers in SentencePiece's model file and in GGUF.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


class _SentencePiece:
    def __init__(self, proto: bytes, name: str) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(proto)
        except RuntimeError as error:
            raise TokenizerError(f"{name} is not a SentencePiece model: {error}") from None
        model = self._model
        self.n_vocab = model.GetPieceSize()
        if self.n_vocab == 0:
            raise TokenizerError(f"{name} is not a SentencePiece model: it has no pieces")
        self.special_ids = {
            model.IdToPiece(i): i for i in range(self.n_vocab) if model.IsControl(i) or model.IsUnknown(i)
        }
        self.bos, self.eos, self.pad = (i if i >= 0 else None for i in (model.bos_id(), model.eos_id(), model.pad_id()))
        self._split = re.compile("(" + "|".join(map(re.escape, self.special_ids)) + ")") if self.special_ids else None
        # A model that writes a space before the first word encodes "a" as "▁a".
        first = model.EncodeAsPieces("a")
        self._dummy_prefix = bool(first) and first[0].startswith("▁")

    def piece_is(self, text: str, token_id: int | None) -> bool:
        """True if ``token_id`` is the piece ``text``."""
        return token_id is not None and self._model.IdToPiece(token_id) == text

    def tokenizer(
        self,
        *,
        add_bos: bool,
        chat_template: str | None,
        bos: int | None = None,
        eos: Sequence[int] = (),
        pad: int | None = None,
    ) -> Tokenizer:
        """A Tokenizer over this model; ids given here override the model file's own."""
        # Grok-1's file names its controls by text only; LLaMA's by id.
        found_bos = bos if bos is not None else self.bos if self.bos is not None else self.special_ids.get("[BOS]")
        found_eos = eos or [i for i in (self.eos, self.special_ids.get("[EOS]")) if i is not None]
        return Tokenizer(
            self,
            special_ids=self.special_ids,
            bos_id=found_bos,
            eos_ids=found_eos,
            pad_id=pad if pad is not None else self.pad,
            add_bos=add_bos and found_bos is not None,
            chat_template=chat_template,
            strip_leading_space=self._dummy_prefix,
            unused_ids=[i for i in range(self.n_vocab) if self._model.IsUnused(i)],
        )

    def encode(self, text: str, allow_special: bool) -> list[int]:
        if not allow_special or self._split is None:
            return list(self._model.EncodeAsIds(text))
        ids: list[int] = []
        for part in self._split.split(text):
            if part in self.special_ids:
                ids.append(self.special_ids[part])
            elif part:
                ids.extend(self._model.EncodeAsIds(part))
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return _piece_bytes(self._model.IdToPiece(token_id))


def _piece_bytes(piece: str) -> bytes:
    """SentencePiece writes spaces as U+2581 and bytes without a piece as <0x00>..<0xFF>."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def gguf_sentencepiece(metadata: Mapping[str, Any]) -> bytes:
    """A GGUF 'llama' vocabulary in the form of a SentencePiece model file.

    Field numbers are those of sentencepiece_model.proto (google/sentencepiece).

    Raises:
        TokenizerError: lists that do not fit together.
    """
    tokens, types = _string_list(metadata, "tokenizer.ggml.tokens"), _token_types(metadata)
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise TokenizerError(f"tokenizer.ggml.scores must have {len(tokens)} numbers; a 'llama' vocabulary needs them")

    def varint(n: int) -> bytes:
        out = bytearray()
        while n >= 0x80:
            out.append(n & 0x7F | 0x80)
            n >>= 7
        return bytes([*out, n])

    def block(field: int, body: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(body)) + body

    def number(field: int, value: int) -> bytes:
        return varint(field << 3) + varint(value)

    pieces = b"".join(
        block(1, block(1, token.encode()) + b"\x15" + struct.pack("<f", score) + number(3, int(kind)))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    bpe, unknown = 2, types.index(_UNKNOWN) if _UNKNOWN in types else 0
    trainer = number(3, bpe) + number(35, int(_BYTE in types)) + number(40, unknown)
    add_space_prefix = int(metadata.get("tokenizer.ggml.add_space_prefix", True))
    # Grok-1 and LLaMA normalise nothing: spaces are kept as they are.
    normaliser = block(1, b"identity") + number(3, add_space_prefix) + number(4, 0) + number(5, 1)
    return pieces + block(2, trainer) + block(3, normaliser)


# Files ---------------------------------------------------------------------------------------------------------------


def _read_bytes(path: Path) -> bytes:
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
    raw = _read_bytes(path)
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
            return _read_bytes(path / "chat_template.jinja").decode()
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


def _token_types(metadata: Mapping[str, Any]) -> list[int]:
    n = len(_string_list(metadata, "tokenizer.ggml.tokens"))
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * n)
    if not isinstance(types, list) or len(types) != n:
        raise TokenizerError(f"tokenizer.ggml.token_type must have {n} entries")
    return types


def _string_list(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise TokenizerError(f"{key} must be a list of strings")
    return values
