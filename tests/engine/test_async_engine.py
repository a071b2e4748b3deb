"""The engine behind an event loop: bounded inboxes, all or nothing, and every end is heard of."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from quadriga.engine import async_engine
from quadriga.engine.async_engine import AsyncEngine, Inbox, Stream
from quadriga.engine.engine import Engine
from quadriga.engine.request import Request, SamplingParams, TokenEvent
from quadriga.errors import BusyError, EngineError, RequestError
from tests.engine.test_engine import compiled


def event(number: int, *, last: bool = False) -> TokenEvent:
    return TokenEvent(token_id=number, text="", logprob=0.0, finish_reason="length" if last else None)


class Owner:
    """Whom a stream tells that it is closed."""

    def __init__(self) -> None:
        self.closed: list[Stream] = []

    def _close(self, stream: Stream) -> None:
        self.closed.append(stream)


def streams(n: int) -> tuple[Owner, list[Stream]]:
    owner, inbox = Owner(), Inbox(n)
    return owner, [Stream(owner, inbox) for _ in range(n)]  # type: ignore[arg-type]


# Inboxes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
def test_an_inbox_that_nobody_reads_holds_so_much_and_no_more(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(async_engine, "MAX_UNREAD", 5)
    owner, (stream, *others) = streams(n)
    for i in range(1000):
        stream._push(event(i))
    assert stream.closed and owner.closed == [stream], "its request is dropped, once"
    assert len(stream.inbox._items) == 5 * n, "what a reader is behind costs bounded memory"
    for other in others:
        other._push(event(7))
        assert other.closed, "the room is of all that share it"

    async def read() -> list[int]:
        taken = [e.token_id for _, e in await stream.inbox.take()]
        with pytest.raises(EngineError, match="was not read for too long"):
            await stream.inbox.take()
        return taken

    assert asyncio.run(read()) == list(range(5 * n)), "what came before is still there, in its order"


def test_a_reader_that_keeps_up_is_never_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "MAX_UNREAD", 5)
    owner, (stream,) = streams(1)

    async def read() -> list[int]:
        taken: list[int] = []
        for i in range(0, 100, 5):
            for k in range(5):
                stream._push(event(i + k))
            taken += [e.token_id for _, e in await stream.inbox.take()]
        return taken

    assert asyncio.run(read()) == list(range(100)) and not owner.closed


def test_the_first_error_counts_and_comes_after_the_events() -> None:
    _, (stream, other) = streams(2)

    async def read() -> list[int]:
        waiting = asyncio.create_task(stream.inbox.take())
        await asyncio.sleep(0)
        stream._push(event(1))
        other._push(event(2))
        stream._push(EngineError("the first"))
        other._push(EngineError("the second"))
        taken = [e.token_id for _, e in await waiting]
        for _ in range(2):
            with pytest.raises(EngineError, match="the first"):
                await stream.inbox.take()
        return taken

    assert asyncio.run(read()) == [1, 2]


def test_nothing_reaches_a_closed_stream() -> None:
    owner, (stream,) = streams(1)
    stream.close()
    stream.close()
    stream._push(event(1))
    stream._push(EngineError("too late"))
    assert owner.closed == [stream] and stream.inbox._items == [] and stream.inbox._error is None


# The engine ----------------------------------------------------------------------------------------------------------


def request(n: int = 3, **more: Any) -> Request:
    return Request(prompt=(1, 2, 3), params=SamplingParams(max_new_tokens=n, ignore_eos=True), **more)


def serve(work: Any, *, max_waiting: int = 2, max_sequences: int = 2) -> Any:
    """Run ``work(engine)`` with an AsyncEngine of room for four."""

    async def main() -> Any:
        engine = AsyncEngine(Engine(compiled(threads=1), max_sequences=max_sequences), max_waiting=max_waiting)
        await engine.start()
        try:
            return await work(engine)
        finally:
            await engine.stop()

    return asyncio.run(main())


def test_no_more_are_let_in_than_may_run_and_wait() -> None:
    async def work(engine: AsyncEngine) -> None:
        held = [await engine.submit(request(300)) for _ in range(4)]
        for extra in (1, 2):
            with pytest.raises(BusyError, match="4 requests are running or waiting"):
                await engine.submit_all([request()] * extra)
        assert engine.n_open == 4
        held[0].close()
        again = await engine.submit(request(300))
        for stream in (*held, again):
            stream.close()
        assert engine.n_open == 0
        assert not engine._open, "nothing is kept of streams that were closed"
        await engine.call(lambda e: None)
        assert await engine.call(lambda e: (e.has_work, e.stats().kv_blocks_used)) == (False, 0)

    serve(work)


def test_requests_that_begin_together_begin_all_or_none() -> None:
    async def work(engine: AsyncEngine) -> None:
        bad = Request(prompt=(96, 97), params=SamplingParams())
        with pytest.raises(RequestError, match="from 0 to 96"):
            await engine.submit_all([request(300), request(300), bad])
        assert engine.n_open == 0
        assert await engine.call(lambda e: e.has_work) is False, "those before the bad one are gone"
        three = await engine.submit_all([request(2), request(3), request(4)])
        counts = dict.fromkeys(three, 0)
        while sum(counts.values()) < 9:
            for stream, _ in await three[0].inbox.take():
                counts[stream] += 1
        assert list(counts.values()) == [2, 3, 4]

    serve(work)


def let_in(capacity: int) -> tuple[AsyncEngine, Any]:
    """An engine of so many places that computes nothing, and what asks for places behind and says who has them."""
    stub: Any = SimpleNamespace(max_sequences=capacity, share_time=lambda: None)
    engine = AsyncEngine(stub, max_waiting=0)
    inside: list[str] = []

    def ask(name: str, n: int) -> asyncio.Task[None]:
        async def enter() -> None:
            await engine._enter_behind(name[:1].encode(), n)
            inside.append(name)

        return asyncio.create_task(enter())

    ask.inside = inside  # type: ignore[attr-defined]
    return engine, ask


def test_the_background_has_half_of_the_places_and_a_large_piece_goes_alone() -> None:
    async def work() -> None:
        engine, ask = let_in(8)
        tasks = [ask("a whole", 6)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert ask.inside == ["a whole"], "more than half, but nothing else is behind"
        tasks += [ask("b1", 1), ask("a1", 1), ask("a2", 1), ask("b2", 1)]
        for _ in range(3):
            await asyncio.sleep(0)
        assert ask.inside == ["a whole"] and engine.n_open == 6
        engine._give_back(b"a", 6, background=True)
        for _ in range(3):
            await asyncio.sleep(0)
        assert ask.inside[1:] == ["b1", "a1", "b2", "a2"] and engine.n_open == 4
        tasks += [ask("a3", 1), ask("a4", 1), ask("c1", 1)]
        for _ in range(3):
            await asyncio.sleep(0)
        assert len(ask.inside) == 5, "half of the places"
        engine._give_back(b"b", 1, background=True)
        for _ in range(3):
            await asyncio.sleep(0)
        assert ask.inside[5:] == ["c1"], "whoever has the fewest is next"
        engine._enter(b"somebody", 4)  # who is refused nothing: together they are as many as there are places
        engine._give_back(b"a", 1, background=True)
        for _ in range(3):
            await asyncio.sleep(0)
        assert ask.inside[6:] == ["a3"] and engine.n_open == 8
        engine._give_back(b"somebody", 4, background=False)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(work())


def test_a_place_that_came_too_late_is_given_back() -> None:
    async def work() -> None:
        engine, ask = let_in(2)
        first, second, third = ask("a1", 2), ask("b1", 1), ask("c1", 2)
        for _ in range(3):
            await asyncio.sleep(0)
        assert ask.inside == ["a1"]
        engine._give_back(b"a", 2, background=True)  # the next one's turn has come, ...
        second.cancel()  # ... and its client leaves before it hears of it
        await asyncio.gather(second, return_exceptions=True)
        for _ in range(3):
            await asyncio.sleep(0)
        assert ask.inside == ["a1", "c1"] and engine.n_open == 2
        await asyncio.gather(first, third)

    asyncio.run(work())


def test_everybody_hears_of_a_drop_and_of_the_end() -> None:
    async def work(engine: AsyncEngine) -> AsyncEngine:
        first = await engine.submit(request(300))
        engine.drop_all(EngineError("all must go"))
        with pytest.raises(EngineError, match="all must go"):
            async for _ in first:
                pass
        assert await engine.call(lambda e: (e.has_work, e.stats().kv_blocks_used)) == (False, 0)
        second = await engine.submit(request(300))
        await engine.stop()
        with pytest.raises(EngineError, match="shutting down"):
            async for _ in second:
                pass
        with pytest.raises(EngineError, match="shutting down"):
            await engine.call(lambda e: None)
        return engine

    serve(work)


def test_a_step_that_fails_ends_the_engine_and_says_why() -> None:
    async def work(engine: AsyncEngine) -> None:
        stream = await engine.submit(request(300))

        def broken() -> Any:
            raise RuntimeError("a wheel came off")

        await engine.call(lambda e: setattr(e, "step", broken))
        with pytest.raises(EngineError, match="the engine has stopped"):
            async for _ in stream:
                pass
        with pytest.raises(EngineError, match="the engine has stopped"):
            await engine.submit(request())
        assert str(engine.error) == "a wheel came off"

    serve(work)
