"""One answer as it comes: words as soon as they are certain to be words, calls as soon as they are complete."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from quadriga.text.stream import overlap
from quadriga.text.tool_calls.forms import HERMES, Call, Form, Schemas

MAX_CALLS = 16
"""Calls of one answer; what looks like one more is text."""

MAX_FAILED = 32
"""Times that a form is tried whose reading makes copies; what comes then is text."""


@dataclass(frozen=True)
class Tools:
    """The tools an answer may call, and how it writes calls."""

    form: Form = HERMES
    schemas: Schemas = field(default_factory=dict)
    """Name -> JSON schema of the arguments; a call of another name is text."""
    forced: bool = False
    """The answer is a JSON array of calls and nothing else."""
    most: int = MAX_CALLS
    """Calls of one answer."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Marks that must be seen in the answer although they may be control tokens."""
        inner = ("[ARGS]", "[CALL_ID]") if self.form.name == "mistral" else ()
        first = tuple(text for text in self.form.first if len(text) > 1)
        deepseek = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>")
        return tuple(filter(None, (self.form.opens, self.form.closes, *inner, *first, *deepseek)))


class Reader:
    """See the module docstring. White space beside a call is dropped; so white space, and what may become the mark of a
    call, waits for what follows.

    Args:
        tools: None where the request has none: all is words.
    """

    def __init__(self, tools: Tools | None) -> None:
        self._tools = tools
        self._parts: list[str] = []
        """What is held back, in the pieces in which it came: looked through once something may be decided."""
        self._blank, self._waits, self._end = True, False, ""
        """Of what is held: it is only white space; it begins a call; its last characters."""
        self._after_call = self._begun = False
        self._n_failed = 0
        self.n_calls = 0

    def push(self, text: str, *, last: bool) -> list[str | dict[str, Any]]:
        """The words (str) and calls (dict) that this text makes certain, in order; all that is left with the last."""
        tools = self._tools
        if tools is None:
            return [text] if text else []
        self._parts.append(text)
        if not last and self._undecided(tools, text):
            return []
        held = "".join(self._parts)
        if tools.forced:  # one JSON array, read at its end; a call that was cut is nothing
            calls = [call for call in _array(held) if call[0] in tools.schemas][: tools.most]
            return self._made(calls)
        if not tools.form.opens:
            return self._whole(tools, held, last)
        out, rest = self._read(tools, held, last)
        self._parts, self._blank, self._end = [rest], not rest or rest.isspace(), _tail(rest, tools.form.closes)
        return out

    def _undecided(self, tools: Tools, text: str) -> bool:
        """True if more text tells no more: it is held back without a look at what was held before."""
        if tools.forced:
            return True
        if self._waits:
            closes = tools.form.closes
            if not closes:
                return True
            near = self._end + text
            self._end = _tail(near, closes)
            return closes not in near
        return self._blank and (not text or text.isspace())

    def _whole(self, tools: Tools, held: str, last: bool) -> list[str | dict[str, Any]]:
        """The answer is a call from its first character to its last, or it is words."""
        start = held.lstrip()
        if not self._begun and not last and any(_may_begin(start, mark) for mark in tools.form.first):
            self._waits = any(start.startswith(mark) for mark in tools.form.first)
            self._blank = not start
            return []
        if not self._begun and any(start.startswith(mark) for mark in tools.form.first):
            calls = tools.form.parse(memoryview(held.encode(errors="replace")), tools.schemas)
            if calls and _known(calls, tools.schemas) and len(calls) <= tools.most:
                return self._made(calls)
        self._begun, self._waits, self._blank, self._parts = True, False, False, []
        return [held] if held else []

    def _read(self, tools: Tools, held: str, last: bool) -> tuple[list[str | dict[str, Any]], str]:
        """(what is certain, what must wait) of what was held back. Linear: no place is looked at twice for one mark."""
        form, out = tools.form, list[str | dict[str, Any]]()
        opens, closes = form.opens.encode(), form.closes.encode()
        raw, begin, search = held.encode(errors="replace"), 0, 0
        close = raw.find(closes) if closes else len(raw) if last else -1
        while (at := raw.find(opens, search)) >= 0:
            if closes and 0 <= close < at:
                close = raw.find(closes, at)
            if close < 0 and not last:
                break
            search = at + len(opens)
            calls = self._parsed(form, raw, search, close)
            if not calls or not _known(calls, tools.schemas) or self.n_calls + len(calls) > tools.most:
                continue  # it only looked like one
            out += self._words(raw[begin:at].decode().rstrip())
            out += self._made(calls)
            begin = search = close + len(closes)
            self._after_call = True
        self._waits = at >= 0
        text = raw[begin : at if at >= 0 else None].decode()
        if self._after_call:
            text = text.lstrip()
        if last:
            return out + self._words(text.rstrip() if self.n_calls else text), ""
        words = text[: None if at >= 0 else len(text) - overlap(text, form.opens)].rstrip()
        return out + self._words(words), text[len(words) :] + (raw[at:].decode() if at >= 0 else "")

    def _parsed(self, form: Form, raw: bytes, begin: int, end: int) -> list[Call]:
        """Calls, if that is what this is: told by its first characters where they tell it."""
        assert self._tools is not None
        if end < 0 or (form.peek is not None and not form.peek.match(raw, begin)) or self._n_failed > MAX_FAILED:
            return []
        calls = form.parse(memoryview(raw)[begin:end], self._tools.schemas)
        if form.peek is not None and not calls:
            self._n_failed += 1
        return calls

    def _made(self, calls: list[Call]) -> list[str | dict[str, Any]]:
        self.n_calls += len(calls)
        return [_shown(call) for call in calls]

    def _words(self, text: str) -> list[str | dict[str, Any]]:
        if self._after_call:
            text = text.lstrip()
        self._after_call = self._after_call and not text
        return [text] if text else []


def _known(calls: list[Call], names: Collection[str]) -> bool:
    return all(name in names for name, _ in calls)


def _may_begin(text: str, mark: str) -> bool:
    return text.startswith(mark) or mark.startswith(text)


def _tail(text: str, mark: str) -> str:
    """The end of a text in which the beginning of a mark may be."""
    return text[1 - len(mark) :] if len(mark) > 1 else ""


def _array(text: str) -> list[Call]:
    """The calls of a JSON array, those that are complete where the array is not."""
    text = text.strip()
    calls: list[Call] = []
    decoder, at = json.JSONDecoder(), 1
    while text.startswith("[") and at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            break
        if not (isinstance(value, dict) and isinstance(value.get("arguments"), dict)):
            break
        calls.append((str(value.get("name")), value["arguments"]))
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
    return calls


def as_call(name: str, raw: str) -> dict[str, Any] | None:
    """A call whose arguments came as a JSON text, as OpenAI writes it; None where they are no object."""
    try:
        arguments = json.loads(raw) if raw.strip() else {}
    except (ValueError, RecursionError):
        return None
    return _shown((name, arguments)) if isinstance(arguments, dict) else None


def _shown(call: Call) -> dict[str, Any]:
    """A call as OpenAI writes it."""
    arguments = json.dumps(call[1], ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call[0], "arguments": arguments},
    }
