"""A run's report as one self-contained HTML file: curves, the load of every expert over time, samples, events.

It is made from metrics.jsonl alone, with inline SVG, and can be made again at any time. For long runs, curves are
averaged to at most 400 points and heatmaps to 120 columns.
"""

from __future__ import annotations

import html
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quadriga.train.metrics import FILE, read

_logger = logging.getLogger(__name__)

_POINTS = 400
_COLUMNS = 120
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM = 720, 220, 56, 16, 24
_COLOURS = ("#2f6fde", "#d1495b", "#2a9d6f", "#b07d12", "#7b4fc9", "#3aa0b8", "#8a5a44", "#555555")

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --paper: #ffffff; --rule: #d8dce5; --soft: #667085; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --paper: #14171d; --rule: #2c323d; --soft: #98a2b3; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 780px; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
.frame { stroke: var(--rule); fill: none; } table { border-collapse: collapse; }
td, th { padding: .2rem .8rem .2rem 0; text-align: right; font-variant-numeric: tabular-nums; }
th { color: var(--soft); }
td:first-child, th:first-child { text-align: left; } pre { white-space: pre-wrap; border-left: 3px solid var(--rule);
  padding-left: .8rem; } .soft { color: var(--soft); }
"""

Series = tuple[str, list[tuple[float, float]]]


def write(folder: Path) -> Path:
    """Write FOLDER/report.html from FOLDER/metrics.jsonl; returns its path. A full disk is a warning."""
    place = folder / "report.html"
    temporary = place.with_suffix(".tmp")
    page = render(read(folder / FILE), folder.resolve().name)
    try:
        temporary.write_text(page)
        temporary.replace(place)
    except OSError as error:
        _logger.warning("%s cannot be written: %s", place, error.strerror)
    return place


def render(lines: Sequence[dict[str, Any]], title: str) -> str:
    """The HTML page for the lines of metrics.jsonl."""
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "held_out" in line]
    parts = [f"<h1>{html.escape(title)}</h1>", _summary(steps, evaluations)]
    parts += _plot_section("Loss", [_series(steps, "loss", "train"), *_held_out(evaluations, "loss")], "nats per token")
    rewards = [_series(steps, "reward", "sampled answers"), *_held_out(evaluations, "reward")]
    parts += _plot_section("Reward", rewards, "mean over questions; held out: of the most probable answer")
    for key, name, unit in (
        ("learning_rate", "Learning rate", "peak rate x schedule"),
        ("norm", "Gradient norm", "before clipping"),
        ("tokens_per_s", "Speed", "tokens per second"),
        ("mfu", "MFU", "fraction of the measured matrix-product peak"),
        ("balance", "Router balance loss", "1 (megablocks) or top_k (hf) is perfect balance"),
        ("busiest_expert", "Busiest expert", "load of the busiest expert of any layer, relative to the mean"),
    ):
        parts += _plot_section(name, [_series(steps, key, key)], unit)
    parts += _heatmaps([line for line in steps if "experts" in line])
    parts += _samples(evaluations)
    parts += _events(lines)
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _summary(steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> str:
    if not steps:
        return '<p class="soft">No step has been completed yet.</p>'
    last = steps[-1]
    seconds = sum(line["seconds"] for line in steps)
    text = (
        f"{last['step'] + 1:,} steps, {last['tokens']:,} tokens, {seconds / 3600:.2f} h of steps, "
        f"last loss {last['loss']:.4f}"
    )
    rows = ""
    if evaluations:
        found = evaluations[-1]["held_out"]
        names = [name for name in ("loss", "bits_per_byte", "reward") if any(name in entry for entry in found.values())]
        heads = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in names)
        rows = f"<table><tr><th>held out</th>{heads}</tr>"
        for domain, entry in found.items():
            cells = "".join(f"<td>{entry[name]:.4f}</td>" if name in entry else "<td>–</td>" for name in names)
            rows += f"<tr><td>{html.escape(domain)}</td>{cells}</tr>"
        rows += "</table>"
    return f"<p>{text}</p>{rows}"


def _series(lines: Sequence[dict[str, Any]], key: str, name: str) -> Series:
    points = [(float(line["step"]), float(line[key])) for line in lines if isinstance(line.get(key), (int, float))]
    return name, thin([point for point in points if math.isfinite(point[1])], _POINTS)


def _held_out(evaluations: Sequence[dict[str, Any]], key: str) -> list[Series]:
    found: dict[str, list[tuple[float, float]]] = {}
    for line in evaluations:
        for domain, entry in sorted(line["held_out"].items()):
            if key in entry and math.isfinite(entry[key]):
                found.setdefault(domain, []).append((line["step"], entry[key]))
    return list(found.items())


def thin(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Average neighbouring points so that at most ``most`` are left."""
    size = max(1, -(-len(points) // most))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _plot_section(name: str, series: Sequence[Series], unit: str) -> list[str]:
    drawn = [(label, points) for label, points in series if points]
    if not drawn:
        return []
    return [f'<h2>{html.escape(name)} <span class="soft">{html.escape(unit)}</span></h2>', plot(drawn)]


def plot(series: Sequence[Series]) -> str:
    """A line plot of all series with common axes, as SVG."""
    xs = [x for _, points in series for x, _ in points]
    ys = [y for _, points in series for _, y in points]
    x_of, y_of = _axis(xs, _LEFT, _WIDTH - _RIGHT), _axis(ys, _HEIGHT - _BOTTOM, 10)
    parts = [
        f'<rect class="frame" x="{_LEFT}" y="10" width="{_WIDTH - _RIGHT - _LEFT}" height="{_HEIGHT - _BOTTOM - 10}"/>'
    ]
    for value in ticks(min(ys), max(ys)):
        y = y_of(value)
        parts.append(f'<line class="frame" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(min(xs), max(xs)):
        parts.append(f'<text x="{x_of(value):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{value:g}</text>')
    for i, (label, points) in enumerate(series):
        colour = _COLOURS[i % len(_COLOURS)]
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{path}"/>')
        if len(series) > 1:
            x, y = _WIDTH - _RIGHT - 8, 24 + 14 * i
            parts.append(f'<text x="{x}" y="{y}" text-anchor="end" style="fill:{colour}">{html.escape(label)}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def _axis(values: Sequence[float], start: float, stop: float) -> Callable[[float], float]:
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (stop - start)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round tick values within [low, high], at most ``most`` or so."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]


def _heatmaps(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A heatmap per layer of the load of every expert over time."""
    if not lines:
        return []
    n_layers = len(lines[0]["experts"])
    size = max(1, -(-len(lines) // _COLUMNS))
    columns = [lines[i : i + size] for i in range(0, len(lines), size)]
    parts = [
        '<h2>Expert load <span class="soft">a row per expert, time to the right; pale: idle, strong: twice the mean'
        "</span></h2>"
    ]
    for layer in range(n_layers):
        loads = []
        for column in columns:
            sums = [sum(values) for values in zip(*(line["experts"][layer] for line in column), strict=True)]
            mean = sum(sums) / len(sums) or 1.0
            loads.append([value / mean for value in sums])
        parts.append(f'<p class="soft">layer {layer}</p>{heatmap(loads)}')
    return parts


def heatmap(loads: Sequence[Sequence[float]]) -> str:
    """Columns of expert loads (1: the mean load) as an SVG heatmap."""
    n_experts = len(loads[0])
    width, cell = (_WIDTH - _LEFT - _RIGHT) / len(loads), max(2.0, min(9.0, 144 / n_experts))
    cells = []
    for i, column in enumerate(loads):
        for e, load in enumerate(column):
            strength = min(1.0, load / 2)
            x, y = _LEFT + i * width, e * cell
            cells.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width + 0.3:.1f}" height="{cell + 0.3:.1f}" '
                f'fill="#d1495b" fill-opacity="{strength:.2f}"/>'
            )
    height = n_experts * cell
    frame = f'<rect class="frame" x="{_LEFT}" y="0" width="{_WIDTH - _RIGHT - _LEFT}" height="{height:.0f}"/>'
    return f'<svg viewBox="0 0 {_WIDTH} {height + 2:.0f}" role="img">{"".join(cells)}{frame}</svg>'


def _samples(evaluations: Sequence[dict[str, Any]]) -> list[str]:
    shown = [line for line in evaluations if line.get("samples")]
    if not shown:
        return []
    chosen = {id(line): line for line in (shown[0], shown[len(shown) // 2], shown[-1])}
    parts = ["<h2>Samples</h2>"]
    for line in chosen.values():
        parts.append(f'<p class="soft">after step {line["step"]}</p>')
        for prompt, text in line["samples"].items():
            parts.append(f"<pre><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>")
    return parts


def _events(lines: Sequence[dict[str, Any]]) -> list[str]:
    rows = [f"<li>step {line['step']}: {html.escape(line['event'])}</li>" for line in lines if "event" in line]
    return ["<h2>Events</h2>", f"<ul>{''.join(rows)}</ul>"] if rows else []
