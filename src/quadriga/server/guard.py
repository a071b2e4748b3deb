"""Who may ask, and how much: host and origin, keys, rates, and bodies that are bounded in size and time.

A browser can be made to send requests to a server on this machine by any page it shows, so the Host header must be one
of ours (DNS rebinding) and the Origin header, where there is one, must be ours or allowed.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quadriga.server import access
from quadriga.server.accounts import Account, Allowance, Visit
from quadriga.server.caller import Caller
from quadriga.server.errors import ApiError
from quadriga.server.sse import json_response
from quadriga.server.tracing import Spans

OPEN_PATHS = ("/health", "/v1/health")
_PAGE = ("/", "/favicon.ico")
PROBE_PATHS = tuple(f"{prefix}/{name}" for prefix in ("", "/v1") for name in ("health", "ready", "metrics"))
ADMIN_PATHS = tuple(f"{prefix}/{verb}_lora_adapter" for prefix in ("", "/v1") for verb in ("load", "unload"))
"""What changes the server; the key of whoever may is asked for in place of another."""
MANAGED_PATHS = ("/api/pull", "/api/delete")
"""Where the admin key is taken in place of another; the route knows what needs it."""
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server allows."""

    keys: tuple[str, ...] = ()
    """API keys; none means everybody."""
    hosts: tuple[str, ...] = ()
    """Host names besides loopback's; "*" is any."""
    origins: tuple[str, ...] = ()
    """Origins of other sites' pages that may ask, e.g. "https://chat.example.org"; "*" is any."""
    max_body_bytes: int = 8 << 20
    body_timeout_s: float = 30.0
    requests_per_minute: int = 0
    """Sequences for each key (for each address where there are no keys); 0 is no limit. See ``accounts``."""
    tokens_per_minute: int = 0
    """Tokens read and made for each key or address; 0 is no limit."""
    tokens_per_day: int = 0
    """The same in a day, refilled all the time."""
    concurrent: int = 0
    """Sequences at once for each key or address; 0 is no limit."""
    strict: bool = False
    """Refuse fields that have no meaning here, instead of naming them in a header; see ``fields``."""
    open_probes: bool = False
    """/health, /ready and /metrics answer under any Host name: those who ask them go by addresses."""
    admin_key: str = ""
    """The key that may change what is served; nobody may where it is empty."""
    log_json: bool = False
    """Lines of the access log are JSON."""
    behind: Callable[[access.Entry], None] | None = None
    """This server is a front's replica: who asks comes in a header, and this is told what every request has used."""

    @property
    def allowance(self) -> Allowance:
        """What each client may use."""
        return Allowance(
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            tokens_per_day=self.tokens_per_day,
            concurrent=self.concurrent,
        )


_MANY_ACCOUNTS = 10_000
"""Accounts above this are looked through for those that may be forgotten."""


CALLER = "x-quadriga-caller"
"""The header in which a front tells its replicas who asks."""


def caller_header(caller: Caller) -> bytes:
    """Who asks, for a replica."""
    return f"{caller.salt.hex()}.{caller.client.hex()}.{'b' * caller.background}".encode()


def caller_of(text: str, usage: access.Usage) -> Caller:
    """The caller that a front's header names."""
    salt, client, flags = (text or "..").split(".")
    return Caller(
        salt=bytes.fromhex(salt),
        client=bytes.fromhex(client),
        background=flags == "b",
        usage=usage,
    )


class Guard:
    """ASGI middleware; see the module docstring.

    Args:
        app: what answers.
        limits: who may ask, and how much.
        clock: seconds that only go forward.
    """

    def __init__(self, app: ASGIApp, limits: Limits, *, clock: Callable[[], float] | None = None) -> None:
        self.app, self.limits = app, limits
        self._clock = clock or (lambda: time.monotonic())
        self._accounts: dict[str, Account] = {}
        self.spans: Spans | None = None
        """Where a span of every request goes."""
        self.on_refusal: Callable[[ApiError], None] = lambda _: None
        """Told of every request that is answered here."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        began, status, usage = time.monotonic(), 500, access.Usage()
        request_id = access.request_id(headers.get(access.HEADER))

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (access.HEADER.encode(), request_id.encode())]
            await send(message)

        try:
            await self._let_through(scope, receive, noted, headers, usage)
        finally:
            seconds, path = time.monotonic() - began, access.shown(scope["path"])
            entry = access.Entry(request_id, scope["method"], path, status, seconds, usage)
            if self.limits.behind is not None:
                self.limits.behind(entry)
            else:
                access.write(entry, as_json=self.limits.log_json)
            if self.spans is not None:
                self.spans.write(entry, headers)

    async def _let_through(
        self, scope: Scope, receive: Receive, send: Send, headers: Headers, usage: access.Usage
    ) -> None:
        if self.limits.behind is not None:
            await self._from_front(scope, receive, send, headers, usage)
            return
        path = scope["path"]
        cors = self._cors(headers)
        visit: Visit | None = None
        usage.client = str((scope.get("client") or ("?",))[0])
        try:
            self._check_host(headers, path)
            if scope["method"] == "OPTIONS" and headers.get("access-control-request-method"):
                await Response(status_code=204, headers=cors)(scope, receive, send)
                return
            key = self._check_key(headers, path)
            who = key or (scope.get("client") or ("?",))[0]
            if scope["method"] == "POST":
                visit = Visit(self._take(who))
            salt = hashlib.sha256(key.encode()).digest() if key else b""
            if key:
                usage.client = f"key:{salt.hex()[:8]}"
            is_admin = path in MANAGED_PATHS and self._is_admin(headers)
            caller = Caller(salt=salt, client=who.encode(), visit=visit, usage=usage, is_admin=is_admin)
            scope.setdefault("state", {})["caller"] = caller
        except ApiError as error:
            self.on_refusal(error)
            response = json_response(error.body(path), error.status, {**error.headers, **cors})
            await response(scope, receive, send)
            return

        async def with_cors(message: Message) -> None:
            if message["type"] == "http.response.start" and cors:
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in cors.items())]
            await send(message)

        try:
            await self.app(scope, receive, with_cors)
        finally:
            caller.let_go()
            if visit is not None:
                visit.end()

    async def _from_front(
        self, scope: Scope, receive: Receive, send: Send, headers: Headers, usage: access.Usage
    ) -> None:
        """A request that the front has let through."""
        caller = caller_of(headers.get(CALLER, ""), usage)
        scope.setdefault("state", {})["caller"] = caller
        try:
            await self.app(scope, receive, send)
        finally:
            caller.let_go()

    def in_background(self, owner: str, address: str) -> Caller | None:
        """The caller of work that goes on without its client: known by the SHA-256 of its key, or by its address.

        Returns:
            None where no key of this server's has that hash any more.
        """
        if not owner:
            who, salt = address, b""
            if self.limits.keys:
                return None
        else:
            salt = bytes.fromhex(owner)
            keys = {hashlib.sha256(key.encode()).digest(): key for key in self.limits.keys}
            if salt not in keys:
                return None
            who = keys[salt]
        visit = Visit(self.account(who), in_background=True)
        return Caller(salt=salt, client=who.encode(), visit=visit, background=True)

    def account(self, who: str) -> Account:
        """A client's account."""
        account = self._accounts.get(who)
        if account is None:
            account = self._accounts[who] = Account(self.limits.allowance, self._clock)
        return account

    def usage(self, caller: Caller) -> Response:
        """GET /v1/usage: what the caller has used, and may."""
        report = self.account(caller.client.decode(errors="replace")).report()
        return json_response({"object": "usage", "client": caller.key_name or caller.usage.client, **report})

    def _check_host(self, headers: Headers, path: str) -> None:
        host = headers.get("host", "")
        if len(headers.getlist("host")) > 1:
            raise ApiError(400, "a request has one Host header")
        is_open = self.limits.open_probes and path in PROBE_PATHS
        if not is_open and "*" not in self.limits.hosts and _name(host) not in (*_LOOPBACK, *self.limits.hosts):
            raise ApiError(403, f"the Host header {host[:100]!r} is not one of this server's; see --allow-host")
        origin = headers.get("origin")
        if origin is None or origin in self.limits.origins or "*" in self.limits.origins:
            return
        if origin.split("://")[-1] != host:
            raise ApiError(403, f"pages of {origin[:100]!r} may not ask this server; see --allow-origin")

    def _cors(self, headers: Headers) -> dict[str, str]:
        origin = headers.get("origin")
        if origin is None or not (origin in self.limits.origins or "*" in self.limits.origins):
            return {}
        return {
            "access-control-allow-origin": origin,
            "access-control-allow-methods": "GET, POST, DELETE, OPTIONS",
            "access-control-allow-headers": "authorization, content-type, x-api-key, anthropic-version",
            "access-control-max-age": "600",
            "vary": "origin",
        }

    def _check_key(self, headers: Headers, path: str) -> str:
        """The caller's key, or "" where none is needed."""
        is_admin = path in ADMIN_PATHS
        if is_admin and not self.limits.admin_key:
            raise ApiError(403, "what is served can be changed where the server was started with --admin-key")
        if not (self.limits.keys or is_admin) or path in OPEN_PATHS or path in _PAGE or path.startswith("/page/"):
            return ""
        given = _given_key(headers)
        # Every key is compared, each in constant time: how long it takes tells nothing.
        keys = (self.limits.admin_key,) if is_admin else self.limits.keys
        if path in MANAGED_PATHS and self.limits.admin_key:
            keys = (*keys, self.limits.admin_key)
        matches = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
        if not any(matches):
            which = "the admin key" if is_admin else "an API key"
            raise ApiError(401, f"{which} is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return given

    def _is_admin(self, headers: Headers) -> bool:
        key = self.limits.admin_key
        return bool(key) and hmac.compare_digest(_given_key(headers).encode(), key.encode())

    def _take(self, who: str) -> Account:
        """A client's account, with a sequence taken from it for an HTTP request.

        Raises:
            ApiError: 429.
        """
        if len(self._accounts) > _MANY_ACCOUNTS:  # addresses come and go
            now = self._clock()
            self._accounts = {name: a for name, a in self._accounts.items() if not a.idle(now)}
        account = self.account(who)
        account.take(1)
        return account


async def read_body(request: Request, limits: Limits, kinds: Iterable[str] = ("application/json",)) -> bytes:
    """A request's body.

    Raises:
        ApiError: too large, too slow, compressed, or of another kind.
    """
    headers = request.headers
    if headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "compressed bodies are not taken")
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in kinds:
        raise ApiError(415, f"the content type must be {' or '.join(kinds)}, got {kind[:80]!r}")
    body = bytearray()

    async def keep(piece: bytes) -> None:
        body.extend(piece)

    await take_body(request, limits, limits.max_body_bytes, keep)
    return bytes(body)


async def take_body(
    request: Request, limits: Limits, most: int, take: Callable[[bytes], Awaitable[None]], full: str = ""
) -> None:
    """Hand a request's body on as it comes.

    Args:
        most: bytes of it.
        take: called with every piece.
        full: said where it has more; by default, the limit of bodies.

    Raises:
        ApiError: too large, or too slow: for each ``max_body_bytes`` it may take ``body_timeout_s``.
    """
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > most:
        raise _too_large(limits, full)
    seen, timeout_s = 0, limits.body_timeout_s * max(1, -(-int(length) // limits.max_body_bytes))
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                seen += len(piece)
                if seen > most:
                    raise _too_large(limits, full)
                await take(piece)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {timeout_s:g} s") from None


def _too_large(limits: Limits, full: str = "") -> ApiError:
    """Made where it is raised: one that was kept would hold this request's body, in a circle with its own place."""
    return ApiError(413, full or f"a body may have {limits.max_body_bytes} bytes", code="body_too_large")


def is_loopback(host: str) -> bool:
    """True if an address to bind to is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _given_key(headers: Headers) -> str:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()
