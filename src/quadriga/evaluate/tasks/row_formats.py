"""The four row formats of questions, and the check of a row before it is used.

    choice     {query, choices, gold}                     one of several continuations
    schema     {context_options, continuation, gold}      one of several beginnings
    cloze      {context, continuation}                    the most probable continuation
    question   {context, answer, aliases}                 an answer that is written

A row that is not what its format says is refused with its number and field. Unchecked, a text as ``choices`` would be
taken for a list of letters, and a ``gold`` out of range for a question that nobody answers rightly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quadriga.errors import EvaluationError
from quadriga.evaluate.data import Row

_FORMATS = {
    "schema": {"context_options", "continuation", "gold"},
    "choice": {"query", "choices", "gold"},
    "question": {"context", "answer"},
    "cloze": {"context", "continuation"},
}
_OF_CHOICE = {"choice": "choices", "schema": "context_options"}


def row_format(row: Row) -> str:
    """Which of the four formats a row has: choice, schema, cloze or question.

    Raises:
        EvaluationError: none of them.
    """
    keys = row.keys()
    for format_name, needed in _FORMATS.items():
        if needed <= keys:
            return format_name
    wanted = "; ".join(f"{format_name}: {', '.join(sorted(needed))}" for format_name, needed in _FORMATS.items())
    raise EvaluationError(f"a row must have the keys of one of these formats ({wanted}); got {', '.join(keys)}")


def _is_text(value: Any) -> bool:
    """A text that can be written as UTF-8: JSON allows halves of surrogate pairs, which are no characters."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _says_something(value: Any) -> bool:
    return _is_text(value) and bool(value.strip())


def _several(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 1 and all(map(_says_something, value))


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "query": (_is_text, "a text"),
    "context": (_is_text, "a text"),
    "continuation": (_says_something, "a text that is not empty"),
    "answer": (_says_something, "a text that is not empty"),
    "choices": (_several, "a list of two or more texts, none of them empty"),
    "context_options": (_several, "a list of two or more texts, none of them empty"),
    "aliases": (lambda value: isinstance(value, list | tuple) and all(map(_says_something, value)), "a list of texts"),
    "chain_of_thought": (_is_text, "a text"),
    "category": (_is_text, "a text"),
}


def checked_row(row: Row, format_name: str, place: str) -> Row:
    """A row of this format without its empty fields (null); whole numbers in place of texts as their digits.

    Args:
        place: which row it is, for the message.

    Raises:
        EvaluationError: a field is missing or is not what it must be.
    """
    given = {name: _digits(value) if name in _CHECKS else value for name, value in row.items() if value is not None}
    for name in sorted(_FORMATS[format_name] - given.keys()):
        raise EvaluationError(f"{place} must be a {format_name} row with {name}; it has {', '.join(given)}")
    for name, (good, wanted) in _CHECKS.items():
        if name in given and not good(given[name]):
            raise EvaluationError(f"{place}: {name} must be {wanted}; got {given[name]!r:.80}")
    if format_name in _OF_CHOICE:
        most, gold = len(given[_OF_CHOICE[format_name]]) - 1, given["gold"]
        if type(gold) is not int or not 0 <= gold <= most:
            raise EvaluationError(
                f"{place}: gold must be the index of a choice (0 to {most}), got {gold!r:.80}. A TOML file can say "
                "that it is a letter, a number from 1 or a text (gold_is)."
            )
    return given


def _digits(value: Any) -> Any:
    """Whole numbers, also those of a list, as texts."""
    if isinstance(value, list | tuple):
        return [_digits(one) for one in value]
    return str(value) if type(value) is int else value
