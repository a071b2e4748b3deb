"""What a chat template can write: found by rendering short conversations and looking for what was put in.

    a system turn?   tools?   calls and their results, and with ids of which length?   is thinking marked, or switched?

Templates refuse what they cannot write (``raise_exception``) or leave it out in silence; either way it is not in the
text. What a template cannot write is put into turns that it can (``server.tools``).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quadriga.errors import TemplateError
from quadriga.text.chat import Program, template_of
from quadriga.text.tokenizer import Tokenizer

_CPU_S = 0.25
_KEPT = 16
_WORD = "quadriga{}probe"
_SAID, _TOLD, _NAMED, _GIVEN, _MADE = map(_WORD.format, ("said", "told", "named", "given", "made"))
_ANSWER = "quadriga has answered"
LONG_ID, NINE_ID = "call_0123456789abcdef01234567", "qadriga09"


@dataclass(frozen=True)
class Abilities:
    """What a template writes by itself."""

    system: bool = True
    """A system turn."""
    tool_turns: bool = False
    """A turn of the role "tool"."""
    tools: bool = False
    """The functions a model may call, the calls it made, and what they gave."""
    nine: bool = False
    """Ids of calls must have nine letters and digits (Mistral's templates say so)."""
    alternate: bool = False
    """Two turns of the user, one after the other, are refused."""
    thinks: tuple[str, str] | None = None
    """The marks around what the model thinks before it answers, where the template knows of it."""
    source: str = ""
    """The template for conversations with tools; the form of its calls is read from it."""


THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>thought", "<channel|>"),
)
"""Marks around thoughts: DeepSeek-R1's, which Qwen, GLM, SmolLM3 and most others took over; Magistral's; Seed-OSS's;
Gemma 4's."""

_known: OrderedDict[tuple[str, str], Abilities] = OrderedDict()
_lock = threading.Lock()


def abilities(tokenizer: Tokenizer) -> Abilities:
    """Of the template a vocabulary came with; a few milliseconds the first time.

    Raises:
        TemplateError: there is none.
    """
    sources = template_of(tokenizer), template_of(tokenizer, tools=True)
    with _lock:
        if sources in _known:
            _known.move_to_end(sources)
            return _known[sources]
    found = _probe(*sources, tokenizer)
    with _lock:
        _known[sources] = found
        while len(_known) > _KEPT:
            _known.popitem(last=False)
    return found


def _probe(plain: str, with_tools: str, tokenizer: Tokenizer) -> Abilities:
    """Of the template for conversations, and the one for those with tools; most checkpoints have one for both."""
    user = {"role": "user", "content": _SAID}
    tool = {
        "type": "function",
        "function": {
            "name": _NAMED,
            "description": "Says nothing.",
            "parameters": {"type": "object", "properties": {"text": {"type": "string", "description": "A text."}}},
        },
    }

    def writes(messages: Sequence[Mapping[str, Any]], *words: str, tools: Sequence[Mapping[str, Any]] = ()) -> bool:
        calls = bool(tools) or any(message["role"] == "tool" for message in messages)
        try:
            program = Program(with_tools if calls else plain, tokenizer, tools=list(tools) or None)
            text = program.render(messages, [(len(messages), True)], cpu_s=_CPU_S)[0]
        except TemplateError:
            return False
        return all(word in text for word in words)

    def with_call(call_id: str) -> list[dict[str, Any]]:
        call = {"id": call_id, "type": "function", "function": {"name": _NAMED, "arguments": {"text": _GIVEN}}}
        return [
            user,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": _MADE, "tool_call_id": call_id, "name": _NAMED},
        ]

    told = writes([user], _SAID, _NAMED, tools=[tool])
    words = (_SAID, _NAMED, _GIVEN, _MADE)
    long, nine = (told and writes(with_call(call_id), *words, tools=[tool]) for call_id in (LONG_ID, NINE_ID))
    answered = [user, {"role": "assistant", "content": _ANSWER}]
    return Abilities(
        system=writes([{"role": "system", "content": _TOLD}, user], _TOLD, _SAID),
        tool_turns=writes([*answered, {"role": "tool", "content": _MADE, "tool_call_id": NINE_ID}], _MADE),
        tools=long or nine,
        nine=nine and not long,
        alternate=not writes([user, {"role": "user", "content": _TOLD}], _SAID, _TOLD),
        thinks=next((marks for marks in THOUGHTS if marks[1] in plain), None),
        source=with_tools,
    )
