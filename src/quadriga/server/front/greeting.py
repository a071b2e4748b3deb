"""What a stream begins with before there is a token of the answer; until then, another replica may make all of it.

OpenAI's chat says whose turn it is, Anthropic's messages and OpenAI's responses that something has been begun. An error
of the engine that comes in place of the first token is the replica's, and no answer.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import msgspec

_GREETINGS = ("message_start", "ping", "response.created", "response.in_progress")
"""Types of events."""

_MAX_BYTES = 1 << 20
"""An event that is not over by then is an answer."""


class Begins(Enum):
    """What the first events of a stream are."""

    GREETING = 0
    ANSWER = 1
    FAILURE = 2


def begins(raw: bytes, content_type: bytes) -> Begins:
    """What there is so far of a stream; what is not understood is an answer."""
    events_only = content_type.startswith(b"text/event-stream")
    *events, rest = raw.split(b"\n\n" if events_only else b"\n")
    for event in events:
        kind = _kind(event) if events_only else _of_body(event)
        if kind is not Begins.GREETING:
            return kind
    return Begins.ANSWER if len(rest) > _MAX_BYTES else Begins.GREETING


def _kind(event: bytes) -> Begins:
    lines = [line for line in event.split(b"\n") if line and not line.startswith(b":")]
    if not lines:
        return Begins.GREETING
    data = [line[5:] for line in lines if line.startswith(b"data:")]
    return _of_body(data[0]) if data else Begins.ANSWER


def _of_body(raw: bytes) -> Begins:
    try:
        body: Any = msgspec.json.decode(raw)
        error = body.get("error")
        if isinstance(error, str) or (isinstance(error, dict) and _is_replicas(error)):
            return Begins.FAILURE
        if body.get("type") in _GREETINGS:
            return Begins.GREETING
        deltas = [choice["delta"] for choice in body["choices"]]
        greets = bool(deltas) and all(delta.get("role") and not delta.get("content") for delta in deltas)
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError):
        return Begins.ANSWER
    return Begins.GREETING if greets else Begins.ANSWER


def _is_replicas(error: dict[str, Any]) -> bool:
    return error.get("code") == "engine_error" or error.get("type") == "overloaded_error"
