"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.responses import Response

from quadriga.engine.request import TokenEvent
from quadriga.server.answers import Answers, Choice
from quadriga.server.caller import Caller
from quadriga.server.errors import ApiError
from quadriga.server.schema import INLINE_BYTES, ChatRequest
from quadriga.server.service import Service
from quadriga.server.sse import EventSender, EventStream, TextEvent, json_response, part
from quadriga.server.tools import Reading, ToolUse
from quadriga.server.tools import reader as reader_of
from quadriga.text.chat import RenderedPrompt, render, render_soon
from quadriga.text.reasoning import Thought, inside
from quadriga.text.template_abilities import Abilities
from quadriga.text.tool_calls.early import CallPart
from quadriga.text.tool_calls.forms import HARMONY, Form, form_of

MAX_MESSAGES = 10_000
FINAL = "<|channel|>final<|message|>"
"""What begins an answer of gpt-oss that is no thought."""


async def start(service: Service, body: ChatRequest, caller: Caller) -> tuple[Answers, Reading]:
    """Check a chat request and put it into the engine.

    Returns:
        (the answers, how they are read).

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
    constraint = service.constraint(body.response_format)
    able = await service.abilities()
    tools, turns = await service.work.check(caller.n_bytes, _turns, body, able, service.tool_form)
    if tools.forced:  # no text comes beside calls, so there is none for a response_format to be about
        constraint = ("json", tools.schema())
    prompt = await rendered(
        service, turns, caller, tools=tools.shown, check=service.llm.check_length, **how_rendered(body)
    )
    reading, opening = how_read(service, tools, able, prompt.text, constrained=constraint is not None)
    ids = prompt.ids
    if opening:
        ids = [*ids, *service.llm._need_tokenizer().encode(opening, allow_special=True)]
    given = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if given is not None and given < 1 and given != -1:
        raise ApiError(400, f"max_tokens must be at least 1, or -1 for no limit; got {given}", param="max_tokens")
    limit = service.llm.config.max_seq_len if given in (None, -1) else given
    params = await service.work.check(
        caller.n_bytes, lambda: service.params(body, max_tokens=limit, logprobs=body.top_logprobs or 0)
    )
    params = service.llm.chat_params(params)
    answers = await service.run(
        [ids], params, body, caller, constraint=constraint, closes=tools.forced, shown=reading.marks
    )
    return answers, reading


def how_read(
    service: Service, tools: ToolUse, able: Abilities, prompt: str, *, constrained: bool
) -> tuple[Reading, str]:
    """How an answer is read, and what is put behind the prompt.

    What a grammar leads is the answer itself: it has no room for thoughts, so an open one is closed before.
    """
    form = service.tool_form or form_of(able.source)
    if form is HARMONY:
        return (Reading(tools.reads), FINAL) if constrained else (Reading(tools.reads, channels=True), "")
    thinks = able.thinks if service.reasoning else None
    opened = inside(prompt, thinks)
    if opened and constrained and thinks is not None:
        return Reading(tools.reads, thinks), f"{thinks[1]}\n\n"
    return Reading(tools.reads, thinks, opened=opened), ""


def how_rendered(body: ChatRequest) -> dict[str, Any]:
    """A request's wishes about the template, as :func:`text.chat.render` takes them.

    An assistant's message at the end is continued, unless it is asked to be answered.

    Raises:
        ApiError: they contradict each other.
    """
    last = body.messages[-1]
    open_end = last.role == "assistant" and not last.tool_calls and bool(last.content)
    wanted = body.continue_final_message
    if wanted and body.add_generation_prompt:
        reason = "continue_final_message and add_generation_prompt ask for different things; give one"
        raise ApiError(400, reason, param="continue_final_message")
    if wanted and not open_end:
        reason = "continue_final_message needs a last message of the assistant, with content and without calls"
        raise ApiError(400, reason, param="continue_final_message")
    goes_on = open_end and wanted is not False and not body.add_generation_prompt
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
        if body.reasoning_effort == "none":
            variables.setdefault("enable_thinking", False)
    return {
        "add_generation_prompt": body.add_generation_prompt is not False and not goes_on,
        "continue_final": goes_on,
        "variables": variables or None,
    }


def check_count(service: Service, n_messages: int) -> None:
    """Refuse a conversation of no messages, or of so many that no context holds them.

    Raises:
        ApiError: 400 that names the bound.
    """
    most = min(MAX_MESSAGES, service.llm.config.max_seq_len)
    if not 1 <= n_messages <= most:
        raise ApiError(400, f"messages must be 1 to {most}, got {n_messages}", param="messages")


def _turns(body: ChatRequest, able: Abilities, form: Form | None) -> tuple[ToolUse, list[dict[str, Any]]]:
    tools = ToolUse(body, able, form)
    return tools, tools.turns(body.messages)


async def rendered(service: Service, turns: list[dict[str, Any]], caller: Caller, **options: Any) -> RenderedPrompt:
    """A conversation as the model reads it: on the threads for templates, a large one on those for large bodies.

    Args:
        options: see ``text.chat.render``.
    """
    tokenizer = service.llm._need_tokenizer()
    if caller.n_bytes <= INLINE_BYTES:
        return await render_soon(turns, tokenizer, **options)
    return await service.work.encode(caller.n_bytes, lambda: render(turns, tokenizer, **options))


def finish_reason(choice: Choice, called: bool) -> str:
    """Why an answer ended, in OpenAI's words."""
    return "tool_calls" if called and choice.finish_reason == "stop" else choice.finish_reason or "stop"


async def complete(service: Service, body: ChatRequest, caller: Caller) -> Response:
    """The whole answer as one JSON object."""
    answers, reading = await start(service, body, caller)
    await answers.collect()
    record(service, answers)
    size = answers.n_bytes((1 + (body.top_logprobs or 0) if body.logprobs else 0) + 8 * body.routing)
    return await service.work.write(size, _whole, service, body, answers, reading)


def _whole(service: Service, body: ChatRequest, answers: Answers, reading: Reading) -> Response:
    choices = []
    for choice in answers.choices:
        answer = reading.read(choice.text, cut=choice.finish_reason == "length")
        message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None, "annotations": []}
        if answer.thought is not None:
            message["reasoning_content"] = answer.thought
        if answer.calls:
            message["tool_calls"] = answer.calls
        shown: dict[str, Any] = {
            "index": choice.index,
            "message": message,
            "logprobs": logprobs_of(service, choice.events) if body.logprobs else None,
            "finish_reason": finish_reason(choice, bool(answer.calls)),
        }
        if body.routing:
            shown["routing"] = [r for event in choice.events for r in service.routing(event)]
        choices.append(part(shown))
    head = {"id": _new_id(), "object": "chat.completion", "created": int(time.time())}
    head["model"] = service.shown_name(body.model)
    return json_response({**head, "choices": choices, "usage": answers.usage(), "timings": answers.timings()})


async def stream(service: Service, body: ChatRequest, caller: Caller) -> Response:
    """The answer as it comes."""
    answers, reading = await start(service, body, caller)
    head = {"id": _new_id(), "object": "chat.completion.chunk", "created": int(time.time())}
    head["model"] = service.shown_name(body.model)
    usage = body.stream_options is not None and body.stream_options.include_usage
    with_usage: dict[str, Any] = {"usage": None} if usage else {}
    readers = [reader_of(reading, streams=True) for _ in answers.choices]
    calls = [0 for _ in answers.choices]
    open_choices = set(range(len(answers.choices)))

    async def produce(sender: EventSender) -> None:
        def chunk(choice: Choice, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
            one = {"index": choice.index, "delta": delta, "logprobs": more.pop("logprobs", None)}
            one["finish_reason"] = more.pop("finish_reason", None)
            return {**head, "choices": [one], **with_usage, **more}

        plain = [TextEvent(partial(_said, chunk, choice)) for choice in answers.choices]

        def write(choice: Choice, event: TokenEvent) -> None:
            extra: dict[str, Any] = {"logprobs": logprobs_of(service, [event])} if body.logprobs else {}
            if body.routing:
                extra["routing"] = service.routing(event)
            reader, last = readers[choice.index], event.finish_reason is not None
            pieces = reader.push(event.text, last=last, cut=event.finish_reason == "length")
            if extra and not (pieces and isinstance(pieces[0], str)):
                sender.event(chunk(choice, {}, **extra))
                extra = {}
            for piece in pieces:
                if isinstance(piece, str) and not extra:
                    sender.raw(plain[choice.index].with_text(piece))
                elif isinstance(piece, str):
                    sender.event(_said(chunk, choice, piece, **extra))
                    extra = {}
                elif isinstance(piece, Thought):
                    sender.event(chunk(choice, {"reasoning_content": piece.text}))
                else:
                    calls[choice.index] += not isinstance(piece, CallPart) or bool(piece.name)
                    shown = _call_delta(piece) if isinstance(piece, CallPart) else piece
                    sender.event(chunk(choice, {"tool_calls": [{"index": calls[choice.index] - 1, **shown}]}))
            if last:
                open_choices.remove(choice.index)
                more = {} if open_choices else {"timings": answers.timings()}
                sender.event(chunk(choice, {}, finish_reason=finish_reason(choice, reader.n_calls > 0), **more))

        try:
            for choice in answers.choices:
                sender.event(chunk(choice, {"role": "assistant", "content": "", "refusal": None}))
            await sender.flush()
            await answers.send(sender, write)
            record(service, answers)
            if usage:
                sender.event({**head, "choices": [], "usage": answers.usage(), "timings": answers.timings()})
            sender.done()
        finally:
            answers.close()

    return EventStream(produce)


def _said(chunk: Callable[..., dict[str, Any]], choice: Choice, piece: str, **more: Any) -> dict[str, Any]:
    """The chunk of some words."""
    return chunk(choice, {"content": piece}, **more)


def _call_delta(part: CallPart) -> dict[str, Any]:
    """A piece of a call as OpenAI writes it."""
    function = {"arguments": part.arguments}
    return (
        {"id": part.id, "type": "function", "function": {"name": part.name, **function}}
        if part.name
        else {"function": function}
    )


def record(service: Service, answers: Answers) -> None:
    """Put finished answers into the metrics."""
    now = time.perf_counter()
    for choice in answers.choices:
        first = None if answers.first is None else answers.first - answers.started
        service.metrics.done(choice.finish_reason or "cancelled", first, now - answers.started, len(choice.events))


def logprobs_of(service: Service, events: list[TokenEvent]) -> dict[str, Any]:
    """The log-probabilities of an answer's tokens, as OpenAI writes them."""
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
