"""Finished training runs beside each other: how much arithmetic one kind of model needs for another's loss.

Loss: held out, mean of the corpus's domains, at a run's end (after its decay); in nats a token, or in bits a byte of
text, which compares models of different vocabularies. Arithmetic: what a run's steps report. Between two sizes, loss is
a straight line in the logarithm of the arithmetic; outside of them there is a bound, never an extrapolation.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quadriga.errors import EvaluationError

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Run:
    """A finished run: its curve of (floating-point operations so far, held-out loss)."""

    name: str
    size: str
    """What runs of other seeds have in common with it: see :func:`size_of`."""
    curve: tuple[tuple[float, float], ...]
    domains: dict[str, float]
    """Domain -> its loss at the end, nats a token."""
    tokens: int
    tokens_per_s: float
    """Median over steps: a run may have been paused, or shared its machine."""

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return self.curve[-1][0]

    @property
    def loss(self) -> float:
        """At the end."""
        return self.curve[-1][1]


def load(path: Path) -> Run:
    """Read a run's folder.

    Raises:
        EvaluationError: it has no metrics, or the run is not at its end.
    """
    total, tokens, curve, domains, speeds = 0.0, 0, [], dict[str, float](), []
    try:
        lines = [json.loads(line) for line in (path / METRICS).read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} must be the folder of a training run: {error}") from None
    for line in lines:
        if "flops" in line:
            total, tokens = total + line["flops"], line["tokens"]
            speeds.append(line["tokens_per_s"])
        if "held_out" in line:
            domains = {name: found["loss"] for name, found in line["held_out"].items()}
            curve.append((total, statistics.fmean(domains.values())))
    if not curve or curve[-1][0] < total:
        raise EvaluationError(f"{path}: the last step has no held-out loss, so the run is not at its end")
    return Run(path.name, size_of(path.name), tuple(curve), domains, tokens, statistics.median(speeds))


def size_of(run: str) -> str:
    """A run's name without a last ``-sN``, which is a seed."""
    size, _, seed = run.rpartition("-s")
    return size if seed.isdigit() else run


def flops_for(loss: float, line: Sequence[tuple[float, float]]) -> tuple[float, str]:
    """(arithmetic at which a line of (arithmetic, loss) has this loss, "", ">" or "<" where it is only a bound)."""
    line = sorted(line)
    for (f0, l0), (f1, l1) in itertools.pairwise(line):
        if l1 <= loss <= l0:
            share = (l0 - loss) / (l0 - l1) if l0 > l1 else 0.0
            return math.exp(math.log(f0) + share * (math.log(f1) - math.log(f0))), ""
    return (line[-1][0], ">") if loss < line[-1][1] else (line[0][0], "<")


def line_of(runs: Sequence[Run], losses: Mapping[str, float] | None = None) -> list[tuple[float, float]]:
    """(arithmetic, loss) of each size, means over its seeds; ``losses`` by run's name replace the runs' own."""
    sizes: dict[str, list[Run]] = {}
    for run in runs:
        sizes.setdefault(run.size, []).append(run)
    return [
        (
            statistics.fmean(run.flops for run in some),
            statistics.fmean(run.loss if losses is None else losses[run.name] for run in some),
        )
        for some in sizes.values()
    ]


def bits_per_byte(run: Run, tokens_per_byte: Mapping[str, float]) -> float:
    """Mean over domains of bits a byte of text: nats a token times tokens a byte, over ln 2."""
    return statistics.fmean(loss * tokens_per_byte[name] for name, loss in run.domains.items()) / math.log(2)
