"""Held-out loss (of grpo reward) over the steps of finished runs, a panel for each comparison; prints first and last.

python bench/curves.py docs/images/tuning.svg "LoRA on Dolly=runs/dolly" "DPO=runs/dpo,runs/moe-dpo" ...
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import matplotlib as mpl

from quadriga.train import metrics

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "quadriga"
from matplotlib import pyplot as plt  # noqa: E402 - after the backend is chosen

COLOURS = ("#1b6ca8", "#d98e04", "#5b8c5a", "#8a4b7d")


def held_out(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Domain -> (step, loss or reward) of each evaluation."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in metrics.read(folder / metrics.FILE):
        for name, value in line.get("held_out", {}).items():
            found.setdefault(name, []).append((line["step"], value["reward" if "reward" in value else "loss"]))
    return found


def sampled(folder: Path) -> list[tuple[int, float]]:
    """(step, mean reward of the answers that were sampled), of grpo; empty for other runs."""
    lines = metrics.read(folder / metrics.FILE)
    return [(line["step"], line["reward"]) for line in lines if "reward" in line]


def main() -> None:
    """Read, print, draw."""
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    panels = [argument.partition("=") for argument in sys.argv[2:]]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 3), squeeze=False)
    for axis, (title, _, runs) in zip(axes[0], panels, strict=True):
        lines = {}
        for run in map(Path, runs.split(",")):
            for name, points in held_out(run).items():
                lines[run.name if name == "held out" else f"{run.name}, {name}" if "," in runs else name] = points
            if points := sampled(run):
                axis.plot(*zip(*points, strict=True), color="#999999", lw=0.8, label="sampled answers")
                axis.set_ylabel("reward")
        for colour, (label, points) in zip(COLOURS, lines.items(), strict=False):
            axis.plot(*zip(*points, strict=True), "o-", color=colour, ms=3, lw=1.4, label=label)
            print(f"{title}, {label}: {points[0][1]:.4f} -> {points[-1][1]:.4f} in {points[-1][0]} steps")
        low, high = axis.get_ylim()
        middle = statistics.fmean((low, high))
        axis.set_ylim(min(low, middle - 0.02), max(high, middle + 0.02))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.legend(frameon=False, fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    if not axes[0][0].get_ylabel():
        axes[0][0].set_ylabel("held-out loss")
    figure.tight_layout()
    figure.savefig(sys.argv[1], metadata={"Date": None})


if __name__ == "__main__":
    main()
