"""Routes about text and vectors: tokenise, detokenise, the chat template, embeddings."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from starlette.responses import Response
from torch import Tensor

from quadriga.server.completions import prompts_of
from quadriga.server.errors import ApiError
from quadriga.server.schema import (
    ChatRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Message,
    TemplateRequest,
    TokenizeRequest,
)
from quadriga.server.service import Service
from quadriga.server.sse import json_response
from quadriga.server.tools import ToolUse
from quadriga.text.chat import RenderedPrompt, render_soon


async def tokenize(service: Service, body: TokenizeRequest) -> Response:
    """A text's token ids, or a conversation's."""
    service.check_model(body.model)
    tokenizer = service.llm._need_tokenizer()
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give prompt or messages", param="prompt")
    if body.prompt is not None:
        encode = tokenizer.encode_prompt if body.add_special_tokens else tokenizer.encode
        ids = await asyncio.to_thread(encode, body.prompt, allow_special=body.parse_special)
    else:
        ids = (await _rendered(service, body.messages or [], body.add_generation_prompt)).ids
    strings = [service.token_text(token) for token in ids] if body.return_token_strs else None
    limit = service.llm.config.max_seq_len
    return json_response({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": strings})


async def detokenize(service: Service, body: DetokenizeRequest) -> Response:
    """The text of token ids."""
    service.check_model(body.model)
    tokenizer = service.llm._need_tokenizer()
    outside = [token for token in body.tokens if not 0 <= token < tokenizer.n_vocab]
    if outside:
        raise ApiError(400, f"token ids are 0 to {tokenizer.n_vocab - 1}, got {outside[:4]}", param="tokens")
    return json_response({"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)})


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


async def apply_template(service: Service, body: TemplateRequest) -> Response:
    """A conversation as the text that the model reads."""
    service.check_model(body.model)
    rendered = await _rendered(service, body.messages, body.add_generation_prompt)
    return json_response({"prompt": rendered.text})


async def embeddings(service: Service, body: EmbeddingRequest) -> Response:
    """Texts as vectors of length 1: the mean of the last hidden states."""
    service.check_model(body.model)
    if body.dimensions not in (None, service.llm.config.d_model):
        raise ApiError(400, f"this model's vectors have {service.llm.config.d_model} dimensions", param="dimensions")
    prompts = await asyncio.to_thread(prompts_of, service, body.input, "input")
    data = []
    for i, prompt in enumerate(prompts):
        vector = (await _embed(service, prompt)).numpy()
        shown: Any = vector.tolist()
        if body.encoding_format == "base64":
            shown = base64.b64encode(vector.astype(np.float32).tobytes()).decode()
        data.append({"object": "embedding", "index": i, "embedding": shown})
    n = sum(len(prompt) for prompt in prompts)
    usage = {"prompt_tokens": n, "total_tokens": n}
    return json_response({"object": "list", "data": data, "model": service.name, "usage": usage})


async def _embed(service: Service, ids: list[int]) -> Tensor:
    """One pass at a time, so that a long text does not stop the answers of others."""
    call = service.engine.call
    passes = await call(lambda engine: engine.embed_passes(ids))
    try:
        while (vector := await call(lambda _: next(passes))) is None:
            pass
        return vector
    finally:
        await asyncio.shield(call(lambda _: passes.close()))  # on the engine's thread: it gives blocks back


async def _rendered(service: Service, messages: list[Message], add_generation_prompt: bool) -> RenderedPrompt:
    turns = ToolUse(ChatRequest(model=service.name, messages=messages)).messages(messages)
    tokenizer = service.llm._need_tokenizer()
    return await render_soon(turns, tokenizer, add_generation_prompt=add_generation_prompt)
