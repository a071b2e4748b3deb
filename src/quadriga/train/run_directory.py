"""A run's folder: locked by one run at a time, with checkpoints that are either complete or absent.

    runs/nano/
      lock                    held (flock) by rank 0
      config.json             the configuration that the run last went on with
      metrics.jsonl           one line per step
      report.html
      spikes/step-00000321.safetensors
      checkpoints/step-00000400/
        rank-00000.safetensors ...    each rank's part of the state
        manifest.json                 sizes, hashes, step, data position: written last

A checkpoint is built as step-N.part; its manifest is written last, then the folder is renamed. So a folder named step-N
with a manifest is complete; anything else is left over from a killed process and is removed at the next start.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from quadriga.errors import CheckpointError, TrainingError
from quadriga.io.json_files import read_json
from quadriga.train.storage import Files, file_digest
from quadriga.train.world import World

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The files of a checkpoint, and all state that is not a tensor."""

    version: int = 1
    step: int
    """The number of completed steps, which is the next step's number."""
    files: dict[str, tuple[int, str]]
    """Name -> (bytes, sha256)."""
    state: dict[str, Any]


class RunDirectory:
    """The folder of one run.

    Args:
        path: created if missing.
        files: the disk operations; tests replace them to simulate failures.
    """

    def __init__(self, path: Path, files: Files | None = None) -> None:
        self.path = path
        self.files = files or Files()

    @property
    def checkpoints(self) -> Path:
        """The folder that contains the checkpoints."""
        return self.path / "checkpoints"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's lock inside the block.

        Raises:
            TrainingError: another process holds it, or the folder cannot be written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise TrainingError(f"cannot write to the run's folder {self.path}: {error.strerror}") from None
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(fd, 64, 0).decode(errors="replace").strip() or "unknown"
                raise TrainingError(
                    f"{self.path} is in use by process {holder}. Stop that process, or choose another run folder."
                ) from None
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(fd)

    def clean(self) -> None:
        """Remove incomplete files and checkpoints left by a killed process."""
        if self.checkpoints.exists():
            for entry in self.checkpoints.iterdir():
                if not _NAME.fullmatch(entry.name) or not (entry / MANIFEST).exists():
                    self.files.remove_folder(entry)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if not self.checkpoints.exists():
            return []
        found = [
            int(match[1])
            for entry in self.checkpoints.iterdir()
            if (match := _NAME.fullmatch(entry.name)) and (entry / MANIFEST).exists()
        ]
        return sorted(found)

    def at(self, step: int) -> Path:
        """The folder of the checkpoint after ``step`` steps."""
        return self.checkpoints / f"step-{step:08d}"

    def part(self, step: int) -> Path:
        """The folder in which that checkpoint is built."""
        return self.checkpoints / f"step-{step:08d}.part"

    def finish(self, manifest: Manifest) -> None:
        """Complete the checkpoint in :meth:`part`: write its manifest, then rename the folder."""
        work, place = self.part(manifest.step), self.at(manifest.step)
        self.files.write(work / MANIFEST, [msgspec.json.format(msgspec.json.encode(manifest), indent=1)])
        if place.exists():  # saved before a rollback, or by a run that was killed after its rename
            self.remove(place)
        self.files.rename(work, place)

    def prune(self, keep: int, keep_every: int) -> list[int]:
        """Remove the oldest checkpoints beyond ``keep``, except those at multiples of ``keep_every``; returns which."""
        removable = [step for step in self.steps() if not (keep_every and step % keep_every == 0)]
        for step in removable[:-keep]:
            self.remove(self.at(step))
        return removable[:-keep]

    def remove(self, checkpoint: Path) -> None:
        """Remove a checkpoint, its manifest first, so that it never looks complete while it is being removed."""
        self.files.remove(checkpoint / MANIFEST)
        self.files.sync_folder(checkpoint)
        self.files.remove_folder(checkpoint)


@contextlib.contextmanager
def held(run: RunDirectory, world: World) -> Iterator[None]:
    """Hold a run's lock on rank 0 inside the block, which begins with a clean folder; all ranks must call this.

    Raises:
        TrainingError: on all ranks, as :meth:`RunDirectory.locked`.
    """
    with contextlib.ExitStack() as stack:

        def take() -> None:
            stack.enter_context(run.locked())
            run.clean()

        world.first_does(take)
        yield


def read_manifest(checkpoint: Path, world: World | None = None) -> Manifest:
    """Read the manifest of a complete checkpoint, and check size and hash of every file.

    Args:
        world: the ranks, which all must call this: each reads some of the files, and all learn of every one.

    Raises:
        CheckpointError: the manifest is missing or malformed, or a file is missing, cut short or changed.
    """
    raw = read_json(checkpoint / MANIFEST)
    try:
        manifest = msgspec.convert(raw, Manifest)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"{checkpoint / MANIFEST} is not the manifest of a training checkpoint: {error}"
        ) from None
    if manifest.version != 1:
        raise CheckpointError(f"{checkpoint / MANIFEST} is version {manifest.version}; this Quadriga reads version 1")
    verdicts = _verdicts(checkpoint, manifest, world or World())
    for (name, (size, _)), verdict in zip(manifest.files.items(), verdicts, strict=True):
        if verdict == _CUT:
            raise CheckpointError(f"{checkpoint / name} is missing or cut short; {MANIFEST} says {size} bytes")
        if verdict == _CHANGED:
            raise CheckpointError(f"{checkpoint / name} was changed: its sha256 differs from {MANIFEST}")
    return manifest


_INTACT, _CUT, _CHANGED = range(3)


def _verdicts(checkpoint: Path, manifest: Manifest, world: World) -> list[int]:
    """What is wrong with each file; each is read by one rank, and all ranks return the same list."""
    found = torch.zeros(len(manifest.files), dtype=torch.uint8)
    for i, (name, (size, digest)) in enumerate(manifest.files.items()):
        if i % world.size == world.rank:
            file = checkpoint / name
            if name != Path(name).name or not file.is_file() or file.stat().st_size != size:
                found[i] = _CUT
            elif file_digest(file)[1] != digest:
                found[i] = _CHANGED
    return [int(verdict) for verdict in torch.stack(world.gather(found)).amax(0)] if len(found) else []


def chosen(run: RunDirectory, step: int | None) -> tuple[Path, Manifest] | None:
    """(folder, manifest) of the checkpoint of a step, or of the newest intact one; None if there is no checkpoint.

    Raises:
        CheckpointError: there is none of that step, or it is damaged.
    """
    if step is None:
        found = newest(run)
        return None if found is None else found[:2]
    if step not in run.steps():
        raise CheckpointError(f"{run.path} has no checkpoint of step {step}; it has {run.steps()}")
    return run.at(step), read_manifest(run.at(step))


def newest(run: RunDirectory, world: World | None = None) -> tuple[Path, Manifest, list[str]] | None:
    """(folder, manifest, errors of newer ones) of the newest intact checkpoint; None if there is no checkpoint.

    Args:
        world: the ranks, which all must call this (:func:`read_manifest`).

    Raises:
        CheckpointError: there are checkpoints, and none is intact.
    """
    complaints: list[str] = []
    for step in reversed(run.steps()):
        try:
            return run.at(step), read_manifest(run.at(step), world), complaints
        except CheckpointError as error:
            complaints.append(str(error))
    if complaints:
        raise CheckpointError("no checkpoint of this run is intact: " + "; ".join(complaints))
    return None
