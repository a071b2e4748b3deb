"""The engine behind an event loop: one thread computes, any number of tasks wait.

    task ──submit──► commands ─► engine thread: commands, step, commands, step, ... ─► events ──► the task's inbox
                                                        │
         ◄── a stream that is closed frees its blocks before the next step

The thread owns the engine; tasks reach it through :meth:`AsyncEngine.call` only. What a step made crosses over to the
loop once, for all streams together, and a task takes whatever has come for it at once. An inbox that nobody reads is
cut off after a bounded number of events, so a slow reader costs bounded memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from quadriga.engine.engine import Engine
from quadriga.engine.request import Request, TokenEvent
from quadriga.errors import BusyError, EngineError, QuadrigaError

T = TypeVar("T")

MAX_UNREAD = 4096
"""Events of a request that are kept for a task that does not read; then it is dropped."""


class Inbox:
    """Where the events of one task's requests arrive: taken by that task, filled in the loop's thread.

    Args:
        n_streams: requests that will share it.
    """

    def __init__(self, n_streams: int = 1) -> None:
        self._room = MAX_UNREAD * n_streams
        self._items: list[tuple[Stream, TokenEvent]] = []
        self._error: QuadrigaError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def take(self) -> list[tuple[Stream, TokenEvent]]:
        """Everything that has come, at least one event.

        Raises:
            QuadrigaError: one of the requests failed; whatever came before it has been taken.
        """
        while not self._items:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items, self._items = self._items, []
        return items

    def put(self, stream: Stream, event: TokenEvent) -> None:
        """An event of one of the requests."""
        self._items.append((stream, event))
        self._wake()

    def fail(self, error: QuadrigaError) -> None:
        """End it with an error, after what has come already. The first error counts."""
        self._error = self._error or error
        self._wake()

    @property
    def full(self) -> bool:
        """True if its task is too far behind in reading."""
        return len(self._items) >= self._room

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Stream:
    """The answer to one request. Iterate, or read its inbox, and close when done or no longer wanted."""

    def __init__(self, owner: AsyncEngine, inbox: Inbox) -> None:
        self._owner, self.inbox = owner, inbox
        self.request_id: int | None = None
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        while True:
            for _, event in await self.inbox.take():
                yield event
                if event.finish_reason is not None:
                    return

    def close(self) -> None:
        """Drop the request, wherever it is; blocks are free before the engine's next step."""
        if not self.closed:
            self.closed = True
            self._owner._close(self)

    def _push(self, event: TokenEvent | QuadrigaError) -> None:
        if self.closed:
            return
        if isinstance(event, TokenEvent) and not self.inbox.full:
            self.inbox.put(self, event)
            return
        self.close()
        if isinstance(event, TokenEvent):
            event = EngineError("the answer was not read for too long and has been dropped")
        self.inbox.fail(event)


class AsyncEngine:
    """See the module docstring.

    Args:
        engine: what computes; nobody else may touch it from now on.
        max_waiting: requests that may wait while the engine is full; more are refused.
    """

    def __init__(self, engine: Engine, *, max_waiting: int = 256) -> None:
        self.engine, self.capacity = engine, engine.max_sequences + max_waiting
        self.n_open = 0
        """Requests that are running or waiting."""
        self.error: Exception | None = None
        """What ended the engine's thread, if anything did."""
        self._streams: dict[int, Stream] = {}  # the engine thread's
        self._lock = threading.Lock()
        self._ended = False  # under the lock: nothing is put among the commands once it is true
        self._commands: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    async def start(self) -> None:
        """Begin to work for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Let the step under way finish, and end the thread. Open streams get an error."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    async def submit(self, request: Request) -> Stream:
        """Queue a request; see :meth:`submit_all`."""
        return (await self.submit_all([request]))[0]

    async def submit_all(self, requests: Sequence[Request]) -> list[Stream]:
        """Queue requests that begin together and share one inbox, all of them or none.

        Raises:
            BusyError: as many requests as may wait are waiting.
            RequestError: one of them can never run.
            EngineError: the engine has failed.
        """
        if self.n_open + len(requests) > self.capacity:
            raise BusyError(f"{self.n_open} requests are running or waiting; try again later")
        inbox = Inbox(len(requests))
        streams = [Stream(self, inbox) for _ in requests]
        self.n_open += len(requests)

        def begin(engine: Engine) -> None:
            for stream, request in zip(streams, requests, strict=True):
                if not stream.closed:
                    stream.request_id = engine.submit(request)
                    self._streams[stream.request_id] = stream

        try:
            await self.call(begin)
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return streams

    async def call(self, work: Callable[[Engine], T]) -> T:
        """Run something on the engine's thread between two steps.

        Raises:
            EngineError: the engine has failed.
        """
        future: Future[T] = Future()

        def run(engine: Engine) -> None:
            if future.set_running_or_notify_cancel():
                try:
                    if self._ended:
                        raise self._failure()
                    future.set_result(work(engine))
                except BaseException as error:
                    future.set_exception(error)

        with self._lock:
            if self._ended:
                raise self._failure()
            self._commands.put(run)
        return await asyncio.wrap_future(future)

    def drop_all(self, error: QuadrigaError) -> None:
        """End every request with an error, before the next step."""

        def drop(engine: Engine) -> None:
            for request_id in self._streams:
                engine.cancel(request_id)
            self._send([(stream, error) for stream in self._streams.values()])
            self._streams.clear()

        self._commands.put(drop)

    def _close(self, stream: Stream) -> None:
        self.n_open -= 1

        def cancel(engine: Engine) -> None:
            if stream.request_id is not None:
                self._streams.pop(stream.request_id, None)
                engine.cancel(stream.request_id)

        self._commands.put(cancel)

    # The engine's thread ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._do_commands():
                if self.engine.has_work:
                    self._step()
        except Exception as error:
            self.error = error
        with self._lock:
            self._ended = True
        self._send([(stream, self._failure()) for stream in self._streams.values()])
        self._streams.clear()
        while not self._commands.empty():  # whoever still waits hears that nothing will come
            command = self._commands.get()
            if command is not None:
                command(self.engine)

    def _failure(self) -> EngineError:
        return EngineError(f"the engine has stopped: {self.error or 'the server is shutting down'}")

    def _do_commands(self) -> bool:
        """Everything that is asked for; waits for something if there is nothing else to do. False to stop."""
        wait = not self.engine.has_work
        while wait or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command(self.engine)
            wait = False
        return True

    def _step(self) -> None:
        out: list[tuple[Stream, TokenEvent | QuadrigaError]] = []
        for request_id, event in self.engine.step():
            stream = self._streams.get(request_id)
            if stream is None:
                continue
            if isinstance(event, TokenEvent):
                out.append((stream, event))
            else:  # this request is gone, the others of the pass go on
                out.append((stream, EngineError(str(event))))
            if not isinstance(event, TokenEvent) or event.finish_reason is not None:
                del self._streams[request_id]
        self._send(out)

    def _send(self, events: Sequence[tuple[Stream, TokenEvent | QuadrigaError]]) -> None:
        assert self._loop is not None

        def deliver() -> None:
            for stream, event in events:
                stream._push(event)

        if events:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._loop.call_soon_threadsafe(deliver)
