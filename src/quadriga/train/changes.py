"""What a resumed run may change of its settings: what has no effect on what is learned, and what is still to come.

    recorded    logging, evaluation, checkpoints, guard, layout of the ranks; stages not begun; another schedule or
                number of steps under which every step so far would have had the learning rate it had
    refused     everything else: the run would end as no run with either settings would, unless that is wanted
                (``--allow-change``)

Data that changed, another seed and another model are refused in any case (``Trainer.resume``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from quadriga.train.config import ScheduleSection
from quadriga.train.schedule import bias_share, learning_rate_share

_RECORDED = ("run", "log", "evaluate", "checkpoint", "guard", "data", "model.init_std", "n_steps", "schedule", "seed")
_LAYOUT = ("replicate", "experts", "tensor", "context", "pipeline", "device", "recompute", "timeout_s")
"""Keys of [parallel] that change roundings only; ``dtype`` and ``micro_rows`` change the loss."""
_PROBES = 1000


@dataclass(frozen=True)
class Change:
    """A setting that differs from the checkpoint's."""

    name: str
    was: Any
    now: Any
    harmful: bool

    def __str__(self) -> str:
        return f"{self.name} was {self.was!r}, is {self.now!r}"


def described(settings: Any, n_steps: int) -> dict[str, Any]:
    """Settings as plain values by dotted name, for the checkpoint."""
    return {"n_steps": n_steps, **dict(_flat(msgspec.to_builtins(settings)))}


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flat(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(inner) if isinstance(inner, tuple) else inner


def changes(saved: Mapping[str, Any], now: Mapping[str, Any], step: int) -> list[Change]:
    """The settings that differ between a checkpoint of ``step`` steps and a run; those that one lacks are skipped."""
    found = []
    past = {"schedule": _schedule_differs(saved, now, step), "router.bias_fade": _fade_differs(saved, now, step)}
    for name in sorted(saved.keys() & now.keys()):
        if saved[name] != now[name]:
            found.append(Change(name, saved[name], now[name], _harmful(name, past)))
    return found


def _harmful(name: str, past: Mapping[str, bool]) -> bool:
    section, _, key = name.partition(".")
    if section in ("schedule", "n_steps"):
        return past["schedule"] or (section == "n_steps" and past["router.bias_fade"])
    if name in past:
        return past[name]
    if section == "parallel":
        return key not in _LAYOUT
    return section not in _RECORDED and name not in _RECORDED


def _steps_so_far(step: int) -> range:
    return range(0, step, max(1, step // _PROBES))


def _schedule_differs(saved: Mapping[str, Any], now: Mapping[str, Any], step: int) -> bool:
    """True if a step so far would have had another learning rate."""
    sections = [_schedule(one) for one in (saved, now)]
    return any(
        learning_rate_share(s, saved["n_steps"], sections[0]) != learning_rate_share(s, now["n_steps"], sections[1])
        for s in (*_steps_so_far(step), *range(max(0, step - 1), step))
    )


def _schedule(settings: Mapping[str, Any]) -> ScheduleSection:
    """The schedule of saved settings, without keys that had no effect: earlier versions took them."""
    given = {k.partition(".")[2]: v for k, v in settings.items() if k.startswith("schedule.")}
    if given.get("kind") != "wsd":
        given.pop("decay_share", None)
    if given.get("kind") == "constant":
        given.pop("final_share", None)
    return msgspec.convert(given, ScheduleSection)


def _fade_differs(saved: Mapping[str, Any], now: Mapping[str, Any], step: int) -> bool:
    """True if a step so far would have had another bias of the routers."""
    if not saved.get("router.bias_rate"):
        return False
    fades = [one.get("router.bias_fade", 0.0) for one in (saved, now)]
    return any(
        bias_share(s, saved["n_steps"], fades[0]) != bias_share(s, now["n_steps"], fades[1])
        for s in (*_steps_so_far(step), *range(max(0, step - 1), step))
    )
