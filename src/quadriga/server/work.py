"""Where requests are parsed, checked and encoded, so that no body stops the event loop.

    a body of up to INLINE_BYTES ──► checked at once, encoded in the loop's common threads
    a larger one ──► one of MAX_LARGE places ──► a few threads for large bodies only, one after the other

A thread of its own is not enough: what holds the interpreter's lock stops the loop from any thread. So ``schema``
bounds what a parser is given, ``text.least_tokens`` refuses texts that cannot fit before they are encoded, and the
libraries that encode let the lock go. Small requests never wait for large ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from quadriga import runtime
from quadriga.server.errors import ApiError
from quadriga.server.schema import INLINE_BYTES

T = TypeVar("T")

MAX_LARGE = 32
"""Large bodies that are worked on or wait for it; each takes its own size and what is made of it."""

MAX_LARGE_LINES = MAX_LARGE // 4
"""Large lines of batches that are answered at once: their places are not others'."""

TIDY_AFTER_S = 1.0
"""After the last large body, memory that was freed goes back to the system."""


class Work:
    """See the module docstring. One belongs to each server."""

    def __init__(self) -> None:
        n_threads = max(1, min(4, runtime.cpu_count() // 4))
        self._threads = ThreadPoolExecutor(n_threads, thread_name_prefix="large-body")
        self._n_large = 0
        self._lines = asyncio.Semaphore(MAX_LARGE_LINES)
        self._tidy: asyncio.TimerHandle | None = None

    @contextlib.asynccontextmanager
    async def line(self, n_bytes: int) -> AsyncIterator[None]:
        """A line of a batch of so many bytes, while it is answered; a large one waits for its turn."""
        if n_bytes <= INLINE_BYTES:
            yield
            return
        async with self._lines:
            yield

    async def check(self, n_bytes: int, call: Callable[..., T], *arguments: object) -> T:
        """``call(*arguments)`` for a request of this many bytes: here and now if it is small.

        Raises:
            ApiError: 429, as many large bodies as may wait are waiting; and whatever the call raises.
        """
        if n_bytes <= INLINE_BYTES:
            return _bounded(call, *arguments)
        return await self._large(call, *arguments)

    async def encode(self, n_bytes: int, call: Callable[..., T], *arguments: object) -> T:
        """The same for what takes long with small bodies too, such as encoding their texts: always in a thread."""
        if n_bytes <= INLINE_BYTES:
            return await asyncio.to_thread(_bounded, call, *arguments)
        return await self._large(call, *arguments)

    async def write(self, n_bytes: int, call: Callable[..., T], *arguments: object) -> T:
        """``call(*arguments)`` for an answer of about so many bytes: here and now if it is small, else in a thread."""
        return call(*arguments) if n_bytes <= INLINE_BYTES else await asyncio.to_thread(call, *arguments)

    async def _large(self, call: Callable[..., T], *arguments: object) -> T:
        if self._n_large >= MAX_LARGE:
            message = f"{self._n_large} large requests are being read; try again later"
            raise ApiError(429, message, code="queue_full", retry_after_s=1)
        self._n_large += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, functools.partial(_bounded, call, *arguments)
            )
        finally:
            self._n_large -= 1
            if self._tidy is not None:
                self._tidy.cancel()
            # glibc keeps what its threads freed: 200 MB after a dozen texts of 1 MB. Giving it back takes some 30 ms.
            self._tidy = asyncio.get_running_loop().call_later(TIDY_AFTER_S, self._release)

    def _release(self) -> None:
        self._tidy = None
        with contextlib.suppress(RuntimeError):  # it is closed
            self._threads.submit(runtime.release_freed_memory)

    def close(self) -> None:
        """Forget what waits; what is under way ends by itself."""
        if self._tidy is not None:
            self._tidy.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _bounded(call: Callable[..., T], *arguments: object) -> T:
    """``call(*arguments)``. What a parser just managed to nest, the writer of a prompt may not."""
    try:
        return call(*arguments)
    except RecursionError:
        raise ApiError(400, "the body is nested too deep") from None
