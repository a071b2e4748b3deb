"""The progress display of a run, on stderr: a live panel on a terminal, single lines elsewhere.

loss 2.713  ▇▅▄▃▂▂▁▁   step 1200 / 4000   41.2k tokens/s   MFU 47 %   12:40 left
experts  ██▇▇▆██▅▇▇██▆▇██   the load of each expert over all layers, relative to the mean
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from quadriga.train.held_out import HeldOut
from quadriga.train.metrics import busiest
from quadriga.train.step_report import StepReport

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 40) -> str:
    """Show values as one line of bars, averaged to at most ``width`` bars."""
    if not values:
        return ""
    size = max(1, -(-len(values) // width))
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in means)


def load_bars(loads: list[float]) -> str:
    """Show expert loads as bars: the mean load has half height, twice the mean full height."""
    return "".join(_BARS[min(len(_BARS) - 1, round(load / 2 * (len(_BARS) - 1)))] for load in loads)


def duration(seconds: float) -> str:
    """Format seconds as 1:02:03 or 2:03."""
    hours, rest = divmod(int(seconds), 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


class Screen:
    """A ``Listener`` that shows the run's progress.

    Args:
        title: of the panel.
        n_steps: steps of the run.
        every: steps between lines if stderr is not a terminal.
        peak_flops: peak FLOP/s of all ranks together, for the MFU; None: no MFU.
    """

    def __init__(self, title: str, n_steps: int, *, every: int, peak_flops: float | None) -> None:
        self.title, self.n_steps, self.every, self.peak_flops = title, n_steps, every, peak_flops
        self._console = Console(stderr=True)
        self._losses: deque[float] = deque(maxlen=4000)
        self._speeds: deque[tuple[float, float, float]] = deque(maxlen=20)
        self._loads: list[float] = []
        self._held_out = ""
        self._sample = ""
        self._live = Live(console=self._console, refresh_per_second=4) if sys.stderr.isatty() else None
        if self._live is not None:
            self._live.start()

    def on_step(self, report: StepReport) -> None:
        """Show a step's metrics."""
        if report.verdict is None:
            self._losses.append(report.loss)
        self._speeds.append((report.tokens, report.seconds, report.flops))
        if report.expert_counts is not None:
            totals = report.expert_counts.sum(0)
            self._loads = (totals / totals.mean().clamp(min=1e-9)).tolist()
        if self._live is not None:
            self._live.update(self._panel(report))
        elif report.step % self.every == 0 or report.step + 1 == self.n_steps:
            self._console.print(self._line(report), highlight=False, soft_wrap=True)

    def _numbers(self, report: StepReport) -> list[str]:
        tokens, seconds, flops = (sum(column) for column in zip(*self._speeds, strict=True))
        left = (self.n_steps - report.step - 1) * seconds / len(self._speeds)
        found = [f"{tokens / seconds:,.0f} tokens/s"]
        if self.peak_flops:
            found.append(f"MFU {100 * flops / seconds / self.peak_flops:.0f} %")
        if report.expert_counts is not None:
            found.append(f"busiest expert {busiest(report):.2f}x")
        return [*found, f"{duration(left)} left"]

    def _line(self, report: StepReport) -> str:
        skipped = f" (skipped: {report.verdict})" if report.verdict else ""
        parts = [
            f"step {report.step + 1}/{self.n_steps}",
            f"loss {report.loss:.4f}{skipped}",
            f"norm {report.norm:.3g}",
        ]
        return " · ".join([*parts, *self._numbers(report)])

    def _panel(self, report: StepReport) -> Panel:
        table = Table.grid(padding=(0, 2))
        table.add_row("loss", Text(f"{report.loss:.4f}", "bold"), sparkline(list(self._losses)))
        table.add_row("step", f"{report.step + 1} / {self.n_steps}", " · ".join(self._numbers(report)))
        if self._loads:
            table.add_row("experts", "", load_bars(self._loads))
        if self._held_out:
            table.add_row("held out", "", self._held_out)
        if self._sample:
            table.add_row("sample", "", Text(self._sample, "italic"))
        bar = ProgressBar(total=self.n_steps, completed=report.step + 1)
        return Panel(Group(table, bar), title=self.title, title_align="left")

    def on_evaluation(self, step: int, found: Mapping[str, HeldOut], samples: dict[str, str]) -> None:
        """Show held-out losses, or rewards, and samples."""
        self._held_out = " · ".join(f"{domain} {one.shown:.3f}" for domain, one in found.items())
        texts = [f"{prompt}{text}" for prompt, text in samples.items()]
        self._sample = (texts[0].replace("\n", " ")[:100]) if texts else ""
        if self._live is None:
            self._console.print(f"step {step}: held out {self._held_out}", highlight=False, soft_wrap=True)
            for text in texts:
                self._console.print(f"  sample: {text!r}", highlight=False, markup=False, soft_wrap=True)

    def on_event(self, step: int, text: str) -> None:
        """Print an event above the panel."""
        self._console.print(f"step {step}: {text}", style="yellow", markup=False, soft_wrap=True)

    def on_rollback(self, step: int) -> None:
        """Print the step that the run was rolled back to."""
        self._console.print(f"rolled back to step {step}", style="yellow")

    def close(self) -> None:
        """Stop updating; the last panel stays on screen."""
        if self._live is not None:
            self._live.stop()
