"""How a loaded model becomes a service: in the server's own process, when it is asked for, or in a replica's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quadriga.engine.llm import LLM
from quadriga.server.service import Service


@dataclass(frozen=True, kw_only=True)
class Hosting:
    """What holds for every model of a server."""

    max_waiting: int
    """Requests that may wait; more get 429."""
    step_timeout_s: float
    """Seconds that a pass may take; 0: any."""
    tool_form: str = "auto"
    reasoning: bool = True
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Name -> folder."""
    prefix_cache: str | None = None
    """Folder in which every model has one for known prefixes; None: they are not kept on disk."""
    prefix_cache_bytes: int = 0
    """For each model."""

    def service(self, llm: LLM, names: Sequence[str]) -> Service:
        """The service of a model that clients call by any of these names.

        Raises:
            ConfigError: an adapter or the folder of prefixes cannot be used, or not with this model.
        """
        if self.prefix_cache is not None:
            llm.engine.keep_prefixes(Path(self.prefix_cache) / names[0].replace("/", "_"), self.prefix_cache_bytes)
        for name, folder in self.adapters.items():
            llm.add_adapter(name, folder)
        return Service(
            llm,
            name=names[0],
            aliases=names[1:],
            max_waiting=self.max_waiting,
            step_timeout_s=self.step_timeout_s,
            tool_form=self.tool_form,
            reasoning=self.reasoning,
        )
