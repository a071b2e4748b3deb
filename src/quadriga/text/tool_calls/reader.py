"""One answer as it comes: words as soon as they are certain to be words, calls once complete or piece by piece.

A reader that streams tells a call by its beginning (``early``), the others wait for its end. Put together both say the
same, but for what only began like a call: one that streams has told of it by then.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from quadriga.text.stream import overlap
from quadriga.text.tool_calls.early import FORCED, MOST_HEAD, SHAPES, CallPart, OpenCall, Shape, name_of
from quadriga.text.tool_calls.forms import HERMES, Call, Form, Schemas

MAX_CALLS = 16
"""Calls of one answer; what looks like one more is text."""

MAX_FAILED = 32
"""Times that a form is tried whose reading makes copies; what comes then is text."""


Piece = str | dict[str, Any] | CallPart
"""Words; a whole call, as OpenAI writes it; a piece of one."""


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
        streams: calls come in pieces where their beginning tells them.
    """

    def __init__(self, tools: Tools | None, *, streams: bool = False) -> None:
        self._tools, self._streams = tools, streams
        self._open: OpenCall | None = None
        self._shape: Shape | None = None
        """The shape of the block of calls that is being told; its call may be over and the block not."""
        self._parts: list[str] = []
        """What is held back, in the pieces in which it came: looked through once something may be decided."""
        self._blank, self._waits, self._end = True, False, ""
        """Of what is held: it is only white space; it begins a call; its last characters."""
        self._after_call = self._begun = False
        self._n_failed = 0
        self.n_calls = 0

    def push(self, text: str, *, last: bool, cut: bool = False) -> list[Piece]:
        """What this text makes certain, in order; all that is left with the last.

        Args:
            cut: with the last: the answer ends because its budget did. A call that it ends in is no words then.
        """
        tools = self._tools
        if tools is None:
            return [text] if text else []
        self._parts.append(text)
        if self._shape is not None:
            return self._further(tools, self._shape, last, cut)
        if not last and self._undecided(tools, text):
            return self._early(tools)
        held = "".join(self._parts)
        if tools.forced:  # one JSON array, read at its end; a call that was cut is nothing
            calls = [call for call in _array(held) if call[0] in tools.schemas][: tools.most]
            return self._made(calls)
        if not tools.form.opens:
            return self._whole(tools, held, last, cut) + ([] if last else self._early(tools))
        out, rest = self._read(tools, held, last, cut)
        self._parts, self._blank, self._end = [rest], not rest or rest.isspace(), _tail(rest, tools.form.closes)
        return out + ([] if last else self._early(tools))

    # Calls that are told while they are written -----------------------------------------------------------------------

    def _early(self, tools: Tools) -> list[Piece]:
        """The beginning of a call, if what is held is one of a tool that was offered."""
        shape = FORCED if tools.forced else SHAPES.get(tools.form.name)
        if not self._streams or shape is None or not (self._waits or tools.forced) or self.n_calls >= tools.most:
            return []
        held = "".join(self._parts)
        self._parts = [held]
        start = held.lstrip()[len(tools.form.opens) if not tools.forced else 0 :]
        found = shape.begin.match(start) if len(start) <= MOST_HEAD else None
        if found is None or name_of(found) not in tools.schemas:
            return []
        self._shape, self._parts = shape, [start[found.end() :]]
        self._begin(tools, shape, name_of(found))
        return self._further(tools, shape, last=False, cut=False)

    def _begin(self, tools: Tools, shape: Shape, name: str) -> None:
        self._open = OpenCall(name, shape.pieces(dict(tools.schemas[name])))

    def _further(self, tools: Tools, shape: Shape, last: bool, cut: bool) -> list[Piece]:
        """Go on in a block of calls that is being told."""
        out: list[Piece] = []
        while True:
            text = "".join(self._parts)
            if self._open is not None:
                parts, text = self._open.push(text)
                out += parts
                self._parts = [text]
                if not self._open.over:
                    return out + (self._open.cut() if last else [])
                whole, self._open = self._open.whole, None
                self.n_calls += whole
                if not whole:
                    return out + self._after(text, last, cut)
            next_one = shape.again.match(text) if shape.again is not None else None
            if next_one is not None and name_of(next_one) in tools.schemas and self.n_calls < tools.most:
                self._parts = [text[next_one.end() :]]
                self._begin(tools, shape, name_of(next_one))
                continue
            end = shape.end.match(text)
            if end is not None and (last or tools.form.closes) and not tools.forced:
                return out + self._after(text[end.end() :], last, cut)
            if last and (tools.forced or (end is None and cut)):
                return out
            if not last and (tools.forced or len(text) <= MOST_HEAD):
                return out
            return out + self._after(text, last, cut)

    def _after(self, text: str, last: bool, cut: bool) -> list[Piece]:
        """Behind a block of calls."""
        self._shape, self._parts = None, []
        self._begun = self._after_call = self._blank = True
        self._waits, self._end = False, ""
        return self.push(text, last=last, cut=cut)

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

    def _whole(self, tools: Tools, held: str, last: bool, cut: bool) -> list[Piece]:
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
            if cut and _is_cut_call(tools, start, most_head=0):
                return []
        self._begun, self._waits, self._blank, self._parts = True, False, False, []
        return [held] if held else []

    def _read(self, tools: Tools, held: str, last: bool, cut: bool) -> tuple[list[Piece], str]:
        """(what is certain, what must wait) of what was held back. Linear: no place is looked at twice for one mark."""
        form, out = tools.form, list[Piece]()
        opens, closes = form.opens.encode(), form.closes.encode()
        raw, begin, search = held.encode(errors="replace"), 0, 0
        close = raw.find(closes) if closes else len(raw) if last else -1
        while (at := raw.find(opens, search)) >= 0:
            if closes and 0 <= close < at:
                close = raw.find(closes, at)
            if close < 0 and not last:
                break
            search = at + len(opens)
            if cut and (close < 0 or not closes) and _is_cut_call(tools, raw[search:].decode()):
                break
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
            if cut and self.n_calls:  # the beginning of one more
                text = text[: len(text) - overlap(text, form.opens)]
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

    def _made(self, calls: list[Call]) -> list[Piece]:
        self.n_calls += len(calls)
        return [_shown(call) for call in calls]

    def _words(self, text: str) -> list[Piece]:
        if self._after_call:
            text = text.lstrip()
        self._after_call = self._after_call and not text
        return [text] if text else []


def _is_cut_call(tools: Tools, text: str, most_head: int = 64) -> bool:
    """True if this is the beginning of a call of a tool that was offered, or too short to tell."""
    if len(text) < most_head:
        return True
    head, shape, peek = text[:MOST_HEAD], SHAPES.get(tools.form.name), tools.form.peek
    if shape is None:  # calls of this form are not read early, but how they begin is known
        return peek is not None and peek.match(head.encode()) is not None
    found = shape.begin.match(head)
    return found is not None and name_of(found) in tools.schemas


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
