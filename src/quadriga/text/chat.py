"""Chat templates: a conversation becomes token ids, and users' words can never become special tokens.

A template is a Jinja program from a model file. It is rendered by jinja2, set up as transformers sets it up, in a
process of its own with bounds on time, memory and output (``text.template_process``). Content is safe by construction:

    no content contains a special-token string (nearly always)
        render, encode the whole text with special tokens on: exactly what the model was trained on
    some content does, e.g. a user types <|im_end|>
        each such string inside content is swapped for a random mark, the template is rendered, marks are swapped
        back, and the text is encoded as before, except that no special token is looked for where a mark was
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from quadriga.errors import TemplateError
from quadriga.text.template_process import Budget, Job, render_texts
from quadriga.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
FIELDS = {"role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content"}
"""What a message may have for a template to read, as transformers' documentation of chat templates names it."""
OURS = frozenset({"messages", "add_generation_prompt", "tools", "documents"})
"""Variables of a template that no caller sets as one."""
_MAX_TEMPLATE_BYTES = 200_000
_CPU_S = 2.0
"""Processor time for one rendering of a short conversation; a real template takes a thousandth of it."""
_CPU_S_PER_MESSAGE = 0.001
_MEMORY_BYTES = 256 << 20
"""Beside what the conversation's own size allows (``template_process``)."""
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
    "{% else %}{{ ' ' + (message.content | trim) + eos_token }}{% endif %}"
    "{% endfor %}"
)
"""Mixtral-Instruct's format: bos, then [INST] question [/INST] answer eos. An answer comes with its first space."""

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
    continue_final: bool = False,
    with_spans: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    check: Callable[[str], None] | None = None,
) -> RenderedPrompt:
    """Render a conversation with the checkpoint's template (or ``template``, or a name in BUILT_IN) and encode it.

    Args:
        messages: role and content each, and what else :data:`FIELDS` has: ``tool_calls`` with arguments as objects.
        continue_final: leave the last message open, for the model to go on with it; no generation prompt then.
        with_spans: also find where the assistant's answers lie (one more rendering each): what training learns.
        tools: functions, for a template that writes them itself (``template_abilities`` says whether it does).
        variables: more for the template to read, such as ``enable_thinking``.
        check: raises what it likes to refuse a conversation. It is given what others than the assistant say, before
            that is rendered (templates leave out white space and what the assistant thought, never what it was told),
            and the whole rendered text, before that is encoded.

    Raises:
        TemplateError: no template, one that fails or exceeds its budget, an unknown role, or content that is no text.
    """
    assert not (continue_final and with_spans), "what is unfinished has no spans"
    turns = [_checked(index, message) for index, message in enumerate(messages)]
    calls = bool(tools) or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns)
    source = BUILT_IN.get(template, template) if template is not None else template_of(tokenizer, tools=calls)
    if not turns:
        raise TemplateError("a conversation needs at least one message")
    if check is not None:
        check("".join(turn["content"].strip() for turn in turns if turn["role"] != "assistant"))
    marks = _marks([turns, tools, variables], tokenizer)
    if marks:
        marked = [{**_deep_swap(turn, marks), "role": turn["role"]} for turn in turns]
        tools, variables = _deep_swap(tools, marks), _deep_swap(variables, marks)
    else:
        marked = turns
    cut = _open_end(marked) if continue_final else ""
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"] if with_spans else []
    whole: Job = (len(turns), add_generation_prompt and not continue_final)
    parts = [job for i in answers for job in ((i, True), (i + 1, False)) if job[0]]
    jobs = list(dict.fromkeys([whole, *parts]))
    program = Program(source, tokenizer, tools=tools, variables=variables)
    texts = dict(zip(jobs, program.render(marked, jobs), strict=True))
    if cut and cut not in texts[whole]:
        raise TemplateError("the chat template leaves out the last message, so it cannot be continued")
    text = texts[whole].rpartition(cut)[0] if cut else texts[whole]
    if not text:
        raise TemplateError(
            "the conversation renders to nothing: this format needs at least one message besides the system prompt"
        )
    shown = _swap(text, {mark: original for original, mark in marks.items()})
    if check is not None:
        check(shown)
    ids = _encode(text, marks, tokenizer)
    spans = [_span(text, texts.get((i, True), ""), texts[i + 1, False], marks, tokenizer) for i in answers]
    return RenderedPrompt(ids, shown, spans)


async def render_soon(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, **options: Any) -> RenderedPrompt:
    """:func:`render` for an event loop, on threads that do nothing else.

    A template that takes all the time it may have holds up other conversations, which need the same template, but
    neither the event loop nor what waits for the loop's own threads.
    """
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_threads, lambda: render(messages, tokenizer, **options))


_threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="chat-template")


class Program:
    """A template with what it may read, ready to run within its budget."""

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        n_bytes = len(source.encode(errors="replace"))
        if n_bytes > _MAX_TEMPLATE_BYTES:
            raise TemplateError(f"a chat template may have {_MAX_TEMPLATE_BYTES} bytes, got {n_bytes}")
        self._source = source
        # transformers passes these two whether or not there are any: a template asks whether they are none.
        own = {name for name in variables or {} if name in OURS}
        if own:
            raise TemplateError(f"{', '.join(sorted(own))} cannot be set as a variable of the template")
        given = dict(variables or {})
        self._variables = {"documents": None, **tokenizer.template_variables, **given, "tools": tools or None}
        self._chars = len(json.dumps([tools, given])) if tools or given else 0

    def render(self, messages: Sequence[Mapping[str, Any]], jobs: Sequence[Job], *, cpu_s: float = _CPU_S) -> list[str]:
        """The first n messages of each job, with or without the generation prompt.

        Args:
            cpu_s: processor time for each job of a short conversation.

        Raises:
            TemplateError: the template fails, or goes over its budget.
        """
        budget = Budget(
            cpu_s=cpu_s + _CPU_S_PER_MESSAGE * len(messages),
            memory_bytes=_MEMORY_BYTES,
            chars=4 * (self._chars + sum(map(_n_chars, messages))) + _MAX_GROWTH,
        )
        return render_texts(self._source, self._variables, messages, jobs, budget)


def template_of(tokenizer: Tokenizer, *, tools: bool = False) -> str:
    """The template of the checkpoint a vocabulary came with.

    Args:
        tools: the one for conversations with tools, where there is another; transformers takes it where a caller gives
            tools, and here calls and their results count too, which the other one cannot write.

    Raises:
        TemplateError: it brings none.
    """
    if tools and tokenizer.tool_template is not None:
        return tokenizer.tool_template
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    if {"<|im_start|>", "<|im_end|>"} <= tokenizer.special_ids.keys():
        return CHATML
    raise TemplateError(
        "this checkpoint brings no chat template, so it is probably a base model. Continue text with `quadriga "
        "generate`, or name a format: " + ", ".join(BUILT_IN) + "."
    )


def _checked(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TemplateError(f"messages[{index}] must have a role and a content, got {message!r:.80}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise TemplateError(f"messages[{index}].role must be one of {', '.join(ROLES)}; got {role!r}")
    if not isinstance(content, str):
        raise TemplateError(f"messages[{index}].content must be text, got {type(content).__name__}")
    extra = sorted(set(message) - FIELDS)
    if extra:
        raise TemplateError(f"messages[{index}] has fields no template here reads: {', '.join(extra)}")
    if len(message) == 2:
        return dict(message)
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(message)))  # a template is given JSON
    except (TypeError, ValueError) as error:
        raise TemplateError(f"messages[{index}] must be made of JSON values: {error}") from None
    return plain


def _n_chars(message: Mapping[str, Any]) -> int:
    if len(message) == 2:
        return len(message["content"])
    return len(json.dumps(message, ensure_ascii=False))


def _open_end(turns: list[dict[str, Any]]) -> str:
    """Mark the end of the last message, and return the mark."""
    if turns[-1]["role"] != "assistant":
        role = turns[-1]["role"]
        raise TemplateError(f"only a message of the assistant can be continued; the last one's role is {role}")
    cut = f"\ue000{secrets.token_hex(8)}\ue001"
    turns[-1] = {**turns[-1], "content": turns[-1]["content"] + cut}
    return cut


def _strings(value: Any) -> Iterator[str]:
    """Every text of a JSON value, names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _deep_swap(value: Any, table: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _swap(value, table)
    if isinstance(value, Mapping):
        # Names such as "type" and "function" are what templates look for.
        return {k if k.isidentifier() else _swap(k, table): _deep_swap(item, table) for k, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_deep_swap(item, table) for item in value]
    return value


def _marks(given: Any, tokenizer: Tokenizer) -> dict[str, str]:
    """special-token string found in what was given -> a mark nobody can have typed."""
    everything = "\n".join(_strings(given))
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
    whole, typed = "", []
    for part in re.split("(" + "|".join(map(re.escape, back)) + ")", text):
        if part in back:
            typed.append((len(whole), len(whole) + len(back[part])))
        whole += back.get(part, part)
    return tokenizer.encode_mixed(whole, typed)


def _span(whole: str, before: str, after: str, marks: Mapping[str, str], tokenizer: Tokenizer) -> tuple[int, int]:
    """Where an answer's tokens lie, by the renderings up to it and including it."""
    if not (whole.startswith(before) and whole.startswith(after) and len(after) > len(before)):
        raise TemplateError(
            "the chat template rewrites earlier turns when later ones come, so the answers' places are not defined"
        )
    return len(_encode(before, marks, tokenizer)), len(_encode(after, marks, tokenizer))
