"""The access log: a line for every request, whatever becomes of it; ids that lead from an answer to its line."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from quadriga.server.access import HEADER, Entry, Usage, request_id, shown
from quadriga.server.guard import Limits
from tests.server.conftest import Live, running, tiny_llm
from tests.server.test_http import CHAT, TEXT
from tests.waiting import until

KEY = "a-secret-key-of-mine"


def lines(live: Live, caplog: pytest.LogCaptureFixture, n: int) -> list[dict[str, Any]]:
    def written() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "quadriga.access"]

    assert until(lambda: len(written()) >= n)
    return [json.loads(line) for line in written()]


def test_every_request_has_a_line_with_what_it_cost(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "quadriga.access")
    with running(tiny_llm(), Limits(keys=(KEY,), log_json=True)) as live:
        live.client.headers["authorization"] = f"Bearer {KEY}"
        done = live.post("/v1/completions", TEXT | {"n": 2, "max_tokens": 3, "ignore_eos": True})
        live.post("/v1/chat/completions", CHAT | {"stream": True, "max_tokens": 3, "ignore_eos": True})
        vectors = live.post("/v1/embeddings", {"input": ["abc", "de"]})
        live.post("/v1/completions", TEXT | {"model": "nope"})
        live.client.get("/health", headers={HEADER: "mine-7"})
        live.client.get("/v1/models", headers={"authorization": "Bearer wrong-key-here"})
        written = lines(live, caplog, 6)
    assert [line["status"] for line in written] == [200, 200, 200, 404, 200, 401]
    usage = done.json()["usage"]
    assert (written[0]["prompt_tokens"], written[0]["completion_tokens"]) == (usage["prompt_tokens"], 6)
    assert written[1]["completion_tokens"] == 3 and written[1]["path"] == "/v1/chat/completions"
    assert written[2]["prompt_tokens"] == vectors.json()["usage"]["total_tokens"] and written[2]["model"] == "tiny"
    assert written[0]["id"] == done.headers[HEADER] != written[1]["id"]
    assert written[4]["id"] == "mine-7" and written[4]["model"] is None
    assert {line["client"] for line in written[:4]} == {written[0]["client"]} and written[0]["client"].startswith(
        "key:"
    )
    assert KEY not in caplog.text and written[5]["client"] == "127.0.0.1"
    assert all(line["ms"] >= 0 for line in written)


def test_a_client_that_leaves_is_noted_with_what_was_made(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "quadriga.access")
    with running(tiny_llm(), Limits(log_json=True)) as live:
        body = TEXT | {"stream": True, "max_tokens": 900, "ignore_eos": True}
        with live.client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
        (line,) = lines(live, caplog, 1)
        assert live.settled()
    assert 0 < line["completion_tokens"] < 900 and line["prompt_tokens"] > 0


def test_ids_that_may_be_written_down_and_others() -> None:
    assert request_id("abc-1.2") == "abc-1.2"
    for given in (None, "", "a b", "a\nb", "é", "x" * 129):
        made = request_id(given)
        assert made.startswith("req_") and made != request_id(given)
    assert shown("/a\nb\x1b[0m") == "/a?b?[0m" and len(shown("x" * 999)) == 200


def test_a_line_for_people() -> None:
    one = Entry("req_1", "POST", "/v1/x", 200, 0.8124, Usage("127.0.0.1", "tiny", 24, 96))
    assert one.text() == "id=req_1 client=127.0.0.1 POST /v1/x 200 812 ms model=tiny prompt=24 answer=96"
    assert Entry("req_1", "GET", "/health", 200, 0.001, Usage()).text() == "id=req_1 client=? GET /health 200 1 ms"
