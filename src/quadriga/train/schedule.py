"""Learning-rate schedules: the rate as a fraction of its peak, as a function of the step. Imports no torch.

    cosine     warm-up, then half a cosine down to final_share
    wsd        warm-up, constant, then linear decay over the last decay_share of the run (to make a run longer, continue
               from a checkpoint before the decay)
    constant   warm-up, then 1

The rate depends only on the step, so a resumed run continues with the rate of an uninterrupted one.
"""

from __future__ import annotations

import math

from quadriga.train.config import ScheduleSection


def learning_rate_share(step: int, n_steps: int, section: ScheduleSection) -> float:
    """The learning rate as a fraction of its peak, at ``step`` (counted from 0) of ``n_steps``."""
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    match section.kind:
        case "constant":
            return 1.0
        case "cosine":
            progress = (step - section.warmup_steps) / max(1, n_steps - 1 - section.warmup_steps)
            fall = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        case "wsd":
            length = max(1, round(section.decay_share * n_steps))
            fall = min(1.0, max(0, n_steps - 1 - step) / length)
    return section.final_share + (1 - section.final_share) * fall


def unreached(n_steps: int, section: ScheduleSection) -> str | None:
    """Why the rate never stays at its peak, or None: a warm-up that the run or its decay cuts off."""
    warmup = section.warmup_steps
    if warmup >= n_steps:
        peak = learning_rate_share(n_steps - 1, n_steps, section)
        return (
            f"schedule.warmup_steps is {warmup} in a run of {n_steps} steps: the learning rate ends at {peak:.0%} of "
            "its peak and never decays. Make the warm-up shorter or the run longer"
        )
    decay = max(1, round(section.decay_share * n_steps))
    if section.kind == "wsd" and warmup > n_steps - decay:
        return (
            f"schedule.warmup_steps is {warmup}, but the decay begins at step {n_steps - decay} of {n_steps}: the "
            "learning rate drops when the warm-up ends. Lower warmup_steps or decay_share"
        )
    return None


def bias_share(step: int, n_steps: int, fade: float) -> float:
    """The factor of the router's bias: 1, then linear decay to 0 over the last fraction ``fade`` of the run."""
    length = fade * n_steps
    return 1.0 if length == 0 else min(1.0, max(0, n_steps - 1 - step) / length)
