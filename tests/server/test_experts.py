"""What the server says about experts: the routing of every token, and the load of every expert."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from quadriga.server.metrics import balance_of, jain_of
from tests.server.conftest import Live, running, tiny_llm

BODY = {"model": "tiny", "prompt": "four horses", "max_tokens": 6, "temperature": 0, "routing": True}


@pytest.fixture(scope="module")
def fresh() -> Iterator[Live]:
    """A server that has seen nothing yet."""
    with running(tiny_llm()) as live:
        yield live


def streamed(live: Live, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The routing entries of a stream, in order."""
    out: list[dict[str, Any]] = []
    with live.client.stream("POST", path, json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                out += json.loads(line[6:]).get("routing", [])
    return out


def test_routing_is_what_the_model_does_at_the_position_before(fresh: Live) -> None:
    given = streamed(fresh, "/v1/completions", BODY)
    assert len(given) == 6
    reference = tiny_llm()  # the same weights, asked for everything at once
    ids = list(b"four horses") + [token["id"] for token in given]
    stats = reference.routing(ids[:-1])
    assert len(stats) == 3  # layers
    for i, token in enumerate(given):
        position = len("four horses") - 1 + i
        for layer, pairs in enumerate(token["layers"]):
            weights = dict(
                zip(
                    stats[layer].expert_ids[position].tolist(),
                    stats[layer].expert_weights[position].tolist(),
                    strict=True,
                )
            )
            assert {expert for expert, _ in pairs} == set(weights)
            assert [weight for _, weight in pairs] == sorted((weight for _, weight in pairs), reverse=True)
            for expert, weight in pairs:
                assert weight == pytest.approx(weights[expert], abs=1e-3)
            probs = stats[layer].probs[position].tolist()
            entropy = -sum(p * math.log(p) for p in probs if p) / math.log(5)
            assert token["entropy"][layer] == pytest.approx(entropy, abs=2e-3)


def test_whole_answers_carry_the_same_routing_as_streams(fresh: Live) -> None:
    whole = fresh.post("/v1/completions", BODY).json()["choices"][0]["routing"]
    assert whole == streamed(fresh, "/v1/completions", BODY)
    assert all(len(token["entropy"]) == 3 and min(token["entropy"]) > 0 for token in whole)


def test_nobody_gets_routing_who_did_not_ask(fresh: Live) -> None:
    assert streamed(fresh, "/v1/completions", {**BODY, "routing": False}) == []


@pytest.mark.parametrize(
    ("counts", "balance", "jain"),
    [([3, 3, 3], 1, 1), ([9, 0, 0], 3, 1 / 3), ([0, 0, 0], 1, 1), ([1, 2, 3, 6], 2, 144 / 200)],
)
def test_balance_and_jain(counts: list[int], balance: float, jain: float) -> None:
    assert balance_of(counts) == pytest.approx(balance)
    assert jain_of(counts) == pytest.approx(jain)


def test_loads_add_up_and_a_reset_counts_from_there(fresh: Live) -> None:
    fresh.post("/v1/experts/reset", {})
    fresh.post("/v1/completions", {**BODY, "routing": False})
    report = fresh.client.get("/v1/experts").json()
    n = report["n_tokens"]
    assert 0 < n <= 11 + 6  # the prompt may be in the prefix cache
    for counts, balance, jain in zip(report["counts"], report["balance"], report["jain"], strict=True):
        assert len(counts) == 5 and sum(counts) == 3 * n
        assert balance == pytest.approx(max(counts) * 5 / sum(counts), abs=1e-3)
        assert jain == pytest.approx(sum(counts) ** 2 / (5 * sum(c * c for c in counts)), abs=1e-3)
    assert fresh.post("/v1/experts/reset", {}).json()["n_tokens"] == 0
