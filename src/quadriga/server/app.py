"""All routes of the server, with and without /v1."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from quadriga.errors import QuadrigaError
from quadriga.server import (
    admin,
    chat,
    completions,
    fields,
    llamacpp,
    messages,
    ollama,
    ollama_models,
    responses,
    status,
    text_routes,
)
from quadriga.server.endpoints import Endpoint, Endpoints, noted, plain
from quadriga.server.errors import ApiError, as_api_error, as_bug
from quadriga.server.files import FileStore
from quadriga.server.fleet import Fleet
from quadriga.server.guard import Guard, Limits
from quadriga.server.metrics import Metrics
from quadriga.server.page import PAGE, page_routes
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
from quadriga.server.service import Service
from quadriga.server.sse import Gone, json_response

LAST_STEP_S = 2.0
"""When the server ends: time for a step that nobody waits for any more."""

Row = tuple[str, str, Endpoint]
"""Method, path, what answers."""


def _ours(e: Endpoints) -> list[Row]:
    """Routes that are there with and without /v1."""
    posts = {
        "/chat/completions": e.generates(ChatRequest, chat.complete, chat.stream),
        "/completions": e.generates(CompletionRequest, completions.complete, completions.stream),
        "/responses": e.generates(responses.ResponsesRequest, responses.complete, responses.stream),
        "/messages": e.generates(messages.MessagesRequest, messages.complete, messages.stream),
        "/messages/count_tokens": e.simple(messages.CountRequest, messages.count),
        "/embeddings": e.simple(EmbeddingRequest, text_routes.embeddings),
        "/rerank": e.simple(RerankRequest, text_routes.rerank),
        "/score": e.simple(ScoreRequest, text_routes.score),
        "/tokenize": e.simple(TokenizeRequest, text_routes.tokenize),
        "/detokenize": e.simple(DetokenizeRequest, text_routes.detokenize),
        "/apply-template": e.simple(TemplateRequest, text_routes.apply_template),
        "/batches": e.batch,
        "/load_lora_adapter": e.simple(admin.AdapterToLoad, admin.load_adapter),
        "/unload_lora_adapter": e.simple(admin.AdapterToForget, admin.unload_adapter),
        "/experts/reset": e.experts(status.Experts.reset),
    }
    metrics = e.fleet.metrics
    gets = {
        "/models": e.models,
        "/models/{name:path}": e.one_model,
        "/tokenizer_info": e.about(text_routes.tokenizer_info),
        "/health": plain(lambda: status.health(e.fleet)),
        "/ready": e.ready,
        "/usage": e.usage,
        "/experts": e.experts(status.Experts.show),
        "/experts/labels": e.experts(status.Experts.labels),
        "/metrics": plain(lambda: Response(metrics.text(), media_type="text/plain; version=0.0.4")),
        "/openapi.json": plain(lambda: json_response(e.document())),
        "/docs": e.docs,
    }
    rows = [("POST", path, endpoint) for path, endpoint in posts.items()]
    return [*rows, *(("GET", path, endpoint) for path, endpoint in gets.items()), *e.of_files()]


def _of_ollama(e: Endpoints) -> list[Row]:
    managed = {f"/api/{verb}": ollama_models.refuse(done) for verb, done in ollama_models.MANAGES.items()}
    return [
        ("POST", "/api/chat", e.of_ollama(ollama.OllamaChat)),
        ("POST", "/api/generate", e.of_ollama(ollama.OllamaGenerate)),
        ("POST", "/api/embed", e.simple(ollama.OllamaEmbed, ollama.embed)),
        ("POST", "/api/embeddings", e.simple(ollama.OllamaEmbeddings, ollama.embeddings)),
        ("POST", "/api/show", e.shown(ollama_models.OllamaModel, ollama_models.show)),
        ("POST", "/api/pull", e.managed(e.pulls.pull)),
        ("DELETE", "/api/delete", e.managed(e.pulls.delete)),
        *(("POST", path, endpoint) for path, endpoint in managed.items()),
        ("GET", "/api/tags", e.tags),
        ("GET", "/api/ps", plain(lambda: ollama_models.running(e.fleet))),
        ("GET", "/api/version", plain(ollama_models.version)),
    ]


def _of_llamacpp(e: Endpoints) -> list[Row]:
    return [
        ("POST", "/completion", e.simple(llamacpp.LlamaCompletion, llamacpp.answer)),
        ("POST", "/infill", e.simple(llamacpp.LlamaInfill, llamacpp.answer)),
        ("GET", "/props", e.about(llamacpp.props)),
        ("GET", "/slots", e.about(llamacpp.slots)),
    ]


def build(service: Service | Fleet, limits: Limits, store: FileStore | None = None) -> Guard:
    """The ASGI application.

    Args:
        service: the model, or the models; their engines are started and stopped with the application.
        limits: who may ask, and how much.
        store: where files and batches are kept; None: they are not.
    """
    fleet = service if isinstance(service, Fleet) else Fleet([service])
    endpoints = Endpoints(fleet, limits, store)
    rows = [("", *row) for row in (*_of_ollama(endpoints), *_of_llamacpp(endpoints))]
    rows += [(prefix, *row) for prefix in ("", "/v1") for row in _ours(endpoints)]
    routes = [Route(p + path, _counted(fleet.metrics, path, e), methods=[method]) for p, method, path, e in rows]

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await fleet.start()
        if endpoints.jobs is not None:
            await endpoints.jobs.start()
        yield
        if endpoints.jobs is not None:
            await endpoints.jobs.stop()
        await fleet.stop(LAST_STEP_S)

    app = Starlette(
        routes=routes + page_routes(PAGE),
        lifespan=lifespan,
        exception_handlers={HTTPException: http_error, Exception: bug},
    )
    guard = endpoints.desk.guard = Guard(app, limits)
    guard.on_refusal = fleet.metrics.refuse
    return guard


def _counted(metrics: Metrics, path: str, endpoint: Endpoint) -> Endpoint:
    """The endpoint, its refusals as answers, every answer counted."""

    async def counted(request: Request) -> Response:
        try:
            response = await endpoint(request)
        except (Gone, ClientDisconnect):
            response = Response(status_code=499)
        except QuadrigaError as error:
            response = _refusal(error, request.url.path)
            metrics.refuse(error)
        if ignored := getattr(request.state, "ignored", []):
            response.headers[fields.HEADER] = fields.header(ignored)
            noted.say(path, ignored)
        metrics.answers.labels(path, str(response.status_code)).inc()
        return response

    return counted


def _refusal(error: QuadrigaError, path: str) -> Response:
    """An error as an answer. Whoever catches one keeps no second name for it: the two would hold each other, and the
    request's body with them, until the collector comes by."""
    shown = as_api_error(error)
    return json_response(shown.body(path), shown.status, shown.headers)


async def http_error(request: Request, error: Exception) -> Response:
    """No such path, or no such method there."""
    assert isinstance(error, HTTPException)
    text = {404: f"nothing is at {request.url.path[:200]!r}; see /openapi.json", 405: "this path takes another method"}
    shown = ApiError(error.status_code, text.get(error.status_code, error.detail))
    return json_response(shown.body(request.url.path), error.status_code, dict(error.headers or {}))


async def bug(request: Request, error: Exception) -> Response:
    """A mistake of ours."""
    shown = as_bug(error)
    return json_response(shown.body(request.url.path), 500)
