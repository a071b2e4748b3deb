"""The models of one server: each with an engine and a thread of its own; a request's ``model`` chooses.

Either all are loaded at the start and stay, or all are loaded on demand (``on_demand``). Requests without a model go to
the first. All share the clients' accounts, the metrics (labelled by model), turns at large bodies, and the process:
when one engine fails, the server ends as it does with one model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from quadriga.errors import ConfigError, QuadrigaError
from quadriga.hub import catalogue
from quadriga.server.caller import Caller
from quadriga.server.errors import ApiError
from quadriga.server.metrics import Metrics
from quadriga.server.offers import called
from quadriga.server.on_demand import Listed, OnDemand
from quadriga.server.service import Service, not_served
from quadriga.server.work import Work


class Fleet:
    """See the module docstring.

    Args:
        services: models that stay.
        on_demand: models that come and go, in place of them.

    Raises:
        ConfigError: a name that two of them have.
    """

    def __init__(self, services: Sequence[Service] = (), on_demand: OnDemand | None = None) -> None:
        assert services or on_demand is not None, "a server has models"
        self._services, self.on_demand = list(services), on_demand
        self.metrics, self.work = Metrics(), Work()
        self.on_failure: Callable[[], None] = lambda: None
        """Called when an engine has failed; see ``AsyncEngine.on_failure``."""
        self._draining = self._hung = False
        taken: set[str] = set()
        for service in self._services:
            for name in (service.name, *service.aliases):
                if name in taken:
                    raise ConfigError(f"two models are called {name!r}; give each a name of its own: NAME=MODEL")
                taken.add(name)
            self._join(service)
        if on_demand is not None:
            on_demand.came, on_demand.leaves, on_demand.hung = self._join, self._part, self._engine_hangs

    def _join(self, service: Service) -> None:
        service.neighbours, service.work, service.draining = self.names, self.work, self._draining
        service.metrics.join(self.metrics)
        service.engine.on_failure = lambda: self.on_failure()

    def _part(self, service: Service) -> None:
        service.metrics.part()

    def _engine_hangs(self) -> None:
        self._hung = True
        self.on_failure()

    # What is there ---------------------------------------------------------------------------------------------------

    @property
    def services(self) -> list[Service]:
        """The models that are loaded now."""
        return [*self._services, *(self.on_demand.services() if self.on_demand is not None else ())]

    @property
    def default(self) -> str:
        """The model of requests that name none."""
        if self._services:
            return self._services[0].name
        assert self.on_demand is not None, "a server has models"
        return self.on_demand.default

    def listed(self) -> list[Listed]:
        """All models, those that are loaded and those that can be."""
        here = [Listed(service.card, service.names, service) for service in self._services]
        return here if self.on_demand is None else [*here, *self.on_demand.listed()]

    def names(self) -> list[str]:
        """What a request may call the models."""
        return [name for one in self.listed() for name in one.names]

    async def look_again(self) -> None:
        """Find what can be loaded since the last look."""
        if self.on_demand is not None:
            await self.on_demand.look_again()

    def show(self, model: str | None) -> Listed:
        """What is known of a model, by any of its names, without loading it.

        Raises:
            ApiError: 404.
        """
        name = model or self.default
        for one in self.listed():
            if name in one.names:
                return one
        raise not_served(name, self.names())

    # Having one ------------------------------------------------------------------------------------------------------

    async def find(self, model: str | None, caller: Caller, keep_alive: float | None = None) -> Service:
        """The model that a request asks for, loaded where it was not; there until ``caller.let_go()``.

        Where nothing that stays is called so it is the first, whose routes then say what is served.

        Args:
            keep_alive: seconds that a model on demand stays afterwards; None: as long as it stays anyway.

        Raises:
            ApiError: 404, there is no such model to load; 503, the server ends; or it cannot be loaded.
            BusyError: too many wait for one already.
        """
        plain = plain_name(model)
        demand = self.on_demand
        if demand is None:
            named = (s for s in self._services if plain and (s.serves(plain) or s.serves(model)))
            return next(named, self._services[0])
        if self._draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=5)
        name = plain or self.default
        slot = demand.slot_of(name)
        if slot is None:
            await self.look_again()
            slot = demand.slot_of(name)
        if slot is None:
            raise not_served(name, self.names())
        service = await demand.take(slot, keep_alive)
        caller.held.append(partial(demand.give_back, slot))
        return service

    def unload(self, model: str | None) -> None:
        """Let a model on demand leave as soon as it is idle."""
        if self.on_demand is not None:
            slot = self.on_demand.slot_of(plain_name(model) or self.default)
            if slot is not None:
                self.on_demand.unload(slot)

    @property
    def grows(self) -> bool:
        """Whatever is in the local store is served, also what comes there later."""
        return self.on_demand is not None and self.on_demand.grows

    async def forget(self, name: str) -> None:
        """Take a model that is not in use out of memory and out of the local store.

        Raises:
            ApiError: it is in use, or belongs to the program.
        """
        assert self.on_demand is not None, "it offers what is in the store"
        slot = self.on_demand.slot_of(name)
        assert slot is not None, "it has been looked for"
        await self.on_demand.forget(slot)

    # Its life --------------------------------------------------------------------------------------------------------

    @property
    def draining(self) -> bool:
        """The server takes no more requests."""
        return self._draining

    @draining.setter
    def draining(self, value: bool) -> None:
        self._draining = value
        for service in self.services:
            service.draining = value

    @property
    def failed(self) -> bool:
        """An engine has failed."""
        return self._hung or any(service.engine.failed for service in self.services)

    @property
    def stuck(self) -> bool:
        """An engine's thread does not end by being asked."""
        return any(service.engine.stuck for service in self.services)

    def drop_all(self, error: QuadrigaError) -> None:
        """End every request with an error."""
        for service in self.services:
            service.engine.drop_all(error)
        if self.on_demand is not None:
            self.on_demand.end(error)

    async def prepare(self) -> None:
        """Nothing has to be there before the server is."""

    async def start(self) -> None:
        """Start the engines of the models that stay."""
        for service in self._services:
            await service.engine.start()

    async def stop(self, timeout_s: float) -> None:
        """Stop the engines, all at once."""
        ends = [service.end(timeout_s) for service in self._services]
        await asyncio.gather(*ends, *([] if self.on_demand is None else [self.on_demand.stop(timeout_s)]))
        self.work.close()


def plain_name(model: str | None) -> str:
    """A model's name without what Ollama's clients add: ``:latest``, and the place that it was pulled from."""
    name = (model or "").removesuffix(":latest")
    source = catalogue.source_of(name)  # another name only where a place stands before it
    return name if source in (None, name) else called(source)
