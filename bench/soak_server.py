"""Minutes of everything at once against `quadriga serve`: good requests, embeddings, schemas, batches, streams, leaving
clients, hostile ones; then the books, and a restart.

At the end the server still answers, no cache block is held, nothing runs or waits, its memory and its open files have
stopped growing, and every answer that came to its end is what the same request gives alone afterwards. Good requests
are answered, or refused with 429. Then it is killed by SIGKILL in the middle of answers and started again; the time to
the first answer of the new process is told.

    python bench/soak_server.py smollm2-135m-instruct --minutes 10 --clients 200

The cache is kept small, for its memory counts as it is first used: else the process grows until all of it has been.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from typing import Any

import psutil

from quadriga.bench.http_client import Connection, Exchange, Target, target

WORDS = ("river", "stone", "window", "music", "garden", "paper", "winter", "letter", "bridge", "silver", "engine")
HOSTILE: list[bytes] = [
    b"",
    b"{",
    b'{"model": "m"}',
    b"[" * 20_000,
    b'{"model": "m", "prompt": "x", "max_tokens": -2}',
    b'{"model": "m", "prompt": "x", "temperature": NaN}',
    b'{"model": "m", "prompt": [999999999], "max_tokens": 1}',
    b'{"model": "m", "prompt": "' + b"y" * 200_000 + b'", "max_tokens": 1}',
    b'{"model": "m", "prompt": "x", "response_format": {"type": "regex", "regex": "((a{1,1000}){1,1000}){1,1000}"}}',
    b'{"model": "m", "prompt": "x", "n": 100000}',
    b'{"model": "nobody", "prompt": "x"}',
]
MOST_BATCHES = 2
"""At once, of all clients: else in the end all of them wait in batches."""

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "s": {"enum": ["a", "b"]}},
    "required": ["n", "s"],
    "additionalProperties": False,
}
RAW: list[bytes] = [
    b"GARBAGE\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET /health HTTP/1.1\r\nhost: evil.example\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{",
    b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nx: " + b"a" * 100_000,
]


class Soak:
    """The clients and what they saw."""

    def __init__(self, at: Target, pid: int, seed: int) -> None:
        self._at, self._process, self._rng = at, psutil.Process(pid), random.Random(seed)
        self.finished: dict[str, Any] = {}
        kinds = ("finished", "streamed", "embedded", "schemas", "lines", "left", "hostile", "refused", "raw")
        self.counts = dict.fromkeys(kinds, 0)
        self.problems: list[str] = []
        self.resident: list[int] = []
        self.files: list[int] = []
        self.first_token_s: list[float] = []
        self.n_batches = 0

    async def run(self, clients: int, seconds: float) -> None:
        """All clients until the time is over."""
        end = time.monotonic() + seconds
        watch = asyncio.create_task(self._watch())
        await asyncio.gather(*(self._client(random.Random(self._rng.random()), end) for _ in range(clients)))
        watch.cancel()

    async def _client(self, rng: random.Random, end: float) -> None:
        connection = Connection(self._at)
        while time.monotonic() < end:
            kind = rng.random()
            try:
                if kind < 0.35:
                    await self._good(connection, rng)
                elif kind < 0.5:
                    await self._streamed(connection, rng)
                elif kind < 0.57:
                    await self._embedded(connection, rng)
                elif kind < 0.64:
                    await self._schema(connection, rng)
                elif kind < 0.66:
                    await self._batch(connection, rng)
                elif kind < 0.82:
                    await self._leaving(rng)
                elif kind < 0.95:
                    await self._hostile(connection, rng)
                else:
                    await self._raw(rng)
            except OSError as error:
                self.problems.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(1)
        connection.close()

    def _request(self, rng: random.Random) -> dict[str, Any]:
        prefix = "Once there was a small house near the sea, and every evening " * rng.choice([0, 0, 1, 3])
        return {
            "model": "m",
            "prompt": prefix + " ".join(rng.choices(WORDS, k=rng.randint(1, 40))),
            "max_tokens": rng.randint(1, 40),
            "temperature": rng.choice([0, 0.8, 1.3]),
            "seed": rng.randrange(10**6),
            "logprobs": 1,
            "speculate": rng.choice([0, 0, 4]),
        }

    async def _good(self, connection: Connection, rng: random.Random) -> None:
        body = self._request(rng)
        answer = await connection.request("POST", "/completions", json.dumps(body).encode())
        if answer.status == 429:
            self.counts["refused"] += 1
            await asyncio.sleep(rng.random())
        elif answer.status == 200:
            self.counts["finished"] += 1
            if len(self.finished) < 20_000:
                self.finished[json.dumps(body)] = said(answer.body)
        else:
            self.problems.append(f"{answer.status} {bytes(answer.body[:200])!r}")

    async def _streamed(self, connection: Connection, rng: random.Random) -> None:
        body = self._request(rng) | {"stream": True}
        answer = await connection.request("POST", "/completions", json.dumps(body).encode())
        if self._answered(answer, "streamed", rng):
            whole = bool(answer.events) and answer.events[-1][1] == b"[DONE]" and b'"error"' not in answer.events[-2][1]
            if whole:
                self.first_token_s.append(answer.events[0][0] - answer.started)
            else:
                self.problems.append(f"a stream broke off: {answer.events[-2:]}")
        elif answer.status == 429:
            await asyncio.sleep(rng.random())

    async def _embedded(self, connection: Connection, rng: random.Random) -> None:
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for _ in range(rng.randint(1, 3))]
        body = json.dumps({"model": "m", "input": texts}).encode()
        answer = await connection.request("POST", "/embeddings", body)
        if self._answered(answer, "embedded", rng) and len(json.loads(answer.body)["data"]) != len(texts):
            self.problems.append("a text has no vector")
        elif answer.status == 429:
            await asyncio.sleep(rng.random())

    async def _schema(self, connection: Connection, rng: random.Random) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        messages = [{"role": "user", "content": " ".join(rng.choices(WORDS, k=5))}]
        body = {"model": "m", "messages": messages, "max_tokens": 60, "response_format": form, "seed": rng.randrange(9)}
        answer = await connection.request("POST", "/chat/completions", json.dumps(body).encode())
        if self._answered(answer, "schemas", rng):
            choice = json.loads(answer.body)["choices"][0]
            if choice["finish_reason"] == "stop" and set(json.loads(choice["message"]["content"])) != {"n", "s"}:
                self.problems.append(f"not what the schema says: {choice}")
        elif answer.status == 429:
            await asyncio.sleep(rng.random())

    async def _batch(self, connection: Connection, rng: random.Random) -> None:
        if self.n_batches >= MOST_BATCHES:  # their lines wait for places, where others are told to come back
            return
        self.n_batches += 1
        try:
            await self._lines(connection, rng)
        finally:
            self.n_batches -= 1

    async def _lines(self, connection: Connection, rng: random.Random) -> None:
        bodies = [{**self._request(rng), "max_tokens": 4} for _ in range(4)]
        lines = [{"custom_id": str(i), "url": "/v1/completions", "body": body} for i, body in enumerate(bodies)]
        raw = "\n".join(map(json.dumps, lines)).encode()
        answer = await connection.request("POST", "/batches", raw, kind="application/jsonl")
        if self._answered(answer, "lines", rng):
            states = [json.loads(line)["response"]["status_code"] for line in bytes(answer.body).splitlines()]
            if states != [200] * 4:
                self.problems.append(f"lines of a batch: {states}")

    def _answered(self, answer: Exchange, what: str, rng: random.Random) -> bool:
        """Count an answer; True if it is one."""
        if answer.status == 200:
            self.counts[what] += 1
        elif answer.status == 429:
            self.counts["refused"] += 1
        else:
            self.problems.append(f"{what}: {answer.status} {bytes(answer.body[:200])!r}")
        return answer.status == 200

    async def _leaving(self, rng: random.Random) -> None:
        body = self._request(rng) | {"max_tokens": 400, "ignore_eos": True, "n": rng.choice([1, 1, 3])}
        del body["logprobs"]
        raw = json.dumps({**body, "stream": rng.random() < 0.5}).encode()
        connection = Connection(self._at)
        asking = asyncio.ensure_future(connection.request("POST", "/completions", raw))
        await asyncio.wait([asking], timeout=rng.choice([0.01, 0.1, 1, 3]))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        connection.close()
        self.counts["left"] += 1

    async def _hostile(self, connection: Connection, rng: random.Random) -> None:
        answer = await connection.request("POST", "/completions", rng.choice(HOSTILE) or b" ")
        self.counts["hostile"] += 1
        if answer.status not in (200, 400, 404, 413, 415, 429):
            self.problems.append(f"hostile: {answer.status} {bytes(answer.body[:200])!r}")

    async def _raw(self, rng: random.Random) -> None:
        _, writer = await asyncio.open_connection(self._at.host, self._at.port)
        writer.write(rng.choice(RAW))
        await asyncio.sleep(rng.random())
        writer.close()
        self.counts["raw"] += 1

    async def _watch(self) -> None:
        while True:
            self.resident.append(self._process.memory_info().rss)
            self.files.append(self._process.num_fds())
            print(f"{self.resident[-1] / 1e6:.0f} MB resident, {self.files[-1]} files, {self.counts}", flush=True)
            await asyncio.sleep(10)

    async def killed_and_back(
        self, server: subprocess.Popen[str], command: list[str]
    ) -> tuple[subprocess.Popen[str], float]:
        """Kill the server while it answers, start it again; (the new one, seconds to its first answer)."""
        body = json.dumps({"model": "m", "prompt": "a", "max_tokens": 400, "ignore_eos": True}).encode()
        asking = [asyncio.ensure_future(Connection(self._at).request("POST", "/completions", body)) for _ in range(8)]
        await asyncio.wait(asking, timeout=1)
        server.kill()
        server.wait()
        began = time.monotonic()
        await asyncio.gather(*asking, return_exceptions=True)
        again, url = start(command)
        short = json.dumps({"model": "m", "prompt": "a", "max_tokens": 1}).encode()
        answer = await Connection(target(url)).request("POST", "/completions", short)
        assert answer.status == 200
        return again, time.monotonic() - began

    async def books(self) -> None:
        """What must hold at the end."""
        connection = Connection(Target(self._at.host, self._at.port, "", False, None))
        for _ in range(100):
            text = (await connection.request("GET", "/metrics")).body.decode()
            left = {name: metric(text, name) for name in (*_EMPTY,)}
            if not any(left.values()):
                break
            await asyncio.sleep(0.1)
        assert not any(left.values()), left
        assert (await connection.request("GET", "/ready")).status == 200
        connection.close()

    async def check(self, most: int) -> int:
        """Ask again, one by one, and compare."""
        connection, again = Connection(self._at), list(self.finished.items())
        random.Random(0).shuffle(again)
        for body, expected in again[:most]:
            answer = await connection.request("POST", "/completions", body.encode())
            assert said(answer.body) == expected, f"another answer alone: {body}"
        connection.close()
        return min(most, len(again))


_EMPTY = ("vllm:num_requests_running", "vllm:num_requests_waiting", "quadriga_kv_blocks_used")


def start(command: list[str]) -> tuple[subprocess.Popen[str], str]:
    """(a server, its address once it answers)."""
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    found = re.search(r"http://[\d.]+:\d+", server.stdout.readline())
    assert found, "the server says where it is"
    return server, found[0]


def metric(text: str, name: str) -> float:
    """A number from the exposition format."""
    found = re.search(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
    assert found, f"no metric {name}"
    return float(found[1])


def said(raw: bytearray) -> Any:
    """What must be the same whenever the request is repeated: text, tokens, log-probabilities, to the bit."""
    return json.loads(raw)["choices"]


def main() -> None:
    """Serve, soak, settle the books."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--check", type=int, default=300, help="Answers to compare with their solo run.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", default="--max-waiting 32 --kv-memory 256MB", help="Of `quadriga serve`.")
    args = parser.parse_args()
    command = [sys.executable, "-m", "quadriga", "serve", args.model, "--port", "0", "--served-name", "m"]
    command += args.options.split()
    server, url = start(command)
    try:
        soak = Soak(target(url), server.pid, args.seed)
        asyncio.run(soak.run(args.clients, 60 * args.minutes))
        asyncio.run(soak.books())
        print("nothing runs, nothing waits, no block is held")
        third = max(1, len(soak.resident) // 3)
        middle, last = (statistics.median(part) for part in (soak.resident[third : 2 * third], soak.resident[-third:]))
        growth = (
            f"{middle / 1e6:.0f} MB in the middle third, {last / 1e6:.0f} MB in the last ({last / middle - 1:+.1%})"
        )
        print(f"memory: {growth}")
        print(f"{asyncio.run(soak.check(args.check))} answers are what they are alone; {soak.counts}")
        waits = sorted(soak.first_token_s)
        if waits:
            shown = {f"p{q}": f"{waits[min(len(waits) - 1, len(waits) * q // 100)]:.2f} s" for q in (50, 90, 99)}
            print(f"first token of {len(waits)} streams: {shown}")
        most, at_end = max(soak.files[: max(1, len(soak.files) // 2)]), soak.files[-1]
        print(f"open files: {most} at most in the first half, {max(soak.files)} at all, {at_end} at the end")
        for problem in soak.problems[:10]:
            print("problem:", problem)
        assert not soak.problems and soak.counts["finished"] > 0
        assert args.minutes < 3 or last < 1.03 * middle, "memory grows"
        assert at_end <= most + args.clients, "open files grow"
        server, seconds = asyncio.run(soak.killed_and_back(server, command))
        print(f"killed in the middle of answers: the next process gave its first answer after {seconds:.1f} s")
        server.terminate()
        assert server.wait(60) == 0
    finally:
        server.kill()


if __name__ == "__main__":
    main()
