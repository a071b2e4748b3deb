"""Unicode clean-up: normalise the encoding of text and remove what is not text, without changing its meaning.

Done: NFC; uniform line ends; control and private-use characters, byte-order marks and soft hyphens removed; lone
surrogates and noncharacters replaced by U+FFFD (which a quality rule counts); no trailing spaces; at most two empty
lines in a row. Not done: NFKC (it turns x² into x2), changes of case or quotes, repair of wrongly decoded text (it
would be a guess; such documents are dropped). Zero-width joiners are kept: Indic scripts, Persian and emoji need them.
"""

from __future__ import annotations

import re
import unicodedata

_LINE_ENDS = re.compile(r"\r\n?|\u2028|\u2029|\x85")
_REMOVED = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u2060\ufeff\ufff9-\ufffb\ue000-\uf8ff]"
)
_BROKEN = re.compile("[\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_TRAILING = re.compile(r"[ \t\u00a0]+$", re.MULTILINE)
_EMPTY_LINES = re.compile(r"\n{4,}")


def clean(text: str) -> str:
    """Clean a text. Cleaning it again changes nothing."""
    text = _LINE_ENDS.sub("\n", text)
    text = _BROKEN.sub("\ufffd", text)
    text = _REMOVED.sub("", text)
    text = unicodedata.normalize("NFC", text)
    text = _TRAILING.sub("", text)
    return _EMPTY_LINES.sub("\n\n\n", text).strip("\n")
