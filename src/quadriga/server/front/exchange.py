"""One request to a replica, and the answer as it comes: over its socket, HTTP/1.1, a connection for each.

A connection to a socket file costs some 0.1 ms; none is kept, so none can be closed by the other side just then.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httptools

_READ_BYTES = 1 << 16

Headers = Sequence[tuple[bytes, bytes]]


class Lost(Exception):
    """The replica is not there, or was gone before its answer was complete."""


class Exchange(ABC):
    """A request and its answer, however the replica is reached. Close it when done."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []

    @abstractmethod
    async def ask(self, method: str, target: bytes, headers: Headers, body: bytes) -> None:
        """Send a request and read the head of its answer.

        Raises:
            Lost: see the class.
        """

    @abstractmethod
    def pieces(self) -> AsyncIterator[bytes]:
        """The answer's body as it comes.

        Raises:
            Lost: see the class.
        """

    @abstractmethod
    def close(self) -> None:
        """End it; a replica that still computes for it is told so by that."""

    async def whole(self) -> bytes:
        """The answer's body."""
        return b"".join([piece async for piece in self.pieces()])

    def header(self, name: bytes) -> bytes:
        """A header of the answer; empty where it has none of that name."""
        return next((value for key, value in self.headers if key == name), b"")


class SocketExchange(Exchange):
    """See the module docstring.

    Args:
        socket: where the replica listens.
    """

    def __init__(self, socket: Path) -> None:
        super().__init__()
        self._socket = socket
        self._parser = httptools.HttpResponseParser(self)
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._pieces: list[bytes] = []
        self._has_head = self._complete = False

    async def ask(self, method: str, target: bytes, headers: Headers, body: bytes) -> None:
        """See :class:`Exchange`."""
        head = [b"%s %s HTTP/1.1" % (method.encode(), target), b"connection: close"]
        head += [b"%s: %s" % pair for pair in headers]
        if not any(name == b"host" for name, _ in headers):
            head.append(b"host: localhost")
        head.append(b"content-length: %d" % len(body))
        try:
            self._reader, self._writer = await asyncio.open_unix_connection(str(self._socket))
            self._writer.write(b"\r\n".join(head) + b"\r\n\r\n")
            self._writer.write(body)
            with contextlib.suppress(ConnectionError):  # it may answer before it has read all, and close
                await self._writer.drain()
        except OSError as error:
            raise Lost(f"no connection: {error}") from None
        while not self._has_head:
            await self._read()

    async def pieces(self) -> AsyncIterator[bytes]:
        """See :class:`Exchange`."""
        while True:
            pieces, self._pieces = self._pieces, []
            for piece in pieces:
                yield piece
            if self._complete:
                return
            await self._read()

    def close(self) -> None:
        """See :class:`Exchange`."""
        if self._writer is not None:
            self._writer.transport.abort()

    async def _read(self) -> None:
        assert self._reader is not None, "something was asked"
        try:
            data = await self._reader.read(_READ_BYTES)
            if not data:
                raise Lost("the connection was closed before the answer was complete")
            self._parser.feed_data(data)
        except (OSError, httptools.HttpParserError) as error:
            raise Lost(str(error)) from None

    # Called by httptools' parser -------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, one of those before the body."""
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """The head is there."""
        self.status, self._has_head = self._parser.get_status_code(), True

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        """All of it is there."""
        self._complete = True
