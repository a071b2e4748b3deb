"""The models of one server: each with an engine and a thread of its own; a request's ``model`` chooses.

Requests without a model go to the first. All share the clients' accounts, the metrics (labelled by model) and the
process: when one engine fails, the server ends as it does with one model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from quadriga.errors import ConfigError, QuadrigaError
from quadriga.server.service import Service


class Fleet:
    """See the module docstring.

    Args:
        services: at least one.

    Raises:
        ConfigError: a name that two of them have.
    """

    def __init__(self, services: Sequence[Service]) -> None:
        self.services = list(services)
        self.first = self.services[0]
        taken: dict[str, Service] = {}
        for service in self.services:
            for name in (service.name, *service.aliases):
                if name in taken:
                    raise ConfigError(f"two models are called {name!r}; give each a name of its own: NAME=MODEL")
                taken[name] = service
            service.neighbours = self.names
            if service is not self.first:
                service.metrics.join(self.first.metrics)

    def __iter__(self) -> Iterator[Service]:
        return iter(self.services)

    def names(self) -> list[str]:
        """What a request may call the models."""
        return [name for service in self.services for name in service.names]

    def of(self, model: str | None) -> Service:
        """The model that a request asks for; the first where nothing is served under its name, which then says so."""
        plain = (model or "").removesuffix(":latest")  # Ollama's clients write that
        return next((s for s in self.services if plain and (s.serves(plain) or s.serves(model))), self.first)

    @property
    def draining(self) -> bool:
        """The server takes no more requests."""
        return self.first.draining

    @draining.setter
    def draining(self, value: bool) -> None:
        for service in self.services:
            service.draining = value

    @property
    def failed(self) -> bool:
        """An engine has failed."""
        return any(service.engine.failed for service in self.services)

    @property
    def stuck(self) -> bool:
        """An engine's thread does not end by being asked."""
        return any(service.engine.stuck for service in self.services)

    def drop_all(self, error: QuadrigaError) -> None:
        """End every request with an error."""
        for service in self.services:
            service.engine.drop_all(error)

    async def start(self) -> None:
        """Start the engines."""
        for service in self.services:
            await service.engine.start()

    async def stop(self, timeout_s: float) -> None:
        """Stop the engines, all at once."""
        await asyncio.gather(*(service.engine.stop(timeout_s) for service in self.services))
        for service in self.services:
            service.work.close()
            if service.llm.engine.disk is not None:
                await asyncio.to_thread(service.llm.engine.disk.close)
