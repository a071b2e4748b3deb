"""Bars of a table that bench/compare.py wrote: every measurement, one bar a program.

python bench/plot.py bench/results/cpu.csv docs/images/performance.svg
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

COLOURS = {"quadriga": "#1b6ca8", "llama.cpp": "#d98e04", "ik_llama.cpp": "#8a8f98", "vLLM": "#5b8c5a"}


def main() -> None:
    """Read the table, draw one panel per kind of measurement."""
    with Path(sys.argv[1]).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["machine"] in ("quiet", "busy")]
    colours = {name: COLOURS[name] for name in dict.fromkeys(row["program"] for row in rows)}
    kinds: dict[str, list[str]] = {}
    for row in rows:
        labels = kinds.setdefault(_kind(row), [])
        if _label(row) not in labels:
            labels.append(_label(row))
    widths = [len(labels) for labels in kinds.values()]
    figure, axes = plt.subplots(1, len(kinds), figsize=(15, 4), width_ratios=widths, constrained_layout=True)
    for axis, (kind, labels) in zip(axes, kinds.items(), strict=True):
        for place, label in enumerate(labels):
            mine = [r for r in rows if _label(r) == label and _kind(r) == kind]
            for i, row in enumerate(mine):
                x, height = place + (i - (len(mine) - 1) / 2) * 0.27, float(row["tokens_per_s"])
                reach = [[height - float(row["slowest"])], [float(row["fastest"]) - height]]
                bar = {"width": 0.25, "color": COLOURS[row["program"]], "yerr": reach, "ecolor": "#555"}
                axis.bar(x, height, **bar, error_kw={"lw": 0.8})
        axis.set_xticks(range(len(labels)), labels, fontsize=6)
        axis.set_title(kind, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", labelsize=8)
    axes[0].set_ylabel("tokens per second")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    figure.legend(handles, colours, loc="outside lower center", ncols=len(colours), frameon=False)
    figure.savefig(sys.argv[2], metadata={"Date": None})


def _kind(row: dict[str, str]) -> str:
    return row["kind"] if row["machine"] == "quiet" else f"{row['kind']}\n{row['machine']}"


def _label(row: dict[str, str]) -> str:
    name = row["model"].replace("-", "\n")
    return f"{name}\n{row['n']}" if row["kind"] in ("prefill", "batch", "depth") else name


if __name__ == "__main__":
    main()
