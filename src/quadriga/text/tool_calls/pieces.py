"""A call's arguments as JSON while they are still being written, as ``json.dumps`` would write them in the end.

    {"city":"Os  ─►  {"city": "Os          lo", "days":2}  ─►  lo", "days": 2}

One class for each way in which forms write arguments: JSON, values between tags, Python's literals. All are fed text
and give out what it makes certain; the pieces of an answer put together are what the whole answer would have said.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from quadriga.text.stream import overlap

MAX_DEPTH = 200
MAX_HELD = 100_000
"""Characters of one value that must be complete before it can be written."""


class Broken(Exception):
    """This is no way to write arguments."""


class Pieces(Protocol):
    """The arguments of one call."""

    done: bool
    """They are complete."""

    def push(self, text: str) -> tuple[str, str]:
        """(what this makes certain, what comes behind the arguments); the second only once they are complete.

        Raises:
            Broken: it cannot become arguments any more.
        """
        ...


def shown(value: Any) -> str:
    """A value as it is written in arguments."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SCALAR = re.compile(r"[-+.0-9A-Za-z]+")
_ESCAPES = dict(zip('"\\/bfnrt', '"\\/\b\f\n\r\t', strict=True))


class JsonPieces:
    """A JSON object, checked as it comes."""

    def __init__(self) -> None:
        self.done = False
        self._open: list[str] = []
        """The brackets that will close what is open, the innermost last."""
        self._next: Callable[[str, int], int] = self._object
        self._out: list[str] = []
        self._held = ""
        self._is_key = self._may_end = False
        self._high = 0  # the first half of a pair of escapes that are one character

    def push(self, text: str) -> tuple[str, str]:
        """See :class:`Pieces`."""
        text, at = self._held + text, 0
        self._held = ""
        while at < len(text) and not self.done:
            was = at
            at = self._next(text, at)
            if at < 0:  # what is there is not enough to tell
                self._held = text[was:]
                if len(self._held) > MAX_HELD:
                    raise Broken
                break
        out, self._out = "".join(self._out), []
        return out, text[at:] if self.done else ""

    def _object(self, text: str, at: int) -> int:
        if text[at] != "{":
            raise Broken
        return self._value(text, at)

    def _value(self, text: str, at: int) -> int:
        char = text[at]
        if char in " \t\r\n":
            return at + 1
        if char == "]" and self._may_end and self._open[-1:] == ["]"]:
            return self._close(at)
        self._may_end = False
        if char == '"':
            self._is_key = False
            return self._quote(at)
        if char in "{[":
            if len(self._open) >= MAX_DEPTH:
                raise Broken
            self._open.append("}" if char == "{" else "]")
            self._out.append(char)
            self._may_end = True
            self._next = self._key if char == "{" else self._value
            return at + 1
        found = _SCALAR.match(text, at)
        if found is None:
            raise Broken
        if found.end() == len(text):
            return -1
        try:
            self._out.append(shown(msgspec.json.decode(found[0])))
        except (msgspec.MsgspecError, ValueError):
            raise Broken from None
        self._next = self._behind
        return found.end()

    def _key(self, text: str, at: int) -> int:
        if text[at] in " \t\r\n":
            return at + 1
        if text[at] == "}" and self._may_end:
            return self._close(at)
        if text[at] != '"':
            raise Broken
        self._is_key, self._may_end = True, False
        return self._quote(at)

    def _quote(self, at: int) -> int:
        self._out.append('"')
        self._next = self._text
        return at + 1

    def _text(self, text: str, at: int) -> int:
        char = text[at]
        if char == "\\":
            return self._escape(text, at)
        if self._high:
            raise Broken
        if char == '"':
            self._out.append('"')
            self._next = self._colon if self._is_key else self._behind
            return at + 1
        found = _PLAIN.match(text, at)
        if found is None:
            raise Broken
        self._out.append(found[0])
        return found.end()

    def _escape(self, text: str, at: int) -> int:
        kind = text[at + 1 : at + 2]
        if not kind or (kind == "u" and len(text) < at + 6):
            return -1
        if kind != "u":
            if kind not in _ESCAPES or self._high:
                raise Broken
            self._out.append(shown(_ESCAPES[kind])[1:-1])
            return at + 2
        digits = text[at + 2 : at + 6]
        if not re.fullmatch("[0-9a-fA-F]{4}", digits):
            raise Broken
        code = int(digits, 16)
        second = 0xDC00 <= code < 0xE000
        if second != bool(self._high):
            raise Broken
        if 0xD800 <= code < 0xDC00:
            self._high = code
        else:
            code = 0x10000 + ((self._high - 0xD800) << 10) + (code - 0xDC00) if second else code
            self._high = 0
            self._out.append(shown(chr(code))[1:-1])
        return at + 6

    def _colon(self, text: str, at: int) -> int:
        if text[at] in " \t\r\n":
            return at + 1
        if text[at] != ":":
            raise Broken
        self._out.append(": ")
        self._next = self._value
        return at + 1

    def _behind(self, text: str, at: int) -> int:
        char = text[at]
        if char in " \t\r\n":
            return at + 1
        if char == self._open[-1]:
            return self._close(at)
        if char != ",":
            raise Broken
        self._out.append(", ")
        self._next = self._key if self._open[-1] == "}" else self._value
        return at + 1

    def _close(self, at: int) -> int:
        self._out.append(self._open.pop())
        self._may_end = False
        self._next = self._behind
        self.done = not self._open
        return at + 1


class TaggedPieces:
    """Values between tags: ``<parameter=K>V</parameter>``. A text is written as it comes, all else once complete.

    Args:
        begin: a tag and what stands before it, with the key as group 1.
        close: the tag behind a value.
        end: what ends the arguments; it is not part of them where ``ahead``.
        value: a value from its text and key.
        kinds: the types a key may have.
        lines: a line break at both ends of a value is none of it.
    """

    def __init__(
        self,
        begin: re.Pattern[str],
        close: str,
        end: str,
        value: Callable[[str, str], Any],
        kinds: Callable[[str], list[Any]],
        *,
        ahead: bool,
        lines: bool,
    ) -> None:
        self._begin, self._close, self._end, self._value, self._kinds = begin, close, end, value, kinds
        self._ahead, self._lines = ahead, lines
        self.done = False
        self._held = ""
        self._key: str | None = None
        self._as_text = self._fresh = False
        self._n = 0

    def push(self, text: str) -> tuple[str, str]:
        """See :class:`Pieces`."""
        self._held += text
        out = list[str]()
        while not self.done:
            part = self._between() if self._key is None else self._within(self._key)
            if part is None:
                if len(self._held) > MAX_HELD:
                    raise Broken
                break
            out.append(part)
        rest = self._held if self.done else ""
        return "".join(out), rest

    def _between(self) -> str | None:
        held = self._held.lstrip()
        if held.startswith(self._end):
            self.done = True
            self._held = held if self._ahead else held[len(self._end) :]
            return "}" if self._n else "{}"
        found = self._begin.match(self._held)
        if found is None:
            if held and not self._end.startswith(held) and len(held) > 512:
                raise Broken
            return None
        self._key = found[1].strip()
        self._held = self._held[found.end() :]
        kinds = self._kinds(self._key)
        self._as_text = self._fresh = "string" in kinds and "null" not in kinds
        self._n += 1
        return f"{', ' if self._n > 1 else '{'}{shown(self._key)}: " + ('"' if self._as_text else "")

    def _within(self, key: str) -> str | None:
        at = self._held.find(self._close)
        if at >= 0:
            text, self._held, self._key = self._held[:at], self._held[at + len(self._close) :], None
            if self._lines:
                text = text.removesuffix("\n")
                text = text.removeprefix("\n") if self._fresh or not self._as_text else text
            return shown(text)[1:-1] + '"' if self._as_text else shown(self._value(text, key))
        if not self._as_text or (self._fresh and len(self._held) < 2):
            return None
        keep = overlap(self._held, self._close)
        if self._lines:
            keep = max(keep, overlap(self._held, "\n" + self._close))
        text = self._held[: len(self._held) - keep]
        if not text:
            return None
        self._held = self._held[len(text) :]
        if self._lines and self._fresh:
            text = text.removeprefix("\n")
        self._fresh = False
        return shown(text)[1:-1]


class PythonPieces:
    """``K=V, K=V)``: every argument is written once it is complete.

    Args:
        literal: a node of Python's tree as a value.
    """

    def __init__(self, literal: Callable[[ast.expr], Any]) -> None:
        self._literal, self.done = literal, False
        self._held, self._at, self._depth, self._quote = "", 0, 0, ""
        self._n = 0

    def push(self, text: str) -> tuple[str, str]:
        """See :class:`Pieces`."""
        self._held += text
        out = []
        while self._at < len(self._held) and not self.done:
            char = self._held[self._at]
            self._at += 1
            if self._quote:
                if char == "\\":
                    self._at += 1
                elif char == self._quote:
                    self._quote = ""
            elif char in "'\"":
                self._quote = char
            elif char in "[{(":
                self._depth += 1
            elif char in "]}" or (char == ")" and self._depth):
                self._depth -= 1
            elif char in ",)" and not self._depth:
                out.append(self._argument(self._held[: self._at - 1], last=char == ")"))
                self._held, self._at, self.done = self._held[self._at :], 0, char == ")"
        if len(self._held) > MAX_HELD:
            raise Broken
        return "".join(out), self._held if self.done else ""

    def _argument(self, text: str, *, last: bool) -> str:
        part = ""
        if text.strip() or not last:
            try:
                call = ast.parse(f"f({text})", mode="eval").body
                if not isinstance(call, ast.Call) or call.args or len(call.keywords) != 1 or not call.keywords[0].arg:
                    raise Broken
                keyword = call.keywords[0]
                part = f"{', ' if self._n else '{'}{shown(keyword.arg)}: {shown(self._literal(keyword.value))}"
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                raise Broken from None
            self._n += 1
        return part + (("}" if self._n else "{}") if last else "")


def kinds_of(schema: Mapping[str, Any], key: str) -> list[Any]:
    """The JSON types that a tool's schema gives an argument; [None] where it gives none."""
    properties = schema.get("properties")
    wanted = properties.get(key) if isinstance(properties, Mapping) else None
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    return kind if isinstance(kind, list) else [kind]
