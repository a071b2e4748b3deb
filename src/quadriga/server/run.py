"""A server's life: listen, drain on the first signal, leave at once on the second."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from quadriga.errors import ConfigError
from quadriga.server.app import build
from quadriga.server.guard import Limits
from quadriga.server.protocol import GuardedProtocol
from quadriga.server.service import Service

KEEP_ALIVE_S = 15


class Server(uvicorn.Server):
    """uvicorn's server: a first signal drains, any second one ends the process."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT."""
        if self.should_exit:
            os._exit(1)  # at once: whatever is under way was told to end long ago
        self.should_exit = self._service.draining = True


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
        timeout_graceful_shutdown=drain_s,
    )
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    loop = Server(config, service)
    if started is not None:
        original = loop.startup

        async def startup(sockets: list[socket.socket] | None = None) -> None:
            await original(sockets)
            started()

        loop.startup = startup  # type: ignore[method-assign]
    loop.run(sockets=[server])
