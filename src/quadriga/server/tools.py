"""Tool calls: how a model is told of tools, how its answer is read, and the grammar that makes a call certain.

Models without a template for tools get a paragraph in the system prompt that asks for
``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``. With ``tool_choice`` "required" or a name, a grammar
allows nothing but a JSON array of calls whose arguments fit the tools' schemas.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from quadriga.server.errors import ApiError
from quadriga.server.schema import MAX_TOOLS, ChatRequest, Message, NamedTool, Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_OPEN, _CLOSE = OPEN.encode(), CLOSE.encode()
_MAX_CALLS = 16


def system_text(tools: Sequence[Tool], *, forced: bool, parallel: bool) -> str:
    """What the model is told about its tools."""
    lines = [json.dumps({k: v for k, v in _shown(tool).items() if v is not None}, ensure_ascii=False) for tool in tools]
    listed = "\n".join(lines)
    if forced:
        count = "one or more calls" if parallel else "one call"
        form = f'Answer only with a JSON array of {count}: [{{"name": NAME, "arguments": {{...}}}}]'
    else:
        form = f'To call one, answer only with {OPEN}{{"name": NAME, "arguments": {{...}}}}{CLOSE}'
        form += ", one such block for each call. If no function helps, answer in plain words."
    return f"These functions can be called, given as JSON:\n{listed}\n{form}"


def _shown(tool: Tool) -> dict[str, Any]:
    function = tool.function
    return {"name": function.name, "description": function.description, "parameters": function.parameters}


class ToolUse:
    """What one request allows: which tools, and whether a call is certain.

    Raises:
        ApiError: a tool choice without tools, a name that is no tool's, too many tools.
    """

    def __init__(self, body: ChatRequest) -> None:
        tools = body.tools or []
        choice = body.tool_choice
        if len(tools) > MAX_TOOLS:
            raise ApiError(400, f"tools takes at most {MAX_TOOLS}, got {len(tools)}", param="tools")
        names = [tool.function.name for tool in tools]
        if len(set(names)) < len(names):
            raise ApiError(400, "two tools have the same name", param="tools")
        for name in names:
            if not (0 < len(name) <= 64 and name.replace("_", "a").replace("-", "a").isalnum() and name.isascii()):
                raise ApiError(
                    400, f"a tool's name is 1 to 64 letters, digits, _ or -; got {name[:80]!r}", param="tools"
                )
        if isinstance(choice, NamedTool):
            if choice.function.name not in names:
                raise ApiError(400, f"tool_choice names {choice.function.name!r}, no tool does", param="tool_choice")
            tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if choice == "required" and not tools:
            raise ApiError(400, "tool_choice 'required' needs tools", param="tool_choice")
        self.tools = [] if choice == "none" else tools
        self.forced = bool(self.tools) and choice not in (None, "auto", "none")
        self.parallel = body.parallel_tool_calls is not False and not isinstance(choice, NamedTool)

    def schema(self) -> dict[str, Any]:
        """The JSON schema of a certain answer: an array of calls."""
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": t.function.name},
                    "arguments": t.function.parameters or {"type": "object"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for t in self.tools
        ]
        items = calls[0] if len(calls) == 1 else {"anyOf": calls}
        return {"type": "array", "items": items, "minItems": 1, "maxItems": _MAX_CALLS if self.parallel else 1}

    def messages(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """A conversation as the chat template takes it: every turn a role and a text."""
        turns = [_turn(i, message) for i, message in enumerate(messages)]
        if self.tools:
            told = system_text(self.tools, forced=self.forced, parallel=self.parallel)
            if turns and turns[0]["role"] == "system":
                turns[0] = {"role": "system", "content": f"{turns[0]['content']}\n\n{told}".strip()}
            else:
                turns.insert(0, {"role": "system", "content": told})
        return turns

    def read(self, text: str) -> tuple[str | None, list[dict[str, Any]]]:
        """(content, tool calls) of a whole answer. What is no well-formed call of a known tool stays content."""
        pieces = Reader(self).push(text, last=True)
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        return content if content or not self.tools else None, [p for p in pieces if not isinstance(p, str)]


class Reader:
    """One answer as it comes: words as soon as they are certain to be words, calls as soon as they are complete.

    White space beside a call is dropped; so white space, and what may become ``<tool_call>``, waits for what follows.
    """

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._parts: list[str] = []
        """What is held back, in the pieces in which it came: looked through once something may be decided."""
        self._blank, self._waits, self._end = True, False, ""
        """Of what is held: it is only white space; it begins a call; its last characters."""
        self._after_call = False
        self._known = {tool.function.name for tool in use.tools}
        self._most = _MAX_CALLS if use.parallel else 1
        self.n_calls = 0

    def push(self, text: str, *, last: bool) -> list[str | dict[str, Any]]:
        """The words (str) and calls (dict) that this text makes certain, in order; all that is left with the last."""
        if not self._use.tools:
            return [text] if text else []
        self._parts.append(text)
        if not last and self._undecided(text):
            return []
        held = "".join(self._parts)
        if self._use.forced:  # one JSON array, which is a call at its end only
            calls = _array(held)
            self.n_calls += len(calls)
            return [_call(call) for call in calls] or ([held] if held else [])
        out, rest = self._read(held, last)
        self._parts, self._blank, self._end = [rest], not rest or rest.isspace(), rest[1 - len(CLOSE) :]
        return out

    def _undecided(self, text: str) -> bool:
        """True if more text tells no more: it is held back without a look at what was held before."""
        if self._use.forced:
            return True
        if self._waits:
            near = self._end + text
            self._end = near[1 - len(CLOSE) :]
            return CLOSE not in near
        return self._blank and (not text or text.isspace())

    def _read(self, held: str, last: bool) -> tuple[list[str | dict[str, Any]], str]:
        """(what is certain, what must wait) of what was held back. Linear: no place is looked at twice for one mark."""
        out: list[str | dict[str, Any]] = []
        raw, begin, search = held.encode(errors="replace"), 0, 0
        close = raw.find(_CLOSE)
        while (at := raw.find(_OPEN, search)) >= 0:
            if 0 <= close < at:
                close = raw.find(_CLOSE, at)
            if close < 0 and not last:
                break
            search = at + len(_OPEN)
            call = None if close < 0 else _object(memoryview(raw)[search:close])
            if call is None or call["name"] not in self._known or self.n_calls >= self._most:
                continue  # it only looked like one
            out += self._words(raw[begin:at].decode().rstrip())
            out.append(_call(call))
            self.n_calls += 1
            begin = search = close + len(_CLOSE)
            self._after_call = True
        self._waits = at >= 0
        text = raw[begin : at if at >= 0 else None].decode()
        if self._after_call:
            text = text.lstrip()
        if last:
            return out + self._words(text.rstrip() if self.n_calls else text), ""
        words = (text if at >= 0 else _certain(text)).rstrip()
        return out + self._words(words), text[len(words) :] + (raw[at:].decode() if at >= 0 else "")

    def _words(self, text: str) -> list[str | dict[str, Any]]:
        if self._after_call:
            text = text.lstrip()
        self._after_call = self._after_call and not text
        return [text] if text else []


def _certain(text: str) -> str:
    """Text without an end that may be the beginning of a call."""
    for n in range(min(len(OPEN) - 1, len(text)), 0, -1):
        if text.endswith(OPEN[:n]):
            return text[:-n]
    return text


def _turn(index: int, message: Message) -> dict[str, str]:
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content or ())
    role = "system" if message.role == "developer" else message.role
    if message.tool_calls:
        if role != "assistant":
            raise ApiError(400, "only the assistant makes tool calls", param=f"messages[{index}].tool_calls")
        calls = []
        for call in message.tool_calls:
            arguments = _json(call.function.arguments)
            if not isinstance(arguments, dict):
                place = f"messages[{index}].tool_calls"
                raise ApiError(400, "a tool call's arguments are the JSON text of an object", param=place)
            calls.append(json.dumps({"name": call.function.name, "arguments": arguments}, ensure_ascii=False))
        text += "".join(f"{OPEN}{call}{CLOSE}" for call in calls)
    elif content is None and role != "assistant":
        raise ApiError(400, "a message needs content", param=f"messages[{index}].content")
    return {"role": role, "content": text}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _object(raw: bytes | memoryview) -> dict[str, Any] | None:
    """A call, if that is what this is. msgspec stops where the JSON does; json would count the lines up to there."""
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return value if _is_call(value) else None


def _is_call(value: Any) -> bool:
    named = isinstance(value, dict) and isinstance(value.get("name"), str)
    return named and isinstance(value.get("arguments"), dict)


def _array(text: str) -> list[dict[str, Any]]:
    value = _json(text)
    return value if isinstance(value, list) and all(map(_is_call, value)) else []


def _call(call: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call["name"], "arguments": arguments},
    }
