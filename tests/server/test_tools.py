"""Telling words from calls, in whole answers and as they come."""

from __future__ import annotations

import json
import random

import pytest

from quadriga.server.schema import ChatRequest, Function, Message, Tool
from quadriga.server.tools import CLOSE, OPEN, Reader, ToolUse

TOOLS = [Tool(type="function", function=Function(name=name)) for name in ("weather", "stop")]


def use(choice: object = None, *, tools: list[Tool] | None = TOOLS, parallel: bool | None = None) -> ToolUse:
    return ToolUse(
        ChatRequest(
            model="m",
            messages=[Message(role="user", content="x")],
            tools=tools,
            tool_choice=choice,  # type: ignore[arg-type]
            parallel_tool_calls=parallel,
        )
    )


def call(name: str, **arguments: object) -> str:
    return OPEN + json.dumps({"name": name, "arguments": arguments}) + CLOSE


def named(calls: list[dict]) -> list[tuple[str, object]]:
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]


ANSWERS = [
    ("Just words.", "Just words.", []),
    ("", None, []),
    (call("weather", city="Oslo"), None, [("weather", {"city": "Oslo"})]),
    ("Let me see. " + call("weather", a=1) + "\n" + call("stop"), "Let me see.", [("weather", {"a": 1}), ("stop", {})]),
    (call("weather", a=1) + "\n Done.", "Done.", [("weather", {"a": 1})]),
    ("a < b <tool <tool_cal", "a < b <tool <tool_cal", []),
    (call("unknown", a=1), call("unknown", a=1), []),
    (f"{OPEN}no json{CLOSE} and {call('stop')}", f"{OPEN}no json{CLOSE} and", [("stop", {})]),
    (f"{OPEN}{{'name'", f"{OPEN}{{'name'", []),
    ("  indented\n", "  indented\n", []),
    (f"{OPEN}{call('stop')}", OPEN, [("stop", {})]),
]


@pytest.mark.parametrize(("text", "content", "calls"), ANSWERS, ids=lambda value: repr(value)[:40])
def test_an_answer_reads_the_same_whole_and_in_any_pieces(text: str, content: str | None, calls: list) -> None:
    said, made = use().read(text)
    assert (said, named(made)) == (content, calls)
    for seed in range(20):
        rng, reader, at, words, found = random.Random(seed), Reader(use()), 0, "", []
        while at < len(text) or not at:
            n = rng.choice([1, 1, 2, 3, 7, 20])
            last = at + n >= len(text)
            for piece in reader.push(text[at : at + n], last=last):
                if isinstance(piece, str):
                    assert piece, "no empty words"
                    words += piece
                else:
                    found.append(piece)
            at += n
        assert (words or None, named(found)) == (content, calls)


def test_words_do_not_wait_for_the_end() -> None:
    reader = Reader(use())
    assert reader.push("It is ", last=False) == ["It is"]
    assert reader.push("sunny<too", last=False) == [" sunny"]
    assert reader.push("thing", last=False) == ["<toothing"]


def test_one_call_where_one_is_allowed() -> None:
    said, made = use(parallel=False).read(call("weather", a=1) + call("stop"))
    assert named(made) == [("weather", {"a": 1})] and said == call("stop")


def test_forced_calls_come_as_one_array() -> None:
    reader = Reader(use("required"))
    text = json.dumps([{"name": "weather", "arguments": {"a": 1}}, {"name": "stop", "arguments": {}}])
    assert reader.push(text[:30], last=False) == []
    assert named(reader.push(text[30:], last=True)) == [("weather", {"a": 1}), ("stop", {})]  # type: ignore[arg-type]
    assert use("required").read("[{")[0] == "[{", "an answer that was cut is words"


def test_without_tools_everything_is_words() -> None:
    assert use(tools=None).read(call("weather")) == (call("weather"), [])
    assert use("none").read(call("weather")) == (call("weather"), [])
