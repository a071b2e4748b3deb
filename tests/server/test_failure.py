"""The engine's failure, seen from outside: who gets an error, what /health says, how the process ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from quadriga.runners.base import PassResult
from quadriga.server import run
from quadriga.server.run import EXIT_FAILED
from tests.server.conftest import Gate, Live, running, tiny_llm
from tests.server.test_life import TEXT, events_of
from tests.waiting import HANG_S, until

ROOT = Path(__file__).parents[2]
GONE = "the engine has stopped"


def stuck(live: Live, gate: Gate) -> None:
    """Have the watch see a step that has taken far too long."""
    engine = live.service.engine
    assert until(lambda: engine.n_open == 1)
    gate.open(2)
    gate.hold()
    engine._clock = lambda: 1e12
    assert engine._loop is not None
    engine._loop.call_soon_threadsafe(engine.check)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_whoever_waits_for_a_hung_step_hears_of_it_and_so_does_whoever_asks(stream: bool) -> None:
    with running(tiny_llm(), stay_on_failure=True) as live, ThreadPoolExecutor(1) as pool, Gate(live) as gate:
        answer = pool.submit(live.post, "/v1/completions", {**TEXT, "stream": stream})
        stuck(live, gate)
        told = answer.result(60)
        assert GONE in told.text and told.status_code == (200 if stream else 503)
        health = live.client.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "failed" and "hung" not in health.text
        assert live.client.get("/ready").status_code == 503
        assert not live.server.should_exit, "it was told to stay"


def test_a_hung_step_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "FAILED_S", 0)
    with running(tiny_llm()) as live, ThreadPoolExecutor(1) as pool, Gate(live) as gate:
        answer = pool.submit(live.post, "/v1/completions", {**TEXT, "stream": True})
        stuck(live, gate)
        assert GONE in answer.result(60).text
        assert until(lambda: not live.server.servers[0].is_serving()), "it leaves by itself"


def test_not_a_number_ends_its_requests_only() -> None:
    with running(tiny_llm()) as live:
        runner = live.service.llm.engine.runner
        real, broken = runner.forward, threading.Event()

        def forward(batch: Any, **wanted: Any) -> PassResult:
            result = real(batch, **wanted)
            return replace(result, logits=np.full_like(result.logits, np.nan)) if broken.is_set() else result

        runner.forward = forward  # type: ignore[method-assign]
        with Gate(live) as gate, ThreadPoolExecutor(1) as pool:
            streamed = pool.submit(live.post, "/v1/completions", {**TEXT, "stream": True})
            assert until(lambda: live.service.engine.n_open == 1)
            gate.open(2)
            broken.set()
            gate.let(1)
            events = events_of(streamed.result(60).text)
        assert "not finite" in events[-2]["error"]["message"] and events[-1] == "[DONE]"
        assert live.post("/v1/completions", TEXT).status_code == 503
        assert live.post("/v1/embeddings", {"model": "tiny", "input": "x"}).status_code == 200
        broken.clear()
        assert live.client.get("/health").status_code == live.client.get("/ready").status_code == 200
        assert live.post("/v1/completions", {**TEXT, "max_tokens": 3}).status_code == 200
        assert live.settled()


def test_states_that_are_not_finite_are_no_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tiny_llm()) as live:
        runner = live.service.llm.engine.runner
        real = runner.forward

        def forward(batch: Any, **wanted: Any) -> PassResult:
            result = real(batch, **wanted)
            return result if result.hidden is None else replace(result, hidden=result.hidden * np.float32("nan"))

        monkeypatch.setattr(runner, "forward", forward)
        refused = live.post("/v1/embeddings", {"model": "tiny", "input": "x"})
        assert refused.status_code >= 400 and "not finite" in refused.text
        assert live.settled()


def test_a_mistake_about_texts_ends_each_answer_with_an_error_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running(tiny_llm()) as live:
        tokenizer = live.service.llm.tokenizer
        assert tokenizer is not None
        good = live.post("/v1/completions", {**TEXT, "max_tokens": 5}).json()["choices"]
        message = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}

        def bad(token_id: int) -> Any:
            raise KeyError("token text bug")

        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "token_bytes", bad)
            patch.setattr(tokenizer, "token_text", bad)
            for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", message), ("/v1/messages", message)):
                whole = live.post(path, body)
                assert whole.status_code == 500 and "KeyError" in whole.text and "token text bug" not in whole.text
                streamed = live.post(path, {**body, "stream": True})
                assert streamed.status_code == 200 and "KeyError" in streamed.text
            assert live.client.get("/health").status_code == 200
        assert live.post("/v1/completions", {**TEXT, "max_tokens": 5}).json()["choices"] == good
        assert live.settled()
    assert "token text bug" in caplog.text, "the log has it"


def test_a_mistake_while_a_stream_is_written_is_its_last_event(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tiny_llm()) as live:

        def bad(token_id: int) -> Any:
            raise KeyError("a secret")

        monkeypatch.setattr(live.service, "token_text", bad)
        events = events_of(live.post("/v1/completions", {**TEXT, "stream": True, "logprobs": 1}).text)
        assert "KeyError" in events[-2]["error"]["message"] and events[-1] == "[DONE]"
        assert "secret" not in str(events) and live.settled()


# Ids that no token has -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def padded() -> Iterator[Live]:
    """A model of 270 rows, a vocabulary of 257 tokens; the model likes the spare rows best."""
    with running(tiny_llm(n_rows=270)) as live:
        yield live


def test_spare_rows_are_never_said_over_http(padded: Live) -> None:
    body = {**TEXT, "max_tokens": 30, "logprobs": 20, "routing": True}
    for more in ({}, {"temperature": 1, "seed": 1}, {"speculate": 4, "prompt": "ab" * 20}, {"temperature": 1e-38}):
        whole = padded.post("/v1/completions", {**body, **more})
        assert whole.status_code == 200 and "unused" not in whole.text
        assert whole.json()["usage"]["completion_tokens"] == 30
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 20}
    chat |= {"max_tokens": 9, "temperature": 0, "ignore_eos": True}
    told = padded.post("/v1/chat/completions", chat).json()["choices"][0]["logprobs"]["content"]
    assert len(told) == 9 and all(len(token["top_logprobs"]) == 20 for token in told)


def test_a_bias_on_one_is_the_requests_mistake(padded: Live) -> None:
    refused = padded.post("/v1/completions", {**TEXT, "logit_bias": {"260": 100}})
    assert refused.status_code == 400 and "[260]" in refused.text
    assert padded.client.get("/health").status_code == 200
    assert padded.post("/v1/completions", {**TEXT, "max_tokens": 2}).status_code == 200


def test_a_prompt_of_them_is_computed_and_echoed(padded: Live) -> None:
    prompt = [104, 260, 105, 269]
    body = {**TEXT, "prompt": prompt, "max_tokens": 3, "echo": True, "logprobs": 2, "stop": ["never said"]}
    choice = padded.post("/v1/completions", body).json()["choices"][0]
    assert choice["text"].startswith("hi")
    assert choice["logprobs"]["tokens"][:4] == ["h", "<unused 260>", "i", "<unused 269>"]
    assert all(-9999 < p <= 0 for p in choice["logprobs"]["token_logprobs"][1:])
    streamed = padded.post("/v1/completions", {**TEXT, "prompt": prompt, "echo": True, "stream": True, "max_tokens": 2})
    assert events_of(streamed.text)[0]["choices"][0]["text"] == "hi"
    assert padded.post("/v1/embeddings", {"model": "tiny", "input": prompt}).status_code == 200
    assert padded.post("/detokenize", {"tokens": prompt}).status_code == 400


def test_an_end_that_the_vocabulary_does_not_list_has_no_name(padded: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = padded.service.llm
    monkeypatch.setattr(llm.tokenizer, "eos_ids", (260,))
    info = padded.client.get("/tokenizer_info").json()
    assert (info["eos_token"], info["eos_token_id"]) == (None, 260)


def test_structured_output_works_over_such_a_vocabulary(padded: Live) -> None:
    message = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 60, "seed": 1}
    form = {"type": "regex", "regex": "[0-9]{4}"}
    said = padded.post("/v1/chat/completions", {**message, "response_format": form}).json()["choices"][0]["message"]
    assert len(said["content"]) == 4 and said["content"].isdigit()
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    no_space = {str(ord(c)): -100 for c in " \n\t\r"}  # a random model would write nothing else between the words
    forced = {**message, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    forced["logit_bias"] = no_space
    called = padded.post("/v1/chat/completions", forced).json()
    assert called["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "f"


# The process ---------------------------------------------------------------------------------------------------------

SERVER = """
import sys, threading
from quadriga.server.guard import Limits
from quadriga.server.run import listen, serve
from quadriga.server.service import Service
from tests.server.conftest import tiny_llm

kind, stay = sys.argv[1], sys.argv[2] == "stay"
llm = tiny_llm()
real = llm.engine.runner.forward


def forward(batch, **wanted):
    if 33 in batch.tokens:  # an exclamation mark
        if kind == "hang":
            print("in the step", flush=True)
            threading.Event().wait()
        raise {"runtime": RuntimeError("a wheel came off"), "exit": SystemExit(3)}[kind]
    return real(batch, **wanted)


llm.engine.runner.forward = forward
listener = listen("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
serve(Service(llm, name="tiny"), Limits(), listener, drain_s=0, stay_on_failure=stay)
print("not reached", flush=True)
"""


@contextlib.contextmanager
def process(kind: str, then: str = "leave") -> Iterator[tuple[httpx2.Client, subprocess.Popen[str]]]:
    """A server as a process of its own, whose engine fails at an exclamation mark."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    child = subprocess.Popen(
        [sys.executable, "-c", SERVER, kind, then],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=env,
    )
    try:
        assert child.stdout is not None
        port = child.stdout.readline().strip()
        assert port, child.communicate()[1]
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=HANG_S) as client:
            yield client, child
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("kind", ["runtime", "exit"])
def test_a_server_whose_engine_has_failed_ends_by_itself_and_not_with_success(kind: str) -> None:
    with process(kind) as (client, child):
        assert client.post("/v1/completions", json={**TEXT, "max_tokens": 2}).status_code == 200
        failed = client.post("/v1/completions", json={**TEXT, "prompt": "!"})
        assert failed.status_code == 503 and GONE in failed.text
        out, log = child.communicate(timeout=HANG_S)
        assert child.returncode == EXIT_FAILED and "not reached" not in out
        assert "Traceback" in log and {"runtime": "a wheel came off", "exit": "SystemExit"}[kind] in log


def test_a_server_told_to_stay_answers_503_until_it_is_told_to_go() -> None:
    with process("runtime", "stay") as (client, child):
        assert client.post("/v1/completions", json={**TEXT, "prompt": "!", "stream": True}).status_code == 200
        for _ in range(3):
            health = client.get("/health")
            assert health.status_code == 503 and "wheel" not in health.text
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        assert child.wait(HANG_S) == EXIT_FAILED


def test_a_signal_ends_the_process_although_a_kernel_hangs() -> None:
    with process("hang") as (client, child), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/v1/completions", json={**TEXT, "prompt": "!", "stream": True})
        assert child.stdout is not None and child.stdout.readline() == "in the step\n"
        assert client.get("/health").status_code == 200, "a long step is not a failure"
        child.send_signal(signal.SIGTERM)
        assert "shutting down" in answer.result(HANG_S).text
        _, log = child.communicate(timeout=HANG_S)
        assert child.returncode == EXIT_FAILED
        assert "in forward" in log, "its last words say where every thread is"
