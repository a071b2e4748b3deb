"""The load generator: its arithmetic on constructed answers, and runs against real and broken servers."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from quadriga.bench.http_client import Connection, Target, target
from quadriga.bench.serve import Load, LoadTest, Objectives, Report, Shape, Timing, percentile, timing
from quadriga.cli import app
from quadriga.errors import ConfigError
from quadriga.server import guard
from quadriga.server.guard import Limits
from tests.server.conftest import Live, running, tiny_llm


def chunk(text: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    return json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": finish}], **more}).encode()


def test_times_of_an_answer() -> None:
    usage = json.dumps({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}).encode()
    events = [(1.0, chunk("")), (1.5, chunk("a")), (1.75, chunk("bc")), (2.75, chunk("d")), (2.75, chunk(None, "stop"))]
    got = timing([*events, (2.8, usage), (2.8, b"[DONE]")], 1.25, 3.25)
    assert got.error is None and (got.first_s, got.whole_s, got.gaps_s) == (0.25, 2.0, [0.25, 1.0])
    assert (got.prompt_tokens, got.tokens, got.counted) == (7, 5, True) and got.per_token_s == 1.25 / 4
    assert timing(events, 1.25, 3.25).tokens == 3 and not timing(events, 1.25, 3.25).counted


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ([chunk("a")], "ended early"),
        ([chunk(None, "stop")], "no text"),
        ([b"{"], "not the API's JSON"),
        ([chunk("a"), b'{"error": {"message": "no"}}'], "error event"),
    ],
)
def test_answers_that_are_none(events: list[bytes], error: str) -> None:
    assert error in str(timing([(1.0, e) for e in events], 0.0, 2.0).error)


def test_percentiles_are_numpys() -> None:
    rng = random.Random(1)
    for n in (1, 2, 3, 10, 101):
        numbers = sorted(rng.random() for _ in range(n))
        for p in (0, 50, 90, 99, 100):
            assert percentile(numbers, p) == pytest.approx(np.percentile(numbers, p))


def test_goodput_counts_answers_that_keep_every_objective() -> None:
    quick = Timing(0, first_s=0.1, whole_s=1.0, gaps_s=[0.1] * 9, tokens=10)
    slow_start = Timing(0, first_s=0.6, whole_s=1.0, gaps_s=[0.1] * 9, tokens=10)
    slow_after = Timing(0, first_s=0.1, whole_s=3.0, gaps_s=[0.3] * 9, tokens=10)
    failed = Timing(0, error="HTTP 429: full")
    report = Report(Load(n_requests=4, concurrency=2), [quick, slow_start, slow_after, failed], 2.0)
    numbers = report.numbers(Objectives(first_token_ms=500, per_token_ms=150))
    assert (numbers["goodput_requests_per_s"], numbers["good_share"]) == (0.5, 0.25)
    assert report.numbers(Objectives())["good_share"] == 0.75
    assert numbers["errors"] == {"HTTP 429: full": 1} and numbers["output_tokens_per_s"] == 15
    assert numbers["first_token_ms"]["p50"] == 100 and numbers["between_tokens_ms"]["mean"] == pytest.approx(
        500 / 3, abs=1e-3
    )


@pytest.mark.parametrize(
    ("url", "host", "port", "prefix"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1", 8000, "/v1"),
        ("http://x/v1/", "x", 80, "/v1"),
        ("https://h/openai", "h", 443, "/openai/v1"),
        ("http://[::1]:9", "::1", 9, "/v1"),
    ],
)
def test_urls(url: str, host: str, port: int, prefix: str) -> None:
    at = target(url)
    assert (at.host, at.port, at.prefix, at.tls) == (host, port, prefix, url.startswith("https"))


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:y", "http://a:b@c", "http://x?y=1", ""]
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(ConfigError, match="must look like"):
        target(url)


def test_the_same_seed_makes_the_same_requests_and_others_differ() -> None:
    at = target("http://x")
    bodies = {}
    for seed in (0, 0, 1):
        test = LoadTest(at, Shape(model="m", seed=seed, shared_prefix=0.5))
        bodies.setdefault(seed, []).append([test.body(str(i), 5) for i in range(4)])
    assert bodies[0][0] == bodies[0][1] != bodies[1][0] and len(set(bodies[0][0])) == 4
    prompts = [json.loads(b)["messages"][0]["content"] for b in bodies[0][0]]
    assert len({p[:320] for p in prompts}) == 1 and {len(p) for p in prompts} == {640}


@asynccontextmanager
async def answering(raw: bytes, *, then_close: bool = True) -> AsyncIterator[Target]:
    """A server that gives every request the same response."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        await writer.drain()
        if then_close:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield target(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", "cut off"),
        (b"SSH-2.0-no\r\n\r\n", "cut off"),
        (b"HTTP/1.1 500 No\r\ncontent-length: 4\r\n\r\noops", "HTTP 500: oops"),
        (HEAD + b"data: {}\r\n\r\n", "cut off"),
        (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 10\r\n\r\ndata: {}\n\n",
            "ended early",
        ),
    ],
)
def test_servers_that_do_not_answer_are_counted_by_kind(raw: bytes, error: str) -> None:
    async def ask() -> Report:
        async with answering(raw) as at:
            return await LoadTest(at, Shape(model="m")).run(Load(n_requests=3, concurrency=2))

    assert [t.error for t in asyncio.run(ask()).timings] == [error] * 3


def test_nobody_there_and_no_answer_in_time() -> None:
    async def ask(at: Target) -> Timing:
        return (await LoadTest(at, Shape(model="m", timeout_s=0.2)).run(Load(n_requests=1, concurrency=1))).timings[0]

    async def silent() -> Timing:
        async with answering(b"HTTP/1.1 200 OK\r\n", then_close=False) as at:
            return await ask(at)

    assert asyncio.run(ask(target("http://127.0.0.1:9"))).error == "no connection"
    assert asyncio.run(silent()).error == "no answer in time"


def test_events_are_whole_however_they_are_cut() -> None:
    raw = HEAD.replace(b"\r\n\r\n", b"\r\ntransfer-encoding: chunked\r\n\r\n")
    events = b"".join(b"data: " + chunk(t) + b"\n\n" for t in ("a", "héé", "c")) + b": ping\n\ndata: [DONE]\n\n"
    for n in (1, 3, 1000):
        pieces = [events[i : i + n] for i in range(0, len(events), n)]
        whole = raw + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"

        async def ask(whole: bytes = whole) -> list[bytes]:
            async with answering(whole) as at:
                return [data for _, data in (await Connection(at).request("POST", "/x", b"{}")).events]

        assert asyncio.run(ask()) == [chunk("a"), chunk("héé"), chunk("c"), b"[DONE]"]


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_measures_writes_and_draws(tiny: Live, tmp_path: Path) -> None:
    out, plot = tmp_path / "load.json", tmp_path / "load.svg"
    arguments = ["bench", "serve", tiny.url, "-c", "1", "-c", "4", "--rate", "50", "--requests", "6", "--warmup", "1"]
    arguments += [
        "--prompt-tokens",
        "200",
        "--max-tokens",
        "10",
        "--ignore-eos",
        "--report",
        str(out),
        "--picture",
        str(plot),
    ]
    result = CliRunner().invoke(app, [*arguments, "--slo-first-token", "60000"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "4 clients" in result.output and "50 requests/s" in result.output and "goodput" in result.output
    levels = json.loads(out.read_text())["levels"]
    assert [level["requests"] for level in levels] == [6, 6, 6] and not any(level["errors"] for level in levels)
    for level in levels:
        assert level["output_tokens"] == 60 and level["good_share"] == 1.0 and level["tokens_counted_by_server"]
        assert level["first_token_ms"]["p50"] <= level["whole_ms"]["p50"]
        assert 190 < level["prompt_tokens_per_s"] * level["seconds"] / 6 < 210
    assert plot.read_text().startswith("<?xml") and "tiny" in plot.read_text()
    assert tiny.settled()


def test_a_key_is_sent_and_failures_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "time", SimpleNamespace(monotonic=lambda: 1.0))  # no minute passes meanwhile
    limits = Limits(keys=("correct-horse-battery",), requests_per_minute=8)
    with running(tiny_llm(), limits) as live:
        wrong = CliRunner().invoke(app, ["bench", "serve", live.url, "--api-key", "wrong-key"])
        assert wrong.exit_code == 1 and "401" in str(wrong.exception)
        arguments = ["--api-key", "correct-horse-battery", "-c", "2", "--requests", "8", "--max-tokens", "3"]
        some = CliRunner().invoke(
            app, ["bench", "serve", live.url, *arguments, "--warmup", "0"], env={"COLUMNS": "160"}
        )
        assert some.exit_code == 0, some.output
        assert "failed" in some.output and "HTTP 429" in some.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["not a url"], "must look like"),
        (["http://127.0.0.1:9"], "no server answers"),
        (["http://127.0.0.1:9", "-c", "0"], "concurrency"),
        (["http://127.0.0.1:9", "--shared-prefix", "2"], "from 0 to 1"),
        (["http://127.0.0.1:9", "--api-model", "x", "--text", "/nowhere"], "--text"),
        (["http://127.0.0.1:9", "--picture", "x.png"], "ends in .svg"),
    ],
)
def test_what_the_command_refuses(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["bench", "serve", *arguments])
    assert result.exit_code and says in f"{result.exception} {result.output}"


def test_the_command_never_imports_torch() -> None:
    code = "import sys; from typer.testing import CliRunner; from quadriga.cli import app; "
    code += "CliRunner().invoke(app, ['bench', 'serve', 'http://127.0.0.1:9']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
