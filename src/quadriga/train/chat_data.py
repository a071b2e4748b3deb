"""Read conversations and preferences from JSON lines, in all common layouts, as token ids with the answers marked.

    messages        [{"role", "content"}]                          OpenAI
    conversations   [{"from": "human" | "gpt" | ..., "value"}]     ShareGPT
    instruction, input?, output                                    Alpaca
    instruction, context, response                                 Dolly
    prompt, response | completion                                  LLM Foundry
    question, answer                                               GSM8K

A preference row has a conversation as above up to the last answer, and ``chosen`` and ``rejected``: text, a turn, or
turns.

Rows that cannot be used are counted by reason, never repaired; too many of them end the run. The loss is taken on
answers only. Their positions are found by rendering the conversation with and without them (``text.chat.render``), so
any template works.
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
    """One training document: token ids and targets."""

    ids: tuple[int, ...]
    targets: tuple[int, ...]
    """The next token of each position, or IGNORE outside answers."""

    @property
    def n_targets(self) -> int:
        """Number of tokens that take a loss."""
        return sum(target != IGNORE for target in self.targets)


@dataclass(frozen=True)
class Preference:
    """A chosen and a rejected answer to the same conversation."""

    chosen: Example
    rejected: Example


@dataclass(frozen=True)
class Problem:
    """A question whose answer can be checked automatically."""

    ids: tuple[int, ...]
    """Token ids of the conversation up to the start of the assistant's answer."""
    answer: str


@dataclass
class Rejects:
    """Counts the rows that were skipped, by reason."""

    limit: int
    """More rejected rows than this raise CorpusError."""
    reasons: dict[str, int] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)
    """FILE:LINE and reason of the first few, for the error message."""

    @property
    def n(self) -> int:
        """Number of skipped rows."""
        return sum(self.reasons.values())

    def add(self, place: str, reason: str) -> None:
        """Count a rejected row.

        Args:
            place: FILE:LINE.

        Raises:
            CorpusError: there are now more than ``limit``.
        """
        kind = reason.split(":")[0]
        self.reasons[kind] = self.reasons.get(kind, 0) + 1
        if len(self.first) < _SHOWN:
            self.first.append(f"{place}: {reason}")
        if self.n > self.limit:
            raise CorpusError(
                f"{self.n} rows cannot be used, but data.max_bad_rows is {self.limit}: " + "; ".join(self.first)
            )

    def __str__(self) -> str:
        return ", ".join(f"{n} rows skipped: {reason}" for reason, n in self.reasons.items())


def rows(paths: Sequence[Path], rejects: Rejects) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (FILE:LINE, object) for every line that is a JSON object; others go to ``rejects``.

    Raises:
        CorpusError: a file cannot be read, or there are too many bad rows.
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
                        rejects.add(place, "not JSON")
                        continue
                    if isinstance(row, dict):
                        yield place, row
                    else:
                        rejects.add(place, f"not a JSON object but a {type(row).__name__}")
        except OSError as error:
            raise CorpusError(f"cannot read {path}: {error.strerror}") from None


class BadRowError(CorpusError):
    """A row that cannot be used; caught and counted by :func:`read`."""


def conversation(row: Mapping[str, Any]) -> Turns:
    """Convert a row of any known layout to turns ({"role", "content"}).

    Raises:
        BadRowError: unknown layout, or fields that are not text.
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
        raise BadRowError(f"{name} is not a list of turns")
    return value


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"{name} is not text")
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
    """Encode a conversation, with targets on the assistant's answers.

    Raises:
        BadRowError: no answer, an empty answer, or more than ``seq_len`` tokens.
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
    """Encode a row with a chosen and a rejected answer.

    Raises:
        BadRowError: unknown layout, equal answers, or more than ``seq_len`` tokens.
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
    """The turns of a chosen or rejected answer; a list of turns may include the question."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, dict):
        return [_turn(value, *(("from", "value") if "from" in value else ("role", "content")))]
    turns = _list(value, "an answer")
    names = ("from", "value") if isinstance(turns[0], dict) and "from" in turns[0] else ("role", "content")
    return [_turn(turn, *names) for turn in turns]


def _last_answer(one: Example) -> Example:
    """Remove the targets of all answers but the last: the earlier ones are the same in both conversations."""
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
    """Encode a question whose answer can be checked (GSM8K: the text after ####).

    Raises:
        BadRowError: question or answer missing, or more than ``seq_len`` tokens.
    """
    turns = conversation(row)
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise BadRowError("no question with an answer")
    ids = render(turns[:-1], tokenizer, template, add_generation_prompt=True).ids
    if len(ids) > seq_len:
        raise BadRowError(f"longer than data.seq_len: {len(ids)} tokens")
    return Problem(tuple(ids), turns[-1]["content"])


def text_examples(row: Mapping[str, Any], tokenizer: Tokenizer, seq_len: int) -> list[Example]:
    """Encode plain text for continued pre-training, cut into documents of at most ``seq_len`` tokens.

    Raises:
        BadRowError: the row has no text.
    """
    ids = tokenizer.encode(_text(row.get("text"), "text"))
    parts = [ids[start : start + seq_len + 1] for start in range(0, len(ids), seq_len)]
    return [Example(tuple(part[:-1]), tuple(part[1:])) for part in parts if len(part) > 1]


def read(
    paths: Sequence[Path], make: Callable[[dict[str, Any]], Any], rejects: Rejects, *, limit: int | None = None
) -> list[Any]:
    """Read the files and apply ``make`` to each row, skipping and counting those that raise BadRowError.

    Args:
        limit: stop after so many usable rows.

    Raises:
        CorpusError: unreadable files, too many bad rows, or no usable row.
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
