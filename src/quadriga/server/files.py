"""/v1/files: what clients leave here for batches, and what batches leave for them; it outlives the server.

    DIR/file-ID.json    what it is, and whose        DIR/file-ID.data    its bytes

A file belongs to the key it came with; nobody else sees it. Where the server has no keys, everybody who asks does.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from quadriga.errors import ConfigError
from quadriga.server.caller import Caller
from quadriga.server.errors import ApiError
from quadriga.server.guard import Limits, take_body
from quadriga.server.multipart import boundary_of, take_apart
from quadriga.server.sse import json_response

_log = logging.getLogger(__name__)

MAX_FILES = 10_000
_FACTS = {"id": str, "bytes": int, "created_at": int, "filename": str, "purpose": str, "owner": str}
_ID = re.compile(r"file-[0-9a-f]{24}")
PURPOSES = ("batch", "assistants", "fine-tune", "vision", "user_data", "evals")


class FileStore:
    """See the module docstring. Small files of facts are written whole and renamed, so none is ever half there.

    Args:
        folder: made where it is missing.
        max_bytes: of all files together.
        clock: seconds since 1970.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(self, folder: Path, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self.folder, self.max_bytes, self.clock = folder, max_bytes, clock
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob("*.part"):  # of uploads that a stop cut off
                if not left.name.startswith("batch_"):
                    left.unlink()
            found = read_all(folder, "file-*.json", _FACTS)
        except OSError as error:
            raise ConfigError(f"--files {folder} cannot be used: {error.strerror}. Name a folder to write to") from None
        self._facts: dict[str, dict[str, Any]] = {}
        for facts in found:
            if self.path(facts["id"]).is_file():
                self._facts[facts["id"]] = facts
            else:
                _log.warning("the bytes of %s in %s are gone, and it is passed over", facts["id"], folder)

    def path(self, file_id: str) -> Path:
        """Where a file's bytes are."""
        return self.folder / f"{file_id}.data"

    def room(self) -> int:
        """Bytes that may still come."""
        used: int = sum(facts["bytes"] for facts in self._facts.values())
        return self.max_bytes - used

    def add(self, data: Path, filename: str, purpose: str, owner: str) -> dict[str, Any]:
        """Keep a file that lies in the folder already; it is renamed.

        Raises:
            ApiError: 413, there are too many.
        """
        if len(self._facts) >= MAX_FILES:
            raise ApiError(413, f"this server keeps {MAX_FILES} files; delete some", code="files_full")
        file_id = f"file-{secrets.token_hex(12)}"
        facts = {
            "id": file_id,
            "object": "file",
            "bytes": data.stat().st_size,
            "created_at": int(self.clock()),
            "filename": filename[:255],
            "purpose": purpose,
            "status": "processed",
            "owner": owner,
        }
        data.replace(self.path(file_id))
        write_facts(self.folder / f"{file_id}.json", facts)
        self._facts[file_id] = facts
        return facts

    def get(self, file_id: str, owner: str) -> dict[str, Any]:
        """What a file is.

        Raises:
            ApiError: 404, there is none of this id that belongs to the owner.
        """
        facts = self._facts.get(file_id) if _ID.fullmatch(file_id) else None
        if facts is None or facts["owner"] != owner:
            raise ApiError(404, f"there is no file {file_id[:80]!r}", code="not_found")
        return facts

    def delete(self, file_id: str, owner: str) -> None:
        """Forget a file and its bytes."""
        self.get(file_id, owner)
        del self._facts[file_id]
        (self.folder / f"{file_id}.json").unlink(missing_ok=True)
        self.path(file_id).unlink(missing_ok=True)

    def all(self, owner: str) -> list[dict[str, Any]]:
        """An owner's files, the newest first."""
        mine = [facts for facts in self._facts.values() if facts["owner"] == owner]
        return sorted(mine, key=lambda facts: (-facts["created_at"], facts["id"]))


def read_all(folder: Path, pattern: str, needed: dict[str, type]) -> list[dict[str, Any]]:
    """What files of facts say. One that is damaged is passed over, with a line in the log.

    Args:
        needed: keys that each has, ``id`` as its name, and of what type they are.
    """
    found = []
    for path in sorted(folder.glob(pattern)):
        try:
            facts = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            facts = None
        whole = isinstance(facts, dict) and all(isinstance(facts.get(key), kind) for key, kind in needed.items())
        if whole and facts["id"] == path.stem:
            found.append(facts)
        else:
            _log.warning("%s is damaged and is passed over", path)
    return found


def write_facts(path: Path, facts: dict[str, Any]) -> None:
    """Write them whole, then give them their name."""
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(facts))
    part.replace(path)


def owner_of(caller: Caller) -> str:
    """Whose files a caller's are."""
    return caller.salt.hex()


def shown(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts as clients see them."""
    return {key: value for key, value in facts.items() if key not in ("owner", "client")}


def page(request: Request, items: list[dict[str, Any]], most: int) -> Response:
    """A part of a list, as ``limit`` and ``after`` ask for it.

    Raises:
        ApiError: 400, a limit that is none, or ``after`` names nothing.
    """
    limit, after = request.query_params.get("limit", str(min(most, 10_000))), request.query_params.get("after")
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 6 and 1 <= int(limit) <= most):
        raise ApiError(400, f"limit must be from 1 to {most}, got {limit[:40]!r}", param="limit")
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise ApiError(400, f"after must be the id of one of the list, got {after[:80]!r}", param="after")
    begin = 0 if after is None else ids.index(after) + 1
    chosen = [shown(item) for item in items[begin : begin + int(limit)]]
    more = begin + len(chosen) < len(items)
    ends = {"first_id": chosen[0]["id"], "last_id": chosen[-1]["id"]} if chosen else {"first_id": None, "last_id": None}
    return json_response({"object": "list", "data": chosen, "has_more": more, **ends})


class FileRoutes:
    """The endpoints.

    Args:
        store: where files are.
        limits: of the server; a body is as long as the store has room for, not ``max_body_bytes``.
    """

    def __init__(self, store: FileStore, limits: Limits) -> None:
        self._store, self._limits = store, limits

    async def upload(self, request: Request) -> Response:
        """POST /v1/files."""
        boundary = boundary_of(request.headers.get("content-type", ""))
        part = self._store.folder / f"{secrets.token_hex(8)}.part"
        data = part.with_suffix(".data.part")
        try:
            with part.open("wb") as out:

                async def keep(piece: bytes) -> None:
                    await asyncio.to_thread(out.write, piece)

                room = max(0, self._store.room())
                full = f"there is room for {room} bytes more of files (--files-size); delete some"
                await take_body(request, self._limits, room, keep, full)
            form = await asyncio.to_thread(take_apart, part, boundary, data)
            purpose = form.fields.get("purpose", "")
            if purpose not in PURPOSES:
                raise ApiError(
                    400, f"purpose must be one of {', '.join(PURPOSES)}; got {purpose[:40]!r}", param="purpose"
                )
            facts = self._store.add(data, form.filename, purpose, owner_of(request.state.caller))
        finally:
            part.unlink(missing_ok=True)
            data.unlink(missing_ok=True)
        return json_response(shown(facts))

    async def listed(self, request: Request) -> Response:
        """GET /v1/files."""
        purpose = request.query_params.get("purpose")
        mine = self._store.all(owner_of(request.state.caller))
        order = request.query_params.get("order", "desc")
        if order not in ("asc", "desc"):
            raise ApiError(400, f"order must be asc or desc, got {order[:40]!r}", param="order")
        if order == "asc":
            mine.reverse()
        return page(request, [facts for facts in mine if purpose in (None, facts["purpose"])], MAX_FILES)

    async def one(self, request: Request) -> Response:
        """GET /v1/files/{id}."""
        return json_response(shown(self._store.get(request.path_params["id"], owner_of(request.state.caller))))

    async def content(self, request: Request) -> Response:
        """GET /v1/files/{id}/content."""
        facts = self._store.get(request.path_params["id"], owner_of(request.state.caller))
        path = self._store.path(facts["id"])
        if not path.is_file():
            raise ApiError(404, f"the bytes of {facts['id']} are gone from the disk; delete it", code="not_found")
        return FileResponse(path, media_type="application/octet-stream")

    async def delete(self, request: Request) -> Response:
        """DELETE /v1/files/{id}."""
        file_id = request.path_params["id"]
        self._store.delete(file_id, owner_of(request.state.caller))
        return json_response({"id": file_id, "object": "file", "deleted": True})
