"""What catalogue and data sets share of the cache folder: locks, sizes, hashes, and errors of writing to it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from quadriga import runtime
from quadriga.errors import CatalogueError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder of the cache, so that one process at a time downloads or removes it; others wait.

    Raises:
        CatalogueError: the cache cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f".{folder.name}.lock").open("w")
    except OSError as error:
        raise cannot_write(folder.parent, error) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cannot_write(folder: Path, error: OSError, nbytes: int = 0) -> CatalogueError:
    """The error of what cannot be written there.

    Args:
        nbytes: what was to be written, where it is known.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return full_disk(folder, nbytes)
    return CatalogueError(
        f"cannot write to the cache {folder}: {error.strerror}. Set QUADRIGA_CACHE to a writable folder."
    )


def full_disk(folder: Path, nbytes: int = 0) -> CatalogueError:
    """The error of a disk without room."""
    need = f"{nbytes / 1e6:,.1f} MB are needed, " if nbytes else ""
    return CatalogueError(
        f"the disk of {folder} is full: {need}{runtime.free_disk_bytes(folder) / 1e6:,.1f} MB are free. Make room "
        "(`quadriga models rm NAME` removes a model), or set QUADRIGA_CACHE to a folder on another disk."
    )


def need_room(folder: Path, nbytes: int) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        CatalogueError: the disk is too full.
    """
    if runtime.free_disk_bytes(folder) < nbytes:
        raise full_disk(folder, nbytes)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    total = 0
    for folder, _, files in os.walk(path):
        for file in files:
            with contextlib.suppress(OSError):  # files appear and disappear during a download
                total += os.lstat(os.path.join(folder, file)).st_size  # noqa: PTH118 - a hot loop
    return total


def sha256_of(path: Path) -> str:
    """A file's sha256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
