"""Models that are loaded when somebody asks for them, and leave again, within a budget of memory.

    asked for ─► absent ─► its turn ─► room is made ─► loading ─► ready ◄─► in use
                   ▲                                                │
                   └───────── leaving ◄── idle for its keep-alive, ─┘
                                          or idle for longest when another needs its memory

One model is loaded at a time, so that no two count on the same memory. Whoever asks for it meanwhile waits for the same
load; requests to other models go on. What is in use never leaves: where another needs its memory and nothing is idle,
new requests to it wait until it has left and come again, so that two models which are always asked for take turns.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from quadriga import runtime
from quadriga.engine.load_options import LoadOptions
from quadriga.errors import BusyError, CatalogueError, ConfigError, EngineError, QuadrigaError
from quadriga.hub import catalogue
from quadriga.server.card import Card
from quadriga.server.errors import ApiError
from quadriga.server.service import Service

_log = logging.getLogger(__name__)

KEEP_ALIVE = "5m"
"""Ollama's default."""

FOREVER = math.inf

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h)")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]*)?")


def keep_alive_s(given: float | str) -> float:
    """How long an idle model stays, as Ollama's clients write it: seconds, "5m", "1h30m"; below 0 is for ever.

    Raises:
        ConfigError: it is no length of time.
    """
    if not isinstance(given, str):
        if math.isnan(given):
            raise ConfigError("keep_alive must be a number of seconds, got nan")
        return FOREVER if given < 0 else float(given)
    text = given.strip().removeprefix("-")
    if _NUMBER.fullmatch(text):
        seconds = float(text)
    else:
        parts = _PART.findall(text)
        if not parts or "".join(number + unit for number, unit in parts) != text:
            raise ConfigError(f"keep_alive must be seconds, or a time such as 5m or 1h30m; got {given[:40]!r}")
        seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    return FOREVER if given.strip().startswith("-") else seconds


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A model that can be loaded."""

    card: Card
    aliases: tuple[str, ...] = ()
    source: str
    """What ``engine.load.load`` is told."""
    how: LoadOptions
    nbytes: int
    """Of weights and cache, as far as its files tell."""

    @property
    def names(self) -> list[str]:
        """What a request may call it."""
        return [self.card.name, *self.aliases]


@dataclass(frozen=True)
class _Refusal:
    """Why a model was not loaded, for each of those who asked."""

    status: int
    message: str
    code: str

    def error(self) -> ApiError:
        """Each has an exception of its own: one that was kept would hold its request."""
        return ApiError(self.status, self.message, param="model", code=self.code)


@dataclass(eq=False)
class _Ticket:
    """One who waits for a model."""

    granted: bool = False


@dataclass(eq=False)
class _Slot:
    """A model and what is known of it now."""

    offer: Offer
    nbytes: int
    """What it takes: predicted, and once it has been loaded, counted."""
    keep_alive_s: float
    card: Card
    service: Service | None = None
    n_users: int = 0
    waiting: set[_Ticket] = field(default_factory=set)
    closing: bool = False
    """It leaves as soon as it is idle: who asks for it waits until it has."""
    last_used: float = 0.0
    task: asyncio.Task[_Refusal | None] | None = None
    timer: asyncio.TimerHandle | None = None

    @property
    def held(self) -> Service:
        """The model, for one of its users."""
        assert self.service is not None and self.n_users, "what is in use stays"
        return self.service

    @property
    def pinned(self) -> bool:
        """Adapters were added to it over HTTP; they would be gone with it."""
        return self.service is not None and bool(self.service.llm.adapters)


@dataclass(frozen=True)
class Listed:
    """A model as lists show it."""

    card: Card
    names: list[str]
    service: Service | None
    expires_s: float | None = None
    """Seconds until an idle model leaves; None: it stays, or is not there."""


class OnDemand:
    """See the module docstring. Of one event loop.

    Args:
        offers: what can be loaded; the first is for requests that name none.
        load: loads one, in a thread.
        budget: bytes for all that is loaded.
        keep_alive_s: how long an idle model stays.
        max_waiting: requests that may wait for a model.
        look: further offers that have come since, in a thread; given the sources that are known.
    """

    def __init__(
        self,
        offers: Iterable[Offer],
        load: Callable[[Offer], Service],
        *,
        budget: int,
        keep_alive_s: float,
        max_waiting: int = 256,
        look: Callable[[set[str]], list[Offer]] | None = None,
    ) -> None:
        self.budget, self._load, self._look = budget, load, look
        self._keep_alive_s, self._max_waiting, self._n_waiting = keep_alive_s, max_waiting, 0
        self._slots: dict[str, _Slot] = {}  # by every name
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: QuadrigaError | None = None
        self.came: Callable[[Service], None] = lambda _: None
        """Told of a model that is loaded, before anybody has it."""
        self.leaves: Callable[[Service], None] = lambda _: None
        """Told of a model that is about to leave."""
        self.hung: Callable[[], None] = lambda: None
        """Told when an engine does not end."""
        for offer in offers:
            self._add(offer)

    def _add(self, offer: Offer) -> None:
        for name in offer.names:
            if name in self._slots:
                raise ConfigError(f"two models are called {name!r}; give each a name of its own: NAME=MODEL")
        slot = _Slot(offer, offer.nbytes, self._keep_alive_s, offer.card)
        self._slots.update(dict.fromkeys(offer.names, slot))

    # Lists -----------------------------------------------------------------------------------------------------------

    @property
    def slots(self) -> list[_Slot]:
        """Every model once, in the order in which they were offered."""
        return list(dict.fromkeys(self._slots.values()))

    @property
    def default(self) -> str:
        """The model of requests that name none."""
        return next(iter(self._slots))

    @property
    def in_memory(self) -> int:
        """Bytes of what is loaded."""
        return sum(slot.nbytes for slot in self.slots if slot.service is not None)

    def services(self) -> list[Service]:
        """What is loaded."""
        return [slot.service for slot in self.slots if slot.service is not None]

    def listed(self) -> Iterator[Listed]:
        """All of it."""
        for slot in self.slots:
            names = slot.offer.names if slot.service is None else slot.service.names
            yield Listed(slot.card, names, slot.service, self._expires_s(slot))

    def _expires_s(self, slot: _Slot) -> float | None:
        if slot.service is None or slot.keep_alive_s == FOREVER or slot.pinned:
            return None
        now = asyncio.get_running_loop().time()
        return slot.keep_alive_s if slot.timer is None else slot.timer.when() - now

    async def look_again(self) -> None:
        """Add what can be loaded since the last look, such as models that were pulled meanwhile."""
        if self._look is None:
            return
        known = {slot.offer.source for slot in self.slots}
        for offer in await asyncio.to_thread(self._look, known):
            if not any(name in self._slots for name in offer.names):
                self._add(offer)

    @property
    def grows(self) -> bool:
        """What comes into the local store is offered too."""
        return self._look is not None

    def slot_of(self, name: str) -> _Slot | None:
        """The model that a request calls so; NAME:ADAPTER is NAME's."""
        return self._slots.get(name) or self._slots.get(name.rpartition(":")[0])

    # Having one ------------------------------------------------------------------------------------------------------

    async def take(self, slot: _Slot, keep_alive: float | None = None) -> Service:
        """A model that is there until :meth:`give_back`; loads it where it is not.

        Args:
            keep_alive: seconds that it stays afterwards; None leaves that as it is.

        Raises:
            ApiError: it cannot be loaded.
            BusyError: too many wait already.
            EngineError: the server ends.
        """
        if self._n_waiting >= self._max_waiting and (slot.service is None or slot.closing):
            raise BusyError(f"{self._n_waiting} requests wait for a model to be loaded; try again later")
        self._n_waiting += 1
        try:
            service = await self._taken(slot)
        finally:
            self._n_waiting -= 1
        if keep_alive is not None:
            slot.keep_alive_s = keep_alive
        self._stop_clock(slot)
        return service

    async def _taken(self, slot: _Slot) -> Service:
        while True:
            if self._ended is not None:
                raise self._ended
            if slot.closing:
                await self._changed.wait()
                continue
            if slot.service is not None:
                slot.n_users += 1
                return slot.service
            ticket = _Ticket()
            slot.waiting.add(ticket)
            if slot.task is None:
                slot.task = asyncio.create_task(self._bring(slot))
            try:
                refusal = await asyncio.shield(slot.task)
            except BaseException:
                if ticket.granted:
                    self.give_back(slot)
                slot.waiting.discard(ticket)
                self._note()
                if self._ended is not None:
                    raise self._ended from None
                raise
            if refusal is not None:
                raise refusal.error()
            assert ticket.granted, "whoever waited to the end of a load has its model"
            return slot.held

    def give_back(self, slot: _Slot) -> None:
        """End a :meth:`take`."""
        slot.n_users -= 1
        slot.last_used = asyncio.get_running_loop().time()
        self._rest(slot)
        self._note()

    def unload(self, slot: _Slot) -> None:
        """Let a model leave as soon as it is idle."""
        slot.keep_alive_s = 0.0
        self._rest(slot)

    def _rest(self, slot: _Slot) -> None:
        """Begin to count the time of a model that nobody uses."""
        self._stop_clock(slot)
        if slot.n_users == 0 and slot.service is not None and slot.keep_alive_s < FOREVER:
            slot.timer = asyncio.get_running_loop().call_later(slot.keep_alive_s, self._expire, slot)

    def _stop_clock(self, slot: _Slot) -> None:
        if slot.timer is not None:
            slot.timer.cancel()
            slot.timer = None

    def _note(self) -> None:
        """Something has changed: whoever waits looks again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def forget(self, slot: _Slot) -> None:
        """Take a model out of memory, out of the offers and off the disk.

        Raises:
            ApiError: it is in use, or no file of the local store.
        """
        name, source = slot.card.name, slot.offer.source
        if source in catalogue.BUNDLED:
            raise ApiError(400, f"the model {name!r} is part of the program and cannot be deleted", param="model")
        async with self._turn:
            if slot.n_users or slot.waiting or slot.pinned:
                raise ApiError(409, f"the model {name!r} is in use; delete it when its answers are over", param="model")
            for one in slot.offer.names:
                del self._slots[one]
            if slot.service is not None:
                await self._dismiss(slot)
            try:
                await asyncio.to_thread(catalogue.remove, source)
            except CatalogueError as error:
                raise ApiError(400, str(error), param="model") from None

    # Coming ----------------------------------------------------------------------------------------------------------

    async def _bring(self, slot: _Slot) -> _Refusal | None:
        """Load a model and hand it to all who wait for it; or say why not."""
        refusal: _Refusal | None = None
        try:
            async with self._turn:
                refusal = await self._room(slot) if slot.waiting else None
                if refusal is None and slot.waiting:
                    refusal = await self._open(slot)
        finally:
            slot.task = None
            for ticket in slot.waiting:
                ticket.granted = slot.service is not None
                slot.n_users += ticket.granted
            slot.waiting.clear()
            self._rest(slot)
            self._note()
        return refusal

    async def _open(self, slot: _Slot) -> _Refusal | None:
        name, began = slot.card.name, time.monotonic()
        try:
            service = await asyncio.to_thread(self._load, slot.offer)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # a panic of a library is no Exception, and ends this load all the same
            _log.error("the model %s could not be loaded", name, exc_info=error)
            reason = str(error) if isinstance(error, QuadrigaError) else f"{type(error).__name__}; the log says more"
            return _Refusal(500, f"the model {name!r} could not be loaded: {reason}", "load_failed")
        runner = service.llm.runner
        slot.nbytes = runner.weights()[1] + runner.kv_bytes + runner.state_bytes
        slot.card, slot.keep_alive_s = service.card, self._keep_alive_s
        slot.last_used = asyncio.get_running_loop().time()
        self.came(service)
        await service.engine.start()
        slot.service = service
        _log.info("loaded %s in %.1f s: %.2f GB", name, time.monotonic() - began, slot.nbytes / 1e9)
        if self.in_memory > self.budget:
            gb = self.in_memory / 1e9
            _log.warning("what is loaded takes %.2f GB, more than --models-memory %.2f GB", gb, self.budget / 1e9)
        return None

    async def _room(self, slot: _Slot) -> _Refusal | None:
        """Let others leave until there is room for a model, the one that has been idle for longest first."""
        gb, most = slot.nbytes / 1e9, self.budget / 1e9
        name, held = slot.card.name, None
        if slot.nbytes > self.budget:
            text = f"the model {name!r} needs {gb:.2f} GB with its cache, and this server's models have {most:.2f} GB"
            return _Refusal(400, text, "model_too_large")
        try:
            while slot.waiting and self.in_memory + slot.nbytes > self.budget:
                if held is not None:
                    held.closing = False
                held = self._next_to_leave()
                if held is None:
                    text = f"there is no room for the model {name!r}: adapters keep the loaded ones; unload them first"
                    return _Refusal(503, text, "no_room")
                held.closing = True
                if held.n_users:
                    await self._changed.wait()
                else:
                    await self._dismiss(held)
        finally:
            if held is not None and held.closing:
                held.closing = False
                self._note()
        return None

    def _next_to_leave(self) -> _Slot | None:
        able = [slot for slot in self.slots if slot.service is not None and not slot.pinned]
        return min(able, key=lambda slot: (slot.n_users > 0, slot.last_used), default=None)

    # Leaving ---------------------------------------------------------------------------------------------------------

    def _expire(self, slot: _Slot) -> None:
        slot.timer = None
        task = asyncio.get_running_loop().create_task(self._retire(slot))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _retire(self, slot: _Slot) -> None:
        """Let an idle model leave, unless it was asked for meanwhile."""
        async with self._turn:
            if slot.service is not None and not slot.n_users and slot.timer is None and not slot.pinned:
                await self._dismiss(slot)

    async def _dismiss(self, slot: _Slot) -> None:
        """End a model's engine and free its memory; who asks for it waits until that is done."""
        service = slot.service
        assert service is not None and not slot.n_users, "only what is idle leaves"
        slot.closing = True
        self._stop_clock(slot)
        self.leaves(service)
        try:
            await service.end(service.engine.step_timeout_s or None)
            if not service.engine.ended:
                self.hung()
                return
            slot.service = None
            del service
            await asyncio.to_thread(_free)
            _log.info("%s has left", slot.card.name)
        finally:
            slot.closing = False
            self._note()

    def end(self, error: QuadrigaError) -> None:
        """Nothing is loaded any more; whoever waits has the error."""
        self._ended = self._ended or error
        for slot in self.slots:
            if slot.task is not None:
                slot.task.cancel()
        self._note()

    async def stop(self, timeout_s: float) -> None:
        """End what is loaded."""
        self.end(EngineError("the server is shutting down"))
        for slot in self.slots:
            self._stop_clock(slot)
        await asyncio.gather(*(service.end(timeout_s) for service in self.services()))


def _free() -> None:
    """Give back what a model has held: its parts hold each other, so they are collected first."""
    gc.collect()
    runtime.release_freed_memory()
