"""A front for tests: replicas in this process that say what a test tells them to say."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from quadriga.server.files import FileStore
from quadriga.server.front.app import Front, build_front
from quadriga.server.front.exchange import SocketExchange
from quadriga.server.front.replicas import Child, Report
from quadriga.server.guard import Limits
from quadriga.server.run import Server, listen, run
from tests.waiting import HANG_S

Script = Callable[["Asked"], Awaitable[None]]


@dataclass
class Asked:
    """A request that a replica has, and the way back."""

    replica: FakeReplica
    method: str
    path: str
    headers: dict[str, str]
    body: Any
    writer: asyncio.StreamWriter
    reader: asyncio.StreamReader

    async def answer(self, body: Any, status: int = 200, **headers: str) -> None:
        """A whole answer."""
        raw = json.dumps(body).encode() if not isinstance(body, bytes) else body
        lines = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(raw)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + raw)
        await self.writer.drain()
        self.used(3, 2)

    async def head(self, kind: str = "text/event-stream") -> None:
        """The head of a stream."""
        self.writer.write(f"HTTP/1.1 200 X\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        await self.writer.drain()

    async def piece(self, raw: bytes) -> None:
        """A piece of it; b"" is its end."""
        self.writer.write(b"%x\r\n%s\r\n" % (len(raw), raw))
        await self.writer.drain()
        if not raw:
            self.used(5, 4)

    async def event(self, body: Any) -> None:
        """An event of it."""
        await self.piece(b"data: " + (body if isinstance(body, bytes) else json.dumps(body).encode()) + b"\n\n")

    def used(self, prompt: int, answer: int) -> None:
        """What the request has used, told as a replica tells it."""
        said = {"id": self.headers["x-request-id"], "model": "m", "prompt": prompt, "answer": answer}
        self.replica.report(said)

    async def left(self) -> None:
        """Wait until the front has given it up."""
        await self.reader.read()


@dataclass
class FakeReplica:
    """One that runs in the front's own loop."""

    number: int
    socket: Path
    report: Report
    script: Script
    asked: list[Asked] = field(default_factory=list)

    async def listen(self) -> None:
        """Begin to answer."""
        self.socket.unlink(missing_ok=True)
        self._gone: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._server = await asyncio.start_unix_server(self._serve, str(self.socket))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        raw = await reader.readexactly(int(headers["content-length"]))
        asked = Asked(self, method, path, headers, json.loads(raw) if raw else None, writer, reader)
        self.asked.append(asked)
        try:
            await self.script(asked)
        finally:
            writer.close()

    def exchange(self) -> SocketExchange:
        """See ``Child``."""
        return SocketExchange(self.socket)

    async def ready(self) -> bool:
        """See ``Child``."""
        return True

    async def ended(self) -> int:
        """See ``Child``."""
        return await asyncio.shield(self._gone)

    def tell_to_end(self) -> None:
        """See ``Child``."""
        self.die(0)

    def kill(self) -> None:
        """See ``Child``."""
        self.die(9)

    def die(self, code: int = 9) -> None:
        """It is gone, and its connections with it."""
        if not self._gone.done():
            self._server.close()
            for asked in self.asked:
                asked.writer.transport.abort()
            self._gone.set_result(code)


@dataclass
class Fronted:
    """A front that answers."""

    front: Front
    url: str
    client: httpx2.Client
    loop: asyncio.AbstractEventLoop
    server: Server
    started: list[FakeReplica]
    """All replicas ever, in the order in which they were started."""

    def now(self, number: int) -> FakeReplica:
        """The replica of a number."""
        return [replica for replica in self.started if replica.number == number][-1]

    def call(self, work: Callable[[], Any]) -> None:
        """Do something in the front's loop."""
        self.loop.call_soon_threadsafe(work)


@contextlib.contextmanager
def fronting(
    folder: Path, script: Script, *, n: int = 2, limits: Limits | None = None, store: FileStore | None = None, drain_s: int = 30
) -> Iterator[Fronted]:  # fmt: skip
    """A front in a thread of this process, before replicas that do what a script says."""
    started: list[FakeReplica] = []

    async def launch(number: int, report: Report) -> Child:
        replica = FakeReplica(number, folder / f"{len(started)}.sock", report, script)
        started.append(replica)
        await replica.listen()
        return replica

    front, up, loops, servers = Front(["m"], n, launch), threading.Event(), [], []
    original = Server.__init__

    def remember(self: Server, *args: Any, **given: Any) -> None:
        original(self, *args, **given)
        servers.append(self)

    def begun() -> None:
        loops.append(asyncio.get_running_loop())
        up.set()

    Server.__init__ = remember  # type: ignore[method-assign]
    listener = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(
        target=run,
        args=(build_front(front, limits or Limits(), store), front, listener),
        kwargs={"started": begun, "drain_s": drain_s},
        daemon=True,
    )
    thread.start()
    assert up.wait(HANG_S), "the front starts"
    Server.__init__ = original  # type: ignore[method-assign]
    with httpx2.Client(base_url=url, timeout=HANG_S) as client:
        yield Fronted(front, url, client, loops[0], servers[0], started)
    servers[0].should_exit = True
    thread.join(HANG_S)
    assert not thread.is_alive(), "the front ends"
