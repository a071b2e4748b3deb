"""llama.cpp's own routes, for programs that speak nothing else: /completion, /infill, /props, /slots.

Requests become those of ``completions``; defaults are llama.cpp's (temperature 0.8, top_k 40, top_p 0.95,
min_p 0.05). The routes of the same name under /v1 are OpenAI's.
"""

from __future__ import annotations

import functools
from typing import Any

from msgspec import Struct
from starlette.responses import Response

from quadriga import __version__
from quadriga.engine.request import TokenEvent
from quadriga.server import chat, completions
from quadriga.server.errors import ApiError
from quadriga.server.schema import CompletionRequest, JsonSchema, ResponseFormat
from quadriga.server.service import Answers, Caller, Choice, Service
from quadriga.server.sse import EventSender, EventStream, json_response
from quadriga.text.infill import marks_of

MAX_PROBS = 20
SNIPPET = "\n\n--- snippet ---\n\n"
"""What llama.cpp puts between pieces of other files, where a vocabulary has no token for it."""


class Extra(Struct, kw_only=True, forbid_unknown_fields=True):
    """A piece of another file."""

    text: str
    filename: str | None = None


class LlamaRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields that /completion and /infill share."""

    prompt: str | list[str | int] | None = None
    model: str | None = None
    n_predict: int = -1
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = -1
    stop: str | list[str] | None = None
    stream: bool = False
    ignore_eos: bool = False
    logit_bias: dict[str, float] | list[tuple[int, float]] | None = None
    n_probs: int = 0
    json_schema: dict[str, Any] | None = None
    return_tokens: bool = False
    priority: int = 0


class LlamaCompletion(LlamaRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /completion."""


class LlamaInfill(LlamaRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /infill: what is missing between two texts; ``prompt`` is how it begins."""

    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: list[Extra] | None = None


async def _start(service: Service, body: LlamaRequest, caller: Caller) -> tuple[Answers, int]:
    """(the answer, tokens of the prompt)."""
    if not 0 <= body.n_probs <= MAX_PROBS:
        raise ApiError(400, f"n_probs must be from 0 to {MAX_PROBS}, got {body.n_probs}", param="n_probs")
    if body.n_predict < -1 or body.n_predict == 0:
        message = f"n_predict must be at least 1, or -1 for no limit; got {body.n_predict}"
        raise ApiError(400, message, param="n_predict")
    if isinstance(body, LlamaInfill):
        if body.prompt is not None and not isinstance(body.prompt, str):
            raise ApiError(400, "prompt is a text here: how the answer begins", param="prompt")
        extra = "".join(f"{SNIPPET}{one.text}" for one in body.input_extra or ())
        before = f"{extra}\n\n{body.input_prefix}" if extra else body.input_prefix
        read = functools.partial(completions.infilled, service, before, body.input_suffix, body.prompt or "")
    else:
        read = functools.partial(_prompt_ids, service, body.prompt)
    prompt = await service.work.encode(caller.n_bytes, read)
    bias = body.logit_bias
    form = None
    if body.json_schema is not None:
        form = ResponseFormat(type="json_schema", json_schema=JsonSchema(name="answer", schema=body.json_schema))
    request = CompletionRequest(
        prompt=list(prompt),
        model=body.model,
        max_tokens=body.n_predict,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repeat_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        seed=body.seed,
        stop=body.stop,
        ignore_eos=body.ignore_eos,
        logit_bias={str(token): value for token, value in bias} if isinstance(bias, list) else bias,
        logprobs=body.n_probs,
        response_format=form,
        priority=body.priority,
    )
    answers, _ = await completions.start(service, request, caller)
    return answers, len(prompt)


def _prompt_ids(service: Service, given: str | list[str | int] | None) -> list[int]:
    """One prompt: a text, token ids, or both mixed."""
    if given is None or given == [] or given == "":
        raise ApiError(400, "prompt is a text, token ids, or both mixed in a list", param="prompt")
    if not isinstance(given, list):
        return service.llm.prompt_ids(given)
    if len(given) > 1 and all(isinstance(part, str) for part in given):
        raise ApiError(400, "one prompt a request: several texts go to /v1/completions", param="prompt")
    ids: list[int] = []
    for i, part in enumerate(given):
        ids += [part] if isinstance(part, int) else service.llm.prompt_ids(part, add_special=i == 0)
    return service.llm.prompt_ids(ids)


async def answer(service: Service, body: LlamaRequest, caller: Caller) -> Response:
    """POST /completion and /infill."""
    service.check_model(body.model)
    answers, n_prompt = await _start(service, body, caller)
    if not body.stream:
        await answers.collect()
        chat.record(service, answers)
        choice = answers.choices[0]
        whole = {"content": choice.text, **_tokens(body, choice.events)}
        return json_response(
            {**whole, **_probs(service, body, choice.events), **_end(service, body, answers, n_prompt)}
        )

    async def produce(sender: EventSender) -> None:
        n_made = 0
        try:
            async for batch in answers.batches():
                for _, event in batch:
                    n_made += 1
                    shown = {"index": 0, "content": event.text, "tokens": [event.token_id], "stop": False}
                    shown |= {"id_slot": -1, "tokens_predicted": n_made, "tokens_evaluated": n_prompt}
                    sender.event({**shown, **_probs(service, body, [event])})
                await sender.flush()
            chat.record(service, answers)
            sender.event({"content": "", "tokens": [], **_end(service, body, answers, n_prompt)})
        finally:
            answers.close()

    return EventStream(produce)


def _tokens(body: LlamaRequest, events: list[TokenEvent]) -> dict[str, Any]:
    return {"tokens": [event.token_id for event in events] if body.return_tokens else []}


def _probs(service: Service, body: LlamaRequest, events: list[TokenEvent]) -> dict[str, Any]:
    return {"completion_probabilities": chat.logprobs_of(service, events)["content"]} if body.n_probs else {}


def _end(service: Service, body: LlamaRequest, answers: Answers, n_prompt: int) -> dict[str, Any]:
    """What is known when it is over."""
    choice: Choice = answers.choices[0]
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    word = completions.stop_hit(service, choice, stops)
    kind = "limit" if choice.finish_reason == "length" else "eos" if word is None else "word"
    return {
        "index": 0,
        "id_slot": -1,
        "stop": True,
        "model": service.shown_name(body.model),
        "tokens_predicted": answers.n_made,
        "tokens_evaluated": n_prompt,
        "tokens_cached": answers.usage()["prompt_tokens_details"]["cached_tokens"],
        "truncated": False,
        "stop_type": kind,
        "stopping_word": word or "",
        "generation_settings": _settings(body),
        "timings": answers.timings(),
    }


def _settings(body: LlamaRequest) -> dict[str, Any]:
    names = ("n_predict", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty")
    return {name: getattr(body, name) for name in (*names, "frequency_penalty", "seed", "ignore_eos", "stream")}


def props(service: Service) -> Response:
    """GET /props. The model's name, not its path: that is nobody's business."""
    tokenizer, config, ends = service.llm.tokenizer, service.llm.config, sorted(service.llm.end_ids)

    def named(token: int | None) -> str:
        return tokenizer.token_text(token) if tokenizer is not None and token is not None else ""

    return json_response(
        {
            "default_generation_settings": {"n_ctx": config.max_seq_len, "params": _settings(LlamaCompletion())},
            "total_slots": service.llm.engine.max_sequences,
            "model_alias": service.name,
            "model_path": service.name,
            "chat_template": (tokenizer.chat_template if tokenizer is not None else None) or "",
            "bos_token": named(tokenizer.bos_id if tokenizer is not None else None),
            "eos_token": named(next(iter((*(tokenizer.eos_ids if tokenizer else ()), *ends)), None)),
            "modalities": {"vision": False, "audio": False},
            "infill": tokenizer is not None and marks_of(tokenizer) is not None,
            "build_info": f"quadriga {__version__}",
        }
    )


def slots(service: Service) -> Response:
    """GET /slots: as many as answers are computed at once, those in use first. What is in them is their clients'."""
    n, n_ctx = service.llm.engine.max_sequences, service.llm.config.max_seq_len
    n_busy = min(n, service.llm.engine.stats().n_running)
    return json_response([{"id": i, "n_ctx": n_ctx, "is_processing": i < n_busy} for i in range(n)])
