"""POST /v1/completions: continue texts or token ids, with the prompt's own log-probabilities on request."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.responses import Response

from quadriga.engine.request import TokenEvent
from quadriga.server.answers import Answers, Choice
from quadriga.server.caller import Caller
from quadriga.server.chat import record
from quadriga.server.errors import ApiError
from quadriga.server.schema import MAX_CHOICES, CompletionRequest
from quadriga.server.service import Service
from quadriga.server.sse import EventSender, EventStream, TextEvent, json_response, part
from quadriga.text.infill import marks_of
from quadriga.text.stream import Offsets

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


def prompts_of(
    service: Service, given: Any, param: str, *, parse_special: bool = False, add_special: bool = True
) -> list[list[int]]:
    """A prompt field as checked token ids: one text, texts, one list of ids, or lists of ids.

    With ``parse_special`` names of special tokens in texts are those tokens; without ``add_special`` none is put before
    a text.

    Raises:
        ApiError: nothing, or too many; ids outside the vocabulary are the engine's to refuse.
        RequestError: a prompt that exceeds the context, which is known of most long texts before they are encoded.
    """
    kinds = {type(item) for item in given} if isinstance(given, list) else set()
    if len(kinds) > 1:
        raise ApiError(400, f"{param} mixes texts and token ids", param=param)
    many = given if isinstance(given, list) and kinds != {int} else [given]
    if not 1 <= len(many) <= MAX_CHOICES:
        raise ApiError(400, f"{param} takes 1 to {MAX_CHOICES} prompts, got {len(many)}", param=param)
    return [service.llm.prompt_ids(prompt, parse_special=parse_special, add_special=add_special) for prompt in many]


def infilled(service: Service, before: str, after: str, begun: str = "") -> list[int]:
    """Token ids of a prompt for what is missing between two texts.

    Args:
        begun: how what is missing begins.

    Raises:
        ApiError: 400, the vocabulary has no marks for it.
        RequestError: it exceeds the context.
    """
    marks = marks_of(service.llm._need_tokenizer())
    if marks is None:
        raise ApiError(400, "this model's vocabulary has no tokens for filling in the middle", param="suffix")
    for text in (before, after, begun):
        service.llm.check_length(text)
    return list(service.llm.prompt_ids(marks.prompt(service.llm._need_tokenizer(), before, after, begun)))


async def start(service: Service, body: CompletionRequest, caller: Caller) -> tuple[Answers, list[list[int]]]:
    """Check a completion request and put it into the engine."""
    service.check_model(body.model)
    if body.logprobs is not None and not 0 <= body.logprobs <= 20:
        raise ApiError(400, f"logprobs must be from 0 to 20, got {body.logprobs}", param="logprobs")
    if body.stream and body.echo and body.logprobs is not None:
        raise ApiError(400, "echo with logprobs comes as one answer: leave stream out", param="stream")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is for streams", param="stream_options")
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == -1:
        max_tokens = service.llm.config.max_seq_len
    if max_tokens < 0 or (max_tokens == 0 and not body.echo):
        raise ApiError(400, "max_tokens must be at least 1, 0 with echo, or -1 for no limit", param="max_tokens")
    # One token is always made; with max_tokens=0 it is not shown.
    params = await service.work.check(
        caller.n_bytes, lambda: service.params(body, max_tokens=max(1, max_tokens), logprobs=body.logprobs or 0)
    )
    if body.echo and body.logprobs is not None:
        params = replace(params, prompt_logprobs=True)
    if body.suffix:
        if not isinstance(body.prompt, str) or body.echo:
            raise ApiError(400, "suffix takes one text as prompt, and no echo", param="suffix")
        prompts = [await service.work.encode(caller.n_bytes, infilled, service, body.prompt, body.suffix)]
    else:
        read = partial(prompts_of, parse_special=body.parse_special, add_special=body.add_special_tokens)
        prompts = await service.work.encode(caller.n_bytes, read, service, body.prompt, "prompt")
    return await service.run(
        prompts, params, body, caller, constraint=service.constraint(body.response_format)
    ), prompts


async def complete(service: Service, body: CompletionRequest, caller: Caller) -> Response:
    """All answers as one JSON object."""
    answers, prompts = await start(service, body, caller)
    await answers.collect()
    record(service, answers)
    echoes = [await _decode(service, prompt) if body.echo else "" for prompt in prompts]
    size = answers.n_bytes((0 if body.logprobs is None else 1 + body.logprobs) + 8 * body.routing)
    return await service.work.write(size, _whole, service, body, answers, prompts, echoes)


def _whole(
    service: Service, body: CompletionRequest, answers: Answers, prompts: list[list[int]], echoes: list[str]
) -> Response:
    n = body.n or 1
    choices = []
    for choice in answers.choices:
        prompt = prompts[choice.index // n]
        if body.max_tokens == 0:
            choice.events, choice.finish_reason = [], "length"
        shown: dict[str, Any] = {
            "index": choice.index,
            "text": echoes[choice.index // n] + choice.text,
            "logprobs": None if body.logprobs is None else _logprobs(service, choice, prompt, echo=bool(body.echo)),
            "finish_reason": choice.finish_reason,
        }
        if body.routing:
            shown["routing"] = [r for event in choice.events for r in service.routing(event)]
        choices.append(part(shown))
    head = {"id": _new_id(), "object": "text_completion", "created": int(time.time())}
    head["model"] = service.shown_name(body.model)
    return json_response({**head, "choices": choices, "usage": answers.usage(), "timings": answers.timings()})


async def stream(service: Service, body: CompletionRequest, caller: Caller) -> Response:
    """The answers as they come."""
    answers, prompts = await start(service, body, caller)
    head = {"id": _new_id(), "object": "text_completion", "created": int(time.time())}
    head["model"] = service.shown_name(body.model)
    usage = body.stream_options is not None and body.stream_options.include_usage
    with_usage: dict[str, Any] = {"usage": None} if usage else {}
    n = body.n or 1

    async def produce(sender: EventSender) -> None:
        def chunk(choice: Choice, text: str, **more: Any) -> dict[str, Any]:
            one = {"index": choice.index, "text": text, "logprobs": more.pop("logprobs", None)}
            one["finish_reason"] = more.pop("finish_reason", None)
            return {**head, "choices": [one], **with_usage, **more}

        plain = [TextEvent(partial(chunk, choice)) for choice in answers.choices]
        offsets: dict[int, Offsets] = {}

        def write(choice: Choice, event: TokenEvent) -> None:
            if body.logprobs is None and not body.routing and event.finish_reason is None:
                if event.text:
                    sender.raw(plain[choice.index].with_text(event.text))
                return
            extra: dict[str, Any] = {"finish_reason": event.finish_reason}
            if body.logprobs is not None:
                if choice.index not in offsets:
                    offsets[choice.index] = _offsets(service, prompts[choice.index // n])
                one = replace(choice, events=[event])
                extra["logprobs"] = _logprobs(service, one, [], offsets=offsets[choice.index])
            if body.routing:
                extra["routing"] = service.routing(event)
            if event.text or len(extra) > 1 or event.finish_reason:
                sender.event(chunk(choice, "" if body.max_tokens == 0 else event.text, **extra))

        try:
            if body.echo:
                echoes = [await _decode(service, prompt) for prompt in prompts]
                for choice in answers.choices:
                    sender.event(chunk(choice, echoes[choice.index // n]))
            await sender.flush()
            await answers.send(sender, write)
            record(service, answers)
            if usage:
                sender.event({**head, "choices": [], "usage": answers.usage(), "timings": answers.timings()})
            sender.done()
        finally:
            answers.close()

    return EventStream(produce)


def stop_hit(service: Service, choice: Choice, stops: Sequence[str]) -> str | None:
    """Which of the stop strings ended an answer; None where none did."""
    ids = [event.token_id for event in choice.events]
    if not stops or not ids or choice.finish_reason != "stop" or ids[-1] in service.llm.end_ids:
        return None
    raw = service.llm._need_tokenizer().decode(ids)
    return min(((raw.find(stop), stop) for stop in stops if stop in raw), default=(0, None))[1]


async def _decode(service: Service, ids: list[int]) -> str:
    """A prompt as text. Ids that no token has are allowed in one, the model has rows for them, and add no text."""
    tokenizer = service.llm.tokenizer
    if tokenizer is None:
        return ""
    return await asyncio.to_thread(tokenizer.decode, [i for i in ids if tokenizer.is_token(i)])


def _offsets(service: Service, after: list[int]) -> Offsets:
    assert service.llm.tokenizer is not None, "text is asked for"
    return Offsets(service.llm.tokenizer, after=after)


def _logprobs(
    service: Service, choice: Choice, prompt: list[int], *, echo: bool = False, offsets: Offsets | None = None
) -> dict[str, Any]:
    """OpenAI's four lists. The first token of an echoed prompt has no log-probability.

    ``text_offset`` counts characters of the text that is returned, which is not the sum of the tokens': special tokens
    are not in it, and a first word may begin without the space of its token.
    """
    offsets = offsets or _offsets(service, [] if echo else prompt)
    prompt = prompt if echo else []
    ids, own = list(prompt), [None, *(choice.prompt.logprobs if choice.prompt else ())][: len(prompt)]
    top: list[Any] = [None, *(choice.prompt.top_logprobs if choice.prompt else ())][: len(prompt)]
    ids += [event.token_id for event in choice.events]
    own += [event.logprob for event in choice.events]
    top += [event.top_logprobs for event in choice.events]
    tokens = [service.token_text(token) for token in ids]
    shown = [
        None if pairs is None else part({service.token_text(t): max(p, -9999.0) for t, p in pairs}) for pairs in top
    ]
    return {
        "tokens": tokens,
        "token_logprobs": [None if p is None else max(p, -9999.0) for p in own],
        "top_logprobs": shown,
        "text_offset": [offsets.push(token) for token in ids],
    }


def _new_id() -> str:
    return f"cmpl-{secrets.token_hex(12)}"
