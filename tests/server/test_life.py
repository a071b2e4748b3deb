"""Load and lifetime: who leaves is forgotten at once, who comes too late is told so, and every end is a clean one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from quadriga.engine import async_engine
from quadriga.server import protocol
from quadriga.server.guard import Limits
from tests.server.conftest import DRAIN_S, Gate, Live, StoppedClock, command, running, tiny_llm
from tests.waiting import HANG_S, until

TEXT = {"model": "tiny", "prompt": "hello there", "max_tokens": 400, "ignore_eos": True, "temperature": 0}
MODEL = "smollm2-135m-instruct"


def events_of(raw: str) -> list[Any]:
    """The data of server-sent events, decoded."""
    lines = [line[6:] for line in raw.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


# Leaving -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("stage", ["queued", "prefill", "decode"])
def test_whoever_leaves_is_forgotten_within_one_step(stage: str, stream: bool) -> None:
    with running(tiny_llm(max_sequences=1, max_batch_tokens=64)) as live, Gate(live) as gate:
        engine, stats = live.service.engine, live.service.llm.engine.stats
        first = live.connect(TEXT) if stage == "queued" else None
        if first is not None:
            assert until(lambda: stats().n_running == 1)
        prompt = "x" * (500 if stage == "prefill" else 30)
        leaver = live.connect({**TEXT, "prompt": prompt, "stream": stream})
        open_before = 2 if first is not None else 1
        assert until(lambda: engine.n_open == open_before)
        gate.open(2 if stage == "prefill" else 5)
        assert (stats().n_waiting if first is not None else stats().n_running) == 1
        assert first is not None or stats().kv_blocks_used > 0
        steps = stats().n_steps
        leaver.close()
        assert until(lambda: engine.n_open == open_before - 1), "the server notices without computing"
        gate.let(1)
        gone = until(lambda: stats().n_waiting == 0 and (first is not None or stats().kv_blocks_used == 0))
        assert gone and stats().n_steps <= steps + 1
        if first is not None:
            first.close()
            assert until(lambda: engine.n_open == 0)
            gate.let(1)
        assert live.settled()
        assert live.metric("quadriga_kv_blocks_used") == live.metric("vllm:num_requests_running") == 0


def posted(body: Any) -> bytes:
    """A request as bytes."""
    raw = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(raw) + raw


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("at_once", [True, False], ids=["in one piece", "later"])
@pytest.mark.parametrize("ahead", [posted(TEXT), posted(TEXT)[:40], b"\r\n"], ids=["whole", "half", "empty line"])
def test_whoever_has_asked_again_and_leaves_is_forgotten_too(stream: bool, at_once: bool, ahead: bytes) -> None:
    with running(tiny_llm()) as live, Gate(live) as gate:
        first = posted({**TEXT, "stream": stream, "n": 3})
        leaver = socket.create_connection(live.server.servers[0].sockets[0].getsockname())
        leaver.sendall(first + ahead if at_once else first)
        assert until(lambda: live.service.engine.n_open == 3)
        if not at_once:
            leaver.sendall(ahead)
        gate.open(2)
        leaver.close()
        assert until(lambda: live.service.engine.n_open == 0), "without computing"
        gate.let(1)
        assert live.settled()


def test_requests_that_come_ahead_are_answered_in_turn_however_they_are_cut() -> None:
    bodies = [{**TEXT, "max_tokens": 5, "prompt": "x" * n, "stream": n == 2} for n in (1, 2, 3, 4)]
    with running(tiny_llm()) as live:
        with Gate(live) as gate, live.connect(bodies[0]) as connection:
            gate.hold()
            raw = b"".join(map(posted, bodies[1:]))
            for begin in range(0, len(raw), 7):
                connection.sendall(raw[begin : begin + 7])
            gate.let(10_000)
            seen = b""
            while seen.count(b"prompt_tokens") < 3 or seen.count(b"HTTP/1.1 200 OK") < 4 or not seen.endswith(b"}"):
                more = connection.recv(1 << 16)
                assert more, seen
                seen += more
        for body, n in zip(bodies, (1, 2, 3, 4), strict=True):
            assert body["stream"] or seen.count(b'"prompt_tokens":%d,' % n) == 1
        with Gate(live), live.connect(TEXT) as connection:
            assert until(lambda: live.service.engine.n_open == 1)
            with contextlib.suppress(OSError):  # it is cut off while it sends
                connection.sendall(b"x" * (protocol.MAX_AHEAD_BYTES + (1 << 20)))
            assert until(lambda: live.service.engine.n_open == 0), "nobody sends so much ahead"
        assert live.settled()


def test_leaving_while_choices_and_embeddings_are_made_frees_all_of_it() -> None:
    with running(tiny_llm(n_blocks=128)) as live:
        with Gate(live) as gate:
            many = live.connect({**TEXT, "n": 5, "stream": True})
            assert until(lambda: live.service.engine.n_open == 5)
            gate.open(3)
            many.close()
            assert until(lambda: live.service.engine.n_open == 0)
            gate.let(1)
            assert live.settled()
            vectors = live.connect({"model": "tiny", "input": ["y" * 900, "z" * 900]}, "/v1/embeddings")
            assert until(lambda: live.service.llm.engine.stats().kv_blocks_used > 0)
            vectors.close()
        assert live.settled(), "the pass that was under way has ended, and nothing stays behind"


def test_a_reader_that_stops_costs_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stands still, so nothing but the bound of its inbox can end it."""
    monkeypatch.setattr(async_engine, "MAX_UNREAD", 16)
    with running(tiny_llm(n_blocks=800, max_sequences=64), max_waiting=64) as live, StoppedClock(live):
        body = {**TEXT, "max_tokens": 900, "stream": True, "n": 40, "routing": True, "logprobs": 20}
        reader = live.connect(body, receive_bytes=4096)
        assert until(lambda: live.service.engine.n_open == 40)
        assert until(lambda: live.service.engine.n_open == 0), "its requests are dropped"
        assert live.settled() and live.service.llm.engine.stats().n_generated_tokens < 40 * 900
        reader.close()
        assert live.post("/v1/completions", {**TEXT, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_reader_that_stops_is_cut_off(stream: bool) -> None:
    with running(tiny_llm(n_blocks=800, max_sequences=64), max_waiting=64) as live, StoppedClock(live) as clock:
        if stream:
            body = {**TEXT, "max_tokens": 900, "stream": True, "n": 40, "routing": True, "logprobs": 20}
            reader = live.connect(body, receive_bytes=4096)
        else:
            body = {"prompt": "x" * 1_000_000, "return_token_strs": True}
            reader = live.connect(body, "/tokenize", receive_bytes=4096)
        assert until(lambda: any(_stalled(c) for c in live.server.server_state.connections))
        clock.advance(protocol.STALL_TIMEOUT_S - 1)
        assert live.post("/v1/completions", {**TEXT, "max_tokens": 1}).status_code == 200
        assert any(_stalled(c) for c in live.server.server_state.connections), "not a second too early"
        clock.advance(2)
        assert until(lambda: not any(_busy(c) for c in live.server.server_state.connections))
        assert live.settled(), "its requests are dropped"
        reader.close()


def _stalled(connection: Any) -> bool:
    return connection._stalled is not None


def _busy(connection: Any) -> bool:
    return connection.cycle is not None and not connection.cycle.response_complete


def test_a_body_that_trickles_after_its_answer_does_not_hold_the_connection() -> None:
    with running(tiny_llm()) as live, StoppedClock(live) as clock:
        host, port = live.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=HANG_S) as connection:
            connection.sendall(b"POST /nothing HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 1000000\r\n\r\n{")
            assert b" 404 " in connection.recv(65536)
            connection.sendall(b" ")
            assert until(lambda: any(c._rest_due is not None for c in live.server.server_state.connections))
            clock.advance(protocol.REST_TIMEOUT_S + 1)
            try:
                while connection.recv(65536):  # the rest of the answer
                    pass
            except ConnectionResetError:
                pass  # what came too late was not read: this too is an end


def test_leaving_within_a_body_is_no_mistake_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    with running(tiny_llm()) as live:
        host, port = live.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        head = "POST /tokenize HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        connection.sendall(head.encode() + b"content-length: 99\r\n\r\n{")
        assert until(lambda: any(_busy(c) for c in live.server.server_state.connections)), "its body is waited for"
        connection.close()
        assert until(lambda: 'status="499"' in live.client.get("/metrics").text)
    assert "Exception" not in caplog.text


# Too much ------------------------------------------------------------------------------------------------------------


def test_past_the_queue_there_is_429_with_a_time_to_come_back() -> None:
    with running(tiny_llm(max_sequences=1), max_waiting=1) as live, Gate(live) as gate:
        held = [live.connect(TEXT) for _ in range(2)]
        assert until(lambda: live.service.engine.n_open == 2)
        for body in (TEXT, {**TEXT, "stream": True}):
            refused = live.post("/v1/completions", body)
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) >= 1
        message = {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "x"}]}
        busy = live.post("/v1/messages", message)
        assert busy.status_code == 429 and busy.json()["error"]["type"] == "rate_limit_error"
        assert live.post("/v1/completions", {**TEXT, "n": 3}).status_code == 400, "that many never fit"
        for connection in held:
            connection.close()
        assert until(lambda: live.service.engine.n_open == 0)
        gate.let(1)
        assert live.settled()


def test_one_key_cannot_take_all_places() -> None:
    with running(tiny_llm(), Limits(keys=("key-number-one", "key-number-two"), concurrent=2)) as live:
        one, two = ({"authorization": f"Bearer key-number-{n}"} for n in ("one", "two"))
        short = {**TEXT, "max_tokens": 1}
        with ThreadPoolExecutor(3) as pool:
            with Gate(live):
                asked = [pool.submit(live.post, "/v1/completions", short, headers=one) for _ in range(2)]
                assert until(lambda: live.service.engine.n_open == 2)
                refused = live.post("/v1/completions", short, headers=one)
                assert refused.status_code == 429 and "at once" in refused.json()["error"]["message"]
                asked.append(pool.submit(live.post, "/v1/completions", short, headers=two))
                assert until(lambda: live.service.engine.n_open == 3), "another key has places of its own"
            assert [a.result().status_code for a in asked] == [200] * 3
        assert live.post("/v1/completions", short, headers=one).status_code == 200


def test_a_deadline_ends_an_answer_wherever_it_is() -> None:
    with running(tiny_llm(max_sequences=1)) as live, StoppedClock(live) as clock, Gate(live) as gate:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(live.post, "/v1/completions", {**TEXT, "deadline_ms": 60_000})
            assert until(lambda: live.service.engine.n_open == 1 and clock.waits(60)), "its time has begun"
            clock.advance(61)
            late = answer.result()
            assert late.status_code == 504 and late.json()["error"]["code"] == "deadline_exceeded"
            gate.let(1)
            assert live.settled()
            answer = pool.submit(live.post, "/v1/completions", {**TEXT, "stream": True, "deadline_ms": 60_000})
            assert until(lambda: live.service.engine.n_open == 1 and clock.waits(60)), "its time has begun"
            gate.open(3)
            clock.advance(59)
            gate.open(2)
            assert live.service.engine.n_open == 1, "it has a second left"
            clock.advance(2)
            events = events_of(answer.result().text)
        assert len(events) >= 5 and events[-2]["error"]["code"] == "deadline_exceeded" and events[-1] == "[DONE]"
        gate.let(1)
        assert live.settled()


def test_a_long_prompt_does_not_stop_others() -> None:
    with running(tiny_llm(n_blocks=128, max_batch_tokens=64)) as live:
        talker = live.connect({**TEXT, "max_tokens": 900, "stream": True})
        assert until(lambda: live.service.llm.engine.stats().n_generated_tokens > 3)
        before = live.service.llm.engine.stats()
        assert live.post("/v1/completions", {**TEXT, "prompt": "p" * 1000, "max_tokens": 1}).status_code == 200
        after = live.service.llm.engine.stats()
        passes = after.n_steps - before.n_steps
        assert passes >= 1000 // 64
        assert after.n_generated_tokens - before.n_generated_tokens >= passes - 1, "the talker spoke in every pass"
        talker.close()
        assert live.settled()


def test_when_the_cache_is_full_answers_are_put_back_and_go_on_with_the_same_tokens() -> None:
    bodies = [{**TEXT, "prompt": f"question {i}", "max_tokens": 120, "temperature": 1, "seed": i} for i in range(6)]
    with running(tiny_llm()) as roomy:
        alone = [roomy.post("/v1/completions", body).json()["choices"] for body in bodies]
    with running(tiny_llm(n_blocks=18)) as tight, ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda body: tight.post("/v1/completions", body).json()["choices"], bodies))
        assert tight.metric("vllm:num_preemptions_total") > 0
        assert tight.settled()
    assert together == alone


# The same bytes ------------------------------------------------------------------------------------------------------


def test_a_seeded_request_gives_the_same_bytes_whatever_happens_beside_it() -> None:
    def body(i: int) -> dict[str, Any]:
        return {
            "model": "tiny",
            "messages": [{"role": "user", "content": f"tell me a story about {i} " + "and more " * 12}],
            "max_tokens": 60,
            "temperature": 1.1,
            "top_p": 0.95,
            "frequency_penalty": 0.3,
            "seed": 7 + i,
            "logprobs": True,
            "top_logprobs": 3,
        }

    def ask(live: Live, i: int) -> bytes:
        answer = live.post("/v1/chat/completions", body(i)).json()
        return json.dumps(answer["choices"]).encode()

    def streamed(live: Live, i: int) -> str:
        raw = live.post("/v1/chat/completions", {**body(i), "stream": True}).text
        deltas = [e["choices"][0]["delta"] for e in events_of(raw) if e != "[DONE]"]
        return "".join(delta.get("content") or "" for delta in deltas)

    variants = {
        "plain": {},
        "no prefix cache": {"prefix_cache": False},
        "chunks of 32": {"max_batch_tokens": 32},
        "chunks of 48, no cache": {"max_batch_tokens": 48, "prefix_cache": False},
    }
    seen: dict[str, bytes] = {}
    for name, options in variants.items():
        with running(tiny_llm(n_blocks=128, **options)) as live:
            seen[name] = ask(live, 0)
            seen[name + ", again"] = ask(live, 0)  # from the prefix cache, where there is one
            cached = live.metric("vllm:prefix_cache_hits_total")
            assert (cached > 0) == ("no" not in name)
            with ThreadPoolExecutor(8) as pool:
                among = list(pool.map(lambda i: ask(live, i), (*range(4), 0, *range(5, 8))))
            seen[name + ", among 8"], seen[name + ", among 8, twice"] = among[0], among[4]
            assert len(set(among)) == 7
            said = json.loads(seen["plain"])[0]["message"]["content"]
            assert streamed(live, 0) == said
    assert len(set(seen.values())) == 1, [name for name, value in seen.items() if value != seen["plain"]]


# Ends ----------------------------------------------------------------------------------------------------------------


def test_when_the_engine_dies_everybody_hears_of_it() -> None:
    with running(tiny_llm(max_sequences=1), stay_on_failure=True) as live:
        with Gate(live) as gate, ThreadPoolExecutor(2) as pool:
            streams = [
                pool.submit(live.post, "/v1/completions", {**TEXT, "stream": True}),
                pool.submit(live.post, "/v1/messages", {**_message(), "stream": True}),
            ]
            assert until(lambda: live.service.engine.n_open == 2)
            gate.open(2)
            live.service.llm.engine.scheduler.schedule = _broken  # type: ignore[method-assign]
            gate.let(1)
            mine, claude = (stream.result() for stream in streams)
        assert mine.status_code == claude.status_code == 200, "they had begun"
        last = events_of(mine.text)[-2:]
        assert "engine has stopped" in last[0]["error"]["message"] and last[1] == "[DONE]"
        assert "event: error" in claude.text and "engine has stopped" in claude.text
        health = live.client.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "failed"
        assert "wheel" not in health.text + mine.text + claude.text, "what it died of is for the log"
        for path, body in (("/v1/completions", TEXT), ("/v1/embeddings", {"model": "tiny", "input": "x"})):
            assert live.post(path, body).status_code == 503
        assert live.client.get("/ready").status_code == 503
        assert live.client.get("/metrics").status_code == 200


def _broken() -> Any:
    raise RuntimeError("a wheel came off")


def _message() -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 50, "messages": [{"role": "user", "content": "x"}]}


@pytest.fixture(scope="module")
def long_story(smollm2: Path) -> dict[str, Any]:
    """A request that takes long."""
    return {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8000, "ignore_eos": True, "stream": True}


def test_the_first_signal_drains_and_the_deadline_ends_what_is_left() -> None:
    server, pool = running(tiny_llm()), ThreadPoolExecutor(2)
    with server as live, pool, StoppedClock(live) as clock, Gate(live) as gate:
        short = pool.submit(live.post, "/v1/completions", {**TEXT, "stream": True, "max_tokens": 5})
        long = pool.submit(live.post, "/v1/completions", {**TEXT, "stream": True})
        assert until(lambda: live.service.engine.n_open == 2)
        gate.open(3)
        live.server.handle_exit(signal.SIGTERM, None)
        clock.advance(0.2)  # uvicorn looks ten times a second whether it is to end
        refused = httpx2.post(f"{live.url}/v1/completions", json=TEXT, timeout=HANG_S)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert refused.headers["retry-after"] == "5", "who comes now, on a connection of its own, is told"
        assert httpx2.get(f"{live.url}/health", timeout=HANG_S).json() == {"status": "draining"}
        gate.let(5)
        done = events_of(short.result().text)
        assert done[-1] == "[DONE]" and done[-2]["choices"][0]["finish_reason"] == "length", "it was let finish"
        clock.advance(DRAIN_S - 1)
        gate.open(2)
        assert live.service.engine.n_open == 1, "it has time left"
        clock.advance(1)
        gate.let(1)
        cut = events_of(long.result().text)
        assert "shutting down" in cut[-2]["error"]["message"] and len(cut) >= 3 + 2 + 2
        assert until(lambda: not _listens(live.url)), "then nobody is let in"


def _listens(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=HANG_S).close()
    except (ConnectionRefusedError, ConnectionResetError):  # a socket that closes resets what knocks at that moment
        return False
    return True


def _drains(url: str) -> bool:
    return bool(httpx2.get(f"{url}/health", timeout=HANG_S).json()["status"] == "draining")


@contextlib.contextmanager
def telling(url: str, body: dict[str, Any]) -> Iterator[Iterator[str]]:
    """The lines of a streamed answer that has begun."""
    client = httpx2.Client(timeout=HANG_S)
    with client, client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert next(lines).startswith("data: ")
        yield lines


@pytest.mark.weights
def test_a_signal_lets_the_process_finish_its_answers_and_end_with_0(long_story: dict[str, Any]) -> None:
    with command("--drain", "3600") as (url, process), telling(url, {**long_story, "max_tokens": 60}) as short:
        with telling(url, long_story):
            process.send_signal(signal.SIGTERM)
            assert until(lambda: _drains(url))
            assert list(short)[-1] == "data: [DONE]"
            assert process.poll() is None, "it waits for the other answer"
        assert process.wait(HANG_S) == 0, "whose reader has left"


@pytest.mark.weights
def test_a_second_signal_ends_the_process_at_once(long_story: dict[str, Any]) -> None:
    with command("--drain", "3600") as (url, process), telling(url, long_story) as long:
        process.send_signal(signal.SIGTERM)
        assert until(lambda: _drains(url))
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG_S) == 1
        with pytest.raises(httpx2.HTTPError):
            list(long)


@pytest.mark.weights
def test_a_killed_server_leaves_no_process_and_its_port_is_free(smollm2: Path) -> None:
    with command() as (url, process):
        children = psutil.Process(process.pid).children(recursive=True)
        assert httpx2.get(f"{url}/ready", timeout=HANG_S).status_code == 200
        port = int(url.rsplit(":", 1)[1])
        os.kill(process.pid, signal.SIGKILL)
        process.wait(HANG_S)
        assert psutil.wait_procs(children, HANG_S)[1] == [], "a child ends when it notices"
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", port))
