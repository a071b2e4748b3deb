"""One client's work beside another's: counted in passes and tokens, never in seconds."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from quadriga.errors import BusyError, GrammarError, QuadrigaError, RequestError
from quadriga.server import grammars as desk_module
from quadriga.server import llamacpp, text_routes
from quadriga.server.accounts import Account, Allowance, Visit
from quadriga.server.errors import ApiError
from quadriga.server.grammars import GrammarDesk
from quadriga.server.guard import Limits
from quadriga.text import grammar as grammar_module
from tests.server.conftest import Gate, Live, running, tiny_llm
from tests.waiting import until

KEYS = tuple(f"key-number-{i}" for i in range(6))
TEXT = {"model": "tiny", "prompt": "hello there", "max_tokens": 200, "ignore_eos": True, "temperature": 0}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 40}


def key(i: int) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[i]}"}


def steps(live: Live) -> int:
    return live.service.llm.engine.stats().n_steps


def test_two_keys_share_no_prefix() -> None:
    body = {**TEXT, "prompt": "the same long words " * 8, "max_tokens": 1}
    with running(tiny_llm(), Limits(keys=KEYS)) as live:

        def cached(i: int) -> int:
            usage = live.post("/v1/completions", body, headers=key(i)).json()["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        assert [cached(0), cached(0) >= 144, cached(1), cached(1) >= 144] == [0, True, 0, True]


# Turns ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [True, False], ids=["five keys", "one address"])
def test_four_requests_of_128_answers_do_not_keep_a_fifth_waiting(keys: bool) -> None:
    llm, limits = tiny_llm(n_blocks=2000, max_sequences=16), Limits(keys=KEYS if keys else ())
    with running(llm, limits, max_waiting=512) as live, ThreadPoolExecutor(5) as pool:

        def ask(i: int, body: dict[str, Any]) -> Any:
            return pool.submit(live.post, "/v1/completions", body, headers=key(i) if keys else {})

        with Gate(live) as gate:
            many = [ask(i, {**TEXT, "n": 128}) for i in range(4)]
            assert until(lambda: live.service.engine.n_open == 4 * 128)
            while llm.engine.stats().n_waiting < 4 * 128 - 16:  # they begin a few at a time, between passes
                gate.open()
            began = steps(live)
            one = ask(4, {**TEXT, "max_tokens": 20})
            assert until(lambda: live.service.engine.n_open == 4 * 128 + 1)
            while not one.done():
                gate.let()
                assert steps(live) < began + 300, "20 tokens, each after its share of the others' time"
            assert one.result().status_code == 200
            assert not any(answer.done() for answer in many)
            loop = live.service.engine._loop
            assert loop is not None
            loop.call_soon_threadsafe(live.service.engine.drop_all, ApiError(503, "enough"))
        assert {answer.result().status_code for answer in many} == {503}
        assert live.settled()


def test_who_fills_the_queue_does_not_keep_out_others() -> None:
    short = {**TEXT, "max_tokens": 1}
    with running(tiny_llm(max_sequences=2), Limits(keys=KEYS), max_waiting=6) as live, ThreadPoolExecutor(12) as pool:
        engine = live.service.engine
        with Gate(live):
            asked = [pool.submit(live.post, "/v1/completions", {**short, "n": 8}, headers=key(0))]
            assert until(lambda: engine.n_open == 8)
            refused = live.post("/v1/completions", short, headers=key(0))
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
            for n in range(9, 13):  # half of the places each
                asked.append(pool.submit(live.post, "/v1/completions", short, headers=key(1)))
                assert until(lambda n=n: engine.n_open == n)  # type: ignore[misc]
            assert live.post("/v1/completions", short, headers=key(1)).status_code == 429
            asked.append(pool.submit(live.post, "/v1/completions", short, headers=key(2)))
            assert until(lambda: engine.n_open == 13)
        assert {answer.result().status_code for answer in asked} == {200}
        assert live.settled()
    assert not engine._n_open_of


def test_a_stream_speaks_in_every_pass_beside_texts_to_embed() -> None:
    with running(tiny_llm(n_blocks=600, max_sequences=64, max_batch_tokens=64), max_waiting=64) as live:
        texts = {"model": "tiny", "input": ["word " * 100] * 4}
        stats = live.service.llm.engine.stats
        with ThreadPoolExecutor(9) as pool:
            with Gate(live) as gate:
                talker = live.connect({**TEXT, "max_tokens": 900, "stream": True})
                assert until(lambda: stats().n_running == 1)
                gate.open(3)
                others = [pool.submit(live.post, "/v1/embeddings", texts) for _ in range(8)]
                assert until(lambda: live.service.engine.n_open == 33)
                gate.open(1)
                tokens, began = stats().n_generated_tokens, steps(live)
                gate.open(60)
                assert stats().n_generated_tokens - tokens >= steps(live) - began - 1
            assert {answer.result().status_code for answer in others} == {200}
        talker.close()
        assert live.settled()


def test_long_answers_are_written_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of vectors, and what llama.cpp's route says of each token: the loop goes on meanwhile."""
    writers = set[str]()

    def noted(of: Any) -> Any:
        return lambda body: writers.add(threading.current_thread().name) or of(body)

    monkeypatch.setattr(text_routes, "part", noted(text_routes.part))
    monkeypatch.setattr(llamacpp, "part", noted(llamacpp.part))
    with running(tiny_llm(n_blocks=400, max_sequences=16), max_waiting=112) as live:
        loop = live.loop_thread()
        for path, body in (
            ("/v1/embeddings", {"input": [[i] for i in range(100)]}),
            ("/api/embed", {"model": "tiny", "input": [[i] for i in range(100)]}),
            ("/completion", {"prompt": [[i] for i in range(60)], "n_predict": 4, "n_probs": 19}),
        ):
            assert live.post(path, body).status_code == 200
            assert writers and loop not in writers, path
            writers.clear()
        live.post("/v1/embeddings", {"input": "a"})
        assert writers == {loop}, "what is short is written at once"


def test_embeddings_are_counted_capped_and_of_any_size_of_pass() -> None:
    with running(tiny_llm(n_blocks=200, max_sequences=2, max_batch_tokens=32), max_waiting=2) as live:
        error = live.post("/v1/embeddings", {"model": "tiny", "input": ["x"] * 5}).json()["error"]
        assert "at most 4 on this server" in error["message"]
        assert live.post("/v1/embeddings", {"model": "tiny", "input": "x", "priority": 1001}).status_code == 400
        with ThreadPoolExecutor(1) as pool:
            with Gate(live):
                first = pool.submit(live.post, "/v1/embeddings", {"model": "tiny", "input": ["x" * 100, "y"] * 2})
                assert until(lambda: live.service.engine.n_open == 4)
                assert live.post("/v1/embeddings", {"model": "tiny", "input": "z"}).status_code == 429
            made = first.result().json()["data"]
        alone = live.post("/v1/embeddings", {"model": "tiny", "input": "x" * 100, "priority": 3}).json()["data"][0]
        assert made[0]["embedding"] == made[2]["embedding"] == alone["embedding"] != made[1]["embedding"]
        assert [one["index"] for one in made] == [0, 1, 2, 3]


# Readiness -----------------------------------------------------------------------------------------------------------


def test_however_many_ask_whether_it_is_ready_one_token_is_made() -> None:
    with running(tiny_llm()) as live, ThreadPoolExecutor(12) as pool:
        now = [0.0]
        live.service.probe._clock = lambda: now[0]
        generated = live.service.llm.engine.stats
        with Gate(live) as gate:
            asked = [pool.submit(live.client.get, "/ready") for _ in range(12)]
            assert until(lambda: live.service.engine.n_open == 1)
            gate.let(12)
            assert {answer.result().status_code for answer in asked} == {200}
            assert generated().n_generated_tokens == 1
            now[0] = 0.9
            assert live.client.get("/ready").status_code == 200
            assert generated().n_generated_tokens == 1, "it stands for a second"
        now[0] = 2.0
        assert live.client.get("/ready").status_code == 200
        assert generated().n_generated_tokens == 2


def test_whoever_leaves_does_not_end_the_probe_for_others() -> None:
    with running(tiny_llm()) as live, ThreadPoolExecutor(1) as pool:
        with Gate(live):
            leaver = live.connect({}, "/v1/completions")
            leaver.sendall(b"GET /ready HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
            assert until(lambda: live.service.engine.n_open == 1)
            stays = pool.submit(live.client.get, "/ready")
            leaver.close()
        assert stays.result().status_code == 200 and live.settled()


# Accounts ------------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def refusal_of_line(account: Account) -> ApiError:
    return refusal(partial(account.take, behind=True), 1)


def refusal(call: Any, *arguments: Any) -> ApiError:
    with pytest.raises(ApiError) as refused:
        call(*arguments)
    return refused.value


def test_an_hour_away_saves_a_minute_of_requests_and_tokens() -> None:
    clock = Clock()
    account = Account(Allowance(requests_per_minute=6, tokens_per_minute=600), clock)
    for away in (0, 3600):
        clock.now += away
        account.take(6)
        assert refusal(account.take, 1).retry_after_s == pytest.approx(10)
    clock.now += 3600
    account.spend(900)
    assert refusal(account.take, 1).retry_after_s == pytest.approx(30.1), "a debt of 300 tokens, and one to begin with"
    clock.now += 31
    account.take(1)


def test_an_account_is_forgotten_only_when_it_owes_nothing() -> None:
    """Forgotten with a debt of 1200 tokens, the client would begin anew with a full minute's worth."""
    clock = Clock()
    account = Account(Allowance(tokens_per_minute=600), clock)
    account.take(1)
    account.spend(1800)
    account.give_back(1)
    for seconds, forgotten in ((61, False), (118, False), (2, True)):
        clock.now += seconds
        assert account.idle(clock.now) is forgotten
    without_limits = Account(Allowance(), clock)
    without_limits.take(1)
    without_limits.give_back(1)
    assert not without_limits.idle(clock.now)
    assert without_limits.idle(clock.now + 60)


def test_answers_are_counted_and_not_requests() -> None:
    account = Account(Allowance(concurrent=4, requests_per_minute=5), Clock())

    async def story() -> None:
        account.take(1)
        visit = Visit(account)
        await visit.enter(4)
        assert account.open == 4
        assert refusal(account.take, 1).retry_after_s == 1
        visit.leave(4, 0)
        assert account.open == 1
        with pytest.raises(ApiError, match="5 answers in one request, and a client may have 4 at once") as never:
            await visit.enter(5)
        assert never.value.status == 400 and never.value.retry_after_s is None, "no time would be late enough"
        with pytest.raises(ApiError, match="more than 5 requests a minute"):
            await visit.enter(3)
        assert account.open == 1
        await visit.enter(1)
        visit.leave(1, 0)
        account.give_back(1)

    asyncio.run(story())
    assert account.open == 0


def test_lines_of_a_batch_wait_for_places() -> None:
    account = Account(Allowance(concurrent=3), Clock())

    async def story() -> list[int]:
        account.take(1)
        visit, order = Visit(account), list[int]()
        visit.step_back()

        async def line(i: int) -> None:
            await visit.enter(2)
            order.append(i)
            assert account.n_behind <= 3 and not account.open
            await asyncio.sleep(0)
            visit.leave(2, 0)

        await asyncio.gather(*(line(i) for i in range(5)))
        visit.end()
        return order

    assert sorted(asyncio.run(story())) == [0, 1, 2, 3, 4] and account.open == account.n_behind == 0


def test_a_batch_leaves_its_client_places_and_half_of_what_it_may() -> None:
    clock = Clock()
    account = Account(Allowance(concurrent=4, requests_per_minute=10, tokens_per_minute=100), clock)
    for _ in range(4):
        account.take(1, behind=True)
    assert "at once" in str(refusal_of_line(account))
    account.take(4)
    assert "at once" in str(refusal(account.take, 1)), "only what is no batch's counts"
    account.give_back(4)
    account.give_back(4, behind=True)
    clock.now += 12  # 4 sequences of 10 are left, 2 more come
    assert "requests a minute" in str(refusal_of_line(account)), "the last half is the client's own"
    account.take(1)
    account.give_back(1)
    clock.now += 30
    account.spend(60)
    assert "tokens a minute" in str(refusal_of_line(account))
    account.take(1)


def test_a_batch_of_whoever_may_have_one_request_a_minute_is_answered() -> None:
    account = Account(Allowance(requests_per_minute=1, tokens_per_minute=1, concurrent=1), Clock())
    account.take(1, behind=True)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings", "/v1/batches"])
def test_a_key_has_as_many_answers_at_once_as_it_may(path: str) -> None:
    with running(tiny_llm(), Limits(keys=KEYS, concurrent=3)) as live, ThreadPoolExecutor(2) as pool:
        engine, short = live.service.engine, {**TEXT, "max_tokens": 1}
        if path == "/v1/batches":
            lines = [{"custom_id": str(i), "url": "/v1/completions", "body": {**short, "n": 2}} for i in range(4)]
            raw = "\n".join(map(json.dumps, lines)).encode()
            with Gate(live):
                headers = key(0) | {"content-type": "application/jsonl"}
                batch = pool.submit(live.client.post, path, content=raw, headers=headers)
                assert until(lambda: engine.n_open == 2)
                own = pool.submit(live.post, "/v1/completions", {**short, "n": 3}, headers=key(0))
                assert until(lambda: engine.n_open == 5), "no line under way counts against what is no batch"
                assert live.post("/v1/completions", short, headers=key(0)).status_code == 429
            assert own.result().status_code == 200
            made = [json.loads(line)["response"]["status_code"] for line in batch.result().text.splitlines()]
            assert made == [200] * 4, "a batch waits for its client's places"
        else:
            body = {**short, "n": 3} if path == "/v1/completions" else {"model": "tiny", "input": ["a", "b", "c"]}
            with Gate(live):
                first = pool.submit(live.post, path, body, headers=key(0))
                assert until(lambda: engine.n_open == 3)
                assert live.post("/v1/completions", short, headers=key(0)).status_code == 429
                other = pool.submit(live.post, "/v1/completions", short, headers=key(1))
                assert until(lambda: engine.n_open == 4)
            assert first.result().status_code == other.result().status_code == 200
        assert live.post("/v1/completions", {**short, "n": 3}, headers=key(0)).status_code == 200
        assert live.post("/v1/completions", {**short, "n": 4}, headers=key(0)).status_code == 400


def test_tokens_are_counted_when_they_are_known() -> None:
    with running(tiny_llm(), Limits(keys=KEYS, tokens_per_minute=60)) as live:
        body = {**TEXT, "max_tokens": 60}
        assert live.post("/v1/completions", body, headers=key(0)).status_code == 200
        refused = live.post("/v1/completions", body, headers=key(0))
        assert refused.status_code == 429 and "tokens a minute" in refused.json()["error"]["message"]
        assert live.post("/v1/completions", body, headers=key(1)).status_code == 200


def test_lines_of_a_batch_wait_for_places_that_others_hold() -> None:
    with running(tiny_llm(max_sequences=1), max_waiting=1) as live, ThreadPoolExecutor(3) as pool:
        engine = live.service.engine
        with Gate(live):
            held = [pool.submit(live.post, "/v1/completions", {**TEXT, "max_tokens": 2}) for _ in range(2)]
            assert until(lambda: engine.n_open == 2)
            lines = [
                {"custom_id": str(i), "url": "/v1/completions", "body": {**TEXT, "max_tokens": 1}} for i in range(5)
            ]
            raw = "\n".join(map(json.dumps, lines)).encode()
            headers = {"content-type": "application/jsonl"}
            batch = pool.submit(live.client.post, "/v1/batches", content=raw, headers=headers)
            assert until(lambda: sum(map(len, engine._behind.values())) == 4), "one is let in"
            assert live.post("/v1/completions", TEXT).status_code == 429
        assert [answer.result().status_code for answer in held] == [200, 200]
        assert [json.loads(line)["response"]["status_code"] for line in batch.result().text.splitlines()] == [200] * 5
        assert live.settled() and not engine._behind


def batch_of(n: int, **body: Any) -> dict[str, Any]:
    """How a batch of so many lines is posted."""
    lines = [{"custom_id": f"{i}", "url": "/v1/completions", "body": {**TEXT, **body}} for i in range(n)]
    return {"content": "\n".join(map(json.dumps, lines)).encode(), "headers": {"content-type": "application/jsonl"}}


@pytest.mark.parametrize("n_batches", [1, 6])
def test_a_client_with_batches_is_answered_beside_them_as_if_they_were_not_there(n_batches: int) -> None:
    """All places and the whole queue are full of its lines, and none of them ends."""
    with running(tiny_llm(n_blocks=600, max_sequences=4), max_waiting=8) as live, ThreadPoolExecutor(8) as pool:
        engine, stats, step = live.service.engine, live.service.llm.engine.stats, live.service.llm.engine.step
        ended: list[int] = []

        def noted() -> Any:
            made = list(step())
            ended.extend(number for number, event in made if getattr(event, "finish_reason", None))
            return made

        live.service.llm.engine.step = noted
        with Gate(live) as gate:
            batches = [pool.submit(live.client.post, "/v1/batches", **batch_of(32)) for _ in range(n_batches)]
            assert until(lambda: engine.n_open == 6)
            while stats().n_running < 4:
                gate.open()
            own = pool.submit(live.post, "/v1/completions", {**TEXT, "max_tokens": 10})
            assert until(lambda: engine.n_open == 7)
            began = steps(live)
            while not ended:
                gate.open()
            assert steps(live) < began + 50, "ten tokens, and a few passes before each: how many depends on their time"
            assert own.result().status_code == 200 and not any(batch.done() for batch in batches)
            loop = engine._loop
            assert loop is not None
        for _ in range(40 * n_batches):
            loop.call_soon_threadsafe(engine.drop_all, RequestError("enough"))
        for batch in batches:
            assert len(batch.result().text.splitlines()) == 32
        assert live.settled()


def test_a_full_server_lets_one_line_in_and_it_is_answered_in_its_turn() -> None:
    """Somebody else's requests fill all places and the queue, again and again."""
    short = {**TEXT, "max_tokens": 3}
    with running(tiny_llm(max_sequences=2), Limits(keys=KEYS), max_waiting=2) as live, ThreadPoolExecutor(8) as pool:
        engine = live.service.engine
        with Gate(live) as gate:

            def ask() -> Any:
                return pool.submit(live.post, "/v1/completions", short, headers=key(0))

            others = [ask() for _ in range(4)]
            assert until(lambda: engine.n_open == 4)
            body = batch_of(2, max_tokens=3)
            batch = pool.submit(live.client.post, "/v1/batches", **body | {"headers": body["headers"] | key(1)})
            assert until(lambda: engine.n_open == 5 and sum(map(len, engine._behind.values())) == 1)
            began = steps(live)
            while not batch.done():
                for done in [one for one in others if one.done()]:
                    others.remove(done)
                    others.append(ask())
                gate.let()
                assert steps(live) < began + 300
        assert [json.loads(line)["response"]["status_code"] for line in batch.result().text.splitlines()] == [200] * 2
        assert live.settled()


def test_lines_of_a_small_batch_are_let_in_before_a_large_ones_last() -> None:
    with running(tiny_llm(max_sequences=1), Limits(keys=KEYS), max_waiting=3) as live, ThreadPoolExecutor(3) as pool:
        engine = live.service.engine

        def ask(i: int, n: int) -> Any:
            raw = batch_of(n, max_tokens=1)
            return pool.submit(live.client.post, "/v1/batches", **raw | {"headers": raw["headers"] | key(i)})

        with Gate(live) as gate:
            large = ask(0, 20)
            assert until(lambda: sum(map(len, engine._behind.values())) == 18)
            small = ask(1, 1)
            assert until(lambda: len(engine._behind) == 2)
            while not small.done():
                gate.let()
            assert not large.done() and sum(map(len, engine._behind.values())) >= 10
        assert len(large.result().text.splitlines()) == 20 and live.settled()


# Grammars ------------------------------------------------------------------------------------------------------------


def with_grammar(path: str, **more: Any) -> dict[str, Any]:
    """A request of this route whose answer must follow a grammar."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    if path == "/v1/completions":
        return {**TEXT, "response_format": form, **more}
    if path == "/v1/chat/completions":
        return {**CHAT, "response_format": form, **more}
    if path == "/v1/messages":
        return {**CHAT, "tools": [{"name": "t", "input_schema": schema}], "tool_choice": {"type": "any"}, **more}
    more["max_output_tokens"] = more.pop("max_tokens", 40)
    return {
        "model": "tiny",
        "input": "x",
        "text": {"format": {"type": "json_schema", "schema": schema, "name": "x"}},
        **more,
    }


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_grammar_that_fails_on_the_way_is_the_requests_fault(
    tiny: Live, monkeypatch: pytest.MonkeyPatch, path: str, stream: bool
) -> None:
    assert tiny.post(path, with_grammar(path, max_tokens=1)).status_code == 200, "it compiles"
    monkeypatch.setattr(grammar_module, "STEP_CPU_S", -1.0)
    answer = tiny.post(path, with_grammar(path, stream=stream))
    assert answer.status_code == (200 if stream else 400) and "retry-after" not in answer.headers
    assert "a step of the grammar took" in answer.text
    if not stream:
        assert answer.json()["error"]["type"] == "invalid_request_error"
    elif path == "/v1/responses":
        assert "response.failed" in answer.text and "invalid_grammar" in answer.text
    else:
        assert '"type":"invalid_request_error"' in answer.text
    assert tiny.settled()
    monkeypatch.undo()
    assert tiny.post(path, with_grammar(path, max_tokens=4)).status_code == 200, "the server goes on"


@pytest.mark.parametrize(
    "form",
    [
        {
            "type": "grammar",
            "grammar": "start: a0\n" + "\n".join(f'a{i}: a{(i + 1) % 9000} | "x"' for i in range(9000)),
        },
        {"type": "grammar", "grammar": "start: ("},
        {"type": "regex", "regex": "("},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
    ],
    ids=["too deep", "lark", "regex", "schema"],
)
def test_a_bad_grammar_is_a_400_with_the_reason(tiny: Live, form: dict[str, Any]) -> None:
    for _ in range(2):
        answer = tiny.post("/v1/chat/completions", {**CHAT, "response_format": form})
        assert answer.status_code == 400 and "retry-after" not in answer.headers
        assert answer.json()["error"]["code"] == "invalid_grammar" and "grammar" in answer.json()["error"]["message"]


class Slowly:
    """Compiles when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, asyncio.Future[Any]]] = []

    @staticmethod
    def text_of(source: Any) -> str:
        return str(source)

    def known(self, kind: str, text: str, salt: bytes) -> None:
        return None

    def submit(self, kind: str, text: str, salt: bytes) -> Any:
        from concurrent.futures import Future

        future: Future[Any] = Future()
        self.asked.append((text, future))  # type: ignore[arg-type]
        return future


class Compiled:
    def copy(self) -> Compiled:
        return Compiled()


def test_grammars_are_compiled_by_turns_and_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_module, "MAX_WAITING_OF_CLIENT", 5)

    async def story() -> None:
        slowly = Slowly()
        desk = GrammarDesk(slowly)  # type: ignore[arg-type]

        def ask(client: bytes, text: str) -> asyncio.Task[Any]:
            return asyncio.create_task(desk.compile("lark", text, client=client, salt=b""))

        async def turn(n: int) -> None:
            while len(slowly.asked) < n:
                await asyncio.sleep(0)

        heavy = [ask(b"heavy", f"h{i}") for i in range(5)]
        await turn(1)
        same, light, gone = ask(b"light", "h1"), ask(b"light", "l0"), ask(b"light", "l1")
        while len(desk._jobs) < 7:
            await asyncio.sleep(0)
        with pytest.raises(BusyError, match="5 of them yours"):
            await desk.compile("lark", "h9", client=b"heavy", salt=b"")
        gone.cancel()
        slowly.asked[0][1].set_result(Compiled())
        await turn(2)
        assert [text for text, _ in slowly.asked] == ["h0", "l0"], "by turns"
        slowly.asked[1][1].set_exception(GrammarError("no"))
        for n in range(3, 7):
            await turn(n)
            slowly.asked[n - 1][1].set_result(Compiled())
        made = [await task for task in (*heavy, same)]
        assert len({id(one) for one in made}) == 6, "each answer has its own"
        with pytest.raises(QuadrigaError, match="no"):
            await light
        assert [text for text, _ in slowly.asked] == ["h0", "l0", "h1", "h2", "h3", "h4"], "who left costs nothing"
        assert not desk._jobs and not desk._n_waiting_of

    asyncio.run(story())
