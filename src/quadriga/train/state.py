"""Save and load the complete state of a run (weights, optimiser, EMA, biases, position), bit for bit.

    copy to the host ─► [thread] each rank writes its file ─► hashes to rank 0 ─► manifest ─► rename ─► prune

Tensors are stored in safetensors files, everything else in the manifest's JSON. There is no random state to save: each
step seeds its generator from (seed, step, rank), and data are a function of the step. A state saved by 4 ranks can be
read by 2, by 1 or by any mesh (``shards``). torch's distributed checkpoints (DCP) can reshard too, but store their
table as a pickle, and reading a checkpoint must never run code (torch CVE-2025-32434).
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quadriga.errors import CheckpointError, TrainingError
from quadriga.train.config import CheckpointSection
from quadriga.train.layout import Layout
from quadriga.train.run_directory import Manifest, RunDirectory
from quadriga.train.shards import ShardReader, encode
from quadriga.train.world import World

_FULL = (errno.ENOSPC, errno.EDQUOT)


class _DiskFullError(OSError):
    """A rank found no space left; raised on all of them."""


def _said(error: Exception) -> str:
    kind = next(one.__name__ for one in type(error).__mro__ if not one.__name__.startswith("_"))
    return f"{kind}: {error}"


class Saver:
    """Writes checkpoints, one at a time, in a second thread if ``section.asynchronous`` is set.

    Args:
        run: the folder.
        world: the ranks; all of them must call :meth:`save` and :meth:`finish` at the same steps.
        section: when to write, and how many checkpoints to keep.
    """

    def __init__(self, run: RunDirectory, world: World, section: CheckpointSection) -> None:
        self.run, self.world, self.section = run, world, section
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._news: list[str] = []

    def save(self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], layout: Layout) -> None:
        """Save the state as the checkpoint of ``step``; returns when it is copied, or written if synchronous."""
        self.finish()
        parts = layout.parts(tensors)
        if self.section.asynchronous:
            # Not a daemon thread: the interpreter waits for it at exit, so a normal exit never cuts off a save.
            self._thread = threading.Thread(target=self._write, args=(step, parts, state), name="checkpoint")
            self._thread.start()
        else:
            self._write(step, parts, state)

    def finish(self) -> str | None:
        """Wait for the current save. Returns the error of any rank, or None."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return None if error is None else _said(error)

    def news(self) -> list[str]:
        """What happened while saving and was not returned yet; does not wait for a save."""
        found, self._news = self._news, []
        return found

    def _write(self, step: int, parts: dict[str, Tensor], state: dict[str, Any]) -> None:
        try:
            try:
                self._write_parts(step, parts, state)
            except _DiskFullError as error:
                if not self._make_room(step, error):
                    raise
                self._write_parts(step, parts, state)
        except Exception as error:
            self._error = error
            self._news.append(f"warning: a checkpoint could not be saved, the last good one is kept: {_said(error)}")

    def _make_room(self, step: int, error: _DiskFullError) -> bool:
        """Remove what checkpoint.keep and keep_every allow, but for the newest; True if that was anything."""
        failure: Exception | None = None
        removed: list[int] = []
        try:
            if self.world.first:
                self.run.files.remove_folder(self.run.part(step))
                removed = self.run.prune(1, self.section.keep_every)
        except OSError as wrong:
            failure = wrong
        some = self._agree(failure, len(removed))[0][0] > 0
        if some:
            what = ", ".join(map(str, removed))
            self._news.append(
                f"warning: the disk is full ({error}): removed the checkpoints of steps {what}, and saving again"
            )
        return some

    def _write_parts(self, step: int, parts: dict[str, Tensor], state: dict[str, Any]) -> None:
        work, files = self.run.part(step), self.run.files
        failure: Exception | None = None
        try:
            if self.world.first:
                files.remove_folder(work)
                files.make_folder(work)
        except OSError as error:
            failure = error
        self._agree(failure)
        size, digest = 0, "0" * 64
        try:
            size, digest = files.write(work / rank_file(self.world.rank), encode(parts))
        except OSError as error:
            failure = error
        written = self._agree(failure, size, digest)
        try:
            if self.world.first:
                table = {rank_file(rank): entry for rank, entry in enumerate(written)}
                self.run.finish(Manifest(step=step, files=table, state=state))
                self.run.prune(self.section.keep, self.section.keep_every)
        except OSError as error:
            failure = error
        self._agree(failure)

    def _agree(self, failure: Exception | None, size: int = 0, digest: str = "0" * 64) -> list[tuple[int, str]]:
        """Exchange every rank's (size, digest); if any rank failed, raise on all of them."""
        report = torch.zeros(41, dtype=torch.uint8)
        report[0] = 0 if failure is None else 2 if getattr(failure, "errno", None) in _FULL else 1
        report[1:9] = torch.tensor(list(size.to_bytes(8, "little")), dtype=torch.uint8)
        report[9:] = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
        reports = self.world.gather(report)
        full = [rank for rank, part in enumerate(reports) if part[0] == 2]
        if full:
            raise _DiskFullError(f"ranks {full}: {failure or 'no space left'}" if self.world.size > 1 else str(failure))
        if failure is not None:
            raise failure
        failed = [rank for rank, part in enumerate(reports) if part[0]]
        if failed:
            raise TrainingError(f"ranks {failed} could not write their parts of the checkpoint: see their output")
        found = [bytes(part.tolist()) for part in reports]
        return [(int.from_bytes(part[1:9], "little"), part[9:].hex()) for part in found]


def rank_file(rank: int) -> str:
    """File name of a rank's part of a checkpoint."""
    return f"rank-{rank:05d}.safetensors"


def load(checkpoint: Path, manifest: Manifest, tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """Fill tensors, whole or sharded in any way, from a checkpoint whose manifest was verified.

    Raises:
        CheckpointError: the checkpoint does not have exactly these tensors.
    """
    reader = ShardReader([checkpoint / name for name in manifest.files])
    stored = {name for name in reader.names() if not layout.elsewhere(name)}
    missing, extra = sorted(set(tensors) - stored), sorted(stored - set(tensors))
    if missing or extra:
        raise CheckpointError(
            f"the checkpoint {checkpoint} does not fit this run: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(extra)} are unexpected {extra[:3]}. Resume with the model, optimiser, ema and router sections it "
            "was saved with."
        )
    portions = layout.portions_of(tensors)
    for name, tensor in tensors.items():
        reader.fill(name, tensor, portions.get(name))
