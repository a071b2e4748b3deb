"""The engine behind an event loop: one thread computes, any number of tasks wait.

    task ──submit──► commands ─► engine thread: commands, step, commands, step, ... ─► events ──► the task's stream
                                                        │
         ◄── a stream that is closed frees its blocks before the next step

The thread owns the engine; tasks reach it through :meth:`AsyncEngine.call` only. A stream that nobody reads is cut off
after a bounded number of events, so a slow reader costs bounded memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import TypeVar

from quadriga.engine.engine import Engine
from quadriga.engine.request import Request, TokenEvent
from quadriga.errors import BusyError, EngineError, QuadrigaError, RequestError

T = TypeVar("T")

MAX_UNREAD = 4096
"""Events a stream holds for a reader that does not read; then it is cut off."""


class Stream:
    """The answer to one request. Iterate, and close when done or no longer wanted."""

    def __init__(self, owner: AsyncEngine) -> None:
        self._owner = owner
        self._events: asyncio.Queue[TokenEvent | QuadrigaError] = asyncio.Queue()
        self.request_id: int | None = None
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        while True:
            event = await self._events.get()
            if isinstance(event, QuadrigaError):
                raise event
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
        if self._events.qsize() >= MAX_UNREAD:
            self.close()
            event = EngineError("the answer was not read for too long and has been dropped")
        self._events.put_nowait(event)


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
        """Queue a request.

        Raises:
            BusyError: as many requests as may wait are waiting.
            RequestError: the request can never run.
            EngineError: the engine has failed.
        """
        if self.n_open >= self.capacity:
            raise BusyError(f"{self.n_open} requests are running or waiting; try again later")
        stream = Stream(self)
        self.n_open += 1

        def begin(engine: Engine) -> None:
            if not stream.closed:
                stream.request_id = engine.submit(request)
                self._streams[stream.request_id] = stream

        try:
            await self.call(begin)
        except BaseException:
            stream.close()
            raise
        return stream

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
        try:
            events = self.engine.step()
        except RequestError as error:  # broken logits: the pass's requests are gone, the others go on
            gone = [i for i in self._streams if not self.engine.is_active(i)]
            self._send([(self._streams.pop(i), EngineError(str(error))) for i in gone])
            return
        out: list[tuple[Stream, TokenEvent | QuadrigaError]] = []
        for request_id, event in events:
            stream = self._streams.get(request_id)
            if stream is not None:
                out.append((stream, event))
                if event.finish_reason is not None:
                    del self._streams[request_id]
        self._send(out)

    def _send(self, events: list[tuple[Stream, TokenEvent | QuadrigaError]] | list[tuple[Stream, EngineError]]) -> None:
        assert self._loop is not None

        def deliver() -> None:
            for stream, event in events:
                stream._push(event)

        if events:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._loop.call_soon_threadsafe(deliver)
