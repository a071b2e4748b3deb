"""Formats that are annotations are taken out of schemas; names and values that look like them are not."""

from __future__ import annotations

import json

import llguidance
import pytest

from quadriga.text.schema_formats import KNOWN, without_unknown


def test_only_formats_go_that_nobody_knows() -> None:
    schema = {
        "type": "object",
        "properties": {
            "format": {"type": "string", "format": "password"},
            "default": {"type": "string", "format": "path"},
            "when": {"type": "string", "format": "date-time"},
            "kept": {"const": {"format": "path"}, "default": {"format": "path"}, "enum": [{"format": "path"}]},
            "list": {"items": {"anyOf": [{"format": "int64", "type": "integer"}, {"format": "zzz"}]}},
        },
        "$defs": {"enum": {"format": "binary"}},
        "format": "x",
    }
    seen = json.loads(without_unknown(json.dumps(schema)))
    properties = seen["properties"]
    assert properties["format"] == properties["default"] == {"type": "string"}
    assert properties["when"] == {"type": "string", "format": "date-time"}
    assert properties["kept"] == schema["properties"]["kept"]  # type: ignore[index]
    assert properties["list"] == {"items": {"anyOf": [{"type": "integer"}, {}]}}
    assert seen["$defs"] == {"enum": {}} and "format" not in seen
    same = json.dumps({"type": "string", "format": "uri"})
    assert without_unknown(same) is same


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_what_counts_as_known_is_known(name: str) -> None:
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "format": name}))
    assert not llguidance.LLMatcher.validate_grammar(grammar, None)
