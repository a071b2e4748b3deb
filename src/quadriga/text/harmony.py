"""gpt-oss's answers: messages in channels, taken apart as the text comes.

    <|channel|>analysis<|message|>...<|end|>                                                what the model thinks
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>    a tool call
    <|start|>assistant<|channel|>final<|message|>...<|return|>                              what it answers

The first message has no <|start|>assistant: the prompt ends with it. A message to a recipient is a call of that tool,
whatever its channel, and the recipient may stand before the channel as well; commentary to nobody is for the user.
Text outside this format is an answer. Source: the harmony format's description (openai/harmony, docs/format.md).

:class:`HarmonyParser` sees text in which these marks are written out, :class:`TokenParser` the tokens of an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from quadriga.text.stream import Detokenizer, overlap
from quadriga.text.tokenizer import Tokenizer

START, END, MESSAGE, CHANNEL, CONSTRAIN, RETURN, CALL = (
    f"<|{name}|>" for name in ("start", "end", "message", "channel", "constrain", "return", "call")
)
MARKS = (START, END, MESSAGE, CHANNEL, CONSTRAIN, RETURN, CALL, "<|endoftext|>")
"""What is no text of a message, wherever it stands."""

_RECIPIENT = re.compile(r"(?:^|\s)to=(\S+)")
_FUNCTIONS = "functions."
_MAX_HEADER = 512
"""A header is some tens of characters; what is longer and has no mark in it is an answer."""


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thinks."""

    message: int
    """Which message of the answer this is of, from 0."""
    text: str


@dataclass(frozen=True)
class Content:
    """A piece of what the user is to read."""

    message: int
    text: str


@dataclass(frozen=True)
class ToolCall:
    """A piece of a call."""

    message: int
    name: str
    """The tool: without ``functions.`` for those of the request, whole for the model's own (``browser.search``)."""
    text: str
    """A piece of its arguments; the first event of a call has the empty piece."""


Event = Reasoning | Content | ToolCall


class HarmonyParser:
    """Takes one answer apart: :meth:`push` its text in any pieces, then :meth:`finish`.

    The events' texts, put together by message, are the same however the text is cut. Nothing is held back but what may
    become a mark, and headers.
    """

    def __init__(self) -> None:
        self._held = ""
        self._header: list[str] | None = [""]
        """What stands between <|start|> and <|message|>, marks included; None inside a message."""
        self._implied = True
        """Whether the header's beginning, the role, stood in the prompt."""
        self._message = 0
        self._kind: Event = Content(0, "")

    def push(self, text: str) -> list[Event]:
        """Events that became certain with this piece of text."""
        self._held += text
        events: list[Event] = []
        while found := _first_mark(self._held):
            at, mark = found
            events += self._text(self._held[:at])
            self._held = self._held[at + len(mark) :]
            events += self._mark(mark)
        keep = max(overlap(self._held, mark) for mark in MARKS)
        events += self._text(self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return events

    def finish(self) -> list[Event]:
        """What was held back. A header that was begun and never became a message says nothing."""
        events = self._text(self._held)
        self._held = ""
        if self._header is not None and len(self._header) == 1 and self._implied:
            events += self._open(Content(self._message, ""), self._header[0])
        return events

    def _text(self, text: str) -> list[Event]:
        if not text:
            return []
        if self._header is None:
            return [_with(self._kind, text)]
        self._header[-1] += text
        plain = len(self._header) == 1 and not _may_be_header(self._header[0], self._implied)
        return self._open(Content(self._message, ""), self._header[0]) if plain else []

    def _mark(self, mark: str) -> list[Event]:
        if self._header is None and mark in (MESSAGE, CONSTRAIN):
            return []
        if self._header is None:  # a channel begins a message too, where the end before it was forgotten
            self._message += 1
            self._header = [""]
        if mark == MESSAGE:
            return self._open(_kind_of(self._header, self._message))
        if mark in (CHANNEL, CONSTRAIN):
            self._header += [mark, ""]
        else:
            self._header, self._implied = [""], mark != START
        return []

    def _open(self, kind: Event, text: str = "") -> list[Event]:
        self._kind, self._header = kind, None
        first: list[Event] = [kind] if isinstance(kind, ToolCall) else []
        return first + ([_with(kind, text)] if text else [])


class TokenParser:
    """A :class:`HarmonyParser` of tokens: control tokens of the marks' names are marks, all others are text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._parser = tokenizer, HarmonyParser()
        self._marks = {tokenizer.special_ids[mark]: mark for mark in MARKS if mark in tokenizer.special_ids}
        self._text = Detokenizer(tokenizer)

    def push(self, token_id: int) -> list[Event]:
        """Events that became certain with this token; of a character, with its last one."""
        mark = self._marks.get(token_id)
        if mark is None:
            return self._parser.push(self._text.push(token_id)[0])
        text = self._text.finish()
        self._text = Detokenizer(self._tokenizer, after=(token_id,))
        return self._parser.push(text + mark)

    def finish(self) -> list[Event]:
        """What was held back; see :meth:`HarmonyParser.finish`."""
        return [*self._parser.push(self._text.finish()), *self._parser.finish()]


def speaks_harmony(tokenizer: Tokenizer) -> bool:
    """Whether a vocabulary has the control tokens that the format is made of."""
    return {START, MESSAGE, CHANNEL, END, RETURN, CALL} <= tokenizer.special_ids.keys()


def parse(text: str) -> list[Event]:
    """A whole answer's messages, each one event."""
    parser = HarmonyParser()
    return joined([*parser.push(text), *parser.finish()])


def joined(events: Iterable[Event]) -> list[Event]:
    """Events with the pieces of a message put together."""
    whole: list[Event] = []
    for event in events:
        if whole and type(whole[-1]) is type(event) and whole[-1].message == event.message:
            whole[-1] = _with(event, whole[-1].text + event.text)
        else:
            whole.append(event)
    return whole


def _with(event: Event, text: str) -> Event:
    match event:
        case Reasoning():
            return Reasoning(event.message, text)
        case Content():
            return Content(event.message, text)
        case ToolCall():
            return ToolCall(event.message, event.name, text)


def _kind_of(header: list[str], message: int) -> Event:
    """What a message is, by its header: a text, then marks and the text behind each."""
    by_mark = dict(zip(["", *header[1::2]], header[0::2], strict=True))
    recipients = [found[1] for text in header[0::2] if (found := _RECIPIENT.search(text))]
    if recipients and recipients[0] not in ("user", "all", "assistant"):
        return ToolCall(message, recipients[0].removeprefix(_FUNCTIONS), "")
    channel = by_mark.get(CHANNEL, "").split()
    return Reasoning(message, "") if channel[:1] == ["analysis"] else Content(message, "")


def _may_be_header(text: str, implied: bool) -> bool:
    """Whether text before any mark may be the role and a recipient rather than an answer out of format."""
    if len(text) > _MAX_HEADER:
        return False
    role = "" if implied else r"[\w.:-]*"
    return re.fullmatch(rf"\s*{role}\s*(?:t|to|to=\S*\s*)?", text) is not None


def _first_mark(text: str) -> tuple[int, str] | None:
    found = [(at, mark) for mark in MARKS if (at := text.find(mark)) >= 0]
    return min(found, default=None)
