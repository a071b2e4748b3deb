"""A request's way to a replica and its answer's way back; to another replica where the first is lost before it answers.

    body ─► a replica ─► its head and its greeting, held back ─► the first token ─► sent on as it comes
                │ lost before that, full, or its engine has ended      │ lost after that
                └────────────► another replica                         └► an error, as an event of the stream

So nobody notices the loss of a replica but those whose streams had begun. A request is sent again once at most, in case
it is what replicas end of. Comments of a stream (pings) are sent on at once; they are no answer, and neither are the
events that interfaces begin a stream with before there is a token.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from quadriga.errors import QuadrigaError
from quadriga.server.errors import ApiError, as_api_error
from quadriga.server.front.exchange import Exchange, Lost
from quadriga.server.front.greeting import Begins, begins
from quadriga.server.front.replicas import Replica, Replicas
from quadriga.server.front.routing import Router
from quadriga.server.sse import json_response, left

MAX_LOST = 2
"""Replicas that a request may lose before it is given up."""

_REPORT_S = 5.0
"""A guard: what a request has used is told right after its answer."""

_OURS = (b"connection", b"transfer-encoding", b"content-length", b"date", b"server", b"x-request-id")
"""Headers of a replica's answer that are of its connection."""

_STREAMS = (b"text/event-stream", b"application/x-ndjson", b"application/jsonl")


@dataclass
class Errand:
    """What a replica is to be asked."""

    method: str
    path: str
    target: bytes
    """Path and query."""
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""
    pieces: list[bytes] = field(default_factory=list)
    """Of its prompt; see ``routing``."""
    n: int = 1
    """Sequences it asks for."""
    only: int | None = None
    """The replica that is meant; None: any."""
    used: Callable[[dict[str, Any]], None] = lambda _: None
    """Told what it has used."""


class Relay:
    """See the module docstring. Of one event loop.

    Args:
        router: chooses among the replicas.
    """

    def __init__(self, router: Router) -> None:
        self.replicas: Replicas
        self.router = router
        self.n_resent = 0
        """Requests that were sent to another replica."""
        self._under_way: set[_Answer] = set()
        self._reports: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._count = 0

    def report(self, said: dict[str, Any]) -> None:
        """A replica tells what a request has used."""
        waiting = self._reports.get(said["id"])
        if waiting is not None and not waiting.done():
            waiting.set_result(said)

    async def run(self, errand: Errand, send: Send) -> None:
        """Have it answered.

        Args:
            send: takes the answer's messages, as ASGI has them.

        Raises:
            ApiError: no replica is there to answer, and nothing has been sent.
        """
        answer = _Answer(errand, send)
        self._under_way.add(answer)
        try:
            await self._run(errand, answer)
        finally:
            self._under_way.discard(answer)

    async def _run(self, errand: Errand, answer: _Answer) -> None:
        tried: set[int] = set()
        n_lost = 0
        refused: tuple[Exchange, bytes] | None = None
        while n_lost < MAX_LOST:
            replica = self._choose(errand, tried)
            if replica is None:
                break
            tried.add(replica.number)
            self.n_resent += len(tried) > 1
            replica.n_open += errand.n
            assert replica.child is not None, "what is ready has been started"
            answer.again()
            exchange = answer.exchange = replica.child.exchange()
            try:
                refused = await self._try(errand, exchange, answer)
                if refused is None:
                    return
                n_lost += refused[0].status == 503
            except Lost:
                n_lost += 1
                if answer.dropped is not None:
                    await answer.fail(answer.dropped)
                    return
                if answer.begun:
                    await answer.fail(ApiError(503, "the replica that made this answer was lost", code="replica_lost"))
                    return
            finally:
                replica.n_open -= errand.n
                exchange.close()
        if refused is not None:
            await answer.whole(*refused)
        else:
            why = "the replicas that were asked have been lost" if n_lost else "no replica is ready to answer"
            await answer.fail(ApiError(503, why, code="replica_lost" if n_lost else "not_ready", retry_after_s=1))

    def drop_all(self, error: QuadrigaError) -> None:
        """End every answer under way with an error."""
        for answer in list(self._under_way):
            answer.dropped = as_api_error(error)
            if answer.exchange is not None:
                answer.exchange.close()

    async def whole(self, errand: Errand) -> Response:
        """Have it answered in one piece: a line of a batch, or what is put together with others' answers.

        Raises:
            ApiError: no replica is there to answer.
        """
        status, body = 500, b""

        async def gather(message: Message) -> None:
            nonlocal status, body
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                body += message["body"]

        await self.run(errand, gather)
        return Response(body, status, media_type="application/json")

    def _choose(self, errand: Errand, tried: set[int]) -> Replica | None:
        able = (r for r in self.replicas.ready if r.number not in tried and errand.only in (None, r.number))
        loads = {replica.number: replica.n_open for replica in able}
        if not loads:
            return None
        number = self.router.choose(errand.pieces, loads)
        self.router.learn(errand.pieces, number)
        return self.replicas.all[number]

    async def _try(self, errand: Errand, exchange: Exchange, answer: _Answer) -> tuple[Exchange, bytes] | None:
        """Ask one replica.

        Returns:
            None: it has answered. Else its refusal, which another replica might not give.

        Raises:
            Lost: it has not, or not to the end.
        """
        self._count += 1
        name = f"relay-{self._count}"
        told = self._reports[name] = asyncio.get_running_loop().create_future()
        try:
            headers = [*errand.headers, (b"x-request-id", name.encode())]
            await exchange.ask(errand.method, errand.target, headers, errand.body)
            kind = exchange.header(b"content-type").split(b";")[0]
            if kind in _STREAMS:
                async for piece in exchange.pieces():
                    await answer.piece(exchange, piece)
                await answer.end(exchange)
            else:
                body = await exchange.whole()
                if exchange.status in (429, 503):
                    return exchange, body
                await answer.whole(exchange, body)
            with contextlib.suppress(TimeoutError):
                errand.used(await asyncio.wait_for(told, _REPORT_S))
            return None
        finally:
            del self._reports[name]


class _Answer:
    """What a client is sent."""

    def __init__(self, errand: Errand, send: Send) -> None:
        self._errand, self._send = errand, send
        self._has_head = False
        self.begun = False
        """There is something of the answer itself."""
        self._held = b""  # what its stream has begun with
        self.exchange: Exchange | None = None
        """With the replica that was asked last."""
        self.dropped: ApiError | None = None
        """Why it is given up."""

    async def _head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if not self._has_head:
            self._has_head = True
            await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _body(self, body: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def piece(self, exchange: Exchange, piece: bytes) -> None:
        """A piece of a stream."""
        if not self.begun:
            comments = _is_comment(piece)
            if not comments:
                self._held += piece
                kind = begins(self._held, exchange.header(b"content-type"))
                if kind is Begins.FAILURE:
                    raise Lost("its engine has ended")
                self.begun = kind is Begins.ANSWER
            if not (comments or self.begun):
                return
            piece = piece if comments else self._held
        await self._head(exchange.status, _passed_on(exchange))
        await self._body(piece, more=True)

    async def end(self, exchange: Exchange) -> None:
        """The end of a stream."""
        await self._head(exchange.status, _passed_on(exchange))
        await self._body(b"" if self.begun else self._held, more=False)

    def again(self) -> None:
        """Another replica is asked: what the last one began with is not the answer's."""
        self._held = b""

    async def whole(self, exchange: Exchange, body: bytes) -> None:
        """An answer that is no stream; where a stream has begun, as its last event."""
        if self._has_head:
            said = _message_of(body)
            await self.fail(ApiError(exchange.status, said))
            return
        await self._head(exchange.status, [*_passed_on(exchange), (b"content-length", b"%d" % len(body))])
        await self._body(body, more=False)

    async def fail(self, error: ApiError) -> None:
        """An error: as an answer, or as the last event of a stream.

        Raises:
            ApiError: nothing has been sent yet.
        """
        if not self._has_head:
            raise error
        raw = msgspec.json.encode(error.body(self._errand.path))
        if self._errand.path.startswith("/api/"):
            event = raw + b"\n"
        elif "/messages" in self._errand.path:
            event = b"event: error\ndata: " + raw + b"\n\n"
        else:
            event = b"data: " + raw + b"\n\ndata: [DONE]\n\n"
        await self._body(event, more=False)


def _is_comment(piece: bytes) -> bool:
    return all(not line or line.startswith(b":") for line in piece.split(b"\n"))


def _passed_on(exchange: Exchange) -> list[tuple[bytes, bytes]]:
    return [pair for pair in exchange.headers if pair[0] not in _OURS]


def _message_of(body: bytes) -> str:
    try:
        error = msgspec.json.decode(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (msgspec.DecodeError, LookupError, TypeError):
        return "the replica that answers could not go on"


class Relayed(Response):
    """An answer that a replica gives, as a response of the front; given up when the client leaves.

    Args:
        ended: called when it is over, however.
    """

    def __init__(self, relay: Relay, errand: Errand, ended: Callable[[], None] = lambda: None) -> None:
        self._relay, self._errand, self._ended = relay, errand, ended
        self.status_code, self.background = 200, None
        self.init_headers({})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._relay.run(self._errand, send))
        watch = asyncio.create_task(left(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except ApiError as error:  # nothing has been sent yet
            await json_response(error.body(self._errand.path), error.status, error.headers)(scope, receive, send)
        finally:
            self._ended()
            watch.cancel()
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await work
            del work
