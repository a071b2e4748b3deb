"""Draw a training plan as SVG: one bar for a rank's memory, one for the time of a step, and a legend."""

from __future__ import annotations

from html import escape

from quadriga.model.plan.hardware import Gpu
from quadriga.model.plan.training import TrainingPlan

_COLOURS = ("#3b6ea8", "#d98032", "#4f9a5d", "#b8483f", "#8266a8", "#7c5b4a")
_WIDTH, _LEFT, _BAR = 760, 20, 34


def plan_svg(title: str, plan: TrainingPlan, gpu: Gpu) -> str:
    """The SVG picture of a plan.

    Args:
        title: the first line.
        plan: the plan to draw.
        gpu: the accelerator whose memory is the full length of the first bar.
    """
    memory, time = plan.memory, plan.time
    fragments = memory.total - memory.state - memory.gathered - memory.activations - memory.logits - memory.runtime
    memory_parts = [
        ("weights, moments, gradients", memory.state / 1e9),
        ("gathered layers", memory.gathered / 1e9),
        ("activations", memory.activations / 1e9),
        ("logits", memory.logits / 1e9),
        ("runtime and fragments", (memory.runtime + fragments) / 1e9),
    ]
    time_parts = [
        ("matrix products", time.matrix),
        ("attention", time.attention),
        ("memory passes", time.passes),
        ("all-to-all, shared rows", time.all_to_all + time.sharing),
        ("exposed traffic, stages", time.exposed + time.waiting),
        ("optimiser", time.optimiser),
    ]
    mesh = plan.mesh
    shape = f"{mesh.replicate} replicas x {mesh.shard} shards x {mesh.ep} expert ranks"
    if mesh.sharing > 1:
        shape += f", {mesh.tp} x {mesh.cp} share rows"
    if mesh.pp > 1:
        shape = f"{mesh.pp} stages of {shape}"
    summary = f"mesh: {shape}; recompute: {plan.work.recompute}; MFU {plan.mfu:.1%}"
    body = [_text(_LEFT, 28, title, 17, bold=True), _text(_LEFT, 50, summary, 13)]
    capacity = gpu.memory_bytes / 1e9
    body += _bar(76, f"memory of a rank: {memory.total / 1e9:.0f} of {capacity:.0f} GB", memory_parts, capacity, "GB")
    body += _bar(
        186, f"a step: {time.total:.2f} s for {plan.batch_tokens / 1e6:.1f} M tokens", time_parts, time.total, "s"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="300" viewBox="0 0 {_WIDTH} 300" '
        'font-family="system-ui, sans-serif">\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _bar(top: int, caption: str, parts: list[tuple[str, float]], whole: float, unit: str) -> list[str]:
    width = _WIDTH - 2 * _LEFT
    drawn = [
        _text(_LEFT, top, caption, 13, bold=True),
        f'<rect x="{_LEFT}" y="{top + 8}" width="{width}" height="{_BAR}" fill="none" stroke="#888"/>',
    ]
    left, place, legend = float(_LEFT), float(_LEFT), top + 50
    for (name, value), colour in zip(parts, _COLOURS, strict=False):
        share = width * value / whole
        drawn.append(f'<rect x="{left:.1f}" y="{top + 8}" width="{share:.1f}" height="{_BAR}" fill="{colour}"/>')
        left += share
        label = f"{name} {value:.2g} {unit}"
        if place + 22 + 6.6 * len(label) > _WIDTH - _LEFT:
            place, legend = float(_LEFT), legend + 18
        drawn.append(f'<rect x="{place:.0f}" y="{legend}" width="10" height="10" fill="{colour}"/>')
        drawn.append(_text(place + 14, legend + 9, label, 12))
        place += 30 + 6.6 * len(label)
    return drawn


def _text(x: float, y: float, text: str, size: int, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}"{weight} fill="#222">{escape(text)}</text>'
