"""Servers for tests: a tiny random MoE in this process, and the default model behind the real command."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from quadriga import LLM
from quadriga.engine.engine import Engine
from quadriga.kernels.arrays import arrays
from quadriga.nn.transformer import random_parameters
from quadriga.runners.compiled import CompiledModel, pack_parameters
from quadriga.server.files import FileStore
from quadriga.server.fleet import Fleet
from quadriga.server.guard import Limits
from quadriga.server.run import Certificate, Server, listen, serve
from quadriga.server.service import Service
from quadriga.text.chat import CHATML
from quadriga.text.tokenizer import Tokenizer
from tests.checkpoint.models import TINY
from tests.waiting import HANG_S, until

DRAIN_S = 30
"""What a test's server gives answers under way when it is told to end."""


class Bytes:
    """One token a byte, and one end token."""

    n_vocab = 257

    def encode(self, text: str, allow_special: bool) -> list[int]:
        first, *rest = text.split("<|end|>") if allow_special else [text]
        ids = list(first.encode())
        for part in rest:
            ids += [256, *part.encode()]
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


def tiny_llm(*, n_blocks: int = 64, max_sequences: int = 8, n_rows: int = 257, **engine: Any) -> LLM:
    """A random DBRX over bytes: 4 layers, 5 experts.

    Args:
        n_rows: of the embedding and the head; the model likes those beyond the vocabulary's 257 best.
        engine: options of its engine.
    """
    torch.manual_seed(0)
    config = replace(TINY["dbrx"], vocab_size=n_rows, max_seq_len=1024)
    parameters = random_parameters(config, std=0.3)
    parameters["lm_head.weight"][257:] *= 30
    runner = CompiledModel(config, pack_parameters(arrays(parameters), "q8"), threads=1, n_blocks=n_blocks)
    special = {"<|end|>": 256}
    tokenizer = Tokenizer(Bytes(), special_ids=special, eos_ids=(256,), chat_template=CHATML)
    llm = LLM(runner, tokenizer, max_sequences=max_sequences)
    if engine:
        ends = frozenset(llm.end_ids)
        llm.engine = Engine(runner, tokenizer, end_ids=ends, max_sequences=max_sequences, **engine)
    return llm


@dataclass
class Live:
    """A server that answers."""

    url: str
    service: Any
    """The first model; None where none is loaded."""
    client: httpx2.Client
    server: Server
    loop: asyncio.AbstractEventLoop

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        """POST JSON."""
        return self.client.post(path, json=body, **options)

    def metric(self, name: str) -> float:
        """A number from /metrics."""
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith((name + "{", name + " ")):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {name}")

    def loop_thread(self) -> str:
        """The name of the thread that runs its event loop."""

        async def name() -> str:
            return threading.current_thread().name

        return asyncio.run_coroutine_threadsafe(name(), self.loop).result(HANG_S)

    def connect(self, body: Any, path: str = "/v1/completions", receive_bytes: int = 0) -> socket.socket:
        """A connection on which a request has been sent."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.socket()
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.connect((host, int(port)))
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        connection.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(raw) + raw)
        return connection

    def settled(self) -> bool:
        """Wait until nothing runs; True if every block and place is free again."""

        def idle() -> bool:
            stats = self.service.llm.engine.stats()
            return not (stats.n_running or stats.n_waiting or stats.kv_blocks_used or self.service.engine.n_open)

        return until(idle)


@contextlib.contextmanager
def running(
    llm: LLM | Fleet,
    limits: Limits | None = None,
    *,
    max_waiting: int = 16,
    stay_on_failure: bool = False,
    aliases: Sequence[str] = (),
    store: FileStore | None = None,
    beside: Sequence[Service] = (),
    listener: socket.socket | None = None,
    certificate: Certificate | None = None,
) -> Iterator[Live]:
    """A server in a thread of this process, of a model called tiny or of a fleet."""
    if isinstance(llm, Fleet):
        fleet = llm
    else:
        service = Service(llm, name="tiny", aliases=aliases, max_waiting=max_waiting)
        fleet = Fleet([service, *beside])
    listener, up = listener or listen("127.0.0.1", 0), threading.Event()
    name = listener.getsockname()
    url = "http://localhost" if isinstance(name, str) else f"http://127.0.0.1:{name[1]}"
    servers: list[Server] = []
    original = Server.__init__

    def remember(self: Server, config: Any, *args: Any) -> None:
        config.loop = "asyncio"  # whose clock can be stopped
        original(self, config, *args)
        servers.append(self)

    Server.__init__ = remember  # type: ignore[method-assign]
    how = {"drain_s": DRAIN_S, "stay_on_failure": stay_on_failure, "store": store, "certificate": certificate}
    loops: list[asyncio.AbstractEventLoop] = []

    def started() -> None:
        loops.append(asyncio.get_running_loop())
        up.set()

    options = {**how, "started": started}
    thread = threading.Thread(target=serve, args=(fleet, limits or Limits(), listener), kwargs=options, daemon=True)
    thread.start()
    assert up.wait(HANG_S), "the server starts"
    Server.__init__ = original  # type: ignore[method-assign]
    # A connection for each request: one that rests may be closed while it is used again, when a test moves the clock.
    fresh = httpx2.Limits(max_keepalive_connections=0)
    with httpx2.Client(base_url=url, timeout=HANG_S, limits=fresh) as client:
        yield Live(url, fleet.services[0] if fleet.services else None, client, servers[0], loops[0])
    servers[0].should_exit = True
    thread.join(HANG_S)
    assert not thread.is_alive(), "the server ends"


class Gate:
    """Lets a server's model compute one pass at a time."""

    def __init__(self, live: Live) -> None:
        self._passes, self._live = threading.Semaphore(0), live
        self._n_begun = self._n_let = 0
        self._runner = live.service.llm.engine.runner
        self._forward = self._runner.forward

    def __enter__(self) -> Gate:
        def forward(batch: Any, **wanted: Any) -> Any:
            self._n_begun += 1
            assert self._passes.acquire(timeout=HANG_S), "a pass is let through"
            return self._forward(batch, **wanted)

        self._runner.forward = forward  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.forward = self._forward  # type: ignore[method-assign]
        self._passes.release(10_000)

    def let(self, n: int = 1) -> None:
        """Let n passes through, if there are that many."""
        self._n_let += n
        self._passes.release(n)

    def hold(self) -> None:
        """Wait until a pass has begun that is not let through; the engine's thread stays in it."""
        assert until(lambda: self._n_begun > self._n_let)

    def open(self, n: int = 1) -> None:
        """Let n passes through, and wait until they are over."""
        done = self._live.service.llm.engine.stats().n_steps + n
        self.let(n)
        assert until(lambda: self._live.service.llm.engine.stats().n_steps >= done)


class StoppedClock:
    """Stops the clock of a server's event loop: its timers fire when a test says so, and never before.

    Timeouts keep the lengths they have in use, and nothing that a test does is ever too slow for one.
    """

    def __init__(self, live: Live) -> None:
        self._loop = live.loop

    def __enter__(self) -> StoppedClock:
        self._running, self._now = self._loop.time, self._loop.time()
        self._loop.time = lambda: self._now  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        running, ahead = self._running, self._now - self._running()
        self._loop.time = lambda: running() + ahead  # type: ignore[method-assign]
        self._wake()

    def advance(self, seconds: float) -> None:
        """Let so much time pass at once; timers that come due fire in their order."""
        self._now += seconds
        self._wake()

    def waits(self, seconds: float) -> bool:
        """True if a timer will fire after so many seconds more."""
        timers: list[asyncio.TimerHandle] = list(self._loop._scheduled)  # type: ignore[attr-defined]
        return any(not t.cancelled() and abs(t.when() - self._now - seconds) < 1e-3 for t in timers)

    def _wake(self) -> None:
        self._loop.call_soon_threadsafe(lambda: None)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Live]:
    """A random model, open to everybody on this machine."""
    with running(tiny_llm()) as live:
        yield live


@contextlib.contextmanager
def command(*arguments: str, env: dict[str, str] | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """``quadriga serve`` as a process of its own; (its address, the process)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "quadriga", "serve", *arguments, "--port", "0", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (env or {}),
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        found = re.search(r"http://[\d.]+:\d+", line)
        assert found, line + process.stderr.read()
        yield found[0], process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="session")
def smol(smollm2: Path) -> Iterator[str]:
    """The default model's address."""
    with command() as (url, _):
        yield url
