"""How much arithmetic a dense model needs for a mixture's loss, from finished runs; prints a table, draws a picture.

    python bench/equal_loss.py --mixture runs/nano-s1 runs/nano-s2 --dense runs/dense-s1 runs/dense-2x-s1 ... \\
        --svg docs/images/equal-loss.svg --csv bench/results/equal-loss.csv

Loss: held out, nats a token, mean of the corpus's domains, at a run's end (after its decay). Arithmetic: what its steps
report, 3 x (2 x active parameters + attention) a token. Dense runs of one size are averaged over seeds; between sizes
the loss is a straight line in the logarithm of the arithmetic. A mixture whose loss lies outside the dense runs gets a
bound, never an extrapolation. The ratio is that line's arithmetic at the mixture's loss over the mixture's own.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
from pathlib import Path

from quadriga.bench.equal_loss import Run, flops_for, line_of, load


def draw(mixtures: list[Run], dense: list[Run], line: list[tuple[float, float]], path: Path) -> None:
    """Curves of all runs, and ends with the dense line through them."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "quadriga"
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    sizes = list(dict.fromkeys(run.size for run in dense))
    colours = dict(zip(sizes, ("#b5b8bd", "#8a8f98", "#5d626b", "#33363b"), strict=False))
    for run in (*dense, *mixtures):
        colour = colours.get(run.size, "#1b6ca8")
        points = [(x, y) for x, y in run.curve if x > 0]
        left.plot(*zip(*points, strict=True), color=colour, lw=1.4, label=run.size)
        right.plot(run.flops, run.loss, "o", color=colour, ms=5)
    right.plot(*zip(*sorted(line), strict=True), color="#33363b", lw=1)
    for axis, title in ((left, "during the runs"), (right, "at their end, and the line through the dense")):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1e14:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("floating-point operations, 1e14")
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("held-out loss, nats a token")
    handles, labels = left.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    left.legend(unique.values(), unique, frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Parse, read, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixture", type=Path, nargs="+", required=True)
    parser.add_argument("--dense", type=Path, nargs="+", required=True)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    mixtures, dense = [load(path) for path in args.mixture], [load(path) for path in args.dense]
    line = line_of(dense)
    rows = []
    for run in (*mixtures, *dense):
        ratio, bound = math.nan, ""
        if run in mixtures:
            needed, bound = flops_for(run.loss, line)
            ratio = needed / run.flops
        rows.append((run, ratio, bound))
        text = "" if math.isnan(ratio) else f", a dense model needs {bound}{ratio:.2f} times the arithmetic"
        domains = " · ".join(f"{name} {loss:.3f}" for name, loss in sorted(run.domains.items()))
        print(
            f"{run.name}: {run.tokens:,} tokens, {run.flops:.3e} operations, {run.tokens_per_s:,.0f} tokens/s, "
            f"loss {run.loss:.4f} ({domains}){text}"
        )
    ratios = [ratio for _, ratio, _ in rows if not math.isnan(ratio)]
    spread = f" (seeds {min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    bounds = sum(bool(bound) for _, _, bound in rows)
    clause = f"; {bounds} of {len(ratios)} only a bound" if bounds else ""
    print(f"FLOPs to equal loss, dense over mixture: {statistics.fmean(ratios):.2f}{spread}{clause}")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("run", "tokens", "flops", "tokens_per_s", "loss", "domains", "dense_over_it", "bound"))
            for run, ratio, bound in rows:
                shown = "" if math.isnan(ratio) else f"{ratio:.3f}"
                domains = json.dumps(run.domains, sort_keys=True)
                writer.writerow(
                    (
                        run.name,
                        run.tokens,
                        f"{run.flops:.4e}",
                        f"{run.tokens_per_s:.0f}",
                        f"{run.loss:.5f}",
                        domains,
                        shown,
                        bound,
                    )
                )
    if args.svg:
        draw(mixtures, dense, line, args.svg)


if __name__ == "__main__":
    main()
