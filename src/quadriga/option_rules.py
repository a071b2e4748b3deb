"""Which options have an effect beside which others, as tables: one that would have none is refused by its name.

    Rule("layout", lambda o: o["to"] == "hf", "a layout is chosen for {to} hf only")
    OneOf(("hf", "gguf"))   Whole(1, 64)   Real(0, 1)                       what a value may be

An option counts as given unless it is None, False or an empty list, so the options of a table have None as their
default and whoever reads them fills in what that stands for. The same table speaks to Python (``kv_format``) and to the
command line (``--kv-format``): texts name options in braces, and :data:`Spelling` writes them out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quadriga.errors import ConfigError

Spelling = Callable[[str], str]
"""How an option is named to whoever gave it."""


def as_argument(option: str) -> str:
    """An option's name in Python."""
    return option


def as_flag(option: str) -> str:
    """An option's name on the command line."""
    return "--" + option.replace("_", "-")


@dataclass(frozen=True)
class Rule:
    """When an option has an effect.

    Attributes:
        option: its name in Python.
        when: True where it has one, of all options by name.
        why: what it goes with, or why it goes with nothing here, and what to do; names in braces are spelled out.
    """

    option: str
    when: Callable[[Mapping[str, Any]], bool]
    why: str


@dataclass(frozen=True)
class OneOf:
    """One of some names."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"

    def holds(self, value: object) -> bool:
        """True for one of the names."""
        return value in self.names


@dataclass(frozen=True)
class Whole:
    """A whole number in a range, both ends included."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def holds(self, value: object) -> bool:
        """True for a whole number in the range; True and False are none."""
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclass(frozen=True)
class Real:
    """A number in a range, both ends included."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"from {self.low:g} to {self.high:g}"

    def holds(self, value: object) -> bool:
        """True for a number in the range; NaN is in none."""
        return isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high


Allowed = OneOf | Whole | Real
"""What a value may be."""


def is_given(value: object) -> bool:
    """True if an option was given: None, False and empty lists say that it was not."""
    return not (value is None or value is False or (isinstance(value, (list, tuple)) and not value))


def require_values(values: Mapping[str, Allowed], options: Mapping[str, Any], spell: Spelling = as_argument) -> None:
    """Refuse what no option may be.

    Args:
        values: option -> what it may be.
        options: all options by name; those not given are passed over.
        spell: how their names are written.

    Raises:
        ConfigError: a value outside its range, naming the option.
    """
    for option, allowed in values.items():
        value = options[option]
        if is_given(value) and not allowed.holds(value):
            raise ConfigError(f"{spell(option)} must be {allowed}; got {_shown(value)}")


def refuse_unused(
    rules: Sequence[Rule],
    options: Mapping[str, Any],
    spell: Spelling = as_argument,
    given: Collection[str] | None = None,
    **words: str,
) -> None:
    """Refuse what would be ignored.

    Args:
        rules: of those options that do not always have an effect; several of one must all hold.
        options: all options by name.
        spell: how their names are written.
        given: those that were given, where that is known otherwise than by their values.
        words: what else stands in braces.

    Raises:
        ConfigError: an option was given that has no effect here, naming it, why, and what to do.
    """
    for rule in rules:
        there = is_given(options[rule.option]) if given is None else rule.option in given
        if there and not rule.when(options):
            value = "" if options[rule.option] is True else f" {_shown(options[rule.option])}"
            why = rule.why.format_map(_Spelled(spell, words))
            raise ConfigError(f"{spell(rule.option)}{value} would have no effect: {why}")


class _Spelled(dict[str, str]):
    """Every name, spelled; the words as they are."""

    def __init__(self, spell: Spelling, words: Mapping[str, str]) -> None:
        super().__init__(words)
        self._spell = spell

    def __missing__(self, option: str) -> str:
        return self._spell(option)


def _shown(value: object) -> str:
    text = str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else repr(value)
    return (text if text.strip() else repr(text))[:80]
