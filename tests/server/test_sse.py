"""Events over HTTP, without a network: their bytes, their order, and what becomes of work that nobody waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import Request

from quadriga.errors import EngineError
from quadriga.server.sse import EventSender, EventStream, Gone, unless_gone

Message = dict[str, Any]


class Wire:
    """Where messages go: each send ends when it is let."""

    def __init__(self, *, open_: bool = True) -> None:
        self.begun: list[bytes] = []
        self.sent: list[bytes] = []
        self.busy = self.most = 0
        self.gate = asyncio.Event()
        if open_:
            self.gate.set()

    async def send(self, message: Message) -> None:
        self.busy += 1
        self.most = max(self.most, self.busy)
        self.begun.append(message.get("body", b""))
        await self.gate.wait()
        self.sent.append(message.get("body", b""))
        self.busy -= 1


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_events_have_their_exact_form() -> None:
    async def work() -> bytes:
        wire = Wire()
        sender = EventSender(wire.send)
        sender.event({"a": 1})
        sender.event({"b": "é\n"}, name="delta")
        sender.done()
        sender.raw(b": ping\n\n")
        assert wire.begun == [], "gathered until the flush"
        await sender.flush()
        await sender.flush()
        assert len(wire.sent) == 1, "all at once, and nothing twice"
        return wire.sent[0]

    said = 'data: {"a":1}\n\nevent: delta\ndata: {"b":"é\\n"}\n\ndata: [DONE]\n\n: ping\n\n'
    assert asyncio.run(work()) == said.encode()


def test_flushes_never_overtake_each_other() -> None:
    """An answer and its pings share one connection: while one piece is on its way, no other is begun."""

    async def work() -> None:
        wire = Wire(open_=False)
        sender = EventSender(wire.send)
        tasks = []
        for piece in (b"1", b"2", b"3", b"4"):
            sender.raw(piece)
            tasks.append(asyncio.create_task(sender.flush()))
            await settle()
        assert wire.begun == [b"1"] and wire.most == 1
        wire.gate.set()
        await asyncio.gather(*tasks)
        assert wire.sent == [b"1", b"234"] and wire.most == 1

    asyncio.run(work())


def scope() -> Message:
    return {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}


def connection(*, leaves: asyncio.Event) -> Callable[[], Awaitable[Message]]:
    async def receive() -> Message:
        await leaves.wait()
        return {"type": "http.disconnect"}

    return receive


def test_work_is_given_up_when_its_client_leaves() -> None:
    async def work() -> None:
        leaves, ended = asyncio.Event(), asyncio.Event()

        async def endless() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        waiting = asyncio.create_task(unless_gone(Request(scope(), connection(leaves=leaves)), endless()))
        await settle()
        assert not ended.is_set()
        leaves.set()
        with pytest.raises(Gone):
            await waiting
        assert ended.is_set(), "it has been cancelled, and has ended"

        async def answer() -> int:
            return 7

        async def fault() -> int:
            raise EngineError("no")

        stays = asyncio.Event()
        assert await unless_gone(Request(scope(), connection(leaves=stays)), answer()) == 7
        with pytest.raises(EngineError):
            await unless_gone(Request(scope(), connection(leaves=stays)), fault())

    asyncio.run(work())


@pytest.mark.parametrize("anthropic", [False, True])
def test_an_error_after_the_beginning_is_an_event(anthropic: bool) -> None:
    async def produce(sender: EventSender) -> None:
        sender.event({"n": 1})
        await sender.flush()
        raise EngineError("a wheel came off")

    async def work() -> bytes:
        wire = Wire()
        await EventStream(produce, anthropic=anthropic)(scope(), connection(leaves=asyncio.Event()), wire.send)
        assert wire.most == 1
        return b"".join(wire.sent)

    said = asyncio.run(work()).decode()
    assert said.startswith('data: {"n":1}\n\n') and "a wheel came off" in said
    assert said.endswith("data: [DONE]\n\n") != anthropic and ("event: error\n" in said) == anthropic


def test_a_stream_whose_client_leaves_is_cancelled() -> None:
    async def work() -> None:
        leaves, ended, wire = asyncio.Event(), asyncio.Event(), Wire()

        async def produce(sender: EventSender) -> None:
            try:
                while True:
                    sender.raw(b"x")
                    await sender.flush()
                    await asyncio.sleep(0)
            finally:
                ended.set()

        answer = asyncio.create_task(EventStream(produce)(scope(), connection(leaves=leaves), wire.send))
        await settle()
        leaves.set()
        await answer
        assert ended.is_set()

    asyncio.run(work())
