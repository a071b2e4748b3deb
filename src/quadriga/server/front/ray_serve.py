"""Replicas on the machines of a Ray cluster: Ray Serve places them, watches them and starts lost ones again.

    front (this process) ─► handle ─► Host, a deployment of one replica, on some machine ─► replica's socket there

Each replica is a deployment of its own, so that the front chooses which of them is asked: by the prompt's beginning, as
on one machine. Weights are read where a replica is: the model must be there, under the same name or path. Ray is the
extra ``cluster``.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from quadriga import runtime
from quadriga.errors import ConfigError
from quadriga.server.front.exchange import Exchange, Headers, Lost
from quadriga.server.front.replica import Order
from quadriga.server.front.replicas import Child, Launch, Process, Report, launcher

WATCH_S = 2.0
"""How often a replica is asked whether it is there."""

BEAT_S = 5.0
"""For its answer: where a node is gone, Ray Serve lets whoever asks wait until there is another."""


class Host:
    """What runs on a machine of the cluster: a replica, and the way to it."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._used: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._begin = asyncio.Lock()
        self._process: Child | None = None

    async def come(self) -> bool:
        """Start the replica, unless it is there; False if it cannot be started."""
        async with self._begin:
            if self._process is None:
                folder = Path(tempfile.mkdtemp(prefix="quadriga-"))
                self._process = await launcher(self._order, folder)(0, self._report)
            return await self._process.ready()

    async def check_health(self) -> None:
        """Asked by Ray Serve: one that raises is started again."""
        process = self._process
        if isinstance(process, Process) and process.has_ended:
            raise RuntimeError("the replica's process has ended")

    async def beat(self) -> None:
        """Asked by the front; raises where the replica is gone."""
        if self._process is None:
            raise RuntimeError("the replica has not been started")
        await self.check_health()

    async def ask(self, name: str, method: str, target: bytes, headers: Headers, body: bytes) -> AsyncIterator[Any]:
        """A request's answer: (status, headers), the pieces of its body, and what it has used, a dict."""
        process = self._process
        if process is None:
            raise RuntimeError("the replica has not been started")
        told = self._used[name] = asyncio.get_running_loop().create_future()
        exchange = process.exchange()
        try:
            await exchange.ask(method, target, headers, body)
            yield exchange.status, exchange.headers
            async for piece in exchange.pieces():
                yield piece
            with contextlib.suppress(TimeoutError):
                yield await asyncio.wait_for(told, 5.0)
        finally:
            exchange.close()
            del self._used[name]

    def _report(self, said: dict[str, Any]) -> None:
        waiting = self._used.get(said["id"])
        if waiting is not None and not waiting.done():
            waiting.set_result(said)


class RayExchange(Exchange):
    """A request to a replica through its deployment's handle.

    Args:
        report: told what it has used.
        gone: done when the replica is taken to be lost.
    """

    def __init__(self, handle: Any, report: Report, gone: asyncio.Future[None]) -> None:
        super().__init__()
        self._handle, self._report, self._gone = handle, report, gone
        self._answer: Any = None

    async def ask(self, method: str, target: bytes, headers: Headers, body: bytes) -> None:
        """See :class:`Exchange`."""
        name = next(value for key, value in headers if key == b"x-request-id").decode()
        streams = self._handle.options(stream=True)
        self._answer = streams.ask.remote(name, method, target, list(headers), body)
        self.status, self.headers = await self._next()

    async def pieces(self) -> AsyncIterator[bytes]:
        """See :class:`Exchange`."""
        while True:
            try:
                piece = await self._next()
            except StopAsyncIteration:
                return
            if isinstance(piece, dict):
                self._report(piece)
            else:
                yield piece

    def close(self) -> None:
        """See :class:`Exchange`."""
        if self._answer is not None:
            self._answer.cancel()

    async def _next(self) -> Any:
        step = asyncio.ensure_future(anext(self._answer))
        try:
            await asyncio.wait({step, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if not step.done():
                raise Lost("it does not answer")
            return step.result()
        except Lost:
            step.cancel()
            raise
        except (StopAsyncIteration, asyncio.CancelledError):
            raise
        except Exception as error:  # Ray's own, of many kinds: the actor died, its node is gone, it was restarted
            raise Lost(str(error).strip().splitlines()[-1]) from None


class RayChild:
    """A replica somewhere in the cluster; see ``replicas.Child``."""

    def __init__(self, handle: Any, report: Report, forget: Callable[[], None]) -> None:
        self._handle, self._report, self._forget = handle, report, forget
        self._told = asyncio.Event()
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def exchange(self) -> Exchange:
        """See :class:`Child`."""
        return RayExchange(self._handle, self._report, self._gone)

    async def ready(self) -> bool:
        """See :class:`Child`."""
        try:
            return bool(await self._handle.come.remote())
        except Exception:
            return False

    async def ended(self) -> int:
        """See :class:`Child`."""
        while not self._told.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), WATCH_S)
                return 0
            try:
                await asyncio.wait_for(self._handle.beat.remote(), BEAT_S)
            except Exception:
                self._gone.set_result(None)  # what was asked meanwhile is asked elsewhere
                return 1
        return 0

    def tell_to_end(self) -> None:
        """See :class:`Child`."""
        if not self._told.is_set():
            self._told.set()
            self._forget()

    def kill(self) -> None:
        """See :class:`Child`."""
        self.tell_to_end()


def ray_launcher(order: Order, address: str) -> Launch:
    """Starts replicas as deployments of Ray Serve, each with as many processors reserved as it has threads (1 if none).

    Args:
        address: of the cluster, or "auto" for the one that this machine belongs to.

    Raises:
        ConfigError: ray is not installed, or there is no cluster.
    """
    try:
        import ray
        from ray import serve
    except ModuleNotFoundError:
        raise ConfigError(f"--ray needs ray, which is not installed: {runtime.install_hint('cluster')}") from None
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address!r} ({error}); start one with: ray start --head"
        ) from None
    serve.start(proxy_location="Disabled")  # the front speaks HTTP, the replicas are asked through handles
    one_by_one = asyncio.Lock()  # two calls of serve.run at once wait for each other for ever (ray 2.60)
    deployment = serve.deployment(Host, max_ongoing_requests=10_000, ray_actor_options={"num_cpus": order.how.threads})

    handles: dict[int, Any] = {}

    async def launch(number: int, report: Report) -> Child:
        name = f"quadriga-{order.names[0]}-{number}".replace("/", "-")

        def run() -> Any:
            return serve.run(deployment.options(name=name).bind(order), name=name, route_prefix=None)

        if number not in handles:  # else Ray Serve starts it again, wherever there is room
            async with one_by_one:
                handles[number] = await asyncio.to_thread(run)
        return RayChild(handles[number], report, lambda: serve.delete(name, _blocking=False))

    return launch
