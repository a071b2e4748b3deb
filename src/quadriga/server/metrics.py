"""Prometheus metrics: the engine's counters are read when somebody asks, requests are timed as they end.

Names that vLLM has are vLLM's, so that its dashboards fit; the experts' are ours.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from quadriga.engine.llm import LLM

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """All metrics of one server.

    Args:
        llm: what is served.
        name: what clients call it.
    """

    def __init__(self, llm: LLM, name: str) -> None:
        self._name = name
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(llm, name))
        labels = ["model_name"]

        def histogram(metric: str, text: str) -> Histogram:
            return Histogram(metric, text, labels, buckets=_SECONDS, registry=self.registry).labels(name)

        self.first_token = histogram("vllm:time_to_first_token_seconds", "Seconds from request to first token.")
        self.between_tokens = histogram("vllm:time_per_output_token_seconds", "Mean seconds a token after the first.")
        self.whole = histogram("vllm:e2e_request_latency_seconds", "Seconds from request to the end of its answer.")
        self.finished = Counter(
            "vllm:request_success", "Finished answers.", ["model_name", "finished_reason"], registry=self.registry
        )
        self.answers = Counter("quadriga_http_responses", "HTTP answers.", ["route", "status"], registry=self.registry)

    def done(self, reason: str, first_s: float | None, whole_s: float, n_tokens: int) -> None:
        """Record a finished answer."""
        self.finished.labels(self._name, reason).inc()
        self.whole.observe(whole_s)
        if first_s is not None:
            self.first_token.observe(first_s)
            if n_tokens > 1:
                self.between_tokens.observe((whole_s - first_s) / (n_tokens - 1))

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class _EngineCollector:
    """Reads the engine's own counters, so that counting costs a step nothing."""

    def __init__(self, llm: LLM, name: str) -> None:
        self._llm, self._name = llm, name

    def collect(self) -> Iterator[Metric]:
        """All of them, now."""
        llm, name = self._llm, self._name
        stats = llm.engine.stats()
        gauges = {
            "vllm:num_requests_running": ("Requests being computed.", stats.n_running),
            "vllm:num_requests_waiting": ("Requests waiting.", stats.n_waiting),
            "vllm:kv_cache_usage_perc": ("Part of the cache in use.", stats.kv_blocks_used / max(1, stats.kv_blocks)),
            "quadriga_kv_blocks_used": ("Cache blocks in use.", stats.kv_blocks_used),
            "quadriga_kv_blocks": ("Cache blocks.", stats.kv_blocks),
        }
        counters = {
            "vllm:prompt_tokens": ("Prompt tokens of finished answers.", stats.n_prompt_tokens),
            "vllm:generation_tokens": ("Tokens made.", stats.n_generated_tokens),
            "vllm:num_preemptions": ("Times a request was put back.", stats.n_preemptions),
            "vllm:prefix_cache_hits": ("Prompt tokens found in the cache.", stats.n_cached_tokens),
            "vllm:spec_decode_num_draft_tokens": ("Tokens guessed.", stats.n_guessed),
            "vllm:spec_decode_num_accepted_tokens": ("Tokens guessed right.", stats.n_guessed_right),
            "quadriga_engine_steps": ("Passes through the model.", stats.n_steps),
        }
        for metric, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(metric, text, labels=["model_name"])
            gauge.add_metric([name], value)
            yield gauge
        for metric, (text, value) in counters.items():
            counter = CounterMetricFamily(metric, text, labels=["model_name"])
            counter.add_metric([name], value)
            yield counter
        load = llm.runner.expert_load()
        if not load:
            return
        tokens = CounterMetricFamily(
            "quadriga_moe_expert_tokens", "Tokens an expert has seen.", labels=["model_name", "layer", "expert"]
        )
        balance = GaugeMetricFamily(
            "quadriga_moe_load_balance", "Largest load over mean load of a layer.", labels=["model_name", "layer"]
        )
        for layer, counts in enumerate(load):
            numbers = counts.tolist()
            for expert, count in enumerate(numbers):
                tokens.add_metric([name, str(layer), str(expert)], count)
            balance.add_metric([name, str(layer)], balance_of(numbers))
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
