"""Where a server is reached, and what it says there when it answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket


@dataclass(frozen=True)
class Door:
    """Where a server is reached."""

    listener: socket.socket
    host: str
    unix_socket: Path | None
    tls: bool
    with_key: bool

    def greet(self, names: Sequence[str], more: Sequence[str]) -> None:
        """Say what is served here, and how to ask for it."""
        from quadriga.server.guard import is_loopback

        place = "localhost"
        if self.unix_socket is None:
            shown = f"[{self.host}]" if ":" in self.host else self.host
            place = f"{shown}:{self.listener.getsockname()[1]}"
        _greet(names, more, f"{'https' if self.tls else 'http'}://{place}", self.unix_socket, self.with_key)
        if self.unix_socket is None and not is_loopback(self.host) and not self.with_key:
            print("warning: reachable from other machines without an API key; see --api-key", file=sys.stderr)


@contextmanager
def open_door(host: str, port: int, unix_socket: Path | None, *, tls: bool, with_key: bool) -> Iterator[Door]:
    """Listen; a socket file goes when the server does."""
    from quadriga.server.run import listen, listen_at

    listener = listen(host, port) if unix_socket is None else listen_at(unix_socket)
    try:
        yield Door(listener, host, unix_socket, tls, with_key)
    finally:
        if unix_socket is not None:
            unix_socket.unlink(missing_ok=True)


def _greet(names: Sequence[str], more: Sequence[str], address: str, socket: Path | None, with_key: bool) -> None:
    """Say what is served where, and how to ask for it."""
    key = ' -H "Authorization: Bearer $KEY"' if with_key else ""
    body = f'{{"model": "{names[0]}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    at = address if socket is None else f"the socket {socket}"
    curl = "curl" if socket is None else f"curl --unix-socket {socket}"
    print(f"{', '.join(names)} at {at}  (chat page: {address}/, interface: {address}/docs)")
    for line in more:
        print(line)
    print(f"  {curl} {address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'", flush=True)
