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
from quadriga.server.answers import Answers, Choice
from quadriga.server.caller import Caller
from quadriga.server.errors import ApiError
from quadriga.server.schema import CompletionRequest, JsonSchema, ResponseFormat
from quadriga.server.service import Service
from quadriga.server.sse import EventSender, EventStream, json_response, part
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

    prompt: str | list[str | int | list[int]] | None = None
    model: str | None = None
    n_predict: int = -1
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: list[str] | None = None
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
    response_fields: list[str] | None = None
    """Names of what the answer should have, levels with / between; all where there are none."""
    priority: int = 0


class LlamaCompletion(LlamaRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /completion."""


class LlamaInfill(LlamaRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /infill: what is missing between two texts; ``prompt`` is how it begins."""

    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: list[Extra] | None = None


async def _start(service: Service, body: LlamaRequest, caller: Caller) -> tuple[Answers, list[list[int]]]:
    """(the answers, their prompts)."""
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
        filled = functools.partial(completions.infilled, service, before, body.input_suffix, body.prompt or "")
        prompts = [await service.work.encode(caller.n_bytes, filled)]
    else:
        prompts = await service.work.encode(caller.n_bytes, _prompts, service, body.prompt)
    if body.stream and len(prompts) > 1:
        raise ApiError(400, "a stream is of one prompt", param="stream")
    request = _as_completion(body, prompts)
    answers, _ = await completions.start(service, request, caller)
    return answers, prompts


def _as_completion(body: LlamaRequest, prompts: list[list[int]]) -> CompletionRequest:
    bias, form = body.logit_bias, None
    if body.json_schema is not None:
        form = ResponseFormat(type="json_schema", json_schema=JsonSchema(name="answer", schema=body.json_schema))
    return CompletionRequest(
        prompt=list(prompts),
        model=body.model,
        max_tokens=body.n_predict,
        temperature=body.temperature,
        top_k=max(-1, body.top_k),
        top_p=body.top_p,
        min_p=body.min_p,
        typical_p=body.typical_p,
        xtc_probability=body.xtc_probability,
        xtc_threshold=body.xtc_threshold,
        dry_multiplier=body.dry_multiplier,
        dry_base=body.dry_base,
        dry_allowed_length=body.dry_allowed_length,
        dry_penalty_last_n=body.dry_penalty_last_n,
        dry_sequence_breakers=body.dry_sequence_breakers,
        repetition_penalty=body.repeat_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        seed=body.seed,
        stop=stops_of(body.stop),
        ignore_eos=body.ignore_eos,
        logit_bias={str(token): value for token, value in bias} if isinstance(bias, list) else bias,
        logprobs=body.n_probs,
        response_format=form,
        priority=body.priority,
    )


def stops_of(given: str | list[str] | None) -> list[str]:
    """Stop strings as llama.cpp and Ollama take them: an empty one stops nothing."""
    return [stop for stop in ([given] if isinstance(given, str) else given or []) if stop]


def _prompts(service: Service, given: str | list[str | int | list[int]] | None) -> list[list[int]]:
    """One prompt: a text, token ids, or both mixed; or several, in a list of texts and lists of ids."""
    if given is None or given == [] or given == "":
        raise ApiError(400, "prompt is a text, token ids, both mixed, or a list of such", param="prompt")
    if not isinstance(given, list):
        return [service.llm.prompt_ids(given)]
    if not any(isinstance(one, int) for one in given):
        return [service.llm.prompt_ids(one) for one in given if not isinstance(one, int)]
    ids: list[int] = []
    for i, one in enumerate(given):
        if isinstance(one, list):
            raise ApiError(400, "prompt mixes token ids and lists of them", param="prompt")
        ids += [one] if isinstance(one, int) else service.llm.prompt_ids(one, add_special=i == 0)
    return [service.llm.prompt_ids(ids)]


async def answer(service: Service, body: LlamaRequest, caller: Caller) -> Response:
    """POST /completion and /infill."""
    service.check_model(body.model)
    answers, prompts = await _start(service, body, caller)
    if not body.stream:
        await answers.collect()
        chat.record(service, answers)
        size = answers.n_bytes(1 + body.n_probs if body.n_probs else 0) + 8 * sum(map(len, prompts))
        return await service.work.write(size, _all, service, body, answers, prompts)

    async def produce(sender: EventSender) -> None:
        n_made, n_prompt = 0, len(prompts[0])

        def write(_: Choice, event: TokenEvent) -> None:
            nonlocal n_made
            n_made += 1
            shown = {"index": 0, "content": event.text, "tokens": [event.token_id], "stop": False}
            shown |= {"id_slot": -1, "tokens_predicted": n_made, "tokens_evaluated": n_prompt}
            sender.event({**shown, **_probs(service, body, [event])})

        try:
            await answers.send(sender, write)
            chat.record(service, answers)
            end = _end(service, body, answers, answers.choices[0], prompts[0])
            sender.event({"content": "", "tokens": [], **end})
        finally:
            answers.close()

    return EventStream(produce)


def _all(service: Service, body: LlamaRequest, answers: Answers, prompts: list[list[int]]) -> Response:
    made = [part(_whole(service, body, answers, choice, prompts[choice.index])) for choice in answers.choices]
    return json_response(made[0] if len(made) == 1 else made)


def _whole(service: Service, body: LlamaRequest, answers: Answers, choice: Choice, prompt: list[int]) -> dict[str, Any]:
    made = {**_tokens(body, choice.events), **_probs(service, body, choice.events)}
    whole = {"content": choice.text, **made, **_end(service, body, answers, choice, prompt)}
    if not body.response_fields:
        return whole
    picked = {}
    for name in body.response_fields:
        value: Any = whole
        for level in name.split("/"):
            value = value.get(level) if isinstance(value, dict) else None
        if value is not None:
            picked[name] = value
    return picked


def _tokens(body: LlamaRequest, events: list[TokenEvent]) -> dict[str, Any]:
    return {"tokens": [event.token_id for event in events] if body.return_tokens else []}


def _probs(service: Service, body: LlamaRequest, events: list[TokenEvent]) -> dict[str, Any]:
    if not body.n_probs:
        return {}

    def one(token: int, logprob: float) -> dict[str, Any]:
        text, raw = service.token_text(token), service.token_bytes(token)
        return {"id": token, "token": text, "bytes": raw, "logprob": max(logprob, -9999.0)}

    shown = [
        {**one(e.token_id, e.logprob), "top_logprobs": [one(token, logprob) for token, logprob in e.top_logprobs]}
        for e in events
    ]
    return {"completion_probabilities": shown}


def _end(service: Service, body: LlamaRequest, answers: Answers, choice: Choice, prompt: list[int]) -> dict[str, Any]:
    """What is known when it is over."""
    stops = stops_of(body.stop)
    word = completions.stop_hit(service, choice, stops)
    kind = "limit" if choice.finish_reason == "length" else "eos" if word is None else "word"
    tokenizer = service.llm._need_tokenizer()
    return {
        "index": choice.index,
        "id_slot": -1,
        "stop": True,
        "model": service.shown_name(body.model),
        "tokens_predicted": len(choice.events),
        "tokens_evaluated": len(prompt),
        "tokens_cached": choice.prompt.n_cached_tokens if choice.prompt is not None else 0,
        "prompt": tokenizer.decode([i for i in prompt if tokenizer.is_token(i)]),
        "has_new_line": "\n" in choice.text,
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
