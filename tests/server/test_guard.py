"""Rates and places by key: the bucket of tokens on a clock of the test's own, and who shares cached prefixes with whom."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from quadriga.server import guard
from quadriga.server.errors import ApiError
from quadriga.server.guard import Guard, Limits
from tests.server.conftest import running, tiny_llm

KEYS = ("key-number-one", "key-number-two")


@dataclass
class Clock:
    """Seconds, moved by hand."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The guard's clock."""
    made = Clock()
    monkeypatch.setattr(guard, "time", SimpleNamespace(monotonic=made.monotonic))
    return made


async def _nothing(*_: Any) -> None:
    raise AssertionError("not asked in these tests")


def taken(door: Guard, who: str = "a", most: int = 100) -> int:
    """How many requests get through, one after the other, before one is refused."""
    for n in range(most):
        try:
            door._take(who).open -= 1
        except ApiError:
            return n
    return most


def test_an_hour_away_saves_no_more_than_a_minute(clock: Clock) -> None:
    door = Guard(_nothing, Limits(requests_per_minute=3))
    assert taken(door) == 3
    clock.now += 19.9
    assert taken(door) == 0, "one comes back every 20 seconds"
    clock.now += 0.2
    assert taken(door) == 1
    clock.now += 3600
    assert taken(door) == 3, "the bucket holds a minute's worth, however long nobody asked"
    assert taken(door, "b") == 3, "everybody has a bucket of their own"


def test_a_days_tokens_come_back_all_day(clock: Clock) -> None:
    door = Guard(_nothing, Limits(tokens_per_day=86_400))
    door.account("a").spend(86_500)
    with pytest.raises(ApiError, match="more than 86400 tokens a day") as refused:
        door._take("a")
    assert refused.value.retry_after_s == pytest.approx(101), "one a second, and 100 were too many"
    clock.now += 100.5
    assert taken(door) == 0
    clock.now += 0.6
    assert taken(door, most=3) == 3 and taken(door, "b", most=3) == 3
    clock.now += 30
    report = door.account("a").report()
    assert report["tokens"] == 86_500 and report["requests"] == 3
    assert report["limits"] == {"concurrent": None, "requests_per_minute": None, "tokens_per_minute": None, "tokens_per_day": 86_400}  # fmt: skip
    assert report["left"]["tokens_per_day"] == 31 and report["left"]["concurrent"] is None
    assert not door.account("a").idle(clock.now + 600), "who is in debt is not forgotten"
    assert door.account("b").idle(clock.now + 60)


def test_a_key_is_told_what_it_has_used() -> None:
    limits = Limits(keys=KEYS, concurrent=8, tokens_per_minute=1000)
    with running(tiny_llm(), limits) as live:
        mine, other = ({"authorization": f"Bearer {key}"} for key in KEYS)
        body = {"model": "tiny", "prompt": "abcd", "max_tokens": 3, "ignore_eos": True, "n": 2}
        assert live.post("/v1/completions", body, headers=mine).status_code == 200
        used = live.client.get("/v1/usage", headers=mine).json()
        assert (used["requests"], used["tokens"]) == (2, 10), "a prompt is read once for both answers"
        assert used["client"].startswith("key:") and used["limits"]["concurrent"] == used["left"]["concurrent"] == 8
        assert 990 <= used["left"]["tokens_per_minute"] <= 1000
        assert live.client.get("/v1/usage", headers=other).json()["tokens"] == 0
        assert live.client.get("/v1/usage").status_code == 401


def test_a_refusal_says_when_to_come_back_and_costs_nothing(clock: Clock) -> None:
    door = Guard(_nothing, Limits(requests_per_minute=6))
    assert taken(door) == 6
    clock.now += 4
    for _ in range(3):
        with pytest.raises(ApiError, match="more than 6 requests a minute") as refused:
            door._take("a")
        assert refused.value.status == 429 and refused.value.headers["retry-after"] == "6"
    clock.now += 6
    assert taken(door) == 1


def test_places_are_counted_while_they_are_held(clock: Clock) -> None:
    door = Guard(_nothing, Limits(concurrent=2))
    held = [door._take("a"), door._take("a")]
    with pytest.raises(ApiError, match="more than 2 requests at once"):
        door._take("a")
    assert door._take("b").open == 1
    held[0].open -= 1
    assert door._take("a").open == 2


def test_addresses_that_came_and_went_are_forgotten_and_nobody_elses_count(clock: Clock) -> None:
    door = Guard(_nothing, Limits(requests_per_minute=2, concurrent=9))
    door._take("stays")
    for i in range(10_000):
        door._take(f"address {i}").open -= 1
    assert taken(door) == 2 and len(door._accounts) > 10_000, "they have been seen within a minute"
    assert taken(door) == 0
    clock.now += 61
    door._take("another")
    assert set(door._accounts) == {"stays", "another"}
    assert door._accounts["stays"].open == 1


def test_rates_are_limited_by_key_over_http(clock: Clock) -> None:
    with running(tiny_llm(), Limits(keys=KEYS, requests_per_minute=3)) as live:

        def ask(key: str) -> Any:
            return live.post("/tokenize", {"prompt": "x"}, headers={"authorization": f"Bearer {key}"})

        assert [ask(KEYS[0]).status_code for _ in range(4)] == [200, 200, 200, 429]
        refused = ask(KEYS[0])
        assert refused.headers["retry-after"] == "20"
        assert ask(KEYS[1]).status_code == 200
        clock.now += 20
        assert [ask(KEYS[0]).status_code for _ in range(2)] == [200, 429]


def test_a_place_is_free_again_when_its_answer_is_out() -> None:
    with running(tiny_llm(), Limits(concurrent=1)) as live:
        for body in ({"prompt": "x"}, {"wrong": 1}, {"prompt": "x"}):
            assert live.post("/tokenize", body).status_code in (200, 400)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_prefix_that_one_key_cached_is_not_there_for_another(path: str) -> None:
    said = "the same long words " * 10
    body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": said}], "max_tokens": 1}
    if path == "/v1/completions":
        body = {"model": "tiny", "prompt": said, "max_tokens": 1}
    if path == "/v1/responses":
        body = {"model": "tiny", "input": said, "max_output_tokens": 1}
    with running(tiny_llm(), Limits(keys=KEYS)) as live:

        def cached(key: str) -> int:
            before = live.service.llm.engine.stats().n_cached_tokens
            assert live.post(path, body, headers={"authorization": f"Bearer {key}"}).status_code == 200
            return live.service.llm.engine.stats().n_cached_tokens - before

        assert cached(KEYS[0]) == 0
        again = cached(KEYS[0])
        assert again >= 160, "one's own prefix is found"
        assert cached(KEYS[1]) == 0, "whether another key has said these words cannot be learned from the time"
        assert cached(KEYS[1]) == cached(KEYS[0]) == again


def test_without_keys_everybody_shares() -> None:
    with running(tiny_llm()) as live:
        body = {"model": "tiny", "prompt": "x" * 40, "max_tokens": 1}
        usages = [live.post("/v1/completions", body).json()["usage"] for _ in range(2)]
    assert [u["prompt_tokens_details"]["cached_tokens"] for u in usages] == [0, 32]
