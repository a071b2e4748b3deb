"""The guard by itself, request by request: which names, pages and keys are let through, as whom, and what bodies may be."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from quadriga.server import guard
from quadriga.server.caller import Caller
from quadriga.server.errors import ApiError
from quadriga.server.guard import ADMIN_PATHS, MANAGED_PATHS, Guard, Limits, is_loopback, read_body, take_body

ONE, TWO, ADMIN = "key-one", "key-two", "key-of-the-admin"


@dataclass
class Seen:
    """What became of a request."""

    status: int
    headers: dict[str, str]
    caller: Caller | None = None
    """Who it was for the application; None: it did not get so far."""
    n_open: int = -1
    """Sequences that its client had open meanwhile."""


def asked(door: Limits | Guard, method: str, path: str, *headers: tuple[str, str], host: str = "localhost:80") -> Seen:
    door = door if isinstance(door, Guard) else Guard(_none, door)
    seen = Seen(0, {})

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.caller = scope["state"]["caller"]
        assert seen.caller is not None
        seen.n_open = door.account(seen.caller.client.decode()).open
        await Response(status_code=200)(scope, receive, send)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            seen.status = message["status"]
            seen.headers = {k.decode(): v.decode() for k, v in message["headers"]}

    door.app = app
    given = [("host", host), *headers]
    scope = {
        "type": "http", "method": method, "path": path, "client": ("10.0.0.7", 4321), "query_string": b"",
        "headers": [(k.encode(), v.encode()) for k, v in given],
    }  # fmt: skip
    asyncio.run(door(scope, _nothing, send))
    return seen


async def _none(*_: Any) -> None:
    raise AssertionError("replaced before it is asked")


async def _nothing() -> Any:
    return {"type": "http.disconnect"}


def bearer(key: str) -> tuple[str, str]:
    return "authorization", f"Bearer {key}"


def test_probes_are_answered_under_any_name_where_that_is_wanted_and_nothing_else_is() -> None:
    for open_probes, expected in ((False, 403), (True, 200)):
        limits = Limits(open_probes=open_probes)
        for path in ("/health", "/v1/metrics", "/ready"):
            assert asked(limits, "GET", path, host="10.1.2.3:80").status == expected
        assert asked(limits, "GET", "/v1/models", host="10.1.2.3:80").status == 403
    assert asked(Limits(hosts=("chat.example.org",)), "GET", "/", host="CHAT.example.org:443").status == 200
    assert asked(Limits(), "GET", "/", host="[::1]:8000").status == 200


def test_a_request_has_one_host() -> None:
    for second in ("localhost:80", "evil.example.org"):
        seen = asked(Limits(), "GET", "/v1/models", ("host", second))
        assert (seen.status, seen.caller) == (400, None)


def test_a_page_of_another_port_is_another_page() -> None:
    there = ("origin", "http://localhost:9000")
    assert asked(Limits(), "GET", "/v1/models", there, host="localhost:9000").status == 200
    refused = asked(Limits(), "GET", "/v1/models", there, host="localhost:8000")
    assert refused.status == 403 and "access-control-allow-origin" not in refused.headers
    for origins in (("http://localhost:9000",), ("*",)):
        allowed = asked(Limits(origins=origins), "GET", "/v1/models", there, host="localhost:8000")
        assert (allowed.status, allowed.headers["access-control-allow-origin"]) == (200, there[1])
        assert allowed.headers["vary"] == "origin"


def test_a_browser_may_ask_whether_it_may_ask_without_a_key() -> None:
    limits = Limits(keys=(ONE,), origins=("https://a.example",))
    first = (("origin", "https://a.example"), ("access-control-request-method", "POST"))
    answer = asked(limits, "OPTIONS", "/v1/chat/completions", *first)
    assert answer.status == 204 and "authorization" in answer.headers["access-control-allow-headers"]
    assert asked(limits, "OPTIONS", "/v1/chat/completions", first[0]).status == 401, "no question of a browser's"


def test_who_asks_is_the_key_and_the_log_has_digits_of_its_hash() -> None:
    seen = asked(Limits(keys=(ONE, TWO)), "POST", "/v1/embeddings", bearer(TWO))
    assert seen.status == 200 and seen.caller is not None
    digest = hashlib.sha256(TWO.encode())
    assert (seen.caller.client, seen.caller.salt) == (TWO.encode(), digest.digest())
    assert seen.caller.usage.client == f"key:{digest.hexdigest()[:8]}" == seen.caller.key_name
    nobody = asked(Limits(), "POST", "/v1/embeddings").caller
    assert nobody is not None and (nobody.client, nobody.salt, nobody.usage.client) == (b"10.0.0.7", b"", "10.0.0.7")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("authorization", f"bearer {ONE}"), 200),
        (("authorization", f"BEARER  {ONE} "), 200),
        (("x-api-key", ONE), 200),
        (("authorization", f"Basic {ONE}"), 401),
        (("authorization", ONE), 401),
        (("x-api-key", f"Bearer {ONE}"), 401),
    ],
)
def test_a_key_comes_in_either_header_and_its_scheme_in_any_case(given: tuple[str, str], expected: int) -> None:
    assert asked(Limits(keys=(ONE,)), "POST", "/v1/completions", given).status == expected


def test_what_changes_the_server_takes_the_admins_key_and_no_other() -> None:
    for path in ADMIN_PATHS:
        assert asked(Limits(keys=(ONE,)), "POST", path, bearer(ONE)).status == 403
        limits = Limits(keys=(ONE,), admin_key=ADMIN)
        got = [asked(limits, "POST", path, bearer(key)).status for key in (ADMIN, ONE, "")]
        assert got == [200, 401, 401]
        assert asked(Limits(admin_key=ADMIN), "POST", path).status == 401, "though nobody else needs a key"


@pytest.mark.parametrize("path", MANAGED_PATHS)
def test_models_are_managed_by_whoever_has_the_admins_key(path: str) -> None:
    def who(limits: Limits, *headers: tuple[str, str]) -> tuple[int, bool | None]:
        seen = asked(limits, "POST", path, *headers)
        return seen.status, None if seen.caller is None else seen.caller.is_admin

    both = Limits(keys=(ONE,), admin_key=ADMIN)
    assert [who(both, bearer(key)) for key in (ADMIN, ONE, TWO)] == [(200, True), (200, False), (401, None)]
    assert who(Limits(keys=(ONE,))) == who(Limits(keys=(ONE,)), bearer("")) == (401, None), "no key is no admin's key"
    assert who(Limits()) == who(Limits(), bearer("")) == (200, False)
    elsewhere = asked(both, "POST", "/v1/completions", bearer(ADMIN))
    assert elsewhere.status == 401, "it opens what it is for"


def test_a_post_is_one_sequence_until_it_is_answered_and_others_are_none() -> None:
    door = Guard(_none, Limits(concurrent=1))
    for _ in range(3):
        assert asked(door, "POST", "/v1/completions").n_open == 1
        assert asked(door, "GET", "/v1/models").n_open == 0
    assert door.account("10.0.0.7").open == 0
    door.account("10.0.0.7").take(1)
    refused = asked(door, "POST", "/v1/completions")
    assert (refused.status, refused.headers["retry-after"], refused.caller) == (429, "1", None)
    assert asked(door, "GET", "/v1/models").status == 200


def test_a_batch_goes_on_for_the_key_it_came_with_as_long_as_there_is_one() -> None:
    door = Guard(_none, Limits(keys=(ONE, TWO), requests_per_minute=3))
    digest = hashlib.sha256(TWO.encode())
    caller = door.in_background(digest.hexdigest(), "ignored")
    assert caller is not None and (caller.client, caller.salt) == (TWO.encode(), digest.digest())
    assert caller.background and caller.visit is not None and not caller.is_admin
    assert door.account(TWO).n_sequences == 0, "its lines count as they begin"
    asyncio.run(caller.enter(1))
    assert (door.account(TWO).n_behind, door.account(TWO).open, door.account(ONE).n_behind) == (1, 0, 0)
    assert door.in_background(hashlib.sha256(b"a key that was taken back").hexdigest(), "10.0.0.7") is None
    assert door.in_background("", "10.0.0.7") is None, "it is from a time without keys"
    anybody = Guard(_none, Limits()).in_background("", "10.0.0.7")
    assert anybody is not None and (anybody.client, anybody.salt) == (b"10.0.0.7", b"")


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost", True), ("0.0.0.0", False),
     ("::", False), ("192.168.1.4", False), ("example.org", False), ("localhost.example.org", False)],
)  # fmt: skip
def test_only_this_machine_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


# Bodies --------------------------------------------------------------------------------------------------------------


def body_of(*pieces: bytes, **headers: str) -> Request:
    left = list(pieces)

    async def receive() -> Any:
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": given}, receive)


def refused(work: Callable[[], Any]) -> int:
    with pytest.raises(ApiError) as error:
        asyncio.run(work())
    return error.value.status


SMALL = Limits(max_body_bytes=10)
JSON = "application/json; charset=utf-8"


def test_a_body_may_have_as_many_bytes_as_it_may() -> None:
    full = body_of(b"12345", b"67890", content_type=JSON, content_length="10")
    assert asyncio.run(read_body(full, SMALL)) == b"1234567890"
    assert asyncio.run(read_body(body_of(b"12345", b"67890", content_type=JSON), SMALL)) == b"1234567890"
    for lying in ({"content_length": "10"}, {}):
        more = body_of(b"12345", b"678901", content_type=JSON, **lying)
        assert refused(lambda more=more: read_body(more, SMALL)) == 413  # type: ignore[misc]
    for length in ("11", "-1", "ten"):
        said = body_of(b"", content_type=JSON, content_length=length)
        assert refused(lambda said=said: read_body(said, SMALL)) == 413  # type: ignore[misc]
    assert refused(lambda: read_body(body_of(b"", content_type="text/plain"), SMALL)) == 415
    assert refused(lambda: read_body(body_of(b"", content_type=JSON, content_encoding="gzip"), SMALL)) == 415


def test_a_large_body_may_take_as_long_as_so_many_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[float] = []

    @asynccontextmanager
    async def timeout(seconds: float) -> Any:
        allowed.append(seconds)
        yield

    monkeypatch.setattr(guard.asyncio, "timeout", timeout)
    kept: list[bytes] = []

    async def keep(piece: bytes) -> None:
        kept.append(piece)

    limits = Limits(max_body_bytes=10, body_timeout_s=30.0)
    for length in (0, 10, 11, 35):
        asyncio.run(take_body(body_of(bytes(length), content_length=str(length)), limits, 40, keep))
    assert allowed == [30.0, 30.0, 60.0, 120.0] and sum(map(len, kept)) == 56
