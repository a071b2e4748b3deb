"""The chat page's files."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PAGE = Path(__file__).parent / "static"

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}


def page_routes(folder: Path) -> list[Route]:
    """The chat page: a fixed list of files, read once. No path of a request ever reaches the file system."""
    if not (folder / "index.html").exists():
        return []
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def serve(path: Path) -> Callable[[Request], Awaitable[Response]]:
        raw = path.read_bytes()
        tag = f'"{hashlib.sha256(raw).hexdigest()[:24]}"'
        kind = "text/javascript" if path.suffix in (".js", ".mjs") else mimetypes.guess_type(path.name)[0]
        headers = {**HEADERS, "etag": tag, "cache-control": "no-cache"}

        async def endpoint(request: Request) -> Response:
            if request.headers.get("if-none-match") == tag:
                return Response(status_code=304, headers=headers)
            return Response(raw, headers=headers, media_type=kind or "application/octet-stream")

        return endpoint

    routes = [Route("/", serve(folder / "index.html"), methods=["GET"])]
    routes += [Route(f"/page/{name}", serve(path), methods=["GET"]) for name, path in files.items()]
    if "favicon.svg" in files:
        routes.append(Route("/favicon.ico", serve(files["favicon.svg"]), methods=["GET"]))
    return routes
