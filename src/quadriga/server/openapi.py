"""The OpenAPI document: request schemas from the msgspec types, answers as they are promised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from quadriga import __version__
from quadriga.server.batches import Line
from quadriga.server.llamacpp import LlamaCompletion, LlamaInfill
from quadriga.server.messages import CountRequest, MessagesRequest
from quadriga.server.responses import ResponsesRequest
from quadriga.server.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
    TemplateRequest,
    TokenizeRequest,
)

POSTS: dict[str, tuple[type, str, tuple[str, ...]]] = {
    "/v1/chat/completions": (ChatRequest, "Answer a conversation.", ("id", "choices", "usage")),
    "/v1/completions": (CompletionRequest, "Continue texts or token ids.", ("id", "choices", "usage")),
    "/v1/responses": (ResponsesRequest, "Answer, in the Responses interface; stateless.", ("id", "output", "status")),
    "/v1/messages": (MessagesRequest, "Answer, in Anthropic's interface.", ("id", "content", "stop_reason")),
    "/v1/messages/count_tokens": (CountRequest, "Tokens of a message request.", ("input_tokens",)),
    "/v1/embeddings": (EmbeddingRequest, "Texts as vectors.", ("data", "model", "usage")),
    "/v1/rerank": (RerankRequest, "Documents, the nearest to a query first.", ("results", "method")),
    "/v1/score": (ScoreRequest, "How near texts are.", ("data", "method")),
    "/completion": (LlamaCompletion, "Continue a text, in llama.cpp's interface.", ("content", "stop")),
    "/infill": (LlamaInfill, "Fill in the middle, in llama.cpp's interface.", ("content", "stop")),
    "/tokenize": (TokenizeRequest, "Token ids of a text or a conversation.", ("tokens", "count")),
    "/detokenize": (DetokenizeRequest, "Text of token ids.", ("prompt",)),
    "/apply-template": (TemplateRequest, "A conversation as the model reads it.", ("prompt",)),
}
"""Path -> type of the body, what it does, keys every answer has."""

STREAMS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/completion", "/infill")

GETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "/v1/models": ("The served model.", ("object", "data")),
    "/tokenizer_info": ("Facts about the vocabulary.", ("n_vocab", "eos_token_id")),
    "/props": ("What llama.cpp's clients ask about a server.", ("total_slots", "chat_template")),
    "/health": ("200 while the engine lives; needs no key.", ("status",)),
    "/ready": ("200 once a token has been generated just now.", ("status",)),
    "/v1/usage": ("What the caller has used, and may.", ("requests", "tokens", "limits", "left")),
    "/v1/experts": ("Tokens every expert has seen, per layer.", ("n_layers", "n_experts", "counts", "balance", "jain")),
    "/v1/experts/labels": ("What every expert does, where labels were made.", ("model", "layers")),
}

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(names: Sequence[str], *, strict: bool = False) -> dict[str, Any]:
    """OpenAPI 3.1.

    Args:
        names: of the model; no other name is taken.
        strict: fields that are not here are refused.
    """
    kinds = [kind for kind, _, _ in POSTS.values()]
    schemas, components = msgspec.json.schema_components([*kinds, Line], ref_template="#/components/schemas/{name}")
    for schema in components.values():
        if "model" in schema.get("properties", {}):
            optional = "model" not in schema.get("required", ())
            schema["properties"]["model"] = {"enum": [*names, None] if optional else [*names]}
        if not strict:
            schema.pop("additionalProperties", None)
    paths: dict[str, Any] = {}
    for (path, (_, text, keys)), schema in zip(POSTS.items(), schemas, strict=False):
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        streams = path in STREAMS
        paths[path] = {"post": {"summary": text, "requestBody": body, "responses": _answers(keys, streams)}}
    for path, (text, keys) in GETS.items():
        paths[path] = {"get": {"summary": text, "responses": _answers(keys, False)}}
    paths["/v1/experts/reset"] = {"post": {"summary": "Count from here.", "responses": _answers(("counts",), False)}}
    paths["/metrics"] = {
        "get": {
            "summary": "Prometheus metrics.",
            "responses": {"200": {"description": "text", "content": {"text/plain": {}}}},
        }
    }
    lines = {"required": True, "content": {"application/jsonl": {"schema": {"type": "string"}}}}
    done = {
        "200": {"description": "one JSON line an answer", "content": {"application/jsonl": {}}},
        "default": _refusal(),
    }
    paths["/v1/batches"] = {"post": {"summary": "Many requests, one a line.", "requestBody": lines, "responses": done}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Quadriga", "version": __version__, "license": {"name": "Apache-2.0"}},
        "security": [{"key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _answers(keys: tuple[str, ...], streams: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object", "required": list(keys)}}}
    if streams:
        content["text/event-stream"] = {}
    return {"200": {"description": "the answer", "content": content}, "default": _refusal()}


def _refusal() -> dict[str, Any]:
    return {
        "description": "what was wrong",
        "content": {
            "application/json": {"schema": {"anyOf": [{"$ref": "#/components/schemas/Error"}, {"type": "object"}]}}
        },
    }
