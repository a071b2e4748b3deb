"""Calls over HTTP: one that is asked for always comes, whatever the budget; its arguments come as they are written."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.conftest import Live

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
ASKED = {"messages": [{"role": "user", "content": "Rain?"}], "seed": 3}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
OPENAI = {**ASKED, "tools": [TOOL], "tool_choice": "required"}
SHORTEST = len('[{"name": "weather", "arguments": {"city": "", "days": 0}}]')
"""Tokens of bytes."""


def events(raw: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in raw.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def fits(arguments: str) -> bool:
    value = json.loads(arguments)
    return set(value) == {"city", "days"} and isinstance(value["days"], int) and isinstance(value["city"], str)


@pytest.mark.parametrize("more", [0, 1, 7, 60])
@pytest.mark.parametrize("given", [{}, {"n": 3}, {"speculate": 4}, {"tool_choice": TOOL}])
def test_a_call_that_was_asked_for_is_complete_before_the_budget_ends(
    tiny: Live, more: int, given: dict[str, Any]
) -> None:
    done = tiny.post("/v1/chat/completions", {**OPENAI, **given, "max_tokens": SHORTEST + more}).json()
    assert len(done["choices"]) == given.get("n", 1)
    for choice in done["choices"]:
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        calls = choice["message"]["tool_calls"]
        assert calls and all(fits(call["function"]["arguments"]) for call in calls)


STOP = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
NESTED: dict[str, Any] = {
    "$defs": {"Stop": STOP},
    "type": "object",
    "properties": {"from": {"$ref": "#/$defs/Stop"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["from"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("path", ["chat/completions", "messages", "responses"])
@pytest.mark.parametrize("n_tools", [1, 2])
def test_parameters_may_refer_to_their_own_parts(tiny: Live, path: str, n_tools: int) -> None:
    """As pydantic writes models within models; in the schema of all calls they are not at its root."""
    names = [f"go{i}" for i in range(n_tools)]
    if path == "messages":
        tools: Any = [{"name": name, "input_schema": NESTED} for name in names]
        body = {
            "tools": tools,
            "tool_choice": {"type": "any"},
            "max_tokens": 300,
            "model": "tiny",
            "messages": ASKED["messages"],
        }
    elif path == "responses":
        tools = [{"type": "function", "name": name, "parameters": NESTED} for name in names]
        body = {"tools": tools, "tool_choice": "required", "max_output_tokens": 300, "input": "Rain?"}
    else:
        tools = [{"type": "function", "function": {"name": name, "parameters": NESTED}} for name in names]
        body = {**ASKED, "tools": tools, "tool_choice": "required", "max_tokens": 300}
    answer = tiny.post(f"/v1/{path}", body)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    if path == "messages":
        made = [block["input"] for block in said["content"] if block["type"] == "tool_use"]
    elif path == "responses":
        made = [json.loads(item["arguments"]) for item in said["output"] if item["type"] == "function_call"]
    else:
        made = [json.loads(c["function"]["arguments"]) for c in said["choices"][0]["message"]["tool_calls"]]
    assert made and all(one["from"] == {"city": "Oslo"} for one in made)


def test_a_forced_call_comes_where_an_answer_would_have_had_a_form(tiny: Live) -> None:
    """Instructor and others send both: the form is of the text, and there is none."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 1}}}
    body = {**OPENAI, "max_tokens": SHORTEST + 40, "response_format": form}
    message = tiny.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    assert fits(message["tool_calls"][0]["function"]["arguments"]) and message["content"] is None


@pytest.mark.parametrize("kind", [{"type": "string"}, {"enum": ["x"]}, {"type": ["string", "null"]}])
def test_parameters_that_are_no_objects_are_refused_where_a_call_must_come(tiny: Live, kind: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "go", "parameters": kind}}
    answer = tiny.post("/v1/chat/completions", {**ASKED, "tools": [tool], "tool_choice": "required"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools", answer.text


def test_what_no_budget_allows_is_cut_and_says_so(tiny: Live) -> None:
    for n in (1, SHORTEST - 1):
        choice = tiny.post("/v1/chat/completions", {**OPENAI, "max_tokens": n}).json()["choices"][0]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"] is None and "tool_calls" not in choice["message"]
    block = {**ASKED, "max_tokens": 9, "tools": [{"name": "weather", "input_schema": PARAMETERS}]}
    del block["seed"]
    said = tiny.post("/v1/messages", {**block, "model": "tiny", "tool_choice": {"type": "any"}}).json()
    assert said["stop_reason"] == "max_tokens" and "".join(b["text"] for b in said["content"]) == ""


def test_arguments_come_as_they_are_written_and_are_the_whole_ones(tiny: Live) -> None:
    body = {**OPENAI, "max_tokens": SHORTEST + 40}
    whole = tiny.post("/v1/chat/completions", body).json()["choices"][0]["message"]["tool_calls"]
    deltas = [c["choices"][0] for c in events(tiny.post("/v1/chat/completions", {**body, "stream": True}).text)]
    parts = [call for d in deltas for call in d["delta"].get("tool_calls", ())]
    assert len(parts) > 20 and deltas[-1]["finish_reason"] == "tool_calls"
    for i, call in enumerate(whole):
        mine = [part for part in parts if part["index"] == i]
        assert mine[0]["function"]["name"] == "weather" and mine[0]["id"].startswith("call_")
        assert all(part.keys() == {"index", "function"} for part in mine[1:])
        assert "".join(part["function"]["arguments"] for part in mine) == call["function"]["arguments"]


def test_messages_and_responses_tell_them_in_pieces_too(tiny: Live) -> None:
    greedy = {"messages": ASKED["messages"], "model": "tiny", "max_tokens": SHORTEST + 40, "temperature": 0}
    tools = [{"name": "weather", "input_schema": PARAMETERS}]
    body = {**greedy, "tools": tools, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    whole = tiny.post("/v1/messages", body).json()["content"]
    said = events(tiny.post("/v1/messages", {**body, "stream": True}).text)
    pieces = [e["delta"]["partial_json"] for e in said if e["type"] == "content_block_delta"]
    assert len(pieces) > 10 and json.loads("".join(pieces)) == whole[0]["input"]
    starts = [e["content_block"] for e in said if e["type"] == "content_block_start"]
    assert [(s["type"], s["name"], s["input"]) for s in starts] == [("tool_use", "weather", {})]
    assert said[-2]["delta"]["stop_reason"] == "tool_use"

    flat = {"type": "function", "name": "weather", "parameters": PARAMETERS}
    body = {"input": "Rain?", "tools": [flat], "tool_choice": "required", "parallel_tool_calls": False}
    body |= {"max_output_tokens": SHORTEST + 40, "temperature": 0}
    item = tiny.post("/v1/responses", body).json()["output"][0]
    said = events(tiny.post("/v1/responses", {**body, "stream": True}).text)
    pieces = [e["delta"] for e in said if e["type"] == "response.function_call_arguments.delta"]
    assert len(pieces) > 10 and "".join(pieces) == item["arguments"] and fits(item["arguments"])
    assert [e["sequence_number"] for e in said] == list(range(len(said)))
    last = said[-1]["response"]["output"]
    assert [(i["name"], i["arguments"], i["status"]) for i in last] == [("weather", item["arguments"], "completed")]


def test_a_custom_tools_text_comes_whole(tiny: Live) -> None:
    body = {"input": "Rain?", "tools": [{"type": "custom", "name": "note"}], "tool_choice": "required"}
    body |= {"max_output_tokens": 90, "temperature": 0, "parallel_tool_calls": False, "stream": True}
    said = events(tiny.post("/v1/responses", body).text)
    done = [e["item"] for e in said if e["type"] == "response.output_item.done"]
    assert [item["type"] for item in done] == ["custom_tool_call"]
    assert said[-1]["response"]["output"] == done and isinstance(done[0]["input"], str)
