"""Timed answers in the histograms that dashboards read."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from quadriga.server.metrics import Metrics
from tests.server.conftest import tiny_llm


def sums(metrics: Metrics) -> dict[str, tuple[float, float]]:
    """Histogram -> (number of observations, their sum)."""
    samples = [s for family in text_string_to_metric_families(metrics.text().decode()) for s in family.samples]
    values = {s.name: s.value for s in samples if s.name.endswith(("_count", "_sum"))}
    names = {name.removesuffix("_sum") for name in values if name.endswith("_sum")}
    return {name.removeprefix("vllm:"): (values[f"{name}_count"], values[f"{name}_sum"]) for name in names}


def test_an_answer_is_timed_to_its_first_token_between_tokens_and_to_its_end() -> None:
    """Five tokens, the first after 0.5 s, the last 2 s later: four gaps of half a second."""
    metrics = Metrics()
    metrics.add(tiny_llm(), "tiny")
    metrics.done("stop", 0.5, 2.5, 5)
    assert sums(metrics) == {
        "time_to_first_token_seconds": (1, 0.5),
        "time_per_output_token_seconds": (1, 0.5),
        "e2e_request_latency_seconds": (1, 2.5),
    }
    metrics.done("length", 0.25, 0.25, 1)
    assert sums(metrics)["time_per_output_token_seconds"] == (1, 0.5), "one token has no gap"
    metrics.done("abort", None, 4.0, 0)
    assert sums(metrics)["time_to_first_token_seconds"] == (2, 0.75), "none came"
    assert sums(metrics)["e2e_request_latency_seconds"] == (3, 6.75)
    reasons = {
        s.labels["finished_reason"]: s.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for s in family.samples
        if s.name == "vllm:request_success_total"
    }
    assert reasons == {"stop": 1, "length": 1, "abort": 1}
