"""Facts about this machine and this process: memory, processor, folders, threads, dtypes and devices.

The only module that touches ``os.environ``. No torch: its devices and dtypes are in ``nn.devices``.

Environment variables (all optional):

    QUADRIGA_CACHE      folder for downloaded models and histories   (default: the user's cache folder / quadriga)
    QUADRIGA_DATA       folder with benchmark and training data, looked into before what was fetched
    QUADRIGA_MIRROR     where data sets' addresses are asked for instead: https://HOST/PATH as MIRROR/HOST/PATH
    QUADRIGA_OPS        force an op backend, e.g. "reference"
    QUADRIGA_CPU_ISA    force a CPU instruction set: avx512, avx2, i8mm, neon or portable
    QUADRIGA_LIBRARY    another build of the CPU kernels, e.g. one with sanitizers
    QUADRIGA_DEBUG      1: commands show tracebacks
    QUADRIGA_COMMAND_OPTION   an option's default, e.g. QUADRIGA_SERVE_PORT (cli.settings)
    QUADRIGA_LOG        what is logged: a level (debug), or levels of rooms (engine=debug,server=info)

torchrun's LOCAL_RANK, RANK, WORLD_SIZE and MASTER_ADDR say whether this process is one of several, LOCAL_WORLD_SIZE how
many of them are on this machine.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import platform
import queue
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import ParamSpec, TypeVar

from quadriga.errors import ConfigError, HardwareError

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Names accepted wherever a model's dtype is asked for."""

MOST_THREADS = 1024
"""As in quadriga.h: more than any machine has processors, fewer than a system refuses to start."""

DTYPE_ALIASES = {"f32": "float32", "fp32": "float32", "bf16": "bfloat16", "f16": "float16", "fp16": "float16"}

DTYPE_NAMES = (*DTYPES, *DTYPE_ALIASES)
"""With the short forms."""


def setting(name: str) -> str | None:
    """The environment variable QUADRIGA_<name>, or None if it is unset or empty."""
    return os.environ.get(f"QUADRIGA_{name}") or None


def settings() -> list[str]:
    """The names of all that is set, without QUADRIGA_."""
    return sorted(name.removeprefix("QUADRIGA_") for name in os.environ if name.startswith("QUADRIGA_"))


def debug() -> bool:
    """True if commands should show tracebacks."""
    return setting("DEBUG") == "1"


def set_debug() -> None:
    """Make :func:`debug` true for this process and its children."""
    os.environ["QUADRIGA_DEBUG"] = "1"


def set_log_level(levels: str, where: str) -> None:
    """From now on log at a level (``info``), or at levels of rooms (``engine=debug,server=info``).

    Args:
        where: what said so, for the error.

    Raises:
        ConfigError: there is no such level.
    """
    for part in levels.split(","):
        room, _, level = part.strip().rpartition("=")
        number = logging.getLevelNamesMapping().get(level.upper())
        if number is None:
            names = "debug, info, warning, error or critical"
            raise ConfigError(f"{where} must be {names}, or ROOM=LEVEL of several rooms; got {part[:80]!r}")
        logging.getLogger(f"quadriga.{room}" if room else "quadriga").setLevel(number)


def start_logging(default: str = "warning") -> None:
    """Send what ``quadriga.*`` logs to standard error, at the levels that QUADRIGA_LOG names. For programs only.

    Raises:
        ConfigError: QUADRIGA_LOG names no level.
    """
    set_log_level(setting("LOG") or default, "QUADRIGA_LOG")
    logger = logging.getLogger("quadriga")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def cache_dir() -> Path:
    """Where downloaded models, vocabularies and chat histories are kept; not created here."""
    chosen = setting("CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quadriga"


def config_file() -> Path:
    """The user's file of options: config.toml in $XDG_CONFIG_HOME/quadriga, else in ~/.config/quadriga."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "quadriga" / "config.toml"


def data_dir() -> Path | None:
    """The user's folder of benchmark and training data, QUADRIGA_DATA; None if it is not set."""
    chosen = setting("DATA")
    return Path(chosen).expanduser() if chosen else None


def free_disk_bytes(path: Path) -> int:
    """Bytes free on the disk where ``path`` lies, or would lie."""
    import shutil

    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def child_environment() -> dict[str, str]:
    """A copy of this process's environment, for starting another program."""
    return dict(os.environ)


def memory_bytes() -> tuple[int, int]:
    """(total, available) bytes of main memory; available counts caches the kernel would give back."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
        return page * pages, page * pages
    kib = {key: int(rest.split()[0]) for key, rest in (line.split(":", 1) for line in lines) if rest.split()}
    return kib["MemTotal"] * 1024, kib.get("MemAvailable", kib["MemFree"]) * 1024


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of the first processor as the kernel names them; empty where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def cpu_name() -> str:
    """The processor's name as the kernel gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_count() -> int:
    """Processors this process may run on (affinity respected)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def n_threads(threads: int | None) -> int:
    """How many threads compute: ``threads``, or one for each processor of this process if None.

    Raises:
        ConfigError: not a whole number from 1 to MOST_THREADS.
    """
    count = min(cpu_count(), MOST_THREADS) if threads is None else threads
    if not isinstance(count, int) or not 1 <= count <= MOST_THREADS:
        raise ConfigError(f"threads must be a whole number from 1 to {MOST_THREADS}, got {threads!r}")
    return count


def without_torch(what: str, extra: str = "torch") -> HardwareError:
    """The error of what needs torch where it is not installed.

    Args:
        what: what needs it, as the beginning of a sentence.
        extra: of this project's, the one that has all that is needed.
    """
    return HardwareError(
        f"{what} needs torch, which is not installed: {install_hint(extra)}. README.md has the line for the small "
        "build that a CPU needs."
    )


def install_hint(extra: str) -> str:
    """How an extra of this project is installed: from a clone or a wheel, for no package index has it."""
    return f"pip install '.[{extra}]' in a clone of Quadriga, or 'WHEEL[{extra}]' with its wheel"


P = ParamSpec("P")
R = TypeVar("R")

_LANE_STACK_BYTES = 64 << 20
_lanes = threading.Lock()


class Lane:
    """Threads for work that others must not wait for: what is submitted is done in order, beside everything else.

    Not ``concurrent.futures.ThreadPoolExecutor``: these threads have stacks of 64 MB, may give way to other threads,
    and keep no process from ending. They are started with the first work.

    Args:
        name: of the threads.
        n_threads: how many work at once.
        nice: how much they give way to other threads where both want a processor, 0 to 19 (Linux only).
    """

    def __init__(self, name: str, *, n_threads: int = 1, nice: int = 0) -> None:
        self._name, self._n_threads, self._nice = name, n_threads, nice
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._started = False

    def submit(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Do something there; its result comes as a future."""
        future: Future[R] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(*args, **kwargs))
                except BaseException as error:
                    future.set_exception(error)

        if not self._started:
            self._start()
        self._work.put(run)
        return future

    def close(self) -> None:
        """Let the threads end once they have done what was submitted; nothing may be submitted any more."""
        if self._started:
            for _ in range(self._n_threads):
                self._work.put(None)

    def _start(self) -> None:
        with _lanes:
            if self._started:
                return
            self._started = True
            before = threading.stack_size(_LANE_STACK_BYTES)  # of the threads that are started next
            try:
                for _ in range(self._n_threads):
                    threading.Thread(target=self._run, name=self._name, daemon=True).start()
            finally:
                threading.stack_size(before)

    def _run(self) -> None:
        if self._nice and hasattr(os, "setpriority") and platform.system() == "Linux":
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._nice)  # Linux: of this thread only
        while (work := self._work.get()) is not None:
            work()
            del work  # it holds what it was about


def check_device(name: str, spelled: str = "device") -> None:
    """Refuse a name that is no device Quadriga computes on; whether it is there, ``nn.devices`` finds out.

    Raises:
        ConfigError: naming it as ``spelled``.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", name):
        apple = " Apple's GPUs are not supported; on a Mac the CPU computes." if name.startswith("mps") else ""
        raise ConfigError(f"{spelled} must be like cpu, cuda or cuda:1, or auto; got {name!r}.{apple}")


def launched_rank() -> int | None:
    """This process's number on its machine if torchrun started it, else None."""
    rank = os.environ.get("LOCAL_RANK")
    return int(rank) if rank is not None and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ else None


def launched_ranks() -> int | None:
    """How many processes torchrun has started with this one, on all machines together; None: it has not."""
    return None if launched_rank() is None else int(os.environ["WORLD_SIZE"])


def follows() -> bool:
    """True if torchrun has started this process, and another one is the first of all."""
    return launched_rank() is not None and os.environ.get("RANK") != "0"


def threads_of_rank() -> int:
    """One thread for each processor of this process that no other rank on this machine has a claim to."""
    return max(1, n_threads(None) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def prefer_short_pauses() -> None:
    """Keep this process responsive in all its threads: for servers, when what stays is loaded. Process-wide.

    Everything alive now is left out of garbage collections from now on: looking through torch's quarter of a million
    objects stops every thread for 0.1 s or more. And a thread that computes in Python hands over after 1 ms, not 5: one
    that answers a request waits for its turn several times.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(0.001)


def release_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it and can be asked (glibc)."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory instead of giving it back: for programs that free and take much, often.

    A training step frees and takes gigabytes in large pieces. By default glibc maps each piece afresh and the kernel
    fills it with zeros, page by page: 0.6 million page faults a step of a 62M-parameter model. Returns False where the
    C library has no such switch. Process-wide, so only commands call it.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, -1) and mallopt(m_top_pad, 64 << 20))
