"""Spans of requests for OpenTelemetry: one for each, sent to a collector over OTLP/HTTP, as a child of the client's.

A span is made when its request is over, of what the access log knows, so that it costs an answer nothing. Its names are
those of the conventions for generative models (opentelemetry.io/docs/specs/semconv/gen-ai) and, where these have none,
vLLM's. What was asked and answered is in no span.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quadriga import runtime
from quadriga.errors import ConfigError
from quadriga.server.access import Entry

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_OPERATIONS = {
    "/chat/completions": "chat",
    "/messages": "chat",
    "/responses": "chat",
    "/api/chat": "chat",
    "/completions": "text_completion",
    "/completion": "text_completion",
    "/infill": "text_completion",
    "/api/generate": "text_completion",
    "/embeddings": "embeddings",
    "/api/embed": "embeddings",
    "/api/embeddings": "embeddings",
}

_UNTOLD = ("/health", "/ready", "/metrics")
"""Asked every few seconds, and nothing to look into."""


class Spans:
    """See the module docstring.

    Args:
        endpoint: the collector's address, e.g. http://127.0.0.1:4318/v1/traces.
        exporter: takes the spans in place of it.

    Raises:
        ConfigError: OpenTelemetry's SDK is not installed, or the address is none.
    """

    def __init__(self, endpoint: str, exporter: SpanExporter | None = None) -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"--otlp-traces-endpoint must be the address of a collector, such as http://127.0.0.1:4318/v1/traces; "
                f"got {endpoint[:100]!r}"
            )
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind, Status, StatusCode
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ModuleNotFoundError:
            hint = runtime.install_hint("otel")
            raise ConfigError(f"--otlp-traces-endpoint needs OpenTelemetry, which is not installed: {hint}") from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "quadriga"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("quadriga.server")
        self._parents, self._kind = TraceContextTextMapPropagator(), SpanKind.SERVER
        self._failed: Any = Status(StatusCode.ERROR)

    def write(self, entry: Entry, headers: Mapping[str, str]) -> None:
        """A request is over.

        Args:
            headers: the request's; ``traceparent`` and ``tracestate`` say what its span belongs to.
        """
        path = entry.path.removeprefix("/v1")
        if path in _UNTOLD:
            return
        used, ended = entry.usage, time.time_ns()
        began = ended - round(1e9 * entry.seconds)
        given = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        operation = _OPERATIONS.get(path)
        name = f"{entry.method} {entry.path}" if operation is None else f"{operation} {used.model or ''}".rstrip()
        span = self._tracer.start_span(
            name, self._parents.extract(given), self._kind, _attributes(entry, operation), start_time=began
        )
        if used.first_s is not None:
            span.add_event("first token", timestamp=began + round(1e9 * used.first_s))
        if entry.status >= 500:
            span.set_status(self._failed)
        span.end(ended)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _attributes(entry: Entry, operation: str | None) -> dict[str, Any]:
    used = entry.usage
    found = {
        "http.request.method": entry.method,
        "url.path": entry.path,
        "http.response.status_code": entry.status,
        "gen_ai.request.id": entry.request_id,
        "quadriga.client": used.client,
        "gen_ai.operation.name": operation,
        "gen_ai.request.model": used.model,
        "gen_ai.latency.time_to_first_token": used.first_s,
    }
    if used.model is not None:
        found |= {"gen_ai.usage.input_tokens": used.n_prompt, "gen_ai.usage.output_tokens": used.n_answer}
    return {name: value for name, value in found.items() if value is not None}
