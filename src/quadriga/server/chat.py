"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.responses import Response

from quadriga.engine.request import TokenEvent
from quadriga.server.errors import ApiError
from quadriga.server.schema import INLINE_BYTES, ChatRequest
from quadriga.server.service import Answers, Caller, Choice, Service
from quadriga.server.sse import EventSender, EventStream, json_response, part
from quadriga.server.tools import Reader, ToolUse
from quadriga.text.chat import RenderedPrompt, render, render_soon

MAX_MESSAGES = 10_000


async def start(service: Service, body: ChatRequest, caller: Caller) -> tuple[Answers, ToolUse]:
    """Check a chat request and put it into the engine.

    Raises:
        ApiError, RequestError, BusyError: it cannot be served.
    """
    service.check_model(body.model)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "give max_tokens or max_completion_tokens, not both", param="max_tokens")
    check_count(service, len(body.messages))
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is for streams", param="stream_options")
    if body.metadata:
        raise ApiError(400, "metadata is not supported: answers are not stored", param="metadata")
    constraint = service.constraint(body.response_format)
    tools, turns = await service.work.check(caller.n_bytes, _turns, body)
    if tools.forced:
        if constraint is not None:
            raise ApiError(400, "a forced tool call leaves no room for a response_format", param="response_format")
        constraint = ("json", tools.schema())
    ids = (await rendered(service, turns, caller, check=service.llm.check_length)).ids
    given = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if given is not None and given < 1:
        raise ApiError(400, f"max_tokens must be at least 1, got {given}", param="max_tokens")
    limit = service.llm.config.max_seq_len if given is None else given
    params = await service.work.check(
        caller.n_bytes, lambda: service.params(body, max_tokens=limit, logprobs=body.top_logprobs or 0)
    )
    params = service.llm.chat_params(params)
    return await service.run([ids], params, body, caller, constraint=constraint), tools


def check_count(service: Service, n_messages: int) -> None:
    """Refuse a conversation of no messages, or of so many that no context holds them.

    Raises:
        ApiError: 400 that names the bound.
    """
    most = min(MAX_MESSAGES, service.llm.config.max_seq_len)
    if not 1 <= n_messages <= most:
        raise ApiError(400, f"messages must be 1 to {most}, got {n_messages}", param="messages")


def _turns(body: ChatRequest) -> tuple[ToolUse, list[dict[str, str]]]:
    tools = ToolUse(body)
    return tools, tools.messages(body.messages)


async def rendered(
    service: Service,
    turns: list[dict[str, str]],
    caller: Caller,
    *,
    add_generation_prompt: bool = True,
    check: Callable[[str], None] | None = None,
) -> RenderedPrompt:
    """A conversation as the model reads it: on the threads for templates, a large one on those for large bodies.

    Args:
        check: see ``text.chat.render``.
    """
    tokenizer = service.llm._need_tokenizer()
    if caller.n_bytes <= INLINE_BYTES:
        return await render_soon(turns, tokenizer, add_generation_prompt=add_generation_prompt, check=check)
    return await service.work.encode(
        caller.n_bytes,
        lambda: render(turns, tokenizer, add_generation_prompt=add_generation_prompt, check=check),
    )


def finish_reason(choice: Choice, called: bool) -> str:
    """Why an answer ended, in OpenAI's words."""
    return "tool_calls" if called and choice.finish_reason == "stop" else choice.finish_reason or "stop"


async def complete(service: Service, body: ChatRequest, caller: Caller) -> Response:
    """The whole answer as one JSON object."""
    answers, tools = await start(service, body, caller)
    await answers.collect()
    record(service, answers)
    size = answers.n_bytes((1 + (body.top_logprobs or 0) if body.logprobs else 0) + 8 * body.routing)
    return await service.work.write(size, _whole, service, body, answers, tools)


def _whole(service: Service, body: ChatRequest, answers: Answers, tools: ToolUse) -> Response:
    choices = []
    for choice in answers.choices:
        content, calls = tools.read(choice.text)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
        if calls:
            message["tool_calls"] = calls
        shown: dict[str, Any] = {
            "index": choice.index,
            "message": message,
            "logprobs": _logprobs(service, choice.events) if body.logprobs else None,
            "finish_reason": finish_reason(choice, bool(calls)),
        }
        if body.routing:
            shown["routing"] = [r for event in choice.events for r in service.routing(event)]
        choices.append(part(shown))
    head = {"id": _new_id(), "object": "chat.completion", "created": int(time.time()), "model": service.name}
    return json_response({**head, "choices": choices, "usage": answers.usage(), "timings": answers.timings()})


async def stream(service: Service, body: ChatRequest, caller: Caller) -> Response:
    """The answer as it comes."""
    answers, tools = await start(service, body, caller)
    head = {"id": _new_id(), "object": "chat.completion.chunk", "created": int(time.time()), "model": service.name}
    usage = body.stream_options is not None and body.stream_options.include_usage
    with_usage: dict[str, Any] = {"usage": None} if usage else {}
    readers = [Reader(tools) for _ in answers.choices]
    calls = [0 for _ in answers.choices]
    open_choices = set(range(len(answers.choices)))

    async def produce(sender: EventSender) -> None:
        def chunk(choice: Choice, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
            one = {"index": choice.index, "delta": delta, "logprobs": more.pop("logprobs", None)}
            one["finish_reason"] = more.pop("finish_reason", None)
            return {**head, "choices": [one], **with_usage, **more}

        def write(choice: Choice, event: TokenEvent) -> None:
            extra: dict[str, Any] = {"logprobs": _logprobs(service, [event])} if body.logprobs else {}
            if body.routing:
                extra["routing"] = service.routing(event)
            reader, last = readers[choice.index], event.finish_reason is not None
            pieces = reader.push(event.text, last=last)
            if extra and not (pieces and isinstance(pieces[0], str)):
                sender.event(chunk(choice, {}, **extra))
                extra = {}
            for piece in pieces:
                if isinstance(piece, str):
                    sender.event(chunk(choice, {"content": piece}, **extra))
                    extra = {}
                else:
                    calls[choice.index] += 1
                    sender.event(chunk(choice, {"tool_calls": [{"index": calls[choice.index] - 1, **piece}]}))
            if last:
                open_choices.remove(choice.index)
                more = {} if open_choices else {"timings": answers.timings()}
                sender.event(chunk(choice, {}, finish_reason=finish_reason(choice, reader.n_calls > 0), **more))

        try:
            for choice in answers.choices:
                sender.event(chunk(choice, {"role": "assistant", "content": "", "refusal": None}))
            await sender.flush()
            async for batch in answers.batches():
                for choice, event in batch:
                    write(choice, event)
                await sender.flush()
            record(service, answers)
            if usage:
                sender.event({**head, "choices": [], "usage": answers.usage(), "timings": answers.timings()})
            sender.done()
        finally:
            answers.close()

    return EventStream(produce)


def record(service: Service, answers: Answers) -> None:
    """Put finished answers into the metrics."""
    now = time.perf_counter()
    for choice in answers.choices:
        first = None if answers.first is None else answers.first - answers.started
        service.metrics.done(choice.finish_reason or "cancelled", first, now - answers.started, len(choice.events))


def _logprobs(service: Service, events: list[TokenEvent]) -> dict[str, Any]:
    return {
        "content": [
            part(
                {
                    **_one(service, event.token_id, event.logprob),
                    "top_logprobs": [_one(service, token, logprob) for token, logprob in event.top_logprobs],
                }
            )
            for event in events
        ],
        "refusal": None,
    }


def _one(service: Service, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": service.token_text(token_id),
        "logprob": max(logprob, -9999.0),
        "bytes": service.token_bytes(token_id),
    }


def _new_id() -> str:
    return f"chatcmpl-{secrets.token_hex(12)}"
