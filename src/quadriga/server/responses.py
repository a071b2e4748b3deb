"""POST /v1/responses: OpenAI's newer interface, without stored state. A request becomes a chat request."""

from __future__ import annotations

import secrets
import time
from typing import Any, ClassVar, Literal

from msgspec import Struct
from starlette.responses import Response

from quadriga.errors import QuadrigaError
from quadriga.server import chat
from quadriga.server.answers import Answers
from quadriga.server.caller import Caller
from quadriga.server.errors import ApiError, as_api_error
from quadriga.server.response_items import FlatTool, Output, call_item, text_item, thought_item
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
from quadriga.server.service import Service
from quadriga.server.sse import EventSender, EventStream, json_response
from quadriga.server.tools import written_into


class Item(Struct, kw_only=True, forbid_unknown_fields=True):
    """One item of the input: a message, what was thought, a call the model made, or its result."""

    type: Literal[
        "message",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
        "reasoning",
    ] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[dict[str, Any]] | None = None
    id: str | None = None
    status: str | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: str | list[dict[str, Any]] | None = None
    summary: list[dict[str, Any]] | None = None


class FlatChoice(Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool choice by name."""

    type: Literal["function", "custom"]
    name: str


class Reasoning(Struct, kw_only=True, forbid_unknown_fields=True):
    """With how much effort the model thinks."""

    effort: str | None = None


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


class ResponsesRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/responses."""

    TOOL_KINDS: ClassVar[frozenset[str | None]] = frozenset({"function", "custom", "namespace"})
    REFUSED: ClassVar[dict[str, str]] = {"prompt": "no prompts are stored here; send its text as input or instructions"}

    model: str | None = None
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
    metadata: dict[str, Any] | None = None
    truncation: Literal["disabled", "auto"] | None = None
    reasoning: Reasoning | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The same question as a chat request.

    Raises:
        ApiError: an item that cannot be a message.
    """
    if body.max_output_tokens is not None and body.max_output_tokens < 1:
        raise ApiError(400, "max_output_tokens must be at least 1", param="max_output_tokens")
    messages = [Message(role="system", content=body.instructions)] if body.instructions else []
    items = [Item(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    messages += _messages(items)
    form = None if body.text is None or body.text.format is None else _format(body.text.format)
    choice = body.tool_choice
    return ChatRequest(
        model=body.model,
        messages=messages,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        response_format=form,
        tools=[Tool(type="function", function=one) for tool in body.tools for one in _functions(tool)]
        if body.tools
        else None,
        tool_choice=NamedTool(type="function", function=NamedFunction(name=choice.name))
        if isinstance(choice, FlatChoice)
        else choice,
        parallel_tool_calls=body.parallel_tool_calls,
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
    )


_ANY_TEXT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
"""The arguments of a tool that takes any text."""


def _functions(tool: FlatTool) -> list[Function]:
    if tool.type == "custom":
        return [Function(name=tool.name, description=tool.description, parameters=_ANY_TEXT)]
    if tool.type == "function":
        return [Function(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)]
    return [
        Function(name=_joined(tool.name, one.name), description=one.description, parameters=one.parameters)
        for one in tool.tools or []
    ]


def _joined(namespace: str | None, name: str) -> str:
    """The name under which the model knows a function of a namespace."""
    return f"{namespace}.{name}" if namespace else name


def _format(form: Format) -> ResponseFormat:
    if form.type != "json_schema":
        return ResponseFormat(type=form.type)
    return ResponseFormat(type="json_schema", json_schema=JsonSchema(name=form.name or "answer", schema=form.schema))


def _messages(items: list[Item]) -> list[Message]:
    """Items as turns: calls that stand beside each other, and what was thought before them, are one turn's."""
    out: list[Message] = []
    thought = ""
    for i, item in enumerate(items):
        if item.type == "reasoning":
            parts = [*(item.summary or []), *(item.content if isinstance(item.content, list) else [])]
            thought += "\n\n".join(str(part["text"]) for part in parts if isinstance(part.get("text"), str))
            continue
        message = _message(i, item)
        if message.role == "assistant":
            message.reasoning_content, thought = thought or None, ""
        if message.tool_calls and out and out[-1].role == "assistant":
            out[-1].tool_calls = [*(out[-1].tool_calls or []), *message.tool_calls]
        else:
            out.append(message)
    return out


def _message(index: int, item: Item) -> Message:
    place = f"input[{index}]"
    if item.type in ("function_call", "custom_tool_call"):
        custom = item.type == "custom_tool_call"
        given = item.input if custom else item.arguments
        if not item.call_id or not item.name or given is None:
            what = "input" if custom else "arguments"
            raise ApiError(400, f"a {item.type} has call_id, name and {what}", param=place)
        arguments: str | dict[str, Any] = {"input": given} if custom else given
        name = _joined(item.namespace, item.name)
        call = ToolCall(id=item.call_id, function=FunctionCall(name=name, arguments=arguments))
        return Message(role="assistant", tool_calls=[call])
    if item.type in ("function_call_output", "custom_tool_call_output"):
        if not item.call_id or item.output is None:
            raise ApiError(400, f"a {item.type} has call_id and output", param=place)
        content = item.output if isinstance(item.output, str) else _parts(item.output, f"{place}.output")
        return Message(role="tool", tool_call_id=item.call_id, content=content)
    if item.role is None or item.content is None:
        raise ApiError(400, "a message has role and content", param=place)
    content = item.content if isinstance(item.content, str) else _parts(item.content, f"{place}.content")
    return Message(role=item.role, content=content)


def _parts(given: list[dict[str, Any]], place: str) -> list[TextPart]:
    parts = []
    for i, part in enumerate(given):
        kind, text = part.get("type"), part.get("text")
        if kind not in ("input_text", "output_text", "text") or not isinstance(text, str):
            shown = repr(kind[:80]) if isinstance(kind, str) else type(kind).__name__
            reason = f"content of type {shown} is not supported: this model reads text"
            raise ApiError(400, reason, param=f"{place}[{i}]")
        parts.append(TextPart(type="text", text=text))
    return parts


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
        "model": service.shown_name(body.model),
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
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
        # Texts where nothing was given: some clients want the fields, and none of them may be null.
        "prompt_cache_key": body.prompt_cache_key or "",
        "safety_identifier": body.safety_identifier or "",
        **({"user": body.user} if body.user is not None else {}),
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


async def complete(service: Service, body: ResponsesRequest, caller: Caller) -> Response:
    """The whole response."""
    request = await service.work.check(caller.n_bytes, as_chat, body)
    answers, reading = await chat.start(service, request, caller)
    await answers.collect()
    chat.record(service, answers)
    cut = answers.choices[0].finish_reason == "length"
    answer = reading.read(answers.choices[0].text, cut=cut)
    status = "incomplete" if cut else "completed"
    output = [thought_item(f"rs_{secrets.token_hex(12)}", answer.thought, status)] if answer.thought else []
    if answer.content or not answer.calls:
        output.append(text_item(f"msg_{secrets.token_hex(12)}", answer.content or "", status))
    output += [call_item(call, body.tools or []) for call in answer.calls]
    shell = _shell(service, body, f"resp_{secrets.token_hex(12)}", int(time.time()))
    return json_response(_finish(shell, answers, output))


async def stream(service: Service, body: ResponsesRequest, caller: Caller) -> Response:
    """The response as events."""
    request = await service.work.check(caller.n_bytes, as_chat, body)
    answers, reading = await chat.start(service, request, caller)
    shell = _shell(service, body, f"resp_{secrets.token_hex(12)}", int(time.time()))

    async def produce(sender: EventSender) -> None:
        out = Output(sender, body.tools or [])
        write, _ = written_into(out, reading)
        try:
            out.send("response.created", response=shell)
            out.send("response.in_progress", response=shell)
            await sender.flush()
            await answers.send(sender, write)
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
