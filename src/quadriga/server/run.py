"""A server's life: listen, drain on the first signal, leave at once on the second, and never outlive the engine.

SIGTERM ─► new requests: 503 ─► answers under way end ─► nobody is let in ─► the process ends
                                    │ drain_s
                                    └► whatever still runs gets an error, as an event where it is a stream

the engine fails ─► every answer gets an error ─► a few seconds of 503 for whoever asks ─► the process ends with 70

Whatever hangs, a kernel or a library, the process is gone a few seconds after the drain's deadline: by ``os._exit``,
with every thread's place in the log, where the interpreter would wait for a thread that never returns.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

import uvicorn

from quadriga.errors import ConfigError, EngineError, QuadrigaError
from quadriga.server.app import LAST_STEP_S, build
from quadriga.server.files import FileStore
from quadriga.server.fleet import Fleet
from quadriga.server.guard import Guard, Limits
from quadriga.server.protocol import GuardedProtocol
from quadriga.server.service import Service
from quadriga.server.tracing import Spans

_log = logging.getLogger(__name__)

EXIT_FAILED = 70
"""The engine failed, or something hung beyond every deadline (EX_SOFTWARE in sysexits.h): start the server again."""

KEEP_ALIVE_S = 15
_LAST_WORDS_S = 2
"""After the drain's deadline: time for the errors to reach their clients."""

FAILED_S = 5
"""So long a server whose engine has failed answers 503: balancers see it, and clients read why. Then it ends."""

_GRACE_S = 1
"""After all of these, the process ends itself, and has as long again for its last words."""


class Served(Protocol):
    """What a server's life is about: its models, or the replicas that have them."""

    draining: bool
    on_failure: Callable[[], None]

    @property
    def failed(self) -> bool:
        """It computes no more, without having been told to end."""
        ...

    @property
    def stuck(self) -> bool:
        """Something of it does not end by being asked."""
        ...

    async def prepare(self) -> None:
        """What must be there before anybody is answered."""
        ...

    def drop_all(self, error: QuadrigaError) -> None:
        """End every request with an error."""
        ...


class Server(uvicorn.Server):
    """uvicorn's server: a first signal drains, any second one ends the process, and so does the engine's end.

    Args:
        drain_s: seconds that answers under way get.
        stay_on_failure: go on answering 503 when the engine has failed, until a signal comes.
    """

    def __init__(self, config: uvicorn.Config, service: Served, drain_s: float, stay_on_failure: bool = False) -> None:
        super().__init__(config)
        self._service, self._drain_s, self._stay = service, drain_s, stay_on_failure
        self._alarm: threading.Timer | None = None
        service.on_failure = self._engine_failed

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT."""
        if self.should_exit:
            os._exit(1)  # at once: whatever is under way was told to end long ago
        self._leave()
        self._end_in(self._drain_s + _LAST_WORDS_S + LAST_STEP_S + _GRACE_S)

    def _engine_failed(self) -> None:
        if self._stay:
            _log.error("the engine has failed and the server stays: it answers 503 until a signal ends it")
            return
        _log.error("the engine has failed: this process ends with exit code %d in %g s", EXIT_FAILED, FAILED_S)
        asyncio.get_running_loop().call_later(FAILED_S, self._leave)
        self._end_in(FAILED_S + self._drain_s + _LAST_WORDS_S + LAST_STEP_S + _GRACE_S)

    def _leave(self) -> None:
        self.should_exit = self._service.draining = True

    def _end_in(self, seconds: float) -> None:
        """End the process then, whatever it is doing. Not where the server is a guest in one of its threads."""
        if self._alarm is None and threading.current_thread() is threading.main_thread():
            self._alarm = threading.Timer(seconds, give_up)
            self._alarm.daemon = True
            self._alarm.start()

    def disarm(self) -> None:
        """The process may go on: the server has ended in time."""
        if self._alarm is not None:
            self._alarm.cancel()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer requests to the end."""
        await self._service.prepare()
        await super().serve(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the answers under way, no longer than the deadline; whoever comes meanwhile is told (503)."""
        error = EngineError("the server is shutting down and this answer took too long")
        alarm = asyncio.get_running_loop().call_later(self._drain_s, self._service.drop_all, error)
        under_way = set(self.server_state.tasks)
        if under_way:
            _, late = await asyncio.wait(under_way, timeout=self._drain_s + _LAST_WORDS_S)
            for task in late:
                task.cancel()
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


def listen_at(path: Path) -> socket.socket:
    """A listening socket that is a file; one that nobody listens at any more is taken away first.

    Raises:
        ConfigError: the file cannot be had.
    """
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket() and not _answers(path):
            path.unlink()
        server.bind(str(path))
        path.chmod(0o660)
    except OSError as error:
        server.close()
        raise ConfigError(f"cannot listen at {path}: {error.strerror or error}") from None
    server.listen(1024)
    return server


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        return client.connect_ex(str(path)) == 0


@dataclass(frozen=True)
class Certificate:
    """What a server shows of itself: its certificate (and those between it and a known one), and the key to it.

    Raises:
        ConfigError: they cannot be read, or do not belong together.
    """

    chain: Path
    key: Path

    def __post_init__(self) -> None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.chain, self.key, password=_no_password)
        except (OSError, ssl.SSLError, ValueError) as error:
            reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
            raise ConfigError(
                f"--tls-cert {self.chain} and --tls-key {self.key} must be a PEM certificate and its key without a "
                f"password: {reason}"
            ) from None


def _no_password() -> str:
    raise ValueError("the key has a password")


def give_up() -> None:
    """End this process without waiting for its threads, and say in the log where each of them is."""
    words = threading.Thread(target=_last_words, daemon=True)
    words.start()
    words.join(_GRACE_S)  # a thread that hangs may hold the log
    os._exit(EXIT_FAILED)


def _last_words() -> None:
    _log.critical("this process does not end by itself: leaving with exit code %d; its threads are at", EXIT_FAILED)
    faulthandler.dump_traceback(sys.__stderr__ or 2)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def serve(
    service: Service | Fleet,
    limits: Limits,
    server: socket.socket,
    *,
    drain_s: int = 30,
    stay_on_failure: bool = False,
    started: Callable[[], None] | None = None,
    store: FileStore | None = None,
    certificate: Certificate | None = None,
    spans: Spans | None = None,
) -> None:
    """Answer requests until a signal comes, or the engine fails.

    Args:
        service: the model, or the models.
        server: from :func:`listen`.
        drain_s: seconds that answers under way get after the first signal.
        stay_on_failure: do not end when the engine fails; answer 503 until a signal comes.
        started: called when requests are answered.
        store: where files and batches are kept; None: they are not.
        certificate: speak TLS, and nothing else.
        spans: where a span of every request goes; None: there are none.

    Raises:
        SystemExit: with EXIT_FAILED, after the drain, if the engine failed; in the main thread only.
    """
    fleet = service if isinstance(service, Fleet) else Fleet([service])
    run(build(fleet, limits, store), fleet, server, drain_s, stay_on_failure, started, certificate, spans)


def run(
    app: Guard,
    served: Served,
    server: socket.socket,
    drain_s: int = 30,
    stay_on_failure: bool = False,
    started: Callable[[], None] | None = None,
    certificate: Certificate | None = None,
    spans: Spans | None = None,
) -> None:
    """An application's life; see :func:`serve`.

    Args:
        served: what the application answers for.
    """
    config = uvicorn.Config(
        app,
        http=GuardedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=drain_s + _LAST_WORDS_S,
        ssl_certfile=None if certificate is None else str(certificate.chain),
        ssl_keyfile=None if certificate is None else str(certificate.key),
    )
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    loop = Server(config, served, drain_s, stay_on_failure)
    if started is not None:
        original = loop.startup

        async def startup(sockets: list[socket.socket] | None = None) -> None:
            await original(sockets)
            started()

        loop.startup = startup  # type: ignore[method-assign]
    app.spans = spans
    loop.run(sockets=[server])
    if spans is not None:
        spans.close()
    loop.disarm()
    if threading.current_thread() is not threading.main_thread():
        return  # a guest: the process is somebody else's
    if served.stuck:
        give_up()  # the interpreter would free what the engine's thread still computes with, or wait for it
    if served.failed:
        raise SystemExit(EXIT_FAILED)
