"""A small HTTP/1.1 client for measuring servers: it records every event of a stream with its time of arrival.

It is not a general client: no redirects, proxies or compression. It exists because a load generator takes CPU time from
a server on the same machine: this client needs about 20 us per event, a full client several times that.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools

from quadriga.errors import ConfigError

CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Target:
    """The address of a server's API, and the API key."""

    host: str
    port: int
    prefix: str
    """The path before /chat/completions, e.g. "/v1"."""
    tls: bool
    key: str | None

    @property
    def authority(self) -> str:
        """Host and port for the Host header; a default port is left out."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == (443 if self.tls else 80) else f"{name}:{self.port}"


def target(url: str, key: str | None = None) -> Target:
    """Parse a URL such as ``http://127.0.0.1:8000`` or ``https://llm.example.org/v1``; /v1 is added if missing.

    Raises:
        ConfigError: not such a URL, or an impossible key.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise ConfigError(f"the URL must look like http://127.0.0.1:8000 or https://llm.example.org/v1; got {url!r}")
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ConfigError("the API key must be printable ASCII")
    prefix = parts.path.rstrip("/")
    if not prefix.endswith("/v1"):
        prefix += "/v1"
    tls = parts.scheme == "https"
    return Target(parts.hostname, port or (443 if tls else 80), prefix, tls, key)


def said(body: bytes) -> str:
    """What a refusal says, at most 160 characters: the message of its JSON, or its text."""
    try:
        found = json.loads(body)
        error = found.get("error", found)
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, LookupError, AttributeError):
        text = body.decode(errors="replace")
    return str(text)[:160]


@dataclass
class Exchange:
    """One response, with arrival times."""

    status: int = 0
    body: bytearray = field(default_factory=bytearray)
    """The whole body; empty if it is a stream of events."""
    events: list[tuple[float, bytes]] = field(default_factory=list)
    """(time.perf_counter() at arrival, data) of server-sent events."""
    started: float = 0.0
    ended: float = 0.0


class Connection(asyncio.Protocol):
    """A connection for one request at a time, kept open between requests as long as the server allows."""

    def __init__(self, at: Target) -> None:
        self._at = at
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._reset()

    async def request(self, method: str, path: str, body: bytes = b"", *, kind: str = "application/json") -> Exchange:
        """Send a request and wait for the complete response.

        Args:
            path: relative to the target's prefix, e.g. "/chat/completions".
            kind: content type of the body.

        Raises:
            OSError: no connection, or it was lost before the response was complete.
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
            head += [f"content-type: {kind}", f"content-length: {len(body)}"]
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
        """Close the connection."""
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

    # Called by asyncio -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport of a new connection."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Pass received bytes to the HTTP parser."""
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(ConnectionError(f"the response is not valid HTTP: {error}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the current request, because the connection was closed."""
        self._transport = None
        self._end(ConnectionResetError("the connection was lost before the response was complete"))

    # Called by httptools' parser -------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note whether the response is a stream of events."""
        if name.lower() == b"content-type":
            self._is_stream = value.startswith(b"text/event-stream")

    def on_headers_complete(self) -> None:
        """Store the status code."""
        self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """Store a piece of the body, or split off and time the complete events in it."""
        if not self._is_stream:
            self._exchange.body += body
            return
        *events, self._rest = (self._rest + body).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    self._exchange.events.append((self._now, line[5:].strip()))

    def on_message_complete(self) -> None:
        """Complete the current request."""
        self._end(None)
