"""What templates can write is found out by what comes out of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quadriga.errors import TemplateError
from quadriga.text.chat import CHATML, INSTRUCT, render
from quadriga.text.template_abilities import abilities
from quadriga.text.tokenizer import Tokenizer
from tests.server.conftest import Bytes

TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}]
NATIVE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ '<r>' + m.content + '</r>' }}"
    "{% elif m.tool_calls %}{% for c in m.tool_calls %}"
    "{% if NINE and c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
    "{{ '<tool_call>' + c.function.name + (c.function.arguments | tojson) + '</tool_call>' }}{% endfor %}"
    "{% else %}{{ '<' + m.role + '>' + m.content }}{% endif %}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<a>{% endif %}"
)


def of(template: str) -> Tokenizer:
    return Tokenizer(Bytes(), special_ids={"<|end|>": 256}, eos_ids=(256,), chat_template=template)


def test_what_templates_can_write() -> None:
    plain = abilities(of(CHATML))
    assert plain.system and plain.tool_turns and not (plain.tools or plain.nine or plain.alternate or plain.thinks)
    strict = abilities(of(INSTRUCT.replace("{{ bos_token }}", "").replace("eos_token", "''")))
    assert not strict.system and strict.alternate and not strict.tools
    native = abilities(of(NATIVE.replace("NINE", "false")))
    assert native.tools and native.tool_turns and not native.nine
    nine = abilities(of(NATIVE.replace("NINE", "true")))
    assert nine.tools and nine.nine
    only_named = abilities(of(CHATML + "{% if tools %}{{ tools | tojson }}{% endif %}"))
    assert not only_named.tools, "the calls themselves are lost"
    assert abilities(of(CHATML + "{# <think> </think> #}")).thinks == ("<think>", "</think>")


def test_a_template_that_drops_the_system_turn_in_silence_has_none() -> None:
    dropping = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    assert not abilities(of(dropping)).system


def test_tools_and_variables_reach_the_template_and_no_word_becomes_a_token() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "rain", "arguments": {"<|end|>k": "<|end|>"}}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "wet<|end|>", "tool_call_id": "1", "name": "rain"},
    ]
    described = [{"type": "function", "function": {"name": "rain", "description": "<|end|>"}}]
    template = NATIVE.replace("NINE", "false") + "{{ enable_thinking }}<|end|>"
    shown = render(turns, of(template), tools=described, variables={"enable_thinking": "<|end|>"})
    assert json.dumps(call["function"]["arguments"]) in shown.text and json.dumps(described) in shown.text
    assert shown.ids.count(256) == 1 and shown.ids[-1] == 256, "only the template's own mark is a token"
    assert bytes(shown.ids[:-1]).decode() == shown.text.removesuffix("<|end|>")


def test_an_open_end_is_cut_where_the_words_end() -> None:
    tokenizer = of(CHATML.replace("<|im_end|>", "<|end|>"))
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "So <|end|> "}]
    shown = render(turns, tokenizer, continue_final=True)
    assert shown.text.endswith("assistant\nSo <|end|> ") and shown.ids.count(256) == 1
    with pytest.raises(TemplateError, match="only a message of the assistant"):
        render(turns[:1], tokenizer, continue_final=True)
    with pytest.raises(TemplateError, match="leaves out the last message"):
        render(turns, of("{{ messages[0].content }}"), continue_final=True)


def test_the_templates_own_variables_are_nobody_elses() -> None:
    with pytest.raises(TemplateError, match="messages cannot be set"):
        render([{"role": "user", "content": "x"}], of(CHATML), variables={"messages": []})
