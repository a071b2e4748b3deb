"""A run that begins in the middle of another: the decay of a warm-up, stable, decay schedule, as often as wanted.

    trunk     warm-up ─ stable ──────────●──────────────────●─── ... goes on, or was ended
    branches                             └── decay          └── decay, each a whole model of that many tokens

(Hu et al. 2024, MiniCPM.) The branch's folder gets the trunk's checkpoint, by hard links where the disk has them, and
its metrics so far; from there on it is a run like any other, and is resumed as one: what would have made the steps so
far other steps is refused (``train.changes``).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from quadriga.errors import CheckpointError, ConfigError
from quadriga.train.metrics import FILE
from quadriga.train.run_directory import MANIFEST, RunDirectory, chosen


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Where a run begins.

    Attributes:
        of: the folder of the run that it leaves.
        step: the checkpoint of so many steps; None: the newest.
    """

    of: Path
    step: int | None = None


def begin(branch: Branch, run: RunDirectory) -> None:
    """Put the trunk's checkpoint and metrics into a new run's folder; a run that has checkpoints is left as it is.

    Raises:
        ConfigError: the branch would be its own trunk.
        CheckpointError: the trunk has no such checkpoint, or its files are damaged.
    """
    trunk = RunDirectory(branch.of.expanduser())
    if trunk.path.resolve() == run.path.resolve():
        raise ConfigError(f"a branch needs a folder of its own: {run.path} is the run that it leaves")
    if run.steps():
        return
    found = chosen(trunk, branch.step)
    if found is None:
        raise CheckpointError(f"{trunk.path} has no checkpoint to begin at")
    source, manifest = found
    work = run.part(manifest.step)
    try:
        shutil.copytree(source, work, copy_function=_link)
        if not (work / MANIFEST).exists():  # the trunk goes on, and removes old checkpoints, their manifests first
            raise CheckpointError(f"{source} was removed while it was taken into {run.path}: choose a later --step")
        if (trunk.path / FILE).exists():
            shutil.copyfile(trunk.path / FILE, run.path / FILE)
        work.rename(run.at(manifest.step))
    except OSError as error:
        raise CheckpointError(f"cannot take {source} into {run.path}: {error.strerror or error}") from None


def _link(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
