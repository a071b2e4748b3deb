"""Tokens that leave in the turn of the loop which brings them: the same bytes, in their order, and nobody waits for anybody."""

from __future__ import annotations

import asyncio
import gc
import re
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from quadriga.engine.async_engine import Inbox, Stream
from quadriga.engine.request import TokenEvent
from quadriga.errors import EngineError
from quadriga.server import protocol, sse
from quadriga.server.answers import Answers, Choice
from quadriga.server.protocol import BodyWriter
from quadriga.server.sse import EventSender, TextEvent
from tests.server.conftest import HANG_S, Live

ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "ab", "stream": True, "n": 2}),
    ("/v1/completions", {"prompt": "ab", "stream": True, "logprobs": 2}),
    ("/v1/chat/completions", {"stream": True, "n": 3}),
    ("/v1/chat/completions", {"stream": True, "logprobs": True, "stream_options": {"include_usage": True}}),
    ("/v1/messages", {"stream": True, "temperature": 0}),
    ("/v1/responses", {"stream": True, "input": "ab", "max_output_tokens": 12, "temperature": 0}),
    ("/api/chat", {"options": {"num_predict": 12, "seed": 5}}),
    ("/completion", {"prompt": "ab", "stream": True, "n_predict": 12, "temperature": 0}),
]


def asked(path: str, more: dict[str, Any]) -> dict[str, Any]:
    ours = path not in ("/api/chat", "/completion", "/v1/responses")
    limits = (
        {"max_tokens": 12, "seed": 5, "ignore_eos": True} if ours and path != "/v1/messages" else {"max_tokens": 12}
    )
    body: dict[str, Any] = {"model": "tiny", **(limits if ours else {}), **more}
    return body if "prompt" in body or "input" in body else {**body, "messages": [{"role": "user", "content": "ab"}]}


def turns(loop: asyncio.AbstractEventLoop, n: int) -> None:
    """Wait, in another thread, until a loop has gone round n times."""
    done = threading.Event()

    def turn(left: int) -> None:
        if left:
            loop.call_soon(turn, left - 1)
        else:
            done.set()

    loop.call_soon_threadsafe(turn, n)
    assert done.wait(HANG_S)


@pytest.mark.parametrize(("path", "more"), ROUTES)
def test_what_is_sent_at_once_is_what_the_layers_send(
    tiny: Live, monkeypatch: pytest.MonkeyPatch, path: str, more: dict[str, Any]
) -> None:
    written: list[bytes] = []
    write, send = BodyWriter.write, tiny.service.engine._send

    def paced(events: Any) -> None:
        send(events)
        turns(tiny.loop, 30)

    # The engine gives the loop time to come to rest between two steps, as a model of some size does.
    monkeypatch.setattr(tiny.service.engine, "_send", paced)
    monkeypatch.setattr(BodyWriter, "write", lambda self, piece: (written.append(piece), write(self, piece)))
    quick = tiny.post(path, asked(path, more))
    assert len(written) >= 6, "what lies between the ends of an answer goes directly"
    monkeypatch.setattr(BodyWriter, "is_open", False)
    written.clear()
    slow = tiny.post(path, asked(path, more))
    assert not written
    ids_and_times = re.compile(rb"[0-9a-f]{24}|[0-9]+")
    assert ids_and_times.sub(b"#", quick.content) == ids_and_times.sub(b"#", slow.content) and len(slow.content) > 300


class Line:
    """A connection that is open or not; what the layers send is kept apart."""

    def __init__(self) -> None:
        self.is_open = True
        self.pieces: list[tuple[str, bytes]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    def write(self, piece: bytes) -> None:
        assert self.is_open
        self.pieces.append(("direct", piece))

    async def send(self, message: Any) -> None:
        await self.gate.wait()
        self.pieces.append(("layers", message["body"]))


def event(number: int, *, last: bool = False) -> TokenEvent:
    return TokenEvent(token_id=number, text=str(number), logprob=0.0, finish_reason="length" if last else None)


def arrive(*made: tuple[Stream, TokenEvent | EngineError]) -> None:
    """What a step made, as the engine's thread hands it over."""
    for stream, what in made:
        stream._push(what)
    for inbox in {stream.inbox for stream, _ in made}:
        inbox.tell()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def answering(n: int, line: Line, write: Any = None) -> tuple[list[Stream], EventSender, asyncio.Task[None]]:
    """n answers that are being sent."""
    inbox = Inbox(n)
    owner: Any = SimpleNamespace(_close=lambda _: None)
    streams = [Stream(owner, inbox) for _ in range(n)]
    sender = EventSender(line.send, line)

    def plainly(choice: Choice, event: TokenEvent) -> None:
        sender.raw(f"{choice.index}:{event.text} ".encode())

    answers = Answers(streams, 3, None)
    return streams, sender, asyncio.ensure_future(answers.send(sender, write or plainly))


def test_a_step_is_one_piece_and_a_client_that_is_behind_is_waited_for() -> None:
    async def work() -> list[tuple[str, bytes]]:
        line = Line()
        (a, b), _, sending = answering(2, line)
        await settle()
        arrive((a, event(1)), (b, event(2)))
        assert line.pieces == [("direct", b"0:1 1:2 ")], "at once, and together"
        line.is_open = False
        line.gate.clear()
        arrive((a, event(3)))
        await settle()
        arrive((b, event(4)))
        line.is_open = True  # though there is room again, what is on its way goes first
        arrive((a, event(5)))
        assert len(line.pieces) == 1
        line.gate.set()
        await settle()
        assert line.pieces[1:] == [("layers", b"0:3 "), ("layers", b"1:4 0:5 ")]
        arrive((b, event(6)))
        assert line.pieces[3:] == [("direct", b"1:6 ")]
        arrive((a, event(7, last=True)))
        arrive((b, event(8)))
        await settle()
        arrive((b, event(9, last=True)))
        await sending
        return line.pieces[4:]

    assert asyncio.run(work()) == [("layers", b"0:7 1:8 "), ("layers", b"1:9 ")]


def test_a_ping_under_way_is_not_overtaken() -> None:
    async def work() -> list[bytes]:
        line = Line()
        (a,), sender, sending = answering(1, line)
        await settle()
        line.gate.clear()
        sender.raw(b": ping")
        ping = asyncio.ensure_future(sender.flush())
        await settle()
        arrive((a, event(1)))
        line.gate.set()
        await ping
        arrive((a, event(2, last=True)))
        await sending
        return [piece for _, piece in line.pieces]

    assert b"".join(asyncio.run(work())) == b": ping0:1 0:2 "


def test_a_mistake_in_writing_is_the_tasks_own() -> None:
    """The loop's callback brings events for all streams: what one cannot write must not keep them from the others."""

    async def work() -> None:
        line = Line()

        def broken(choice: Choice, event: TokenEvent) -> None:
            raise ZeroDivisionError

        (a,), _, fails = answering(1, line, broken)
        (b,), _, goes_on = answering(1, line)
        await settle()
        arrive((a, event(1)), (b, event(2)))
        assert line.pieces == [("direct", b"0:2 ")]
        with pytest.raises(ZeroDivisionError):
            await fails
        arrive((b, event(3)), (b, EngineError("no more")))
        with pytest.raises(EngineError, match="no more"):
            await goes_on
        assert b"".join(piece for _, piece in line.pieces) == b"0:2 0:3 "

    asyncio.run(work())


@pytest.mark.parametrize(
    ("state", "is_open"),
    [
        ({}, True),
        ({"response_started": False}, False),
        ({"response_complete": True}, False),
        ({"disconnected": True}, False),
        ({"chunked_encoding": False}, False),
        ({"flow": SimpleNamespace(write_paused=True)}, False),
        ({"scope": {"method": "HEAD"}}, False),
    ],
)
def test_pieces_go_to_connections_that_take_them(state: dict[str, Any], is_open: bool) -> None:
    out: list[bytes] = []

    class Cycle(SimpleNamespace):
        pass

    cycle: Any = Cycle(
        **{
            "response_started": True,
            "response_complete": False,
            "disconnected": False,
            "chunked_encoding": True,
            "flow": SimpleNamespace(write_paused=False),
            "scope": {"method": "POST"},
            "transport": SimpleNamespace(write=out.append),
            **state,
        }
    )
    writer = BodyWriter(cycle)
    assert writer.is_open is is_open
    writer.write(b"x" * 26)
    assert out == [b"1a\r\n" + b"x" * 26 + b"\r\n"]
    del cycle
    gc.collect()
    assert writer.is_open is False, "it holds no request"


def test_an_event_of_one_text_is_the_event() -> None:
    for text in ("", 'a "quoted" \\ line\n', "\u2028é🐎", "data: x"):
        sender = EventSender(Line().send)
        sender.event({"id": "m", "choices": [{"text": text, "logprobs": None}], "usage": None})
        made = TextEvent(lambda t: {"id": "m", "choices": [{"text": t, "logprobs": None}], "usage": None})
        assert made.with_text(text) == sender._parts[0]


def test_scopes_have_the_way_to_their_connection() -> None:
    assert sse.DIRECT.startswith("quadriga.") and protocol.DIRECT is sse.DIRECT
