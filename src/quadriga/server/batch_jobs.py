"""/v1/batches with files: requests of a file are answered in the background, and the answers become a file.

    validating ─► in_progress ─► finalizing ─► completed
         └► failed      ├► cancelling ─► cancelled
                        └► expired: what was not answered within the window

Everything is in the directory of the files: ``batch_ID.json`` has the state, ``batch_ID.output.part`` and its like for
errors the answers so far. A server that is started again goes on where the one before was stopped; no line is answered
twice but one whose answer was not on the disk yet.

Lines are computed when nobody else wants the places: at the lowest priority, some at once, one batch of an owner after
another; owners' batches go on beside each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from quadriga.server.batches import MAX_LINES, Handler, Line, answer_of
from quadriga.server.caller import Caller
from quadriga.server.errors import ApiError
from quadriga.server.files import FileStore, owner_of, page, read_all, shown, write_facts
from quadriga.server.schema import parse
from quadriga.server.sse import json_response

_log = logging.getLogger(__name__)

WINDOW_S = 24 * 3600
AT_ONCE = 16
"""Lines of a batch that are computed at once."""
MAX_BATCHES = 1_000
"""Kept of one owner; the oldest that are over are forgotten."""
MAX_ERRORS = 50
"""Lines that are named where a file cannot be a batch."""
OVER = ("completed", "failed", "expired", "cancelled")


class BatchRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/batches."""

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"] = "24h"
    metadata: dict[str, str] | None = None


class Desk(Protocol):
    """What answers lines for a client that is not there."""

    def handlers(self, caller: Caller) -> dict[str, Handler]:
        """Url -> what answers a line."""
        ...

    def caller(self, owner: str, client: str) -> Caller | None:
        """Who a batch is for, with its account; None where its key is none of this server's any more."""
        ...


class Stopped(Exception):
    """The server is about to end, or its engine has: the batch goes on another time."""


class BatchJobs:
    """See the module docstring. Of one event loop.

    Args:
        store: where files are.
        desk: what answers lines.
    """

    def __init__(self, store: FileStore, desk: Desk) -> None:
        self._store, self._desk = store, desk
        self._batches = {facts["id"]: facts for facts in read_all(store.folder, "batch_*.json", _FACTS)}
        self._work: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._under_way: dict[str, asyncio.Task[None]] = {}  # by owner
        self._stopped = False

    # The routes ------------------------------------------------------------------------------------------------------

    def create(self, body: BatchRequest, caller: Caller) -> dict[str, Any]:
        """A new batch.

        Raises:
            ApiError: its file is none, or it asks for what is not done.
        """
        owner, endpoints = owner_of(caller), self._desk.handlers(caller)
        if body.endpoint not in endpoints:
            raise ApiError(
                400, f"endpoint must be one of {', '.join(endpoints)}; got {body.endpoint[:80]!r}", param="endpoint"
            )
        facts = self._store.get(body.input_file_id, owner)
        if facts["purpose"] != "batch":
            raise ApiError(400, f"the file's purpose must be batch, it is {facts['purpose']}", param="input_file_id")
        if body.metadata and (
            len(body.metadata) > 16 or any(len(k) > 64 or len(v) > 512 for k, v in body.metadata.items())
        ):
            raise ApiError(400, "metadata has at most 16 pairs, of 64 and 512 characters", param="metadata")
        now = int(self._store.clock())
        batch: dict[str, Any] = {
            "id": f"batch_{secrets.token_hex(12)}",
            "object": "batch",
            "endpoint": body.endpoint,
            "errors": None,
            "input_file_id": body.input_file_id,
            "completion_window": body.completion_window,
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "expires_at": now + WINDOW_S,
            **dict.fromkeys(_TIMES.values()),
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": body.metadata,
            "owner": owner,
            "client": "" if owner else caller.client.decode(errors="replace"),
        }
        self._forget_old(owner)
        self._batches[batch["id"]] = batch
        self._save(batch)
        self._wake.set()
        return shown(batch)

    def get(self, batch_id: str, owner: str) -> dict[str, Any]:
        """A batch of an owner.

        Raises:
            ApiError: 404.
        """
        batch = self._batches.get(batch_id)
        if batch is None or batch["owner"] != owner:
            raise ApiError(404, f"there is no batch {batch_id[:80]!r}", code="not_found")
        return batch

    async def listed(self, request: Request) -> Response:
        """GET /v1/batches."""
        owner = owner_of(request.state.caller)
        mine = [batch for batch in self._batches.values() if batch["owner"] == owner]
        return page(request, sorted(mine, key=lambda b: (-b["created_at"], b["id"])), 100)

    async def one(self, request: Request) -> Response:
        """GET /v1/batches/{id}."""
        return json_response(shown(self.get(request.path_params["id"], owner_of(request.state.caller))))

    async def cancel(self, request: Request) -> Response:
        """POST /v1/batches/{id}/cancel: lines that are computed end, no more begin."""
        batch = self.get(request.path_params["id"], owner_of(request.state.caller))
        if batch["status"] not in ("validating", "in_progress", "cancelling"):
            raise ApiError(400, f"a batch that is {batch['status']} cannot be cancelled")
        if batch["status"] != "cancelling":
            self._set(batch, "cancelling")
            self._wake.set()
        return json_response(shown(batch))

    # The work --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Go on with what is not over, and with what comes."""
        self._wake.set()
        self._work = asyncio.create_task(self._go_on())

    async def stop(self) -> None:
        """Leave what is under way for another time."""
        tasks = [task for task in (self._work, *self._under_way.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _go_on(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            for owner in {batch["owner"] for batch in self._batches.values()} - self._under_way.keys():
                if not self._stopped and self._next(owner) is not None:
                    self._under_way[owner] = asyncio.create_task(self._of_owner(owner))

    async def _of_owner(self, owner: str) -> None:
        try:
            while not self._stopped and (batch := self._next(owner)) is not None:
                try:
                    await self._run(batch)
                except Stopped:
                    _log.warning("batch %s waits for the next start of this server", batch["id"])
                    self._stopped = True
                except Exception:
                    _log.exception("batch %s failed by a mistake of ours", batch["id"])
                    self._refuse(batch, [(None, "internal_error", "a mistake of the server's; its log says more")])
        finally:
            del self._under_way[owner]
            self._wake.set()

    def _next(self, owner: str) -> dict[str, Any] | None:
        mine = (batch for batch in self._batches.values() if batch["owner"] == owner and batch["status"] not in OVER)
        return min(mine, key=lambda batch: batch["created_at"], default=None)

    async def _run(self, batch: dict[str, Any]) -> None:
        caller = self._desk.caller(batch["owner"], batch["client"])
        source = self._store.path(batch["input_file_id"])
        if caller is None or not source.exists():
            self._refuse(batch, [(None, "not_found", "the file, or the key it came with, is gone")])
            return
        handlers = self._desk.handlers(caller)
        if batch["status"] == "validating":
            total, errors = await asyncio.to_thread(_validate, source, batch["endpoint"])
            batch["request_counts"]["total"] = total
            if errors:
                self._refuse(batch, errors)
                return
            if batch["status"] == "validating":  # not cancelled meanwhile
                self._set(batch, "in_progress")
        done = _Answers(self._part(batch, "output"), self._part(batch, "error"))
        with contextlib.closing(done):
            batch["request_counts"].update(completed=done.n_good, failed=done.n_bad)
            left = (line for _, line in _lines(source) if _id_of(line) not in done.ids)
            await self._answer(batch, handlers[batch["endpoint"]], left, done)
            state = batch["status"]
            if state == "in_progress" and self._late(batch):
                state = "expired"
                for line in left:
                    done.unanswered(_id_of(line))
        self._finish(batch, {"cancelling": "cancelled", "in_progress": "completed"}.get(state, state))

    async def _answer(self, batch: dict[str, Any], handler: Handler, left: Iterator[bytes], done: _Answers) -> None:
        stop = False

        async def some() -> None:
            nonlocal stop
            while not stop and batch["status"] == "in_progress" and not self._late(batch):
                line = next(left, None)
                if line is None:
                    return
                await asyncio.sleep(0)
                status, body = await answer_of(handler, line)
                if status == 503:
                    stop = True
                    return
                done.add(_id_of(line), status, body)
                counts = batch["request_counts"]
                counts.update(completed=done.n_good, failed=done.n_bad)

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(some())
        if stop:
            raise Stopped

    def _late(self, batch: dict[str, Any]) -> bool:
        return bool(self._store.clock() >= batch["expires_at"])

    def _finish(self, batch: dict[str, Any], state: str) -> None:
        """The answers become files, and the batch is over."""
        self._set(batch, "finalizing" if state == "completed" else batch["status"])
        for kind in ("output", "error"):
            part = self._part(batch, kind)
            if part.exists() and part.stat().st_size:
                with part.open("rb") as written:
                    os.fsync(written.fileno())
                facts = self._store.add(part, f"{batch['id']}_{kind}.jsonl", "batch_output", batch["owner"])
                batch[f"{kind}_file_id"] = facts["id"]
            part.unlink(missing_ok=True)
        self._set(batch, state)

    def _refuse(self, batch: dict[str, Any], errors: list[tuple[int | None, str, str]]) -> None:
        data = [{"line": line, "code": code, "message": message, "param": None} for line, code, message in errors]
        batch["errors"] = {"object": "list", "data": data}
        self._set(batch, "failed")

    def _set(self, batch: dict[str, Any], state: str) -> None:
        batch["status"] = state
        if state in _TIMES and batch[_TIMES[state]] is None:
            batch[_TIMES[state]] = int(self._store.clock())
        self._save(batch)

    def _save(self, batch: dict[str, Any]) -> None:
        write_facts(self._store.folder / f"{batch['id']}.json", batch)

    def _part(self, batch: dict[str, Any], kind: str) -> Path:
        return self._store.folder / f"{batch['id']}.{kind}.part"

    def _forget_old(self, owner: str) -> None:
        mine = [b for b in self._batches.values() if b["owner"] == owner]
        over = sorted((b for b in mine if b["status"] in OVER), key=lambda b: b["created_at"])
        if len(mine) >= MAX_BATCHES and not over:
            raise ApiError(429, f"{len(mine)} batches are not over; wait for some", retry_after_s=60)
        for batch in over[: max(0, len(mine) - MAX_BATCHES + 1)]:
            del self._batches[batch["id"]]
            (self._store.folder / f"{batch['id']}.json").unlink(missing_ok=True)


_TIMES = {
    "in_progress": "in_progress_at",
    "finalizing": "finalizing_at",
    "completed": "completed_at",
    "failed": "failed_at",
    "expired": "expired_at",
    "cancelling": "cancelling_at",
    "cancelled": "cancelled_at",
}


_FACTS = {
    **dict.fromkeys(("id", "endpoint", "input_file_id", "status", "owner", "client"), str),
    **dict.fromkeys(("created_at", "expires_at"), int),
    "request_counts": dict,
}


class _Answers:
    """The answers of a batch so far, on the disk; what is damaged, as a last line that a stop cut off, is taken away,
    with all behind it, and answered again."""

    def __init__(self, good: Path, bad: Path) -> None:
        self.ids = set[str]()
        self.n_good, self.n_bad = self._read(good), self._read(bad)
        self._good, self._bad = good.open("ab"), bad.open("ab")

    def _read(self, path: Path) -> int:
        n = length = 0
        if path.exists():
            with path.open("rb") as lines:
                for line in lines:
                    try:
                        answered = msgspec.json.decode(line, type=_Answered)
                    except msgspec.DecodeError:
                        break
                    if not line.endswith(b"\n"):
                        break
                    self.ids.add(answered.custom_id)
                    n, length = n + 1, length + len(line)
            os.truncate(path, length)
        return n

    def add(self, custom_id: str, status: int, body: Any) -> None:
        response = {"status_code": status, "request_id": f"req_{secrets.token_hex(8)}", "body": body}
        self._write(custom_id, status < 400, response, None)

    def unanswered(self, custom_id: str) -> None:
        self._write(custom_id, False, None, {"code": "batch_expired", "message": "the batch's window was over"})

    def _write(self, custom_id: str, good: bool, response: Any, error: Any) -> None:
        head = {"id": f"batch_req_{secrets.token_hex(8)}", "custom_id": custom_id}
        out = self._good if good else self._bad
        out.write(msgspec.json.encode({**head, "response": response, "error": error}) + b"\n")
        out.flush()
        self.n_good, self.n_bad = self.n_good + good, self.n_bad + (not good)

    def close(self) -> None:
        self._good.close()
        self._bad.close()


class _Answered(Struct):
    custom_id: str


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line


def _id_of(line: bytes) -> str:
    return msgspec.json.decode(line, type=_Answered).custom_id


def _validate(path: Path, endpoint: str) -> tuple[int, list[tuple[int | None, str, str]]]:
    """(lines, what is wrong with which)."""
    total, seen, errors = 0, set[str](), list[tuple[int | None, str, str]]()
    for number, text in _lines(path):
        total += 1
        if total > MAX_LINES:
            return total, [(None, "too_many_tasks", f"a batch has at most {MAX_LINES} lines")]
        try:
            line = parse(text, Line)
        except ApiError as error:
            errors.append((number, "invalid_json_line", str(error)))
        else:
            if line.url != endpoint:
                errors.append(
                    (number, "mismatched_endpoint", f"url must be the batch's {endpoint}, got {line.url[:80]!r}")
                )
            elif line.custom_id in seen:
                errors.append((number, "duplicate_custom_id", f"the custom_id {line.custom_id[:80]!r} comes twice"))
            seen.add(line.custom_id)
        if len(errors) == MAX_ERRORS:
            break
    return total, errors or ([] if total else [(None, "empty_file", "the file has no lines")])
