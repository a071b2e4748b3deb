"""Control groups: limits on all memory and processes of a program together, where this process may make groups.

Address-space limits hold for each process alone, so sixteen of them may take sixteen times as much. A group of the
kernel's counts them together. Both forms are known: one tree for each controller (version 1) and one for all
(version 2, where the group above must have handed the controllers down; that is so where a service manager delegated).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_WAIT_S = 5.0
_LIMITS = {"memory": ("memory.max", "memory.limit_in_bytes"), "pids": ("pids.max", "pids.max")}
"""Controller -> its limit's file in version 2 and 1."""


@dataclass(frozen=True)
class Groups:
    """The groups of one program. Made before it starts; the program's first process joins them by itself."""

    folders: tuple[Path, ...]

    @classmethod
    def make(cls, memory_bytes: int, processes: int, root: Path = Path("/")) -> Groups:
        """Make groups below this process's own, with these limits; none where it may not, or a controller is missing.

        Args:
            memory_bytes: of all processes together, their files in memory included.
            processes: processes and threads together.
            root: where /proc and /sys are found.
        """
        name, made = f"quadriga-{os.getpid()}-{secrets.token_hex(4)}", []
        for parents, limits in _places(root, {"memory": memory_bytes, "pids": processes}):
            for parent in parents:
                if _make(parent / name, limits):
                    made.append(parent / name)
                    break
        return cls(tuple(made))

    def open(self) -> list[int]:
        """File descriptors into which a process writes 0 to join."""
        return [os.open(folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC) for folder in self.folders]

    def remove(self) -> None:
        """Kill whoever is left in the groups, and remove them."""
        give_up = time.monotonic() + _WAIT_S
        for folder in self.folders:
            while True:
                try:
                    folder.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:  # somebody is in it, dying or about to be killed
                    if time.monotonic() > give_up:
                        raise
                for pid in (folder / "cgroup.procs").read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                time.sleep(0.002)


def _places(root: Path, values: dict[str, int]) -> list[tuple[list[Path], dict[str, int]]]:
    """Where groups may be made, best first, and what is to be written there, for each tree of groups."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    places = []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        named = [name for name in controllers.split(",") if name in values]
        if named:  # version 1
            folder = root / "sys/fs/cgroup" / controllers
            places.append(([folder / own.lstrip("/")], {_LIMITS[name][1]: values[name] for name in named}))
        elif not controllers:
            folder = root / "sys/fs/cgroup" / own.lstrip("/")
            # A group with processes in it hands no controller down, so the one above it is where there is hope.
            parents = [folder] if own == "/" else [folder, folder.parent]
            places.append((parents, {_LIMITS[name][0]: value for name, value in values.items()}))
    return places


def _make(folder: Path, limits: dict[str, int]) -> bool:
    try:
        folder.mkdir()
    except OSError:  # read-only, somebody else's, or no tree of groups at all
        return False
    try:
        for name, value in limits.items():
            if not (folder / name).exists():
                raise FileNotFoundError(name)
            (folder / name).write_text(str(value))
    except OSError:
        folder.rmdir()
        return False
    return True
