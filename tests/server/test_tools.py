"""Telling words from calls, in whole answers and as they come."""

from __future__ import annotations

import json
import random

import pytest

from quadriga.server.errors import ApiError
from quadriga.server.schema import (
    ChatRequest,
    Function,
    FunctionCall,
    Message,
    NamedFunction,
    NamedTool,
    Tool,
    ToolCall,
)
from quadriga.server.tools import CLOSE, OPEN, Answer, Piece, Reading, ToolUse, reader
from quadriga.text.reasoning import Thought
from quadriga.text.template_abilities import Abilities
from quadriga.text.tool_calls.early import CallPart
from quadriga.text.tool_calls.reader import Reader

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


def read(used: ToolUse, text: str) -> Answer:
    return Reading(used.reads).read(text)


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
    answer = read(use(), text)
    assert (answer.content, named(answer.calls)) == (content, calls)
    for seed in range(20):
        rng, reader, at, words, found = random.Random(seed), Reader(use().reads), 0, "", []
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
    reader = Reader(use().reads)
    assert reader.push("It is ", last=False) == ["It is"]
    assert reader.push("sunny<too", last=False) == [" sunny"]
    assert reader.push("thing", last=False) == ["<toothing"]


def test_one_call_where_one_is_allowed() -> None:
    answer = read(use(parallel=False), call("weather", a=1) + call("stop"))
    assert named(answer.calls) == [("weather", {"a": 1})] and answer.content == call("stop")


def test_forced_calls_come_as_one_array() -> None:
    reader = Reader(use("required").reads)
    text = json.dumps([{"name": "weather", "arguments": {"a": 1}}, {"name": "stop", "arguments": {}}])
    assert reader.push(text[:30], last=False) == []
    assert named(reader.push(text[30:], last=True)) == [("weather", {"a": 1}), ("stop", {})]  # type: ignore[arg-type]
    cut = read(use("required"), "[{")
    assert cut.content is None and not cut.calls, "one that was cut is neither a call nor words"
    for n in range(text.index("}}") + 2, len(text) - 2):
        assert named(read(use("required"), text[:n]).calls) == [("weather", {"a": 1})], (
            "what was complete before is one"
        )


def test_without_tools_everything_is_words() -> None:
    for used in (use(tools=None), use("none")):
        answer = read(used, call("weather"))
        assert (answer.content, answer.calls) == (call("weather"), [])


def test_what_gemma_4_thinks_and_calls_is_read_by_its_own_marks() -> None:
    """Its marks are tokens: they are to be seen in the text, and the word behind the first is none of its thoughts."""
    reading = Reading(None, thinks=("<|channel>thought", "<channel|>"))
    assert reading.marks == ("<|channel>", "<channel|>")
    answer = reading.read("<|channel>thought\nHm.\n<channel|>Yes.")
    assert (answer.thought, answer.content) == ("Hm.", "Yes.")
    assert Reading(None, thinks=("[THINK]", "[/THINK]")).marks == ("[THINK]", "[/THINK]")


def test_channels_of_gpt_oss_are_thoughts_words_and_calls() -> None:
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city": "Oslo"}<|call|><|start|>assistant to=functions.other<|channel|>commentary'
        "<|message|>{}<|call|><|start|>assistant<|channel|>final<|message|>Wet.<|return|>"
    )
    reading = Reading(use().reads, channels=True)
    answer = reading.read(text)
    assert (answer.thought, answer.content) == ("Hm.", "{}Wet.") and named(answer.calls) == [
        ("weather", {"city": "Oslo"})
    ]
    for seed in range(10):
        rng, one, at, found = random.Random(seed), reader(reading), 0, list[Piece]()
        while at < len(text):
            n = rng.choice([1, 2, 3, 9])
            found += one.push(text[at : at + n], last=at + n >= len(text))
            at += n
        assert "".join(piece for piece in found if isinstance(piece, str)) == "{}Wet." and one.n_calls == 1
        assert "".join(piece.text for piece in found if isinstance(piece, Thought)) == "Hm." and one.n_thinking
    one = reader(reading, streams=True)
    parts = [p for i, c in enumerate(text) for p in one.push(c, last=i == len(text) - 1) if isinstance(p, CallPart)]
    assert "".join(part.arguments for part in parts) == '{"city": "Oslo"}' and len(parts) > 10 and one.n_calls == 1
    assert parts[0].name == "weather" and parts[-1].whole
    cut = reading.read(text[: text.index("Oslo")], cut=True)
    assert (cut.content, cut.calls) == (None, []), "one that was cut is neither a call nor words"
    assert (
        "<|channel|>" in reading.marks
        and Reading(None, channels=True).read("<|channel|>final<|message|>a").content == "a"
    )


def test_the_named_tool_is_the_only_one() -> None:
    used = use(NamedTool(type="function", function=NamedFunction(name="stop")))
    assert [tool.function.name for tool in used.tools] == ["stop"] and used.forced and not used.parallel
    text = json.dumps([{"name": "weather", "arguments": {}}])
    assert not read(used, text).calls


def test_two_tools_of_one_name_are_refused_by_name() -> None:
    with pytest.raises(ApiError, match="two tools have the name 'stop'"):
        use(tools=[*TOOLS, TOOLS[1]])


def test_what_the_system_said_stays_beside_the_tools() -> None:
    turns = use().turns([Message(role="system", content="Be brief."), Message(role="user", content="x")])
    assert [turn["role"] for turn in turns] == ["system", "user"]
    assert turns[0]["content"].startswith("Be brief.\n\n") and '"weather"' in turns[0]["content"]


TALK = [
    Message(role="system", content="Be brief."),
    Message(role="user", content="Rain?"),
    Message(
        role="assistant",
        reasoning_content="I look.",
        tool_calls=[ToolCall(id="call_1", function=FunctionCall(name="weather", arguments='{"city": "Oslo"}'))],
    ),
    Message(role="tool", tool_call_id="call_1", content="rain"),
    Message(role="user", content="And now?"),
]


def test_a_template_without_system_and_tool_turns_gets_turns_it_can_write() -> None:
    turns = use_of(Abilities(system=False, alternate=True)).turns(TALK)
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[0]["content"].startswith("Be brief.\n\nThese functions") and turns[0]["content"].endswith("\n\nRain?")
    assert turns[1]["content"] == call("weather", city="Oslo")
    assert turns[2]["content"] == "<tool_response>\nrain\n</tool_response>\nAnd now?"
    free = use_of(Abilities()).turns(TALK)
    assert [turn["role"] for turn in free] == ["system", "user", "assistant", "user", "user"]


def test_a_template_with_tools_gets_them_as_they_are() -> None:
    used = use_of(Abilities(tools=True, nine=True, thinks=("<think>", "</think>"), source="<arg_key>"))
    turns = used.turns(TALK)
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "tool", "user"]
    made = turns[2]["tool_calls"][0]
    assert made["function"] == {"name": "weather", "arguments": {"city": "Oslo"}}
    assert turns[2]["reasoning_content"] == "I look." and turns[2]["content"] == ""
    assert made["id"] == turns[3]["tool_call_id"] and len(made["id"]) == 9 and turns[3]["name"] == "weather"
    assert turns[0]["content"] == "Be brief." and used.shown is not None and len(used.shown) == 2
    assert used.reads is not None and used.reads.form.name == "glm"


def use_of(able: Abilities) -> ToolUse:
    return ToolUse(ChatRequest(messages=TALK, tools=TOOLS), able)
