"""The C++ kernels of ``ops/csrc``, bound by ctypes: structures, functions, and nothing that decides anything.

ctypes releases the interpreter's lock during a call. A context belongs to one thread at a time. The library is built by
``pip install .`` (or ``make build`` for a checkout) for three instruction sets; the best one that the processor has is
used, QUADRIGA_CPU_ISA names another. Mirrors ``csrc/quadriga.h``; ``qd_abi`` is how both sides know they agree.
"""

from __future__ import annotations

import ctypes as c
from functools import lru_cache
from pathlib import Path
from typing import Any

from quadriga import runtime
from quadriga.errors import ConfigError, HardwareError

ISAS = ("portable", "avx2", "avx512")
"""Index = number in quadriga.h."""

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
NORMS = {"layer": 0, "rms": 1}
AGGREGATES = {"weighted_sum": 0, "vote": 1, "fuse": 2}
SOURCES = {"float32": 0, "bfloat16": 1, "float16": 2, "q8_0": 3, "q4_0": 4, "q4_1": 5}
EMBED, QKV, ATTEND, ATTENTION_OUT, FFN, HEAD = range(6)

_ABI = 3
_ERRORS = {1: "an unknown op", 2: "out of memory"}


class Matrix(c.Structure):
    _fields_ = [
        ("data", c.c_void_p),
        ("rows", c.c_int64),
        ("cols", c.c_int64),
        ("format", c.c_int32),
        ("reserved", c.c_int32),
    ]


class Norm(c.Structure):
    _fields_ = [("weight", c.c_void_p), ("kind", c.c_int32), ("eps", c.c_float)]


class Embed(c.Structure):
    _fields_ = [("table", Matrix), ("scale", c.c_float)]


class Attention(c.Structure):
    _fields_ = [
        ("norm", Norm),
        ("post_norm", Norm),
        ("wqkv", Matrix),
        ("wo", Matrix),
        ("n_heads", c.c_int32),
        ("n_kv_heads", c.c_int32),
        ("head_dim", c.c_int32),
        ("kv_format", c.c_int32),
        ("clip", c.c_float),
        ("score_scale", c.c_float),
        ("soft_cap", c.c_float),
        ("inverse_frequencies", c.c_void_p),
        ("alibi_slopes", c.c_void_p),
        ("kv", c.c_void_p),
    ]


class FFN_(c.Structure):
    _fields_ = [
        ("norm", Norm),
        ("post_norm", Norm),
        ("router", Matrix),
        ("gate", c.POINTER(Matrix)),
        ("up", c.POINTER(Matrix)),
        ("down", c.POINTER(Matrix)),
        ("n_experts", c.c_int32),
        ("top_k", c.c_int32),
        ("activation", c.c_int32),
        ("aggregate", c.c_int32),
        ("layer", c.c_int32),
        ("reserved", c.c_int32),
        ("normalize_p", c.c_float),
        ("reserved_float", c.c_float),
        ("fuse", c.c_void_p),
        ("load", c.c_void_p),
        ("ids", c.c_void_p),
        ("weights", c.c_void_p),
        ("logits", c.c_void_p),
        ("store", c.c_void_p),
    ]


class Head(c.Structure):
    _fields_ = [("norm", Norm), ("weight", Matrix), ("logit_scale", c.c_float), ("reserved", c.c_int32)]


class Batch(c.Structure):
    _fields_ = [
        ("n_tokens", c.c_int32),
        ("n_sequences", c.c_int32),
        ("n_rows", c.c_int32),
        ("reserved", c.c_int32),
        ("tokens", c.c_void_p),
        ("positions", c.c_void_p),
        ("starts", c.c_void_p),
        ("tables", c.c_void_p),
        ("table_starts", c.c_void_p),
        ("rows", c.c_void_p),
        ("logits", c.c_void_p),
        ("hidden", c.c_void_p),
    ]


class Step(c.Structure):
    _fields_ = [("kind", c.c_int32), ("reserved", c.c_int32), ("op", c.c_void_p)]


_p, _i32, _i64 = c.c_void_p, c.c_int32, c.c_int64
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "qd_abi": (_i32, []),
    "qd_best_isa": (_i32, []),
    "qd_create": (_p, [_i32, _i32]),
    "qd_destroy": (None, [_p]),
    "qd_set_fine": (None, [_p, _i32]),
    "qd_packed_bytes": (_i64, [_i32, _i64, _i64]),
    "qd_kv_bytes": (_i64, [_i32, _i32]),
    "qd_pack": (_i64, [_p, _i32, _p, _i64, _i64, _i64, _i32, _p, _p]),
    "qd_unpack": (None, [_p, _i32, _p, _i64, _i64, _i64, _i64, _p]),
    "qd_run": (_i32, [_p, c.POINTER(Step), _i32, c.POINTER(Batch)]),
    "qd_linear": (None, [_p, c.POINTER(Matrix), _p, _i64, _p]),
    "qd_norm_rows": (None, [_p, c.POINTER(Norm), _p, _i64, _i64, _p]),
    "qd_row_stats": (None, [_p, _p, _i64, _i64, _p, _p]),
    "qd_gather_rows": (None, [_p, _p, _i64, _p, _i64, _p]),
    "qd_sum_rows": (None, [_p, _i32, _p, _p, _i64, _i64, _i64, _p]),
    "qd_hidden": (None, [_p, _i32, _i32, _p, _p, _p, _i64, _i64, _p]),
    "qd_hidden_back": (None, [_p, _i32, _i32, _p, _p, _p, _i64, _i64, _p, _p, _p, _p]),
    "qd_attention_softmax": (_i32, [_p, _i32, _p, _p, _i64, _i64, _i64, _i64, _i64, _p]),
    "qd_attention_softmax_back": (None, [_p, _i32, _p, _p, _p, _i64, _i64, _i64, _i64, _i64]),
    "qd_cross_entropy": (_i32, [_p, _i32, _p, _p, _i64, _i64, c.c_float, _i32, _p]),
    "qd_read_bandwidth": (c.c_double, [_p, _p, _i64, _i32]),
    "qd_peak": (c.c_double, [_p, _i32, _i64]),
    "qd_store_create": (_p, [_i32, _i32, _i32, _p, _p, _p, _i64, _i32]),
    "qd_store_destroy": (None, [_p]),
    "qd_store_stats": (None, [_p, _p]),
}


def library_path() -> Path:
    """Where the compiled kernels are: QUADRIGA_LIBRARY, else beside this module."""
    return Path(runtime.setting("LIBRARY") or Path(__file__).with_name("quadriga_cpu.so"))


@lru_cache(maxsize=1)
def library() -> c.CDLL:
    """The loaded library.

    Raises:
        HardwareError: it was not built, or belongs to another version of this package.
    """
    path = library_path()
    try:
        loaded = c.CDLL(str(path))
    except OSError as error:
        raise HardwareError(
            f"the CPU kernels cannot be loaded from {path.name}: {error}. Build them with `pip install .` or "
            "`make build`, or use plain torch with QUADRIGA_OPS=reference."
        ) from None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    expected = _ABI * 100000 + sum(c.sizeof(s) for s in (Attention, FFN_, Head, Batch, Embed))
    if loaded.qd_abi() != expected:
        raise HardwareError(f"{path.name} is of another version of Quadriga; build it again with `make build`")
    return loaded


@lru_cache(maxsize=1)
def isa() -> str:
    """The instruction set in force: QUADRIGA_CPU_ISA, else the best this processor has.

    Raises:
        ConfigError: QUADRIGA_CPU_ISA names none of ISAS.
    """
    chosen = runtime.setting("CPU_ISA")
    if chosen is None:
        return ISAS[library().qd_best_isa()]
    if chosen not in ISAS:
        raise ConfigError(f"QUADRIGA_CPU_ISA must be one of {', '.join(ISAS)}; got {chosen!r}")
    return chosen


class Context:
    """Threads and scratch memory of one user at a time.

    Args:
        threads: how many threads compute, the caller included.
        isa_name: one of ISAS; None takes :func:`isa`.

    Raises:
        HardwareError: the processor lacks the instruction set.
    """

    def __init__(self, threads: int, isa_name: str | None = None) -> None:
        self.lib = library()
        self.threads = threads
        self.isa = isa_name or isa()
        self.handle = self.lib.qd_create(threads, ISAS.index(self.isa))
        if not self.handle:
            raise HardwareError(
                f"the kernels for {self.isa} need instructions this processor lacks; it has "
                f"{ISAS[self.lib.qd_best_isa()]}. Unset QUADRIGA_CPU_ISA."
            )

    def set_fine(self, fine: bool) -> None:
        """Activations that meet q8, q4 and q4m matrices: 15 bits instead of 8."""
        self.lib.qd_set_fine(self.handle, int(fine))

    def run(self, steps: c.Array[Step], batch: Batch) -> None:
        """A captured sequence of ops over one batch.

        Raises:
            MemoryError: no room for the intermediate results.
        """
        self.check(self.lib.qd_run(self.handle, steps, len(steps), c.byref(batch)))

    @staticmethod
    def check(code: int) -> None:
        """What a function that may fail returned.

        Raises:
            MemoryError: no room for the intermediate results.
        """
        if code:
            raise MemoryError(f"the CPU kernels stopped: {_ERRORS[code]}")

    def __del__(self) -> None:
        handle, self.handle = getattr(self, "handle", None), None
        if handle:
            self.lib.qd_destroy(handle)
