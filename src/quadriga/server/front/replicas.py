"""The replicas of a front: started, watched, started again when they are lost, ended with it.

starting ──► ready ──► ended by itself ──► starting: at once, then after 1, 2, 4, ... 30 s while it does not come up
               └─────► told to end
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import msgspec

from quadriga.errors import EngineError
from quadriga.server.front.exchange import Exchange, SocketExchange
from quadriga.server.front.replica import Order

_log = logging.getLogger(__name__)

LONGEST_PAUSE_S = 30.0
_LAST_S = 3.0
"""For a replica that is told to end, and has nothing to do; then it is killed."""

Report = Callable[[dict[str, Any]], None]


class Child(Protocol):
    """A replica that has been started."""

    def exchange(self) -> Exchange:
        """A way to ask it something."""
        ...

    async def ready(self) -> bool:
        """Wait until it answers; False if it ended before."""
        ...

    async def ended(self) -> int:
        """Wait for its end; its exit code."""
        ...

    def tell_to_end(self) -> None:
        """It answers what is under way, and ends."""
        ...

    def kill(self) -> None:
        """It ends at once."""
        ...


Launch = Callable[[int, Report], Awaitable[Child]]
"""(number, who is told what requests have used) -> a replica on its way."""


class Process:
    """A replica in a process of its own; see ``replica``."""

    def __init__(self, process: asyncio.subprocess.Process, socket: Path, report: Report) -> None:
        self._process, self._socket = process, socket
        self._ready = asyncio.get_running_loop().create_future()
        self._lines = asyncio.create_task(self._listen(report))

    async def _listen(self, report: Report) -> None:
        assert self._process.stdout is not None, "it is a pipe"
        try:
            async for line in self._process.stdout:
                try:
                    said = json.loads(line)
                except ValueError:
                    continue  # a library's own words
                if "ready" not in said:
                    report(said)
                elif not self._ready.done():
                    self._ready.set_result(True)
        finally:
            if not self._ready.done():
                self._ready.set_result(False)

    @property
    def has_ended(self) -> bool:
        """It is gone."""
        return self._process.returncode is not None

    def exchange(self) -> Exchange:
        """See :class:`Child`."""
        return SocketExchange(self._socket)

    async def ready(self) -> bool:
        """See :class:`Child`."""
        return bool(await asyncio.shield(self._ready))

    async def ended(self) -> int:
        """See :class:`Child`."""
        code = await self._process.wait()
        await self._lines
        return code

    def tell_to_end(self) -> None:
        """See :class:`Child`."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """See :class:`Child`."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)


def launcher(order: Order, folder: Path) -> Launch:
    """Starts processes that serve what an order says, each at a socket of its own in a folder."""

    async def launch(number: int, report: Report) -> Child:
        socket = folder / f"replica-{number}.sock"
        hosting = order.hosting
        if hosting.prefix_cache is not None:  # two processes do not write into one
            hosting = replace(hosting, prefix_cache=f"{hosting.prefix_cache}/replica-{number}")
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "quadriga.server.front.replica",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in the terminal is for the front, which tells its replicas in its turn
        )
        assert process.stdin is not None, "it is a pipe"
        process.stdin.write(msgspec.json.encode(replace(order, socket=str(socket), hosting=hosting)) + b"\n")
        return Process(process, socket, report)

    return launch


class Replica:
    """One of them, whichever process it is just now."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.child: Child | None = None
        self.is_ready = False
        self.n_open = 0
        """Requests under way."""
        self.n_starts = 0
        self.code: int | None = None
        """With which the last one ended."""


class Replicas:
    """See the module docstring. Of one event loop.

    Args:
        n: how many.
        launch: starts one.
        report: told what each request has used.
        lost: told of each that has ended by itself.
        pause: waits between attempts.
    """

    def __init__(
        self,
        n: int,
        launch: Launch,
        *,
        report: Report,
        lost: Callable[[int], None],
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.all = [Replica(number) for number in range(n)]
        self._launch, self._report, self._lost, self._pause = launch, report, lost, pause
        self._tasks: list[asyncio.Task[None]] = []
        self._first: list[asyncio.Future[bool]] = []
        self._ending = False

    @property
    def ready(self) -> list[Replica]:
        """Those that answer."""
        return [replica for replica in self.all if replica.is_ready]

    async def start(self) -> None:
        """Start all of them, and wait until they answer.

        Raises:
            EngineError: one has ended instead; what it said is in the log.
        """
        loop = asyncio.get_running_loop()
        self._first = [loop.create_future() for _ in self.all]
        self._tasks = [asyncio.create_task(self._keep(replica)) for replica in self.all]
        if not all(await asyncio.gather(*self._first)):
            codes = ", ".join(str(r.code) for r in self.all if r.code is not None)
            await self.stop()
            raise EngineError(f"a replica ended before it answered, with exit code {codes}; it has said why")

    async def _keep(self, replica: Replica) -> None:
        """Start one again and again."""
        n_vain = 0
        while True:
            child = replica.child = await self._launch(replica.number, self._report)
            replica.n_starts += 1
            replica.is_ready = came = await child.ready()
            first = self._first[replica.number]
            if came and not first.done():
                first.set_result(True)
            replica.code = await child.ended()
            replica.is_ready = False
            if self._ending:
                return
            self._lost(replica.number)
            if not first.done():
                first.set_result(False)
                return
            n_vain = 0 if came else n_vain + 1
            pause_s = min(LONGEST_PAUSE_S, 2.0 ** (n_vain - 1)) if n_vain else 0.0
            text = "replica %d has ended with exit code %d; it is started again in %g s"
            _log.error(text, replica.number, replica.code, pause_s)
            await self._pause(pause_s)

    async def stop(self) -> None:
        """End all of them, those that do not end by being asked too."""
        self._ending = True
        for replica in self.all:
            replica.is_ready = False
            if replica.child is not None:
                replica.child.tell_to_end()
        _, late = await asyncio.wait(self._tasks, timeout=_LAST_S) if self._tasks else (set(), set())
        for replica in self.all:
            if replica.child is not None:
                replica.child.kill()  # where it has ended, it hears nothing of it
        for task in late:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
