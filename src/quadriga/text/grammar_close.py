"""How an answer of JSON can be ended soon: the tokens that close what is open, so that a budget never cuts it in two.

    [{"name": "weather", "arguments": {"city": "Os          4 tokens left        "  }  }  ]

A :class:`Closing` looks at every token that was chosen: where what is left of the budget would no longer be enough to
close behind it, the first token of the shortest end known takes its place. That end is found by trying what closes
first (``try_consume_tokens`` of llguidance, some microseconds a token), so it is a short one, not always the shortest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

WATCHED = 512
"""So near to the end of a budget every token is looked at; a call that needs more than this to be closed may be cut."""

_IN_TEXT = (b'"', b"a", b"0", b"n")
_OUTSIDE = (b",", b"null", b"0", b"1", b'""', b'"', b"{}", b"[]", b"[", b"{", b"false", b"true", b":", b"-")
_LONGEST = 16


class Closers:
    """The tokens of a vocabulary that end things.

    Args:
        tokens: the bytes of every token.
        n_rows: rows of the model's head.
    """

    def __init__(self, tokens: Sequence[bytes], n_rows: int) -> None:
        self.tokens, self.n_rows = tokens, n_rows
        self.ids = {raw: i for i, raw in reversed(list(enumerate(tokens))) if raw}
        ends = [raw for raw in self.ids if len(raw) <= 8 and set(raw) <= set(b'"]}') and raw.rfind(b'"') <= 0]
        ends.sort(key=len, reverse=True)
        # Within a text the first must be its end; those that close more at once come first.
        self._in_text = self._known([*(raw for raw in ends if raw[:1] == b'"'), *_IN_TEXT])
        self._outside = self._known([*(raw for raw in ends if raw[:1] != b'"'), *_OUTSIDE])

    def _known(self, texts: Sequence[bytes]) -> list[int]:
        return [self.ids[raw] for raw in texts if raw in self.ids]

    def end(self, matcher: Any, place: Place, most: int) -> list[int] | None:
        """Tokens that complete what a matcher has begun; None where no end of at most so many was found.

        Args:
            matcher: llguidance's; it stays where it is.
            place: where in the JSON it is; so does this.
        """
        matcher, place, out = matcher.deep_copy(), place.copy(), list[int]()
        while not matcher.is_stopped():
            if len(out) >= most:
                return None
            token = self._step(matcher, place)
            if token is None or matcher.is_error():
                return None
            place.push(self.tokens[token])
            out.append(token)
        return None if matcher.is_error() else out

    def _step(self, matcher: Any, place: Place) -> int | None:
        """Go on by one token towards the end."""
        forced = matcher.compute_ff_bytes()
        for n in range(min(len(forced), _LONGEST), 0, -1):
            token = self.ids.get(forced[:n])
            if token is not None and matcher.try_consume_tokens([token]):
                return token
        for token in self._in_text if place.in_text else self._outside:
            if matcher.try_consume_tokens([token]):
                return token
        allowed = np.frombuffer(matcher.compute_logit_bias(), dtype=np.uint8)[: self.n_rows]
        token = int(allowed.argmax())
        return token if matcher.try_consume_tokens([token]) else None


class Place:
    """Whether the end of some JSON is inside of a text."""

    def __init__(self, in_text: bool = False, escaped: bool = False) -> None:
        self.in_text, self._escaped = in_text, escaped

    def copy(self) -> Place:
        """Another at the same place."""
        return Place(self.in_text, self._escaped)

    def push(self, raw: bytes) -> None:
        """Go on by some bytes."""
        for byte in raw:
            if self._escaped:
                self._escaped = False
            elif byte == 0x22:
                self.in_text = not self.in_text
            elif byte == 0x5C:
                self._escaped = self.in_text


class Closing:
    """One answer that is closed before its budget ends.

    Args:
        closers: of its vocabulary.
    """

    def __init__(self, closers: Closers) -> None:
        self._closers, self._place = closers, Place()
        self._rest: list[int] | None = None
        """An end that is known to follow what was said so far."""

    def choose(self, matcher: Any, token: int, left: int) -> int:
        """The token to go on with: the chosen one, or what leads to the end known where it would come too late.

        Args:
            matcher: before the token.
            left: tokens that may still come, this one included.
        """
        if left > WATCHED:
            return token
        after, place = matcher.deep_copy(), self._place.copy()
        if not after.try_consume_tokens([token]):
            return token  # an end token, where the answer may end
        place.push(self._closers.tokens[token])
        rest = self._closers.end(after, place, left - 1)
        if rest is None:
            known = self._rest or self._closers.end(matcher, self._place, left)
            if not known:
                return token  # nothing ends it in time: it will be cut, and its finish reason says so
            token, *rest = known
        self._rest = rest
        return token

    def accept(self, token: int) -> None:
        """The answer has gone on by this token."""
        self._place.push(self._closers.tokens[token])
