"""One Tokenizer over every kind of vocabulary: text to ids, ids to bytes and text.

The algorithms are the well-kept libraries' (tiktoken, tokenizers, sentencepiece). What is ours is the border: typed
special tokens stay text unless the caller says otherwise, and every token has its exact bytes, which is what
incremental detokenising needs.

    encode("<|im_end|>")                      -> several ids, ordinary text: user content can never end a turn
    encode("<|im_end|>", allow_special=True)  -> one id: only templates do this
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Protocol

from quadriga.errors import TokenizerError
from quadriga.text.added_tokens import AddedToken, Splitter

_JOINED = 1 << 15  # tokens whose bytes are joined in one call
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
        tool_template: another one for conversations with tools, where the checkpoint has two; else None.
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
        tool_template: str | None = None,
        template_variables: Mapping[str, str | list[str]] | None = None,
        added: Iterable[AddedToken] = (),
        unused_ids: Iterable[int] | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._unused_ids = unused_ids
        self.n_vocab = vocabulary.n_vocab
        self.special_ids = dict(special_ids)
        self._names = {token_id: text for text, token_id in self.special_ids.items()}
        self.bos_id, self.pad_id = bos_id, pad_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        if add_bos and bos_id is None:
            raise TokenizerError("the tokenizer asks for a bos token before every prompt but names none")
        self.prefix_ids = list(prefix_ids) or ([bos_id] if add_bos and bos_id is not None else [])
        self.suffix_ids = list(suffix_ids)
        for template in (chat_template, tool_template):
            if template is not None and len(template.encode(errors="replace")) > _MAX_TEMPLATE_BYTES:
                raise TokenizerError(f"the chat template is over {_MAX_TEMPLATE_BYTES} bytes; that is no template")
        self.chat_template = chat_template
        self.tool_template = tool_template
        if template_variables is None:
            template_variables = self.tokens_by_id()
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
        self._known_bytes: dict[int, bytes] = {}
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

    @property
    def is_of_ranks(self) -> bool:
        """True if its files give the ranks of tokens and no merges, as tiktoken's do."""
        return getattr(self._vocabulary, "is_of_ranks", False)

    def is_token(self, token_id: int) -> bool:
        """True if a token has this id. Models often have more rows than that: holes, and padding after the last id."""
        return 0 <= token_id < self.n_vocab and token_id not in self.unused_ids

    def unused_rows(self, n_rows: int) -> list[int]:
        """The ids below a model's ``n_rows`` that no token has, in order."""
        return [*sorted(i for i in self.unused_ids if i < n_rows), *range(self.n_vocab, n_rows)]

    @cached_property
    def _silent(self) -> frozenset[int]:
        return self._special | self.unused_ids

    def tokens_by_id(self) -> dict[str, str]:
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
        known = self._known_bytes.get(token_id)
        if known is None:
            if not 0 <= token_id < self.n_vocab:
                raise TokenizerError(f"token ids are 0 to {self.n_vocab - 1}, got {token_id}")
            known = b"" if token_id in self._silent else self._vocabulary.token_bytes(token_id)
            self._known_bytes[token_id] = known
        return known

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
        name = self._names.get(token_id)
        return self._vocabulary.token_bytes(token_id).decode("utf-8", errors="replace") if name is None else name

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
