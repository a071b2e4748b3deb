"""A run that begins in the middle of another: the decay of a warm-up, stable, decay schedule, as often as wanted.

    trunk     warm-up ─ stable ──────────●──────────────────●─── ... goes on, or was ended
    branches                             └── decay          └── decay, each a whole model of that many tokens

(Hu et al. 2024, MiniCPM.) The branch's folder gets the trunk's checkpoint, by hard links where the disk has them, and
its metrics so far; from there on it is a run like any other, and is resumed as one: what would have made the steps so
far other steps is refused (``train.changes``), and then the folder is left as it was found.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quadriga.errors import CheckpointError, ConfigError
from quadriga.io.json_files import read_json
from quadriga.train.metrics import FILE
from quadriga.train.run_directory import MANIFEST, RunDirectory, chosen

BEGINNING = "branch.json"
"""Where a branch began: ``of``, the trunk's folder, and ``step``."""


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Where a run begins.

    Attributes:
        of: the folder of the run that it leaves.
        step: the checkpoint of so many steps; None: the newest.
    """

    of: Path
    step: int | None = None


def begin(branch: Branch, run: RunDirectory) -> bool:
    """Put the trunk's checkpoint and metrics into a new run's folder; a branch that has begun is left as it is.

    Returns:
        whether the run began now.

    Raises:
        ConfigError: the branch would be its own trunk; or the run has checkpoints and did not begin there.
        CheckpointError: the trunk has no such checkpoint, or its files are damaged.
    """
    trunk = RunDirectory(branch.of.expanduser())
    if trunk.path.resolve() == run.path.resolve():
        raise ConfigError(f"a branch needs a folder of its own: {run.path} is the run that it leaves")
    if run.steps():
        _require_same(branch, trunk, run)
        return False
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
        begun = {"of": str(trunk.path.resolve()), "step": manifest.step}
        (run.path / BEGINNING).write_text(json.dumps(begun) + "\n")
        work.rename(run.at(manifest.step))
    except OSError as error:
        raise CheckpointError(f"cannot take {source} into {run.path}: {error.strerror or error}") from None
    return True


def undo(run: RunDirectory) -> None:
    """Remove what :func:`begin` put into a run's folder, when the run is refused: it may begin elsewhere then."""
    for step in run.steps():
        run.remove(run.at(step))
    for name in (FILE, BEGINNING):
        (run.path / name).unlink(missing_ok=True)


def _require_same(branch: Branch, trunk: RunDirectory, run: RunDirectory) -> None:
    """Refuse to go on with a run that began elsewhere than ``branch`` says."""
    begun = read_json(run.path / BEGINNING) if (run.path / BEGINNING).exists() else None
    if begun == {"of": str(trunk.path.resolve()), "step": branch.step if branch.step is not None else _step(begun)}:
        return
    where = "not as a branch" if begun is None else f"at step {_step(begun)} of {begun.get('of')}"
    raise ConfigError(
        f"{run.path} has checkpoints, and began {where}: leave --branch and --step out to go on with it, or choose "
        "another run folder"
    )


def _step(begun: Mapping[str, object] | None) -> object:
    return None if begun is None else begun.get("step")


def _link(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
