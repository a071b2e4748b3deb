"""The C++ kernels of ``csrc`` as Python calls them: loading, checking, errors, contexts; nothing that decides.

The library is built by ``pip install .`` (or ``make build`` for a checkout) for three instruction sets, x86-64's or
64-bit ARM's; the best one that the processor has is used, QUADRIGA_CPU_ISA names another. Structures, numbers and
parameters come from :mod:`quadriga.kernels.cpu.bindings`, which is generated from ``csrc/quadriga.h``; the library
carries that header's hash and says where its compiler put every field, and both must be what Python has.

ctypes releases the interpreter's lock during a call. Threads that call one context wait for each other inside it.
"""

from __future__ import annotations

import ctypes as c
import threading
from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from quadriga import runtime
from quadriga.errors import CheckpointError, ConfigError, EngineError, HardwareError, QuadrigaError
from quadriga.kernels.cpu import bindings
from quadriga.kernels.cpu.bindings import MOST_THREADS, Batch, Message, Status, Step

Function = Callable[..., int]
"""One of the library's functions that return a status."""


def codes(enum: type[IntEnum]) -> dict[str, int]:
    """What Python calls a thing -> its number in quadriga.h: the header's own word in lower case."""
    return {member.name.lower(): int(member) for member in enum}


ISAS = tuple(codes(bindings.Isa))
"""Index = number in quadriga.h; of one processor family each has all instructions of the ones before it."""

FORMATS = codes(bindings.Format)
KV_FORMATS = codes(bindings.KvFormat)
SOURCES = codes(bindings.Source)
ACTIVATIONS = codes(bindings.Activation)
NORMS = codes(bindings.NormKind)
AGGREGATES = codes(bindings.Aggregate)
SCORES = codes(bindings.Score)

_ERRORS: dict[int, tuple[type[QuadrigaError], str]] = {
    Status.BAD_ARGUMENT: (ConfigError, "the CPU kernels cannot do this: {}"),
    Status.OUT_OF_MEMORY: (
        HardwareError,
        "out of memory in the CPU kernels: {}. Free some, or ask for less at once: fewer tokens a pass "
        "(max_batch_tokens), fewer threads.",
    ),
    Status.NO_THREAD: (HardwareError, "the system starts no more threads: {}. Ask for fewer."),
    Status.NO_INSTRUCTIONS: (HardwareError, "{}. Unset QUADRIGA_CPU_ISA."),
    Status.READ_FAILED: (CheckpointError, "{}"),
    Status.FAILED: (EngineError, "the CPU kernels failed: {}"),
}
"""Status -> the error, and what it says around the library's own message."""


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.message = Message()


_of_thread = _OfThread()


def address(values: NDArray[Any]) -> int | None:
    """Where a contiguous array lies; several times as fast as ``values.ctypes``, which counts a dozen times a step.

    Raises:
        TypeError: it is not contiguous, or may not be written to.
    """
    return c.addressof(c.c_char.from_buffer(values.data)) if values.size else None


def call(function: Function, *arguments: Any) -> None:
    """Call a function of the library.

    Raises:
        HardwareError: no memory or no thread is left, or the processor lacks instructions.
        ConfigError, CheckpointError, EngineError: see ``_ERRORS``.
    """
    message = _of_thread.message
    status = function(*arguments, message)
    if status:
        error, says = _ERRORS[status]
        raise error(says.format(message.text.decode(errors="replace")))


def library_path() -> Path:
    """Where the compiled kernels are: QUADRIGA_LIBRARY, else beside this module."""
    return Path(runtime.setting("LIBRARY") or Path(__file__).with_name("quadriga_cpu.so"))


@lru_cache(maxsize=1)
def library() -> c.CDLL:
    """The loaded library; every function has its parameters.

    Raises:
        HardwareError: it was not built, or not from this package's header.
    """
    path = library_path()
    try:
        loaded = c.CDLL(str(path))
    except OSError as error:
        raise HardwareError(
            f"the CPU kernels cannot be loaded from {path.name}: {error}. Build them with `pip install .` or "
            "`make build`, or use plain torch with QUADRIGA_OPS=reference."
        ) from None
    difference = _difference(loaded)
    if difference is not None:
        raise HardwareError(
            f"{path.name} does not belong to this version of Quadriga: {difference}. Build it again with "
            "`pip install .` or `make build`."
        )
    return loaded


def _difference(loaded: c.CDLL) -> str | None:
    """How the library differs from the bindings; None: it does not, and its functions are ready to be called."""
    try:
        for name, result in bindings.CONSTANT_DATA.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, []
        for name, parameters in bindings.PARAMETERS.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = c.c_int32, parameters
    except AttributeError:
        return f"it has no function {name}"
    if loaded.qd_header_sha256().decode() != bindings.HEADER_SHA256:
        return "it was built from another quadriga.h"
    theirs, ours = _fields_of(loaded), _fields_here()
    for name in sorted({*theirs, *ours}):
        if theirs.get(name) != ours.get(name):
            return f"{name} lies at (offset, bytes) {theirs.get(name)} in it, at {ours.get(name)} in Python"
    return None


def _fields_of(loaded: c.CDLL) -> dict[str, tuple[int, int]]:
    table: dict[str, tuple[int, int]] = {}
    rows = loaded.qd_fields()
    while (row := rows[len(table)]).name:
        table[row.name.decode()] = (row.offset, row.bytes)
    return table


def _fields_here() -> dict[str, tuple[int, int]]:
    table: dict[str, tuple[int, int]] = {}
    for name, struct in bindings.STRUCTS.items():
        table[name] = (0, c.sizeof(struct))
        for field in struct._fields_:
            place = getattr(struct, field[0])
            table[f"{name}.{field[0]}"] = (place.offset, place.size)
    return table


@lru_cache(maxsize=1)
def isas_of_processor() -> tuple[str, ...]:
    """The instruction sets that the library and this processor have, the best one last."""

    def has(number: int) -> bool:
        answer = c.c_int32()
        call(library().qd_has_isa, number, c.byref(answer))
        return bool(answer.value)

    return tuple(name for number, name in enumerate(ISAS) if has(number))


@lru_cache(maxsize=1)
def isa() -> str:
    """The instruction set in force: QUADRIGA_CPU_ISA, else the best this processor has.

    Raises:
        ConfigError: QUADRIGA_CPU_ISA names none of ISAS.
    """
    chosen = runtime.setting("CPU_ISA")
    if chosen is None:
        return isas_of_processor()[-1]
    if chosen not in ISAS:
        raise ConfigError(f"QUADRIGA_CPU_ISA must be one of {', '.join(ISAS)}; got {chosen!r}")
    return chosen


def isas_in_force() -> tuple[str, ...]:
    """Those of this processor up to :func:`isa`: what tests compare."""
    here = isas_of_processor()
    return here[: here.index(isa()) + 1]


class Context:
    """Threads and scratch memory. Threads of Python may share one: their calls take turns.

    Args:
        threads: how many threads compute, the caller included: 1 to MOST_THREADS.
        isa_name: one of ISAS; None takes :func:`isa`.

    Raises:
        ConfigError: a number of threads that cannot be, an instruction set nobody knows.
        HardwareError: the processor lacks the instruction set, or the system does not start so many threads.
    """

    def __init__(self, threads: int, isa_name: str | None = None) -> None:
        self.handle: int | None = None
        self.lib = library()
        # ctypes would cut a larger number to 32 bits in silence.
        if not isinstance(threads, int) or not 1 <= threads <= MOST_THREADS:
            raise ConfigError(f"threads must be a whole number from 1 to {MOST_THREADS}, got {threads!r}")
        self.threads = threads
        self.isa = isa_name or isa()
        if self.isa not in ISAS:
            raise ConfigError(f"the instruction set must be one of {', '.join(ISAS)}; got {self.isa!r}")
        if self.isa not in isas_of_processor():
            raise HardwareError(
                f"the kernels for {self.isa} need instructions this processor lacks; it has {isas_of_processor()[-1]}. "
                "Unset QUADRIGA_CPU_ISA."
            )
        handle = c.c_void_p()
        call(self.lib.qd_create, threads, ISAS.index(self.isa), c.byref(handle))
        self.handle = handle.value

    def call(self, function: Function, *arguments: Any) -> None:
        """Call a function whose first parameter is a context with this one; see :func:`call` for what it raises."""
        call(function, self.handle, *arguments)

    def set_int16(self, int16: bool) -> None:
        """Activations that meet q8, q4, q4m and mx4 matrices: 15 bits instead of 8."""
        self.call(self.lib.qd_set_int16, int16)

    def run(self, steps: c.Array[Step], batch: Batch) -> None:
        """A captured sequence of ops over one batch.

        Raises:
            HardwareError: no room for the intermediate results.
            CheckpointError: experts on disk could not be read.
        """
        self.call(self.lib.qd_run, steps, len(steps), batch)

    def __del__(self) -> None:
        handle, self.handle = getattr(self, "handle", None), None
        if handle:
            self.lib.qd_destroy(handle, None)
