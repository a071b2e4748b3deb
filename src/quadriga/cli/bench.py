"""``quadriga bench``: how fast a model is here, and how near to the machine's limit."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Annotated

import typer

from quadriga.cli import options

_DEFAULT_N = {"decode": (64,), "prefill": (512, 2048), "batch": (1, 4, 8, 16, 32), "depth": (4096, 16384)}


def bench_command(
    what: Annotated[str, typer.Argument(help="decode, prefill, batch, depth, load or claim.")],
    n: Annotated[
        list[int] | None,
        typer.Option("--n", help="Tokens made, prompt tokens, sequences or positions in the cache; may be repeated."),
    ] = None,
    model: options.Model = "smollm2-135m-instruct",
    format: options.Format = "keep",
    activations: options.Activations = "auto",
    kv_format: options.KVFormat = "bfloat16",
    threads: options.Threads = None,
    rounds: Annotated[int, typer.Option(help="Measurements; the median counts.")] = 5,
    out: Annotated[Path | None, typer.Option("--csv", help="Add the rows to this file.")] = None,
) -> None:
    """Measure speed. Every row says how much of the machine's own limit was reached, measured beside it."""
    import time

    from quadriga import __version__, runtime
    from quadriga.engine.benchmark import KINDS, Bench, Row
    from quadriga.engine.llm import load
    from quadriga.engine.request import SamplingParams
    from quadriga.errors import ConfigError
    from quadriga.model.compiled import CompiledModel

    if what not in (*KINDS, "load", "claim"):
        raise ConfigError(f"what to measure must be one of {', '.join(KINDS)}, load, claim; got {what!r}")
    if rounds < 1:
        raise ConfigError(f"rounds must be at least 1, got {rounds}")
    if what == "claim":
        from quadriga.cli.bench_claim import bench_claim

        bench_claim(n, format, threads, rounds, out)
        return
    started = time.perf_counter()
    llm = load(model, format=format, activations=activations, kv_format=kv_format, threads=threads)
    loaded = time.perf_counter() - started
    assert isinstance(llm.runner, CompiledModel), "bench runs the CPU's kernels"
    rows: list[Row] = []
    if what == "load":
        llm.generate([1], SamplingParams(max_new_tokens=1))
        first = time.perf_counter() - started
        print(f"load {loaded:.2f} s, first token after {first:.2f} s, resident {resident_bytes() / 1e9:.2f} GB")
    else:
        bench = Bench(llm.runner, dict(llm.runner.parameters), rounds=rounds)
        for one in n or _DEFAULT_N[what]:
            row = bench.run(what, one)
            rows.append(row)
            print(
                f"{what} {one}: {row.tokens_per_s:.1f} tokens/s (spread {row.spread:.0%}), {row.share:.0%} of the "
                f"{row.limit} limit of {row.roofline:.1f}",
                flush=True,
            )
    if out is not None:
        fresh = not out.exists()
        with out.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(_COLUMNS)
            for row in rows:
                machine = (runtime.cpu_name(), llm.runner.program.context.isa, llm.runner.program.context.threads)
                speed = (f"{row.tokens_per_s:.2f}", f"{row.spread:.3f}", f"{row.roofline:.2f}", row.limit)
                what_ran = (llm.name, format, kv_format, row.kind, row.n)
                writer.writerow((__version__, *machine, *what_ran, *speed, f"{row.share:.3f}"))
        print(f"rows added to {out}", file=sys.stderr)


_COLUMNS = (
    *("version", "cpu", "isa", "threads", "model", "format", "kv_format", "kind", "n"),
    *("tokens_per_s", "spread", "roofline_tokens_per_s", "limit", "share"),
)


def resident_bytes() -> int:
    """Resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0
