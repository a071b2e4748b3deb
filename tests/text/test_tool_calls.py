"""Calls in every form that models write, whole and in any pieces; what only looks like one stays text."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from quadriga.text.tool_calls.early import CallPart
from quadriga.text.tool_calls.forms import FORMS, form_of
from quadriga.text.tool_calls.reader import MAX_FAILED, Reader, Tools

SCHEMAS: dict[str, Any] = {
    "weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "run": {"type": "object", "properties": {"code": {"type": "string"}, "all": {"type": ["boolean", "null"]}}},
}
OSLO = ("weather", {"city": "Oslo", "days": 3})
CODE = 'if a < b:\n    print("</x>")\n'

# (form, what the model writes, its words, its calls); written by hand from the published templates.
ANSWERS: list[tuple[str, str, str, list[tuple[str, dict[str, Any]]]]] = [
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>', "", [OSLO]),
    (
        "hermes",
        'Hm. <tool_call>{"name": "run", "arguments": "{\\"code\\": \\"x\\"}"}</tool_call>',
        "Hm.",
        [("run", {"code": "x"})],
    ),
    (
        "qwen3_coder",
        (
            "I look.\n<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>"
            "\n</function>\n</tool_call>\n<tool_call>\n<function=run>\n<parameter=code>\n" + CODE + "\n</parameter>\n"
            "<parameter=all>\nnull\n</parameter>\n</function>\n</tool_call>"
        ),
        "I look.",
        [OSLO, ("run", {"code": CODE, "all": None})],
    ),
    ("qwen3_coder", "<tool_call>\n<function=run>\n</function>\n</tool_call>", "", [("run", {})]),
    (
        "glm",
        (
            "\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days</arg_key>\n"
            "<arg_value>3</arg_value>\n</tool_call>"
        ),
        "",
        [OSLO],
    ),
    (
        "glm",
        "<tool_call>run\n<arg_key>code</arg_key>\n<arg_value>12</arg_value>\n</tool_call>",
        "",
        [("run", {"code": "12"})],
    ),
    ("glm", "<tool_call>run\n</tool_call> done", "done", [("run", {})]),
    (
        "deepseek",
        (
            "Yes.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
            '{"city": "Oslo", "days": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>run\n```json\n{}\n'
            "```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        ),
        "Yes.",
        [OSLO, ("run", {})],
    ),
    (
        "deepseek",
        (
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Oslo", "days": 3}<｜tool▁call▁end｜>'
            "<｜tool▁calls▁end｜>"
        ),
        "",
        [OSLO],
    ),
    ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}]', "", [OSLO]),
    (
        "mistral",
        'So.[TOOL_CALLS]weather[ARGS]{"city": "Oslo", "days": 3}[TOOL_CALLS]run[CALL_ID]ab1[ARGS]{"code": "[1]"}',
        "So.",
        [OSLO, ("run", {"code": "[1]"})],
    ),
    ("mistral", '[TOOL_CALLS]run{"code": "{}"}', "", [("run", {"code": "{}"})]),
    ("granite", '<|tool_call|>[{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}]', "", [OSLO]),
    (
        "lfm2",
        '<|tool_call_start|>[weather(city="Oslo", days=3), run(all=True)]<|tool_call_end|>Wait.',
        "Wait.",
        [OSLO, ("run", {"all": True})],
    ),
    (
        "gemma4",
        'Yes.<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:3}<tool_call|><|tool_call>call:run{}<tool_call|>',
        "Yes.",
        [OSLO, ("run", {})],
    ),
    (
        "gemma4",
        '<|tool_call>call:run{code:<|"|>a, {b}: "c"<|"|>,all:[{<|"|>k 1<|"|>:null},[],-1.5e2, true]}<tool_call|>',
        "",
        [("run", {"code": 'a, {b}: "c"', "all": [{"k 1": None}, [], -150.0, True]})],
    ),
    ("llama3", '{"name": "weather", "parameters": {"city": "Oslo", "days": 3}}', "", [OSLO]),
    (
        "llama3",
        '<|python_tag|>{"name": "run", "parameters": {}}; {"name": "run", "parameters": {"all": null}}',
        "",
        [("run", {}), ("run", {"all": None})],
    ),
    (
        "pythonic",
        "[weather(city='Oslo', days=3), run(code='a', all=null)]",
        "",
        [OSLO, ("run", {"code": "a", "all": None})],
    ),
]
# Every form: words, and what only looks like a call.
WORDS = [
    ("hermes", '<tool_call>{"name": "other", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "run", "arguments": [1]}</tool_call>'),
    ("qwen3_coder", "<tool_call>\n<function=run>\n<parameter=code>x\n</function>\n</tool_call>"),
    ("glm", "<tool_call>run <arg_key>code</arg_key></tool_call>"),
    ("deepseek", "<｜tool▁calls▁begin｜>run<｜tool▁calls▁end｜>"),
    ("mistral", "[TOOL_CALLS]run[ARGS]{"),
    ("mistral", "as in [TOOL_CALLS] and so on"),
    ("granite", '<|tool_call|>[{"name": "run"}]'),
    ("lfm2", '<|tool_call_start|>[run(code=open("x"))]<|tool_call_end|>'),
    ("lfm2", '<|tool_call_start|>[run("x")]<|tool_call_end|>'),
    *(
        ("gemma4", f"<|tool_call>call:run{{{wrong}}}<tool_call|>")
        for wrong in ("code", "code:", "code:1 2", "code:NaN", 'code:<|"|>x', ",code:1", "code:1}}", "code:" + "[" * 70)
    ),
    ("gemma4", "<|tool_call>run{}<tool_call|>"),
    ("llama3", '{"name": "run"}'),
    ("llama3", '{"city": "Oslo"} is JSON'),
    ("pythonic", "[1, 2] are numbers"),
    ("pythonic", "[run(code=1+1)]"),
    *((name, "Just words, a < b [1] {2}.") for name in FORMS if name != "harmony"),
]


def read(form: str, text: str, seed: int | None) -> tuple[str, list[tuple[str, Any]]]:
    reader, rng, at = Reader(Tools(FORMS[form], SCHEMAS)), random.Random(seed), 0
    said, calls = "", []
    while True:
        n = len(text) if seed is None else rng.choice([1, 1, 2, 3, 8, 30])
        for piece in reader.push(text[at : at + n], last=at + n >= len(text)):
            if isinstance(piece, str):
                said += piece
            else:
                calls.append((piece["function"]["name"], json.loads(piece["function"]["arguments"])))
        at += n
        if at >= len(text):
            assert reader.n_calls == len(calls)
            return said, calls


@pytest.mark.parametrize("seed", [None, *range(6)])
@pytest.mark.parametrize(("form", "text", "said", "calls"), ANSWERS, ids=lambda value: str(value)[:30])
def test_calls_read_the_same_whole_and_in_any_pieces(
    form: str, text: str, said: str, calls: list[Any], seed: int | None
) -> None:
    assert read(form, text, seed) == (said, calls)


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize(("form", "text"), WORDS, ids=lambda value: str(value)[:40])
def test_what_is_no_call_stays_as_it_is(form: str, text: str, seed: int | None) -> None:
    assert read(form, text, seed) == (text, [])


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize(
    ("form", "text"),
    [
        *((form, text) for form, text, _, calls in ANSWERS if len(calls) == 2),
        ("forced", json.dumps([{"name": name, "arguments": {"city": "Oslo"}} for name in ("run", "weather", "run")])),
    ],
    ids=lambda value: str(value)[:30],
)
def test_no_answer_has_more_calls_than_it_may(form: str, text: str, seed: int | None, streams: bool) -> None:
    """As where a request takes no parallel calls. Two calls of one block are words where none of it was told yet."""
    tools = Tools(FORMS["hermes" if form == "forced" else form], SCHEMAS, forced=form == "forced", most=1)
    reader, rng, at, pieces = Reader(tools, streams=streams), random.Random(seed), 0, list[Any]()
    while at < len(text):
        n = len(text) if seed is None else rng.choice([1, 1, 2, 3, 8, 30])
        pieces += reader.push(text[at : at + n], last=at + n >= len(text))
        at += n
    begun = [piece for piece in pieces if isinstance(piece, dict) or (isinstance(piece, CallPart) and piece.name)]
    assert reader.n_calls == len(begun) <= 1
    if form == "forced":
        assert begun and not any(isinstance(piece, str) for piece in pieces)
    elif not begun:
        assert "".join(pieces) == text


def test_words_before_a_whole_answer_form_come_at_once() -> None:
    for name in ("llama3", "pythonic"):
        reader = Reader(Tools(FORMS[name], SCHEMAS))
        assert reader.push("It", last=False) == ["It"]
        assert reader.push(" is {", last=False) == [" is {"]


def test_a_form_is_tried_so_often_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    n, form, tried = 500, FORMS["qwen3_coder"], list[int]()
    counting = type(form)(
        form.name, lambda block, schemas: tried.append(len(block)) or form.parse(block, schemas), form.opens, form.closes,
        peek=form.peek,
    )  # fmt: skip
    text = "<tool_call><function=run><parameter=" * n + "</tool_call>"
    assert Reader(Tools(counting, SCHEMAS)).push(text, last=True) == [text]
    assert len(tried) == MAX_FAILED + 1


def test_a_form_is_known_by_its_template() -> None:
    for sign, name in {
        "<|channel|>analysis": "harmony",
        "{{ '<tool_call>' }}": "hermes",
        "<tool_call>\n<function=example>\n<parameter=x>": "qwen3_coder",
        "<tool_call>{name}\n<arg_key>": "glm",
        "{{'<｜tool▁calls▁begin｜>'}}": "deepseek",
        "[AVAILABLE_TOOLS] [TOOL_CALLS]": "mistral",
        "<|tool_call|>": "granite",
        "{{- '<|tool_call>call:' + name -}}": "gemma4",
        "<|tool_call_start|>": "lfm2",
        '{"name": function name, "parameters": dictionary}': "llama3",
        "[func_name1(params_name1=params_value1)]": "pythonic",
        "nothing": "hermes",
    }.items():
        assert form_of(sign).name == name
