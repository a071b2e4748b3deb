"""uvicorn's HTTP protocol with what it lacks: limits for heads, for bodies nobody reads, and for readers that stop.

Without them a client may send header lines for ever, or one byte a minute, or leave an answer unread, and hold a
connection and what it waits for each time.

A client may also send its next request while an answer is under way. uvicorn then reads no more, and takes the next
request for the one that is answered: it never learns that the client has left. Here what comes ahead of its time is
kept, up to a size, so that the end of the connection is read, and it ends whatever the connection has.

And a client may offer to speak another protocol (``Upgrade: h2c``, which Java's HTTP client does with every request).
The offer is not taken, and the request is one like any other (RFC 9110, 7.8). The parser would read nothing behind its
head, so that the body were lost: it gets the head again without the offer.

Pieces of a stream need not pass the application's layers one by one: a request's scope has a :class:`BodyWriter`.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import weakref
from typing import Any

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from quadriga.server.sse import DIRECT

MAX_HEAD_BYTES = 64 << 10
HEAD_TIMEOUT_S = 10.0
STALL_TIMEOUT_S = 60.0
"""A client that has not taken what was sent for this long is cut off."""
REST_TIMEOUT_S = 10.0
"""For the rest of a body that nobody reads, once its answer is out."""
MAX_AHEAD_BYTES = 1 << 20
"""Of later requests, kept while an answer is under way; a client that sends more is cut off."""
LINGER_S = 1.0
"""How long a refused connection is read on, so that its answer arrives."""

_OFFERS = (b"upgrade", b"http2-settings")

_ANSWER = b"HTTP/1.1 %s\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class BodyWriter:
    """Writes pieces of an answer's body to its connection, as ``RequestResponseCycle.send`` does; see ``sse.Direct``.

    Args:
        cycle: the request and its answer. It holds this, by its scope, and is not held: a circle would keep what the
            request brought until the collector comes by.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = weakref.ref(cycle)

    @property
    def is_open(self) -> bool:
        """A body of chunks is under way, and what was written has not gathered: the client keeps up."""
        cycle = self._cycle()
        return (
            cycle is not None
            and cycle.response_started
            and not (cycle.response_complete or cycle.disconnected or cycle.flow.write_paused)
            and cycle.chunked_encoding is True
            and cycle.scope["method"] != "HEAD"
        )

    def write(self, piece: bytes) -> None:
        """Send a piece that is not empty; only while it is open."""
        cycle = self._cycle()
        assert cycle is not None, "it is open"
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))


class GuardedProtocol(HttpToolsProtocol):
    """See the module docstring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._in_head = True
        self._refused = False
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._rest_due: asyncio.TimerHandle | None = None
        self._answered: RequestResponseCycle | None = None  # the request whose answer is under way, or was the last
        self._ahead = bytearray()
        self._fed = b""  # what the parser is at
        self._plain_head: bytes | None = None  # of a request with an offer, without it

    def connection_made(self, transport: Any) -> None:
        """A connection: its first head is due."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of it."""
        self._stop_clock()
        self._reads_again()
        if self._rest_due is not None:
            self._rest_due.cancel()
        for cycle in (self._answered, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads more slowly than we write: it must take something within a time."""
        self._stalled = asyncio.get_running_loop().call_later(STALL_TIMEOUT_S, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        """It has."""
        self._reads_again()
        super().resume_writing()

    def _reads_again(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def on_response_complete(self) -> None:
        """An answer is out. If the request's body is not all in, the rest is waited for, but not for ever."""
        unread = not self._in_head and not self.pipeline  # with a pipeline, what comes belongs to a later request
        super().on_response_complete()
        if unread and not self.transport.is_closing():
            self._rest_due = asyncio.get_running_loop().call_later(REST_TIMEOUT_S, self.transport.close)
        if self._ahead and not self._is_ahead() and not self.transport.is_closing():
            data, self._ahead = bytes(self._ahead), bytearray()
            self.data_received(data)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answered = cycle
        cycle.scope["extensions"] = {**(cycle.scope.get("extensions") or {}), DIRECT: BodyWriter(cycle)}  # type: ignore[dict-item]
        super()._start_asgi_task(cycle, app)

    def _is_ahead(self) -> bool:
        """What comes now belongs to a later request than the one whose answer is under way."""
        answered = self._answered
        if answered is None or answered.response_complete:
            return False
        return self.cycle is not answered or not answered.more_body

    def data_received(self, data: bytes) -> None:
        """Bytes: those of a head are counted, those ahead of their time are kept."""
        if self._refused:
            return
        if self._is_ahead():
            self._ahead += data
            if len(self._ahead) > MAX_AHEAD_BYTES:
                self.transport.abort()
            return
        if self._in_head:
            if self._deadline is None:
                self._expect_head()
            self._head_bytes += len(data)
            # A body may have come with the head; what counts is a head that is still not complete.
            begun = self._head_bytes
            if begun > MAX_HEAD_BYTES and b"\r\n\r\n" not in data[: MAX_HEAD_BYTES + 4]:
                self._refuse(b"431 Request Header Fields Too Large")
                return
        self._fed = data
        super().data_received(data)
        self._fed = b""
        if self.pipeline:
            self.flow.resume_reading()  # the end of the connection is to be seen

    def on_message_begin(self) -> None:
        """The first bytes of a head have been read."""
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A whole head."""
        self._in_head, self._head_bytes = False, 0
        self._stop_clock()
        method = self.parser.get_method()
        if self.parser.should_upgrade() and method != b"CONNECT":
            lines = [b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())]
            self._plain_head = b"\r\n".join([*lines, *map(b": ".join, _without_offers(self.headers)), b"", b""])
            return
        super().on_headers_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """The parser has stopped behind a head with an offer: another one goes on without it."""
        head, self._plain_head = self._plain_head, None
        stopped = sys.exc_info()[1]
        if head is None or not isinstance(stopped, httptools.HttpParserUpgrade):
            return
        rest = self._fed[stopped.args[0] :]
        self.parser = httptools.HttpRequestParser(self)
        with contextlib.suppress(AttributeError):  # an older httptools; as uvicorn does
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.data_received(head + rest)

    def on_message_complete(self) -> None:
        """A whole request: the next one may begin when it likes, within the keep-alive time."""
        self._in_head = True
        if self._plain_head is not None:
            return
        if self._rest_due is not None:
            self._rest_due.cancel()
            self._rest_due = None
            # The answer is out already, and its keep-alive clock was stopped by what came after it.
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        super().on_message_complete()

    def _expect_head(self) -> None:
        self._deadline = asyncio.get_running_loop().call_later(HEAD_TIMEOUT_S, self._too_slow)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        self._refuse(b"408 Request Timeout")

    def _refuse(self, status: bytes) -> None:
        if self.transport.is_closing() or self._refused:
            return
        self._refused = True
        self.transport.write(_ANSWER % status)
        # Closing with bytes unread would reset the connection, and the answer would be lost on its way.
        if self.transport.can_write_eof():
            with contextlib.suppress(OSError):  # it is gone, and nobody has noticed yet
                self.transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_S, self.transport.close)


def _without_offers(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers without what offers another protocol."""
    kept = [(name, value) for name, value in headers if name not in (*_OFFERS, b"connection")]
    tokens = [token.strip() for name, value in headers if name == b"connection" for token in value.split(b",")]
    tokens = [token for token in tokens if token and token.lower() not in _OFFERS]
    return [*kept, (b"connection", b", ".join(tokens))] if tokens else kept
