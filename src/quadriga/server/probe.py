"""Whether a token can be generated now, for all who ask at once: one token at most every :data:`FRESH_S` seconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from quadriga.engine.async_engine import AsyncEngine
from quadriga.engine.request import Request, SamplingParams

FRESH_S = 1.0
"""An answer stands for so long."""


class Probe:
    """See the module docstring. It waits its turn like any request, so it says too when the server is full.

    Args:
        engine: what generates.
        prompt: token ids to begin with.
        clock: seconds that only go forward.
    """

    def __init__(
        self, engine: AsyncEngine, *, prompt: tuple[int, ...], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine, self._clock = engine, clock
        self._request = Request(
            prompt=prompt, params=SamplingParams(max_new_tokens=1), priority=1, client=b"readiness probe"
        )
        self._under_way: asyncio.Task[float] | None = None
        self._last: tuple[float, float] | None = None  # seconds it took, when

    async def seconds(self) -> float:
        """How long a token took, now or at most :data:`FRESH_S` ago.

        Raises:
            BusyError, EngineError: none can be had.
        """
        if self._last is not None and not self._engine.failed and self._clock() - self._last[1] < FRESH_S:
            return self._last[0]
        if self._under_way is None or self._under_way.done():
            self._under_way = asyncio.create_task(self._ask())
        return await asyncio.shield(self._under_way)  # whoever leaves does not end it for the others

    async def _ask(self) -> float:
        started = self._clock()
        stream = await self._engine.submit(self._request)
        try:
            async for _ in stream:
                pass
        finally:
            stream.close()
        ended = self._clock()
        self._last = (ended - started, ended)
        return self._last[0]
