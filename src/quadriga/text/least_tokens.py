"""How many tokens a text has at least, found without encoding it.

Encoding megabytes takes seconds, only to learn that no context holds them. But tokens cover their text, so for anything
that adds up over the pieces of a text (its bytes, its letters, its digits, ...)

    count(text) = sum of count(token) <= n_tokens * largest count of any token
    n_tokens >= count(text) / largest count of any token            , the best of several such counts

That needs a vocabulary whose tokens do cover the text: one that drops accents, folds case or joins spaces proves
nothing. So the vocabulary is tried first, on its own tokens and on what normalisers change; where it fails, nothing is
certain and the answer is 0. Bytes that are no token by themselves (SmolLM2 lacks 21) may get lost and do not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from quadriga.errors import TokenizerError
from quadriga.text.tokenizer import Tokenizer

_LETTERS = bytes([*range(65, 91), *range(97, 123)])
_KINDS = (bytes(range(256)), _LETTERS, b"0123456789", b" \t\n\r\v\f", bytes(range(128, 256)))
_WORDS = bytes(97 if byte in _LETTERS else 32 for byte in range(256))
_MARK = "\u2581"
"""SentencePiece writes a space as this and cannot tell one that was there before, so it counts for nothing."""
_GROUP = 4096

_ASCII = ("".join(map(chr, range(128))), "A  b \t\tc\n\n d   ", "  UPPER, lower; Mixed1 22 333\r\n\x00x\x7fy  ")
_UNICODE = (
    "e\u0301 \u00e9 \u212b \u2126 \uff21 \ufb01 \u2460 \u1100\u1161\u11a8 \u00a0\u2003\u200b\u3000 \u0130\u00df \ufeff",
    # Every first and every further byte that UTF-8 has, in characters that hardly any vocabulary knows as a whole.
    "".join(map(chr, [*range(0x80, 0x800, 31), *range(0x800, 0xD800, 1021), *range(0xE000, 0x110000, 16381)])),
    "x".join(chr(0xE000 + 65 * i) for i in range(64)),
)


class LeastTokens:
    """Lower bounds for one tokenizer. Its vocabulary is looked through on first use (a second for 100,000 tokens)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names = {token_id: name.encode() for name, token_id in tokenizer.special_ids.items()}

    def of(self, text: str) -> int:
        """``encode(text)`` has at least so many tokens, whether special tokens are allowed or not; 0: it is not known.

        Linear in the text; no step of it holds the interpreter's lock for more than some 2 ns a character.
        """
        keeps_ascii, keeps_all = self._keeps
        if not (keeps_all or (keeps_ascii and text.isascii())):
            return 0
        pairs = zip(_counts(self._counted(text)), self._largest, strict=True)
        return max((-(-count // largest) for count, largest in pairs if largest), default=0)

    def _counted(self, text: str) -> bytes:
        return text.replace(_MARK, "").encode(errors="ignore").translate(None, self._lost)

    @cached_property
    def _tokens(self) -> list[bytes]:
        """The bytes of every id: a special token's name, nothing for a hole in the vocabulary."""
        tokens = []
        for token_id in range(self._tokenizer.n_vocab):
            try:
                tokens.append(self._names.get(token_id) or self._tokenizer.token_bytes(token_id))
            except TokenizerError:
                tokens.append(b"")
        return tokens

    @cached_property
    def _lost(self) -> bytes:
        """The bytes that are no token by themselves."""
        return bytes(set(range(256)) - {token[0] for token in self._tokens if len(token) == 1})

    @cached_property
    def _largest(self) -> tuple[int, ...]:
        """The largest counts of any token, in the order of :func:`_counts`."""
        tokens = [kept for token in self._tokens if (kept := token.translate(None, self._lost))]
        if not tokens:
            return (0,) * (len(_KINDS) + 1)
        starts = np.cumsum([0, *map(len, tokens[:-1])])
        raw = np.frombuffer(b"".join(tokens), dtype=np.uint8)
        is_letter = np.isin(raw, list(_LETTERS))
        begins_word = is_letter & ~np.roll(is_letter, 1)
        begins_word[starts] = is_letter[starts]
        marks = [*(np.isin(raw, list(kind)) for kind in _KINDS), begins_word]
        return tuple(int(np.add.reduceat(mark, starts, dtype=np.int64).max()) for mark in marks)

    @cached_property
    def _keeps(self) -> tuple[bool, bool]:
        """Whether the tokens of a text of ASCII only, and those of any text, cover what is counted of it."""
        special = "  ".join(["", *self._tokenizer.special_ids, ""])
        plain = [*_ASCII, special, *self._joined(ascii_only=True)]
        keeps_ascii = all(map(self._covers, plain)) and self._covers(special, allow_special=True)
        return keeps_ascii, keeps_ascii and all(map(self._covers, [*_UNICODE, *self._joined(ascii_only=False)]))

    def _joined(self, *, ascii_only: bool) -> Iterator[str]:
        """The vocabulary's own tokens with spaces between them, which some added tokens swallow."""
        for start in range(0, len(self._tokens), _GROUP):
            texts = (token.decode(errors="ignore") for token in self._tokens[start : start + _GROUP])
            yield "  ".join(text.replace(_MARK, "") for text in texts if text.isascii() == ascii_only)

    def _covers(self, text: str, *, allow_special: bool = False) -> bool:
        ids = self._tokenizer.encode(text, allow_special=allow_special)
        raw, written = self._counted(text), b"".join([self._tokens[i] for i in ids]).translate(None, self._lost)
        # SentencePiece adds a space at the beginning and after special tokens: more is no harm.
        return raw.replace(b" ", b"") == written.replace(b" ", b"") and raw.count(b" ") <= written.count(b" ")


def _counts(raw: bytes) -> tuple[int, ...]:
    """What adds up: bytes of each of _KINDS; and words, of which the pieces have as many as the whole or more."""
    kinds = [len(raw) - len(raw.translate(None, kind)) for kind in _KINDS]
    return (*kinds, (b" " + raw.translate(_WORDS)).count(b" a"))
