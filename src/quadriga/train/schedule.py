"""The learning rate as a function of the step: a share of its peak. No torch.

    cosine     warm-up, then half a cosine down to final_share
    wsd        warm-up, stable, then a straight fall over the last decay_share of the run (so a run can be made longer
               by going on from before the fall)
    constant   warm-up, then 1

The share depends on the step alone, so a resumed run goes on with the rate it would have had.
"""

from __future__ import annotations

import math

from quadriga.train.config import ScheduleSection


def learning_rate_share(step: int, n_steps: int, section: ScheduleSection) -> float:
    """What the peak rate is multiplied by at ``step`` (0-based) of ``n_steps``."""
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


def bias_share(step: int, n_steps: int, fade: float) -> float:
    """What the router's bias is multiplied by: 1, then a straight fall to 0 at the end over the last ``fade``."""
    length = fade * n_steps
    return 1.0 if length == 0 else min(1.0, max(0, n_steps - 1 - step) / length)
