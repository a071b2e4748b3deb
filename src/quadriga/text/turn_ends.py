"""What ends an assistant's turn, which is not always the vocabulary's eos token.

Three witnesses, united:

    the vocabulary     its eos tokens, generation_config.json's among them
    the names          special tokens called <|im_end|>, <|eot_id|>, ... (the list of llama.cpp, src/llama-vocab.cpp)
    the template       a conversation is rendered, and what it writes right behind the assistant's words is looked at

A GGUF whose eos is </s> while its template ends turns with <|im_end|> answers without end for whoever asks the first
witness only. Where the template's mark is no token of the vocabulary, the model writes it in ordinary tokens, and its
text ends a chat answer instead.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from quadriga.errors import TemplateError
from quadriga.text.added_tokens import END_OF_TURN
from quadriga.text.chat import Program, template_of
from quadriga.text.tokenizer import Tokenizer

_NAMES = (
    *END_OF_TURN,
    "<|endofturn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<turn|>",
    "<|end_of_text|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_utterance>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<eos>",
    "</s>",
)
"""Special tokens of these names end an answer wherever they are in a vocabulary."""

_NOT_BESIDE = {"<|end|>": ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"}), "</s>": ({"<|tool_response>"},)}
"""Names that mean something else in vocabularies that have all of one of these: there <|end|> ends a thought."""

_MARK = re.compile(r"<[^<>\s]{1,60}>|\[/?[A-Z][A-Z_]{0,40}\]")
"""What looks like a mark rather than words: <|im_end|>, <end_of_turn>, </s>, [INST]."""

_QUESTION, _ANSWER, _NEXT = "quadriga asks zero", "quadriga answers one", "quadriga asks two"
_PROBE_CPU_S = 0.25


@dataclass(frozen=True)
class TurnEnds:
    """What ends an answer."""

    ids: frozenset[int]
    """Tokens; they end any generation."""
    texts: tuple[str, ...] = ()
    """Strings, where the template's mark is no token; they end a chat answer."""


def turn_ends(tokenizer: Tokenizer) -> TurnEnds:
    """What ends an answer of a model with this vocabulary and its template."""
    ids = {*tokenizer.eos_ids, *_by_name(tokenizer)}
    mark = _template_mark(tokenizer)
    if mark is None:
        return TurnEnds(frozenset(ids))
    encoded = tokenizer.encode(mark, allow_special=True)
    texts = [tokenizer.token_text(i) for i in encoded]
    if mark in _meant_otherwise(tokenizer):
        return TurnEnds(frozenset(ids))
    if texts and texts[-1] == mark and not "".join(texts[:-1]).strip():  # SentencePiece may put a space before it
        return TurnEnds(frozenset({*ids, encoded[-1]}))
    return TurnEnds(frozenset(ids), (mark,))


def _by_name(tokenizer: Tokenizer) -> list[int]:
    # A control token by its looks alone has a text of its own: an answer may hold it.
    special = {name: i for name, i in tokenizer.special_ids.items() if not tokenizer.token_bytes(i)}
    meant_otherwise = _meant_otherwise(tokenizer)
    return [special[name] for name in _NAMES if name in special and name not in meant_otherwise]


def _meant_otherwise(tokenizer: Tokenizer) -> set[str]:
    """Names that end no answer in this vocabulary, though a template may write them behind one."""
    names = tokenizer.special_ids.keys()
    return {name for name, companies in _NOT_BESIDE.items() if any(company <= names for company in companies)}


def _template_mark(tokenizer: Tokenizer) -> str | None:
    """The mark the template writes right behind the assistant's words, or None where it writes none."""
    try:
        program = Program(template_of(tokenizer), tokenizer)
    except TemplateError:
        return None
    turns = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _NEXT},
    ]
    # The last answer first: in a conversation that goes on, templates may end earlier turns in another way. Some
    # formats have no system prompt, some need one; some refuse a conversation that ends with an answer.
    for opening in ([], [{"role": "system", "content": "quadriga"}]):
        for n in (2, 3):
            messages = [*opening, *turns[:n]]
            try:
                text = program.render(messages, [(len(messages), False)], cpu_s=_PROBE_CPU_S)[0]
            except TemplateError:
                continue  # whoever chats is told; here it only says nothing about ends
            behind = text.rpartition(_ANSWER)[2].partition(_NEXT)[0] if _ANSWER in text else ""
            if mark := _first_mark(behind, tokenizer):
                return mark
    return None


def _first_mark(text: str, tokenizer: Tokenizer) -> str | None:
    """The special token, or what looks like one, that a text begins with."""
    text = text.lstrip()
    special = [name for name in tokenizer.special_ids if name and text.startswith(name)]
    if special:
        return max(special, key=len)
    found = _MARK.match(text)
    return found[0] if found else None
