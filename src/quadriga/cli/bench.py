"""``quadriga bench``: how fast a model is here, and how near to the machine's limit."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from quadriga.cli import options
from quadriga.cli.bench_claim import bench_claim_command
from quadriga.cli.bench_invariance import bench_invariance_command
from quadriga.cli.bench_serve import bench_serve_command
from quadriga.cli.command import Commands

if TYPE_CHECKING:
    from quadriga.engine.load_options import LoadOptions
    from quadriga.runners.compiled import CompiledModel

_DEFAULT_N = {"decode": (64,), "prefill": (512, 2048), "batch": (1, 4, 8, 16, 32), "depth": (4096, 16384)}


def bench_command(
    context: typer.Context,
    model: options.ModelArgument = "smollm2-135m-instruct",
    n: options.Counts = None,
    format: options.Format = None,
    activations: options.Activations = None,
    kv_format: options.KVFormat = None,
    threads: options.Threads = None,
    parallel: options.Parallel = None,
    rounds: options.Rounds = 5,
    out: options.Csv = None,
) -> None:
    """Measure speed. Every row says how much of the machine's own limit was reached, measured beside it.

    Of a model that ranks share, the limit is that of the first rank and its part, the others at rest.
    """
    what = context.info_name or ""

    from quadriga import __version__, runtime
    from quadriga.bench.speed import Bench, Row
    from quadriga.runners.ranks import RankedModel

    how = _on_kernels(format, activations, kv_format, threads, parallel)
    options.follow_if_rank(model, how)
    llm = options.load_model(model, how)
    runner, part = llm.runner, None
    if isinstance(runner, RankedModel):
        part = (runner.own.local, runner.own.place.mesh.group)
    rows: list[Row] = []
    # The options were checked before it was loaded: it is on the kernels.
    kernels = (cast("CompiledModel", runner) if part is None else part[0]).program.context
    bench = Bench(runner, rounds=rounds, part=part)
    for one in n or _DEFAULT_N[what]:
        row = bench.run(what, one)
        rows.append(row)
        print(
            f"{what} {one}: {row.tokens_per_s:.1f} tokens/s (spread {row.spread:.0%}), {row.share:.0%} of the "
            f"{row.limit} limit of {row.roofline:.1f}",
            flush=True,
        )
    spread = bench.spread()
    if spread is not None:
        print(
            f"experts: {spread.visited:.0%} visited, the busiest by {spread.busiest:.0%} of the tokens "
            "(in the layer where it is worst)"
        )
    if out is not None:
        fresh = not out.exists()
        with out.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(_COLUMNS)
            for row in rows:
                machine = (runtime.cpu_name(), kernels.isa, kernels.threads)
                speed = (f"{row.tokens_per_s:.2f}", f"{row.spread:.3f}", f"{row.roofline:.2f}", row.limit)
                what_ran = (llm.name, format or "keep", kv_format or "bfloat16", row.kind, row.n)
                writer.writerow((__version__, *machine, *what_ran, *speed, f"{row.share:.3f}"))
        print(f"rows added to {out}", file=sys.stderr)


def bench_load_command(
    model: options.ModelArgument = "smollm2-135m-instruct",
    format: options.Format = None,
    activations: options.Activations = None,
    kv_format: options.KVFormat = None,
    threads: options.Threads = None,
) -> None:
    """Measure the seconds until a model is ready, and the memory that it takes."""
    import time

    from quadriga.engine.request import SamplingParams

    how = _on_kernels(format, activations, kv_format, threads)
    started = time.perf_counter()
    llm = options.load_model(model, how)
    loaded = time.perf_counter() - started
    llm.generate([1], SamplingParams(max_new_tokens=1))
    first = time.perf_counter() - started
    print(f"load {loaded:.2f} s, first token after {first:.2f} s, resident {resident_bytes() / 1e9:.2f} GB")


def _on_kernels(
    format: str | None,
    activations: str | None,
    kv_format: str | None,
    threads: int | None,
    parallel: str | None = None,
) -> LoadOptions:
    """How the model is loaded: on the CPU's kernels, whose speed this is about."""
    from quadriga.errors import ConfigError
    from quadriga.kernels import dispatch

    if not dispatch.compiled():
        raise ConfigError("bench measures the CPU's kernels, and QUADRIGA_OPS=reference turns them off. Unset it.")
    return options.load_options(
        format=format, activations=activations, kv_format=kv_format, threads=threads, parallel=parallel
    )


_EXAMPLES = {
    "decode": "quadriga bench decode --format q4 --threads 2",
    "prefill": "quadriga bench prefill dbrx-q4 --n 512 --n 2048",
    "batch": "quadriga bench batch dbrx-q4 --csv speed.csv",
    "depth": "quadriga bench depth --n 4096 --kv-format q8",
    "load": "quadriga bench load dbrx-q4",
}
_HELP = {
    "decode": "Tokens a second of one answer.",
    "prefill": "Tokens a second of a prompt.",
    "batch": "Tokens a second of many answers at once.",
    "depth": "Tokens a second behind a long context.",
    "load": "Seconds until a model is ready.",
}

bench_app = Commands(no_args_is_help=True, help="Measure speed: of a model on this machine, or of a server.")
for _name, _text in _HELP.items():
    bench_app.command(_name, help=_text, epilog=f"Example:\n\n  {_EXAMPLES[_name]}")(
        bench_load_command if _name == "load" else bench_command
    )
bench_app.command("claim", epilog="Example:\n\n  quadriga bench claim --csv claim.csv --n 1 --n 8 --n 32")(
    bench_claim_command
)
bench_app.command(
    "serve",
    epilog="Examples:\n\n  quadriga bench serve http://127.0.0.1:8000 -c 1 -c 8 -c 32 --ignore-eos\n\n"
    "  quadriga bench serve http://127.0.0.1:8000 --rate 2 --rate 4 --slo-first-token 500 --slo-per-token 60\n\n"
    "  quadriga bench serve https://llm.example.org/v1 --api-key $KEY --report load.json --picture load.svg",
)(bench_serve_command)
bench_app.command(
    "invariance",
    epilog="Examples:\n\n  quadriga bench invariance http://127.0.0.1:8000\n\n"
    "  quadriga bench invariance dbrx-q4 --threads 2 -c 8 -c 32\n\n"
    "  quadriga bench invariance https://llm.example.org/v1 --api-key $KEY --temperature 0 --json",
)(bench_invariance_command)

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
