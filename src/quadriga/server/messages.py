"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's interface. A request becomes a chat request."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from msgspec import Struct
from starlette.responses import Response

from quadriga.server import chat, text_routes
from quadriga.server.answers import Answers
from quadriga.server.caller import Caller
from quadriga.server.completions import stop_hit
from quadriga.server.errors import ApiError
from quadriga.server.schema import (
    ChatRequest,
    Function,
    FunctionCall,
    JsonSchema,
    Message,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    Tool,
    ToolCall,
)
from quadriga.server.service import Service
from quadriga.server.sse import EventSender, EventStream, json_response
from quadriga.server.tools import Reading, written_into
from quadriga.text.tool_calls.early import CallPart


class TextBlock(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """Text."""

    text: str


class ThinkingBlock(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="thinking"):
    """What the assistant thought."""

    thinking: str


class HiddenBlock(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="redacted_thinking"):
    """Thoughts that only another server can read: they are left out."""

    data: str = ""


class Document(Struct, kw_only=True, forbid_unknown_fields=True):
    """Where a document is: in the request, as text."""

    type: Literal["text"]
    data: str


class DocumentBlock(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="document"):
    """A text with a title."""

    source: Document
    title: str | None = None
    context: str | None = None


class ToolUseBlock(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="tool_use"):
    """A call the assistant made."""

    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="tool_result"):
    """What a call gave."""

    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


class Turn(Struct, kw_only=True, forbid_unknown_fields=True):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: str | list[TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | HiddenBlock | DocumentBlock]


class InputTool(Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None


class ToolChoice(Struct, kw_only=True, forbid_unknown_fields=True):
    """Which tool must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Struct, kw_only=True, forbid_unknown_fields=True):
    """Whether the model may think; how long is its own affair."""

    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(Struct, kw_only=True, forbid_unknown_fields=True):
    """What the answer must look like."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    """What the answer must look like, and with how much effort it is made."""

    format: OutputFormat | None = None
    effort: str | None = None


class CountRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/messages/count_tokens."""

    TOOL_KINDS: ClassVar[frozenset[str | None]] = frozenset({None, "custom"})

    model: str | None = None
    messages: list[Turn]
    system: str | list[TextBlock] | None = None
    tools: list[InputTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


def as_chat(body: CountRequest) -> ChatRequest:
    """The same question as a chat request.

    Raises:
        ApiError: a block in the wrong place.
    """
    messages = []
    if body.system:
        messages.append(Message(role="system", content=_text(body.system)))
    for i, turn in enumerate(body.messages):
        messages += _turn(i, turn)
    choice = body.tool_choice
    named: Any = None
    if choice is not None:
        if choice.type == "tool" and not choice.name:
            raise ApiError(400, "tool_choice of type tool needs a name", param="tool_choice.name")
        named = {"auto": "auto", "any": "required", "none": "none"}.get(choice.type) or NamedTool(
            type="function", function=NamedFunction(name=choice.name or "")
        )
    request = ChatRequest(
        model=body.model,
        messages=messages,
        tools=[
            Tool(type="function", function=Function(name=t.name, description=t.description, parameters=t.input_schema))
            for t in body.tools or []
        ]
        or None,
        tool_choice=named,
        parallel_tool_calls=None if choice is None else not choice.disable_parallel_tool_use,
    )
    if body.thinking is not None:
        request.chat_template_kwargs = {"enable_thinking": body.thinking.type != "disabled"}
    if body.output_config is not None:
        request.reasoning_effort = body.output_config.effort
        if (form := body.output_config.format) is not None:
            request.response_format = ResponseFormat(
                type="json_schema", json_schema=JsonSchema(name="answer", schema=form.schema)
            )
    if isinstance(body, MessagesRequest):
        if body.max_tokens < 1:
            raise ApiError(400, "max_tokens must be at least 1", param="max_tokens")
        request.max_tokens, request.stop = body.max_tokens, body.stop_sequences
        request.temperature, request.top_k, request.top_p = body.temperature, body.top_k, body.top_p
    return request


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def _turn(index: int, turn: Turn) -> list[Message]:
    if isinstance(turn.content, str):
        return [Message(role=turn.role, content=turn.content)]
    texts, calls, results, thoughts = [], [], [], []
    for i, block in enumerate(turn.content):
        place = f"messages[{index}].content[{i}]"
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, DocumentBlock):
            head = "".join(f"{line}\n" for line in (block.title, block.context) if line)
            texts.append(f"{head}{block.source.data}\n\n")
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, HiddenBlock):
            continue
        elif isinstance(block, ToolUseBlock):
            if turn.role != "assistant":
                raise ApiError(400, "tool_use belongs to the assistant", param=place)
            arguments = json.dumps(block.input, ensure_ascii=False)
            calls.append(ToolCall(id=block.id, function=FunctionCall(name=block.name, arguments=arguments)))
        else:
            if turn.role != "user":
                raise ApiError(400, "tool_result belongs to the user", param=place)
            result = _text(block.content or "")
            content = f"error: {result}" if block.is_error else result
            results.append(Message(role="tool", tool_call_id=block.tool_use_id, content=content))
    text = "".join(texts)
    if turn.role == "assistant":
        thought = "\n\n".join(thoughts) or None
        return [Message(role="assistant", content=text, tool_calls=calls or None, reasoning_content=thought)]
    if turn.role == "system":
        return [Message(role="system", content=text)]
    return [*results, Message(role="user", content=text)] if text or not results else results


async def count(service: Service, body: CountRequest, caller: Caller) -> Response:
    """How many tokens a request would be; not limited to the context."""
    service.check_model(body.model)
    request = await service.work.check(caller.n_bytes, as_chat, body)
    ids = (await text_routes.rendered(service, request, caller)).ids
    return json_response({"input_tokens": len(ids)})


def _stop(service: Service, body: MessagesRequest, answers: Answers, called: bool) -> tuple[str, str | None]:
    """(stop_reason, stop_sequence)."""
    choice = answers.choices[0]
    if called:
        return "tool_use", None
    if choice.finish_reason == "length":
        return "max_tokens", None
    hit = stop_hit(service, choice, body.stop_sequences or ())
    return ("end_turn", None) if hit is None else ("stop_sequence", hit)


def _usage(answers: Answers, n_thinking: int = 0) -> dict[str, Any]:
    usage = answers.usage()
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "output_tokens": usage["completion_tokens"],
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens_details": {"thinking_tokens": n_thinking},
        "server_tool_use": None,
    }


def _message(model: str, content: list[dict[str, Any]], end: dict[str, Any], answers: Answers) -> dict[str, Any]:
    """A message with every field that Anthropic's schema wants, most of which mean nothing here."""
    nothing = {"cache_creation": None, "inference_geo": None, "service_tier": "standard"}
    return {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        **end,
        "usage": {**_usage(answers), **nothing},
    }


def _end(reason: str | None, sequence: str | None) -> dict[str, Any]:
    return {"stop_reason": reason, "stop_sequence": sequence, "stop_details": None, "container": None}


def _tool_block(call: dict[str, Any]) -> dict[str, Any]:
    return _tool_use(call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))


def _tool_use(call_id: str, name: str, given: Any) -> dict[str, Any]:
    identifier = call_id.replace("call_", "toolu_")
    return {"type": "tool_use", "id": identifier, "name": name, "input": given, "caller": {"type": "direct"}}


_NO_TEXT: dict[str, Any] = {"type": "text", "text": "", "citations": []}
_NO_THOUGHT: dict[str, Any] = {"type": "thinking", "thinking": "", "signature": ""}


async def complete(service: Service, body: MessagesRequest, caller: Caller) -> Response:
    """The whole message."""
    request = await service.work.check(caller.n_bytes, as_chat, body)
    answers, reading = await chat.start(service, request, caller)
    await answers.collect()
    chat.record(service, answers)
    return await service.work.write(answers.n_bytes(), _whole, service, body, answers, reading)


def _whole(service: Service, body: MessagesRequest, answers: Answers, reading: Reading) -> Response:
    choice = answers.choices[0]
    answer = reading.read(choice.text, cut=choice.finish_reason == "length")
    blocks = [{**_NO_THOUGHT, "thinking": answer.thought}] if answer.thought else []
    blocks += [{**_NO_TEXT, "text": answer.content or ""}] if answer.content or not answer.calls else []
    blocks += [_tool_block(call) for call in answer.calls]
    end = _end(*_stop(service, body, answers, bool(answer.calls)))
    return json_response(_message(service.shown_name(body.model), blocks, end, answers))


async def stream(service: Service, body: MessagesRequest, caller: Caller) -> Response:
    """The message as events."""
    request = await service.work.check(caller.n_bytes, as_chat, body)
    answers, reading = await chat.start(service, request, caller)

    async def produce(sender: EventSender) -> None:
        def send(kind: str, **fields: Any) -> None:
            sender.event({"type": kind, **fields}, name=kind)

        blocks = _Blocks(send)
        write, reader = written_into(blocks, reading)
        try:
            send("message_start", message=_message(service.shown_name(body.model), [], _end(None, None), answers))
            send("ping")
            await sender.flush()
            await answers.send(sender, write)
            chat.record(service, answers)
            blocks.finish()
            called = reader.n_calls > 0
            end = _end(*await service.work.write(answers.n_bytes(), _stop, service, body, answers, called))
            send("message_delta", delta=end, usage=_usage(answers, reader.n_thinking))
            send("message_stop")
        finally:
            answers.close()

    return EventStream(produce, anthropic=True)


class _Blocks:
    """The events of a message's content blocks: words and thoughts into blocks of theirs, each call one of its own."""

    def __init__(self, send: Callable[..., None]) -> None:
        self._send, self._index, self._open = send, 0, ""

    def text(self, piece: str) -> None:
        """Words, into the open block or a new one."""
        self._into("text", _NO_TEXT)
        if piece:
            self._send("content_block_delta", index=self._index, delta={"type": "text_delta", "text": piece})

    def thought(self, piece: str) -> None:
        """What was thought, into the open block or a new one."""
        self._into("thinking", _NO_THOUGHT)
        self._send("content_block_delta", index=self._index, delta={"type": "thinking_delta", "thinking": piece})

    def _into(self, kind: str, empty: dict[str, Any]) -> None:
        if self._open != kind:
            self._close()
            self._open = kind
            self._send("content_block_start", index=self._index, content_block=empty)

    def call(self, call: dict[str, Any]) -> None:
        """A call of a tool."""
        block = _tool_block(call)
        self._tool(block)
        self._input(json.dumps(block["input"], ensure_ascii=False))
        self._close()

    def part(self, part: CallPart) -> None:
        """A piece of a call."""
        if part.name:
            self._tool(_tool_use(part.id, part.name, {}))
        if part.arguments:
            self._input(part.arguments)
        if part.last:
            self._close()

    def _tool(self, block: dict[str, Any]) -> None:
        self._close()
        self._send("content_block_start", index=self._index, content_block={**block, "input": {}})
        self._open = "tool_use"

    def _input(self, text: str) -> None:
        delta = {"type": "input_json_delta", "partial_json": text}
        self._send("content_block_delta", index=self._index, delta=delta)

    def finish(self) -> None:
        """End; a message without any block has an empty one."""
        if self._index == 0 and not self._open:
            self.text("")
        self._close()

    def _close(self) -> None:
        if self._open == "thinking":  # clients that were made for Anthropic's models wait for one
            self._send("content_block_delta", index=self._index, delta={"type": "signature_delta", "signature": ""})
        if self._open:
            self._send("content_block_stop", index=self._index)
            self._index, self._open = self._index + 1, ""
