"""The layouts in which files keep conversations, as turns that ``text.chat.render`` takes.

    messages        [{"role", "content", "tool_calls"?, "tool_call_id"?, "reasoning_content"?, "weight"?}]        OpenAI
    conversations   [{"from": "human" | "gpt" | "function_call" | "observation" | ..., "value"}]                ShareGPT
    instruction, input?, output                                                                                   Alpaca
    instruction, context, response                                                                                 Dolly
    prompt, response | completion                                                                            LLM Foundry
    question, answer                                                                                               GSM8K

Beside any of them ``tools``: the functions that the assistant may call, a list or the JSON text of one. Content may be
text or parts of type "text", which are joined. A row with what a model of text cannot learn (images, audio, refusals)
cannot be used. ``weight`` 0, as in OpenAI's files, excludes an answer from the loss.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quadriga.errors import CorpusError

Turns = list[dict[str, Any]]
"""role and content (text) each; an assistant's may have tool_calls with arguments as objects, and weight 0 or 1."""

_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "developer": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_TEXT_PARTS = ("text", "input_text", "output_text")
_REFUSED = ("function_call", "audio", "refusal")
"""Keys of OpenAI's messages that change what an answer is, and that no chat template here reads."""


class BadRowError(CorpusError):
    """A row that cannot be used; caught and counted by ``chat_data.read``."""


def conversation(row: Mapping[str, Any]) -> Turns:
    """Convert a row of any known layout to turns.

    Raises:
        BadRowError: unknown layout, or fields that are not text.
    """
    if "messages" in row:
        return turns_of(row["messages"], "messages")
    if "conversations" in row:
        return turns_of(row["conversations"], "conversations")
    for question, context, answer in (
        ("instruction", "input", "output"),
        ("instruction", "context", "response"),
        ("prompt", None, "response"),
        ("prompt", None, "completion"),
        ("question", None, "answer"),
    ):
        if question in row and answer in row:
            asked = text_of(row[question], question)
            extra = text_of(row.get(context) or "", context) if context else ""
            return [
                {"role": "user", "content": f"{asked}\n\n{extra}" if extra.strip() else asked},
                {"role": "assistant", "content": text_of(row[answer], answer)},
            ]
    raise BadRowError(f"unknown columns: {', '.join(sorted(map(str, row)))[:80]}")


def turns_of(value: object, name: str = "an answer") -> Turns:
    """A list of turns, OpenAI's or ShareGPT's.

    Raises:
        BadRowError: no list, or a turn that is neither.
    """
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{name} is not a list of turns")
    shared = isinstance(value[0], dict) and "from" in value[0]
    return [_shared(turn) if shared else _message(turn) for turn in value]


def tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The functions of a row's ``tools``, as OpenAI writes them; None if it has none.

    Raises:
        BadRowError: something else than functions with names.
    """
    given = row.get("tools")
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else None
        except (ValueError, RecursionError):
            raise BadRowError("tools is not JSON") from None
    if not given:
        return None
    if not isinstance(given, list):
        raise BadRowError("tools is not a list of functions")
    found = []
    for tool in given:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRowError("tools is not a list of functions with names")
        found.append({"type": "function", "function": function})
    return found


def text_of(value: object, name: str) -> str:
    """A text, or text parts joined.

    Raises:
        BadRowError: neither.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadRowError(f"{name} is not text")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise BadRowError(f"{name} has a part that is not text: {kind!r}"[:80])
    return "".join(part["text"] for part in value)


def _message(turn: object) -> dict[str, Any]:
    """A turn of OpenAI's messages."""
    calls = turn.get("tool_calls") if isinstance(turn, dict) else None
    if not isinstance(turn, dict) or "role" not in turn or ("content" not in turn and not calls):
        raise BadRowError("a turn needs role and content")
    refused = [name for name in _REFUSED if turn.get(name)]
    if refused:
        raise BadRowError(f"a turn has {refused[0]}, which no chat template reads")
    role = _speaker(turn["role"])
    content = turn.get("content")
    made: dict[str, Any] = {"role": role, "content": "" if content is None and calls else text_of(content, "content")}
    if calls:
        if role != "assistant":
            raise BadRowError("only the assistant makes tool calls")
        made["tool_calls"] = _calls(calls)
    if role == "tool":
        made |= {key: text_of(turn[key], key) for key in ("tool_call_id", "name") if turn.get(key) is not None}
    if role == "assistant" and turn.get("reasoning_content"):
        made["reasoning_content"] = text_of(turn["reasoning_content"], "reasoning_content")
    return made | _weight(turn)


def _shared(turn: object) -> dict[str, Any]:
    """A turn of ShareGPT's conversations; a call is JSON, ``{"name": ..., "arguments": {...}}`` or a list of such."""
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise BadRowError("a turn needs from and value")
    value = text_of(turn["value"], "value")
    if turn["from"] != "function_call":
        return {"role": _speaker(turn["from"]), "content": value} | _weight(turn)
    try:
        calls = json.loads(value)
    except (ValueError, RecursionError):
        raise BadRowError("a function_call is not JSON") from None
    return {"role": "assistant", "content": "", "tool_calls": _calls(calls if isinstance(calls, list) else [calls])}


def _speaker(name: object) -> str:
    if not isinstance(name, str) or name not in _SPEAKERS:
        raise BadRowError(f"unknown speaker: {name!r}"[:80])
    return _SPEAKERS[name]


def _weight(turn: Mapping[str, Any]) -> dict[str, int]:
    weight = turn.get("weight")
    if weight is None:
        return {}
    if weight not in (0, 1):
        raise BadRowError(f"the weight of a turn is 0 or 1: got {weight!r}"[:80])
    return {} if weight else {"weight": 0}


def _calls(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise BadRowError("tool_calls is not a list")
    found = []
    for call in value:
        function = call.get("function", call) if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError):
                arguments = None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(arguments, dict) or not isinstance(name, str) or not name:
            raise BadRowError("a tool call needs a name, and arguments that are an object or the JSON text of one")
        made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
        if isinstance(call.get("id"), str):
            made["id"] = call["id"]
        found.append(made)
    return found
