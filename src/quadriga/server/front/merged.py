"""Answers of several replicas as one: their metrics, each with a label that says whose it is, and experts' counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from quadriga.server.front.relay import Relay
from quadriga.server.front.replicas import Replicas
from quadriga.server.front.routing import Router
from quadriga.server.metrics import balance_of, jain_of

LABEL = "replica"


class FrontCollector:
    """What a front counts: who is there, how often each was started, and where requests went."""

    def __init__(self, replicas: Replicas, relay: Relay, router: Router) -> None:
        self._replicas, self._relay, self._router = replicas, relay, router

    def collect(self) -> Iterator[Metric]:
        """All of it, now."""
        up = GaugeMetricFamily("quadriga_replica_up", "1 where a replica answers.", labels=["number"])
        busy = GaugeMetricFamily("quadriga_replica_requests", "Requests that a replica has.", labels=["number"])
        starts = CounterMetricFamily("quadriga_replica_starts", "Times a replica was started.", labels=["number"])
        for replica in self._replicas.all:
            up.add_metric([str(replica.number)], float(replica.is_ready))
            busy.add_metric([str(replica.number)], replica.n_open)
            starts.add_metric([str(replica.number)], replica.n_starts)
        yield from (up, busy, starts)
        resent, found = self._relay.n_resent, self._router.n_found
        yield CounterMetricFamily("quadriga_front_resent", "Requests that were sent to another replica.", value=resent)
        yield CounterMetricFamily("quadriga_front_known", "Requests whose beginning a replica had.", value=found)


def metrics(pages: Mapping[str, str]) -> str:
    """Pages of Prometheus' text format as one: a family once, every sample with a label more.

    Args:
        pages: the label's value -> a page.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for whose, page in pages.items():
        family = ""
        for line in page.splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                known = heads.setdefault(family, [])
                if line not in known and len(known) < 2:
                    known.append(line)
            elif line:
                samples.setdefault(family, []).append(_labelled(line, whose))
    lines = [line for family, head in heads.items() for line in (*head, *samples.get(family, ()))]
    return "".join(f"{line}\n" for line in lines)


def _labelled(sample: str, whose: str) -> str:
    name, brace, rest = sample.partition("{")
    if brace and " " not in name:
        return f'{name}{{{LABEL}="{whose}",{rest}'
    name, _, value = sample.partition(" ")
    return f'{name}{{{LABEL}="{whose}"}} {value}'


def experts(shown: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What GET /v1/experts says of all replicas together."""
    counts = [
        [sum(loads) for loads in zip(*layers, strict=True)]
        for layers in zip(*(one["counts"] for one in shown), strict=True)
    ]
    return {
        **shown[0],
        "n_tokens": sum(one["n_tokens"] for one in shown),
        "counts": counts,
        "balance": [round(balance_of(layer), 4) for layer in counts],
        "jain": [round(jain_of(layer), 4) for layer in counts],
    }
