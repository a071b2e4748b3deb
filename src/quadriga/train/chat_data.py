"""Read conversations and preferences from JSON lines as token ids with the answers marked.

``train.conversations`` has the layouts of rows. A preference row has a conversation up to the last answer, and
``chosen`` and ``rejected``: text, a turn, or turns.

Rows that cannot be used are counted by reason and named, never repaired; too many of them end the run. The loss is
taken on answers only, calls of tools among them. Their positions are found by rendering the conversation with and
without them (``text.chat.render``), so any template works; a row whose tools it does not write cannot be used.
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
from quadriga.train.conversations import BadRowError, Turns, conversation, text_of, tools_of, turns_of

__all__ = ["BadRowError", "Turns", "conversation", "tools_of"]

_SHOWN = 5
_PLACES = 3


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
    """A question to which answers are sampled and rewarded."""

    ids: tuple[int, ...]
    """Token ids of the conversation up to the start of the assistant's answer."""
    answer: str
    """The row's own; empty if it has none."""
    row: Mapping[str, Any]


@dataclass
class Rejects:
    """Counts the rows that were skipped, by reason."""

    limit: int
    """More rejected rows than this raise CorpusError."""
    reasons: dict[str, int] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)
    """FILE:LINE and reason of the first few, for the error message."""
    places: dict[str, list[str]] = field(default_factory=dict)
    """FILE:LINE of the first few of each reason."""

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
        if len(self.places.setdefault(kind, [])) < _PLACES:
            self.places[kind].append(place)
        if len(self.first) < _SHOWN:
            self.first.append(f"{place}: {reason}")
        if self.n > self.limit:
            raise CorpusError(
                f"{self.n} rows cannot be used, but data.max_bad_rows is {self.limit}: " + "; ".join(self.first)
            )

    def __str__(self) -> str:
        return "; ".join(f"{n} rows skipped: {kind} ({self._where(kind, n)})" for kind, n in self.reasons.items())

    def _where(self, kind: str, n: int) -> str:
        return ", ".join(self.places[kind]) + (", ..." if n > len(self.places[kind]) else "")


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


def example(
    turns: Turns,
    tokenizer: Tokenizer,
    seq_len: int,
    template: str | None = None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    after: int = 0,
) -> Example:
    """Encode a conversation, with targets on the assistant's answers.

    Args:
        tools: the functions that the assistant may call, as ``text.chat.render`` takes them.
        after: answers among the first so many turns take no loss; nor do those of weight 0.

    Raises:
        BadRowError: no answer to learn, an empty answer, more than ``seq_len`` tokens, or a template that does not
            write the tools or their calls.
    """
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRowError("the last turn is not the assistant's")
    answers = [(i, turn) for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if any(not turn["content"].strip() and not turn.get("tool_calls") for _, turn in answers):
        raise BadRowError("an empty answer")
    bare = [{name: value for name, value in turn.items() if name != "weight"} for turn in turns]
    rendered = render(bare, tokenizer, template, add_generation_prompt=False, with_spans=True, tools=tools)
    ids = rendered.ids
    _refuse_unwritten_tools(rendered.text, tools)
    if len(ids) > seq_len:
        raise BadRowError(f"longer than data.seq_len: {len(ids)} tokens")
    targets = [IGNORE] * len(ids)
    for (place, turn), (start, stop) in zip(answers, rendered.spans, strict=True):
        _refuse_unwritten_calls(tokenizer.decode(ids[start:stop]), turn)
        if place >= after and turn.get("weight", 1):
            targets[start - 1 : stop - 1] = ids[start:stop]  # token n predicts n + 1
    if all(target == IGNORE for target in targets):
        raise BadRowError("no answer to learn, every weight is 0")
    return Example(tuple(ids), tuple(targets))


def _refuse_unwritten_tools(text: str, tools: Sequence[Mapping[str, Any]] | None) -> None:
    """A template without a word for tools leaves them out in silence, and the model would learn calls of nothing."""
    for tool in tools or ():
        if tool["function"]["name"] not in text:
            raise BadRowError(
                f"the chat template does not write tools: {tool['function']['name']!r} is not in its text"
            )


def _refuse_unwritten_calls(answer: str, turn: Mapping[str, Any]) -> None:
    for call in turn.get("tool_calls", ()):
        if call["function"]["name"] not in answer:
            name = call["function"]["name"]
            raise BadRowError(f"the chat template does not write calls of tools: {name!r} is not in its text")


def preference(row: Mapping[str, Any], tokenizer: Tokenizer, seq_len: int, template: str | None = None) -> Preference:
    """Encode a row with a chosen and a rejected answer; turns that both have are not learned.

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
            asked = row[name]
            before = turns_of(asked) if isinstance(asked, list) else [{"role": "user", "content": text_of(asked, name)}]
    both = [_continued(before, _answer(row[side])) for side in ("chosen", "rejected")]
    if both[0] == both[1]:
        raise BadRowError("chosen and rejected are equal")
    shared = next((i for i, (a, b) in enumerate(zip(*both, strict=False)) if a != b), min(map(len, both)))
    tools = tools_of(row)
    chosen, rejected = (example(turns, tokenizer, seq_len, template, tools=tools, after=shared) for turns in both)
    return Preference(chosen, rejected)


def _continued(before: Turns, answer: Turns) -> Turns:
    """The whole conversation; an answer of several turns may begin with the question."""
    return answer if before and answer[: len(before)] == before else before + answer


def _answer(value: object) -> Turns:
    """The turns of a chosen or rejected answer."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return turns_of([value] if isinstance(value, dict) else value)


def problem(row: Mapping[str, Any], tokenizer: Tokenizer, seq_len: int, template: str | None = None) -> Problem:
    """Encode a question, with the row's own answer if the conversation ends with one.

    Raises:
        BadRowError: no question, or more than ``seq_len`` tokens.
    """
    turns = conversation(row)
    answered = turns[-1]["role"] == "assistant"
    if answered and len(turns) < 2:
        raise BadRowError("no question before the answer")
    tools = tools_of(row)
    rendered = render(turns[:-1] if answered else turns, tokenizer, template, add_generation_prompt=True, tools=tools)
    _refuse_unwritten_tools(rendered.text, tools)
    ids = rendered.ids
    if len(ids) > seq_len:
        raise BadRowError(f"longer than data.seq_len: {len(ids)} tokens")
    return Problem(tuple(ids), turns[-1]["content"] if answered else "", row)


def text_examples(row: Mapping[str, Any], tokenizer: Tokenizer, seq_len: int, end_id: int) -> list[Example]:
    """Encode plain text for continued pre-training, cut into documents of at most ``seq_len`` tokens.

    A text begins with the tokens that the model wants before a prompt, and ends with ``end_id``, as in a corpus.

    Raises:
        BadRowError: the row has no text.
    """
    text = text_of(row.get("text"), "text")
    if not text.strip():
        raise BadRowError("an empty text")
    ids = [*tokenizer.prefix_ids, *tokenizer.encode(text), end_id]
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
