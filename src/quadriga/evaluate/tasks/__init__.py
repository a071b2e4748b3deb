"""All benchmarks by name. ``gauntlet`` selects all tasks of the Gauntlet; a path selects a user's own file."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from quadriga.errors import EvaluationError
from quadriga.evaluate.tasks import (
    choice,
    gauntlet,
    generated,
    ifeval,
    judged,
    knowledge,
    long_context,
    mathematics,
    own,
    programs,
    reasoning,
    tools,
)
from quadriga.evaluate.tasks.base import Task

_MODULES = (
    choice,
    generated,
    knowledge,
    mathematics,
    reasoning,
    ifeval,
    programs,
    long_context,
    tools,
    judged,
    gauntlet,
)
TASKS: dict[str, Task] = {task.name: task for module in _MODULES for task in module.TASKS}

GROUPS: dict[str, tuple[str, ...]] = {
    "gauntlet": tuple(task.name for task in gauntlet.TASKS),
    "leaderboard": ("arc_challenge", "hellaswag_10", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k"),
}
"""Group -> task names. leaderboard: the six tasks of the Open LLM Leaderboard v1, as in DBRX's launch table."""


def select(names: Sequence[str]) -> list[Task]:
    """Return the tasks for names, groups and paths; each task once, in the order given.

    Raises:
        EvaluationError: an unknown name.
    """
    chosen: dict[str, Task] = {}
    for name in names:
        if name in TASKS:
            chosen[name] = TASKS[name]
        elif name in GROUPS:
            chosen.update({one: TASKS[one] for one in GROUPS[name]})
        elif name.endswith(".jsonl"):
            task = gauntlet.own_task(Path(name))
            chosen[task.name] = task
        elif name.endswith(".toml"):
            task = own.described_task(Path(name))
            chosen[task.name] = task
        else:
            known = [*(n for n in TASKS if not n.startswith("gauntlet_")), *GROUPS]
            near = difflib.get_close_matches(name, [*TASKS, *GROUPS], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise EvaluationError(
                f"there is no task {name!r}.{hint} Choose from {', '.join(known)}, or give the path of a .jsonl or "
                ".toml file."
            )
    return list(chosen.values())
