"""JSON files that came with a model: bounded, and never with a key twice. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quadriga.errors import CheckpointError

_MAX_BYTES = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, too large, not JSON, not an object, or with a key twice.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise CheckpointError(f"{path.name} has {size} bytes; at most {_MAX_BYTES} are read")
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    return parse_json(raw, path.name)


def parse_json(raw: bytes, name: str) -> dict[str, Any]:
    """A JSON object from bytes; ``name`` is for the messages. Raises as :func:`read_json`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in table if keys.count(key) > 1)
            raise CheckpointError(f"{name} has the key {twice[:80]!r} twice")
        return table

    try:
        value = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} must be a JSON object, got {type(value).__name__}")
    return value
