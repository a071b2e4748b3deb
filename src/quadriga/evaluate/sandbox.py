"""Run programs that a model wrote, in isolation, and report only whether each ran to its end.

    this process ── bwrap (own users, processes, network, files) ── fresh interpreter -I -S ── driver ── program
         ▲                                                                                        │
         └──────────────── a random word on a pipe, written after the last line of the program ───┘

A program passes if the word comes back, so exiting early with code 0, killing its parent or printing something does
not count. It has no network, no files of this machine except the interpreter's and the system's libraries, an empty
environment, no capabilities, and limits on memory, CPU time, file size, processes, open files and core dumps; calls
that make name spaces or mounts, or look into other processes, are refused to it. At the deadline its whole process
group is killed. Where this process may make control groups, all its memory and processes are limited together.

The kinds of isolation, best first:

    bubblewrap   Linux name spaces for everything, a root of its own
    unshare      the same name spaces through util-linux; the driver makes the root
    none         limits and an empty environment only; refused unless asked for

It does not protect against kernel vulnerabilities. The word has to be in the program's process, on a frame's stack: no
variable, module or collector's list leads to it, and tracing and profiling are refused to the program, but one that
goes through raw memory can find it. Such cheating, like an object that equals everything, can be seen in the generated
programs, which the results keep.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from math import ceil
from pathlib import Path
from typing import Literal

from quadriga import runtime
from quadriga.errors import EvaluationError, HardwareError
from quadriga.evaluate.sandbox_groups import Groups

Kind = Literal["bubblewrap", "unshare", "none"]

_MOST_ERROR_BYTES = 4096
_LIBRARIES = ("/lib", "/lib64", "/lib32", "/bin", "/sbin", "/etc/ld.so.cache")


@dataclass(frozen=True)
class Outcome:
    """How one program ended."""

    passed: bool
    error: str
    """Why it failed: the exception's last line, "timed out", or the interpreter's exit code; empty if it passed."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resource limits for one program."""

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_bytes: int = 1 << 30
    """Address space of each process; and, where control groups can be made, what all of them take together."""
    file_bytes: int = 16 << 20
    """Largest file; also the size of its /tmp."""
    processes: int = 16
    """Processes and threads together."""
    open_files: int = 64


class Sandbox:
    """Runs programs in isolation.

    Args:
        kind: the kind of isolation (see the module docstring).
        limits: for each program.
        packages: packages of this Python that programs may import; without any, the standard library only.

    Raises:
        EvaluationError: a package is not installed.
    """

    def __init__(self, kind: Kind, limits: Limits | None = None, packages: Sequence[str] = ()) -> None:
        self.kind, self.limits = kind, limits or Limits()
        self._packages = [folder for name in packages for folder in package_folders(name)]

    @classmethod
    def find(cls, *, unsafe: bool = False, limits: Limits | None = None) -> Sandbox:
        """Create a sandbox of the best kind that works on this machine.

        Raises:
            HardwareError: none works, and ``unsafe`` is not set.
        """
        for kind in ("bubblewrap", "unshare"):
            if works(kind):
                return cls(kind, limits)
        if unsafe:
            return cls("none", limits)
        raise HardwareError(
            "programs that a model wrote need a sandbox, and neither bwrap nor unshare works here. Install bubblewrap "
            "(e.g. apt install bubblewrap), or use --unsafe-exec to run them with your own rights, in a container "
            "where they can do no harm."
        )

    def passes(
        self, programs: Sequence[str], *, wall_s: float | None = None, packages: Sequence[str] = ()
    ) -> list[bool]:
        """Run programs, as many at once as there are CPUs; True for each that ran to its end.

        Args:
            programs: Python source texts.
            wall_s: seconds for each, of the clock and of the processor, instead of the sandbox's limits.
            packages: packages of this Python that the programs may import, such as numpy.
        """
        limits = self.limits if wall_s is None else replace(self.limits, wall_s=wall_s, cpu_s=ceil(wall_s))
        box = Sandbox(self.kind, limits, packages)
        with ThreadPoolExecutor(runtime.cpu_count()) as pool:
            return [outcome.passed for outcome in pool.map(box.run, programs)]

    def run(self, program: str) -> Outcome:
        """Run one program to its end, its failure or its deadline."""
        started = time.monotonic()
        word = secrets.token_hex(16)
        groups = Groups(()) if self.kind == "none" else Groups.make(self.limits.memory_bytes, self.limits.processes)
        try:
            with tempfile.TemporaryDirectory(prefix="quadriga-run-") as folder:
                said, code = self._watch(program, word, groups, Path(folder), started)
        finally:
            groups.remove()
        return Outcome(*_verdict(said, word, code), time.monotonic() - started)

    def _watch(
        self, program: str, word: str, groups: Groups, folder: Path, started: float
    ) -> tuple[bytes | None, int | None]:
        """What the driver said (None: nothing before the deadline), and the exit code of the sandbox."""
        read_end, write_end = os.pipe()
        joins: list[int] = []
        try:
            joins = groups.open()
            process = subprocess.Popen(
                _command(self.kind, self.limits.file_bytes, self._packages),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                pass_fds=(write_end, *joins),
                start_new_session=True,
            )
        except OSError as error:
            os.close(read_end)
            raise HardwareError(f"the sandbox could not be started: {error}") from None
        finally:
            for fd in (write_end, *joins):
                os.close(fd)
        try:
            said = self._talk(process, read_end, self._job(program, word, write_end, joins), started)
        finally:
            _kill_group(process)
            os.close(read_end)
        return said, process.returncode

    def _job(self, program: str, word: str, fd: int, joins: Sequence[int]) -> bytes:
        limits = self.limits
        shown, links = _shown(self._packages)
        job = {
            "program": program,
            "paths": sorted({str(folder.parent) for folder in self._packages}),
            "word": word,
            "fd": fd,
            "groups": list(joins),
            "new_root": {"shown": shown, "links": links, "tmp_bytes": limits.file_bytes}
            if self.kind == "unshare"
            else None,
            "closed": self.kind != "none",
            # A separate user, so that its processes are counted separately and it cannot signal anyone else's.
            "uid": 60_000 + secrets.randbelow(5_000) if os.getuid() == 0 and self.kind != "none" else None,
            "limits": {
                "AS": limits.memory_bytes,
                "CPU": limits.cpu_s,
                "FSIZE": limits.file_bytes,
                "NPROC": limits.processes,
                "NOFILE": limits.open_files,
                "CORE": 0,
            },
        }
        return json.dumps(job).encode()

    def _talk(self, process: subprocess.Popen[bytes], read_end: int, job: bytes, started: float) -> bytes | None:
        """Send the job to the driver and wait for its verdict; None if the deadline passed."""
        assert process.stdin is not None, "a pipe was asked for"
        deadline = started + self.limits.wall_s
        said = b""
        with selectors.DefaultSelector() as selector:
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE)
            selector.register(read_end, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    if key.fd == read_end:
                        piece = os.read(read_end, 65536)
                        said += piece
                        if not piece or len(said) > _MOST_ERROR_BYTES:
                            return said
                        continue
                    try:
                        job = job[os.write(process.stdin.fileno(), job) :]
                    except BrokenPipeError:
                        job = b""
                    if not job:
                        selector.unregister(process.stdin)
                        process.stdin.close()
        return None


def _verdict(said: bytes | None, word: str, code: int | None) -> tuple[bool, str]:
    if said is None:
        return False, "timed out"
    line, _, rest = said.partition(b"\n")
    if line == b"passed " + word.encode() and not rest:
        return True, ""
    if line == b"failed " + word.encode():
        return False, rest.decode(errors="replace").strip()
    return False, f"ended before its tests did (code {code})"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill everything that was started, grandchildren too: if a process name space's first process dies, all do."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None and not process.stdin.closed:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    process.wait()


def interpreter() -> tuple[Path, Path]:
    """The interpreter outside this virtual environment, and its installation prefix."""
    base = Path(getattr(sys, "_base_executable", sys.executable) or sys.executable).resolve()
    return base, Path(sys.base_prefix).resolve()


def package_folders(name: str) -> list[Path]:
    """The folder of an installed package, and that of the libraries that its wheel brought (numpy.libs).

    Raises:
        EvaluationError: it is not installed, or is a single file.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise EvaluationError(f"the programs of this task import {name}, which is not installed: pip install {name}")
    folder = Path(spec.submodule_search_locations[0]).resolve()
    libraries = folder.with_name(f"{name}.libs")
    return [folder, *([libraries] if libraries.is_dir() else [])]


def _shown(packages: Sequence[Path] = ()) -> tuple[list[str], dict[str, str]]:
    """The files and folders of this machine that a program sees, and the links beside them."""
    shown, links = ["/usr"], {}
    for library in _LIBRARIES:
        path = Path(library)
        if path.is_symlink():
            links[library] = os.readlink(path)  # noqa: PTH115 - the link's own text
        elif path.exists():
            shown.append(library)
    _, prefix = interpreter()
    if not prefix.is_relative_to("/usr"):
        shown.append(str(prefix))
    shown += [str(folder) for folder in packages if not any(folder.is_relative_to(path) for path in shown)]
    return shown, links


def _command(kind: Kind, tmp_bytes: int, packages: Sequence[Path] = ()) -> list[str]:
    python, _ = interpreter()
    driver = files("quadriga.evaluate").joinpath("sandbox_driver.py").read_text()
    run = [str(python), "-I", "-S", "-c", driver]
    if kind == "none":
        return run
    if kind == "unshare":
        rest = ["--net", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
        # Root stays root until the driver has made the new root; others become root of a user name space.
        users = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
        return [_program("unshare"), *users, *rest, *run]
    command = [_program("bwrap"), "--die-with-parent", "--new-session", "--clearenv"]
    command += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    command += [] if os.getuid() == 0 else ["--unshare-user"]
    # /tmp first: what is shown may lie under this machine's (a virtual environment does), and must not be hidden.
    command += ["--perms", "1777", "--size", str(tmp_bytes), "--tmpfs", "/tmp"]
    shown, links = _shown(packages)
    for path in shown:
        # Made by bwrap itself, the program's user could not enter them.
        for parent in reversed(Path(path).parents[:-1]):
            if parent == Path("/tmp"):
                continue
            command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind", path, path]
    for path, target in links.items():
        command += ["--symlink", target, path]
    return [*command, "--proc", "/proc", "--dev", "/dev", "--chdir", "/tmp", *run]


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise HardwareError(f"{name} is not installed")
    return found


@lru_cache(maxsize=4)
def works(kind: Kind) -> bool:
    """True if this kind of sandbox works, tried with a small program: kernels and containers may forbid name spaces."""
    if kind != "none" and shutil.which({"bubblewrap": "bwrap", "unshare": "unshare"}[kind]) is None:
        return False
    return Sandbox(kind, Limits(wall_s=20.0)).run("assert 6 * 7 == 42").passed
