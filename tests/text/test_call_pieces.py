"""Calls that are told while they are written: the same as whole, in every form, and nothing of one that was cut."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from quadriga.text.tool_calls.early import SHAPES, CallPart
from quadriga.text.tool_calls.forms import FORMS
from quadriga.text.tool_calls.pieces import Broken, JsonPieces
from quadriga.text.tool_calls.reader import Reader, Tools
from tests.text.test_tool_calls import ANSWERS, OSLO, SCHEMAS, WORDS

FORCED = '[{"name": "weather", "arguments": {"city":"Oslo", "days": 3}}, {"name": "run", "arguments": {}}]'


def told(tools: Tools, pieces: list[str], *, cut: bool = False) -> tuple[str, list[tuple[str, str]], list[CallPart]]:
    """(words, whole calls with their arguments' texts, all parts) of an answer that comes in these pieces."""
    reader, said, calls, parts = Reader(tools, streams=True), "", list[tuple[str, str]](), list[CallPart]()
    open_call: list[str] = []
    for i, text in enumerate(pieces):
        last = i == len(pieces) - 1
        for piece in reader.push(text, last=last, cut=cut and last):
            if isinstance(piece, str):
                assert piece
                said += piece
            elif isinstance(piece, CallPart):
                parts.append(piece)
                open_call = [piece.name, piece.arguments] if piece.name else [*open_call, piece.arguments]
                assert bool(piece.id) == bool(piece.name)
                if piece.last and piece.whole:
                    calls.append((open_call[0], "".join(open_call[1:])))
            else:
                calls.append((piece["function"]["name"], piece["function"]["arguments"]))
    assert reader.n_calls == len(calls)
    return said, calls, parts


def in_pieces(text: str, seed: int) -> list[str]:
    rng, out = random.Random(seed), []
    while text:
        n = rng.choice([1, 1, 2, 3, 8, 30]) if seed else 1
        out, text = [*out, text[:n]], text[n:]
    return out


def whole(tools: Tools, text: str) -> list[tuple[str, str]]:
    pieces = Reader(tools).push(text, last=True)
    return [(p["function"]["name"], p["function"]["arguments"]) for p in pieces if isinstance(p, dict)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("form", "text", "said", "calls"), ANSWERS, ids=lambda value: str(value)[:30])
def test_pieces_put_together_are_the_whole_call(form: str, text: str, said: str, calls: list[Any], seed: int) -> None:
    tools = Tools(FORMS[form], SCHEMAS)
    words, made, parts = told(tools, in_pieces(text, seed))
    assert words == said and made == whole(tools, text)
    assert [(name, json.loads(arguments)) for name, arguments in made] == calls
    assert all(part.name in ("", *(name for name, _ in calls)) for part in parts)


@pytest.mark.parametrize("name", SHAPES)
def test_every_form_tells_arguments_before_the_call_is_over(name: str) -> None:
    text = next(text for form, text, _, calls in ANSWERS if form == name and calls[0] == OSLO)
    _, _, parts = told(Tools(FORMS[name], SCHEMAS), list(text))
    assert parts[0].name == "weather" and sum(bool(part.arguments) for part in parts) >= 3
    assert not parts[0].last and parts[-1].whole


def test_forced_calls_are_told_too() -> None:
    tools = Tools(FORMS["hermes"], SCHEMAS, forced=True)
    _, made, parts = told(tools, list(FORCED))
    assert made == whole(tools, FORCED) == [("weather", '{"city": "Oslo", "days": 3}'), ("run", "{}")]
    assert len(parts) > 10


def test_forced_calls_may_stand_on_lines_of_their_own() -> None:
    tools = Tools(FORMS["hermes"], SCHEMAS, forced=True)
    assert [name for name, _ in whole(tools, FORCED.replace("}, {", "}\r\n\t,\n  {"))] == ["weather", "run"]


def test_of_forced_calls_no_more_are_made_than_were_asked_for() -> None:
    tools = Tools(FORMS["hermes"], SCHEMAS, forced=True, most=1)
    assert whole(tools, FORCED) == [("weather", '{"city": "Oslo", "days": 3}')]
    assert [name for name, _ in told(tools, list(FORCED))[1]] == ["weather"]


@pytest.mark.parametrize(("form", "text"), WORDS, ids=lambda value: str(value)[:40])
def test_what_is_no_call_stays_words_unless_it_began_like_one(form: str, text: str) -> None:
    said, calls, parts = told(Tools(FORMS[form], SCHEMAS), list(text))
    assert not calls and (said == text or (parts and parts[-1].last and not parts[-1].whole))


@pytest.mark.parametrize(("form", "text", "said", "calls"), ANSWERS, ids=lambda value: str(value)[:30])
def test_a_call_that_was_cut_is_never_words(form: str, text: str, said: str, calls: list[Any]) -> None:
    tools = Tools(FORMS[form], SCHEMAS)
    opens = FORMS[form].opens
    begin = text.index(opens) + len(opens) if opens else SHAPES[form].begin.match(text).end()  # type: ignore[union-attr]
    for n in range(begin + 1, len(text)):
        for words, made in (told(tools, list(text[:n]), cut=True)[:2], told_whole(tools, text[:n])):
            assert said.startswith(words.strip()), text[:n]
            assert made == whole(tools, text)[: len(made)]


def told_whole(tools: Tools, text: str) -> tuple[str, list[tuple[str, str]]]:
    pieces = Reader(tools).push(text, last=True, cut=True)
    calls = [(p["function"]["name"], p["function"]["arguments"]) for p in pieces if isinstance(p, dict)]
    return "".join(p for p in pieces if isinstance(p, str)), calls


VALUES = ['{"a":[1,2.50,-0,1e3,true,null,{"b":"\\u00e9\\ud83d\\ude00\\n\\"\\/x"}],"c":{}}', '{ }', '{"k" : [ ] , "l":\n"é😀"}']  # fmt: skip
BROKEN = ['[1]', '{"a" 1}', '{"a":}', '{"a":1,}', '{"a":01}', '{"a":nul}', '{"a":"\n"}', '{"a":"\\x"}', '{"a":"\\ud800"}', '{"a":[1}', '{"a":NaN}']  # fmt: skip


def test_json_is_checked_and_written_as_it_comes() -> None:
    for text in VALUES:
        for seed in range(4):
            pieces, out = JsonPieces(), ""
            for part in in_pieces(text, seed):
                said, rest = pieces.push(part)
                out += said
            assert pieces.done and not rest and out == json.dumps(json.loads(text), ensure_ascii=False)
    for text in BROKEN:
        pieces = JsonPieces()
        with pytest.raises(Broken):
            [pieces.push(part) for part in text]
