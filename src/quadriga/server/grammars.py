"""Grammars for requests: compiled away from the engine and from the event loop, in turn by client, each only once.

compile() ─► known already: a copy, at once
          ─► asked for by somebody else right now: wait for the same
          ─► a place in the queue ─► one after another in ``text.grammar``'s thread
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from quadriga.engine.turns import Turns
from quadriga.errors import BusyError, QuadrigaError
from quadriga.text.grammar import Grammar, Grammars

MAX_WAITING = 256
"""Grammars that may wait to be compiled."""

MAX_WAITING_OF_CLIENT = 32

Key = tuple[bytes, Any, str]


@dataclass(eq=False)
class _Job:
    """A grammar that waits to be compiled."""

    key: Key
    client: bytes
    arrival: int
    done: asyncio.Future[Grammar]
    n_asking: int = 0
    group: Hashable = field(init=False)
    priority: int = 0
    n_pending: int = 1

    def __post_init__(self) -> None:
        self.group = self.arrival


class GrammarDesk:
    """See the module docstring. Of one event loop.

    Args:
        grammars: what compiles.
    """

    def __init__(self, grammars: Grammars) -> None:
        self.grammars = grammars
        self._turns: Turns[_Job] = Turns()
        self._jobs: dict[Key, _Job] = {}
        self._n_waiting_of: dict[bytes, int] = {}
        self._arrivals = 0
        self._worker: asyncio.Task[None] | None = None

    async def compile(self, kind: Any, source: str | dict[str, Any], *, client: bytes, salt: bytes) -> Grammar:
        """A fresh matcher; see :meth:`Grammars.compile`.

        Raises:
            GrammarError: the grammar cannot be used.
            BusyError: too many wait already.
        """
        text = await asyncio.to_thread(self.grammars.text_of, source)
        known = self.grammars.known(kind, text, salt)
        if known is not None:
            return known
        key = (salt, kind, text)
        job = self._jobs.get(key) or self._queue(key, client)
        job.n_asking += 1
        try:
            return (await asyncio.shield(job.done)).copy()
        finally:
            job.n_asking -= 1

    def _queue(self, key: Key, client: bytes) -> _Job:
        waiting = self._n_waiting_of.get(client, 0)
        if waiting >= MAX_WAITING_OF_CLIENT or len(self._jobs) >= MAX_WAITING:
            raise BusyError(f"{len(self._jobs)} grammars wait to be compiled, {waiting} of them yours; try again later")
        job = _Job(key, client, self._arrivals, asyncio.get_running_loop().create_future())
        self._arrivals += 1
        self._jobs[key] = job
        self._n_waiting_of[client] = waiting + 1
        self._turns.add(job)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return job

    async def _work(self) -> None:
        while self._turns:
            job = self._turns.first()
            self._turns.take(job)
            salt, kind, text = job.key
            try:
                if job.n_asking:  # else everybody has left
                    grammar = await asyncio.wrap_future(self.grammars.submit(kind, text, salt))
                    job.done.set_result(grammar)
            except QuadrigaError as error:
                job.done.set_exception(error)
                job.done.exception()  # seen, even if nobody waits any more
            except BaseException as error:
                job.done.set_exception(error)
                raise
            finally:
                self._turns.serve({job: 1})
                self._turns.done(job)
                del self._jobs[job.key]
                self._n_waiting_of[job.client] -= 1
                if not self._n_waiting_of[job.client]:
                    del self._n_waiting_of[job.client]
