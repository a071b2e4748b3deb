"""From the files of a claim's steps to values: one for each seed, batch or row."""

from __future__ import annotations

import csv
import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quadriga.bench import equal_loss
from quadriga.bench.claims.steps import shared_folder
from quadriga.errors import EvaluationError

Curves = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Values with their labels, and the one that the claim is about.

    Attributes:
        value: the figure beside the claim's.
        low, high: where it lies with 95 % confidence; equal to ``value`` where nothing varies, None where one
            measurement of what varies says nothing about it.
        parts: label -> value: what ``value`` is made of.
        note: what must be said with it.
        curves: training run -> its points of (floating-point operations so far, held-out loss).
    """

    value: float
    low: float | None
    high: float | None
    parts: dict[str, float]
    note: str = ""
    curves: Curves = field(default_factory=dict)


# t of Student's distribution that 95 % lie within, by degrees of freedom from 1.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


def interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """The 95 % confidence interval of the mean of measurements that vary, e.g. one a seed; (None, None) of one.

    mean +- t s / sqrt(n), t of Student's distribution with n - 1 degrees of freedom (with more than 20: that of 20).
    """
    if len(values) < 2:
        return None, None
    t = _T95[min(len(values) - 1, len(_T95)) - 1]
    reach = t * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - reach, mean + reach


def _exactly(value: float, parts: dict[str, float], note: str = "") -> Measured:
    return Measured(value=value, low=value, high=value, parts=parts, note=note)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EvaluationError(f"cannot read {path}: {error}") from None


def parameters(folder: Path) -> Measured:
    """Billions of parameters, of which active: info.json."""
    found = _json(folder / "info.json")["parameters"]
    names = {"all": "total", "active": "active", "active, without the input table": "active_without_input"}
    parts = {name: found[key] / 1e9 for name, key in names.items()}
    return _exactly(parts["all"], parts)


def combinations(folder: Path) -> Measured:
    """Ways to choose DBRX's experts over those of 2 of 8: info.json."""
    ffn = _json(folder / "info.json")["config"]["layers"][0]["ffn"]
    ways = math.comb(ffn["n_experts"], ffn["top_k"])
    return _exactly(ways / math.comb(8, 2), {"ours": float(ways), "2 of 8": 28.0})


def planned_days(folder: Path) -> Measured:
    """Days of the best plan: plan.json."""
    training = _json(folder / "plan.json")["training"]
    best = training["plans"][0]
    parts = {"days": best["days"], "with faults": best["days_with_faults"], "MFU": best["mfu"]}
    parts["million accelerator hours"] = best["gpu_hours"] / 1e6
    parts["million dollars"] = best["cost"] / 1e6
    return _exactly(best["days_with_faults"], parts, "computed by the planner, not run")


def inference(folder: Path) -> Measured:
    """Decoding over LLaMA2-70B by batch: claim.csv."""
    try:
        with (folder / "claim.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["system"] == "DBRX" and row["kind"] == "decode"]
    except OSError as error:
        raise EvaluationError(f"cannot read {folder / 'claim.csv'}: {error.strerror}") from None
    by_batch = {f"batch {row['n']}": float(row["over_llama2_70b"]) for row in rows}
    best = max(rows, key=lambda row: float(row["over_llama2_70b"]))
    value, spread = float(best["over_llama2_70b"]), float(best["spread"])
    machine = f"{rows[0]['cpu']}, {rows[0]['isa']}, {rows[0]['threads']} threads, {rows[0]['format']}"
    note = f"the largest over batches, its spread that of DBRX's own times; {machine}"
    return Measured(value=value, low=value * (1 - spread / 2), high=value * (1 + spread / 2), parts=by_batch, note=note)


def _runs(folder: Path, prefix: str) -> list[equal_loss.Run]:
    places = [folder / "runs", shared_folder(folder) / "runs"]
    found = [path for place in places for path in sorted(place.glob(f"{prefix}-s*")) if _seed(path.name).isdigit()]
    runs = [run for run in map(equal_loss.load, found) if run.size == prefix]
    if not runs:
        raise EvaluationError(f"{' or '.join(map(str, places))} must have runs named {prefix}-sN, they have none")
    return runs


def _seed(run: str) -> str:
    return run.rpartition("-s")[2]


def _curves(runs: Sequence[equal_loss.Run]) -> Curves:
    """Points that a picture needs, to five digits."""
    return {run.name: [(float(f"{x:.5g}"), round(y, 5)) for x, y in run.curve if x > 0] for run in runs}


def flops_to_equal_loss(folder: Path) -> Measured:
    """Arithmetic of dense models over a mixture's at its loss: equal-loss.csv, else the runs."""
    table = folder / "equal-loss.csv"
    if table.exists():
        with table.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["dense_over_it"]]
        ratios = {row["run"]: float(row["dense_over_it"]) for row in rows}
        return _over_seeds(ratios, {row["run"]: row["bound"] for row in rows}, {})
    dense = [*_runs(folder, "nano-dense"), *_runs(folder, "nano-dense-2x")]
    return _dense_over(_runs(folder, "nano"), dense)


def _dense_over(
    mixtures: Sequence[equal_loss.Run], dense: Sequence[equal_loss.Run], losses: Mapping[str, float] | None = None
) -> Measured:
    """Arithmetic of the dense runs' line over each mixture's at its loss; ``losses`` replace the runs' own."""
    line = equal_loss.line_of(dense, losses)
    ratios, bounds = {}, {}
    for run in mixtures:
        needed, bounds[run.name] = equal_loss.flops_for(run.loss if losses is None else losses[run.name], line)
        ratios[run.name] = needed / run.flops
    return _over_seeds(ratios, bounds, _curves([*mixtures, *dense]))


def flops_by_size(widths: Sequence[int]) -> Callable[[Path], Measured]:
    """A measure: arithmetic of dense models over a mixture's at its loss, at several widths; the largest's value."""

    def read(folder: Path) -> Measured:
        runs = {width: _runs(folder, f"modern-{width}") for width in widths}
        found = {
            width: _dense_over(runs[width], [*_runs(folder, f"dense-{width}"), *_runs(folder, f"dense-2x-{width}")])
            for width in widths
        }
        points = [(math.log10(runs[width][0].flops), found[width].value) for width in widths]
        slope = statistics.linear_regression(*zip(*points, strict=True)).slope
        notes = [f"{slope:+.2f} for ten times the arithmetic", *(one.note for one in found.values() if one.note)]
        curves = {name: points for one in found.values() for name, points in one.curves.items()}
        parts = {f"width {width}": one.value for width, one in found.items()}
        return replace(found[max(widths)], parts=parts, note="; ".join(notes), curves=curves)

    return read


def _over_seeds(ratios: dict[str, float], bounds: dict[str, str], curves: Curves) -> Measured:
    values = list(ratios.values())
    low, high = interval(values)
    only = ", ".join(f"{name} {sign}" for name, sign in bounds.items() if sign)
    note = f"only bounds, as the runs do not enclose the loss: {only}" if only else ""
    return Measured(value=statistics.fmean(values), low=low, high=high, parts=ratios, note=note, curves=curves)


def compute_to_equal_bits(folder: Path) -> Measured:
    """Arithmetic of nano-MPT over nano-DBRX's at its bits a byte: the runs, and the counts of the corpora."""
    mpt = [*_runs(folder, "nano-mpt"), *_runs(folder, "nano-mpt-4x")]
    dbrx = _runs(folder, "nano-dbrx")
    bits = {run.name: equal_loss.bits_per_byte(run, _tokens_per_byte(folder / "corpus-4096.json")) for run in mpt}
    bits |= {run.name: equal_loss.bits_per_byte(run, _tokens_per_byte(folder / "corpus-8192.json")) for run in dbrx}
    found = _dense_over(dbrx, mpt, bits)
    shown = ", ".join(f"{name} {value:.3f}" for name, value in bits.items())
    return replace(found, note=f"bits a byte: {shown}. {found.note}".rstrip(". "))


def bits_by_change(ladder: Mapping[str, str]) -> Callable[[Path], Measured]:
    """A measure: bits a byte of each run less those of the run before it, seed by seed; the largest mean is its value.

    Args:
        ladder: run -> what it changes, in order; the first one changes nothing, and has a vocabulary of 4,096.
    """

    def read(folder: Path) -> Measured:
        first = next(iter(ladder))
        runs = {name: _runs(folder, name) for name in ladder}
        sizes = {name: 4096 if name == first else 8192 for name in ladder}
        counts = {size: _tokens_per_byte(folder / f"corpus-{size}.json") for size in set(sizes.values())}
        bits = {
            name: {_seed(run.name): equal_loss.bits_per_byte(run, counts[sizes[name]]) for run in some}
            for name, some in runs.items()
        }
        differences = {ladder[name]: _by_seed(bits[name], bits[before]) for before, name in itertools.pairwise(ladder)}
        least = max(differences, key=lambda change: statistics.fmean(differences[change]))
        own = ", ".join(f"{name} {statistics.fmean(by_seed.values()):.3f}" for name, by_seed in bits.items())
        return _of_differences(differences, least, f"{least} helps least; bits a byte: {own}", runs)

    return read


def _by_seed(values: Mapping[str, float], than: Mapping[str, float]) -> list[float]:
    """Seed -> value of one kind of run less that of another, of the seeds that both have."""
    return [value - than[seed] for seed, value in values.items() if seed in than]


def _of_differences(
    differences: Mapping[str, Sequence[float]], chosen: str, note: str, runs: Mapping[str, Sequence[equal_loss.Run]]
) -> Measured:
    """Differences seed by seed under several labels, of which one is the claim's."""
    low, high = interval(differences[chosen])
    return Measured(
        value=statistics.fmean(differences[chosen]),
        low=low,
        high=high,
        parts={label: statistics.fmean(some) for label, some in differences.items()},
        note=note,
        curves=_curves([run for some in runs.values() for run in some]),
    )


def _tokens_per_byte(path: Path) -> dict[str, float]:
    """Domain -> tokens a byte of held-out text, from `quadriga data inspect --json`."""
    rows = [row for row in _json(path)["content"] if row["split"] == "held_out"]
    return {row["domain"]: row["tokens"] / row["text_bytes"] for row in rows}


def loss_differences(*variants: str, than: str) -> Callable[[Path], Measured]:
    """A measure: held-out loss of each variant less that of the runs named ``than``, seed by seed; the best one's."""

    def read(folder: Path) -> Measured:
        runs = {name: _runs(folder, name) for name in (than, *variants)}
        losses = {name: {_seed(run.name): run.loss for run in some} for name, some in runs.items()}
        differences = {name: _by_seed(losses[name], losses[than]) for name in variants}
        best = min(differences, key=lambda name: statistics.fmean(differences[name]))
        own = ", ".join(f"{name} {statistics.fmean(by_seed.values()):.4f}" for name, by_seed in losses.items())
        return _of_differences(differences, best, f"{best} less {than}, nats a token; losses: {own}", runs)

    return read


def table_mean(folder: Path) -> Measured:
    """Mean of the leaderboard's six, in percent: results.json."""
    tasks = _json(folder / "results.json")["tasks"]
    values = {name: 100 * task["figures"][task["main"]]["value"] for name, task in tasks.items()}
    six = ("arc_challenge", "hellaswag_10", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k")
    missing = [name for name in six if name not in values]
    if missing:
        raise EvaluationError(
            f"{folder / 'results.json'} must have the leaderboard's six tasks; missing: {', '.join(missing)}"
        )
    return _exactly(statistics.fmean(values[name] for name in six), values)


def main_figure(task: str) -> Callable[[Path], Measured]:
    """A measure that reads one task's main figure from results.json, with two standard errors as its spread."""

    def read(folder: Path) -> Measured:
        found = _json(folder / "results.json")["tasks"][task]
        figure = found["figures"][found["main"]]
        error = 2 * (figure["stderr"] or 0.0)
        value = figure["value"]
        groups = {name: one["value"] for name, one in found["groups"].items()}
        return Measured(value=value, low=value - error, high=value + error, parts=groups)

    return read
