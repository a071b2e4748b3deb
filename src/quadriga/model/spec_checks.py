"""What every spec of a model is held to when it is built."""

from __future__ import annotations

import math

from quadriga.errors import ConfigError


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_positive(where: str, **sizes: int) -> None:
    for name, size in sizes.items():
        is_int = isinstance(size, int) and not isinstance(size, bool)
        # 2^31 bounds every product below well inside what Python, torch and a file offset can hold.
        require(is_int and 0 < size < 2**31, f"{where}.{name} must be a positive whole number, got {size!r}")


def require_number(where: str, *, above: float = 0.0, **values: float) -> None:
    for name, value in values.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        require(is_number and value > above, f"{where}.{name} must be a finite number above {above:g}, got {value!r}")
