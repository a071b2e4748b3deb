"""Text as the tokens come: whole characters only, and never a piece of a stop string.

A token may end in the middle of a UTF-8 character and a stop string may be spread over several tokens, so text is held
back until it is certain:

    bytes of tokens ──► complete characters ──► all but a tail that could still become a stop string ──► out
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from quadriga.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns one answer's token ids into text as they arrive.

    The pieces of :meth:`push` followed by :meth:`finish` are together ``tokenizer.decode(ids, after=after)``, cut
    before the first stop string. Work per token does not grow with the answer.

    Args:
        tokenizer: the vocabulary.
        stop: texts that end the answer.
        after: the ids that the answer continues.
        shown: tokens without text of their own that add their names.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        after: Iterable[int] = (),
        shown: frozenset[int] = frozenset(),
    ) -> None:
        assert all(stop), "stop strings are not empty"
        self._tokenizer = tokenizer
        self._names = {i: name.encode() for name, i in tokenizer.special_ids.items() if i in shown} if shown else {}
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._held = ""
        self._opening = tokenizer.opening(after)

    def push(self, token_id: int, *, may_stop: bool = True) -> tuple[str, bool]:
        """Add a token. An id that no token has, a row that only pads the model's table, adds nothing.

        Args:
            may_stop: False: a stop string that is complete now is text.

        Returns:
            (text that became certain, True if a stop string has been completed and the answer ends before it).
        """
        tokenizer = self._tokenizer
        if token_id >= tokenizer.n_vocab:
            raw = b""
        elif self._opening:
            raw, self._opening = tokenizer.first_bytes(token_id, self._opening)
        else:
            raw = tokenizer.token_bytes(token_id)
        if not raw:
            raw = self._names.get(token_id, b"")
        text = self._decoder.decode(raw)
        if not may_stop:
            text, self._held = self._held + text, ""
            return text, False
        return self._release(text)

    def finish(self, *, whole_characters: bool = False) -> str:
        """What was held back: the tail that became no stop string, and U+FFFD for an unfinished character.

        Args:
            whole_characters: leave an unfinished character out instead.
        """
        if whole_characters:
            self._decoder.reset()
        text, _ = self._release(self._decoder.decode(b"", final=True))
        tail, self._held = self._held, ""
        return text + tail

    def _release(self, new: str) -> tuple[str, bool]:
        if not self._stop:
            return new, False
        text = self._held + new
        hits = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if hits:
            self._held = ""
            return text[: min(hits)], True
        keep = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


class Offsets:
    """Where tokens begin in a text that is made of them, as they come.

    The characters before a token are those that the tokens before it completed, so tokens that share a character begin
    at the same place, and special tokens take none.
    """

    def __init__(self, tokenizer: Tokenizer, *, after: Iterable[int] = ()) -> None:
        self._text, self._n = Detokenizer(tokenizer, after=after), 0

    def push(self, token_id: int) -> int:
        """Characters before this token."""
        before = self._n
        self._n += len(self._text.push(token_id)[0])
        return before


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``mark``: what must wait for more text."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
