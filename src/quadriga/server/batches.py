"""POST /v1/batches: requests as JSON lines in, answers as JSON lines out, as each is done. Nothing is stored.

A line is ``{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}``, as OpenAI's batch
files have it; so is a line of the answer.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from msgspec import Struct
from starlette.responses import Response

from quadriga.errors import QuadrigaError
from quadriga.server.errors import ApiError, as_api_error
from quadriga.server.schema import convert, parse_json
from quadriga.server.sse import EventSender, EventStream

MAX_LINES = 50_000
_AT_ONCE = 32

Handler = Callable[[Any], Awaitable[Response]]


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
        handlers: url -> what answers a body, never a stream.

    Raises:
        ApiError: 400 that names the line.
    """
    lines = []
    for number, text in enumerate(raw.splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = convert(parse_json(text), Line)
            if line.url not in handlers:
                raise ApiError(400, f"url must be one of {', '.join(handlers)}; got {line.url[:80]!r}", param="url")
        except ApiError as error:
            raise ApiError(400, f"line {number}: {error}", param=error.param) from None
        lines.append(line)
    if not 1 <= len(lines) <= MAX_LINES:
        raise ApiError(400, f"a batch has 1 to {MAX_LINES} lines, got {len(lines)}")
    if len({line.custom_id for line in lines}) < len(lines):
        raise ApiError(400, "two lines have the same custom_id", param="custom_id")

    async def produce(sender: EventSender) -> None:
        places = asyncio.Semaphore(_AT_ONCE)

        async def one(line: Line) -> None:
            async with places:
                status, body = await _answer(handlers[line.url], line.body)
            response = {"status_code": status, "request_id": f"req_{secrets.token_hex(8)}", "body": body}
            answer = {"id": f"batch_req_{secrets.token_hex(8)}", "custom_id": line.custom_id}
            sender.raw(json.dumps({**answer, "response": response, "error": None}).encode() + b"\n")
            await sender.flush()

        async with asyncio.TaskGroup() as group:
            for line in lines:
                group.create_task(one(line))

    return JsonLines(produce)


async def _answer(handler: Handler, body: dict[str, Any]) -> tuple[int, Any]:
    while True:
        try:
            response = await handler(body)
            return response.status_code, json.loads(bytes(response.body))
        except QuadrigaError as error:
            shown = as_api_error(error)
            if shown.code != "queue_full":
                return shown.status, shown.openai()
            await asyncio.sleep(0.1)  # others are served first; a batch can wait
