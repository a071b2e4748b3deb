"""All routes of the server, with and without /v1."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from quadriga.errors import QuadrigaError
from quadriga.server import (
    batches,
    chat,
    completions,
    docs_page,
    fields,
    llamacpp,
    messages,
    ollama,
    responses,
    status,
    text_routes,
)
from quadriga.server.accounts import Visit
from quadriga.server.batch_jobs import BatchJobs, BatchRequest
from quadriga.server.errors import ApiError, as_api_error, as_bug
from quadriga.server.files import FileRoutes, FileStore
from quadriga.server.guard import Guard, Limits, read_body
from quadriga.server.openapi import document
from quadriga.server.schema import (
    INLINE_BYTES,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
    TemplateRequest,
    TokenizeRequest,
)
from quadriga.server.service import Caller, Service
from quadriga.server.sse import Gone, json_response, unless_gone

noted = fields.Once()

LAST_STEP_S = 2.0
"""When the server ends: time for a step that nobody waits for any more."""

PAGE = Path(__file__).parent / "static"

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}

Answer = Callable[[Service, Any, Caller], Awaitable[Response]]
Endpoint = Callable[[Request], Awaitable[Response]]


class _Desk:
    """Answers lines of batches."""

    def __init__(self, service: Service, limits: Limits) -> None:
        self._service, self._strict = service, limits.strict
        self.guard: Guard | None = None

    def handlers(self, caller: Caller) -> dict[str, batches.Handler]:
        """Url -> what answers a line of a caller's."""
        caller, service = replace(caller, patient=True), self._service

        def handler(kind: type, answer: Answer) -> batches.Handler:
            async def handle(line: bytes) -> Response:
                body, ignored = await service.work.check(len(line), batches.body_of, line, kind, self._strict)
                noted.say("/v1/batches", ignored)
                if getattr(body, "stream", None):
                    raise ApiError(400, "a batch has no streams", param="stream")
                return await answer(service, body, replace(caller, n_bytes=len(line)))

            return handle

        return {
            "/v1/chat/completions": handler(ChatRequest, chat.complete),
            "/v1/completions": handler(CompletionRequest, completions.complete),
            "/v1/responses": handler(responses.ResponsesRequest, responses.complete),
            "/v1/embeddings": handler(EmbeddingRequest, text_routes.embeddings),
        }

    def caller(self, owner: str, client: str) -> Caller | None:
        """Who a batch in the background is for; None where its key is none of this server's any more."""
        assert self.guard is not None, "the server has been built"
        found = self.guard.client_of(owner, client)
        if found is None:
            return None
        visit = Visit(self.guard.account(found[0]), taken=False)
        return Caller(salt=found[1], client=found[0].encode(), visit=visit, background=True)


def _no_files() -> ApiError:
    return ApiError(501, "this server keeps no files; start it with --files FOLDER", code="no_files")


def _file_routes(store: FileStore | None, jobs: BatchJobs | None, limits: Limits) -> list[tuple[str, str, Endpoint]]:
    """(method, path, endpoint) of everything about files and the batches made of them."""

    async def refuse(_: Request) -> Response:
        raise _no_files()

    files = None if store is None else FileRoutes(store, limits)
    return [
        ("POST", "/files", files.upload if files else refuse),
        ("GET", "/files", files.listed if files else refuse),
        ("GET", "/files/{id}", files.one if files else refuse),
        ("DELETE", "/files/{id}", files.delete if files else refuse),
        ("GET", "/files/{id}/content", files.content if files else refuse),
        ("GET", "/batches", jobs.listed if jobs else refuse),
        ("GET", "/batches/{id}", jobs.one if jobs else refuse),
        ("POST", "/batches/{id}/cancel", jobs.cancel if jobs else refuse),
    ]


def build(service: Service, limits: Limits, store: FileStore | None = None) -> Guard:
    """The ASGI application.

    Args:
        service: the model; its engine is started and stopped with the application.
        limits: who may ask, and how much.
        store: where files and batches are kept; None: they are not.
    """
    experts = status.Experts(service)
    read = partial(fields.read, strict=limits.strict)

    def generates(kind: type, whole: Answer, stream: Answer) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            body: Any = await parsed(request, kind)
            caller = request.state.caller
            answer: Response = await unless_gone(request, (stream if body.stream else whole)(service, body, caller))
            return answer

        return endpoint

    def simple(kind: type, answer: Answer) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            body: Any = await parsed(request, kind)
            response: Response = await unless_gone(request, answer(service, body, request.state.caller))
            return response

        return endpoint

    async def parsed(request: Request, kind: type) -> Any:
        # curl without a header, as Ollama's documentation shows it; pages of other origins never get as far as this.
        forms = ("application/json", *(ollama.KINDS if request.url.path.startswith("/api/") else ()))
        raw = await read_body(request, limits, forms)
        request.state.caller.n_bytes = len(raw)
        body: Any
        if len(raw) <= INLINE_BYTES:
            body, ignored = read(raw, kind)
        else:
            body, ignored = await unless_gone(request, service.work.check(len(raw), read, raw, kind))
        request.state.ignored = ignored
        return body

    desk = _Desk(service, limits)
    jobs = None if store is None else BatchJobs(store, desk)

    async def batch(request: Request) -> Response:
        if request.headers.get("content-type", "").split(";")[0].strip().lower() == "application/json":
            body = await parsed(request, BatchRequest)
            if jobs is None:
                raise _no_files()
            return json_response(jobs.create(body, request.state.caller))
        raw = await read_body(request, limits, ("application/jsonl", "application/x-ndjson", "application/json"))
        handlers = desk.handlers(request.state.caller)
        answer: Response = await unless_gone(request, service.work.check(len(raw), batches.run, raw, handlers))
        return answer

    def plain(answer: Callable[[], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(_: Request) -> Response:
            return answer()

        return endpoint

    async def ready(request: Request) -> Response:
        response: Response = await unless_gone(request, status.ready(service))
        return response

    async def one_model(request: Request) -> Response:
        return status.one_model(service, request.path_params["name"])

    async def docs(request: Request) -> Response:
        text = docs_page.page(
            document(service.names, strict=limits.strict), service.name, str(request.base_url).rstrip("/")
        )
        headers = {**_PAGE_HEADERS, "content-security-policy": docs_page.CSP}
        return Response(text, headers=headers, media_type="text/html")

    posts = {
        "/chat/completions": generates(ChatRequest, chat.complete, chat.stream),
        "/completions": generates(CompletionRequest, completions.complete, completions.stream),
        "/responses": generates(responses.ResponsesRequest, responses.complete, responses.stream),
        "/messages": generates(messages.MessagesRequest, messages.complete, messages.stream),
        "/messages/count_tokens": simple(messages.CountRequest, messages.count),
        "/embeddings": simple(EmbeddingRequest, text_routes.embeddings),
        "/rerank": simple(RerankRequest, text_routes.rerank),
        "/score": simple(ScoreRequest, text_routes.score),
        "/tokenize": simple(TokenizeRequest, text_routes.tokenize),
        "/detokenize": simple(DetokenizeRequest, text_routes.detokenize),
        "/apply-template": simple(TemplateRequest, text_routes.apply_template),
        "/batches": batch,
        "/experts/reset": plain(experts.reset),
    }
    gets = {
        "/models": plain(lambda: status.models(service)),
        "/models/{name:path}": one_model,
        "/tokenizer_info": plain(lambda: text_routes.tokenizer_info(service)),
        "/health": plain(lambda: status.health(service)),
        "/ready": ready,
        "/experts": plain(experts.show),
        "/metrics": plain(lambda: Response(service.metrics.text(), media_type="text/plain; version=0.0.4")),
        "/openapi.json": plain(lambda: json_response(document(service.names, strict=limits.strict))),
        "/docs": docs,
    }
    theirs = {
        "/api/chat": simple(ollama.OllamaChat, ollama.ask),
        "/api/generate": simple(ollama.OllamaGenerate, ollama.ask),
        "/api/embed": simple(ollama.OllamaEmbed, ollama.embed),
        "/api/embeddings": simple(ollama.OllamaEmbeddings, ollama.embeddings),
        "/api/show": simple(ollama.OllamaModel, ollama.show),
        "/api/pull": simple(ollama.OllamaModel, ollama.pull),
        **{f"/api/{verb}": ollama.refuse(done) for verb, done in ollama.MANAGES.items()},
    }
    theirs |= {
        "/completion": simple(llamacpp.LlamaCompletion, llamacpp.answer),
        "/infill": simple(llamacpp.LlamaInfill, llamacpp.answer),
    }
    asked = {
        "/props": plain(lambda: llamacpp.props(service)),
        "/slots": plain(lambda: llamacpp.slots(service)),
        "/api/tags": plain(lambda: ollama.tags(service)),
        "/api/ps": plain(lambda: ollama.running(service)),
        "/api/version": plain(ollama.version),
    }
    routes = [Route(path, _counted(service, path, e), methods=["POST"]) for path, e in theirs.items()]
    routes.append(Route("/api/delete", _counted(service, "/api/delete", ollama.refuse("deleted")), methods=["DELETE"]))
    routes += [Route(path, _counted(service, path, e), methods=["GET"]) for path, e in asked.items()]
    for prefix in ("", "/v1"):
        routes += [Route(prefix + path, _counted(service, path, e), methods=["POST"]) for path, e in posts.items()]
        routes += [Route(prefix + path, _counted(service, path, e), methods=["GET"]) for path, e in gets.items()]
        for method, path, endpoint in _file_routes(store, jobs, limits):
            routes.append(Route(prefix + path, _counted(service, path, endpoint), methods=[method]))
    routes += page_routes(PAGE)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await service.engine.start()
        if jobs is not None:
            await jobs.start()
        yield
        if jobs is not None:
            await jobs.stop()
        await service.engine.stop(LAST_STEP_S)
        service.work.close()

    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http_error, Exception: _bug})
    desk.guard = Guard(app, limits)
    return desk.guard


def _counted(
    service: Service, path: str, endpoint: Callable[[Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint, its refusals as answers, every answer counted."""

    async def counted(request: Request) -> Response:
        try:
            response = await endpoint(request)
        except (Gone, ClientDisconnect):
            response = Response(status_code=499)
        except QuadrigaError as error:
            response = _refusal(error, request.url.path)
        if ignored := getattr(request.state, "ignored", []):
            response.headers[fields.HEADER] = fields.header(ignored)
            noted.say(path, ignored)
        service.metrics.answers.labels(path, str(response.status_code)).inc()
        return response

    return counted


def _refusal(error: QuadrigaError, path: str) -> Response:
    """An error as an answer. Whoever catches one keeps no second name for it: the two would hold each other, and the
    request's body with them, until the collector comes by."""
    shown = as_api_error(error)
    return json_response(shown.body(path), shown.status, shown.headers)


def page_routes(folder: Path) -> list[Route]:
    """The chat page: a fixed list of files, read once. No path of a request ever reaches the file system."""
    if not (folder / "index.html").exists():
        return []
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def serve(path: Path) -> Callable[[Request], Awaitable[Response]]:
        raw = path.read_bytes()
        tag = f'"{hashlib.sha256(raw).hexdigest()[:24]}"'
        kind = "text/javascript" if path.suffix in (".js", ".mjs") else mimetypes.guess_type(path.name)[0]
        headers = {**_PAGE_HEADERS, "etag": tag, "cache-control": "no-cache"}

        async def endpoint(request: Request) -> Response:
            if request.headers.get("if-none-match") == tag:
                return Response(status_code=304, headers=headers)
            return Response(raw, headers=headers, media_type=kind or "application/octet-stream")

        return endpoint

    routes = [Route("/", serve(folder / "index.html"), methods=["GET"])]
    routes += [Route(f"/page/{name}", serve(path), methods=["GET"]) for name, path in files.items()]
    if "favicon.svg" in files:
        routes.append(Route("/favicon.ico", serve(files["favicon.svg"]), methods=["GET"]))
    return routes


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = {404: f"nothing is at {request.url.path[:200]!r}; see /openapi.json", 405: "this path takes another method"}
    shown = ApiError(error.status_code, text.get(error.status_code, error.detail))
    return json_response(shown.body(request.url.path), error.status_code, dict(error.headers or {}))


async def _bug(request: Request, error: Exception) -> Response:
    shown = as_bug(error)
    return json_response(shown.body(request.url.path), 500)
