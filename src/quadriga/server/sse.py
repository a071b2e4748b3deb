"""Answers over HTTP: server-sent events, and JSON that is given up when the client leaves.

Starlette lets a handler run to its end when the client of a plain answer is gone; here both kinds watch the connection,
and whatever was computing is dropped before the engine's next step.

A piece of a stream goes through ASGI's ``send``, a coroutine a layer of the application; or, where the client keeps up,
straight to its connection (:class:`Direct`): a third of what a token cost here was spent on the way between.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quadriga.errors import QuadrigaError
from quadriga.server.errors import ApiError, as_api_error, as_bug

PING_S = 10.0

DIRECT = "quadriga.direct"
"""The extension of a request's scope that holds the way to its connection, where the server has one."""

_encode = msgspec.json.Encoder().encode


class Direct(Protocol):
    """The way to a client's connection, for pieces of a body that need not wait."""

    @property
    def is_open(self) -> bool:
        """A body is under way, and the client has taken enough of it to be sent more."""
        ...

    def write(self, piece: bytes) -> None:
        """Send it; only while it is open."""
        ...


class Gone(Exception):
    """The client left."""


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(_encode(body), status, headers, media_type="application/json")


def part(body: Any) -> msgspec.Raw:
    """A part of a large answer, encoded by itself: the encoder lets no other thread run, so it works part by part."""
    return msgspec.Raw(_encode(body))


async def unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """Wait for ``work``, but give up when the client leaves.

    Raises:
        Gone: it left; the work has been cancelled.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(left(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        watch.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
        del task  # it holds the error, which holds this frame: what the request brought would stay for the collector


async def left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class TextEvent:
    """An event of which only one text changes from token to token: what stays is encoded once a stream.

    Args:
        body: the event with a text in it, once.
    """

    def __init__(self, body: Callable[[str], Any]) -> None:
        mark = secrets.token_hex(16)
        self._before, self._after = (b"data: " + _encode(body(mark)) + b"\n\n").split(_encode(mark))

    def with_text(self, text: str) -> bytes:
        """Its bytes."""
        return self._before + _encode(text) + self._after


class EventStream(Response):
    """Server-sent events made by ``produce(sender)``, which is cancelled when the client leaves.

    A client that stops reading is cut off by the connection (``protocol.STALL_TIMEOUT_S``), which looks the same.

    Args:
        produce: writes everything through the sender it is given.
        anthropic: whose shape an error after the beginning has.
    """

    media_type = "text/event-stream"
    pings = True

    def __init__(self, produce: Callable[[EventSender], Awaitable[None]], *, anthropic: bool = False) -> None:
        self._produce, self._anthropic = produce, anthropic
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sender = EventSender(send, scope.get("extensions", {}).get(DIRECT))
        tasks = [asyncio.create_task(t) for t in (self._run(sender), left(receive))]
        if self.pings:
            tasks.append(asyncio.create_task(sender.ping()))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(OSError):
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        if isinstance(ended[0], Exception):
            raise ended[0]  # a mistake of ours, for the log

    async def _run(self, sender: EventSender) -> None:
        try:
            await self._produce(sender)
        except QuadrigaError as error:
            self._fail(sender, as_api_error(error))
        except Exception as error:
            self._fail(sender, as_bug(error))
            await sender.flush()
            raise
        await sender.flush()

    def _fail(self, sender: EventSender, shown: ApiError) -> None:
        """The last event of a stream that cannot go on."""
        if self._anthropic:
            sender.event(shown.anthropic(), name="error")
        else:
            sender.event(shown.openai())
            sender.done()


class EventSender:
    """Writes events: gathered until :meth:`flush` or :meth:`push`, so that what came at once leaves at once."""

    def __init__(self, send: Send, direct: Direct | None = None) -> None:
        self._send, self._lock, self._parts = send, asyncio.Lock(), list[bytes]()
        self._direct = direct

    def event(self, body: Any, *, name: str | None = None) -> None:
        """One event."""
        head = b"" if name is None else b"event: " + name.encode() + b"\n"
        self._parts.append(head + b"data: " + _encode(body) + b"\n\n")

    def done(self) -> None:
        """OpenAI's last event."""
        self._parts.append(b"data: [DONE]\n\n")

    def raw(self, raw: bytes) -> None:
        """Bytes as they are."""
        self._parts.append(raw)

    async def ping(self) -> None:
        """A comment now and then, so that nothing between here and the client gives the connection up."""
        while True:
            await asyncio.sleep(PING_S)
            self.raw(b": ping\n\n")
            await self.flush()

    @property
    def is_open(self) -> bool:
        """What has gathered can leave now, without waiting and without overtaking anything: see :meth:`push`."""
        return self._direct is not None and not self._lock.locked() and self._direct.is_open

    def push(self) -> None:
        """Send what has gathered, in no time; only while it :attr:`is_open`."""
        assert self._direct is not None, "it is open"
        parts, self._parts = self._parts, []
        if parts:
            self._direct.write(b"".join(parts))

    async def flush(self) -> None:
        """Send what has gathered; waits while the client is behind in reading."""
        async with self._lock:
            parts, self._parts = self._parts, []
            if parts:
                await self._send({"type": "http.response.body", "body": b"".join(parts), "more_body": True})
