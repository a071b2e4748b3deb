"""Ollama's answers: POST /api/chat, generate, embed, embeddings. What it says of models is in ``ollama_models``.

A request becomes a chat request or a completion request; answers come as JSON lines, by default streamed.
Facts: github.com/ollama/ollama, docs/api.md, as of version 0.13.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

from msgspec import Struct
from starlette.responses import Response

from quadriga.engine.request import TokenEvent
from quadriga.server import chat, completions, text_routes
from quadriga.server.answers import Answers, Choice
from quadriga.server.caller import Caller
from quadriga.server.errors import ApiError
from quadriga.server.fleet import plain_name
from quadriga.server.llamacpp import stops_of
from quadriga.server.schema import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    FunctionCall,
    JsonSchema,
    Message,
    Prompts,
    ResponseFormat,
    Sampling,
    Tool,
    ToolCall,
)
from quadriga.server.service import Service
from quadriga.server.sse import EventSender, EventStream, json_response, part
from quadriga.server.tools import Reading
from quadriga.server.tools import reader as reader_of
from quadriga.text.reasoning import Thought
from quadriga.text.tool_calls.early import CallPart

KINDS = ("application/x-www-form-urlencoded", "")
"""Content types that are read as JSON too."""


class Options(Struct, kw_only=True, forbid_unknown_fields=True):
    """How tokens are chosen. The defaults are Ollama's."""

    num_predict: int | None = None
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.9
    min_p: float | None = None
    typical_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class OllamaFunction(Struct, kw_only=True, forbid_unknown_fields=True):
    """A call's function; its arguments are an object."""

    name: str
    arguments: dict[str, Any]


class OllamaCall(Struct, kw_only=True, forbid_unknown_fields=True):
    """A call the assistant made."""

    function: OllamaFunction
    id: str | None = None


class OllamaMessage(Struct, kw_only=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: list[str] | None = None


class Asked(Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields that chat and generate share."""

    model: str
    stream: bool = True
    format: str | dict[str, Any] | None = None
    options: Options | None = None
    think: bool | str | None = None
    keep_alive: float | str | None = None


class OllamaChat(Asked, kw_only=True, forbid_unknown_fields=True):
    """POST /api/chat."""

    TOOL_KINDS: ClassVar[frozenset[str | None]] = frozenset({"function"})

    messages: list[OllamaMessage] = []
    tools: list[Tool] | None = None


class OllamaGenerate(Asked, kw_only=True, forbid_unknown_fields=True):
    """POST /api/generate."""

    prompt: str = ""
    system: str | None = None
    raw: bool = False
    images: list[str] | None = None
    suffix: str | None = None
    template: str | None = None


class OllamaEmbed(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /api/embed."""

    model: str
    input: Prompts
    dimensions: int | None = None
    truncate: bool = True
    """Cut what exceeds the context, instead of refusing it."""
    keep_alive: float | str | None = None


class OllamaEmbeddings(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /api/embeddings, the older one."""

    model: str
    prompt: str
    keep_alive: float | str | None = None


class Lines(EventStream):
    """A stream of JSON lines."""

    media_type = "application/x-ndjson"
    pings = False

    def _fail(self, sender: EventSender, shown: ApiError) -> None:
        line(sender, {"error": str(shown)})


def line(sender: EventSender, body: dict[str, Any]) -> None:
    """One line."""
    sender.raw(bytes(part(body)) + b"\n")


def known(service: Service, name: str | None) -> str:
    """A model's name as the service knows it: Ollama's clients may write NAME:latest.

    Raises:
        ApiError: 404.
    """
    plain = plain_name(name)
    if not plain:
        raise ApiError(400, "a request needs the name of a model", param="model")
    service.check_model(plain)
    return plain


def as_chat(service: Service, body: OllamaChat | OllamaGenerate) -> ChatRequest:
    """The same question as a chat request.

    Raises:
        ApiError: pictures, or another template.
    """
    if isinstance(body, OllamaGenerate):
        if body.suffix or body.template:
            what = "suffix" if body.suffix else "template"
            raise ApiError(400, f"{what} is not supported: give raw and a prompt that is complete", param=what)
        turns = [OllamaMessage(role="user", content=body.prompt, images=body.images)]
        if body.system:
            turns.insert(0, OllamaMessage(role="system", content=body.system))
        tools = None
    else:
        turns, tools = body.messages, body.tools
    if any(turn.images for turn in turns):
        raise ApiError(400, "images are not supported: this model reads text", param="images")
    request = ChatRequest(model=known(service, body.model), messages=[_turn(t, i) for i, t in enumerate(turns)])
    request.tools, request.response_format = tools, form_of(body.format)
    if isinstance(body.think, str):
        request.reasoning_effort = body.think
    elif body.think is not None:
        request.chat_template_kwargs = {"enable_thinking": body.think}
    return _sampled(request, body.options)


def _turn(turn: OllamaMessage, index: int) -> Message:
    calls = [
        ToolCall(
            id=c.id or f"call_{index}_{i}", function=FunctionCall(name=c.function.name, arguments=c.function.arguments)
        )
        for i, c in enumerate(turn.tool_calls or [])
    ]
    return Message(
        role=turn.role,
        content=turn.content,
        name=turn.tool_name,
        tool_calls=calls or None,
        tool_call_id=turn.tool_call_id or (f"call_{index - 1}_0" if turn.role == "tool" else None),
        reasoning_content=turn.thinking,
    )


def form_of(given: str | dict[str, Any] | None) -> ResponseFormat | None:
    """Ollama's format ("json" or a JSON schema) as a response format.

    Raises:
        ApiError: something else.
    """
    if not given:
        return None
    if isinstance(given, dict):
        return ResponseFormat(type="json_schema", json_schema=JsonSchema(name="answer", schema=given))
    if given != "json":
        raise ApiError(400, f"format must be 'json' or a JSON schema, got {given[:80]!r}", param="format")
    return ResponseFormat(type="json_object")


S = TypeVar("S", bound=Sampling)


def _sampled(request: S, given: Options | None) -> S:
    """The request with the options as its fields have them."""
    options = given or Options()
    limit = options.num_predict
    request.max_tokens = -1 if limit is None or limit <= 0 else limit
    request.temperature, request.top_p, request.min_p = options.temperature, options.top_p, options.min_p
    request.top_k, request.typical_p = max(-1, options.top_k), options.typical_p
    request.seed, request.stop = options.seed, stops_of(options.stop) or None
    request.repetition_penalty = options.repeat_penalty
    request.presence_penalty, request.frequency_penalty = options.presence_penalty, options.frequency_penalty
    return request


async def ask(service: Service, body: OllamaChat | OllamaGenerate, caller: Caller) -> Response:
    """POST /api/chat and /api/generate."""
    is_chat = isinstance(body, OllamaChat)
    if asks_nothing(body):  # only to have the model loaded
        known(service, body.model)
        return nothing(body, "load")
    if isinstance(body, OllamaGenerate) and body.raw:
        raw = CompletionRequest(model=known(service, body.model), prompt=body.prompt, add_special_tokens=False)
        raw.response_format = form_of(body.format)
        answers, _ = await completions.start(service, _sampled(raw, body.options), caller)
        reading = Reading()
    else:
        request = await service.work.check(caller.n_bytes, as_chat, service, body)
        answers, reading = await chat.start(service, request, caller)
    said = _chat_part if is_chat else _generate_part
    if body.stream:
        return Lines(partial(_stream, service, body, answers, reading, said))
    await answers.collect()
    chat.record(service, answers)
    choice = answers.choices[0]
    answer = reading.read(choice.text, cut=choice.finish_reason == "length")
    whole = said(answer.content or "", answer.thought or "", answer.calls)
    return json_response({**_head(body), **whole, **_end(answers, bool(answer.calls))})


def asks_nothing(body: OllamaChat | OllamaGenerate) -> bool:
    """True where a model is only to be loaded, or with ``keep_alive`` 0 to be let go."""
    return not (body.messages if isinstance(body, OllamaChat) else body.prompt)


def nothing(body: OllamaChat | OllamaGenerate, reason: Literal["load", "unload"]) -> Response:
    """The answer to that."""
    is_chat = isinstance(body, OllamaChat)
    empty: dict[str, Any] = {"message": {"role": "assistant", "content": ""}} if is_chat else {"response": ""}
    return json_response({**_head(body), **empty, "done": True, "done_reason": reason})


async def _stream(
    service: Service,
    body: OllamaChat | OllamaGenerate,
    answers: Answers,
    reading: Reading,
    said: Callable[..., dict[str, Any]],
    sender: EventSender,
) -> None:
    reader = reader_of(reading)

    def write(_: Choice, event: TokenEvent) -> None:
        reason = event.finish_reason
        for piece in reader.push(event.text, last=reason is not None, cut=reason == "length"):
            if isinstance(piece, str):
                shown = said(piece, "", [])
            elif isinstance(piece, Thought):
                shown = said("", piece.text, [])
            else:
                assert not isinstance(piece, CallPart), "Ollama's calls are whole"
                shown = said("", "", [piece])
            line(sender, {**_head(body), **shown, "done": False})

    try:
        await answers.send(sender, write)
        chat.record(service, answers)
        line(sender, {**_head(body), **said("", "", []), **_end(answers, reader.n_calls > 0)})
    finally:
        answers.close()


def _head(body: Asked) -> dict[str, Any]:
    return {"model": body.model, "created_at": _now()}


def written(moment: datetime) -> str:
    """A time as Ollama writes it."""
    return moment.isoformat().replace("+00:00", "Z")


def _now() -> str:
    return written(datetime.now(UTC))


def _chat_part(words: str, thought: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": words}
    if thought:
        message["thinking"] = thought
    if calls:
        functions = [call["function"] for call in calls]
        message["tool_calls"] = [
            {"id": call["id"], "function": {"index": i, "name": f["name"], "arguments": json.loads(f["arguments"])}}
            for i, (call, f) in enumerate(zip(calls, functions, strict=True))
        ]
    return {"message": message}


def _generate_part(words: str, thought: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    assert not calls, "generate has no tools"
    return {"response": words, **({"thinking": thought} if thought else {})}


def _end(answers: Answers, called: bool) -> dict[str, Any]:
    timings, choice = answers.timings(), answers.choices[0]
    reading, making = (round(1e6 * timings[key]) for key in ("prompt_ms", "predicted_ms"))
    return {
        "done": True,
        "done_reason": "length" if choice.finish_reason == "length" and not called else "stop",
        "total_duration": reading + making,
        "load_duration": 0,
        "prompt_eval_count": timings["prompt_n"],
        "prompt_eval_duration": reading,
        "eval_count": timings["predicted_n"],
        "eval_duration": making,
    }


async def embed(service: Service, body: OllamaEmbed, caller: Caller) -> Response:
    """POST /api/embed."""
    if not body.input:  # only to have the model loaded
        known(service, body.model)
        return json_response({"model": body.model, "embeddings": []})
    given = await _cut(service, body.input, caller) if body.truncate else body.input
    vectors, n, seconds = await _vectors(service, body.model, given, body.dimensions, caller)
    spent = {"total_duration": round(1e9 * seconds), "load_duration": 0, "prompt_eval_count": n}
    return json_response({"model": body.model, "embeddings": vectors, **spent})


async def embeddings(service: Service, body: OllamaEmbeddings, caller: Caller) -> Response:
    """POST /api/embeddings."""
    if not body.prompt:
        known(service, body.model)
        return json_response({"embedding": []})
    vectors, _, _ = await _vectors(service, body.model, await _cut(service, body.prompt, caller), None, caller)
    return json_response({"embedding": vectors[0]})


_LONG_TOKEN = 32
"""Characters of a token, on average, at the most: of a text that is cut, no more for each is encoded."""


async def _cut(service: Service, given: Prompts, caller: Caller) -> Prompts:
    """Texts of which one exceeds the context as the tokens of their beginnings; all others as they are."""
    tokenizer, most = service.llm.tokenizer, service.llm.config.max_seq_len
    texts = [given] if isinstance(given, str) else [one for one in given if isinstance(one, str)]
    if max(map(len, texts), default=0) <= most or (isinstance(given, list) and len(texts) < len(given)):
        return given  # no token is empty

    def cut() -> Prompts:
        assert tokenizer is not None, "a model that is served has a vocabulary"
        return [tokenizer.encode_prompt(text[: most * _LONG_TOKEN])[:most] for text in texts]

    return await service.work.encode(caller.n_bytes, cut)


async def _vectors(
    service: Service, model: str, given: Prompts, dimensions: int | None, caller: Caller
) -> tuple[list[Any], int, float]:
    began = time.perf_counter()
    request = EmbeddingRequest(model=known(service, model), input=given, dimensions=dimensions)
    vectors, n = await text_routes.vectors(service, request, caller)
    seconds = time.perf_counter() - began
    return await text_routes.written(service, vectors), n, seconds
