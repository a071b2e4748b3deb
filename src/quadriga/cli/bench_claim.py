"""``quadriga bench claim``: the launch's speed claim, by layers of real width."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quadriga.cli import options
from quadriga.errors import ConfigError, EvaluationError

if TYPE_CHECKING:
    from quadriga.bench.claim import ClaimResult

COLUMNS = (
    *("version", "cpu", "isa", "threads", "format", "system", "kind", "n", "layer_ms", "head_ms", "experts"),
    *("tokens_per_s", "spread", "expected_tokens_per_s", "over_llama2_70b", "expected_over_llama2_70b"),
)


def bench_claim_command(
    n: options.Counts = None,
    format: options.Format = None,
    threads: options.Threads = None,
    rounds: options.Rounds = 5,
    out: options.Csv = None,
) -> None:
    """DBRX beside LLaMA2-70B, Mixtral and Grok-1 at equal bits: a real-width layer of each, scaled to the whole.

    Weights are packed as q4 without --format, and a picture is drawn beside --csv.
    """
    from quadriga.quant.packed import PACKED

    if format is not None and format not in PACKED:
        raise ConfigError(f"--format must be one of {', '.join(PACKED)}: the weights are random; got {format!r}")
    bench_claim(n, format or "q4", threads, rounds, out)


def bench_claim(batches: Sequence[int] | None, form: str, threads: int | None, rounds: int, out: Path | None) -> None:
    """Measure, print, and with ``out`` write the rows and draw them beside it."""
    from quadriga import __version__, runtime
    from quadriga.bench import claim
    from quadriga.cli.eval import print_table

    if out is not None and out.suffix != ".csv":
        raise EvaluationError(f"--csv names a file that ends in .csv, and the picture is drawn beside it; got {out}")
    count = runtime.n_threads(threads)
    rows = claim.run(
        packed_format=form,
        threads=count,
        batches=tuple(batches or claim.BATCHES),
        rounds=rounds,
        tell=lambda text: print(text, file=sys.stderr, flush=True),
    )
    table: list[tuple[str, ...]] = [("what", "system", "tokens/s", "expected", "over LLaMA2-70B", "expected over it")]
    lines = []
    for row in rows:
        over = claim.ratio(rows, row)
        ratios = ("-", "-") if over is None else (f"{over[0]:.2f}", f"{over[1]:.2f}")
        speed = (f"{row.tokens_per_s:.3g}", f"{row.expected_tokens_per_s:.3g}")
        table.append((f"{row.kind} {row.n}", row.system, *speed, *ratios))
        machine = (__version__, runtime.cpu_name(), row.isa, count, form)
        times = (f"{1e3 * row.layer_s:.3f}", f"{1e3 * row.head_s:.3f}", f"{row.experts:.0f}")
        lines.append((*machine, row.system, row.kind, row.n, *times, speed[0], f"{row.spread:.3f}", speed[1], *ratios))
    print_table(table)
    if out is not None:
        with out.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *lines])
        picture(out.with_suffix(".svg"), rows)
        print(f"rows in {out}, drawn in {out.with_suffix('.svg')}", file=sys.stderr)


def picture(path: Path, rows: Sequence[ClaimResult]) -> None:
    """Left: tokens a second by batch. Right: over LLaMA2-70B, measured (full) and expected (dashed)."""
    from quadriga.bench import claim
    from quadriga.evaluate.report import pyplot

    plt = pyplot()
    figure, (speed, over) = plt.subplots(1, 2, figsize=(11, 3.8), constrained_layout=True)
    colours = dict(zip(claim.SYSTEMS, ("#1b6ca8", "#8a8f98", "#d98e04", "#7a4fa3"), strict=True))
    for name, colour in colours.items():
        mine = [row for row in rows if row.system == name and row.kind == "decode"]
        if not mine:
            continue
        sizes = [row.n for row in mine]
        speed.plot(sizes, [row.tokens_per_s for row in mine], color=colour, marker="o", ms=3, label=name)
        ratios = [claim.ratio(rows, row) for row in mine]
        known = [r for r in ratios if r is not None]
        if len(known) == len(mine):
            over.plot(sizes, [r[0] for r in known], color=colour, marker="o", ms=3, label=name)
            over.plot(sizes, [r[1] for r in known], color=colour, ls="--", lw=1)
    for axis, title in ((speed, "decode, tokens a second, whole model"), (over, "speed over LLaMA2-70B")):
        axis.set_xscale("log", base=2)
        sizes = sorted({row.n for row in rows if row.kind == "decode"})
        axis.set_xticks(sizes, [str(n) for n in sizes])
        axis.set_xlabel("sequences in the batch", fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    speed.set_yscale("log")
    speed.yaxis.set_major_formatter("{x:g}")
    speed.yaxis.set_minor_formatter("{x:.1g}")
    handles, labels = speed.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    over.text(0.98, 0.02, "dashed: arithmetic", transform=over.transAxes, ha="right", fontsize=8, color="#555")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
