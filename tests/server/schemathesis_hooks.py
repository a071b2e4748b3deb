"""What schemathesis cannot know by itself; loaded in its own process."""

from __future__ import annotations

import json
from typing import Any

import schemathesis


@schemathesis.serializer("application/jsonl")
def jsonl(_context: Any, value: Any) -> bytes:
    """One JSON text a line, for batches; a string is a whole file."""
    lines = value if isinstance(value, list) else [value]
    return b"\n".join(v.encode() if isinstance(v, str) else json.dumps(v).encode() for v in lines)
