"""What HTTP costs: the same requests to the engine itself and to `quadriga serve`, in turns within one run.

Both sides are processes of their own with the same threads. N requests begin together; each has a prompt of 64 ids and
makes 64 tokens. The client's work is part of what HTTP costs here, for it runs on the same processors.

    python bench/serve_overhead.py smollm2-135m-instruct --clients 1 8 32 --rounds 5
    python bench/serve_overhead.py dbrx-q4 --counters        what counting every expert's tokens costs
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

PROMPT, ANSWER = 64, 64


def prompts(n: int, seed: int) -> list[list[int]]:
    """Different for every seed, so that nothing is found in the prefix cache."""
    rng = random.Random(seed)
    return [[rng.randrange(1000, 20_000) for _ in range(PROMPT)] for _ in range(n)]


def direct(model: str, threads: int) -> None:
    """The engine alone: a line "N SEED" in, seconds out."""
    import quadriga
    from quadriga.engine.request import Request, SamplingParams

    llm = quadriga.load(model, threads=threads, max_batch_tokens=512)
    print("ready", flush=True)
    for line in sys.stdin:
        n, seed = map(int, line.split())
        params = SamplingParams(max_new_tokens=ANSWER, ignore_eos=True)
        requests = [Request(prompt=tuple(ids), params=params) for ids in prompts(n, seed)]
        started = time.perf_counter()
        for request in requests:
            llm.engine.submit(request)
        while llm.engine.has_work:
            llm.engine.step()
        print(time.perf_counter() - started, flush=True)


class Direct:
    """The first side."""

    def __init__(self, model: str, threads: int) -> None:
        command = [sys.executable, __file__, model, "--direct", "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._line() == "ready"

    def measure(self, n: int, seed: int) -> float:
        """Seconds for n requests."""
        assert self.process.stdin is not None
        print(n, seed, file=self.process.stdin, flush=True)
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


class Served:
    """The second side."""

    def __init__(self, model: str, threads: int) -> None:
        command = [sys.executable, "-m", "quadriga", "serve", model, "--port", "0", "--threads", str(threads)]
        self.process = subprocess.Popen([*command, "--served-name", "m"], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        found = re.search(r"http://[\d.]+:\d+", self.process.stdout.readline())
        assert found, "the server says where it is"
        self.url = found[0]

    def measure(self, n: int, seed: int) -> float:
        """Seconds for n requests, each a stream."""
        return asyncio.run(self._measure(n, seed))

    async def _measure(self, n: int, seed: int) -> float:
        from quadriga.bench.http_client import Connection, target

        options = {"model": "m", "max_tokens": ANSWER, "ignore_eos": True, "temperature": 0, "stream": True}
        bodies = [json.dumps({**options, "prompt": ids}).encode() for ids in prompts(n, seed)]
        connections = [Connection(target(self.url)) for _ in bodies]
        await asyncio.gather(*(c.request("GET", "/models") for c in connections))  # connected
        started = time.perf_counter()
        done = await asyncio.gather(
            *(c.request("POST", "/completions", body) for c, body in zip(connections, bodies, strict=True))
        )
        seconds = time.perf_counter() - started
        for connection, exchange in zip(connections, done, strict=True):
            assert exchange.status == 200 and exchange.events[-1][1] == b"[DONE]", bytes(exchange.body)
            connection.close()
        return seconds


def overhead(model: str, threads: int, clients: list[int], rounds: int) -> None:
    """Both sides in turns; medians, and the median of the rounds' ratios."""
    sides: list[Any] = [Direct(model, threads), Served(model, threads)]
    try:
        for side in sides:
            side.measure(2, 0)
        for n in clients:
            seconds: list[list[float]] = [[], []]
            busy = [0.0, 0.0]
            for i in range(rounds):
                for which in (0, 1) if i % 2 else (1, 0):
                    before = _cpu(sides[which])
                    seconds[which].append(sides[which].measure(n, 1000 * n + 2 * i + which))
                    busy[which] += _cpu(sides[which]) - before
            alone, served = (statistics.median(s) for s in seconds)
            ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
            made = n * ANSWER
            print(
                f"{n:3} clients: engine {made / alone:7.1f} tokens/s, served {made / served:7.1f}, ratio {ratio:.3f}; "
                f"{1000 * (served - alone) / ANSWER:+.3f} ms a step; processor time of a token "
                f"{1000 * busy[0] / made / rounds:.3f} ms and {1000 * busy[1] / made / rounds:.3f} ms",
                flush=True,
            )
    finally:
        for side in sides:
            side.process.kill()


def _cpu(side: Any) -> float:
    times = psutil.Process(side.process.pid).cpu_times()
    return float(times.user + times.system)


def counters(model: str, threads: int, rounds: int) -> None:
    """Decoding and a prompt with every layer's counters on and off, in turns."""
    import quadriga
    from quadriga.engine.request import SamplingParams
    from quadriga.kernels.cpu.bindings import Op

    llm = quadriga.load(model, threads=threads)
    ops = [op for kind, op in llm.runner.program._ops if kind == Op.FFN]
    kept = [op.load for op in ops]
    assert all(kept), "a mixture of experts"
    for name, n_prompt, n_answer in (("decode", 8, 96), ("prompt", 256, 1)):
        ratios = []
        for i in range(rounds):
            seconds = {}
            for on in (True, False) if i % 2 else (False, True):
                for op, load in zip(ops, kept, strict=True):
                    op.load = load if on else None
                ids = random.Random(2 * i + on).choices(range(100, 1000), k=n_prompt)
                started = time.perf_counter()
                llm.generate(ids, SamplingParams(max_new_tokens=n_answer, ignore_eos=True))
                seconds[on] = time.perf_counter() - started
            ratios.append(seconds[True] / seconds[False])
        low, high = min(ratios), max(ratios)
        print(f"{name}: counters take {statistics.median(ratios) - 1:+.2%} (rounds {low - 1:+.2%} to {high - 1:+.2%})")


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--counters", action="store_true")
    parser.add_argument("--direct", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.direct:
        direct(args.model, args.threads)
    elif args.counters:
        counters(args.model, args.threads, args.rounds)
    else:
        overhead(args.model, args.threads, args.clients, args.rounds)


if __name__ == "__main__":
    main()
