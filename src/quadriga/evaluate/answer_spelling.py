r"""The spelling of a mathematical answer, without what has no meaning: \left, dollar signs, units, ``x =``, Markdown.

    $\boxed{\,x = \dfrac12\text{ cm}}$   ──►   \frac12          **−5°**   ──►   -5          3 \geq x   ──►   3\gex

What two answers mean is compared by ``evaluate.equivalence``. Removed spelling: Lewkowycz et al. 2022 (Minerva),
appendix D.
"""

from __future__ import annotations

import re

_UNITS = (
    *("square", "dollars", "mph", "inches", "inch", "ft", "feet", "hours", "hour", "km", "units", "points", "minutes"),
    *(
        "minute",
        "digits",
        "cents",
        "degrees",
        "degree",
        "cm",
        "mm",
        "gm",
        "pounds",
        "meters",
        "meter",
        "meals",
        "edges",
    ),
    *("students", "multiples", "ways", "integers", "seconds", "miles", "years", "days", "people", "percent"),
)
_WORDS_AT_END = re.compile(r"\s*\\(?:text|mbox|mathrm)\s*\{[^{}]*\}(?:\^\{?[23]\}?)?$")
r"""A unit behind a number: 144 \mbox{ m}^3."""
_MEANING = re.compile(r"[ap]\.?\s?m\b", re.IGNORECASE)
"""No unit, though it stands where one does: 6 a.m. is not 6 p.m."""
_COMPOUND = re.compile(
    r"(?<=\d)\s*(?:km|mi|miles?|m|meters?|cm|ft|feet)(?:/|\s+per\s+)(?:h|hr|hour|s|sec|second|min|minute)\b"
)
"""A speed's unit."""
_NAME = r"[a-zA-Z](?:_\{?\w\}?)?"
_REMOVED = (
    *(r"\!", r"\,", r"\;", r"\:", r"\ ", "~", r"\quad", r"\qquad", r"\left", r"\right", r"\displaystyle", r"\$", "$"),
    *(r"^\circ", r"^{\circ}", r"\circ", r"\degree", r"\%", "%", r"\ldots", r"\dots", r"\bigl", r"\bigr", r"\big"),
)
_SYNONYMS = {
    r"\geqslant": r"\ge",
    r"\leqslant": r"\le",
    r"\geq": r"\ge",
    r"\leq": r"\le",
    r"\neq": r"\ne",
    r"\lvert": "|",
    r"\rvert": "|",
    r"\vert": "|",
    r"\varnothing": r"\emptyset",
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    r"\gt": ">",
    r"\lt": "<",
}
_SIGNS = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le "}
    | {
        "≥": r"\ge ",
        "≠": r"\ne ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∅": r"\emptyset ",
        "±": r"\pm ",
        "°": "",
        "∈": r"\in ",
    }
    | {"½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}"}
    | {"²": "^{2}", "³": "^{3}", "√": r"\sqrt ", "∠": r"\angle ", "\xa0": " "}
)
"""Signs that chat models write in place of LaTeX."""


def normal(answer: str) -> str:
    """An answer without the spelling that has no meaning: spaces, dollar signs, sizes of brackets, units, x = ."""
    text = _bare(answer).translate(_SIGNS).replace("\n", " ").replace(r",\!", "").replace("\\\\", "\x00")
    text = _unwrapped(text, "boxed")
    text = re.sub(r"\\[a-zA-Z]+", lambda found: _SYNONYMS.get(found[0], found[0]), text)
    text = _COMPOUND.sub("", text)
    unit = _WORDS_AT_END.search(text)
    if unit and not _MEANING.search(unit[0]) and re.search(r"\d", text[: unit.start()]):
        text = _WORDS_AT_END.sub("", text)
    for word in _UNITS:
        text = re.sub(rf"(?<![\\a-zA-Z]){word}\b(?:\^\{{?[23]\}}?)?", "", text)
    for piece in _REMOVED:
        text = re.sub(re.escape(piece) + ("(?![a-zA-Z])" if piece[-1].isalpha() else ""), "", text)
    for wrapper in ("text", "textbf", "mathrm", "mathbf", "mbox", "mathbb", "overline", "textit"):
        text = _unwrapped(text, wrapper)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text).replace(r"\{", "\x01").replace(r"\}", "\x02")
    text = re.sub(r",?\s*(?<![\\a-zA-Z])(?:and|or)(?![a-zA-Z])\s*", ",", text)
    text = re.sub(r"(\\[a-zA-Z]+)\s+(?=[a-zA-Z])", "\\1\x03", text)  # these spaces end a command's name
    text = re.sub(r"\s+", "", text).replace("\x00", "\\\\").replace("\x03", " ")
    if re.fullmatch(r"-?\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?", text):
        text = re.sub(r",|\{,\}", "", text)
    text = re.sub(r"_\{(\w)\}", r"_\1", text).replace(r"+\infty", r"\infty")
    return _without_name(re.sub(r"(?<=[\w)}])\*\*(?=[\w({\\-])", "^", text).rstrip("."))


def _bare(answer: str) -> str:
    r"""Without the marks around the whole: a sentence's dot, Markdown's bold and code, \( \) and \[ \]."""
    text = answer.strip().rstrip(".")
    for left, right in (("**", "**"), ("`", "`"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**")):
        if len(text) > 2 * len(left) and text.startswith(left) and text.endswith(right):
            text = text[len(left) : -len(right)].strip().rstrip(".")
    return text


def _without_name(text: str) -> str:
    """5 for x=5, and 1,2 for x=1,x=2; x=1,y=2 as it is: which value is whose matters."""
    names = set(re.findall(r"(?:^|,)(" + _NAME + r")(?==)", text))
    if len(names) > 1:
        return text
    return re.sub(rf"(^|,){_NAME}=", r"\1", re.sub(rf"^{_NAME}\\in(?![a-zA-Z])", "", text))


def _unwrapped(text: str, command: str) -> str:
    r"""``\command{inside}`` as ``inside``, wherever it stands."""
    mark = f"\\{command}" + "{"
    while (start := text.find(mark)) >= 0:
        stop = closing(text, start + len(mark) - 1)
        if stop < 0:
            return text.replace(mark, "")
        text = text[:start] + text[start + len(mark) : stop] + text[stop + 1 :]
    return text


def closing(text: str, start: int) -> int:
    """Index of the brace that closes the one at ``start``, or -1."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    return -1
