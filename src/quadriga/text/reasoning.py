"""What a model thinks before it answers, told apart from the answer as both come.

answer ─► undecided ──"<think>"──► thoughts ──"</think>"──► words
              └────── anything else ─────────────────────────▲
"""

from __future__ import annotations

from dataclasses import dataclass

from quadriga.text.stream import overlap


@dataclass(frozen=True)
class Thought:
    """A piece of what was thought."""

    text: str


class Thoughts:
    """Reads one answer.

    Args:
        marks: before and behind what is thought; None: the model does not think, all is words.
        opened: the prompt ends inside of a thought already.
    """

    def __init__(self, marks: tuple[str, str] | None, *, opened: bool = False) -> None:
        self._marks = marks
        self._state = "words" if marks is None else "thoughts" if opened else "undecided"
        self._held = ""
        self._fresh = opened
        """Nothing has been said since the last mark; white space there belongs to nobody."""

    @property
    def thinking(self) -> bool:
        """True while what comes is thought."""
        return self._state == "thoughts"

    def push(self, text: str, *, last: bool) -> list[str | Thought]:
        """Pieces that this text makes certain, in order; all that is left with the last."""
        if self._state == "words" and not self._fresh and not self._held:
            return [text] if text else []
        self._held += text
        out: list[str | Thought] = []
        if self._state == "undecided":
            self._begin(last)
        if self._state == "thoughts":
            out += self._think(last)
        if self._state == "words":
            said = self._held.lstrip() if self._fresh else self._held
            if said:
                self._fresh, self._held = False, ""
                out.append(said)
            elif last:
                self._held = ""
        return out

    def _begin(self, last: bool) -> None:
        assert self._marks is not None
        start, mark = self._held.lstrip(), self._marks[0]
        if start.startswith(mark):
            self._state, self._fresh, self._held = "thoughts", True, start[len(mark) :]
        elif last or not mark.startswith(start):
            self._state = "words"

    def _think(self, last: bool) -> list[str | Thought]:
        assert self._marks is not None
        mark = self._marks[1]
        at = self._held.find(mark)
        if at >= 0:
            said, self._held = self._held[:at].rstrip(), self._held[at + len(mark) :]
            self._state, fresh, self._fresh = "words", self._fresh, True
        else:
            # White space at the end, and what may be the beginning of the mark, wait.
            end = len(self._held)
            if not last:
                end -= overlap(self._held, mark)
            end = len(self._held[:end].rstrip())
            said, self._held = self._held[:end], "" if last else self._held[end:]
            fresh = self._fresh
            self._fresh = self._fresh and not said.strip()
        said = said.lstrip() if fresh else said
        return [Thought(said)] if said else []


def inside(prompt: str, marks: tuple[str, str] | None) -> bool:
    """True if a prompt ends inside of a thought: its last mark is the one that opens."""
    return marks is not None and prompt.rfind(marks[0]) > prompt.rfind(marks[1])
