"""Tool calls and thoughts: how a model is told of its tools, how its answer is read, and what makes a call certain.

Where the checkpoint's chat template writes tools by itself, it does, and answers are read in its form
(``text.tool_calls``). Other models get a paragraph in the system prompt that asks for
``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, and what their template has no turn for goes into turns
that it has. With ``tool_choice`` "required" or a name, a grammar allows nothing but a JSON array of calls whose
arguments fit the tools' schemas.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from quadriga.engine.request import TokenEvent
from quadriga.server.errors import ApiError
from quadriga.server.schema import MAX_TOOLS, ChatRequest, Message, NamedTool, Tool
from quadriga.text import harmony
from quadriga.text.reasoning import Thought, Thoughts
from quadriga.text.template_abilities import Abilities
from quadriga.text.tool_calls.early import CallPart, OpenCall
from quadriga.text.tool_calls.forms import HERMES, Form, form_of
from quadriga.text.tool_calls.pieces import JsonPieces
from quadriga.text.tool_calls.reader import MAX_CALLS, Reader, Tools, as_call

OPEN, CLOSE = HERMES.opens, HERMES.closes
MAX_NAME = 128

Piece = str | Thought | dict[str, Any] | CallPart
"""Words of an answer, what was thought before them, a call as OpenAI writes it, or a piece of one."""


def _arguments_schema(parameters: dict[str, Any], number: int) -> dict[str, Any]:
    """A tool's parameters as a part of a larger schema: always of an object, and what they call ``#`` is themselves.

    Raises:
        ApiError: they cannot be those of an object.
    """
    given = parameters.get("type", "object")
    values = parameters.get("enum", [parameters["const"]] if "const" in parameters else [{}])
    if "object" not in (given if isinstance(given, list) else [given]) or not any(isinstance(v, dict) for v in values):
        text = "a call's arguments are an object: parameters must be a schema of one"
        raise ApiError(400, text, param="tools")
    return {"$id": f"urn:quadriga:tool:{number}", **parameters, "type": "object"}


def system_text(tools: Sequence[Tool], *, forced: bool, parallel: bool) -> str:
    """What the model is told about its tools."""
    lines = [json.dumps({k: v for k, v in _shown(tool).items() if v is not None}, ensure_ascii=False) for tool in tools]
    return f"These functions can be called, given as JSON:\n{chr(10).join(lines)}\n{_how(forced, parallel)}"


def _how(forced: bool, parallel: bool) -> str:
    if forced:
        count = "one or more calls" if parallel else "one call"
        return f'Answer only with a JSON array of {count}: [{{"name": NAME, "arguments": {{...}}}}]'
    form = f'To call one, answer only with {OPEN}{{"name": NAME, "arguments": {{...}}}}{CLOSE}'
    return form + ", one such block for each call. If no function helps, answer in plain words."


def _shown(tool: Tool) -> dict[str, Any]:
    function = tool.function
    return {"name": function.name, "description": function.description, "parameters": function.parameters}


class ToolUse:
    """What one request allows: which tools, and whether a call is certain.

    Args:
        body: the request.
        able: what the model's template can write.
        form: how calls are written; None: as the template has them.

    Raises:
        ApiError: a tool choice without tools, a name that is no tool's, too many tools.
    """

    def __init__(self, body: ChatRequest, able: Abilities | None = None, form: Form | None = None) -> None:
        tools = body.tools or []
        choice = body.tool_choice
        if len(tools) > MAX_TOOLS:
            raise ApiError(400, f"tools takes at most {MAX_TOOLS}, got {len(tools)}", param="tools")
        names = [tool.function.name for tool in tools]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ApiError(400, f"two tools have the name {twice[:80]!r}", param="tools")
        for name in names:
            if not (0 < len(name) <= MAX_NAME and name.translate(_PLAIN).isalnum() and name.isascii()):
                message = f"a tool's name is 1 to {MAX_NAME} letters, digits, _, - or .; got {name[:80]!r}"
                raise ApiError(400, message, param="tools")
        if isinstance(choice, NamedTool):
            if choice.function.name not in names:
                raise ApiError(400, f"tool_choice names {choice.function.name!r}, no tool does", param="tool_choice")
            tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if choice == "required" and not tools:
            raise ApiError(400, "tool_choice 'required' needs tools", param="tool_choice")
        self.tools = [] if choice == "none" else tools
        self.forced = bool(self.tools) and choice not in (None, "auto", "none")
        self.parallel = body.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
        self._able = able or Abilities(tool_turns=True)
        self._form = form or (form_of(self._able.source) if self._able.tools else HERMES)

    @property
    def reads(self) -> Tools | None:
        """What an answer is read with; None where there are no tools."""
        if not self.tools:
            return None
        schemas = {tool.function.name: tool.function.parameters or {} for tool in self.tools}
        return Tools(self._form, schemas, self.forced, MAX_CALLS if self.parallel else 1)

    def schema(self) -> dict[str, Any]:
        """The JSON schema of a certain answer: an array of calls, without white space that nothing needs."""
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": t.function.name},
                    "arguments": _arguments_schema(t.function.parameters or {}, i),
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for i, t in enumerate(self.tools)
        ]
        items = calls[0] if len(calls) == 1 else {"anyOf": calls}
        most = MAX_CALLS if self.parallel else 1
        compact = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
        return {"type": "array", "items": items, "minItems": 1, "maxItems": most, **compact}

    @property
    def shown(self) -> list[dict[str, Any]] | None:
        """The tools for a template that writes them; None where there are none, or it does not."""
        if not (self.tools and self._able.tools):
            return None
        return [
            {"type": "function", "function": {k: v for k, v in _shown(tool).items() if v is not None}}
            for tool in self.tools
        ]

    def turns(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """A conversation as the chat template takes it; see ``text.chat.render``.

        Raises:
            ApiError: a message without content, calls that are none.
        """
        names: dict[str, str] = {}
        turns = [self._turn(i, message, names) for i, message in enumerate(messages)]
        told = ""
        if self.tools and not self._able.tools:
            told = system_text(self.tools, forced=self.forced, parallel=self.parallel)
        elif self.forced:
            told = _how(True, self.parallel)
        if told and turns and turns[0]["role"] == "system":
            turns[0] = {"role": "system", "content": f"{turns[0]['content']}\n\n{told}".strip()}
        elif told:
            turns.insert(0, {"role": "system", "content": told})
        return self._writable(turns)

    def _writable(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The turns with what the template cannot write put into turns of the user."""
        able = self._able
        if not able.system and turns and turns[0]["role"] == "system" and len(turns) > 1 and turns[1]["role"] == "user":
            first, second, *rest = turns
            turns = [{**second, "content": f"{first['content']}\n\n{second['content']}"}, *rest]
        if able.tools or able.tool_turns:
            return turns
        out: list[dict[str, Any]] = []
        after_result = False
        for turn in turns:
            is_result = turn["role"] == "tool"
            content = f"<tool_response>\n{turn['content']}\n</tool_response>" if is_result else turn["content"]
            role = "user" if is_result else turn["role"]
            # Results that stand beside each other, or beside the user's words, are one turn where turns must alternate.
            joins = able.alternate and out and role == out[-1]["role"] == "user" and (is_result or after_result)
            if joins:
                out[-1] = {"role": "user", "content": f"{out[-1]['content']}\n{content}"}
            else:
                out.append({"role": role, "content": content})
            after_result = is_result or (bool(joins) and after_result)
        return out

    def _turn(self, index: int, message: Message, names: dict[str, str]) -> dict[str, Any]:
        content = message.content
        text = content if isinstance(content, str) else "".join(part.text for part in content or ())
        role = "system" if message.role == "developer" else message.role
        place = f"messages[{index}]"
        turn: dict[str, Any] = {"role": role, "content": text}
        if message.tool_calls:
            if role != "assistant":
                raise ApiError(400, "only the assistant makes tool calls", param=f"{place}.tool_calls")
            calls = []
            for call in message.tool_calls:
                arguments = _arguments(call.function.arguments)
                if arguments is None:
                    reason = "a tool call's arguments are an object, or the JSON text of one"
                    raise ApiError(400, reason, param=f"{place}.tool_calls")
                names[call.id or ""] = call.function.name
                calls.append({"name": call.function.name, "arguments": arguments})
            if self._able.tools:
                ids = [self._id(call.id or f"call_{index}_{i}") for i, call in enumerate(message.tool_calls)]
                turn["tool_calls"] = [
                    {"id": call_id, "type": "function", "function": call}
                    for call_id, call in zip(ids, calls, strict=True)
                ]
            else:
                turn["content"] += "".join(f"{OPEN}{json.dumps(call, ensure_ascii=False)}{CLOSE}" for call in calls)
        elif content is None and role != "assistant":
            raise ApiError(400, "a message needs content", param=f"{place}.content")
        thought = message.reasoning_content or message.reasoning
        if thought and role == "assistant" and self._able.thinks is not None:
            turn["reasoning_content"] = thought
        if role == "tool" and self._able.tools:
            call_id = message.tool_call_id or ""
            turn["tool_call_id"] = self._id(call_id)
            if name := message.name or names.get(call_id):
                turn["name"] = name
        return turn

    def _id(self, call_id: str) -> str:
        """An id as the template wants it."""
        if not self._able.nine or (len(call_id) == 9 and call_id.isalnum()):
            return call_id
        return hashlib.sha256(call_id.encode(errors="replace")).hexdigest()[:9]


_PLAIN = str.maketrans("_-.", "aaa")


def _arguments(given: str | dict[str, Any]) -> dict[str, Any] | None:
    if isinstance(given, dict):
        return given
    try:
        value = json.loads(given) if given.strip() else {}
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@dataclass(frozen=True)
class Reading:
    """How the answers to a request are read: thoughts first, then words and calls."""

    tools: Tools | None = None
    thinks: tuple[str, str] | None = None
    """The marks around thoughts; None: there are none."""
    opened: bool = False
    """The prompt ends inside of a thought."""
    channels: bool = False
    """Answers are gpt-oss's messages in channels (``text.harmony``)."""

    @property
    def marks(self) -> tuple[str, ...]:
        """What must be seen in an answer's text although it may be a control token."""
        if self.channels:
            return harmony.MARKS
        tools = self.tools.marks if self.tools is not None and not self.tools.forced else ()
        # A token, and a word that belongs to the mark behind it: Gemma 4's <|channel>thought.
        return (*tools, *(mark[: mark.rfind(">") + 1] or mark for mark in self.thinks or ()))

    def read(self, text: str, *, cut: bool = False) -> Answer:
        """A whole answer.

        Args:
            cut: the budget ended it. A call that it ends in is neither a call nor words.
        """
        pieces = reader(self).push(text, last=True, cut=cut)
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        thought = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
        calls = [piece for piece in pieces if isinstance(piece, dict)]
        return Answer(content if content or (self.tools is None and not thought) else None, calls, thought or None)


@dataclass(frozen=True)
class Answer:
    """A whole answer in its parts. What is no well-formed call of a known tool stays content."""

    content: str | None
    calls: list[dict[str, Any]]
    thought: str | None


def reader(reading: Reading, *, streams: bool = False) -> AnswerReader | ChannelReader:
    """What reads one answer; one that streams tells calls in pieces, as they are written."""
    return ChannelReader(reading, streams) if reading.channels else AnswerReader(reading, streams)


class Items(Protocol):
    """What takes an answer's pieces, each into the open item of its kind or a new one."""

    def text(self, piece: str) -> None:
        """Words."""
        ...

    def thought(self, piece: str) -> None:
        """What was thought."""
        ...

    def part(self, part: CallPart) -> None:
        """A piece of a call."""
        ...

    def call(self, call: dict[str, Any]) -> None:
        """A whole call, as OpenAI writes it."""
        ...


def written_into(
    items: Items, reading: Reading
) -> tuple[Callable[[object, TokenEvent], None], AnswerReader | ChannelReader]:
    """What puts each event of an answer that streams into its items, and the reader that it does so with."""
    read = reader(reading, streams=True)

    def write(_: object, event: TokenEvent) -> None:
        reason = event.finish_reason
        for piece in read.push(event.text, last=reason is not None, cut=reason == "length"):
            if isinstance(piece, str):
                items.text(piece)
            elif isinstance(piece, CallPart):
                items.part(piece)
            elif isinstance(piece, Thought):
                items.thought(piece.text)
            else:
                items.call(piece)

    return write, read


class ChannelReader:
    """An answer of messages in channels as it comes."""

    def __init__(self, reading: Reading, streams: bool = False) -> None:
        self._parser, self._tools, self._streams = harmony.HarmonyParser(), reading.tools, streams
        self._told: OpenCall | None = None
        self._open: harmony.ToolCall | None = None
        self._arguments: list[str] = []
        self.n_thinking = self.n_calls = 0

    def push(self, text: str, *, last: bool, cut: bool = False) -> list[Piece]:
        """See :class:`AnswerReader`."""
        events = self._parser.push(text) + (self._parser.finish() if last else [])
        out: list[Piece] = []
        for event in events:
            if self._open is not None and event.message != self._open.message:
                out += self._call()
            if isinstance(event, harmony.ToolCall):
                if self._open is None and self._streams and self._offered(event.name):
                    self._told = OpenCall(event.name, JsonPieces())
                self._open = event
                self._arguments.append(event.text)
                out += self._part(event.text)
            elif event.text:
                thought = isinstance(event, harmony.Reasoning)
                self.n_thinking += thought
                out.append(Thought(event.text) if thought else event.text)
        return out + self._call(cut=cut) if last else out

    def _offered(self, name: str) -> bool:
        return self._tools is not None and name in self._tools.schemas and self.n_calls < self._tools.most

    def _part(self, text: str) -> list[Piece]:
        if self._told is None or self._told.over or not text:
            return []
        parts, _ = self._told.push(text)
        self.n_calls += self._told.whole
        return list(parts)

    def _call(self, *, cut: bool = False) -> list[Piece]:
        """The call that is complete now; words, where it is of no tool that was offered or has no arguments to read."""
        if self._open is None:
            return []
        name, raw = self._open.name, "".join(self._arguments)
        self._open, self._arguments = None, []
        told, self._told = self._told, None
        if told is not None and (raw.strip() or cut):
            return list(told.cut())
        call = as_call(name, raw) if self._offered(name) else None
        if cut and self._offered(name) and (call is None or not raw.strip()):
            return []
        if call is None:
            return [raw] if raw else []
        self.n_calls += 1
        return [call]


class AnswerReader:
    """One answer as it comes."""

    def __init__(self, reading: Reading, streams: bool = False) -> None:
        self._thoughts = Thoughts(reading.thinks, opened=reading.opened)
        self._calls = Reader(reading.tools, streams=streams)
        self.n_thinking = 0
        """Tokens, or pieces of text that came together, that were thought."""

    @property
    def n_calls(self) -> int:
        """Calls so far."""
        return self._calls.n_calls

    def push(self, text: str, *, last: bool, cut: bool = False) -> list[Piece]:
        """The pieces that this text makes certain, in order; all that is left with the last.

        Args:
            cut: with the last: the budget ended the answer.
        """
        out: list[Piece] = []
        for piece in self._thoughts.push(text, last=last):
            if isinstance(piece, Thought):
                out.append(piece)
            else:
                out += self._calls.push(piece, last=False)
        self.n_thinking += self._thoughts.thinking
        if last:
            out += self._calls.push("", last=True, cut=cut)
        return out
