"""A small HTTP/1.1 client for measuring servers: every event of a stream with the time at which it came.

Not a general client: no redirects, no proxies, no compression. It exists because what a load generator spends on an
event is taken from the server beside it: this one spends some 20 us, a full client several times that.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools

from quadriga.errors import ConfigError

CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Target:
    """Where a server's interface is."""

    host: str
    port: int
    prefix: str
    """What stands before /chat/completions, e.g. "/v1"."""
    tls: bool
    key: str | None

    @property
    def authority(self) -> str:
        """The Host header."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == (443 if self.tls else 80) else f"{name}:{self.port}"


def target(url: str, key: str | None = None) -> Target:
    """A URL such as ``http://127.0.0.1:8000`` or ``https://llm.example.org/v1``; /v1 is added where it lacks.

    Raises:
        ConfigError: it is none.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise ConfigError(f"a URL looks like http://127.0.0.1:8000 or https://llm.example.org/v1; got {url!r}")
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ConfigError("an API key is printable ASCII")
    prefix = parts.path.rstrip("/")
    if not prefix.endswith("/v1"):
        prefix += "/v1"
    tls = parts.scheme == "https"
    return Target(parts.hostname, port or (443 if tls else 80), prefix, tls, key)


@dataclass
class Exchange:
    """One answer as it came."""

    status: int = 0
    body: bytearray = field(default_factory=bytearray)
    """All of it, unless it is a stream of events."""
    events: list[tuple[float, bytes]] = field(default_factory=list)
    """(time.perf_counter() at arrival, data) of server-sent events."""
    started: float = 0.0
    ended: float = 0.0


class Connection(asyncio.Protocol):
    """One connection, one request at a time. Kept open between requests as long as the server does."""

    def __init__(self, at: Target) -> None:
        self._at = at
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._reset()

    async def request(self, method: str, path: str, body: bytes = b"") -> Exchange:
        """One request and its whole answer.

        Args:
            path: below the target's prefix, e.g. "/chat/completions".

        Raises:
            OSError: no connection, or it was lost before the answer was complete.
        """
        if self._transport is None or self._transport.is_closing():
            loop = asyncio.get_running_loop()
            tls = ssl.create_default_context() if self._at.tls else None
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await loop.create_connection(lambda: self, self._at.host, self._at.port, ssl=tls)
        assert self._transport is not None, "connection_made has been called"
        self._reset()
        done = self._done = asyncio.get_running_loop().create_future()
        head = [f"{method} {self._at.prefix}{path} HTTP/1.1", f"host: {self._at.authority}", "accept: */*"]
        if body:
            head += ["content-type: application/json", f"content-length: {len(body)}"]
        if self._at.key:
            head.append(f"authorization: Bearer {self._at.key}")
        self._exchange.started = time.perf_counter()
        self._transport.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)
        try:
            await done
        except BaseException:
            self.close()
            raise
        self._exchange.ended = time.perf_counter()
        if not self._parser.should_keep_alive():
            self.close()
        return self._exchange

    def close(self) -> None:
        """Give the connection up."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def _reset(self) -> None:
        self._exchange = Exchange()
        self._parser = httptools.HttpResponseParser(self)
        self._is_stream = False
        self._rest = b""
        self._now = 0.0
        self._done = None

    def _end(self, error: OSError | None) -> None:
        if self._done is not None and not self._done.done():
            if error is None:
                self._done.set_result(None)
            else:
                self._done.set_exception(error)

    # asyncio's side --------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Bytes."""
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(ConnectionError(f"what came is no HTTP: {error}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The server is gone."""
        self._transport = None
        self._end(ConnectionResetError("the connection was lost before the answer was complete"))

    # httptools' side -------------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        if name.lower() == b"content-type":
            self._is_stream = value.startswith(b"text/event-stream")

    def on_headers_complete(self) -> None:
        """All headers."""
        self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """A piece of the body: whole events are taken off."""
        if not self._is_stream:
            self._exchange.body += body
            return
        *events, self._rest = (self._rest + body).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    self._exchange.events.append((self._now, line[5:].strip()))

    def on_message_complete(self) -> None:
        """The end of the answer."""
        self._end(None)
