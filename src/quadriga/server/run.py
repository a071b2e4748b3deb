"""A server's life: listen, drain on the first signal, leave at once on the second.

SIGTERM ─► no new requests ─► answers under way end ─► the process ends
                                    │ drain_s
                                    └► whatever still runs gets an error, as an event where it is a stream
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from quadriga.errors import ConfigError, EngineError
from quadriga.server.app import build
from quadriga.server.guard import Limits
from quadriga.server.protocol import GuardedProtocol
from quadriga.server.service import Service

KEEP_ALIVE_S = 15
_LAST_WORDS_S = 2
"""After the drain's deadline: time for the errors to reach their clients."""


class Server(uvicorn.Server):
    """uvicorn's server: a first signal drains, any second one ends the process."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float) -> None:
        super().__init__(config)
        self._service, self._drain_s = service, drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT."""
        if self.should_exit:
            os._exit(1)  # at once: whatever is under way was told to end long ago
        self.should_exit = self._service.draining = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the answers under way, no longer than the deadline."""
        error = EngineError("the server is shutting down and this answer took too long")
        alarm = asyncio.get_running_loop().call_later(self._drain_s, self._service.engine.drop_all, error)
        await super().shutdown(sockets)
        alarm.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ConfigError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host.strip("[]"), port))
    except (OSError, OverflowError) as error:
        server.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', error)}") from None
    server.listen(1024)
    return server


def serve(
    service: Service,
    limits: Limits,
    server: socket.socket,
    *,
    drain_s: int = 30,
    started: Callable[[], None] | None = None,
) -> None:
    """Answer requests until a signal comes.

    Args:
        server: from :func:`listen`.
        drain_s: seconds that answers under way get after the first signal.
        started: called when requests are answered.
    """
    config = uvicorn.Config(
        build(service, limits),
        http=GuardedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=drain_s + _LAST_WORDS_S,
    )
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    loop = Server(config, service, drain_s)
    if started is not None:
        original = loop.startup

        async def startup(sockets: list[socket.socket] | None = None) -> None:
            await original(sockets)
            started()

        loop.startup = startup  # type: ignore[method-assign]
    loop.run(sockets=[server])
