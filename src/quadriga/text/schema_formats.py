"""JSON schemas without the ``format`` names that no grammar knows.

A format that is not known is an annotation and asserts nothing (JSON Schema 2020-12, Validation, section 7.2.1):
``path``, ``password``, ``int64`` and their like, which programs write into the schemas of their tools.
"""

from __future__ import annotations

import json
from typing import Any

KNOWN = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
"""What llguidance makes a grammar of (1.9.1)."""

_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose keys are names, not keywords."""

_DATA = frozenset({"const", "enum", "default", "examples", "example"})
"""Keywords that hold values, not schemas."""


def without_unknown(text: str) -> str:
    """A schema as JSON text without the formats that are not :data:`KNOWN`."""
    if '"format"' not in text:
        return text
    schema = json.loads(text)
    waiting, found = [schema], False
    while waiting:  # no recursion: a schema may be nested deep
        part: Any = waiting.pop()
        if isinstance(part, list):
            waiting.extend(part)
        if not isinstance(part, dict):
            continue
        name = part.get("format")
        if isinstance(name, str) and name not in KNOWN:
            del part["format"]
            found = True
        for key, value in part.items():
            if key in _NAMED and isinstance(value, dict):
                waiting.extend(value.values())
            elif key not in _DATA:
                waiting.append(value)
    return json.dumps(schema) if found else text
