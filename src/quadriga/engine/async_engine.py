"""The engine behind an event loop: one thread computes, any number of tasks wait.

    task ──submit──► commands ─► engine thread: commands, step, commands, step, ... ─► events ──► the task's inbox
                                                        │
         ◄── a stream that is closed frees its blocks before the next step

The thread owns the engine; tasks reach it through :meth:`AsyncEngine.call` only. What a step made crosses over to the
loop once, for all streams together, and a task takes whatever has come for it at once, or has it dealt with there and
then (``Inbox.at_once``). An inbox that nobody reads is cut off after a bounded number of events, so a slow reader costs
bounded memory.

The engine ends once, for good, in :meth:`AsyncEngine._end`: told to stop, by anything its thread raises, or because a
step took longer than it may (the thread cannot be ended, so it is left where it is). From then on every stream and call
has an error, old ones and new ones, and nothing waits for the thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from functools import partial
from typing import Any, TypeVar

from quadriga.engine.engine import Engine
from quadriga.engine.request import Embed, Embedding, Request, TokenEvent
from quadriga.errors import BusyError, EngineError, GrammarError, QuadrigaError, RequestError

T = TypeVar("T")

Made = TokenEvent | Embedding
"""What an inbox holds."""

_log = logging.getLogger(__name__)

STEP_TIMEOUT_S = 300.0
"""Longest that one step may take; vLLM's. The slowest honest step known here reads every expert of a DBRX from a disk
of 0.52 GB/s (docs/performance.md): 75 GB, two and a half minutes."""

WATCH_S = 1.0
"""How often a step's time is looked at."""

_LAST_LINES_S = 1.0
"""More than a thread needs that has said its last word and only has to return."""

MAX_UNREAD = 4096
"""Events of a request that are kept for a task that does not read; then it is dropped."""

TOGETHER = 16
"""Requests that begin between two steps at most, of those that were asked for together."""


class Inbox:
    """Where the events of one task's requests arrive: taken by that task, filled in the loop's thread.

    Args:
        n_streams: requests that will share it.
    """

    def __init__(self, n_streams: int = 1) -> None:
        self._room = MAX_UNREAD * n_streams
        self._items: list[tuple[Stream, Made]] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.at_once: Callable[[list[tuple[Stream, Made]]], bool] | None = None
        """Shown what has come for a task that waits, before the task is woken: True, it has been dealt with and the
        task waits on. That saves a switch of tasks and a turn of the loop for every token."""

    async def take(self) -> list[tuple[Stream, Made]]:
        """Everything that has come, at least one event.

        Raises:
            QuadrigaError: one of the requests failed; whatever came before it has been taken. Whatever ``at_once``
                raised is raised here too.
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

    def put(self, stream: Stream, event: Made) -> None:
        """An event of one of the requests; :meth:`tell` follows when all have been put that came together."""
        self._items.append((stream, event))

    def tell(self) -> None:
        """Something has come: to whoever waits for it. Who does not wait finds it where they take."""
        waits = self._waiter is not None and not self._waiter.done()
        if waits and self._items and self.at_once is not None and self._error is None:
            try:
                if self.at_once(self._items):
                    self._items = []
                    return
            except Exception as error:  # the task's own: it is raised there
                self._items, self._error = [], error
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

    def __init__(self, owner: AsyncEngine, inbox: Inbox, client: bytes = b"", *, background: bool = False) -> None:
        self._owner, self.inbox, self.client, self.background = owner, inbox, client, background
        self.request_id: int | None = None
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        while True:
            for _, event in await self.inbox.take():
                assert isinstance(event, TokenEvent), "an answer is made of tokens"
                yield event
                if event.finish_reason is not None:
                    return

    def close(self) -> None:
        """Drop the request, wherever it is; blocks are free before the engine's next step."""
        if not self.closed:
            self.closed = True
            self._owner._close(self)

    def _push(self, event: Made | QuadrigaError) -> None:
        if self.closed:
            return
        if not isinstance(event, QuadrigaError) and not self.inbox.full:
            self.inbox.put(self, event)
            return
        self.close()
        if not isinstance(event, QuadrigaError):
            event = EngineError("the answer was not read for too long and has been dropped")
        self.inbox.fail(event)


class AsyncEngine:
    """See the module docstring.

    Args:
        engine: what computes; nobody else may touch it from now on.
        max_waiting: requests that may wait while the engine is full; more are refused, but a client that has less than
            its share of all places may have more, up to it. What is computed in the background has half of the places
            at most, and takes none of the others'; one request of it is always let in.
        step_timeout_s: a step that takes longer counts as hung and ends the engine; 0 lets it take any time.
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting: int = 256,
        step_timeout_s: float = STEP_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine, self.capacity = engine, engine.max_sequences + max_waiting
        engine.share_time()
        self._n_open_of: Counter[bytes] = Counter()  # by client
        self._n_behind_of: Counter[bytes] = Counter()  # in the background, by client
        self._behind: dict[bytes, deque[tuple[int, asyncio.Future[None]]]] = {}  # who waits there to be let in
        self.error: BaseException | None = None
        """What ended the engine, if it did not end because it was told to. For the log; clients hear that it ended."""
        self.on_failure: Callable[[], None] = lambda: None
        """Called once, in the loop's thread, when the engine has failed and everybody has been told."""
        self.step_timeout_s, self._clock = step_timeout_s, clock
        self._streams: dict[int, Stream] = {}  # the engine thread's
        self._open: dict[Stream, None] = {}  # the loop's: every stream that is not closed
        self._calls: set[Future[Any]] = set()  # what callers wait for
        self._busy_since: float | None = None  # when the engine's thread began what it is doing; None: it waits
        self._lock = threading.Lock()
        self._ended = False  # under the lock: nothing is put among the commands once it is true
        self._commands: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    async def start(self) -> None:
        """Begin to work for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._told = asyncio.Event()
        self._thread.start()
        self._watch = asyncio.create_task(self._keep_watch())

    async def stop(self, timeout_s: float | None = None) -> None:
        """Let the step under way finish, and end the thread. Open streams get an error.

        Args:
            timeout_s: how long the step may still take; then the thread is left behind. None waits for it.
        """
        self._watch.cancel()
        self._commands.put(None)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._told.wait(), timeout_s)
        if not self._told.is_set():
            _log.error("a step is still under way after %g s more; the engine's thread is left behind", timeout_s)

    @property
    def n_open(self) -> int:
        """Requests that are running or waiting."""
        return self._n_open_of.total() + self._n_behind_of.total()

    @property
    def failed(self) -> bool:
        """True if the engine has ended without being told to; nothing will be computed any more."""
        return self.error is not None or (self._loop is not None and not self._ended and not self._thread.is_alive())

    @property
    def ended(self) -> bool:
        """True once its thread has said that it is done, for whatever reason."""
        return self._told.is_set()

    @property
    def stuck(self) -> bool:
        """After :meth:`stop`: True if the engine's thread is still inside a step and does not end by being asked."""
        self._thread.join(_LAST_LINES_S)
        return self._thread.is_alive()

    async def submit(self, request: Request | Embed) -> Stream:
        """Queue a request; see :meth:`submit_all`."""
        return (await self.submit_all([request]))[0]

    async def submit_all(self, requests: Sequence[Request | Embed], *, background: bool = False) -> list[Stream]:
        """Queue requests of one client that begin together and share one inbox and one turn, all of them or none.

        Args:
            background: wait until there is room that nobody else wants, instead of being refused.

        Raises:
            BusyError: as many requests as may wait are waiting.
            RequestError: one of them can never run.
            EngineError: the engine has failed.
        """
        client = requests[0].client
        if background:
            await self._enter_behind(client, len(requests))
        else:
            self._enter(client, len(requests))
        inbox = Inbox(len(requests))
        streams = [Stream(self, inbox, client, background=background) for _ in requests]
        self._open.update(dict.fromkeys(streams))
        pairs = list(zip(streams, requests, strict=True))

        def begin(engine: Engine, first: int) -> None:
            for stream, request in pairs[first : first + TOGETHER]:
                if not stream.closed:
                    together = {} if stream is streams[0] else {"group": streams[0].request_id}
                    stream.request_id = engine.submit(request, **together)
                    self._streams[stream.request_id] = stream

        try:
            for first in range(0, len(requests), TOGETHER):
                await self.call(partial(begin, first=first))
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return streams

    def _enter(self, client: bytes, n: int) -> None:
        """Take n places, or be refused; streams give theirs back as they are closed."""
        total, mine = self._n_open_of.total() + n, self._n_open_of[client] + n
        share = self.capacity // len({*self._n_open_of, client})
        # Whoever fills the queue does not keep out those who have less than their part of it.
        if total > self.capacity and (mine > max(1, share) or total > 2 * self.capacity):
            raise BusyError(f"{self.n_open} requests are running or waiting; try again later")
        self._n_open_of[client] += n

    async def _enter_behind(self, client: bytes, n: int) -> None:
        """Take n places in the background, when nobody else wants them; the client that has the fewest is next."""
        turn = asyncio.get_running_loop().create_future()
        self._behind.setdefault(client, deque()).append((n, turn))
        self._let_in()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give_back(client, n, background=True)
            raise

    def _let_in(self) -> None:
        while self._behind:
            client = min(self._behind, key=lambda name: self._n_behind_of[name])
            n, turn = self._behind[client][0]
            if not turn.done():
                behind = self._n_behind_of.total()
                if behind and (self.n_open + n > self.capacity or behind + n > self.capacity // 2):
                    return
                self._n_behind_of[client] += n
                turn.set_result(None)
            waiting = self._behind.pop(client)
            waiting.popleft()
            if waiting:
                self._behind[client] = waiting  # behind the other clients that have as few

    def _give_back(self, client: bytes, n: int, *, background: bool) -> None:
        counts = self._n_behind_of if background else self._n_open_of
        counts[client] -= n
        if not counts[client]:
            del counts[client]
        self._let_in()

    async def call(self, work: Callable[[Engine], T]) -> T:
        """Run something on the engine's thread between two steps.

        Raises:
            EngineError: the engine has failed.
        """
        future: Future[T] = Future()

        def run(engine: Engine) -> None:
            if not future.done() and future.set_running_or_notify_cancel():
                # Anything but an Exception is no mistake of this caller's: it goes on, and ends the engine.
                try:
                    result = work(engine)
                except Exception as error:
                    _settle(future, error=error)
                else:
                    _settle(future, result)

        with self._lock:
            if self._ended:
                raise self._failure()
            self._calls.add(future)
            future.add_done_callback(self._calls.discard)
            self._commands.put(run)
        return await asyncio.wrap_future(future)

    def drop_all(self, error: QuadrigaError) -> None:
        """End every request with an error, now; the engine forgets them before its next step. In the loop's thread."""
        for stream in list(self._open):
            stream._push(error)

    def check(self) -> None:
        """End the engine if its thread is gone, or at one thing for longer than it may be. In the loop's thread."""
        since = self._busy_since
        if self._ended:
            return
        if not self._thread.is_alive():
            self._end(EngineError("the engine's thread is gone"))
        elif self.step_timeout_s and since is not None and self._clock() - since > self.step_timeout_s:
            frame = sys._current_frames().get(self._thread.ident or 0)
            where = "".join(traceback.format_stack(frame)) if frame is not None else "nowhere\n"
            limit = f"{self.step_timeout_s:g} s (--step-timeout)"
            self._end(EngineError(f"a step took longer than {limit} and counts as hung. It is at:\n{where}"))

    async def _keep_watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            self.check()

    def _close(self, stream: Stream) -> None:
        del self._open[stream]
        self._give_back(stream.client, 1, background=stream.background)

        def cancel(engine: Engine) -> None:
            if stream.request_id is not None:
                self._streams.pop(stream.request_id, None)
                engine.cancel(stream.request_id)

        self._commands.put(cancel)

    # The end, in whichever thread it is noticed ----------------------------------------------------------------------

    def _end(self, error: BaseException | None) -> None:
        """The engine has ended; whoever waits or will ask hears of it. Only the first call counts.

        Args:
            error: why, if it was not told to.
        """
        with self._lock:
            if self._ended:
                return
            self._ended, self.error = True, error
        if error is not None:
            _log.critical("the engine has stopped", exc_info=error)
        for future in list(self._calls):
            _settle(future, error=self._failure())
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self.drop_all(self._failure())
        self._told.set()
        if self.error is not None:
            self.on_failure()

    def _failure(self) -> EngineError:
        why = "the server is shutting down" if self.error is None else "the server's log says why"
        return EngineError(f"the engine has stopped: {why}")

    # The engine's thread ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._do_commands():
                if self.engine.has_work:
                    self._busy_since = self._clock()
                    self._step()
            self._end(None)
        except BaseException as error:
            self._end(error)

    def _do_commands(self) -> bool:
        """Everything that is asked for; waits for something if there is nothing else to do. False to stop."""
        wait = not self.engine.has_work
        while wait or not self._commands.empty():
            self._busy_since = None
            command = self._commands.get()
            self._busy_since = self._clock()
            if command is None or self._ended:
                return False
            command(self.engine)
            wait = False
        return not self._ended

    def _step(self) -> None:
        out: list[tuple[Stream, Made | QuadrigaError]] = []
        for request_id, event in self.engine.step():
            stream = self._streams.get(request_id)
            if stream is None:
                continue
            # This request is gone, the others go on. What the engine finds wrong is no fault of the client's, but for
            # its grammar: a request that brings the same one again fails again.
            ours = isinstance(event, RequestError) and not isinstance(event, GrammarError)
            out.append((stream, EngineError(str(event)) if ours else event))
            if isinstance(event, QuadrigaError) or event.finish_reason is not None:
                del self._streams[request_id]
        self._send(out)

    def _send(self, events: Sequence[tuple[Stream, Made | QuadrigaError]]) -> None:
        assert self._loop is not None

        def deliver() -> None:
            for stream, event in events:
                stream._push(event)
            for inbox in {stream.inbox for stream, _ in events}:
                inbox.tell()

        if events:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._loop.call_soon_threadsafe(deliver)


def _settle(future: Future[Any], result: object = None, *, error: BaseException | None = None) -> None:
    """Answer a caller, if nobody has yet: the end of the engine and a step that came back late may both try."""
    with contextlib.suppress(InvalidStateError):
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
