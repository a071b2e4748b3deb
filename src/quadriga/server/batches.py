"""POST /v1/batches with lines: requests as JSON lines in, answers as JSON lines out, as each is done. Nothing stays.
With the name of a file it is ``batch_jobs``'.

A line is ``{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}``, as OpenAI's batch
files have it; so is a line of the answer.
"""

from __future__ import annotations

import asyncio
import io
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct
from starlette.responses import Response

from quadriga.errors import QuadrigaError
from quadriga.server.errors import ApiError, as_api_error
from quadriga.server.fields import checked
from quadriga.server.schema import parse
from quadriga.server.sse import EventSender, EventStream, part

MAX_LINES = 50_000
_AT_ONCE = 32

T = TypeVar("T")
Handler = Callable[[bytes], Awaitable[Response]]


class Line(Struct, kw_only=True, forbid_unknown_fields=True):
    """One request of a batch."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: Literal["POST"] = "POST"


class JsonLines(EventStream):
    """A stream of JSON lines instead of events."""

    media_type = "application/jsonl"
    pings = False


def run(raw: bytes, handlers: dict[str, Handler]) -> Response:
    """Check every line first, then answer them all.

    Args:
        handlers: url -> what answers a line, never as a stream.

    Raises:
        ApiError: 400 that names the line.
    """
    lines: list[tuple[str, str, bytes]] = []
    if raw.count(b"\n") > 2 * MAX_LINES:  # empty ones between them too
        raise ApiError(400, f"a batch has 1 to {MAX_LINES} lines, got more; send it in parts")
    for number, text in enumerate(io.BytesIO(raw), 1):
        if not text.strip():
            continue
        if len(lines) == MAX_LINES:
            raise ApiError(400, f"a batch has 1 to {MAX_LINES} lines, got more; send it in parts")
        try:
            line = parse(text, Line)
            if line.url not in handlers:
                raise ApiError(400, f"url must be one of {', '.join(handlers)}; got {line.url[:80]!r}", param="url")
        except ApiError as error:
            raise ApiError(400, f"line {number}: {error}", param=error.param) from None
        # Kept as bytes and parsed again in its turn: the collector would stop everybody to look through 50,000 bodies.
        lines.append((line.custom_id, line.url, text))
    if not lines:
        raise ApiError(400, f"a batch has 1 to {MAX_LINES} lines, got 0")
    if len({custom_id for custom_id, _, _ in lines}) < len(lines):
        raise ApiError(400, "two lines have the same custom_id", param="custom_id")

    async def produce(sender: EventSender) -> None:
        left, turn = iter(lines), asyncio.Lock()

        async def answer_some() -> None:
            for custom_id, url, text in left:
                async with turn:  # one line begins, then others get their turn: refused at once, it waits for nothing
                    await asyncio.sleep(0)
                status, body = await answer_of(handlers[url], text)
                response = {"status_code": status, "request_id": f"req_{secrets.token_hex(8)}", "body": body}
                answer = {"id": f"batch_req_{secrets.token_hex(8)}", "custom_id": custom_id}
                sender.raw(bytes(part({**answer, "response": response, "error": None})) + b"\n")
                await sender.flush()

        async with asyncio.TaskGroup() as group:
            for _ in range(min(_AT_ONCE, len(lines))):
                group.create_task(answer_some())

    return JsonLines(produce)


def body_of(line: bytes, kind: type[T], strict: bool) -> tuple[T, list[str]]:
    """The body of a line that was checked, as one of the types of ``schema``, and what was left out; see ``fields``.

    Raises:
        ApiError: 400 that names the field and what is wrong with it.
    """
    return checked(parse(line, Line).body, kind, strict=strict)


async def answer_of(handler: Handler, line: bytes) -> tuple[int, Any]:
    """(status, body as JSON) of one line; waits while the queue is full."""
    while True:
        try:
            response = await handler(line)
            return response.status_code, msgspec.Raw(response.body)
        except QuadrigaError as error:
            refused = _refusal(error)
        if refused is not None:
            return refused
        await asyncio.sleep(0.1)  # others are served first; a batch can wait


def _refusal(error: QuadrigaError) -> tuple[int, Any] | None:
    """An error as an answer; None if it is only that the queue is full."""
    shown = as_api_error(error)
    return None if shown.code == "queue_full" else (shown.status, shown.openai())
