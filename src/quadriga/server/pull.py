"""POST /api/pull and DELETE /api/delete: models come to this machine and go, where a server offers what is here.

    /api/pull ─► served already: success ─► else, with the admin key: a process fetches it ─► its lines, as Ollama's
                                            the client leaves: the process is stopped, and what it has is kept

Ollama's progress: https://github.com/ollama/ollama, docs/api.md, "Pull a Model". A status without a digest is a step,
one with a digest, a total and what is complete is a bar.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import sys
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.responses import Response

from quadriga import runtime
from quadriga.errors import BusyError, CatalogueError
from quadriga.hub import catalogue
from quadriga.server.caller import Caller
from quadriga.server.errors import ApiError
from quadriga.server.fleet import Fleet, plain_name
from quadriga.server.ollama import Lines, line
from quadriga.server.ollama_models import OllamaModel
from quadriga.server.sse import EventSender, json_response

MAX_PULLS = 4
"""Models that are fetched at once."""

GRACE_S = 5.0
"""For a process that was told to stop; then it is ended."""

FETCH = (sys.executable, "-m", "quadriga.hub.fetching")


class Pulls:
    """Fetches models. Of one event loop.

    Args:
        fleet: learns of what has come.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.n_under_way = 0
        self._ends: set[asyncio.Task[None]] = set()

    async def pull(self, body: OllamaModel, caller: Caller) -> Response:
        """POST /api/pull.

        Raises:
            ApiError: there is no such model, or the caller may not fetch it.
            BusyError: enough are fetched already.
        """
        await self._fleet.look_again()
        name = named(body)
        if plain_name(name) in self._fleet.names():
            return _done(stream=body.stream)
        source = self._may(name, caller)
        if self.n_under_way >= MAX_PULLS:
            raise BusyError(f"{self.n_under_way} models are being fetched; try again later")
        if body.stream:
            return Lines(lambda sender: self._streamed(source, sender))
        async with contextlib.aclosing(self._fetched(source)) as told:
            try:
                async for _ in told:
                    pass
            except CatalogueError as error:
                raise ApiError(500, str(error), code="pull_failed") from None
        return _done(stream=False)

    async def delete(self, body: OllamaModel, caller: Caller) -> Response:
        """DELETE /api/delete: out of memory, and off the disk.

        Raises:
            ApiError: there is no such model, it answers just now, or the caller may not delete it.
        """
        name = plain_name(named(body))
        self._fleet.show(name)
        self._check(caller, "deleted")
        await self._fleet.forget(name)
        return Response()

    def _may(self, name: str, caller: Caller) -> str:
        source = catalogue.source_of(name)
        if source is None:
            message = (
                f"there is no model {name[:100]!r} to pull: give a name of `quadriga models list`, hf.co/ORG/REPO, or "
                "hf.co/ORG/REPO:Q4_K_M"
            )
            raise ApiError(404, message, param="model", code="model_not_found")
        self._check(caller, "pulled")
        return source

    def _check(self, caller: Caller, what: str) -> None:
        if not self._fleet.grows:
            message = (
                f"models cannot be {what} here: the server serves what it was started with. With --models-memory and "
                "without MODEL it serves what is in the local store"
            )
            raise ApiError(400, message)
        if not caller.is_admin:
            raise ApiError(403, f"models are {what} with the key of --admin-key: Authorization: Bearer KEY")

    async def _streamed(self, source: str, sender: EventSender) -> None:
        line(sender, {"status": "pulling manifest"})
        await sender.flush()
        async with contextlib.aclosing(self._fetched(source)) as told:
            async for step in told:
                line(sender, progress(source, step))
                await sender.flush()
        line(sender, {"status": "success"})

    async def _fetched(self, source: str) -> AsyncGenerator[dict[str, Any], None]:
        """How far a process is that fetches a model; the model is offered once this ends.

        Raises:
            CatalogueError: it could not be fetched.
        """
        self.n_under_way += 1
        process = None
        try:
            pipe, none = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
            process = await asyncio.create_subprocess_exec(
                *FETCH,
                source,
                stdin=pipe,
                stdout=pipe,
                stderr=none,
                start_new_session=True,
                env=runtime.child_environment(),
            )
            assert process.stdout is not None, "it has been asked for"
            last: dict[str, Any] = {}
            async for raw in process.stdout:
                last = msgspec.json.decode(raw)
                if "done" in last:
                    yield last
            if "path" not in last:
                raise CatalogueError(
                    last.get("error", "the process that fetched it has ended without a word; try again")
                )
            await self._fleet.look_again()
        finally:
            self.n_under_way -= 1
            if process is not None:
                # By itself: whoever is cancelled here has no time to wait.
                task = asyncio.create_task(_end(process))
                self._ends.add(task)
                task.add_done_callback(self._ends.discard)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Let a process know that nobody waits for it any more, and see that it ends."""
    assert process.stdin is not None, "it has been asked for"
    process.stdin.close()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), GRACE_S)
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def named(body: OllamaModel) -> str:
    """The model that is meant, as it is asked for.

    Raises:
        ApiError: none is.
    """
    name = (body.model or body.name or "").removesuffix(":latest")
    if not name:
        raise ApiError(400, "a request needs the name of a model", param="model")
    return name


def progress(source: str, step: dict[str, Any]) -> dict[str, Any]:
    """A step as Ollama's clients draw it. The digest names the bar; it is no file's."""
    digest = hashlib.sha256(f"{source} {step['name']}".encode()).hexdigest()
    bar = {"status": f"pulling {step['name']}", "digest": f"sha256:{digest}"}
    return bar | ({"total": step["total"], "completed": step["done"]} if step["total"] else {})


def _done(*, stream: bool) -> Response:
    if not stream:
        return json_response({"status": "success"})

    async def produce(sender: EventSender) -> None:
        line(sender, {"status": "success"})

    return Lines(produce)
