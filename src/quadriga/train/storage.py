"""The disk operations of a run, kept few so that tests can make each of them fail.

    write NAME.tmp ─► fsync ─► rename to NAME ─► fsync of the folder

So a file with its final name is complete, even after a crash at any moment. All writers use :class:`Files`; tests pass
one that raises an error or kills the process at the i-th operation.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path


class Files:
    """The disk operations; each calls :meth:`about_to` first."""

    def about_to(self, operation: str, path: Path) -> None:
        """Called before each operation; does nothing here, tests override it."""

    def write(self, path: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
        """Write a file atomically: afterwards it is complete or absent. Returns (number of bytes, sha256)."""
        temporary = path.with_name(path.name + ".tmp")
        digest, size = sha256(), 0
        self.about_to("create", path)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            for part in _joined(parts):
                view = memoryview(part).cast("B")
                digest.update(view)
                size += len(view)
                while len(view):
                    self.about_to("write", path)
                    view = view[os.write(fd, view[: 64 << 20]) :]
            self.about_to("fsync", path)
            os.fsync(fd)
        except BaseException:
            os.close(fd)
            temporary.unlink(missing_ok=True)
            raise
        os.close(fd)
        self.rename(temporary, path)
        return size, digest.hexdigest()

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file or folder, durably."""
        self.about_to("rename", new)
        old.replace(new)
        self.sync_folder(new.parent)

    def sync_folder(self, folder: Path) -> None:
        """Sync a folder, so that its directory entries survive a crash."""
        self.about_to("fsync folder", folder)
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def make_folder(self, folder: Path) -> None:
        """Create a folder if it does not exist."""
        self.about_to("mkdir", folder)
        folder.mkdir(parents=True, exist_ok=True)

    def remove(self, path: Path) -> None:
        """Remove a file if it exists."""
        self.about_to("remove", path)
        path.unlink(missing_ok=True)

    def remove_folder(self, folder: Path) -> None:
        """Remove a folder with its contents if it exists."""
        self.about_to("remove folder", folder)
        shutil.rmtree(folder, ignore_errors=not folder.exists())


def _joined(parts: Iterable[bytes | memoryview], enough: int = 1 << 20) -> Iterator[bytes | memoryview]:
    """Join small parts into larger writes: a state has hundreds of norms of one kilobyte."""
    small = bytearray()
    for part in parts:
        if memoryview(part).nbytes < enough:
            small += part
        if len(small) >= enough or (small and memoryview(part).nbytes >= enough):
            yield bytes(small)
            small = bytearray()
        if memoryview(part).nbytes >= enough:
            yield part
    if small:
        yield bytes(small)


def file_digest(path: Path) -> tuple[int, str]:
    """(number of bytes, sha256) of a file."""
    digest, size = sha256(), 0
    with path.open("rb") as file:
        while block := file.read(16 << 20):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()
