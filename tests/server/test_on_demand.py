"""Models that come when they are asked for and leave again: over HTTP with tiny models, and alone with none."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quadriga.engine.load import load
from quadriga.engine.load_options import LoadOptions
from quadriga.errors import BusyError, CheckpointError, ConfigError, EngineError
from quadriga.server import on_demand
from quadriga.server.errors import ApiError
from quadriga.server.fleet import Fleet
from quadriga.server.guard import Limits
from quadriga.server.offers import called, offer
from quadriga.server.on_demand import FOREVER, Offer, OnDemand, keep_alive_s
from quadriga.server.service import Service
from tests.checkpoint.models import TINY
from tests.server.conftest import Gate, Live, StoppedClock, running, tiny_llm
from tests.waiting import HANG_S, until

KEEP_S = 300.0
SIZES = {"a": 40, "b": 30, "c": 50, "bad": 20, "huge": 101}
"""What each model is said to take, of 100."""


class Shelf:
    """Models a, b and c, alike but for signs before the head; bad cannot be loaded, and huge is too large."""

    def __init__(self, budget: int = 100) -> None:
        self.begun: list[str] = []
        self.models: dict[str, Any] = {}
        self.gates: dict[str, threading.Event] = {}
        card = {"config": TINY["dbrx"], "created": 0, "template": None, "format": "q8", "nbytes": 7, "path": None}
        from quadriga.server.card import Card

        self.offers = [
            Offer(card=Card(name=name, **card), aliases=("first",) if name == "a" else (), source=name, how=LoadOptions(), nbytes=n)
            for name, n in SIZES.items()
        ]  # fmt: skip
        self.on_demand = OnDemand(self.offers, self.load, budget=budget, keep_alive_s=KEEP_S, max_waiting=6)
        self.fleet = Fleet(on_demand=self.on_demand)

    def load(self, one: Offer) -> Service:
        name = one.card.name
        self.begun.append(name)
        if name in self.gates:
            assert self.gates[name].wait(HANG_S)
        if name == "bad":
            raise CheckpointError("layers.3.moe.w_gate is missing")
        llm = tiny_llm()
        llm.runner.parameters["final_norm.weight"][:] *= np.random.default_rng(ord(name)).choice([-1.0, 1.0], 48)
        self.models[name] = weakref.ref(llm)
        # What the tests' budget is about, in place of what the tiny model takes.
        llm.runner.weights = lambda: ("q8", SIZES[name])  # type: ignore[method-assign]
        llm.runner.kv_bytes = llm.runner.state_bytes = 0
        return Service(llm, name=name, aliases=one.aliases)

    def hold(self, name: str) -> threading.Event:
        """Let a model's load wait for an event."""
        self.gates[name] = threading.Event()
        return self.gates[name]


@contextlib.contextmanager
def serving(budget: int = 100, **limits: Any) -> Iterator[tuple[Live, Shelf]]:
    shelf = Shelf(budget)
    with running(shelf.fleet, Limits(**limits)) as live:
        yield live, shelf


def body(model: str | None, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "ab", "max_tokens": 5, "temperature": 0, "ignore_eos": True, **more}


def said(live: Live, model: str | None, **more: Any) -> str:
    answer = live.post("/v1/completions", body(model, **more))
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def loaded(live: Live) -> list[str]:
    return [one["name"] for one in live.client.get("/api/ps").json()["models"] if one["name"] != "first"]


def waiting(shelf: Shelf, name: str) -> int:
    slot = shelf.on_demand.slot_of(name)
    assert slot is not None
    return len(slot.waiting)


def test_a_model_is_loaded_once_for_all_who_ask_and_others_go_on() -> None:
    with serving() as (live, shelf), ThreadPoolExecutor(4) as clients:
        first = said(live, "a")
        gate = shelf.hold("b")
        asked = [clients.submit(said, live, "b") for _ in range(3)]
        assert until(lambda: waiting(shelf, "b") == 3)
        assert said(live, "a") == said(live, None) == said(live, "first") == first, "the loaded one answers meanwhile"
        assert loaded(live) == ["a"] and not any(one.done() for one in asked)
        gate.set()
        texts = {one.result(HANG_S) for one in asked}
        assert len(texts) == 1 and first not in texts
        assert shelf.begun == ["a", "b"] and loaded(live) == ["a", "b"]


def test_who_was_idle_for_longest_makes_room_and_its_memory_is_free() -> None:
    with serving() as (live, shelf):
        texts = {name: said(live, name) for name in ("a", "b", "a")}
        assert loaded(live) == ["a", "b"]
        said(live, "c")
        assert loaded(live) == ["a", "c"] and shelf.on_demand.in_memory == 90
        gc.collect()
        assert shelf.models["b"]() is None, "nothing holds what has left"
        assert said(live, "b") == texts["b"] and loaded(live) == ["b", "c"] and shelf.begun == ["a", "b", "c", "b"]
        page = live.client.get("/metrics").text
        assert 'vllm:num_requests_running{model_name="b"}' in page
        assert 'vllm:num_requests_running{model_name="a"}' not in page, "it has left"
        assert 'vllm:request_success_total{finished_reason="length",model_name="a"} 2.0' in page, "what it did stays"


def test_what_is_in_use_stays_and_then_gives_way_to_who_came_first() -> None:
    with serving(60) as (live, shelf), ThreadPoolExecutor(4) as clients:
        whole = said(live, "a", max_tokens=30)
        live.service = shelf.fleet.services[0]
        with Gate(live) as gate:
            using = clients.submit(said, live, "a", max_tokens=30)
            gate.hold()
            other = clients.submit(said, live, "b")
            assert until(lambda: waiting(shelf, "b") == 1)
            slot = shelf.on_demand.slot_of("a")
            assert until(lambda: slot.closing)  # type: ignore[union-attr]
            again = clients.submit(said, live, "a")
            assert until(lambda: shelf.on_demand._n_waiting == 2)
            assert shelf.begun == ["a"] and loaded(live) == ["a"]
        assert using.result(HANG_S) == whole, "its answer is whole"
        assert other.result(HANG_S) and again.result(HANG_S)
        assert shelf.begun == ["a", "b", "a"], "who asked later, for what was there, came after"


def test_a_stream_holds_its_model_to_its_last_byte() -> None:
    with serving(60) as (live, shelf), ThreadPoolExecutor(1) as clients:
        said(live, "a")
        live.service = shelf.fleet.services[0]
        with Gate(live) as gate:
            stream = live.connect(body("a", stream=True, max_tokens=30))
            gate.hold()
            other = clients.submit(said, live, "b")
            assert until(lambda: waiting(shelf, "b") == 1)
            gate.open(3)
            assert shelf.begun == ["a"]
            stream.close()
        assert other.result(HANG_S) and loaded(live) == ["b"]


def test_an_idle_model_stays_for_its_keep_alive() -> None:
    with serving() as (live, shelf):
        with StoppedClock(live) as clock:
            said(live, "a")
            assert until(lambda: clock.waits(KEEP_S))
            clock.advance(KEEP_S - 1)
            assert loaded(live) == ["a"]
            said(live, "a")
            assert until(lambda: clock.waits(KEEP_S)), "it counts from the last answer"
            clock.advance(KEEP_S - 1)
            assert loaded(live) == ["a"]
            clock.advance(2)
            assert until(lambda: loaded(live) == [])
            chat = {"model": "a", "messages": [{"role": "user", "content": "a"}], "stream": False}
            options = {"options": {"num_predict": 2}}
            assert live.post("/api/chat", {**chat, **options, "keep_alive": "1h30m"}).status_code == 200
            assert until(lambda: clock.waits(5400))
            assert live.post("/api/chat", {**chat, **options, "keep_alive": 7}).status_code == 200
            assert until(lambda: clock.waits(7))
            assert live.post("/api/chat", {**chat, **options}).status_code == 200
            assert until(lambda: clock.waits(7)), "what was asked for before holds on"
            assert live.post("/api/chat", {**chat, "keep_alive": "soon"}).status_code == 400
            assert live.post("/api/embed", {"model": "a", "input": "x", "keep_alive": -1}).status_code == 200
            (one, _) = live.client.get("/api/ps").json()["models"]
            assert one["expires_at"].startswith("9999") and one["size"] == SIZES["a"]
            clock.advance(1e6)
            assert loaded(live) == ["a"]
        assert live.post("/api/generate", {"model": "a:latest", "prompt": "a", "stream": False, "keep_alive": 0, **options}).status_code == 200  # fmt: skip
        assert until(lambda: loaded(live) == [])
        assert live.post("/api/generate", {"model": "b"}).json()["done_reason"] == "load"
        assert loaded(live) == ["b"]
        gone = live.post("/api/chat", {"model": "b", "keep_alive": 0}).json()
        assert gone["done_reason"] == "unload" and gone["done"] and until(lambda: loaded(live) == [])
        assert live.post("/api/chat", {"model": "b", "keep_alive": 0}).json()["done_reason"] == "unload"
        assert shelf.begun == ["a", "a", "b"], "nothing is loaded to be let go"


def test_a_model_that_cannot_be_loaded_fails_only_who_asked_for_it() -> None:
    with serving() as (live, shelf), ThreadPoolExecutor(4) as clients:
        first = said(live, "a")
        gate = shelf.hold("bad")
        asked = [clients.submit(live.post, "/v1/completions", body("bad")) for _ in range(2)]
        assert until(lambda: waiting(shelf, "bad") == 2)
        gate.set()
        for one in asked:
            error = one.result(HANG_S)
            assert error.status_code == 500 and "w_gate is missing" in error.json()["error"]["message"]
            assert error.json()["error"]["code"] == "load_failed"
        assert said(live, "a") == first and live.client.get("/health").json() == {"status": "ok"}
        assert live.post("/api/chat", {"model": "bad"}).status_code == 500
        assert shelf.begun == ["a", "bad", "bad"], "who asks later has it tried again"
        large = live.post("/v1/completions", body("huge"))
        assert large.status_code == 400 and large.json()["error"]["code"] == "model_too_large"
        unknown = live.post("/v1/completions", body("nobody"))
        assert unknown.status_code == 404 and "'c'" in unknown.json()["error"]["message"]
        assert loaded(live) == ["a"]


def test_lists_have_what_can_be_loaded_without_loading_it() -> None:
    with serving() as (live, shelf):
        listed = live.client.get("/v1/models").json()["data"]
        assert [one["id"] for one in listed] == ["a", "first", "b", "c", "bad", "huge"]
        assert not any(one["quadriga"]["loaded"] for one in listed) and listed[0]["max_model_len"] == 64
        assert live.client.get("/v1/models/b").json()["quadriga"]["n_experts"] == 5
        assert [one["name"] for one in live.client.get("/api/tags").json()["models"]][:3] == ["a", "first", "b"]
        shown = live.post("/api/show", {"model": "b:latest"}).json()
        assert shown["details"]["family"] == "dbrx" and live.post("/api/show", {"model": "x"}).status_code == 404
        assert live.post("/api/pull", {"model": "b", "stream": False}).json() == {"status": "success"}
        experts = live.client.get("/v1/experts", params={"model": "b"}).json()
        assert experts["n_tokens"] == 0 and experts["counts"] == [[0] * 5] * 3
        for path in ("/health", "/ready", "/openapi.json", "/docs", "/metrics", "/v1/experts/labels"):
            assert live.client.get(path).status_code == 200, path
        assert live.post("/v1/experts/reset", {}).status_code == 200 and shelf.begun == []
        assert live.client.get("/props", params={"model": "b"}).json()["model_alias"] == "b"
        assert shelf.begun == ["b"]
        listed = live.client.get("/v1/models").json()["data"]
        assert [one["id"] for one in listed if one["quadriga"]["loaded"]] == ["b"]
        assert listed[2]["max_model_len"] == 1024, "what is loaded says more than its file did"
        said(live, "b")
        assert sum(live.client.get("/v1/experts", params={"model": "b"}).json()["counts"][0]) > 0
        lines = "".join(json.dumps({"custom_id": m, "url": "/v1/completions", "body": body(m)}) + "\n" for m in "abc")
        answers = live.client.post("/v1/batches", content=lines, headers={"content-type": "application/jsonl"}).text
        assert answers.count('"status_code":200') == 3, "a batch has its models one after another"


def test_keep_alive_means_nothing_where_all_models_stay(tiny: Live) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "stream": False}
    answer = tiny.post("/api/chat", {**chat, "options": {"num_predict": 1}, "keep_alive": 0})
    assert answer.status_code == 200 and answer.headers["x-quadriga-ignored"] == "keep_alive"
    (one,) = tiny.client.get("/api/ps").json()["models"]
    assert one["expires_at"].startswith("9999")


def test_who_leaves_while_it_loads_does_not_end_the_load() -> None:
    with serving() as (live, shelf), StoppedClock(live) as clock:
        gate = shelf.hold("b")
        leaver = live.connect(body("b"))
        assert until(lambda: waiting(shelf, "b") == 1)
        behind = live.connect(body("c"))
        assert until(lambda: waiting(shelf, "c") == 1)
        behind.close()
        assert until(lambda: waiting(shelf, "c") == 0)
        leaver.close()
        assert until(lambda: waiting(shelf, "b") == 0)
        gate.set()
        assert until(lambda: loaded(live) == ["b"])
        assert until(lambda: clock.waits(KEEP_S)), "nobody has it, so its time runs"
        assert said(live, "a") and shelf.begun == ["b", "a"], "what nobody waits for any more is not loaded"


def test_a_server_that_ends_lets_nobody_wait() -> None:
    with serving() as (live, shelf), ThreadPoolExecutor(1) as clients:
        gate = shelf.hold("b")
        asked = clients.submit(live.post, "/v1/completions", body("b"))
        assert until(lambda: waiting(shelf, "b") == 1)
        live.loop.call_soon_threadsafe(shelf.fleet.drop_all, EngineError("the server is shutting down"))
        answer = asked.result(HANG_S)
        assert answer.status_code == 503 and "shutting down" in answer.text
        gate.set()


def test_while_it_drains_nothing_more_is_loaded() -> None:
    with serving() as (live, shelf):
        shelf.fleet.draining = True
        assert live.post("/v1/completions", body("a")).json()["error"]["code"] == "shutting_down"
        assert shelf.begun == []
        shelf.fleet.draining = False


# Without models ------------------------------------------------------------------------------------------------------


class Fake:
    """Something that can be loaded: counts its users, and says so when it leaves while it has any."""

    def __init__(self, name: str, nbytes: int, adapters: list[str]) -> None:
        self.name, self.names, self.users, self.card = name, [name], 0, SimpleNamespace(name=name)
        runner = SimpleNamespace(weights=lambda: ("q8", nbytes), kv_bytes=0, state_bytes=0)
        self.llm = SimpleNamespace(runner=runner, adapters=adapters)
        self.engine = SimpleNamespace(start=self._start, ended=True, step_timeout_s=1.0)

    async def _start(self) -> None:
        pass

    async def end(self, timeout_s: float | None) -> None:
        await asyncio.sleep(0)
        assert not self.users, "what is in use stays"


def fakes(sizes: dict[str, int], budget: int, *, adapters: list[str] | None = None, keep: float = FOREVER, **how: Any) -> OnDemand:  # fmt: skip
    offers: Any = [
        SimpleNamespace(
            card=SimpleNamespace(name=name), names=[name], source=name, nbytes=n, how=LoadOptions(), aliases=()
        )
        for name, n in sizes.items()
    ]
    under_way: Counter[str] = Counter()

    def load(one: Any) -> Any:
        under_way[one.source] += 1
        assert under_way.total() == 1, "one load at a time"
        under_way[one.source] -= 1
        return Fake(one.source, one.nbytes, adapters or [])

    return OnDemand(offers, load, budget=budget, keep_alive_s=keep, **how)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3), st.booleans()), min_size=1, max_size=14),
    st.sampled_from([0.0, FOREVER]),
)
@example([("b", 0, True), ("a", 0, True), ("a", 0, True), ("a", 0, True)], FOREVER)
def test_everybody_is_served_and_the_budget_holds(asked: list[tuple[str, int, bool]], keep: float) -> None:
    sizes = {"a": 5, "b": 4, "c": 3, "d": 6}

    async def run() -> None:
        demand = fakes(sizes, 8, keep=keep)

        async def one(name: str, steps: int, leaves: bool) -> None:
            slot = demand.slot_of(name)
            assert slot is not None
            service: Any = await demand.take(slot)
            service.users += 1
            try:
                for _ in range(steps):
                    assert demand.in_memory <= 8 and slot.service is service
                    await asyncio.sleep(0)
            finally:
                service.users -= 1
                demand.give_back(slot)

        tasks = [asyncio.create_task(one(*each)) for each in asked]
        for task, (_, _, leaves) in zip(tasks, asked, strict=True):
            await asyncio.sleep(0)
            if leaves:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.cancelled() or task.exception() is None for task in tasks)
        slots = demand.slots
        assert all(slot.n_users == 0 and not slot.waiting for slot in slots)
        while keep == FOREVER and any(slot.closing for slot in slots):
            await asyncio.sleep(0)  # it was to leave for somebody who has left: it is on its way, and comes to an end
        for name in sizes:  # and it goes on
            slot = demand.slot_of(name)
            assert slot is not None
            await demand.take(slot)
            demand.give_back(slot)
        await demand.stop(1.0)

    with mock.patch.object(on_demand, "_free"):  # it looks through all objects of all tests
        asyncio.run(asyncio.wait_for(run(), HANG_S))


def test_adapters_keep_a_model_from_leaving() -> None:
    async def run() -> None:
        demand = fakes({"a": 5, "b": 4}, 8, adapters=["law"], keep=0.0)
        a, b = demand.slots
        await demand.take(a)
        demand.give_back(a)
        with pytest.raises(ApiError, match="adapters"):
            await demand.take(b)
        assert a.service is not None and next(iter(demand.listed())).expires_s is None
        a.service.llm.adapters.clear()  # type: ignore[attr-defined]
        await demand.take(b)
        assert a.service is None

    asyncio.run(run())


def test_no_more_wait_than_may() -> None:
    async def run() -> None:
        demand = fakes({"a": 5, "b": 4}, 8, max_waiting=2)
        a, b = demand.slots
        await demand.take(a)
        tasks = [asyncio.create_task(demand.take(b)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await demand.take(b)
        await asyncio.sleep(0)
        assert a.closing, "it is to leave"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while a.closing:
            await asyncio.sleep(0)
        assert await demand.take(a) is a.service, "those who waited have left, so it stays"

    asyncio.run(asyncio.wait_for(run(), HANG_S))


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (0, 0.0),
        (90, 90.0),
        (-1, FOREVER),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        ("250ms", 0.25),
        ("-1m", FOREVER),
        ("-1", FOREVER),
        ("42", 42.0),
        (" 10s ", 10.0),
    ],
)
def test_times_to_stay(given: Any, seconds: float) -> None:
    assert keep_alive_s(given) == pytest.approx(seconds)


@pytest.mark.parametrize("given", ["", "m", "5 minutes", "5x", "1m30", "--1", "1e3s", float("nan")])
def test_what_is_no_time(given: Any) -> None:
    with pytest.raises(ConfigError, match="keep_alive"):
        keep_alive_s(given)


@pytest.mark.parametrize("format", [None, "q8"])
def test_what_a_model_will_take_is_told_by_its_file(format: str | None) -> None:
    how = LoadOptions(format=format, threads=1, max_sequences=4)
    budget = 80_000_000
    one = offer("quadriga-nano", ["nano", "small"], how, budget)
    assert one.names == ["nano", "small"] and one.card.config.family == "dbrx"
    assert "<|im_start|>" in (one.card.template or "")
    assert one.how.kv_memory is not None and one.how.kv_memory <= budget // 4
    llm = load(one.source, **vars(one.how))
    took = llm.runner.weights()[1] + llm.runner.kv_bytes + llm.runner.state_bytes
    assert 0.9 * took <= one.nbytes <= 1.1 * took
    assert called("hf:org/name") == "name" and called("/models/big.gguf") == "big.gguf" and called("a/b:c") == "b-c"
