"""Spans for OpenTelemetry: what they say, whose children they are, and that nothing of a conversation is in them."""

from __future__ import annotations

from typing import Any

import pytest

from quadriga.errors import ConfigError
from quadriga.server.access import Entry, Usage
from quadriga.server.run import Server
from quadriga.server.tracing import Spans
from tests.server.conftest import running, tiny_llm
from tests.waiting import until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_without_the_sdk_or_an_address_it_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="collector"):
        Spans("localhost:4318")
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match="otel"):
        Spans("http://127.0.0.1:4318/v1/traces")


@pytest.fixture
def kept() -> Any:
    """(spans, what was exported)."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    spans = Spans("http://127.0.0.1:1/v1/traces", exporter)
    yield spans, lambda: spans._provider.force_flush() and list(exporter.get_finished_spans())
    spans.close()


def test_a_request_is_a_span_of_its_clients_trace(kept: Any) -> None:
    spans, exported = kept
    entry = Entry(
        "req_1", "POST", "/v1/chat/completions", 200, 2.0, Usage(model="tiny", n_prompt=7, n_answer=5, first_s=0.5)
    )
    spans.write(entry, {"traceparent": PARENT, "tracestate": "a=b"})
    spans.write(Entry("req_2", "POST", "/api/generate", 503, 0.1, Usage(client="key:12345678")), {})
    spans.write(Entry("req_3", "GET", "/v1/health", 200, 0.1, Usage()), {})
    spans.write(Entry("req_4", "GET", "/v1/models", 200, 0.1, Usage()), {"traceparent": PARENT[:-2] + "00"})
    answered, failed = exported()
    assert answered.name == "chat tiny" and answered.kind.name == "SERVER"
    assert f"{answered.context.trace_id:032x}" == PARENT.split("-")[1] and f"{answered.parent.span_id:016x}" == PARENT.split("-")[2]  # fmt: skip
    assert answered.end_time - answered.start_time == 2_000_000_000
    (event,) = answered.events
    assert event.timestamp - answered.start_time == 500_000_000
    wanted = {
        "http.request.method": "POST",
        "url.path": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.request.id": "req_1",
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "tiny",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.latency.time_to_first_token": 0.5,
        "quadriga.client": "?",
    }
    assert dict(answered.attributes) == wanted and answered.resource.attributes["service.name"] == "quadriga"
    assert failed.name == "text_completion" and failed.parent is None and failed.status.status_code.name == "ERROR"
    assert failed.attributes["quadriga.client"] == "key:12345678"
    assert "gen_ai.usage.input_tokens" not in failed.attributes


def test_a_server_writes_them(kept: Any) -> None:
    spans, exported = kept
    with running(tiny_llm()) as live:
        guard: Any = live.server.config.app
        guard.spans = spans
        body = {"model": "tiny", "prompt": "secret words", "max_tokens": 4, "stream": True, "ignore_eos": True}
        text = live.post("/v1/completions", body, headers={"traceparent": PARENT}).text
        assert text.endswith("[DONE]\n\n") and until(lambda: len(exported()) == 1)
        assert live.client.get("/v1/models").status_code == 200
        assert until(lambda: len(exported()) == 2)
        one, other = exported()
        assert one.name == "text_completion tiny" and one.attributes["gen_ai.usage.output_tokens"] == 4
        assert 0 < one.attributes["gen_ai.latency.time_to_first_token"] <= (one.end_time - one.start_time) / 1e9
        assert "secret" not in str(one.to_json()) and other.name == "GET /v1/models"
    assert isinstance(live.server, Server)
