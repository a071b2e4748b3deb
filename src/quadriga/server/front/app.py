"""The routes of a front: what is of all replicas is put together here, everything else is passed on to one of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from quadriga.errors import QuadrigaError
from quadriga.server import batches
from quadriga.server.app import bug, http_error
from quadriga.server.batch_jobs import BatchJobs, BatchRequest
from quadriga.server.caller import Caller
from quadriga.server.endpoints import Endpoint, no_files, of_files
from quadriga.server.errors import ApiError, as_api_error
from quadriga.server.fields import read
from quadriga.server.files import FileRoutes, FileStore
from quadriga.server.front import merged
from quadriga.server.front.relay import Errand, Relay, Relayed
from quadriga.server.front.replicas import Launch, Replicas
from quadriga.server.front.routing import Router, pieces_of, sequences_of
from quadriga.server.guard import CALLER, Guard, Limits, caller_header, read_body, take_body
from quadriga.server.metrics import Metrics
from quadriga.server.page import PAGE, page_routes
from quadriga.server.schema import parse, parse_json
from quadriga.server.sse import Gone, json_response, unless_gone
from quadriga.server.work import Work

_PASSED = ("host", "content-type", "content-encoding")
_LINES = ("application/jsonl", "application/x-ndjson")
_OF_BATCHES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")


class Front:
    """A server whose answers replicas make.

    Args:
        names: what the model is called; the first is its own.
        n: replicas.
        launch: starts one.
    """

    def __init__(self, names: list[str], n: int, launch: Launch) -> None:
        self.names = names
        self.router, self.work, self.metrics = Router(), Work(), Metrics()
        self.relay = Relay(self.router)
        self.replicas = Replicas(n, launch, report=self.relay.report, lost=self.router.forget)
        self.relay.replicas = self.replicas
        self.metrics.registry.register(merged.FrontCollector(self.replicas, self.relay, self.router))
        self.on_failure: Callable[[], None] = lambda: None
        self.draining = False
        self.failed = self.stuck = False
        """Never: a replica that fails is started again."""

    async def prepare(self) -> None:
        """Start the replicas.

        Raises:
            EngineError: one of them cannot be started.
        """
        await self.replicas.start()

    async def stop(self, _: float) -> None:
        """End the replicas; their clients have gone already."""
        await self.replicas.stop()
        self.work.close()

    def drop_all(self, error: QuadrigaError) -> None:
        """End every request with an error."""
        self.relay.drop_all(error)

    # Requests --------------------------------------------------------------------------------------------------------

    async def errand(self, caller: Caller, method: str, path: str, query: bytes, headers: Any, body: bytes) -> Errand:
        """What a replica is asked for a client.

        Raises:
            ApiError: the server ends; or the client has used what it may.
        """
        if self.draining and method == "POST":
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=5)
        target = path.encode() + (b"?" + query if query else b"")
        passed = [(name.encode(), headers[name].encode("latin-1")) for name in _PASSED if name in headers]
        passed.append((CALLER.encode(), caller_header(caller)))
        errand = Errand(method, path, target, passed, body)
        if body:
            errand.pieces, errand.n = await self.work.check(len(body), _looked_at, body, caller.salt)
        return errand

    async def enter(self, caller: Caller, errand: Errand) -> Callable[[], None]:
        """Take an errand's sequences from its client's account.

        Returns:
            what gives them back, once, with the tokens that were used.

        Raises:
            ApiError: it may have no more.
        """
        spent = [0, 0]

        def used(said: dict[str, Any]) -> None:
            caller.usage.model, caller.usage.first_s = said["model"], said.get("first_s")
            spent[:] = said["prompt"], said["answer"]

        errand.used = used
        await caller.enter(errand.n)
        return lambda: caller.leave(errand.n, *spent)

    async def passed_on(self, request: Request, limits: Limits) -> Response:
        """Any request, answered by a replica."""
        body = bytearray()

        async def keep(piece: bytes) -> None:
            body.extend(piece)

        await take_body(request, limits, limits.max_body_bytes, keep)
        caller: Caller = request.state.caller
        path, query = request.scope["path"], request.scope.get("query_string", b"")
        errand = await self.errand(caller, request.method, path, query, request.headers, bytes(body))
        if request.method != "POST":
            return Relayed(self.relay, errand)
        return Relayed(self.relay, errand, await self.enter(caller, errand))

    async def from_all(self, path: str, caller: Caller) -> list[bytes]:
        """What every replica that is ready says at a path.

        Raises:
            ApiError: none does.
        """

        async def one(number: int) -> bytes | None:
            errand = Errand("GET", path, path.encode(), [(CALLER.encode(), caller_header(caller))], only=number)
            with_error = await asyncio.gather(self.relay.whole(errand), return_exceptions=True)
            return bytes(with_error[0].body) if isinstance(with_error[0], Response) else None

        said = await asyncio.gather(*(one(replica.number) for replica in self.replicas.ready))
        found = [body for body in said if body is not None]
        if not found:
            raise ApiError(503, "no replica is ready to answer", code="not_ready", retry_after_s=1)
        return found


def _looked_at(body: bytes, salt: bytes) -> tuple[list[bytes], int]:
    """(hashes of its prompt, sequences it asks for); of what is no JSON, the replica will say so."""
    try:
        parsed = parse_json(body)
    except ApiError:
        return [], 1
    return pieces_of(parsed, salt), sequences_of(parsed)


class FrontDesk:
    """Has lines of batches answered by replicas; see ``endpoints.Desk``."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self.guard: Guard | None = None

    def handlers(self, caller: Caller) -> dict[str, batches.Handler]:
        """Url -> what answers a line of a caller's."""
        return {url: partial(self._answer, url, caller) for url in _OF_BATCHES}

    async def _answer(self, url: str, caller: Caller, line: bytes) -> Response:
        async with self._front.work.line(len(line)):
            return await self._answered(url, caller, line)

    async def _answered(self, url: str, caller: Caller, line: bytes) -> Response:
        body = parse(line, batches.Line).body
        if body.get("stream"):
            raise ApiError(400, "a batch has no streams", param="stream")
        front, headers = self._front, {"content-type": "application/json"}
        errand = await front.errand(caller, "POST", url, b"", headers, msgspec.json.encode(body))
        ended = await front.enter(caller, errand)
        try:
            return await front.relay.whole(errand)
        finally:
            ended()

    def caller(self, owner: str, client: str) -> Caller | None:
        """Who a batch in the background is for; None where its key is none of this server's any more."""
        assert self.guard is not None, "the server has been built"
        return self.guard.in_background(owner, client)


class _Routes:
    """What is answered here."""

    def __init__(self, front: Front, limits: Limits, desk: FrontDesk, jobs: BatchJobs | None) -> None:
        self._front, self._limits, self._desk, self._jobs = front, limits, desk, jobs

    async def health(self, _: Request) -> Response:
        """200 while a replica answers."""
        front = self._front
        n_ready, n = len(front.replicas.ready), len(front.replicas.all)
        state = "draining" if front.draining else "ok" if n_ready else "failed"
        return json_response({"status": state, "replicas": {"ready": n_ready, "of": n}}, 200 if n_ready else 503)

    async def usage(self, request: Request) -> Response:
        """What the caller has used, and may."""
        assert self._desk.guard is not None, "the server has been built"
        return self._desk.guard.usage(request.state.caller)

    async def ready(self, request: Request) -> Response:
        """200 once a token has been made, by each replica that is there."""
        if self._front.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=5)
        said = [msgspec.json.decode(raw) for raw in await self._front.from_all("/ready", request.state.caller)]
        slow = [one["ms"] for one in said if one.get("status") == "ready"]
        if not slow:
            raise ApiError(503, "no replica can make a token just now", code="not_ready", retry_after_s=1)
        return json_response({"status": "ready", "ms": max(slow), "replicas": {"ready": len(slow), "of": len(said)}})

    async def metrics(self, _: Request) -> Response:
        """All replicas' and the front's own, on one page."""
        pages = {"front": self._front.metrics.text().decode()}
        for replica in self._front.replicas.ready:
            errand = Errand("GET", "/metrics", b"/metrics", [], only=replica.number)
            found = (await asyncio.gather(self._front.relay.whole(errand), return_exceptions=True))[0]
            if isinstance(found, Response):
                pages[str(replica.number)] = bytes(found.body).decode()
        return Response(merged.metrics(pages), media_type="text/plain; version=0.0.4")

    async def experts(self, request: Request) -> Response:
        """What the experts of all replicas have seen."""
        said = await self._front.from_all("/v1/experts", request.state.caller)
        return json_response(merged.experts([msgspec.json.decode(one) for one in said]))

    async def reset(self, request: Request) -> Response:
        """All replicas' counts begin again."""
        for replica in self._front.replicas.ready:
            errand = Errand("POST", "/v1/experts/reset", b"/v1/experts/reset", [], only=replica.number)
            await self._front.relay.whole(errand)
        return await self.experts(request)

    async def batch(self, request: Request) -> Response:
        """Lines that are answered at once, or the name of a file that is answered in the background."""
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind == "application/json":
            raw = await read_body(request, self._limits)
            body, _ = read(raw, BatchRequest, strict=self._limits.strict)
            if self._jobs is None:
                raise no_files()
            return json_response(self._jobs.create(body, request.state.caller))
        raw = await read_body(request, self._limits, _LINES)
        handlers = self._desk.handlers(request.state.caller.step_back())
        return await unless_gone(request, self._front.work.check(len(raw), batches.run, raw, handlers))  # type: ignore[no-any-return]


async def _no_adapters(_: Request) -> Response:
    raise ApiError(400, "adapters come with --adapter where a server has replicas; start it again with them")


def build_front(front: Front, limits: Limits, store: FileStore | None = None) -> Guard:
    """The ASGI application of a front.

    Args:
        limits: who may ask, and how much.
        store: where files and batches are kept; None: they are not.
    """
    desk = FrontDesk(front)
    jobs = None if store is None else BatchJobs(store, desk)
    own = _Routes(front, limits, desk, jobs)
    rows: list[tuple[str, str, Endpoint]] = [
        ("GET", "/health", own.health),
        ("GET", "/ready", own.ready),
        ("GET", "/usage", own.usage),
        ("GET", "/metrics", own.metrics),
        ("GET", "/experts", own.experts),
        ("POST", "/experts/reset", own.reset),
        ("POST", "/batches", own.batch),
        ("POST", "/load_lora_adapter", _no_adapters),
        ("POST", "/unload_lora_adapter", _no_adapters),
        *of_files(None if store is None else FileRoutes(store, limits), jobs),
    ]
    routes = [Route(p + path, _answered(front, e), methods=[m]) for p in ("", "/v1") for m, path, e in rows]
    rest = _answered(front, lambda request: front.passed_on(request, limits))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        if jobs is not None:
            await jobs.start()
        yield
        if jobs is not None:
            await jobs.stop()
        await front.stop(0.0)

    app = Starlette(
        routes=[*routes, *page_routes(PAGE), Route("/{path:path}", rest, methods=["GET", "POST", "DELETE"])],
        lifespan=lifespan,
        exception_handlers={HTTPException: http_error, Exception: bug},
    )
    guard = desk.guard = Guard(app, limits)
    guard.on_refusal = front.metrics.refuse
    return guard


def _answered(front: Front, endpoint: Endpoint) -> Endpoint:
    """The endpoint, its refusals as answers."""

    async def answered(request: Request) -> Response:
        try:
            return await endpoint(request)
        except (Gone, ClientDisconnect):
            return Response(status_code=499)
        except QuadrigaError as error:
            front.metrics.refuse(error)
            shown = as_api_error(error)
            return json_response(shown.body(request.url.path), shown.status, shown.headers)

    return answered
