"""Hostile and mistaken requests: each gets an answer that says what is wrong, and the server goes on."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import hashlib
import json
import re
import resource
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from quadriga.server import protocol
from quadriga.server.guard import Limits
from quadriga.server.openapi import GETS, POSTS
from quadriga.server.run import KEEP_ALIVE_S
from tests.server.conftest import Live, StoppedClock, running, tiny_llm
from tests.waiting import HANG_S, until

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT = {"model": "tiny", "prompt": "hi", "max_tokens": 2}
KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def locked() -> Iterator[Live]:
    """A server with a key, small limits, and one foreign page allowed."""
    limits = Limits(
        keys=(KEY, "another-key-entirely"),
        hosts=("llm.example.org",),
        origins=("https://page.example.org",),
        max_body_bytes=4096,
    )
    with running(tiny_llm(), limits) as live:
        yield live


def error_of(live: Live, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    response = live.post(path, body)
    assert response.status_code == status, response.text
    return response.json()["error"]


# Fields --------------------------------------------------------------------------------------------------------------

FIELDS = ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]
FIELDS += ["seed", "max_tokens", "n", "stop", "logit_bias", "stop_token_ids", "priority", "deadline_ms", "speculate"]
WRONG: list[Any] = ["x", -1.5e308, 10**30, [[]], {"a": {}}, -(2**63)]


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize("field", FIELDS)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(tiny: Live, field: str, value: Any) -> None:
    if field == "stop" and value == "x":
        return
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        error = error_of(tiny, path, {**body, field: value})
        named = {"max_tokens": "max_", "stop_token_ids": "stop_"}.get(field, field)
        assert named in error["message"] or named in str(error["param"]), error


@pytest.mark.parametrize(
    "change",
    [
        {"n": 0},
        {"n": 129},
        {"stop": [""]},
        {"stop": ["a"] * 17},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"999": 1}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"\u0663": 1}},
        {"logit_bias": {"1": 101}},
        {"max_tokens": 0},
        {"top_p": -0.1},
        {"deadline_ms": 0},
        {"stream_options": {"include_usage": True}},
        {"stop_token_ids": [257]},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "regex"}},
        {"response_format": {"type": "grammar", "grammar": "start: ("}},
        {"min_p": "a"},
    ],
    ids=str,
)
def test_values_just_outside_are_refused(tiny: Live, change: dict[str, Any]) -> None:
    error_of(tiny, "/v1/chat/completions", CHAT | change)
    error_of(tiny, "/v1/completions", TEXT | change)


def test_a_top_p_of_nothing_keeps_the_best_token(tiny: Live) -> None:
    best = tiny.post("/v1/completions", TEXT | {"temperature": 0}).json()["choices"]
    assert tiny.post("/v1/completions", TEXT | {"temperature": 2, "top_p": 0}).json()["choices"] == best


def test_a_request_has_one_host(tiny: Live) -> None:
    two = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nhost: evil.example\r\n\r\n"
    assert "400 Bad Request" in send(tiny, two) and "one Host" in send(tiny, two)


@pytest.mark.parametrize(
    "change",
    [
        {"messages": None},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        {"messages": [{"role": "user", "content": "x" * 2000}]},
        {"messages": [{"role": "user", "content": "x"}] * 10_001},
        {"top_logprobs": 2},
        {"logprobs": True, "top_logprobs": 21},
        {"max_tokens": 1, "max_completion_tokens": 1},
        {"tool_choice": "required"},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tools": [{"type": "function", "function": {"name": "a"}}] * 2},
        {
            "tools": [{"type": "function", "function": {"name": "a"}}],
            "tool_choice": {"type": "function", "function": {"name": "b"}},
        },
        {"functions": [{"name": "a"}]},
        {"guided_regex": "a"},
        {"continue_final_message": True},
        {"chat_template_kwargs": {"messages": []}},
        {"modalities": ["audio"]},
        {"chat_template": "{{ 1 }}"},
    ],
    ids=lambda change: str(change)[:60],
)
def test_what_a_chat_cannot_be(tiny: Live, change: dict[str, Any]) -> None:
    error_of(tiny, "/v1/chat/completions", CHAT | change)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [1, "a"]},
        {"prompt": [257]},
        {"prompt": [-1]},
        {"prompt": [10**30]},
        {"prompt": [-5017, 2**70, 1304]},
        {"prompt": [2**63]},
        {"prompt": [1.5]},
        {"prompt": ["a"] * 129},
        {"prompt": "x" * 1024},
        {"logprobs": 21},
        {"echo": True, "logprobs": 1, "stream": True},
        {"suffix": "x", "echo": True},
        {"best_of": 2},
    ],
    ids=lambda change: str(change)[:60],
)
def test_what_a_prompt_cannot_be(tiny: Live, change: dict[str, Any]) -> None:
    error_of(tiny, "/v1/completions", TEXT | change)


@pytest.mark.parametrize("given", [[], [[]], [257], [10**30], [-5017, 2**70, 1304], [[1], [2**64]]], ids=str)
def test_what_embeddings_cannot_be_made_of(tiny: Live, given: Any) -> None:
    error_of(tiny, "/v1/embeddings", {"model": "tiny", "input": given})


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"$ref": "https://example.org/schema.json"},
        {"type": "string", "pattern": "(" * 5000},
        json.loads('{"type": "array", "items": ' * 200 + "{}" + "}" * 200),
        {"type": "string", "pattern": "((a{1,1000}){1,1000}){1,1000}"},
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_a_hostile_schema_comes_to_an_end(tiny: Live, schema: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert tiny.post("/v1/chat/completions", CHAT | {"response_format": form}).status_code in (200, 400)
    assert tiny.post("/v1/chat/completions", CHAT).status_code == 200


NULLABLE = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "seed",
    "max_tokens",
    "n",
    "stop",
    "logit_bias",
]
NULLABLE += ["stream", "stream_options", "response_format", "deadline_ms", "user", "model", "ignore_eos", "priority"]
NULLABLE += ["speculate", "routing"]


@pytest.mark.parametrize("field", NULLABLE)
def test_null_is_the_same_as_leaving_a_field_out(tiny: Live, field: str) -> None:
    options = {"seed": 1, "max_tokens": 4} | {field: None}
    plain = {name: value for name, value in options.items() if value is not None}
    limit = {"stop_token_ids": list(range(256))} if field == "max_tokens" else {}  # else it would go on to the context
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        one, other = (tiny.post(path, {**body, **limit, **o}) for o in (body | options, plain))
        assert one.status_code == other.status_code == 200, one.text
        if "seed" in plain and "max_tokens" in plain:
            assert one.json()["choices"] == other.json()["choices"]


@pytest.mark.parametrize("field", ["messages", "prompt"])
def test_null_where_something_must_be_is_refused(tiny: Live, field: str) -> None:
    path, body = ("/v1/completions", TEXT) if field == "prompt" else ("/v1/chat/completions", CHAT)
    assert field in str(error_of(tiny, path, {**body, field: None}))


# Bodies --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": "tiny", "model": "tiny"}',
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"model": "\xff"}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b"1" * 100_000,
        b'{"model": "tiny", "prompt": "\x00"}',
    ],
    ids=lambda raw: repr(raw[:24]),
)
def test_bodies_that_are_no_requests(tiny: Live, raw: bytes) -> None:
    response = tiny.client.post("/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_special_tokens_in_content_stay_text(tiny: Live) -> None:
    def ids(**body: object) -> list[int]:
        return tiny.post("/tokenize", {"prompt": "<|end|>", **body}).json()["tokens"]

    assert ids() == [256] and 256 not in ids(parse_special=False)
    chat = tiny.post("/tokenize", {"messages": [{"role": "user", "content": "<|end|>"}]}).json()["tokens"]
    assert 256 not in chat


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"content-type": "text/plain"}, b"{}", 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, b"{}", 415),
        ({"content-type": "application/json"}, b"x" * 5000, 413),
        ({"content-type": "application/json", "content-length": "9" * 30}, b"", 400),
    ],
)
def test_bodies_of_the_wrong_kind(locked: Live, headers: dict[str, str], body: bytes, status: int) -> None:
    raw = [f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {KEY}\r\n"]
    if "content-length" not in headers:
        headers = headers | {"content-length": str(len(body))}
    raw += [f"{name}: {value}\r\n" for name, value in headers.items()]
    assert f" {status} " in send(locked, "".join(raw).encode() + b"\r\n" + body).split("\r\n")[0]


def test_a_body_that_is_announced_too_large_is_refused_before_it_comes(locked: Live) -> None:
    head = f"POST /tokenize HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {KEY}\r\n"
    head += "content-type: application/json\r\ncontent-length: 4097\r\n\r\n"
    assert " 413 " in send(locked, head.encode())


def test_chunked_bodies_are_bounded_too(locked: Live) -> None:
    head = f"POST /tokenize HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {KEY}\r\n"
    head += "content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    chunks = b"".join(b"400\r\n" + b" " * 1024 + b"\r\n" for _ in range(6))
    assert " 413 " in send(locked, head.encode() + chunks)


# Connections ---------------------------------------------------------------------------------------------------------


def connect(live: Live) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=HANG_S)


def send(live: Live, raw: bytes, n: int = 1) -> str:
    """Raw bytes in; the first n answers, heads and bodies, or what has come when the server closes."""
    with connect(live) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has heard enough
            connection.sendall(raw)
        return receive(connection, n)


def receive(connection: socket.socket, n: int = 1) -> str:
    """See :func:`send`."""
    out, whole = b"", 0
    while n:
        head, blank, rest = out[whole:].partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if blank and length and len(rest) >= int(length[1]):
            whole, n = whole + len(head) + 4 + int(length[1]), n - 1
            continue
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            break
        if not piece:
            break
        out += piece
    return out.decode(errors="replace")


def test_a_body_that_never_comes_is_given_up() -> None:
    limits = Limits(body_timeout_s=60)
    with running(tiny_llm(), limits) as live, StoppedClock(live) as clock, connect(live) as connection:
        head = b"POST /tokenize HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        connection.sendall(head + b"content-length: 9\r\n\r\n{")
        assert until(lambda: clock.waits(60)), "it is being read"
        clock.advance(59)
        assert live.client.get("/health").status_code == 200 and clock.waits(1), "not a second too early"
        clock.advance(2)
        assert " 408 " in receive(connection)


def test_a_head_that_never_ends_is_given_up() -> None:
    with running(tiny_llm()) as live, StoppedClock(live) as clock:
        begun, silent, second = connect(live), connect(live), connect(live)
        with begun, silent, second:
            begun.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0")
            second.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\nGET /hea")
            assert " 200 " in receive(second)
            connections = live.server.server_state.connections
            assert until(lambda: sum(c._deadline is not None for c in list(connections)) >= 2)
            clock.advance(protocol.HEAD_TIMEOUT_S - 1)
            assert live.client.get("/health").status_code == 200
            assert not any(c._refused for c in list(connections)), "not a second too early"
            clock.advance(2)
            assert " 408 " in receive(begun) and " 408 " in receive(silent)
            clock.advance(KEEP_ALIVE_S)
            assert receive(second, 2).count("HTTP/1.1") <= 1, "it is closed: nor is a head waited for after an answer"


def test_a_refusal_that_nobody_hears_closes_the_connection_all_the_same() -> None:
    class Lost(asyncio.Transport):
        closed = False

        def is_closing(self) -> bool:
            return self.closed

        def write(self, data: Any) -> None:
            pass

        def can_write_eof(self) -> bool:
            return True

        def write_eof(self) -> None:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

        def close(self) -> None:
            self.closed = True

    async def refuse() -> list[Any]:
        config = uvicorn.Config(lambda *_: None, log_config=None)
        one = protocol.GuardedProtocol(config=config, server_state=ServerState(), app_state={})
        one.transport = Lost()
        loop = asyncio.get_running_loop()
        later: list[Any] = []
        loop.call_later = lambda _, call: later.append(call)  # type: ignore[method-assign, assignment, misc]
        one._too_slow()
        return later

    [close] = asyncio.run(refuse())
    close()
    assert close.__self__.closed


def test_a_head_that_is_too_large_is_refused(tiny: Live) -> None:
    assert " 431 " in send(tiny, b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nx: " + b"a" * (10 << 20))
    many = b"".join(b"x-%d: y\r\n" % i for i in range(20_000))
    assert " 431 " in send(tiny, b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n" + many)


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"POST /tokenize HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: -1\r\n\r\n",
    ],
    ids=lambda raw: repr(raw[:24]),
)
def test_broken_framing_is_refused(tiny: Live, raw: bytes) -> None:
    assert " 400 " in send(tiny, raw + b"\r\n\r\n").split("\r\n")[0]
    assert tiny.client.get("/health").status_code == 200


def test_pipelined_requests_are_all_answered(tiny: Live) -> None:
    one = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    assert send(tiny, one * 5, n=5).count("HTTP/1.1 200") == 5


OFFERS = [
    b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAABAAMAAABk\r\n",  # Java's, always
    b"upgrade: websocket\r\nConnection: keep-alive , upgrade\r\n",
]


@pytest.mark.parametrize("offer", OFFERS, ids=["h2c", "websocket"])
@pytest.mark.parametrize("cut", [0, 30, -20, -1], ids=["whole", "in the head", "in the body", "before its last byte"])
def test_an_offer_to_speak_another_protocol_changes_nothing(tiny: Live, offer: bytes, cut: int) -> None:
    body = json.dumps(TEXT | {"temperature": 0}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n%s"
    head += b"content-length: %d\r\n\r\n" % len(body)
    plain, offered = (head % more + body for more in (b"", offer))
    texts = []
    with connect(tiny) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for raw in (plain, offered, offered, plain):  # on one connection
            connection.sendall(raw[:cut] if cut else raw)
            if cut:
                assert tiny.client.get("/health").status_code == 200  # what has been sent is read by then
                connection.sendall(raw[cut:])
            answer = receive(connection)
            assert answer.startswith("HTTP/1.1 200")
            texts.append(json.loads(answer.partition("\r\n\r\n")[2])["choices"][0]["text"])
    assert len(set(texts)) == 1
    assert send(tiny, plain + offered + plain, n=3).count("HTTP/1.1 200") == 3, "ahead of the answers too"


def test_http_1_0_is_answered(tiny: Live) -> None:
    assert " 200 " in send(tiny, b"GET /health HTTP/1.0\r\nhost: 127.0.0.1\r\n\r\n")


def test_a_thousand_idle_connections_do_not_stop_others(tiny: Live) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))  # both ends are in this process
    host, port = tiny.url.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(1000)]
    try:
        assert tiny.post("/v1/chat/completions", CHAT).status_code == 200
    finally:
        for connection in idle:
            connection.close()


# Who may ask ---------------------------------------------------------------------------------------------------------

PATHS = [(path, "POST") for path in POSTS] + [(path, "GET") for path in GETS]
PATHS += [
    ("/metrics", "GET"),
    ("/openapi.json", "GET"),
    ("/docs", "GET"),
    ("/v1/batches", "POST"),
    ("/v1/experts/reset", "POST"),
]


@pytest.mark.parametrize(("path", "method"), PATHS)
def test_every_route_but_health_needs_a_key(locked: Live, path: str, method: str) -> None:
    for prefix in ("", "/v1") if not path.startswith("/v1") else ("",):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": KEY[:-1]}):
            status = locked.client.request(method, prefix + path, headers=headers).status_code
            assert status == (200 if path == "/health" else 401)


def test_keys_are_taken_in_both_ways(locked: Live) -> None:
    for headers in (
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer  {KEY}"},
        {"x-api-key": "another-key-entirely"},
    ):
        assert locked.client.get("/v1/models", headers=headers).status_code == 200


def test_hosts_and_origins(locked: Live) -> None:
    def status(**headers: str) -> int:
        return locked.client.get("/health", headers=headers).status_code

    assert status() == status(host="llm.example.org:80") == status(host="localhost") == 200
    assert status(host="evil.example") == status(host="127.0.0.1.evil.example") == status(host="") == 403
    assert status(host="evil-llm.example.org") == status(host="notlocalhost") == 403, "not by its end either"
    assert status(origin="https://evil.example") == status(origin="null") == 403
    assert status(origin="https://page.example.org") == status(origin=locked.url) == 200


def test_preflight(locked: Live) -> None:
    ask = {"access-control-request-method": "POST"}
    good = locked.client.options("/v1/models", headers=ask | {"origin": "https://page.example.org"})
    assert good.status_code == 204 and good.headers["access-control-allow-origin"] == "https://page.example.org"
    evil = locked.client.options("/v1/models", headers=ask | {"origin": "https://evil.example"})
    assert evil.status_code == 403 and "access-control-allow-origin" not in evil.headers


@pytest.mark.parametrize(
    "path", ["/page/../app.py", "/page/%2e%2e/app.py", "/page//etc/passwd", "/..%2f..%2fetc/passwd"]
)
def test_no_path_leads_out_of_the_page(tiny: Live, path: str) -> None:
    assert " 404 " in send(tiny, f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()).split("\r\n")[0]


def test_a_part_of_a_file_is_the_whole_file(tiny: Live) -> None:
    whole = tiny.client.get("/docs")
    part = tiny.client.get("/docs", headers={"range": "bytes=0-9,0-9," + ",".join(["0-1"] * 5000)})
    assert part.status_code == 200 and part.content == whole.content


def test_the_docs_page_names_every_route_and_field_and_runs_no_script(tiny: Live) -> None:
    page, spec = tiny.client.get("/docs"), tiny.client.get("/openapi.json").json()
    assert page.headers["content-type"].startswith("text/html") and "<script" not in page.text
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    style = page.text.split("<style>")[1].split("</style>")[0]
    assert base64.b64encode(hashlib.sha256(style.encode()).digest()).decode() in policy
    for path in spec["paths"]:
        assert f"<code>{path}</code>" in page.text
    for name in spec["components"]["schemas"]["ChatRequest"]["properties"]:
        assert f"<code>{name}</code>" in page.text
    assert spec["components"]["schemas"]["ChatRequest"]["properties"]["model"] == {"enum": ["tiny", None]}


def test_unknown_paths_and_methods_have_the_usual_shape(tiny: Live) -> None:
    assert tiny.client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert tiny.client.get("/v1/chat/completions").status_code == 405
