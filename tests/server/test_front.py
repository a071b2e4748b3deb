"""Replicas behind one address: where requests go, and what is noticed of one that is lost."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quadriga.errors import EngineError
from quadriga.server.access import Usage
from quadriga.server.caller import Caller
from quadriga.server.files import FileStore
from quadriga.server.front import merged
from quadriga.server.front.greeting import Begins, begins
from quadriga.server.front.routing import PIECE_BYTES, SLACK, Router, pieces_of, sequences_of
from quadriga.server.guard import Limits, caller_header, caller_of
from tests.server.conftest import command
from tests.server.front import Asked, fronting
from tests.waiting import HANG_S, until

TURN = {"role": "user", "content": "a" * 400}
GREETING = {"object": "chat.completion.chunk", "choices": [{"delta": {"role": "assistant", "content": ""}}]}


def delta(text: str) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": [{"delta": {"content": text}}]}


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text} for text in texts], **more}


async def says_who(asked: Asked) -> None:
    """Every question is answered with the number of who was asked."""
    if asked.path == "/ready":
        await asked.answer({"status": "ready", "ms": 1.0 + asked.replica.number})
    elif asked.path == "/v1/experts":
        n = asked.replica.number
        counts = [[1 + n, 0], [2, 2]]
        await asked.answer({"model": "m", "n_tokens": 5, "counts": counts, "balance": [], "jain": []})
    elif asked.path == "/metrics":
        await asked.answer(b"# HELP t Tokens.\n# TYPE t counter\n" + b't_total{model_name="m"} %d.0\n' % asked.replica.number)  # fmt: skip
    else:
        await asked.answer({"replica": asked.replica.number, "body": asked.body})


# Where requests go ---------------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=300), min_size=1, max_size=4), st.text(min_size=1, max_size=300))
def test_a_longer_conversation_begins_like_the_shorter_one(texts: list[str], more: str) -> None:
    shorter, longer = pieces_of(chat(*texts), b"salt"), pieces_of(chat(*texts, more), b"salt")
    n_bytes = len(b'"m"') + sum(len(msgspec.json.encode(one)) for one in chat(*texts)["messages"])
    whole = n_bytes // PIECE_BYTES
    assert len(shorter) == max(1, whole)
    assert longer[:whole] == shorter[:whole] and len(longer) >= whole
    assert not set(pieces_of(chat(*texts), b"other")) & set(shorter), "keys share nothing"


def test_a_prompts_pieces_depend_on_all_before_them() -> None:
    system = {"role": "system", "content": "You are brief. " * 30}
    one, other = ({"messages": [system, {"role": "user", "content": c * 300}]} for c in "xy")
    a, b = pieces_of(one, b""), pieces_of(other, b"")
    shared = sum(x == y for x, y in zip(a, b, strict=True))
    assert 2 <= shared < len(a) and a[:shared] == b[:shared], "then they part for good"
    assert len(pieces_of({"prompt": "z" * 10_000_000}, b"")) == 2048
    assert pieces_of([1], b"") == [] and len(pieces_of({"prompt": "short"}, b"")) == 1
    with_tools = pieces_of({**one, "tools": [{"type": "function", "function": {"name": "f" * 200}}]}, b"")
    assert with_tools[0] != a[0], "tools come before the messages"


@pytest.mark.parametrize(
    ("body", "n"),
    [
        ({"messages": [TURN], "n": 3}, 3),
        ({"prompt": ["a", "b"], "n": 2}, 4),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"input": ["a", "b", "c"]}, 3),
        ({"input": [{"role": "user", "content": "x"}] * 4}, 1),
        ({"n": "x"}, 1),
        ({"n": True, "prompt": []}, 1),
        ("text", 1),
    ],
)
def test_what_a_request_counts_for(body: Any, n: int) -> None:
    assert sequences_of(body) == n


def test_a_known_beginning_decides_unless_its_replica_is_much_busier() -> None:
    router = Router(max_known=5)
    a, b, c = b"a", b"b", b"c"
    assert router.choose([a], {0: 3, 1: 0, 2: 1}) == 1, "nobody knows it: the least busy"
    router.learn([a, b], 0)
    assert router.choose([a, b, c], {0: SLACK, 1: 0}) == 0 and router.choose([a], {0: SLACK, 1: 0}) == 0
    assert router.choose([a, b, c], {0: SLACK + 1, 1: 0}) == 1
    router.learn([a, b, c], 1)
    assert router.choose([a, b, c], {0: 0, 1: 2}) == 1, "the longest beginning"
    assert router.choose([a, b, c], {0: 0}) == 0, "who is not there is not asked"
    router.forget(1)
    assert router.choose([a, b, c], {0: 9, 1: 2, 2: 3}) == 1, "what a lost one knew is forgotten"
    router.learn([b"d%d" % i for i in range(5)], 2)
    assert router.n_found == 3 and router.choose([a], {0: 1, 2: 0}) == 2, "old beginnings are forgotten first"


def test_equally_busy_replicas_share_strangers_and_each_stranger_has_its_own() -> None:
    router, loads = Router(), {0: 0, 1: 0, 2: 0}
    chosen = {i: router.choose([b"%d" % i], loads) for i in range(300)}
    assert min(Counter(chosen.values()).values()) > 60
    fewer = {0: 0, 2: 0}
    assert all(router.choose([b"%d" % i], fewer) == n for i, n in chosen.items() if n != 1), "only the lost one's move"


def test_a_conversation_stays_with_its_replica(tmp_path: Path) -> None:
    with fronting(tmp_path, says_who) as live:

        def to(*texts: str) -> int:
            return int(live.client.post("/v1/chat/completions", json=chat(*texts)).json()["replica"])

        first = {i: to(f"{i}" * 300) for i in range(12)}
        assert set(first.values()) == {0, 1}
        assert all(to(f"{i}" * 300, "and then") == n for i, n in first.items())
        body = chat("q", extra={"x": [1, None]})
        said = live.client.post("/v1/chat/completions?a=b%20c", json=body)
        assert said.json()["body"] == body and said.headers["x-request-id"].startswith("req_")
        asked = [asked for replica in live.started for asked in replica.asked][-1]
        last = max((a for r in live.started for a in r.asked), key=lambda a: int(a.headers["x-request-id"][6:]))
        assert asked.method == "POST" and last.path == "/v1/chat/completions?a=b%20c"


# What is lost --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["unanswered", "greeted", "half", "failed"])
def test_a_replica_that_is_lost_before_it_answers_is_not_noticed(tmp_path: Path, stage: str) -> None:
    dying, die = threading.Event(), asyncio.Event()

    async def script(asked: Asked) -> None:
        if asked.path != "/v1/chat/completions":
            await says_who(asked)
        elif not dying.is_set():
            dying.set()
            if stage == "half":
                asked.writer.write(b"HTTP/1.1 200 X\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{")
            elif stage != "unanswered":
                await asked.head()
                await asked.event(GREETING)
                await asked.piece(b": ping\n\n")
            if stage == "failed":
                await asked.event({"error": {"message": "the engine has stopped", "code": "engine_error"}})
            await die.wait()
        elif stage == "half":
            await asked.answer({"whole": True})
        else:
            await asked.head()
            for event in (GREETING, delta("one"), delta(" two"), b"[DONE]"):
                await asked.event(event)
            await asked.piece(b"")

    with fronting(tmp_path, script) as live, ThreadPoolExecutor(1) as clients:
        asked = clients.submit(live.client.post, "/v1/chat/completions", json=chat("x" * 300, stream=stage != "half"))
        assert dying.wait(HANG_S)
        victim = next(replica for replica in live.started if replica.asked)
        live.call(victim.die)
        answer = asked.result(HANG_S)
        assert answer.status_code == 200
        if stage == "half":
            assert answer.json() == {"whole": True}
        else:
            events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
            assert events == [json.dumps(GREETING), json.dumps(delta("one")), json.dumps(delta(" two")), "[DONE]"]
        assert live.front.relay.n_resent == 1
        assert until(lambda: live.client.get("/health").json()["replicas"] == {"ready": 2, "of": 2})
        assert [replica.number for replica in live.started] == [0, 1, victim.number], "it was started again"
        live.call(die.set)


@pytest.mark.parametrize(
    ("path", "first", "last"),
    [
        ("/v1/chat/completions", b'data: {"choices": [{"delta": {"content": "one"}}]}\n\n', b"data: [DONE]\n\n"),
        ("/v1/messages", b'event: content_block_start\ndata: {"type": "content_block_start"}\n\n', b'"overloaded_error"'),
        ("/api/chat", b'{"message": {"content": "one"}, "done": false}\n', b'{"error":"the replica'),
    ],
)  # fmt: skip
def test_a_stream_that_had_begun_ends_with_an_error_in_its_own_form(
    tmp_path: Path, path: str, first: bytes, last: bytes
) -> None:
    begun, go_on = threading.Event(), asyncio.Event()

    async def script(asked: Asked) -> None:
        if asked.body["messages"][0]["content"] == "other":
            await go_on.wait()
            await says_who(asked)
            return
        await asked.head("application/x-ndjson" if path.startswith("/api") else "text/event-stream")
        await asked.piece(first)
        begun.set()
        await go_on.wait()

    with fronting(tmp_path, script) as live, ThreadPoolExecutor(2) as clients:
        streams = clients.submit(live.client.post, path, json=chat("x" * 300, stream=True))
        assert begun.wait(HANG_S)
        victim = next(replica for replica in live.started if replica.asked)
        other = clients.submit(httpx2.post, live.url + path, json=chat("other"), timeout=HANG_S)
        assert until(lambda: sum(len(replica.asked) for replica in live.started) == 2)
        live.call(victim.die)
        answer = streams.result(HANG_S)
        assert answer.status_code == 200 and answer.content.startswith(first) and b"was lost" in answer.content
        assert last in answer.content[len(first) :]
        live.call(go_on.set)
        assert other.result(HANG_S).status_code == 200, "nobody else is touched"


def test_a_request_that_replicas_end_of_ends_two_at_most(tmp_path: Path) -> None:
    async def script(asked: Asked) -> None:
        if asked.path == "/v1/completions":
            asked.replica.die()
        else:
            await says_who(asked)

    with fronting(tmp_path, script, n=3) as live:
        answer = live.client.post("/v1/completions", json={"prompt": "poison"})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "replica_lost"
        assert answer.headers["retry-after"] == "1"
        assert until(lambda: len(live.started) == 5) and len({r.number for r in live.started[3:]}) == 2
        assert until(lambda: live.client.get("/health").json()["replicas"]["ready"] == 3)


def test_a_full_replica_sends_on_and_full_ones_say_so(tmp_path: Path) -> None:
    full = {0, 1}

    async def script(asked: Asked) -> None:
        if asked.replica.number in full and asked.method == "POST":
            await asked.answer({"error": {"message": "queue", "code": "queue_full"}}, 429, retry_after="1")
        else:
            await says_who(asked)

    with fronting(tmp_path, script) as live:
        answer = live.client.post("/v1/completions", json={"prompt": "x"})
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        full.remove(1)
        answers = [live.client.post("/v1/completions", json={"prompt": f"{i}" * 200}) for i in range(6)]
        assert {one.json()["replica"] for one in answers} == {1}


def test_without_any_replica_everybody_is_told(tmp_path: Path) -> None:
    with fronting(tmp_path, says_who) as live:
        paused = asyncio.Event()
        live.front.replicas._pause = lambda _: paused.wait()  # type: ignore[assignment,return-value]
        for replica in list(live.started):
            live.call(replica.die)
        assert until(lambda: live.client.get("/health").status_code == 503)
        answer = live.client.post("/v1/completions", json={"prompt": "x"})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "not_ready"
        assert live.client.get("/ready").status_code == 503 and live.client.get("/").status_code == 200
        live.call(paused.set)
        assert until(lambda: live.client.get("/health").status_code == 200)


def test_who_leaves_is_given_up_by_its_replica(tmp_path: Path) -> None:
    begun, over = threading.Event(), threading.Event()

    async def script(asked: Asked) -> None:
        begun.set()
        await asked.left()
        over.set()

    with fronting(tmp_path, script) as live:
        host, port = live.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as leaver:
            head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            leaver.sendall(head.encode() + b'content-length: 15\r\n\r\n{"prompt": "x"}')
            assert begun.wait(HANG_S)
        assert over.wait(HANG_S)
        assert until(lambda: not live.front.relay._under_way and all(r.n_open == 0 for r in live.front.replicas.all))


def test_the_drains_end_is_an_error_for_what_is_left(tmp_path: Path) -> None:
    begun = threading.Event()

    async def script(asked: Asked) -> None:
        await asked.head()
        await asked.event(delta("one"))
        begun.set()
        await asked.left()

    with fronting(tmp_path, script) as live, ThreadPoolExecutor(1) as clients:
        stream = clients.submit(live.client.post, "/v1/chat/completions", json=chat("x", stream=True))
        assert begun.wait(HANG_S)
        live.front.draining = True
        refused = httpx2.post(live.url + "/v1/chat/completions", json=chat("y"))
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert httpx2.get(live.url + "/health").json()["status"] == "draining"
        live.call(lambda: live.front.drop_all(EngineError("the server is shutting down")))
        text = stream.result(HANG_S).text
        assert "one" in text and "shutting down" in text and text.endswith("data: [DONE]\n\n")


# As one --------------------------------------------------------------------------------------------------------------


def test_health_metrics_and_experts_are_of_all(tmp_path: Path) -> None:
    with fronting(tmp_path, says_who) as live:
        assert live.client.get("/v1/health").json() == {"status": "ok", "replicas": {"ready": 2, "of": 2}}
        ready = live.client.get("/ready").json()
        assert ready == {"status": "ready", "ms": 2.0, "replicas": {"ready": 2, "of": 2}}
        page = live.client.get("/metrics").text
        assert page.count("# TYPE t counter") == 1
        assert 't_total{replica="0",model_name="m"} 0.0' in page and 't_total{replica="1",model_name="m"} 1.0' in page
        assert 'quadriga_replica_up{replica="front",number="1"} 1.0' in page
        experts = live.client.get("/v1/experts").json()
        assert experts["counts"] == [[3, 0], [4, 4]] and experts["n_tokens"] == 10
        assert experts["balance"] == [2.0, 1.0] and experts["jain"] == [0.5, 1.0]
        assert live.client.get("/v1/models").json()["replica"] in (0, 1), "the rest is passed on"
        assert live.client.get("/").headers["content-type"].startswith("text/html")
        assert live.client.post("/v1/load_lora_adapter", json={}).status_code == 403


def test_metrics_without_labels_get_one() -> None:
    page = merged.metrics({"0": "# HELP a A.\n# TYPE a gauge\na 1.0\n", "1": "# HELP a A.\n# TYPE a gauge\na 2.5\n"})
    assert page == '# HELP a A.\n# TYPE a gauge\na{replica="0"} 1.0\na{replica="1"} 2.5\n'


def test_keys_limits_and_the_log_are_the_fronts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "quadriga.access")
    limits = Limits(keys=("the-first-key", "another-key"), tokens_per_minute=5, max_body_bytes=2000)
    with fronting(tmp_path, says_who, limits=limits) as live:
        assert live.client.get("/v1/models").status_code == 401 and live.client.get("/health").status_code == 200
        headers = {"authorization": "Bearer the-first-key", "x-request-id": "mine"}
        body = {"prompt": ["x", "y"]}
        first = live.client.post("/v1/completions", json=body, headers=headers)
        assert first.status_code == 200 and first.headers["x-request-id"] == "mine"
        assert until(lambda: any("prompt=3 answer=2" in one.message for one in caplog.records)), caplog.text
        second = live.client.post("/v1/completions", json=body, headers=headers)
        assert second.status_code == 429 and "tokens a minute" in second.text, "what the replica said it used counts"
        other = live.client.post("/v1/completions", json=body, headers={"authorization": "Bearer another-key"})
        assert other.status_code == 200
        assert live.client.post("/v1/completions", json={"prompt": "x" * 3000}, headers={"x-api-key": "another-key"}).status_code in (413, 429)  # fmt: skip
        callers = {asked.headers["x-quadriga-caller"] for replica in live.started for asked in replica.asked}
        assert len(callers) == 2 and not any("first-key" in bytes.fromhex(c.split(".")[0]).decode("latin-1") for c in callers)  # fmt: skip


def test_a_callers_name_comes_through_whole() -> None:
    for caller in (Caller(), Caller(salt=b"\0\xff" * 16, client=b"127.0.0.1", background=True)):
        again = caller_of(caller_header(caller).decode(), Usage())
        assert (again.salt, again.client) == (caller.salt, caller.client)
        assert again.background is caller.background


def test_a_files_batch_is_answered_by_the_replicas(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "files", 1 << 20)
    with fronting(tmp_path, says_who, store=store) as live:
        lines = [{"custom_id": f"{i}", "url": "/v1/completions", "body": {"prompt": f"{i}" * 200}} for i in range(9)]
        raw = "\n".join(map(json.dumps, lines)).encode()
        given = {"file": ("b.jsonl", raw), "purpose": (None, "batch")}
        file = live.client.post("/v1/files", files=given).json()
        wanted = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = live.client.post("/v1/batches", json=wanted).json()
        assert until(lambda: live.client.get(f"/v1/batches/{batch['id']}").json()["status"] == "completed")
        done = live.client.get(f"/v1/batches/{batch['id']}").json()
        answers = live.client.get(f"/v1/files/{done['output_file_id']}/content").text.splitlines()
        found = {one["custom_id"]: one["response"]["body"]["replica"] for one in map(json.loads, answers)}
        assert len(found) == 9 and set(found.values()) == {0, 1}
        callers = {
            asked.headers["x-quadriga-caller"].split(".")[2] for r in live.started for asked in r.asked if asked.body
        }
        assert callers == {"b"}, "they are computed when nobody else wants the place"


def test_the_page_about_the_interface_names_the_fronts_address(tmp_path: Path) -> None:
    async def script(asked: Asked) -> None:
        await asked.answer({"host": asked.headers["host"]})

    with fronting(tmp_path, script) as live:
        assert live.client.get("/docs").json()["host"] == live.url.removeprefix("http://")


def test_a_batchs_lines_are_shared_out(tmp_path: Path) -> None:
    with fronting(tmp_path, says_who) as live:
        lines = [
            {"custom_id": f"{i}", "url": "/v1/completions", "body": {"prompt": f"{i}" * 200, "stream": i == 5}}
            for i in range(12)
        ]
        raw = "\n".join(map(json.dumps, lines))
        answer = live.client.post("/v1/batches", content=raw, headers={"content-type": "application/jsonl"})
        found = {one["custom_id"]: one["response"] for one in map(json.loads, answer.text.splitlines())}
        assert len(found) == 12 and found["5"]["status_code"] == 400
        assert {one["body"]["replica"] for i, one in found.items() if i != "5"} == {0, 1}
        assert live.client.post("/v1/batches", json={}).status_code == 400


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b": ping\n\n", Begins.GREETING),
        (b"data: " + json.dumps(GREETING).encode() + b"\n\n", Begins.GREETING),
        (b"data: " + json.dumps(GREETING).encode() + b"\n\ndata: {", Begins.GREETING),
        (b'event: message_start\ndata: {"type": "message_start"}\n\nevent: ping\ndata: {"type":"ping"}\n\n', Begins.GREETING),
        (b'data: {"type": "response.created"}\n\ndata: {"type": "response.in_progress"}\n\n', Begins.GREETING),
        (b'data: {"type": "response.output_item.added"}\n\n', Begins.ANSWER),
        (b"data: " + json.dumps(delta("x")).encode() + b"\n\n", Begins.ANSWER),
        (b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n', Begins.ANSWER),
        (b'data: {"choices": []}\n\n', Begins.ANSWER),
        (b"data: [DONE]\n\n", Begins.ANSWER),
        (b'data: {"error": {"code": "engine_error"}}\n\n', Begins.FAILURE),
        (b'data: {"error": {"code": "invalid_grammar"}}\n\n', Begins.ANSWER),
        (b'event: error\ndata: {"type": "error", "error": {"type": "overloaded_error"}}\n\n', Begins.FAILURE),
    ],
)  # fmt: skip
def test_where_an_answer_begins(raw: bytes, kind: Begins) -> None:
    assert begins(raw, b"text/event-stream; charset=utf-8") is kind
    assert begins(b'{"done": false}\n', b"application/x-ndjson") is Begins.ANSWER
    assert begins(b'{"error": "x"}\n', b"application/x-ndjson") is Begins.FAILURE


# Processes -----------------------------------------------------------------------------------------------------------


def test_two_processes_behind_one_address() -> None:
    """Real ones: a killed one is not noticed, comes again, and all are gone at the end."""
    with command("quadriga-nano", "--replicas", "2", "--kv-memory", "8MB") as (url, process):
        family = psutil.Process(process.pid)

        def replicas() -> list[psutil.Process]:
            return [child for child in family.children() if "quadriga.server.front.replica" in child.cmdline()]

        with httpx2.Client(base_url=url, timeout=HANG_S) as client:

            def said(i: int, **more: Any) -> str:
                body = {"prompt": f"The {i}. " * 40, "max_tokens": 12, "temperature": 0, **more}
                answer = client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                return str(answer.json()["choices"][0]["text"])

            texts = {i: said(i) for i in range(4)}
            assert client.get("/v1/models").json()["data"][0]["id"] == "quadriga-nano"
            first = replicas()
            assert len(first) == 2
            first[0].send_signal(signal.SIGKILL)
            assert {i: said(i) for i in range(4)} == texts, "an answer is the same, whoever makes it"
            assert until(lambda: client.get("/health").json()["replicas"]["ready"] == 2)
            assert {i: said(i) for i in range(4)} == texts
            page = client.get("/metrics").text
            assert page.count("vllm:generation_tokens_total{") == 2 and "quadriga_replica_starts_total" in page
            last = replicas()
            assert len(last) == 2 and {p.pid for p in last} != {p.pid for p in first}
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG_S) == 0
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in last)


def test_replicas_that_cannot_start_end_the_front() -> None:
    few = ("--kv-memory", "10")
    with (
        pytest.raises(AssertionError, match="a replica ended before it answered, with exit code 2"),
        command("quadriga-nano", "--replicas", "2", *few),
    ):
        pass
