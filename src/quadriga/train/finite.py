"""Refuse numbers of a configuration that are no numbers: TOML writes nan and inf, and no comparison refuses nan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from quadriga.errors import ConfigError


def refuse_not_finite(value: Any, name: str = "") -> None:
    """Check every number in nested tables and lists.

    Args:
        value: plain values, as ``msgspec.to_builtins`` makes them.
        name: the dotted name of ``value``, used in the message.

    Raises:
        ConfigError: one is nan or infinite.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value}")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            refuse_not_finite(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            refuse_not_finite(inner, f"{name}[{i}]")
