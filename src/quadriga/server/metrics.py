"""Prometheus metrics: the engine's counters are read when somebody asks, requests are timed as they end.

Names that vLLM has are vLLM's, so that its dashboards fit; the experts' are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from quadriga.engine.engine import EngineStats
from quadriga.engine.llm import LLM
from quadriga.errors import QuadrigaError
from quadriga.server.errors import as_api_error

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "vllm:num_requests_running": ("Requests being computed.", lambda s: s.n_running),
    "vllm:num_requests_waiting": ("Requests waiting.", lambda s: s.n_waiting),
    "vllm:kv_cache_usage_perc": ("Part of the cache in use.", lambda s: s.kv_blocks_used / max(1, s.kv_blocks)),
    "quadriga_kv_blocks_used": ("Cache blocks in use.", lambda s: s.kv_blocks_used),
    "quadriga_kv_blocks": ("Cache blocks.", lambda s: s.kv_blocks),
}
_COUNTERS = {
    "vllm:prompt_tokens": ("Prompt tokens of finished answers.", "n_prompt_tokens"),
    "vllm:generation_tokens": ("Tokens made.", "n_generated_tokens"),
    "vllm:num_preemptions": ("Times a request was put back.", "n_preemptions"),
    "vllm:prefix_cache_queries": ("Prompt tokens looked for in the cache, of finished answers.", "n_prompt_tokens"),
    "vllm:prefix_cache_hits": ("Prompt tokens found in the cache.", "n_cached_tokens"),
    "vllm:spec_decode_num_draft_tokens": ("Tokens guessed.", "n_guessed"),
    "vllm:spec_decode_num_accepted_tokens": ("Tokens guessed right.", "n_guessed_right"),
    "quadriga_engine_steps": ("Passes through the model.", "n_steps"),
}


class Metrics:
    """All metrics of one server, and where one of its models counts what it has done."""

    def __init__(self) -> None:
        self._name, self._llm = "", None  # type: tuple[str, LLM | None]
        self.registry = CollectorRegistry()
        self._engines = _EngineCollector()
        self.registry.register(self._engines)
        labels = ["model_name"]

        def histogram(metric: str, text: str) -> Histogram:
            return Histogram(metric, text, labels, buckets=_SECONDS, registry=self.registry)

        self.first_token = histogram("vllm:time_to_first_token_seconds", "Seconds from request to first token.")
        self.between_tokens = histogram("vllm:time_per_output_token_seconds", "Mean seconds a token after the first.")
        self.whole = histogram("vllm:e2e_request_latency_seconds", "Seconds from request to the end of its answer.")
        self.finished = Counter(
            "vllm:request_success", "Finished answers.", ["model_name", "finished_reason"], registry=self.registry
        )
        self.tokens_of = Counter(
            "quadriga_client_tokens",
            "Tokens read and made for each API key, by the first digits of its SHA-256.",
            ["model_name", "client", "kind"],
            registry=self.registry,
        )
        self.aborted = Counter(
            "quadriga_aborted_tokens",
            "Tokens of answers that did not come to their end.",
            ["model_name"],
            registry=self.registry,
        )
        self.embedded = Counter("quadriga_embedded_texts", "Texts embedded.", ["model_name"], registry=self.registry)
        self.refused = Counter(
            "quadriga_refused", "Requests that were refused, by code or status.", ["reason"], registry=self.registry
        )
        self.answers = Counter("quadriga_http_responses", "HTTP answers.", ["route", "status"], registry=self.registry)

    def add(self, llm: LLM, name: str) -> None:
        """Count for this model from now on."""
        self._llm, self._name = llm, name
        self._engines.models.append((llm, name))

    def part(self) -> None:
        """The model has left: its engine's counters are read no more, what was timed stays."""
        self._engines.models = [(llm, name) for llm, name in self._engines.models if llm is not self._llm]
        self._llm = None

    def join(self, other: Metrics) -> None:
        """Become part of a server's metrics: one page has all models, each under its name."""
        other._engines.models += self._engines.models
        self.registry, self._engines = other.registry, other._engines
        shared = ("first_token", "between_tokens", "whole", "finished", "answers")
        for name in (*shared, "tokens_of", "aborted", "embedded", "refused"):
            setattr(self, name, getattr(other, name))

    def ended(self, client: str, n_read: int, n_made: int, n_aborted: int = 0) -> None:
        """Count what an answer, or a text to embed, has cost.

        Args:
            client: the name of its key; empty where there are no keys.
            n_aborted: tokens among those made of answers that did not come to their end.
        """
        if client:
            self.tokens_of.labels(self._name, client, "read").inc(n_read)
            self.tokens_of.labels(self._name, client, "made").inc(n_made)
        if n_aborted:
            self.aborted.labels(self._name).inc(n_aborted)

    def refuse(self, error: QuadrigaError) -> None:
        """A request was refused with this error."""
        shown = as_api_error(error)
        self.refused.labels(shown.code or str(shown.status)).inc()

    def texts(self, n: int) -> None:
        """So many texts have become vectors."""
        self.embedded.labels(self._name).inc(n)

    def done(self, reason: str, first_s: float | None, whole_s: float, n_tokens: int) -> None:
        """Record a finished answer."""
        self.finished.labels(self._name, reason).inc()
        self.whole.labels(self._name).observe(whole_s)
        if first_s is not None:
            self.first_token.labels(self._name).observe(first_s)
            if n_tokens > 1:
                self.between_tokens.labels(self._name).observe((whole_s - first_s) / (n_tokens - 1))

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class _EngineCollector:
    """Reads the engines' own counters, so that counting costs a step nothing."""

    def __init__(self) -> None:
        self.models: list[tuple[LLM, str]] = []

    def collect(self) -> Iterator[Metric]:
        """All of them, now."""
        stats = [(name, llm.engine.stats()) for llm, name in self.models]
        for metric, (text, gauge_of) in _GAUGES.items():
            gauge = GaugeMetricFamily(metric, text, labels=["model_name"])
            for name, one in stats:
                gauge.add_metric([name], gauge_of(one))
            yield gauge
        for metric, (text, field) in _COUNTERS.items():
            counter = CounterMetricFamily(metric, text, labels=["model_name"])
            for name, one in stats:
                counter.add_metric([name], getattr(one, field))
            yield counter
        tokens = CounterMetricFamily(
            "quadriga_moe_expert_tokens", "Tokens an expert has seen.", labels=["model_name", "layer", "expert"]
        )
        balance = GaugeMetricFamily(
            "quadriga_moe_load_balance", "Largest load over mean load of a layer.", labels=["model_name", "layer"]
        )
        for llm, name in self.models:
            for layer, counts in enumerate(llm.runner.expert_load()):
                numbers = counts.tolist()
                for expert, count in enumerate(numbers):
                    tokens.add_metric([name, str(layer), str(expert)], count)
                balance.add_metric([name, str(layer)], balance_of(numbers))
        if tokens.samples:
            yield tokens
            yield balance


def balance_of(counts: list[int]) -> float:
    """Largest load over mean load: 1 is perfect, the number of experts is collapse; 1 before the first token."""
    total = sum(counts)
    return max(counts) * len(counts) / total if total else 1.0


def jain_of(counts: list[int]) -> float:
    """Jain's fairness index (sum x)^2 / (n sum x^2): 1 is perfect, 1/n is collapse; 1 before the first token."""
    squares = sum(n * n for n in counts)
    return sum(counts) ** 2 / (len(counts) * squares) if squares else 1.0
