"""Which backend runs an op. A literal table: no registry, no import side effects."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

from quadriga import runtime
from quadriga.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

BACKENDS = {
    "reference": "quadriga.kernels.reference",
    "cpu": "quadriga.kernels.host",
    "triton": "quadriga.kernels.triton.backend",
}
"""Backend name -> module. The module's functions carry the names in ``quadriga.kernels.ops``."""

BY_DEVICE = {"cpu": "cpu", "cuda": "reference", "meta": "reference"}
"""torch device type -> backend used when none is forced."""

_forced: list[str] = []


@cache
def _module(name: str) -> ModuleType:
    if name not in BACKENDS:
        raise ConfigError(f"op backend must be one of {', '.join(BACKENDS)}, got {name!r}. Check QUADRIGA_OPS.")
    return importlib.import_module(BACKENDS[name])


@cache
def _from_environment() -> str | None:
    return runtime.setting("OPS")


def backend_for(x: Tensor) -> ModuleType:
    """The module whose functions run on ``x``: the innermost ``use``, else QUADRIGA_OPS, else by device."""
    name = _forced[-1] if _forced else _from_environment() or BY_DEVICE.get(x.device.type, "reference")
    return _module(name)


def forced() -> str | None:
    """The backend that the innermost ``use`` or QUADRIGA_OPS forces; None: neither does.

    Raises:
        ConfigError: there is none of that name.
    """
    name = _forced[-1] if _forced else _from_environment()
    if name is not None and name not in BACKENDS:
        raise ConfigError(f"op backend must be one of {', '.join(BACKENDS)}, got {name!r}. Check QUADRIGA_OPS.")
    return name


def compiled() -> bool:
    """True if models on a CPU run on the C++ kernels: no backend is forced, or "cpu" is."""
    return forced() in (None, "cpu")


def available() -> dict[str, str]:
    """Device type -> backend in force, for ``quadriga info``."""
    forced = _forced[-1] if _forced else _from_environment()
    return {"cpu": forced or "cpu", "cuda": forced or "reference"}


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block; for tests and comparisons, not for concurrent threads."""
    _module(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
