"""A claim's training runs as a picture: held-out loss against arithmetic, a colour for each kind of run."""

from __future__ import annotations

import math
from pathlib import Path

from quadriga.bench.claims.registry import CLAIMS, Claim
from quadriga.bench.claims.results import Record, newest
from quadriga.bench.equal_loss import size_of
from quadriga.evaluate.report import pyplot

_COLOURS = ("#1b6ca8", "#d98e04", "#5b8c5a", "#8a4b7d", "#8a8f98", "#b5453c", "#33363b", "#3fa7a3", "#c7a15a")


def picture_of(claim: Claim, record: Record | None) -> str:
    """Where a claim's picture lies in docs/; empty where it has none."""
    if record is None:
        return ""
    return f"images/claim-{claim.name}.svg" if record.curves else claim.picture


def draw_all(docs: Path) -> list[Path]:
    """Draw the pictures of all records that come with this package, below the folder of docs; what was written.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    written = []
    for claim in CLAIMS:
        record = newest(claim)
        if record is not None and record.curves:
            path = docs / picture_of(claim, record)
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(record, path)
            written.append(path)
    return written


def draw(record: Record, path: Path) -> None:
    """One line for each run, one colour and entry for each kind of run: its name without the seed.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4), constrained_layout=True)
    kinds = list(dict.fromkeys(size_of(name) for name in record.curves))
    colours = {kind: _COLOURS[place % len(_COLOURS)] for place, kind in enumerate(kinds)}
    exponent = math.floor(math.log10(max(points[-1][0] for points in record.curves.values())))
    labelled = set[str]()
    for name, points in record.curves.items():
        kind = size_of(name)
        xs, ys = [x / 10**exponent for x, _ in points], [y for _, y in points]
        axis.plot(xs, ys, color=colours[kind], lw=1.2, label=None if kind in labelled else kind)
        axis.plot(xs[-1:], ys[-1:], "o", color=colours[kind], ms=4)
        labelled.add(kind)
    axis.set_xlabel(f"floating-point operations, 1e{exponent}", fontsize=9)
    axis.set_ylabel("held-out loss, nats a token", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
