"""Chat templates: a conversation becomes token ids, and users' words can never become special tokens.

A template is a Jinja program from a model file, so it is run by minijinja with a budget of instructions and no access
to anything but the messages. Content is safe by construction:

    no content contains a special-token string (nearly always)
        render, encode the whole text with special tokens on: exactly what the model was trained on
    some content does, e.g. a user types <|im_end|>
        each such string inside content is swapped for a random mark, the template is rendered, and the text between
        the template's own special tokens is encoded with special tokens off, marks swapped back
"""

from __future__ import annotations

import datetime
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import minijinja

from quadriga.errors import TemplateError
from quadriga.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
_MAX_TEMPLATE_BYTES = 200_000
_FUEL = 200_000
"""Template instructions allowed for a short conversation; a real template uses some 30 a message."""
_FUEL_PER_MESSAGE = 2_000
_MAX_GROWTH = 1 << 20
"""Characters a rendering may have beyond four times its messages."""

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message.role == 'system' %}"
    "{{ '<|im_start|>system\n' + (message.content | trim) + '<|im_end|>\n' }}"
    "{% else %}"
    "{% if not loop.first and not (loop.index0 == 1 and messages[0].role == 'system') %}{{ '\n' }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' }}"
    "{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
    "{% endfor %}"
)
"""DBRX's turn format without a default system prompt. A lone system message renders to nothing (see render)."""

INSTRUCT = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('this format has no system turn') }}"
    "{% elif (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate user, assistant, user, ...') }}"
    "{% elif message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
"""Mixtral-Instruct's format: bos, then [INST] question [/INST] answer eos."""

BUILT_IN = {"chatml": CHATML, "instruct": INSTRUCT}
"""Templates a caller may name where a checkpoint brings none."""


@dataclass(frozen=True)
class RenderedPrompt:
    """A conversation as a model reads it."""

    ids: list[int]
    text: str
    """The rendered text, special tokens by name."""
    spans: list[tuple[int, int]]
    """Half-open ranges of ``ids`` that are assistant answers with their end-of-turn token; empty unless asked for."""


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    template: str | None = None,
    *,
    add_generation_prompt: bool = True,
    with_spans: bool = False,
) -> RenderedPrompt:
    """Render a conversation with the checkpoint's template (or ``template``, or a name in BUILT_IN) and encode it.

    ``with_spans`` also finds where the assistant's answers lie (one more rendering each): what training learns.

    Raises:
        TemplateError: no template, one that fails or exceeds its budget, an unknown role, or content that is no text.
    """
    source = BUILT_IN.get(template, template) if template is not None else _template_of(tokenizer)
    turns = [_checked(index, message) for index, message in enumerate(messages)]
    if not turns:
        raise TemplateError("a conversation needs at least one message")
    marks = _marks(turns, tokenizer)
    marked = [{**turn, "content": _swap(turn["content"], marks)} for turn in turns]
    program = _Program(source, tokenizer)
    text = program.render(marked, add_generation_prompt)
    if not text:
        raise TemplateError(
            "the conversation renders to nothing: this format needs at least one message besides the system prompt"
        )
    ids = _encode(text, marks, tokenizer)
    spans = _answer_spans(program, marked, text, marks, tokenizer) if with_spans else []
    return RenderedPrompt(ids, _swap(text, {mark: original for original, mark in marks.items()}), spans)


class _Program:
    """A template ready to run within its budget."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        if len(source.encode()) > _MAX_TEMPLATE_BYTES:
            raise TemplateError(f"a chat template may have {_MAX_TEMPLATE_BYTES} bytes, got {len(source.encode())}")
        self._environment = minijinja.Environment(
            templates={"chat": source},
            globals={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
            filters={"tojson": _to_json},
            trim_blocks=True,
            lstrip_blocks=True,
            pycompat=True,
            reload_before_render=False,
            auto_escape_callback=_never_escape,
        )
        self._names = {id_: text for text, id_ in tokenizer.special_ids.items()}
        self._bos = self._names.get(tokenizer.bos_id, "") if tokenizer.bos_id is not None else ""
        self._eos = self._names.get(tokenizer.eos_ids[0], "") if tokenizer.eos_ids else ""

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        self._environment.fuel = _FUEL + _FUEL_PER_MESSAGE * len(messages)
        try:
            text: str = self._environment.render_template(
                "chat",
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self._bos,
                eos_token=self._eos,
            )
        except (minijinja.TemplateError, TemplateError, RecursionError, ValueError, TypeError) as error:
            raise TemplateError(f"the chat template cannot render these messages: {_reason(error)}") from None
        limit = 4 * sum(len(m["content"]) for m in messages) + _MAX_GROWTH
        if len(text) > limit:
            raise TemplateError(f"the chat template made {len(text)} characters out of {len(messages)} messages")
        return text


def _template_of(tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    if {"<|im_start|>", "<|im_end|>"} <= tokenizer.special_ids.keys():
        return CHATML
    raise TemplateError(
        "this checkpoint brings no chat template, so it is probably a base model. Continue text with `quadriga "
        "generate`, or name a format: " + ", ".join(BUILT_IN) + "."
    )


def _checked(index: int, message: Mapping[str, Any]) -> dict[str, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise TemplateError(f"messages[{index}].role must be one of {', '.join(ROLES)}; got {role!r}")
    if not isinstance(content, str):
        raise TemplateError(f"messages[{index}].content must be text, got {type(content).__name__}")
    extra = sorted(set(message) - {"role", "content"})
    if extra:
        raise TemplateError(f"messages[{index}] has fields no template here reads: {', '.join(extra)}")
    return {"role": role, "content": content}


def _marks(turns: list[dict[str, str]], tokenizer: Tokenizer) -> dict[str, str]:
    """special-token string found in content -> a mark nobody can have typed."""
    everything = "\n".join(turn["content"] for turn in turns)
    found = [name for name in tokenizer.special_ids if name and name in everything]
    # Longest first, so that a token whose name contains another's is swapped whole.
    return {name: f"\ue000{secrets.token_hex(8)}\ue001" for name in sorted(found, key=len, reverse=True)}


def _swap(text: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        text = text.replace(old, new)
    return text


def _encode(text: str, marks: Mapping[str, str], tokenizer: Tokenizer) -> list[int]:
    if not marks:
        return tokenizer.encode(text, allow_special=True)
    back = {mark: original for original, mark in marks.items()}
    names = sorted(tokenizer.special_ids, key=len, reverse=True)
    ids: list[int] = []
    for part in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
        if part in tokenizer.special_ids:
            ids.append(tokenizer.special_ids[part])
        else:
            ids.extend(tokenizer.encode(_swap(part, back)))
    return ids


def _answer_spans(
    program: _Program,
    messages: list[dict[str, str]],
    text: str,
    marks: Mapping[str, str],
    tokenizer: Tokenizer,
) -> list[tuple[int, int]]:
    """Where each assistant turn's tokens lie, found by rendering the conversation up to it and including it."""
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = program.render(messages[:index], add_generation_prompt=True) if index else ""
        after = program.render(messages[: index + 1], add_generation_prompt=False)
        if not (text.startswith(before) and text.startswith(after) and len(after) > len(before)):
            raise TemplateError(
                "the chat template rewrites earlier turns when later ones come, so the answers' places are not defined"
            )
        spans.append((len(_encode(before, marks, tokenizer)), len(_encode(after, marks, tokenizer))))
    return spans


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _never_escape(name: str) -> bool:
    return False


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return str(cause).splitlines()[0][:300] if str(cause) else type(cause).__name__
