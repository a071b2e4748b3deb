"""The decoder of a tokenizer.json, token by token, as bytes.

The tokenizers library decodes a whole list of ids into text. Answers come one token at a time, may end inside a
character, and continue a text that is already there; so each token's exact bytes are needed, and the one rule that
depends on the place: what happens at the very beginning of a text.

    "▁the"  ->  b" the"     anywhere
                b"the"      as the first token of a text

A step that is not known is refused by its name: leaving it out would change the text in silence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Protocol

from quadriga.errors import TokenizerError

logger = logging.getLogger(__name__)

Step = Callable[[str], str]
_HEX = frozenset("0123456789abcdefABCDEF")


class Decoding(Protocol):
    """Tokens to bytes."""

    opening: int
    """What :meth:`first` is given for the first token of a text; 0 where the beginning is like any other place."""

    def bytes_of(self, token: str) -> bytes:
        """The bytes of a token somewhere after the beginning of a text."""
        ...

    def first(self, token: str, opening: int) -> tuple[bytes, int]:
        """The bytes of a token before which there is no text yet, and ``opening`` for the one after it.

        0 means that the text has begun.
        """
        ...


class ByteLevel:
    """Every character of a token is one byte (GPT-2's alphabet)."""

    opening = 0

    def bytes_of(self, token: str) -> bytes:
        """See Decoding."""
        alphabet = byte_alphabet()
        known = all(c in alphabet for c in token)
        return bytes([alphabet[c] for c in token]) if known else token.encode()

    def first(self, token: str, opening: int) -> tuple[bytes, int]:
        """See Decoding."""
        return self.bytes_of(token), 0


class Joined:
    """No decoder at all: the library puts spaces between tokens."""

    opening = 1

    def bytes_of(self, token: str) -> bytes:
        """See Decoding."""
        return b" " + token.encode()

    def first(self, token: str, opening: int) -> tuple[bytes, int]:
        """See Decoding."""
        return token.encode(), 0


class Pieces:
    """Pieces in which a mark stands for a space, perhaps with tokens for single bytes.

    Args:
        steps: what happens to a token's text.
        byte_fallback: <0x0A> is a byte.
        strip: this character is taken away at the beginning of a text ...
        n_strip: ... so many times at most.
        first_step: in place of ``steps`` for the first token (Metaspace drops all of its marks).
        each_token: of every token before the text begins one ``strip`` is taken (SentencePiece that removes extra
            white space).
    """

    def __init__(
        self,
        steps: list[Step],
        *,
        byte_fallback: bool,
        strip: str = " ",
        n_strip: int = 0,
        first_step: Step | None = None,
        each_token: bool = False,
    ) -> None:
        self._steps, self._byte_fallback = steps, byte_fallback
        self._strip, self._first_step, self._each_token = strip.encode(), first_step, each_token
        self.opening = 1 if first_step is not None or each_token else n_strip

    def bytes_of(self, token: str) -> bytes:
        """See Decoding."""
        if self._byte_fallback and (byte := byte_of(token)) is not None:
            return byte
        for step in self._steps:
            token = step(token)
        return token.encode()

    def first(self, token: str, opening: int) -> tuple[bytes, int]:
        """See Decoding."""
        if self._first_step is not None:
            is_byte = self._byte_fallback and byte_of(token) is not None
            return (self.bytes_of(token) if is_byte else self._first_step(token).encode()), 0
        return self.first_of(self.bytes_of(token), opening)

    def first_of(self, raw: bytes, opening: int) -> tuple[bytes, int]:
        """:meth:`first`, from the bytes that the token has elsewhere."""
        if self._each_token:
            raw = raw.removeprefix(self._strip)
            return raw, int(not raw)
        while opening and raw.startswith(self._strip):
            raw, opening = raw.removeprefix(self._strip), opening - 1
        return raw, 0 if raw else opening


def sentencepiece_decoding(*, byte_fallback: bool, add_space_prefix: bool, remove_extra_whitespaces: bool) -> Pieces:
    """How a SentencePiece model decodes (sentencepiece_processor.cc, Decode)."""
    return Pieces(
        [lambda token: token.replace("▁", " ")],
        byte_fallback=byte_fallback,
        n_strip=int(add_space_prefix),
        each_token=remove_extra_whitespaces,
    )


def decoding_of(spec: Mapping[str, Any] | None, name: str) -> Decoding:
    """The decoder of a tokenizer.json.

    Raises:
        TokenizerError: a step that is not known, or an order of steps that is not.
    """
    steps = list(steps_of(spec, "decoders"))
    kinds = [str(step.get("type")) for step in steps]
    if not steps:
        return Joined()
    if "ByteLevel" in kinds:
        others = [kind for kind in kinds if kind not in ("ByteLevel", "Fuse")]
        if others:
            raise TokenizerError(f"{name}: the decoder {others[0]!r} beside ByteLevel is not understood")
        return ByteLevel()
    fused = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    strip, n_strip = _strips(steps[fused + 1 :], name)
    before = steps[:fused]
    texts = [_step(step, name, first=False) for step in before if step["type"] != "ByteFallback"]
    fallback = "ByteFallback" in kinds[:fused]
    if any(step["type"] == "Metaspace" for step in before):
        if n_strip:
            raise TokenizerError(f"{name}: the decoder 'Strip' after Metaspace is not understood")
        firsts = [_step(step, name, first=True) for step in before if step["type"] != "ByteFallback"]
        return Pieces(texts, byte_fallback=fallback, first_step=lambda token: _run(firsts, token))
    return Pieces(texts, byte_fallback=fallback, strip=strip, n_strip=n_strip)


def steps_of(spec: Mapping[str, Any] | None, parts: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a decoder, normaliser or pre-tokeniser, sequences opened.

    Args:
        parts: where a sequence of this kind has its steps: "decoders", "normalizers" or "pretokenizers".
    """
    if spec is None:
        return
    if spec.get("type") == "Sequence":
        for part in spec.get(parts) or []:
            yield from steps_of(part, parts)
    else:
        yield spec


def _strips(steps: list[Mapping[str, Any]], name: str) -> tuple[str, int]:
    """The one step that may follow Fuse: characters taken from the beginning of the whole text."""
    for step in steps:
        if step.get("type") != "Strip" or step.get("stop") or len(steps) > 1:
            raise TokenizerError(f"{name}: the decoder {step.get('type')!r} after Fuse is not understood: {dict(step)}")
        return str(step["content"]), int(step["start"])
    return " ", 0


def _step(step: Mapping[str, Any], name: str, *, first: bool) -> Step:
    """What one step does to the text of one token."""
    match step.get("type"):
        case "Replace" if isinstance(step.get("pattern"), Mapping) and "String" in step["pattern"]:
            old, new = str(step["pattern"]["String"]), str(step["content"])
            return lambda token: token.replace(old, new)
        case "Metaspace":
            mark = str(step.get("replacement", "▁"))
            scheme = "never" if step.get("add_prefix_space") is False else step.get("prepend_scheme", "always")
            space = "" if first and scheme != "never" else " "
            return lambda token: token.replace(mark, space)
        case "Strip":
            content, start, stop = str(step["content"]), int(step["start"]), int(step["stop"])
            return lambda token: _stripped(token, content, start, stop)
    raise TokenizerError(f"{name}: the decoder {step.get('type')!r} is not understood: {dict(step)!s:.120}")


def _run(steps: list[Step], token: str) -> str:
    for step in steps:
        token = step(token)
    return token


def _stripped(token: str, content: str, start: int, stop: int) -> str:
    while start and token.startswith(content):
        token, start = token.removeprefix(content), start - 1
    while stop and token.endswith(content):
        token, stop = token.removesuffix(content), stop - 1
    return token


def byte_of(token: str) -> bytes | None:
    """The byte that <0x00> ... <0xFF> stand for; None for any other token."""
    if len(token) != 6 or not token.startswith("<0x") or token[5] != ">":
        return None
    return bytes([int(token[3:5], 16)]) if all(c in _HEX for c in token[3:5]) else None


_NEVER = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))
"""Bytes that no UTF-8 has."""
_HARDLY_EVER = frozenset((*range(9), 11, 12, *range(14, 32), 127, 0xF1, 0xF2))
"""Bytes of control characters, and of the planes in which Unicode has no characters."""


def say_what_cannot_be_written(name: str, missing: Iterable[int], fate: str) -> None:
    """One logged line about the bytes a vocabulary has no tokens for: the libraries lose text in silence.

    Args:
        name: the vocabulary.
        missing: the bytes.
        fate: what becomes of text that the vocabulary has no token for: "is left out".
    """
    lost = frozenset(missing) - _NEVER
    if lost:
        n = 256 - len(_NEVER)
        what = "single bytes" if len(lost) == n else f"{len(lost)} of the {n} bytes of UTF-8"
        level = logging.WARNING if lost - _HARDLY_EVER else logging.INFO
        logger.log(level, "%s has no tokens for %s: text that it has no piece for %s", name, what, fate)


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one visible character (GPT-2): printable Latin-1 as is, others from U+0100."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(hidden)}
