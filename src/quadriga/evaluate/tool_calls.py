"""Function calls that a model wrote as Python, compared with the right ones: BFCL's rules (Patil et al., 2024).

    "[area(base=10, height=5)]"  ──ast──►  [Call("area", {"base": 10, "height": 5})]  ──►  right or why not

Text is only parsed, never run. A value is right if it has the declared type and is one of the accepted values; texts
are compared without case, spaces and the signs , . / - _ * ^ as in the benchmark. A parameter may be left out where ""
is among its accepted values.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
_LISTS = ("array", "tuple")


@dataclass(frozen=True)
class Call:
    """A call: its dotted name and its arguments by name."""

    name: str
    arguments: dict[str, Any]


def parse_calls(text: str) -> list[Call]:
    """The calls of a Python list of calls, or of a single call.

    Raises:
        ValueError: the text is anything else.
    """
    try:
        body = ast.parse(text.strip().strip("'").strip(), mode="eval").body
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"no Python expression: {error}") from None
    nodes = body.elts if isinstance(body, ast.List | ast.Tuple) else [body]
    return [_call(node) for node in nodes]


def _call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call):
        raise ValueError(f"every element must be a call, got {type(node).__name__}")
    return Call(ast.unparse(node.func), {word.arg or "": _value(word.value) for word in node.keywords})


def _value(node: ast.expr) -> Any:
    """Literals as they are; names and other expressions as their text."""
    match node:
        case ast.Constant():
            return node.value
        case ast.List() | ast.Tuple():
            return [_value(one) for one in node.elts]
        case ast.Dict():
            return {ast.literal_eval(key): _value(one) for key, one in zip(node.keys, node.values, strict=True) if key}
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case _:
            return ast.unparse(node)


def wrong(text: str, functions: Sequence[Mapping[str, Any]], accepted: Sequence[Mapping[str, Any]]) -> str:
    """Why an answer's calls are not the accepted ones; empty if they are. The order of several calls is free.

    Args:
        functions: descriptions: name, parameters {properties, required}.
        accepted: for each call {name: {parameter: [accepted values]}}.
    """
    try:
        calls = parse_calls(text)
    except ValueError as error:
        return str(error)
    if len(calls) != len(accepted):
        return f"{len(accepted)} calls are right, got {len(calls)}"
    by_name = {one["name"]: one for one in functions}
    rest = list(calls)
    for wanted in accepted:
        reasons = [_wrong_call(call, by_name, wanted) for call in rest]
        if "" not in reasons:
            return reasons[0]
        del rest[reasons.index("")]
    return ""


def _wrong_call(call: Call, functions: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Any]) -> str:
    ((name, values),) = wanted.items()
    if call.name != name:
        return f"{name} must be called, got {call.name}"
    described = functions[name]["parameters"]
    for parameter in described.get("required", ()):
        if parameter not in call.arguments:
            return f"{name} needs {parameter}"
    for parameter, value in call.arguments.items():
        if parameter not in described["properties"] or parameter not in values:
            return f"{name} has no {parameter}"
        if not _right(value, values[parameter], described["properties"][parameter]["type"]):
            return f"{parameter} must be one of {values[parameter]}, got {value!r}"
    missing = [one for one, options in values.items() if one not in call.arguments and "" not in options]
    return f"{name} needs {', '.join(missing)}" if missing else ""


def _right(value: Any, options: Sequence[Any], kind: str) -> bool:
    expected = _TYPES.get(kind, str)
    if expected is float and type(value) is int:
        value = float(value)
    given = next((type(one) for one in options if one != ""), None)
    if type(value) is not expected and type(value) is not given:
        return False
    if isinstance(value, dict):
        return any(_right_dict(value, one) for one in options if isinstance(one, dict))
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return any(
            isinstance(one, list) and len(one) == len(value) and all(map(_right_dict, value, one)) for one in options
        )
    return _plain(value) in [_plain(one) for one in options]


def _right_dict(value: Any, wanted: Any) -> bool:
    """Every key is accepted with its value, and none is missing that may not be."""
    if not isinstance(value, dict) or not isinstance(wanted, dict):
        return False
    for key, one in value.items():
        if key not in wanted or _plain(one) not in [_plain(option) for option in wanted[key]]:
            return False
    return all(key in value or "" in options for key, options in wanted.items())


def _plain(value: Any) -> Any:
    """A text without case, spaces and signs; a list of such texts."""
    if isinstance(value, str):
        return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"')
    return [_plain(one) for one in value] if isinstance(value, list) else value
