"""How models write calls of tools: one :class:`Form` for each way in use, chosen by what a chat template contains.

    form         written as
    hermes       <tool_call>{"name": N, "arguments": {...}}</tool_call>           Qwen2.5/3, Hermes, SmolLM3, Granite 4
    qwen3_coder  <tool_call><function=N><parameter=K>V</parameter></function></tool_call>        Qwen3-Coder, Qwen3.5/6
    glm          <tool_call>N<arg_key>K</arg_key><arg_value>V</arg_value></tool_call>                       GLM-4.5/4.6
    deepseek     calls in marks of their own, V3's with a fence around the arguments and V3.1's without
    mistral      [TOOL_CALLS][{"name": N, "arguments": {...}}] and [TOOL_CALLS]N[ARGS]{...}
    granite      <|tool_call|>[{"name": N, "arguments": {...}}]                                             Granite 3
    lfm2         <|tool_call_start|>[N(K=V)]<|tool_call_end|>
    llama3       {"name": N, "parameters": {...}}, the whole answer                                     Llama 3.1 to 3.3
    harmony      messages in channels, a call is one to functions.N                                             gpt-oss
    gemma4       <|tool_call>call:N{K:<|"|>text<|"|>,K:1}<tool_call|>                                      Gemma 4
    pythonic     [N(K=V)], the whole answer                                                             Llama 3.2 and 4

The forms are those of the models' own chat templates, as published with them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from quadriga.text.tool_calls.pieces import kinds_of

Call = tuple[str, dict[str, Any]]
"""(name, arguments)."""
Schemas = Mapping[str, Mapping[str, Any]]
"""Name of a tool -> JSON schema of its arguments: forms that write values without quotes need it to tell 1 from "1"."""
Parse = Callable[[memoryview, Schemas], list[Call]]


@dataclass(frozen=True)
class Form:
    """One way of writing calls."""

    name: str
    parse: Parse
    """What is between the marks, UTF-8, as calls; none where it is no call."""
    opens: str = ""
    """The mark before a call or calls; empty: the answer itself is one if it begins with one of ``first``."""
    closes: str = ""
    """The mark behind; empty: the answer's end."""
    first: tuple[str, ...] = ()
    peek: re.Pattern[bytes] | None = None
    """What comes right behind the mark, where it can be told without reading on."""


def _call(value: Any, arguments: str = "arguments") -> list[Call]:
    """{"name": ..., "arguments": {...}} as a call. The arguments may be the text of an object."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return []
    given = value.get(arguments, value.get("arguments"))
    if isinstance(given, str):
        given = _json(given.encode(errors="replace"))
    return [(value["name"], given)] if isinstance(given, dict) else []


def _json(raw: bytes | memoryview) -> Any:
    """A JSON text, or None. msgspec stops where the JSON does; json would count the lines up to there."""
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _text(parse: Callable[[str, Schemas], list[Call]]) -> Parse:
    """What reads a text, for bytes."""
    return lambda block, schemas: parse(str(block, "utf-8", "replace"), schemas)


def _all(calls: list[list[Call]]) -> list[Call]:
    """The calls of all parts, none if a part is no call."""
    return [call for part in calls for call in part] if all(calls) else []


def _hermes(block: memoryview, _: Schemas) -> list[Call]:
    return _call(_json(block))


_FUNCTION = re.compile(r"\s*<function=([^<>\s]{1,128})>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^<>]{1,256})>(.*?)</parameter>\s*", re.DOTALL)


def _qwen3_coder(block: str, schemas: Schemas) -> list[Call]:
    found = _FUNCTION.fullmatch(block)
    if found is None:
        return []
    name, inner = found.groups()
    arguments, at = {}, 0
    while at < len(inner) and inner[at:].strip():
        parameter = _PARAMETER.match(inner, at)
        if parameter is None:
            return []
        key, text = parameter.group(1).strip(), parameter.group(2)
        arguments[key] = value_of(text.removesuffix("\n").removeprefix("\n"), schemas.get(name, {}), key)
        at = parameter.end()
    return [(name, arguments)]


_PAIR = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)


def _glm(block: str, schemas: Schemas) -> list[Call]:
    begin = block.find("<arg_key>")
    name = (block if begin < 0 else block[:begin]).strip()
    arguments: dict[str, Any] = {}
    at = len(block) if begin < 0 else begin
    while at < len(block):
        pair = _PAIR.match(block, at)
        if pair is None:
            return []
        key = pair.group(1).strip()
        arguments[key] = value_of(pair.group(2), schemas.get(name, {}), key)
        at = pair.end()
    return [(name, arguments)] if name and not any(c.isspace() for c in name) else []


def value_of(text: str, schema: Mapping[str, Any], key: str) -> Any:
    """A value written without quotes: a text where the schema says so, JSON where it is some, else a text."""
    kinds = kinds_of(schema, key)
    if "string" in kinds:
        return None if text == "null" and "null" in kinds else text
    value = _json(text.strip().encode())
    if value is None and text.strip() != "null":
        plain = {"True": True, "False": False, "None": None}
        return plain.get(text.strip(), text)
    return value


DEEPSEEK_BEGIN, DEEPSEEK_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
DEEPSEEK_SEPARATOR = "<｜tool▁sep｜>"


def _deepseek(block: str, _: Schemas) -> list[Call]:
    calls = []
    for part in block.split(DEEPSEEK_BEGIN)[1:]:
        head, separator, rest = part.partition(DEEPSEEK_END)[0].partition(DEEPSEEK_SEPARATOR)
        if head.strip() == "function":  # V3: function, the name, and the arguments in a fence
            head, _line, rest = rest.partition("\n")
            rest = rest.strip().removeprefix("```json").removesuffix("```")
        calls.append(_call({"name": head.strip(), "arguments": rest.strip()}) if separator and head.strip() else [])
    return _all(calls)


_NAMED_ARGS = re.compile(r"\s*([^\[\]{}\s]{1,128})\s*(?:\[CALL_ID\][^\[]*)?(?:\[ARGS\])?\s*(?=\{)")


def _mistral(block: str, _: Schemas) -> list[Call]:
    text = block.strip()
    if text.startswith("["):
        return _list(text)
    calls: list[list[Call]] = []
    for part in text.split("[TOOL_CALLS]"):
        named = _NAMED_ARGS.match(part)
        calls.append(_call({"name": named.group(1), "arguments": part[named.end() :].strip()}) if named else [])
    return _all(calls)


def _list(text: str) -> list[Call]:
    value = _json(text.encode())
    return _all([_call(one) for one in value]) if isinstance(value, list) else []


def _granite(block: str, _: Schemas) -> list[Call]:
    return _list(block.strip())


def _llama3(block: str, _: Schemas) -> list[Call]:
    text = block.strip().removeprefix("<|python_tag|>")
    whole = _call(_json(text.encode()), "parameters")
    if whole:
        return whole
    calls, decoder, at = [], json.JSONDecoder(), 0
    while at < len(text):  # several, with semicolons between
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        calls.append(_call(value, "parameters"))
        while at < len(text) and text[at] in " \t\r\n;":
            at += 1
    return _all(calls)


MAX_PYTHONIC = 100_000
"""Characters of calls written as Python: the parser's memory is some hundred times its text."""


def _pythonic(block: str, _: Schemas) -> list[Call]:
    text = block.strip()
    if len(text) > MAX_PYTHONIC:
        return []
    try:
        tree = ast.parse(text, mode="eval").body
        calls = tree.elts if isinstance(tree, ast.List) else [tree]
        return _all([_of_node(node) for node in calls])
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _of_node(node: ast.expr) -> list[Call]:
    if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
        return []
    name = ast.unparse(node.func)
    arguments = {str(keyword.arg): literal(keyword.value) for keyword in node.keywords}
    return [(name, arguments)] if re.fullmatch(r"[\w.-]+", name) else []


def literal(node: ast.expr) -> Any:
    """A value; JSON's own words for true, false and null count too.

    Raises:
        ValueError: it is something to be computed.
    """
    words = {"true": True, "false": False, "null": None}
    if isinstance(node, ast.Name) and node.id in words:
        return words[node.id]
    if isinstance(node, ast.List):
        return [literal(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        if any(key is None for key in node.keys):
            raise ValueError("** is not a value")
        return {str(literal(k)): literal(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    value = ast.literal_eval(node)
    json.dumps(value)  # bytes, sets and complex numbers are nothing that a tool takes
    return value


_GEMMA_TOKEN = re.compile(r'\s*(?:<\|"\|>(?P<quoted>.*?)<\|"\|>|(?P<bare>[{}\[\]:,]|[^\s{}\[\]:,<]+))', re.DOTALL)
_DEEPEST = 64
"""Values within values that are read; a program's own depth has an end."""


def _gemma4(block: str, _: Schemas) -> list[Call]:
    found = re.fullmatch(r"\s*call:([^\s{}]{1,128})(\{.*\})\s*", block, re.DOTALL)
    if found is None:
        return []
    text = found[2]
    try:
        value, end = _gemma_value(text, 0, 0)
    except ValueError:
        return []
    return [(found[1], value)] if isinstance(value, dict) and end == len(text) else []


def _gemma_value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """(the value at a place in a text, where it ends): JSON whose strings have marks for quotes, and keys none."""
    token, at = _gemma_token(text, at)
    if token["quoted"] is not None:
        return token["quoted"], at
    if token["bare"] not in ("{", "["):
        return json.loads(token["bare"], parse_constant=_no_number), at
    if depth > _DEEPEST:
        raise ValueError("values are nested too deep")
    closes, made = "}" if token["bare"] == "{" else "]", list[tuple[str, Any]]()
    while True:
        token, behind = _gemma_token(text, at)
        if token["bare"] == closes:
            return (dict(made) if closes == "}" else [value for _, value in made]), behind
        if made:
            if token["bare"] != ",":
                raise ValueError(f"a comma or {closes} must be here")
            at = behind
        key = ""
        if closes == "}":
            name, at = _gemma_token(text, at)
            key = name["bare"] if name["quoted"] is None else name["quoted"]
            colon, at = _gemma_token(text, at)
            if colon["bare"] != ":":
                raise ValueError("a colon must be behind a key")
        value, at = _gemma_value(text, at, depth + 1)
        made.append((key, value))


def _gemma_token(text: str, at: int) -> tuple[re.Match[str], int]:
    found = _GEMMA_TOKEN.match(text, at)
    if found is None:
        raise ValueError("a value must be here")
    return found, found.end()


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


HERMES = Form("hermes", _hermes, "<tool_call>", "</tool_call>")
HARMONY = Form("harmony", lambda _block, _schemas: [])
"""Read by ``text.harmony``: its channels hold thoughts and words too."""
LLAMA3 = Form("llama3", _text(_llama3), first=("{", "<|python_tag|>"))
PYTHONIC = Form("pythonic", _text(_pythonic), first=("[",))


def _marked(name: str, parse: Callable[[str, Schemas], list[Call]], opens: str, closes: str, peek: str) -> Form:
    return Form(name, _text(parse), opens, closes, peek=re.compile(peek.encode()))


FORMS = {
    form.name: form
    for form in (
        HERMES,
        _marked("qwen3_coder", _qwen3_coder, "<tool_call>", "</tool_call>", r"\s*<function="),
        _marked("glm", _glm, "<tool_call>", "</tool_call>", r"\s*[^\s<]{1,128}\s*<(arg_key>|/tool_call>)"),
        _marked("deepseek", _deepseek, "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", rf"\s*{DEEPSEEK_BEGIN}"),
        _marked("mistral", _mistral, "[TOOL_CALLS]", "", r"\s*(\[\s*\{|[^\[\]{}\s]{1,128}\s*(\[(CALL_ID|ARGS)\]|\{))"),
        _marked("granite", _granite, "<|tool_call|>", "", r"\s*\[\s*\{"),
        _marked("lfm2", _pythonic, "<|tool_call_start|>", "<|tool_call_end|>", r"\s*\[?\s*\w"),
        _marked("gemma4", _gemma4, "<|tool_call>", "<tool_call|>", r"\s*call:"),
        LLAMA3,
        PYTHONIC,
        HARMONY,
    )
}

_SIGNS = (
    ("<|channel|>", "harmony"),
    ("<function=", "qwen3_coder"),
    ("<arg_key>", "glm"),
    ("<｜tool▁calls▁begin｜>", "deepseek"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|tool_call_start|>", "lfm2"),
    ("<|tool_call|>", "granite"),
    ("<|tool_call>", "gemma4"),
    ("<tool_call>", "hermes"),
    ("func_name1(", "pythonic"),
    ("<|python_tag|>", "llama3"),
    ('"parameters":', "llama3"),
)
"""What only templates of a form contain; the first that fits counts."""


def form_of(template: str) -> Form:
    """The form of the calls that a template asks for. One that says nothing of calls is told of hermes."""
    return FORMS[next((name for sign, name in _SIGNS if sign in template), "hermes")]
