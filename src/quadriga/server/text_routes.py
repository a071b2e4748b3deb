"""Routes about text and vectors: tokenise, detokenise, the chat template, embeddings."""

from __future__ import annotations

import base64
import functools
import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from quadriga.server import chat
from quadriga.server.caller import Caller
from quadriga.server.completions import prompts_of
from quadriga.server.errors import ApiError
from quadriga.server.schema import (
    ChatRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Message,
    RerankRequest,
    ScoreRequest,
    TemplateRequest,
    TokenizeRequest,
)
from quadriga.server.service import Service
from quadriga.server.sse import json_response, part
from quadriga.server.tools import ToolUse
from quadriga.text.chat import RenderedPrompt
from quadriga.text.template_abilities import Abilities

_NUMBER_BYTES = 20
"""Of a number of a vector as JSON."""
MAX_TEXT_BYTES = 1 << 20
"""UTF-8 bytes of a text where no context bounds it: some seconds of encoding at most, and as many tokens."""


async def tokenize(service: Service, body: TokenizeRequest, caller: Caller) -> Response:
    """A text's token ids, or a conversation's; not limited to the context."""
    service.check_model(body.model)
    tokenizer = service.llm._need_tokenizer()
    given = [text for text in (body.prompt, body.content) if text is not None]
    if len(given) + (body.messages is not None) != 1:
        raise ApiError(400, "give one of prompt, content and messages", param="prompt")
    if given:
        check_text(given, "prompt")
        encode = tokenizer.encode_prompt if body.add_special_tokens else tokenizer.encode
        encode = functools.partial(encode, allow_special=body.parse_special)
        ids = await service.work.encode(caller.n_bytes, encode, given[0])
    else:
        ids = (await rendered(service, _as_chat(body, body.messages or []), caller)).ids
    return await service.work.check(caller.n_bytes, _tokens, service, ids, body)


def _tokens(service: Service, ids: list[int], body: TokenizeRequest) -> Response:
    names: dict[int, str] = {}
    named = body.return_token_strs or body.with_pieces
    strings = [names.get(i) or names.setdefault(i, service.token_text(i)) for i in ids] if named else None
    limit = service.llm.config.max_seq_len
    if body.with_pieces:
        pieces = [{"id": i, "piece": text} for i, text in zip(ids, strings or (), strict=True)]
        return json_response({"count": len(ids), "max_model_len": limit, "tokens": part(pieces)})
    shown = {"count": len(ids), "max_model_len": limit, "tokens": part(ids), "token_strs": part(strings)}
    return json_response(shown)


async def detokenize(service: Service, body: DetokenizeRequest, caller: Caller) -> Response:
    """The text of token ids."""
    service.check_model(body.model)
    return await service.work.encode(caller.n_bytes, _text, service, body.tokens)


def _text(service: Service, ids: list[int]) -> Response:
    tokenizer = service.llm._need_tokenizer()
    outside = [token for token in ids if not 0 <= token < tokenizer.n_vocab]
    if outside:
        raise ApiError(400, f"token ids are 0 to {tokenizer.n_vocab - 1}, got {outside[:4]}", param="tokens")
    text = tokenizer.decode(ids)
    return json_response({"prompt": text, "content": text})  # vLLM's name, and llama.cpp's


def tokenizer_info(service: Service) -> Response:
    """What a client needs to know of the vocabulary."""
    tokenizer = service.llm._need_tokenizer()

    def named(token: int | None) -> str | None:
        return tokenizer.token_text(token) if token is not None and tokenizer.is_token(token) else None

    ends = sorted(service.llm.end_ids)
    eos = next(iter((*tokenizer.eos_ids, *ends)), None)
    info: dict[str, Any] = {
        "n_vocab": tokenizer.n_vocab,
        "bos_token": named(tokenizer.bos_id),
        "bos_token_id": tokenizer.bos_id,
        "eos_token": named(eos),
        "eos_token_id": eos,
        "eos_token_ids": ends,
        "pad_token": named(tokenizer.pad_id),
        "pad_token_id": tokenizer.pad_id,
        "add_bos_token": bool(tokenizer.prefix_ids),
        "chat_template": tokenizer.chat_template,
        "model_max_length": service.llm.config.max_seq_len,
    }
    return json_response(info)


async def apply_template(service: Service, body: TemplateRequest, caller: Caller) -> Response:
    """A conversation as the text that the model reads."""
    service.check_model(body.model)
    return json_response({"prompt": (await rendered(service, _as_chat(body, body.messages), caller)).text})


def _as_chat(body: TokenizeRequest | TemplateRequest, messages: list[Message]) -> ChatRequest:
    """The conversation of a request about text; how its last message is taken is said as in a chat request."""
    return ChatRequest(
        messages=messages,
        tools=body.tools,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=body.chat_template_kwargs,
    )


async def embeddings(service: Service, body: EmbeddingRequest, caller: Caller) -> Response:
    """Texts as vectors of length 1: the mean of the last hidden states."""
    found, n = await vectors(service, body, caller)
    shown = await written(service, found, as_base64=body.encoding_format == "base64")
    data = [{"object": "embedding", "index": i, "embedding": one} for i, one in enumerate(shown)]
    usage = {"prompt_tokens": n, "total_tokens": n}
    return json_response({"object": "list", "data": data, "model": service.shown_name(body.model), "usage": usage})


async def written(service: Service, found: list[Any], *, as_base64: bool = False) -> list[msgspec.Raw]:
    """Vectors as JSON: lists of numbers, or their bytes as base64; many are written in a thread, one by one."""

    def one(vector: Any) -> msgspec.Raw:
        return part(base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_base64 else vector.tolist())

    size = _NUMBER_BYTES * sum(vector.size for vector in found)
    return await service.work.write(size, lambda: [one(vector) for vector in found])


METHOD = "cosine of mean last hidden states"
"""What scores are made of, said with each of them: the models served here were not trained to rank."""


async def rerank(service: Service, body: RerankRequest, caller: Caller) -> Response:
    """Documents by how near their vectors are to the query's, the nearest first."""
    texts = [one if isinstance(one, str) else one.text for one in body.documents]
    if not texts or (body.top_n is not None and body.top_n < 1):
        raise ApiError(400, "documents takes at least one text, and top_n at least 1", param="documents")
    found, n = await _all_vectors(service, body, [body.query, *texts], caller)
    scores = [float(vector @ found[0]) for vector in found[1:]]
    order = sorted(range(len(texts)), key=lambda i: (-scores[i], i))[: body.top_n]
    results = [
        {
            "index": i,
            "relevance_score": scores[i],
            **({"document": {"text": texts[i]}} if body.return_documents else {}),
        }
        for i in order
    ]
    head = {"id": f"rerank-{secrets.token_hex(12)}", "model": service.shown_name(body.model), "method": METHOD}
    return json_response({**head, "results": results, "usage": {"prompt_tokens": n, "total_tokens": n}})


async def score(service: Service, body: ScoreRequest, caller: Caller) -> Response:
    """How near texts are: one to each of many, or the first to the first, the second to the second."""
    one, other = ([given] if isinstance(given, str) else given for given in (body.text_1, body.text_2))
    if not one or not other or (len(one) not in (1, len(other))):
        raise ApiError(400, "text_1 is one text, or as many as text_2", param="text_1")
    found, n = await _all_vectors(service, body, [*one, *other], caller)
    firsts, seconds = found[: len(one)] * (len(other) if len(one) == 1 else 1), found[len(one) :]
    data = [
        {"index": i, "object": "score", "score": float(a @ b)}
        for i, (a, b) in enumerate(zip(firsts, seconds, strict=True))
    ]
    head = {"id": f"score-{secrets.token_hex(12)}", "object": "list", "created": int(time.time())}
    head |= {"model": service.shown_name(body.model), "method": METHOD}
    return json_response({**head, "data": data, "usage": {"prompt_tokens": n, "total_tokens": n}})


async def _all_vectors(
    service: Service, body: RerankRequest | ScoreRequest, texts: list[str], caller: Caller
) -> tuple[list[Any], int]:
    request = EmbeddingRequest(input=list(texts), model=body.model, priority=body.priority)
    return await vectors(service, request, caller)


async def vectors(service: Service, body: EmbeddingRequest, caller: Caller) -> tuple[list[Any], int]:
    """Texts as vectors (D,) float32, and how many tokens they have.

    Raises:
        ApiError, RequestError, BusyError: it cannot be served.
    """
    service.check_model(body.model)
    if body.dimensions not in (None, service.llm.config.d_model):
        raise ApiError(400, f"this model's vectors have {service.llm.config.d_model} dimensions", param="dimensions")
    prompts = await service.work.encode(caller.n_bytes, prompts_of, service, body.input, "input")
    return await service.embed(prompts, caller, priority=body.priority, model=body.model), sum(map(len, prompts))


async def rendered(service: Service, request: ChatRequest, caller: Caller) -> RenderedPrompt:
    """A conversation that need not fit the context, by the template.

    Raises:
        ApiError: 400, its texts are longer than MAX_TEXT_BYTES, or it cannot be a conversation.
    """
    tools, turns = await service.work.check(caller.n_bytes, _turns, service, request, await service.abilities())
    return await chat.rendered(service, turns, caller, tools=tools.shown, **chat.how_rendered(request))


def _turns(service: Service, request: ChatRequest, able: Abilities) -> tuple[ToolUse, list[dict[str, Any]]]:
    chat.check_count(service, len(request.messages))
    tools = ToolUse(request, able, service.tool_form)
    turns = tools.turns(request.messages)
    check_text([turn["content"] for turn in turns], "messages")
    return tools, turns


def check_text(texts: Sequence[str], param: str) -> None:
    """Refuse more text than is encoded where no context bounds it.

    Raises:
        ApiError: 400 that names the bound.
    """
    n_bytes = sum(map(len, texts))  # of as many bytes at least: those are counted only where they may be few enough
    if n_bytes <= MAX_TEXT_BYTES:
        n_bytes = sum(len(text.encode(errors="replace")) for text in texts)
    if n_bytes > MAX_TEXT_BYTES:
        message = f"{param} may have {MAX_TEXT_BYTES:,} bytes of text, got {n_bytes:,} or more. Send it in parts"
        raise ApiError(400, message, param=param)
