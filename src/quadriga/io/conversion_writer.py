"""Carry out a conversion's plan: resumable, and safe against a kill at any instant."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from quadriga.errors import CheckpointError
from quadriga.io import directory as engine_file
from quadriga.io.conversion_parts import PARTS_WAITING, encode, encoded_parts, packed_parts
from quadriga.io.conversion_plan import ConversionPlan
from quadriga.io.open import Checkpoint
from quadriga.io.parameters import Progress
from quadriga.model.weight_map import (
    Piece,
)
from quadriga.quant.feedback import Importance

_JOURNAL = "journal.jsonl"
_SYNC_BYTES = 512 << 20
"""How much may have to be done again after a crash."""


class _Digest(Protocol):
    def update(self, data: memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


class Writer:
    """Fills the planned files inside the work folder, tensor by tensor, remembering which are safe."""

    def __init__(self, work: Path, plan: ConversionPlan, fingerprint: str, resume: bool) -> None:
        self.work, self.plan, self.fingerprint = work, plan, fingerprint
        self.hashes: dict[str, str] = {}
        self._open: dict[str, int] = {}
        self._unsafe: list[str] = []
        self._unsafe_bytes = 0
        self._broken = False
        self._syncing: Future[None] | None = None
        if work.exists() and resume:
            self.hashes = self._finished()
        else:
            shutil.rmtree(work, ignore_errors=True)
        try:
            work.mkdir(parents=True, exist_ok=True)
            for file, size in plan.files.sizes.items():
                fd = os.open(work / file, os.O_RDWR | os.O_CREAT, 0o644)
                self._open[file] = fd
                os.ftruncate(fd, size)
                _write_all(fd, plan.files.headers[file], 0)
            if not (work / _JOURNAL).exists():
                self._append([{"fingerprint": fingerprint}])
        except OSError as error:
            raise self._failed(error) from None

    def _finished(self) -> dict[str, str]:
        """Tensors an earlier run has put safely on disk, or an error if that run was of something else."""
        journal = self.work / _JOURNAL
        if not journal.is_file():
            return {}
        lines = []
        for line in journal.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break  # the crash tore the last line; that tensor is done again
        if not lines:
            journal.unlink()
            return {}
        if lines[0].get("fingerprint") != self.fingerprint:
            raise CheckpointError(
                f"{self.work} holds an unfinished conversion of another source or with other options. "
                "Remove it, or start over with --restart."
            )
        return {line["tensor"]: line["sha256"] for line in lines[1:]}

    def run(self, checkpoint: Checkpoint, progress: Progress | None, importance: Mapping[str, Importance]) -> None:
        """Write what is missing, then the small files. One thread hashes and writes while the others make the next."""
        total = sum(self.plan.nbytes(name) for name in self.plan.tensors)
        done = sum(self.plan.nbytes(name) for name in self.hashes)
        try:
            with ThreadPoolExecutor(1) as self._syncer, ThreadPoolExecutor(1) as background:
                writing: deque[Future[tuple[str, int]]] = deque()
                for name, parts in self._missing(checkpoint, importance):
                    # A tensor of one part is written while the next is made; longer ones part by part, as they come.
                    digest = hashlib.sha256()
                    for raw, at in parts:
                        writing.append(background.submit(self._in_order, self._write, name, raw, at, digest))
                        while len(writing) > PARTS_WAITING:
                            done += self._written(writing.popleft(), total, done, progress)
                    writing.append(background.submit(self._in_order, self._finish, name, digest))
                while writing:
                    done += self._written(writing.popleft(), total, done, progress)
                self._start_sync()
                self._wait_for_sync()
            self._small_files(checkpoint)
        except OSError as error:
            raise self._failed(error) from None
        finally:
            for fd in self._open.values():
                os.close(fd)

    def put_in_place(self, out: Path) -> None:
        """Give the finished work its final name.

        Raises:
            CheckpointError: the system does not let it.
        """
        try:
            if self.plan.to == "gguf":
                (self.work / out.name).replace(out)
                (self.work / _JOURNAL).unlink()
                self.work.rmdir()
            else:
                (self.work / _JOURNAL).unlink()
                if out.exists():
                    out.rmdir()
                self.work.replace(out)
            _sync_directory(out.parent)
        except OSError as error:
            raise CheckpointError(f"cannot put the finished {out} in place: {error.strerror}") from None

    def _missing(
        self, checkpoint: Checkpoint, importance: Mapping[str, Importance]
    ) -> Iterator[tuple[str, Iterator[tuple[memoryview, int]]]]:
        """The tensors that are not on disk yet, and the parts of each."""
        if self.plan.packed:
            yield from packed_parts(checkpoint, self.plan, importance, self.hashes)
            return
        by_tensor: dict[str, list[Piece]] = {}
        for piece in self.plan.pieces:
            by_tensor.setdefault(piece.source, []).append(piece)
        for name, pieces in by_tensor.items():
            if name not in self.hashes:
                yield name, encoded_parts(checkpoint, self.plan, name, pieces, importance)
        for name, values in self.plan.constants.items():
            if name not in self.hashes:
                yield name, iter([(encode(values, "float32"), 0)])

    def _in_order(self, task: Callable[..., tuple[str, int]], *args: object) -> tuple[str, int]:
        """Run in the background, but nothing after a failure: a tensor with a lost part must not count as finished."""
        if self._broken:
            return "", 0
        try:
            return task(*args)
        except BaseException:
            self._broken = True
            raise

    def _write(self, name: str, raw: memoryview, at: int, digest: _Digest) -> tuple[str, int]:
        file, offset = self.plan.files.places[name]
        _write_all(self._open[file], raw, offset + at)
        digest.update(raw)
        return name, len(raw)

    def _written(self, future: Future[tuple[str, int]], total: int, done: int, progress: Progress | None) -> int:
        name, nbytes = future.result()
        if progress is not None and nbytes:
            progress(done + nbytes, total, name)
        return nbytes

    def _finish(self, name: str, digest: _Digest) -> tuple[str, int]:
        self.hashes[name] = digest.hexdigest()
        self._unsafe.append(name)
        self._unsafe_bytes += self.plan.nbytes(name)
        if self._unsafe_bytes >= _SYNC_BYTES:
            self._start_sync()
        return name, 0

    def _start_sync(self) -> None:
        """Put the finished tensors on disk, while the next are made and written; one such round at a time."""
        self._wait_for_sync()
        names, self._unsafe, self._unsafe_bytes = self._unsafe, [], 0
        self._syncing = self._syncer.submit(self._sync, names)

    def _wait_for_sync(self) -> None:
        if self._syncing is not None:
            self._syncing.result()

    def _sync(self, names: list[str]) -> None:
        """Data first, then the journal that vouches for it."""
        for fd in self._open.values():
            os.fsync(fd)
        self._append([{"tensor": name, "sha256": self.hashes[name]} for name in names])

    def _append(self, lines: list[dict[str, str]]) -> None:
        with (self.work / _JOURNAL).open("a") as journal:
            journal.writelines(json.dumps(line) + "\n" for line in lines)
            journal.flush()
            os.fsync(journal.fileno())

    def _small_files(self, checkpoint: Checkpoint) -> None:
        for name, content in self.plan.extra.items():
            (self.work / name).parent.mkdir(exist_ok=True)
            with (self.work / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if self.plan.to == "quadriga":
            entries = {
                name: engine_file.Entry(
                    file=self.plan.files.places[name][0],
                    offset=self.plan.files.places[name][1],
                    shape=shape,
                    format=form,
                    nbytes=self.plan.nbytes(name),
                    sha256=self.hashes[name],
                )
                for name, (shape, form) in self.plan.tensors.items()
            }
            engine_file.write_manifest(
                self.work,
                engine_file.Manifest(
                    config=checkpoint.config,
                    parameters=entries,
                    made_from=checkpoint.path.name + (f", {checkpoint.recipe}" if checkpoint.recipe else ""),
                    packed=bool(self.plan.packed),
                ),
            )
        _sync_directory(self.work)

    def _failed(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"cannot write to {self.work}: {error.strerror}. What was finished is kept: free some space or fix the "
            "cause and run the same command again, it goes on from there."
        )


def _write_all(fd: int, raw: bytes | memoryview, offset: int) -> None:
    view = memoryview(raw)
    while len(view):
        written = os.pwrite(fd, view[: 1 << 30], offset)
        view, offset = view[written:], offset + written


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
