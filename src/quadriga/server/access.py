"""The access log: one line for every request, when its answer is complete, at level info of ``quadriga.access``.

    id=req_5f... client=127.0.0.1 POST /v1/chat/completions 200 812 ms model=tiny prompt=24 answer=96

The id is the client's own ``X-Request-Id`` where it sends one, and is in the answer's header. Keys are named by the
first eight digits of their SHA-256, never written out.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from dataclasses import dataclass, field

HEADER = "x-request-id"
_MAX_ID = 128

log = logging.getLogger("quadriga.access")


@dataclass
class Usage:
    """What a request was about, noted as it becomes known."""

    client: str = "?"
    """An address, or which key."""
    model: str | None = None
    n_prompt: int = 0
    """Tokens read, of all prompts and texts."""
    n_answer: int = 0
    """Tokens made, of all answers; also of those that were given up."""
    began: float = field(default_factory=time.perf_counter)
    """When it came, by ``time.perf_counter``."""
    first_s: float | None = None
    """Seconds from the request to its first token."""


@dataclass(frozen=True)
class Entry:
    """One request."""

    request_id: str
    method: str
    path: str
    status: int
    seconds: float
    usage: Usage

    def fields(self) -> dict[str, object]:
        """As a line of JSON has it."""
        used = self.usage
        return {
            "id": self.request_id,
            "client": used.client,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "ms": round(1000 * self.seconds, 1),
            "model": used.model,
            "prompt_tokens": used.n_prompt,
            "completion_tokens": used.n_answer,
        }

    def text(self) -> str:
        """As a person reads it."""
        used = self.usage
        about = f" model={used.model} prompt={used.n_prompt} answer={used.n_answer}" if used.model is not None else ""
        what = f"{self.method} {self.path} {self.status} {1000 * self.seconds:.0f} ms"
        return f"id={self.request_id} client={used.client} {what}{about}"


def write(entry: Entry, *, as_json: bool) -> None:
    """Add a line, if anybody wants it."""
    if log.isEnabledFor(logging.INFO):
        log.info("%s", json.dumps(entry.fields()) if as_json else entry.text())


def request_id(given: str | None) -> str:
    """The client's name for its request, if it is one that may be written down, else a new one."""
    if given and len(given) <= _MAX_ID and given.isascii() and given.isprintable() and " " not in given:
        return given
    return f"req_{secrets.token_hex(8)}"


def shown(text: str) -> str:
    """Something of a client's for one line of a log."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])
