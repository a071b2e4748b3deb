"""One engine, any number of threads: whose turn it is.

    thread A   submit, pass, pass,         pass, pass, ...        drives: it computes for everyone who waits
    thread B             (asks) submit, (sleeps until its tokens have come)
    thread C                        (asks)       score

An engine belongs to one thread at a time. Whoever waits for tokens runs passes until they have come, unless another
thread does already: then it sleeps, and is woken when they are there or when it is its turn to go on. So requests of
several threads share passes, a single thread pays for nothing but two uncontended locks, and no thread is kept that
would have to be started, stopped or missed after a fork.

Work between passes (a new request, a cancellation, a score) and passes alternate where both are waited for, and each is
taken in the order in which it was asked for: neither a crowd of new requests nor a long answer keeps anyone waiting for
ever. This knows nothing of engines; ``engine/llm.py`` says what is done in a turn.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from quadriga.errors import EngineError

Ready = Callable[[], bool]


class _Thread:
    """One that wants the turn, has it, or sleeps in line for it."""

    def __init__(self, ready: Ready | None) -> None:
        self.ident = threading.get_ident()
        self.ready = ready
        self.has_turn = False
        self.bell: threading.Lock | None = None

    def is_ready(self) -> bool:
        return self.ready is not None and self.ready()


class ThreadTurns:
    """See the module docstring."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of what follows; held for moments, never while anything is computed
        self._owner: int | None = None  # the thread whose turn it is
        self._work: deque[_Thread] = deque()
        self._passes: deque[_Thread] = deque()
        self._left: deque[Callable[[], None]] = deque()  # see `soon`; appended to without the lock

    @property
    def n_waiting(self) -> int:
        """Threads that sleep."""
        return len(self._work) + len(self._passes)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The engine, between two passes; waits for it.

        Raises:
            EngineError: this thread has the turn already, so it would wait for itself.
        """
        mine = _Thread(None)
        try:
            self._take(mine, self._work)
            yield
        finally:
            try:
                self._pass_on(mine, self._passes, self._work)
            except KeyboardInterrupt:  # just now: the turn must not stay with a thread that has left
                self._pass_on(mine, self._passes, self._work)
                raise

    def run_until(self, ready: Ready, step: Callable[[], None]) -> None:
        """Return as soon as ``ready()``: by way of ``step()``, again and again, or of another thread's steps.

        Args:
            ready: quick and without side effects; also called by other threads, after their steps and turns.
            step: one pass, for all; what it raises is raised here, and the other threads go on.

        Raises:
            EngineError: this thread has the turn already.
        """
        while not ready():
            mine = _Thread(ready)
            try:
                self._take(mine, self._passes)
                while mine.has_turn:
                    self._sweep()
                    if ready():
                        break
                    step()
                    with self._lock:
                        self._wake_ready()
                        if self._work:
                            break
            finally:
                try:
                    self._pass_on(mine, self._work, self._passes)
                except KeyboardInterrupt:
                    self._pass_on(mine, self._work, self._passes)
                    raise

    def soon(self, action: Callable[[], None]) -> None:
        """Do something in a turn without waiting for it: at once, or before the next pass of whoever has the turn.

        For finalisers, which run in any thread at any moment, even within a turn of their own thread.
        """
        self._left.append(action)
        self._finish_left()

    # Inside ----------------------------------------------------------------------------------------------------------

    def _take(self, mine: _Thread, line: deque[_Thread]) -> None:
        """Wait until this thread has the turn, or until what it waits for has come."""
        with self._lock:
            if self._owner == mine.ident:
                raise EngineError("a function that the engine calls asked the same engine for something: it would wait")
            if mine.is_ready():
                return
            if self._owner is None:
                self._owner, mine.has_turn = mine.ident, True
                return
            mine.bell = threading.Lock()
            mine.bell.acquire()
            line.append(mine)
        try:
            mine.bell.acquire()  # until somebody releases it
        except BaseException:  # Ctrl-C; whoever calls this passes the turn on, if it has come
            with self._lock:
                if mine in line:
                    line.remove(mine)
            raise

    def _pass_on(self, mine: _Thread, first: deque[_Thread], second: deque[_Thread]) -> None:
        """End the turn, if this thread has it: the next is the first in the first line that is not empty."""
        if mine.has_turn:
            self._sweep()
            with self._lock:
                self._wake_ready()
                following = (first or second).popleft() if first or second else None
                mine.has_turn, self._owner = False, None if following is None else following.ident
                if following is not None:
                    following.has_turn = True
                    self._wake(following)
        if self._left:
            self._finish_left()

    def _wake_ready(self) -> None:
        for thread in [thread for thread in self._passes if thread.is_ready()]:
            self._passes.remove(thread)
            self._wake(thread)

    def _wake(self, thread: _Thread) -> None:
        assert thread.bell is not None, "a thread in line sleeps"
        thread.bell.release()

    def _sweep(self) -> None:
        while self._left:
            self._left.popleft()()

    def _finish_left(self) -> None:
        """Do what was left, unless somebody has the turn or is about to: they look for it at its end."""
        while self._left and self._lock.acquire(blocking=False):
            mine = _Thread(None)
            try:
                if self._owner is not None:
                    return
                self._owner, mine.has_turn = mine.ident, True
            finally:
                self._lock.release()
            self._pass_on(mine, self._work, self._passes)
