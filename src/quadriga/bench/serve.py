"""Load tests of servers: seeded prompts, sent by a fixed number of clients or at a given rate, and timed.

    first token (TTFT)      from sending the request to the first event with text
    between tokens (ITL)    gaps between events with text of one answer, over all answers
    per token (TPOT)        (last event - first event) / (tokens - 1), one number per answer
    goodput                 answers per second that meet every objective

Works with any server that has OpenAI's API. Times are measured by the client, so they include the connection.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec

from quadriga.bench.http_client import Connection, Target, said
from quadriga.errors import ConfigError, EngineError

PERCENTILES = (50, 90, 95, 99)
_PROBES = (64, 256)
"""Characters of the two prompts that measure the server's characters per token."""

_WORDS = re.findall(
    r"\w+",
    """
    river stone window music garden paper winter letter bridge silver morning engine coffee island
    market shadow summer thunder village kitchen teacher forest copper lantern harbour valley pencil
    mirror ticket orchard captain feather blanket meadow station candle hammer pocket saddle velvet
    walnut basket cotton dragon finger glacier hollow the of and to in is that it was for on are with as
    at be this from have or by not but what all were when we there
    """,
)


def prose(rng: random.Random, n: int) -> str:
    """``n`` characters of common words, drawn by ``rng``."""
    words: list[str] = []
    while sum(map(len, words)) + len(words) < n:
        words += rng.choices(_WORDS, k=16)
    return " ".join(words)[:n]


@dataclass(frozen=True, kw_only=True)
class Load:
    """One level of load: ``concurrency`` clients, each with one request at a time, or ``rate`` requests per second."""

    n_requests: int
    concurrency: int | None = None
    rate: float | None = None
    """Requests per second, with exponential gaps (a Poisson process)."""

    @property
    def label(self) -> str:
        """The level as shown in tables."""
        return f"{self.concurrency} clients" if self.concurrency is not None else f"{self.rate:g} requests/s"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size and content of the requests."""

    model: str
    prompt_tokens: int = 128
    max_tokens: int = 64
    chat: bool = True
    ignore_eos: bool = False
    """Request answers of exactly ``max_tokens``; not all servers support the field."""
    shared_prefix: float = 0.0
    """Fraction of every prompt that is the same in all of them."""
    text: str | None = None
    """Prompts are cut from this text; None: they consist of random common words."""
    seed: int = 0
    timeout_s: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Objectives:
    """Limits that an answer must meet to count for goodput; None: no limit."""

    first_token_ms: float | None = None
    per_token_ms: float | None = None
    whole_ms: float | None = None


@dataclass
class Timing:
    """The timing of one request."""

    sent_s: float
    """When the request was sent, since the start of the level."""
    error: str | None = None
    """The kind of error, if the request failed."""
    first_s: float = 0.0
    whole_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    counted: bool = True
    """True if the server reported the number of tokens; else events with text are counted."""

    @property
    def per_token_s(self) -> float:
        """Mean time per token after the first (TPOT)."""
        return sum(self.gaps_s) / (self.tokens - 1) if self.tokens > 1 else 0.0

    def keeps(self, goal: Objectives) -> bool:
        """True if the request succeeded and meets all objectives."""
        pairs = (
            (self.first_s, goal.first_token_ms),
            (self.per_token_s, goal.per_token_ms),
            (self.whole_s, goal.whole_ms),
        )
        return self.error is None and all(most is None or 1000 * value <= most for value, most in pairs)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


def timing(events: Sequence[tuple[float, bytes]], sent: float, ended: float) -> Timing:
    """Compute a request's timing from the events of its stream.

    Args:
        events: (time, data); see ``http_client.Exchange``.
        sent: when the request was sent.
        ended: when the answer was complete.
    """
    out, times, finished = Timing(0.0, whole_s=ended - sent), [], False
    for at, data in events:
        if data == b"[DONE]":
            continue
        try:
            event = _decode(data)
        except msgspec.DecodeError:
            out.error = "an event is not the API's JSON"
            return out
        if event.error is not None:
            out.error = "an error event"
            return out
        if event.usage is not None:
            out.prompt_tokens, out.tokens = event.usage.prompt_tokens, event.usage.completion_tokens
        for choice in event.choices:
            delta = choice.delta or _Delta()
            finished = finished or choice.finish_reason is not None
            if choice.text or delta.content or delta.reasoning_content:
                times.append(at)
    if not finished:
        out.error = "ended early"
    elif not times:
        out.error = "no text"
    else:
        out.first_s = times[0] - sent
        out.gaps_s = [b - a for a, b in pairwise(times)]
        out.counted = out.tokens > 0
        out.tokens = out.tokens or len(times)
    return out


class LoadTest:
    """Sends requests and times the answers."""

    def __init__(self, at: Target, shape: Shape) -> None:
        self._at, self._shape = at, shape
        self._path = "/chat/completions" if shape.chat else "/completions"
        self._n_chars = 5 * shape.prompt_tokens
        self._n_sent = 0
        self._idle: list[Connection] = []
        if shape.text is not None and len(shape.text) < 64:
            raise ConfigError("the text to cut prompts from must have at least 64 characters")

    async def prepare(self, warmup: int = 2) -> int:
        """Find the number of characters for prompts of the requested length, and warm the server up.

        Two short prompts give the characters per token and the number of tokens that the chat template adds.

        Returns:
            the resulting prompt length in tokens, or 0 if the server does not report tokens.

        Raises:
            EngineError: the server does not answer correctly.
        """
        short, longer = [(await self._probe(1, n)).prompt_tokens for n in _PROBES]
        if 0 < short < longer:
            per_token = (_PROBES[1] - _PROBES[0]) / (longer - short)
            self._n_chars = max(1, round(_PROBES[0] + (self._shape.prompt_tokens - short) * per_token))
        got = (await self._probe(self._shape.max_tokens, self._n_chars)).prompt_tokens
        for i in range(warmup):
            await self._one(self._shape.max_tokens, seed=f"warm {i}")
        return got

    async def _probe(self, max_tokens: int, n_chars: int) -> Timing:
        one = await self._one(max_tokens, seed=f"probe {n_chars}", n_chars=n_chars)
        if one.error not in (None, "no text"):
            raise EngineError(f"a first request to {self._at.authority} failed: {one.error}")
        return one

    async def run(self, load: Load, progress: Callable[[int, int], None] | None = None) -> Report:
        """Run one level of load.

        Args:
            progress: called with (answers so far, answers in total).
        """
        started = time.perf_counter()
        timings: list[Timing] = []

        async def one() -> None:
            sent = time.perf_counter() - started
            got = await self._one(self._shape.max_tokens)
            got.sent_s = sent
            timings.append(got)
            if progress is not None:
                progress(len(timings), load.n_requests)

        if load.concurrency is not None:
            left = iter(range(load.n_requests))

            async def client() -> None:
                for _ in left:
                    await one()

            async with asyncio.TaskGroup() as group:
                for _ in range(min(load.concurrency, load.n_requests)):
                    group.create_task(client())
        else:
            assert load.rate is not None, "a load has clients or a rate"
            gaps = random.Random(f"{self._shape.seed} {load.rate}")
            due = started
            async with asyncio.TaskGroup() as group:
                for _ in range(load.n_requests):
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                    group.create_task(one())
                    due += gaps.expovariate(load.rate)
        return Report(load, timings, time.perf_counter() - started)

    def close(self) -> None:
        """Close all connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def body(self, seed: str, max_tokens: int, n_chars: int | None = None) -> bytes:
        """The JSON body of a request; the same seed gives the same prompt."""
        shape = self._shape
        prompt = self._prompt(random.Random(f"{shape.seed} {seed}"), n_chars or self._n_chars)
        fields: dict[str, Any] = {"model": shape.model, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        fields["stream_options"] = {"include_usage": True}
        if shape.ignore_eos:
            fields["ignore_eos"] = True
        fields |= {"messages": [{"role": "user", "content": prompt}]} if shape.chat else {"prompt": prompt}
        return json.dumps(fields).encode()

    def _prompt(self, rng: random.Random, n: int) -> str:
        shared = round(n * self._shape.shared_prefix)
        common = self._text(random.Random(f"{self._shape.seed} shared"), shared) if shared else ""
        return common + self._text(rng, n - shared)

    def _text(self, rng: random.Random, n: int) -> str:
        source = self._shape.text
        if source is None:
            return prose(rng, n)
        begin = rng.randrange(len(source))
        return (source[begin : begin + n] + source * (n // len(source) + 1))[:n]

    async def _one(self, max_tokens: int, seed: str | None = None, n_chars: int | None = None) -> Timing:
        if seed is None:
            seed, self._n_sent = str(self._n_sent), self._n_sent + 1
        connection = self._idle.pop() if self._idle else Connection(self._at)
        try:
            async with asyncio.timeout(self._shape.timeout_s):
                exchange = await connection.request("POST", self._path, self.body(seed, max_tokens, n_chars))
        except TimeoutError:
            return Timing(0.0, error="no answer in time")
        except OSError as error:
            return Timing(0.0, error="no connection" if isinstance(error, ConnectionRefusedError) else "cut off")
        self._idle.append(connection)
        if exchange.status != 200:
            return Timing(0.0, error=f"HTTP {exchange.status}: {said(bytes(exchange.body))}")
        return timing(exchange.events, exchange.started, exchange.ended)


async def first_model(at: Target) -> str:
    """The name of the first model that a server lists.

    Raises:
        EngineError: it lists none.
    """
    connection = Connection(at)
    try:
        exchange = await connection.request("GET", "/models")
        if exchange.status != 200:
            raise EngineError(f"{at.authority} answers {exchange.status}: {said(bytes(exchange.body))}")
        return str(json.loads(exchange.body)["data"][0]["id"])
    except OSError as error:
        raise EngineError(f"no server answers at {at.authority}: {error or type(error).__name__}") from None
    except (ValueError, LookupError, TypeError):
        raise EngineError(f"{at.authority} lists no models at {at.prefix}/models: name one with --model") from None
    finally:
        connection.close()


@dataclass
class Report:
    """The results of one level of load."""

    load: Load
    timings: list[Timing]
    seconds: float

    def numbers(self, goal: Objectives) -> dict[str, Any]:
        """All figures as plain values for a table or a file; times in milliseconds."""
        good = [t for t in self.timings if t.error is None]
        tokens = sum(t.tokens for t in good)
        kept = sum(t.keeps(goal) for t in good)
        return {
            "load": self.load.label,
            "concurrency": self.load.concurrency,
            "rate": self.load.rate,
            "requests": len(self.timings),
            "errors": dict(Counter(t.error for t in self.timings if t.error is not None)),
            "seconds": round(self.seconds, 3),
            "requests_per_s": round(len(good) / self.seconds, 3),
            "output_tokens": tokens,
            "output_tokens_per_s": round(tokens / self.seconds, 2),
            "prompt_tokens_per_s": round(sum(t.prompt_tokens for t in good) / self.seconds, 2),
            "tokens_counted_by_server": all(t.counted for t in good),
            "goodput_requests_per_s": round(kept / self.seconds, 3),
            "good_share": round(kept / len(self.timings), 4) if self.timings else 0.0,
            "first_token_ms": _spread([t.first_s for t in good]),
            "between_tokens_ms": _spread([gap for t in good for gap in t.gaps_s]),
            "per_token_ms": _spread([t.per_token_s for t in good if t.tokens > 1]),
            "whole_ms": _spread([t.whole_s for t in good]),
        }


def _spread(seconds: Sequence[float]) -> dict[str, float | None]:
    ordered = sorted(seconds)
    out = {f"p{p}": None if not ordered else round(1000 * percentile(ordered, p), 3) for p in PERCENTILES}
    return {"mean": round(1000 * sum(ordered) / len(ordered), 3) if ordered else None, **out}


def percentile(ordered: Sequence[float], p: float) -> float:
    """The p-th percentile of sorted numbers, interpolated linearly (NumPy's default)."""
    place = (len(ordered) - 1) * p / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
