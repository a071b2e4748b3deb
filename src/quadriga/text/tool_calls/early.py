"""Calls told by their beginning: the name as soon as it is complete, then the arguments in pieces.

A :class:`Shape` says how a form writes what stands around arguments. What does not begin like its shape is read once it
is complete, by ``Form.parse``.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quadriga.text.tool_calls.forms import DEEPSEEK_BEGIN, DEEPSEEK_END, DEEPSEEK_SEPARATOR, literal, value_of
from quadriga.text.tool_calls.pieces import Broken, JsonPieces, Pieces, PythonPieces, TaggedPieces, kinds_of

MOST_HEAD = 1024
"""Characters within which a call must have begun, to be told by its beginning."""


@dataclass(frozen=True)
class CallPart:
    """A piece of a call: the first one has its id and name, and all together have its arguments."""

    arguments: str
    id: str = ""
    name: str = ""
    last: bool = False
    """The call is over."""
    whole: bool = False
    """With the last: it is complete."""


@dataclass(frozen=True)
class Shape:
    """What stands around the arguments of calls."""

    begin: re.Pattern[str]
    """Of the first call, behind the form's mark; the name is one of its groups."""
    end: re.Pattern[str]
    """Behind the last one, the form's closing mark included."""
    again: re.Pattern[str] | None = None
    """Between two calls, with the name of the second."""
    pieces: Callable[[dict[str, Any]], Pieces] = lambda _schema: JsonPieces()
    """What reads the arguments, from their schema."""


def _head(arguments: str = "arguments") -> str:
    return rf'\s*\{{\s*"name"\s*:\s*"([^"\\]{{1,128}})"\s*,\s*"(?:{arguments})"\s*:\s*(?=\{{)'


def _tags(begin: str, close: str, end: str, *, ahead: bool, lines: bool) -> Callable[[dict[str, Any]], Pieces]:
    pattern = re.compile(begin, re.DOTALL)
    return lambda schema: TaggedPieces(
        pattern,
        close,
        end,
        lambda text, key: value_of(text, schema, key),
        lambda key: kinds_of(schema, key),
        ahead=ahead,
        lines=lines,
    )


def _python(_schema: dict[str, Any]) -> Pieces:
    return PythonPieces(literal)


def _list(before: str = "") -> Shape:
    """A JSON array of calls."""
    again = re.compile(r"\s*\}\s*," + _head())
    return Shape(re.compile(before + r"\s*\[" + _head()), re.compile(r"\s*\}\s*\]"), again)


_NAMED = r"\s*([^\[\]{}\s]{1,128})\s*(?:\[CALL_ID\][^\[]*)?(?:\[ARGS\])?\s*(?=\{)"
_DEEPSEEK = (
    rf"\s*{DEEPSEEK_BEGIN}(?:function{DEEPSEEK_SEPARATOR}([^\n]{{1,128}})\n\s*```json"
    rf"|\s*([^\s<]{{1,128}})\s*{DEEPSEEK_SEPARATOR})\s*(?=\{{)"
)
_PYTHON_NEXT = re.compile(r"\s*,\s*([\w.-]{1,128})\(")

FORCED = _list()
SHAPES = {
    "hermes": Shape(re.compile(_head()), re.compile(r"\s*\}\s*</tool_call>")),
    "qwen3_coder": Shape(
        re.compile(r"\s*<function=([^<>\s]{1,128})>"),
        re.compile(r"\s*</tool_call>"),
        pieces=_tags(r"\s*<parameter=([^<>]{1,256})>", "</parameter>", "</function>", ahead=False, lines=True),
    ),
    "glm": Shape(
        re.compile(r"\s*([^\s<]{1,128})\s*(?=<arg_key>|</tool_call>)"),
        re.compile(r"\s*</tool_call>"),
        pieces=_tags(
            r"\s*<arg_key>(.{0,256}?)</arg_key>\s*<arg_value>", "</arg_value>", "</tool_call>", ahead=True, lines=False
        ),
    ),
    "deepseek": Shape(
        re.compile(_DEEPSEEK),
        re.compile(rf"\s*(?:```)?\s*{DEEPSEEK_END}\s*<｜tool▁calls▁end｜>"),
        re.compile(rf"\s*(?:```)?\s*{DEEPSEEK_END}" + _DEEPSEEK),
    ),
    "mistral": Shape(
        re.compile(rf"\s*\[{_head()}|{_NAMED}"),
        re.compile(r"\s*\}\s*\]|\s*$"),
        re.compile(rf"\s*\}}\s*,{_head()}|\s*\[TOOL_CALLS\]{_NAMED}"),
    ),
    "granite": _list(),
    "lfm2": Shape(
        re.compile(r"\s*\[?\s*([\w.-]{1,128})\("),
        re.compile(r"\s*\]?\s*<\|tool_call_end\|>"),
        _PYTHON_NEXT,
        _python,
    ),
    "llama3": Shape(
        re.compile(r"\s*(?:<\|python_tag\|>)?" + _head("parameters|arguments")),
        re.compile(r"\s*\}\s*$"),
        re.compile(r"\s*\}[\s;]*" + _head("parameters|arguments")),
    ),
    "pythonic": Shape(re.compile(r"\s*\[\s*([\w.-]{1,128})\("), re.compile(r"\s*\]"), _PYTHON_NEXT, _python),
}


def name_of(found: re.Match[str]) -> str:
    """The name in a match of a shape's patterns."""
    return next(group for group in found.groups() if group).strip()


class OpenCall:
    """One call after its name: pieces of arguments in, parts out.

    Args:
        name: of a tool that was offered.
        pieces: what reads its arguments.
    """

    def __init__(self, name: str, pieces: Pieces) -> None:
        self._pieces = pieces
        self._first: dict[str, Any] = {"id": f"call_{secrets.token_hex(12)}", "name": name}
        self.over = self.whole = False

    def push(self, text: str) -> tuple[list[CallPart], str]:
        """(parts, the text behind the call)."""
        try:
            said, rest = self._pieces.push(text)
        except Broken:
            return self.cut(), text
        self.over = self.whole = self._pieces.done
        if not (said or self._first or self.over):
            return [], rest
        part = CallPart(said, **self._first, last=self.over, whole=self.over)
        self._first = {}
        return [part], rest

    def cut(self) -> list[CallPart]:
        """It ends here, complete or not."""
        if self.over:
            return []
        self.over = True
        part = CallPart("", **self._first, last=True)
        self._first = {}
        return [part]
