"""Conversations and preferences from JSON lines, in every layout in use, as token ids with the answers marked.

    messages        [{"role", "content"}]                          OpenAI
    conversations   [{"from": "human" | "gpt" | ..., "value"}]     ShareGPT
    instruction, input?, output                                    Alpaca
    instruction, context, response                                 Dolly
    prompt, response | completion                                  LLM Foundry
    question, answer                                               GSM8K

A preference has a conversation as above up to the last answer, and ``chosen`` and ``rejected``: text, a turn, or turns.
A row that cannot be used is counted with its reason, never repaired; more of them than allowed end the run. The loss
falls on answers only: where they lie is what rendering the conversation with and without them says
(``text.chat.render``), so any template works.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quadriga.errors import CorpusError, QuadrigaError
from quadriga.text.chat import render
from quadriga.text.tokenizer import Tokenizer
from quadriga.train.batch import IGNORE

Turns = list[dict[str, str]]

_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SHOWN = 5


@dataclass(frozen=True)
class Example:
    """One document to learn from."""

    ids: tuple[int, ...]
    targets: tuple[int, ...]
    """What follows each token, or IGNORE outside answers."""

    @property
    def n_targets(self) -> int:
        """Tokens the loss is taken of."""
        return sum(target != IGNORE for target in self.targets)


@dataclass(frozen=True)
class Preference:
    """Two answers to one conversation."""

    chosen: Example
    rejected: Example


@dataclass(frozen=True)
class Problem:
    """A question whose answer can be checked."""

    ids: tuple[int, ...]
    """The conversation up to where the assistant answers."""
    answer: str


@dataclass
class Rejects:
    """Rows that were left out, and why."""

    limit: int
    """More than this many end the reading."""
    reasons: dict[str, int] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)
    """FILE:LINE and reason of the first few."""

    @property
    def n(self) -> int:
        """How many."""
        return sum(self.reasons.values())

    def add(self, place: str, reason: str) -> None:
        """Count one.

        Raises:
            CorpusError: there are more than the limit.
        """
        kind = reason.split(":")[0]
        self.reasons[kind] = self.reasons.get(kind, 0) + 1
        if len(self.first) < _SHOWN:
            self.first.append(f"{place}: {reason}")
        if self.n > self.limit:
            raise CorpusError(
                f"{self.n} rows cannot be used, data.max_bad_rows allows {self.limit}. " + "; ".join(self.first)
            )

    def __str__(self) -> str:
        return ", ".join(f"{n} rows left out: {reason}" for reason, n in self.reasons.items())


def rows(paths: Sequence[Path], rejects: Rejects) -> Iterator[tuple[str, dict[str, Any]]]:
    """(FILE:LINE, object) of every line that is a JSON object.

    Raises:
        CorpusError: a file that cannot be read, or too many bad rows.
    """
    for path in paths:
        try:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    place = f"{path.name}:{number}"
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError):
                        rejects.add(place, "no JSON")
                        continue
                    if isinstance(row, dict):
                        yield place, row
                    else:
                        rejects.add(place, f"no JSON object: a {type(row).__name__}")
        except OSError as error:
            raise CorpusError(f"cannot read {path}: {error.strerror}") from None


class BadRowError(CorpusError):
    """One row that cannot be used; counted by whoever reads them."""


def conversation(row: Mapping[str, Any]) -> Turns:
    """A row of any known layout as turns.

    Raises:
        BadRowError: no known layout, or fields that are not text.
    """
    if "messages" in row:
        return [_turn(turn, "role", "content") for turn in _list(row["messages"], "messages")]
    if "conversations" in row:
        return [_turn(turn, "from", "value") for turn in _list(row["conversations"], "conversations")]
    for question, context, answer in (
        ("instruction", "input", "output"),
        ("instruction", "context", "response"),
        ("prompt", None, "response"),
        ("prompt", None, "completion"),
        ("question", None, "answer"),
    ):
        if question in row and answer in row:
            asked = _text(row[question], question)
            extra = _text(row.get(context) or "", context) if context else ""
            return [
                {"role": "user", "content": f"{asked}\n\n{extra}" if extra.strip() else asked},
                {"role": "assistant", "content": _text(row[answer], answer)},
            ]
    raise BadRowError(f"unknown columns: {', '.join(sorted(map(str, row)))[:80]}")


def _list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{name} is no list of turns")
    return value


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"{name} is no text")
    return value


def _turn(turn: object, role: str, content: str) -> dict[str, str]:
    if not isinstance(turn, dict) or role not in turn or content not in turn:
        raise BadRowError(f"a turn needs {role} and {content}")
    speaker = turn[role]
    if speaker == "tool":
        return {"role": "tool", "content": _text(turn[content], content)}
    if speaker not in _SPEAKERS:
        raise BadRowError(f"unknown speaker: {speaker!r}"[:80])
    return {"role": _SPEAKERS[speaker], "content": _text(turn[content], content)}


def example(turns: Turns, tokenizer: Tokenizer, seq_len: int, template: str | None = None) -> Example:
    """A conversation as ids, its answers marked.

    Raises:
        BadRowError: no answer, an empty one, or a conversation longer than ``seq_len``.
    """
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRowError("the last turn is not the assistant's")
    if any(turn["role"] == "assistant" and not turn["content"].strip() for turn in turns):
        raise BadRowError("an empty answer")
    rendered = render(turns, tokenizer, template, add_generation_prompt=False, with_spans=True)
    ids = rendered.ids
    if len(ids) > seq_len:
        raise BadRowError(f"longer than data.seq_len: {len(ids)} tokens")
    targets = [IGNORE] * len(ids)
    for start, stop in rendered.spans:
        targets[start - 1 : stop - 1] = ids[start:stop]  # token n predicts n + 1
    return Example(tuple(ids), tuple(targets))


def preference(row: Mapping[str, Any], tokenizer: Tokenizer, seq_len: int, template: str | None = None) -> Preference:
    """A row with a chosen and a rejected answer.

    Raises:
        BadRowError: columns of no known layout, equal answers, or conversations that are too long.
    """
    if "chosen" not in row or "rejected" not in row:
        raise BadRowError(f"no chosen and rejected: {', '.join(sorted(map(str, row)))[:80]}")
    before: Turns = []
    if "messages" in row or "conversations" in row:
        before = conversation(row)
    else:
        name = next((name for name in ("prompt", "question", "instruction") if name in row), None)
        if name is not None:
            before = [{"role": "user", "content": _text(row[name], name)}]
    both = [before + _answer(row[side]) for side in ("chosen", "rejected")]
    if both[0] == both[1]:
        raise BadRowError("chosen and rejected are equal")
    chosen, rejected = (example(turns, tokenizer, seq_len, template) for turns in both)
    return Preference(_last_answer(chosen), _last_answer(rejected))


def _answer(value: object) -> Turns:
    """The turns of a chosen or rejected answer; whole conversations bring their own question."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, dict):
        return [_turn(value, *(("from", "value") if "from" in value else ("role", "content")))]
    turns = _list(value, "an answer")
    names = ("from", "value") if isinstance(turns[0], dict) and "from" in turns[0] else ("role", "content")
    return [_turn(turn, *names) for turn in turns]


def _last_answer(one: Example) -> Example:
    """Only the last answer counts: the earlier ones are the same on both sides."""
    last = len(one.targets) - 1
    while one.targets[last] == IGNORE:
        last -= 1
    first = last
    while first > 0 and one.targets[first - 1] != IGNORE:
        first -= 1
    kept = [IGNORE] * len(one.targets)
    kept[first : last + 1] = one.targets[first : last + 1]
    return Example(one.ids, tuple(kept))


def problem(row: Mapping[str, Any], tokenizer: Tokenizer, seq_len: int, template: str | None = None) -> Problem:
    """A question with an answer to check (GSM8K: the text after ####).

    Raises:
        BadRowError: no question and answer, or one longer than ``seq_len``.
    """
    turns = conversation(row)
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise BadRowError("no question with an answer")
    ids = render(turns[:-1], tokenizer, template, add_generation_prompt=True).ids
    if len(ids) > seq_len:
        raise BadRowError(f"longer than data.seq_len: {len(ids)} tokens")
    return Problem(tuple(ids), turns[-1]["content"])


def text_examples(row: Mapping[str, Any], tokenizer: Tokenizer, seq_len: int) -> list[Example]:
    """Plain text for continued pre-training, cut into documents of at most ``seq_len``; every token counts.

    Raises:
        BadRowError: no text.
    """
    ids = tokenizer.encode(_text(row.get("text"), "text"))
    parts = [ids[start : start + seq_len + 1] for start in range(0, len(ids), seq_len)]
    return [Example(tuple(part[:-1]), tuple(part[1:])) for part in parts if len(part) > 1]


def read(
    paths: Sequence[Path], make: Callable[[dict[str, Any]], Any], rejects: Rejects, *, limit: int | None = None
) -> list[Any]:
    """Every usable row of the files through ``make``; no more than ``limit``.

    Raises:
        CorpusError: unreadable files, too many bad rows, or none that can be used.
    """
    found = []
    for place, row in rows(paths, rejects):
        try:
            found.append(make(row))
        except QuadrigaError as error:
            rejects.add(place, str(error))
        if len(found) == limit:
            break
    if not found:
        raise CorpusError(f"no row of {', '.join(p.name for p in paths)} can be used. {'; '.join(rejects.first)}")
    return found
