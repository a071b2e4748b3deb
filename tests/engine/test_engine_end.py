"""However the engine ends, everybody who waits hears of it, and nobody waits for a thread that does not come back.

No test waits for time to pass: the clock is a number, a step that hangs waits for an event.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from quadriga.engine import async_engine
from quadriga.engine.async_engine import AsyncEngine
from quadriga.engine.request import Request, SamplingParams, TokenEvent
from quadriga.errors import EngineError
from tests.waiting import HANG_S

REQUEST = Request(prompt=(1,), params=SamplingParams(max_new_tokens=1000))
SECRET = "illegal memory access at 0xdeadbeef"


class PanicException(BaseException):
    """As pyo3 makes of a Rust panic: no Exception."""


class Fake:
    """An engine whose step does what it is told."""

    max_sequences = 8

    def __init__(self) -> None:
        self.active: list[int] = []
        self.n = 0
        self.in_step, self.go = threading.Event(), threading.Event()
        self.step_work: Callable[[], None] = lambda: None

    def share_time(self) -> None:
        """It has no use for the time between two steps."""

    @property
    def has_work(self) -> bool:
        return bool(self.active)

    def submit(self, request: Request, *, group: int | None = None) -> int:
        self.n += 1
        self.active.append(self.n)
        return self.n

    def cancel(self, request_id: int) -> bool:
        self.active = [i for i in self.active if i != request_id]
        return True

    def step(self) -> list[tuple[int, TokenEvent]]:
        self.step_work()
        return [(i, TokenEvent(token_id=i, text="", logprob=0.0)) for i in self.active]

    def hang(self) -> None:
        """A step that comes back when ``go`` is set."""
        self.in_step.set()
        assert self.go.wait(60), "the test lets it go"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Running:
    """An engine behind this test's loop."""

    def __init__(self, **options: Any) -> None:
        self.fake, self.clock = Fake(), Clock()
        self.engine = AsyncEngine(self.fake, clock=self.clock, **options)  # type: ignore[arg-type]
        self.failures = 0

        def failed() -> None:
            self.failures += 1

        self.engine.on_failure = failed

    async def __aenter__(self) -> Running:
        await self.engine.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.fake.go.set()
        await self.engine.stop()
        assert not self.engine.stuck


async def ends(stream: Any) -> EngineError:
    """What a stream ends with."""
    try:
        async with asyncio.timeout(HANG_S):
            async for _ in stream:
                pass
    except EngineError as error:
        return error
    raise AssertionError("it ended without an error")


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


ERRORS = [RuntimeError(SECRET), MemoryError(SECRET), SystemExit(3), KeyboardInterrupt(), PanicException(SECRET)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_anything_the_step_raises_ends_the_engine_for_everybody(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with Running() as running:
            streams = await running.engine.submit_all([REQUEST, REQUEST])
            other = await running.engine.submit(REQUEST)
            running.fake.step_work = raising(error)
            for stream in (streams[0], other):
                assert SECRET not in str(await ends(stream))
            assert running.engine.failed and running.engine.error is error and running.failures == 1
            assert running.engine.n_open == 0
            for late in (running.engine.submit(REQUEST), running.engine.call(lambda engine: 1)):
                with pytest.raises(EngineError, match="the engine has stopped"):
                    await late

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    assert "Traceback" in caplog.text and type(error).__name__ in caplog.text


@pytest.mark.parametrize("error", [SystemExit(3), PanicException(SECRET)], ids=lambda e: type(e).__name__)
def test_what_is_no_exception_ends_the_engine_also_where_somebody_called_for_it(error: BaseException) -> None:
    """A SystemExit handed to the caller would end the event loop, a panic would leave a broken engine at work."""

    async def main() -> None:
        async with Running() as running:
            stream = await running.engine.submit(REQUEST)

            def work(engine: Any) -> None:
                raise error

            with pytest.raises(EngineError, match="the engine has stopped"):
                await running.engine.call(work)
            await ends(stream)
            assert running.engine.error is error and running.failures == 1

    asyncio.run(main())


def test_an_exception_of_a_call_is_its_callers_and_the_engine_goes_on() -> None:
    async def main() -> None:
        async with Running() as running:

            def work(engine: Any) -> None:
                raise KeyError("mine")

            with pytest.raises(KeyError, match="mine"):
                await running.engine.call(work)
            assert await running.engine.call(lambda engine: 5) == 5 and not running.engine.failed

    asyncio.run(main())


def test_a_step_that_takes_longer_than_it_may_is_the_end(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with Running(step_timeout_s=10) as running:
            stream = await running.engine.submit(REQUEST)
            running.fake.step_work = running.fake.hang
            await asyncio.to_thread(running.fake.in_step.wait, 60)
            waiting = asyncio.create_task(running.engine.submit(REQUEST))  # behind the step
            calling = asyncio.create_task(running.engine.call(lambda engine: 1))
            await asyncio.sleep(0)
            running.clock.now += 10
            running.engine.check()
            assert not running.engine.failed, "it may take ten seconds"
            running.clock.now += 1
            running.engine.check()
            assert running.engine.failed
            await ends(stream)
            for task in (waiting, calling):
                with pytest.raises(EngineError, match="the engine has stopped"):
                    await task
            await running.engine.stop()  # does not wait for the thread
            assert running.engine.stuck and running.failures == 1
            running.fake.go.set()
            running.engine._thread.join(60)
            assert running.fake.n == 1, "the thread came back, and began nothing more"

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    assert "longer than 10 s" in caplog.text and "in hang" in caplog.text, "the log says where it hangs"


def test_a_call_that_takes_longer_than_it_may_is_the_end_too() -> None:
    async def main() -> None:
        async with Running(step_timeout_s=10) as running:
            calling = asyncio.create_task(running.engine.call(lambda engine: running.fake.hang()))
            await asyncio.to_thread(running.fake.in_step.wait, 60)
            running.clock.now += 11
            running.engine.check()
            with pytest.raises(EngineError, match="the engine has stopped"):
                await calling

    asyncio.run(main())


@pytest.mark.parametrize("limit", [0, 300])
def test_neither_waiting_for_work_nor_many_steps_are_one_long_step(limit: int) -> None:
    async def main() -> None:
        async with Running(step_timeout_s=limit) as running:

            def a_minute() -> None:
                running.clock.now += 60

            running.fake.step_work = a_minute
            running.clock.now += 10_000
            running.engine.check()
            stream = await running.engine.submit(REQUEST)
            seen = 0
            async for _ in stream:
                running.engine.check()
                seen += 1
                if seen == 20:
                    break
            stream.close()
            await running.engine.call(lambda engine: None)
            if not limit:
                running.engine._busy_since, running.clock.now = 0.0, 1e9
                running.engine.check()
            assert not running.engine.failed

    asyncio.run(main())


def test_the_watch_looks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "WATCH_S", 0.0)

    async def main() -> None:
        async with Running(step_timeout_s=10) as running:
            stream = await running.engine.submit(REQUEST)
            running.fake.step_work = running.fake.hang
            await asyncio.to_thread(running.fake.in_step.wait, 60)
            running.clock.now += 11
            await ends(stream)

    asyncio.run(main())


def test_a_thread_that_is_gone_without_a_word_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncEngine, "_work", lambda self: self._commands.get())

    async def main() -> None:
        async with Running() as running:
            waiting = asyncio.create_task(running.engine.call(lambda engine: 1))
            await asyncio.sleep(0)
            running.engine._thread.join(60)
            assert running.engine.failed
            running.engine.check()
            with pytest.raises(EngineError, match="the engine has stopped"):
                await waiting
            assert running.failures == 1

    asyncio.run(main())


def test_stopping_waits_for_the_step_but_not_for_ever() -> None:
    async def main() -> None:
        running = Running()
        await running.engine.start()
        stream = await running.engine.submit(REQUEST)
        running.fake.step_work = running.fake.hang
        await asyncio.to_thread(running.fake.in_step.wait, 60)
        await running.engine.stop(0.0)
        assert running.engine.stuck and not running.engine.failed
        running.fake.go.set()
        running.engine._thread.join(60)
        assert "shutting down" in str(await ends(stream)) and running.failures == 0

    asyncio.run(main())


def test_dropping_all_does_not_wait_for_the_step() -> None:
    async def main() -> None:
        async with Running() as running:
            streams = await running.engine.submit_all([REQUEST, REQUEST])
            running.fake.step_work = running.fake.hang
            await asyncio.to_thread(running.fake.in_step.wait, 60)
            running.engine.drop_all(EngineError("too long"))
            assert str(await ends(streams[0])) == "too long" and running.engine.n_open == 0
            running.fake.step_work = lambda: None
            running.fake.go.set()
            await running.engine.call(lambda engine: None)
            assert running.fake.active == [], "the engine forgot them before its next step"

    asyncio.run(main())
