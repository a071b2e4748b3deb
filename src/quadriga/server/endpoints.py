"""What answers a request once it is let in: its body read and checked, its model found, its answer made.

Request -> Endpoints.parsed: body -> Fleet.find: the model -> an answer of chat, completions, responses, ...
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from quadriga.errors import ConfigError
from quadriga.server import (
    batches,
    chat,
    completions,
    docs_page,
    fields,
    ollama,
    ollama_models,
    responses,
    status,
    text_routes,
)
from quadriga.server.batch_jobs import BatchJobs, BatchRequest
from quadriga.server.caller import Caller
from quadriga.server.errors import ApiError
from quadriga.server.files import FileRoutes, FileStore
from quadriga.server.fleet import Fleet
from quadriga.server.guard import Guard, Limits, read_body
from quadriga.server.ollama_models import OllamaModel
from quadriga.server.on_demand import Listed, keep_alive_s
from quadriga.server.openapi import document
from quadriga.server.page import HEADERS as PAGE_HEADERS
from quadriga.server.pull import Pulls
from quadriga.server.schema import INLINE_BYTES, ChatRequest, CompletionRequest, EmbeddingRequest
from quadriga.server.service import Service
from quadriga.server.sse import json_response, unless_gone

Answer = Callable[[Service, Any, Caller], Awaitable[Response]]
Endpoint = Callable[[Request], Awaitable[Response]]

noted = fields.Once()


class Desk:
    """Answers lines of batches."""

    def __init__(self, fleet: Fleet, limits: Limits) -> None:
        self._fleet, self._strict = fleet, limits.strict
        self.guard: Guard | None = None

    def handlers(self, caller: Caller) -> dict[str, batches.Handler]:
        """Url -> what answers a line of a caller's."""
        work = self._fleet.work

        def handler(kind: type, answer: Answer) -> batches.Handler:
            async def handle(line: bytes) -> Response:
                async with work.line(len(line)):
                    return await answered(line)

            async def answered(line: bytes) -> Response:
                body, ignored = await work.check(len(line), batches.body_of, line, kind, self._strict)
                noted.say("/v1/batches", ignored)
                if getattr(body, "stream", None):
                    raise ApiError(400, "a batch has no streams", param="stream")
                mine = replace(caller, n_bytes=len(line), held=[])
                try:
                    return await answer(await self._fleet.find(body.model, mine), body, mine)
                finally:
                    mine.let_go()

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
        return self.guard.in_background(owner, client)


def asked_of(body: Any) -> str | None:
    """The model that a body names; Ollama's clients may call it ``name``."""
    return body.model or getattr(body, "name", None)


def no_files() -> ApiError:
    """What is told where no files are kept."""
    return ApiError(501, "this server keeps no files; start it with --files FOLDER", code="no_files")


class Endpoints:
    """Makes the endpoints of one server.

    Args:
        fleet: its models.
        store: where files and batches are kept; None: they are not.
    """

    def __init__(self, fleet: Fleet, limits: Limits, store: FileStore | None) -> None:
        self.fleet, self.limits = fleet, limits
        self.desk = Desk(fleet, limits)
        self.pulls = Pulls(fleet)
        self.jobs = None if store is None else BatchJobs(store, self.desk)
        self._files = None if store is None else FileRoutes(store, limits)
        self._experts: dict[str, status.Experts] = {}
        self._read = partial(fields.read, strict=limits.strict)

    async def parsed(self, request: Request, kind: type) -> Any:
        """The body as a ``kind``; large ones are read beside the event loop."""
        # curl without a header, as Ollama's documentation shows it; pages of other origins never get as far as this.
        forms = ("application/json", *(ollama.KINDS if request.url.path.startswith("/api/") else ()))
        raw = await read_body(request, self.limits, forms)
        request.state.caller.n_bytes = len(raw)
        body: Any
        if len(raw) <= INLINE_BYTES:
            body, ignored = self._read(raw, kind)
        else:
            body, ignored = await unless_gone(request, self.fleet.work.check(len(raw), self._read, raw, kind))
        request.state.ignored = ignored
        return body

    def generates(self, kind: type, whole: Answer, stream: Answer) -> Endpoint:
        """Answers of a model, whole or as they are written."""

        async def endpoint(request: Request) -> Response:
            body: Any = await self.parsed(request, kind)
            return await self._answered(request, stream if body.stream else whole, body)

        return endpoint

    def simple(self, kind: type, answer: Answer) -> Endpoint:
        """One answer to one body."""

        async def endpoint(request: Request) -> Response:
            return await self._answered(request, answer, await self.parsed(request, kind))

        return endpoint

    async def _answered(self, request: Request, answer: Answer, body: Any) -> Response:
        """What answers, of the model that the body names; loaded first, where it comes on demand."""
        caller: Caller = request.state.caller

        async def made() -> Response:
            service = await self.fleet.find(asked_of(body), caller, self._keep_alive(request, body))
            return await answer(service, body, caller)

        response: Response = await unless_gone(request, made())
        return response

    def _keep_alive(self, request: Request, body: Any) -> float | None:
        """How long the body would have the model stay afterwards; only models on demand ever leave."""
        given = getattr(body, "keep_alive", None)
        if given is None:
            return None
        if self.fleet.on_demand is None:
            request.state.ignored = [*request.state.ignored, "keep_alive"]
        try:
            return keep_alive_s(given)
        except ConfigError as error:
            raise ApiError(400, str(error), param="keep_alive") from None

    def of_ollama(self, kind: type) -> Endpoint:
        """Ollama's answers; without a prompt, a model is loaded, or with ``keep_alive`` 0 let go."""

        async def endpoint(request: Request) -> Response:
            body: Any = await self.parsed(request, kind)
            if ollama.asks_nothing(body) and self._keep_alive(request, body) == 0:
                self.fleet.show((asked_of(body) or "").removesuffix(":latest"))
                self.fleet.unload(asked_of(body))
                return ollama.nothing(body, "unload")
            return await self._answered(request, ollama.ask, body)

        return endpoint

    def shown(self, kind: type, answer: Callable[[Listed, Any], Awaitable[Response]]) -> Endpoint:
        """What is known of a model without loading it."""

        async def endpoint(request: Request) -> Response:
            body: Any = await self.parsed(request, kind)
            name = (asked_of(body) or "").removesuffix(":latest")
            if not name:
                raise ApiError(400, "a request needs the name of a model", param="model")
            await self.fleet.look_again()
            return await answer(self.fleet.show(name), body)

        return endpoint

    def managed(self, answer: Callable[[OllamaModel, Caller], Awaitable[Response]]) -> Endpoint:
        """What brings models here, and what takes them away."""

        async def endpoint(request: Request) -> Response:
            body: OllamaModel = await self.parsed(request, OllamaModel)
            response: Response = await unless_gone(request, answer(body, request.state.caller))
            return response

        return endpoint

    def about(self, answer: Callable[[Service], Response]) -> Endpoint:
        """What is asked of one model, by ``?model=``; of the first where none is named."""

        async def endpoint(request: Request) -> Response:
            name = request.query_params.get("model")
            service = await unless_gone(request, self.fleet.find(name, request.state.caller))
            service.check_model(name)
            return answer(service)

        return endpoint

    def experts(self, answer: Callable[[status.Experts, Listed], Response]) -> Endpoint:
        """What is asked of the experts of one model; it is not loaded for that."""

        async def endpoint(request: Request) -> Response:
            one = self.fleet.show(request.query_params.get("model"))
            return answer(self._experts.setdefault(one.card.name, status.Experts()), one)

        return endpoint

    def document(self) -> dict[str, Any]:
        """What /openapi.json says."""
        return document(self.fleet.names(), strict=self.limits.strict)

    async def batch(self, request: Request) -> Response:
        """Lines that are answered at once, or the name of a file that is answered in the background."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() == "application/json":
            body = await self.parsed(request, BatchRequest)
            if self.jobs is None:
                raise no_files()
            return json_response(self.jobs.create(body, request.state.caller))
        raw = await read_body(request, self.limits, ("application/jsonl", "application/x-ndjson", "application/json"))
        handlers = self.desk.handlers(request.state.caller.step_back())
        checked = self.fleet.work.check(len(raw), batches.run, raw, handlers)
        answer: Response = await unless_gone(request, checked)
        return answer

    async def usage(self, request: Request) -> Response:
        """What the caller has used, and may."""
        assert self.desk.guard is not None, "the server has been built"
        return self.desk.guard.usage(request.state.caller)

    async def ready(self, request: Request) -> Response:
        """Whether a token can be made now."""
        response: Response = await unless_gone(request, status.ready(self.fleet))
        return response

    async def models(self, _: Request) -> Response:
        """All of them."""
        return await status.models(self.fleet)

    async def tags(self, _: Request) -> Response:
        """Ollama's list of them."""
        return await ollama_models.tags(self.fleet)

    async def one_model(self, request: Request) -> Response:
        """One of /models."""
        return status.one_model(self.fleet, request.path_params["name"])

    async def docs(self, request: Request) -> Response:
        """The page that shows the interface."""
        text = docs_page.page(self.document(), self.fleet.default, str(request.base_url).rstrip("/"))
        headers = {**PAGE_HEADERS, "content-security-policy": docs_page.CSP}
        return Response(text, headers=headers, media_type="text/html")

    def of_files(self) -> list[tuple[str, str, Endpoint]]:
        """(method, path, endpoint) of everything about files and the batches made of them."""
        return of_files(self._files, self.jobs)


def of_files(files: FileRoutes | None, jobs: BatchJobs | None) -> list[tuple[str, str, Endpoint]]:
    """(method, path, endpoint) of everything about files and the batches made of them."""

    async def refuse(_: Request) -> Response:
        raise no_files()

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


def plain(answer: Callable[[], Response]) -> Endpoint:
    """What needs nothing of the request."""

    async def endpoint(_: Request) -> Response:
        return answer()

    return endpoint
