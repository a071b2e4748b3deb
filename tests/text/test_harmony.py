"""gpt-oss's answers taken apart: the format's own examples, broken ones, and every way of cutting them."""

from __future__ import annotations

from pathlib import Path

import pytest

from quadriga.text.harmony import (
    MARKS,
    Content,
    Event,
    HarmonyParser,
    Reasoning,
    TokenParser,
    ToolCall,
    joined,
    parse,
    speaks_harmony,
)
from tests.text.template_language import STRUCTURES
from tests.text.test_turn_ends import tokenizer_of

THINK = "<|channel|>analysis<|message|>A sum: 2 < 3, so <b> it is.<|end|>"
ANSWERS: dict[str, tuple[str, list[Event]]] = {
    "thought and answer": (
        THINK + "<|start|>assistant<|channel|>final<|message|>Four. Or a <|lone mark| and <|end.<|return|>",
        [Reasoning(0, "A sum: 2 < 3, so <b> it is."), Content(1, "Four. Or a <|lone mark| and <|end.")],
    ),
    "a call behind the channel": (
        THINK
        + "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        + '{"city": "Tōkyō"}<|call|>',
        [Reasoning(0, "A sum: 2 < 3, so <b> it is."), ToolCall(1, "get_weather", '{"city": "Tōkyō"}')],
    ),
    "a call before the channel, without constraint": (
        " to=functions.look.up<|channel|>commentary json<|message|>{}<|call|>",
        [ToolCall(0, "look.up", "{}")],
    ),
    "a tool of the model's own, in its thoughts": (
        "<|channel|>analysis to=python code<|message|>print(1)<|call|>",
        [ToolCall(0, "python", "print(1)")],
    ),
    "a preamble for the user, two calls": (
        "<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.a <|constrain|>json<|message|>{}<|call|>"
        "<|start|>assistant to=functions.b<|channel|>commentary <|constrain|>json<|message|>[1]<|call|>",
        [Content(0, "I look."), ToolCall(1, "a", "{}"), ToolCall(2, "b", "[1]")],
    ),
    "a call without arguments": (
        "<|channel|>commentary to=functions.now<|message|><|call|>",
        [ToolCall(0, "now", "")],
    ),
    "cut off in a message": ("<|channel|>final<|message|>It is <|ret", [Content(0, "It is <|ret")]),
    "cut off in a header": (THINK + "<|start|>assistant<|channel|>fin", [Reasoning(0, "A sum: 2 < 3, so <b> it is.")]),
    "no header at all": ("to be or not<|return|>", [Content(0, "to be or not")]),
    "one word": ("to", [Content(0, "to")]),
    "a message without a channel": ("<|message|>Hi<|end|>", [Content(0, "Hi")]),
    "a thought of a kind of text": ("<|channel|>analysis code<|message|>x = 1<|end|>", [Reasoning(0, "x = 1")]),
    "an end forgotten": (
        "<|channel|>analysis<|message|>hm<|channel|>final<|message|>Yes<|endoftext|>",
        [Reasoning(0, "hm"), Content(1, "Yes")],
    ),
    "a start for an end": (
        "<|channel|>analysis<|message|>hm<|start|>assistant<|channel|>final<|message|>Yes",
        [Reasoning(0, "hm"), Content(1, "Yes")],
    ),
    "words after a start": ("<|start|>assistant says hello", [Content(0, "assistant says hello")]),
    "an endless header": ("<|start|>" + "x" * 600, [Content(0, "x" * 600)]),
    "to the user by name": ("<|channel|>final to=user<|message|>Hi", [Content(0, "Hi")]),
    "nothing": ("", []),
}


def in_pieces(*pieces: str) -> list[Event]:
    parser = HarmonyParser()
    events = [event for piece in pieces for event in parser.push(piece)]
    return joined([*events, *parser.finish()])


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_its_messages_however_it_is_cut(name: str) -> None:
    text, expected = ANSWERS[name]
    assert parse(text) == expected
    assert in_pieces(*text) == expected
    for first in range(len(text) + 1):
        assert in_pieces(text[:first], text[first:]) == expected
        assert in_pieces(text[:first], text[first : first + 5], text[first + 5 :]) == expected


def test_text_comes_as_soon_as_it_can_be_no_mark() -> None:
    parser = HarmonyParser()
    assert parser.push("<|channel|>final<|message|>") == []
    assert parser.push("a <") == [Content(0, "a ")]
    assert parser.push("|e") == []
    assert parser.push("x") == [Content(0, "<|ex")]
    assert parser.push("<|end|>") == parser.push("<|start|>assistant to=functions.f<|channel|>commentary") == []
    assert parser.push("<|message|>{") == [ToolCall(1, "f", ""), ToolCall(1, "f", "{")]
    assert parser.finish() == []


@pytest.mark.parametrize("name", ["thought and answer", "a call behind the channel", "a start for an end"])
def test_tokens_are_parsed_as_their_text(tmp_path: Path, name: str) -> None:
    text, expected = ANSWERS[name]
    tokenizer = tokenizer_of(tmp_path, STRUCTURES["channels"], list(MARKS))
    assert speaks_harmony(tokenizer)
    ids = tokenizer.encode(text, allow_special=True)
    assert tokenizer.special_ids["<|message|>"] in ids
    parser = TokenParser(tokenizer)
    events = [event for i in ids for event in parser.push(i)]
    assert joined([*events, *parser.finish()]) == expected


def test_a_vocabulary_without_calls_speaks_something_else(tmp_path: Path) -> None:
    assert not speaks_harmony(tokenizer_of(tmp_path, None, ["<|start|>", "<|message|>", "<|end|>"]))
