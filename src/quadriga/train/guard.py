"""Detect bad steps: a loss or gradient norm that is not finite, or far above the recent ones.

    bad  <=>  not finite(loss), not finite(norm), or  x > mean + sigmas * deviation  for x = loss or log(norm)

over the last ``window`` good steps (OLMo-core skips at 6 sigma of 128). The deviation is taken to be at least 1 % of
the mean loss, or 0.1 in log(norm): late in a run values are so close together that ordinary noise would exceed the
threshold. It uses only numbers that are equal on all ranks, so all ranks decide alike.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import fmean, pstdev

from quadriga.errors import TrainingError
from quadriga.train.config import GuardSection

_FEW = 16
"""With fewer good steps than this, only NaN and infinity are bad."""


class SpikeGuard:
    """Keeps the losses and norms of recent good steps and judges the next step by them."""

    def __init__(self, section: GuardSection) -> None:
        self.section = section
        self._losses: deque[float] = deque(maxlen=section.window)
        self._norms: deque[float] = deque(maxlen=section.window)
        self._bad: list[int] = []
        self._not_finite = 0
        """Steps that were not finite since the last good one."""

    def judge(self, step: int, loss: float, norm: float) -> str | None:
        """Return why the step is bad, or None; the values of a good step enter the window.

        Raises:
            TrainingError: ``limit`` bad steps within one window.
        """
        reason = self._reason(loss, norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._not_finite += 1
        elif reason is None:
            self._not_finite = 0
        if reason is None:
            self._losses.append(loss)
            self._norms.append(math.log(norm) if norm > 0 else -50.0)
            return None
        self._bad = [s for s in self._bad if step - self.section.window < s < step] + [step]
        if len(self._bad) >= self.section.limit:
            raise TrainingError(
                f"{len(self._bad)} bad steps within {self.section.window}: {reason} at step {step}. Their batches are "
                "in the run's spikes/ folder. Lower optimiser.learning_rate, look at the data, or raise guard.limit."
            )
        return reason

    def _reason(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"loss {loss:g}, gradient norm {norm:g}"
        if not self.section.sigmas or len(self._losses) < min(_FEW, self.section.window):
            return None
        if _far_above(loss, self._losses, self.section.sigmas, 0.01 * abs(fmean(self._losses))):
            return f"loss {loss:.3f} after a mean of {fmean(self._losses):.3f}"
        if norm > 0 and _far_above(math.log(norm), self._norms, self.section.sigmas, 0.1):
            return f"gradient norm {norm:.3g} after a mean of {math.exp(fmean(self._norms)):.3g}"
        return None

    def ruined(self) -> str | None:
        """Why the weights cannot be the result of a run that ends now, or None.

        A batch may be bad by itself, weights are bad for every batch: two steps that are not finite with no good one
        behind them, or one where hardly any was good before.
        """
        if self._not_finite < 1 + (len(self._losses) >= min(_FEW, self.section.window)):
            return None
        return (
            f"the run ends with {self._not_finite} steps whose loss or gradient was not finite, and no good one behind "
            "them: its weights are no result. Start again with a lower optimiser.learning_rate, or from an earlier "
            "checkpoint"
        )

    def state(self) -> dict[str, list[float]]:
        """The guard's state as plain values, for the checkpoint."""
        found = {"losses": list(self._losses), "norms": list(self._norms), "bad": [float(step) for step in self._bad]}
        return {**found, "not_finite": [float(self._not_finite)]}

    def load(self, state: dict[str, list[float]]) -> None:
        """Restore a state that :meth:`state` returned."""
        self._losses.clear()
        self._norms.clear()
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])
        self._bad = [int(step) for step in state["bad"]]
        self._not_finite = int(state.get("not_finite", [0.0])[0])


def _far_above(value: float, window: Sequence[float] | deque[float], sigmas: float, least: float) -> bool:
    return value > fmean(window) + sigmas * max(pstdev(window), least)
