"""Who asks: what the guard found out about a request's sender."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from quadriga.server.access import Usage
from quadriga.server.accounts import Visit


@dataclass
class Caller:
    """Who asks: what the guard found out about the connection."""

    salt: bytes = b""
    """Prefixes in the cache, and compiled grammars, are shared within one key only."""
    client: bytes = b""
    """The key, or the address where there are no keys: clients are served in turn."""
    visit: Visit | None = None
    """The HTTP request's part of the client's account."""
    background: bool = False
    """A line of a batch: computed when nobody else wants the place, whatever priority it asks for; it waits for places
    and allowances instead of being refused, and what its client asks besides is refused none on its account."""
    is_admin: bool = False
    """It has given the key of ``--admin-key``, on a route that asks for it."""
    n_bytes: int = 0
    """Of the request's body, or of its line in a batch: says where it is worked on (``server.work``)."""
    usage: Usage = field(default_factory=Usage)
    """What the access log is told; shared by the lines of a batch."""
    held: list[Callable[[], None]] = field(default_factory=list)
    """What gives back the models on demand that it has."""

    def let_go(self) -> None:
        """Give back the models on demand that it has: its answer is out."""
        while self.held:
            self.held.pop()()

    @property
    def key_name(self) -> str:
        """What logs and metrics call its key: the first digits of the key's SHA-256; empty where there is none."""
        return f"key:{self.salt.hex()[:8]}" if self.salt else ""

    @property
    def queue_name(self) -> bytes:
        """Whose turn it is in queues that know no priorities: a client's batches and its other requests take turns."""
        return self.client + b" in the background" if self.background else self.client

    def step_back(self) -> Caller:
        """The one whose request turned out to be a batch: nobody waits for its lines."""
        if self.visit is not None:
            self.visit.step_back()
        return replace(self, background=True)

    async def enter(self, n_sequences: int) -> None:
        """Begin so many answers or texts.

        Raises:
            ApiError: more than the client may have.
        """
        if self.visit is not None:
            await self.visit.enter(n_sequences)

    def leave(self, n_sequences: int, n_read: int, n_made: int = 0) -> None:
        """They have ended, and so many tokens were read and made for them."""
        self.usage.n_prompt += n_read
        self.usage.n_answer += n_made
        if self.visit is not None:
            self.visit.leave(n_sequences, n_read + n_made)
