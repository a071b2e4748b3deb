"""POST /v1/responses: OpenAI's newer interface, without stored state. A request becomes a chat request."""

from __future__ import annotations

import secrets
import time
from typing import Any, Literal

from msgspec import Struct
from starlette.responses import Response

from quadriga.errors import QuadrigaError
from quadriga.server import chat
from quadriga.server.errors import ApiError, as_api_error
from quadriga.server.schema import (
    ChatRequest,
    Function,
    FunctionCall,
    JsonSchema,
    Message,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    TextPart,
    Tool,
    ToolCall,
)
from quadriga.server.service import Answers, Caller, Service
from quadriga.server.sse import EventSender, EventStream, json_response
from quadriga.server.tools import Reader


class Item(Struct, kw_only=True, forbid_unknown_fields=True):
    """One item of the input: a message, a function call the model made, or its result."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[dict[str, Any]] | None = None
    id: str | None = None
    status: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | None = None
    phase: Literal["commentary", "final_answer"] | None = None
    """What an earlier answer was labelled as; it is part of the conversation either way."""


class FlatTool(Struct, kw_only=True, forbid_unknown_fields=True):
    """A function tool as this interface writes it."""

    type: Literal["function"]
    name: str
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class FlatChoice(Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool choice by name."""

    type: Literal["function"]
    name: str


class Format(Struct, kw_only=True, forbid_unknown_fields=True):
    """The text format."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    """Options of the text."""

    format: Format | None = None
    verbosity: None = None


class ResponsesRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/responses."""

    model: str
    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    previous_response_id: None = None
    include: list[str] | None = None
    user: str | None = None
    safety_identifier: str | None = None


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The same question as a chat request.

    Raises:
        ApiError: an item that cannot be a message.
    """
    if body.include:
        raise ApiError(400, "include is not supported", param="include")
    if body.max_output_tokens is not None and body.max_output_tokens < 1:
        raise ApiError(400, "max_output_tokens must be at least 1", param="max_output_tokens")
    messages = [Message(role="system", content=body.instructions)] if body.instructions else []
    items = [Item(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    messages += [_message(i, item) for i, item in enumerate(items)]
    form = None if body.text is None or body.text.format is None else _format(body.text.format)
    choice = body.tool_choice
    return ChatRequest(
        model=body.model,
        messages=messages,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        response_format=form,
        tools=[Tool(type="function", function=_function(t)) for t in body.tools] if body.tools else None,
        tool_choice=NamedTool(type="function", function=NamedFunction(name=choice.name))
        if isinstance(choice, FlatChoice)
        else choice,
        parallel_tool_calls=body.parallel_tool_calls,
    )


def _function(tool: FlatTool) -> Function:
    return Function(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)


def _format(form: Format) -> ResponseFormat:
    if form.type != "json_schema":
        return ResponseFormat(type=form.type)
    return ResponseFormat(type="json_schema", json_schema=JsonSchema(name=form.name or "answer", schema=form.schema))


def _message(index: int, item: Item) -> Message:
    place = f"input[{index}]"
    if item.type == "function_call":
        if not item.call_id or not item.name or item.arguments is None:
            raise ApiError(400, "a function_call has call_id, name and arguments", param=place)
        call = ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))
        return Message(role="assistant", tool_calls=[call])
    if item.type == "function_call_output":
        if not item.call_id or item.output is None:
            raise ApiError(400, "a function_call_output has call_id and output", param=place)
        return Message(role="tool", tool_call_id=item.call_id, content=item.output)
    if item.role is None or item.content is None:
        raise ApiError(400, "a message has role and content", param=place)
    if isinstance(item.content, str):
        return Message(role=item.role, content=item.content)
    parts = []
    for i, part in enumerate(item.content):
        kind, text = part.get("type"), part.get("text")
        if kind not in ("input_text", "output_text", "text") or not isinstance(text, str):
            shown = repr(kind[:80]) if isinstance(kind, str) else type(kind).__name__
            raise ApiError(
                400, f"content of type {shown} is not supported: this model reads text", param=f"{place}.content[{i}]"
            )
        parts.append(TextPart(type="text", text=text))
    return Message(role=item.role, content=parts)


def _shell(service: Service, body: ResponsesRequest, identifier: str, created: int) -> dict[str, Any]:
    """Everything of a response but what was made."""
    form = body.text.format if body.text is not None and body.text.format is not None else Format(type="text")
    return {
        "id": identifier,
        "object": "response",
        "created_at": created,
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": service.name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {k: v for k, v in _plain(form).items() if v is not None}},
        "tool_choice": "auto" if body.tool_choice is None else _plain(body.tool_choice),
        "tools": [{**_plain(tool), "strict": tool.strict is not False} for tool in body.tools or []],
        "top_logprobs": 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _plain(value: Any) -> Any:
    import msgspec

    return msgspec.to_builtins(value)


def _finish(shell: dict[str, Any], answers: Answers, output: list[dict[str, Any]]) -> dict[str, Any]:
    cut = answers.choices[0].finish_reason == "length"
    usage = answers.usage()
    return {
        **shell,
        "status": "incomplete" if cut else "completed",
        "completed_at": None if cut else int(time.time()),
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output,
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        },
    }


_TEXT_PART: dict[str, Any] = {"type": "output_text", "annotations": [], "logprobs": []}


def _text_item(identifier: str, text: str, status: str) -> dict[str, Any]:
    content = [] if status == "in_progress" else [{**_TEXT_PART, "text": text}]
    return {"id": identifier, "type": "message", "status": status, "role": "assistant", "content": content}


def _call_item(call: dict[str, Any], status: str = "completed") -> dict[str, Any]:
    return {
        "id": f"fc_{secrets.token_hex(12)}",
        "type": "function_call",
        "status": status,
        "call_id": call["id"],
        "name": call["function"]["name"],
        "arguments": call["function"]["arguments"],
    }


async def complete(service: Service, body: ResponsesRequest, caller: Caller) -> Response:
    """The whole response."""
    request = await service.work.check(caller.n_bytes, as_chat, body)
    answers, tools = await chat.start(service, request, caller)
    await answers.collect()
    chat.record(service, answers)
    content, calls = tools.read(answers.choices[0].text)
    status = "incomplete" if answers.choices[0].finish_reason == "length" else "completed"
    output = [_text_item(f"msg_{secrets.token_hex(12)}", content or "", status)] if content or not calls else []
    output += [_call_item(call) for call in calls]
    shell = _shell(service, body, f"resp_{secrets.token_hex(12)}", int(time.time()))
    return json_response(_finish(shell, answers, output))


async def stream(service: Service, body: ResponsesRequest, caller: Caller) -> Response:
    """The response as events."""
    request = await service.work.check(caller.n_bytes, as_chat, body)
    answers, tools = await chat.start(service, request, caller)
    shell = _shell(service, body, f"resp_{secrets.token_hex(12)}", int(time.time()))

    async def produce(sender: EventSender) -> None:
        out = _Output(sender)
        try:
            out.send("response.created", response=shell)
            out.send("response.in_progress", response=shell)
            await sender.flush()
            reader = Reader(tools)
            async for batch in answers.batches():
                for _, event in batch:
                    for piece in reader.push(event.text, last=event.finish_reason is not None):
                        if isinstance(piece, str):
                            out.text(piece)
                        else:
                            out.call(piece)
                await sender.flush()
            chat.record(service, answers)
            cut = answers.choices[0].finish_reason == "length"
            whole = _finish(shell, answers, out.finish("incomplete" if cut else "completed"))
            out.send(f"response.{whole['status']}", response=whole)
        except QuadrigaError as error:
            out.send("response.failed", response={**shell, "status": "failed", "error": _failure(error)})
        finally:
            answers.close()

    return EventStream(produce)


def _failure(error: QuadrigaError) -> dict[str, Any]:
    shown = as_api_error(error)
    return {"code": shown.code or "server_error", "message": str(shown)}


class _Output:
    """The events of a response's items: words into a message, each call an item of its own."""

    def __init__(self, sender: EventSender) -> None:
        self._sender, self._number = sender, -1
        self._items: list[dict[str, Any]] = []
        self._message: str | None = None  # the id of the message that is open
        self._said: list[str] = []

    def send(self, kind: str, **fields: Any) -> None:
        """One event, numbered."""
        self._number += 1
        self._sender.event({"type": kind, "sequence_number": self._number, **fields}, name=kind)

    def text(self, piece: str) -> None:
        """Words, into the open message or a new one."""
        if self._message is None:
            self._message, self._said = f"msg_{secrets.token_hex(12)}", []
            begun = _text_item(self._message, "", "in_progress")
            self.send("response.output_item.added", output_index=len(self._items), item=begun)
            self.send("response.content_part.added", **self._place(), part={**_TEXT_PART, "text": ""})
        self._said.append(piece)
        if piece:
            self.send("response.output_text.delta", **self._place(), delta=piece, logprobs=[])

    def call(self, call: dict[str, Any]) -> None:
        """A call of a tool."""
        self._close("completed")
        item, index = _call_item(call), len(self._items)
        at = {"item_id": item["id"], "output_index": index}
        begun = {**item, "arguments": "", "status": "in_progress"}
        self.send("response.output_item.added", output_index=index, item=begun)
        self.send("response.function_call_arguments.delta", **at, delta=item["arguments"])
        self.send("response.function_call_arguments.done", **at, name=item["name"], arguments=item["arguments"])
        self.send("response.output_item.done", output_index=index, item=item)
        self._items.append(item)

    def finish(self, status: str) -> list[dict[str, Any]]:
        """All items, the last one ended; an answer without any is an empty message."""
        if not self._items and self._message is None:
            self.text("")
        self._close(status)
        return self._items

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message, "output_index": len(self._items), "content_index": 0}

    def _close(self, status: str) -> None:
        if self._message is None:
            return
        said = "".join(self._said)
        item = _text_item(self._message, said, status)
        self.send("response.output_text.done", **self._place(), text=said, logprobs=[])
        self.send("response.content_part.done", **self._place(), part={**_TEXT_PART, "text": said})
        self.send("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)
        self._message = None
