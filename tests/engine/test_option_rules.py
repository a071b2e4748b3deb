"""The tables of options: what counts as given, what is refused, how it is said."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest

from quadriga.errors import ConfigError
from quadriga.option_rules import OneOf, Real, Rule, Whole, as_flag, is_given, refuse_unused, require_values

RULES = (Rule("gguf_format", lambda o: o["to"] == "gguf", "it goes with {to} gguf, and {reason}. Leave it out"),)


@pytest.mark.parametrize("value", [None, False, [], ()])
def test_not_given(value: Any) -> None:
    assert not is_given(value)
    refuse_unused(RULES, {"gguf_format": value, "to": "hf"}, reason="")
    require_values({"gguf_format": OneOf(("q8_0",))}, {"gguf_format": value})


@pytest.mark.parametrize("value", ["", "q8_0", 0, 0.0, True, ["x"]])
def test_given(value: Any) -> None:
    assert is_given(value)
    with pytest.raises(
        ConfigError, match=r"^gguf_format.* would have no effect: it goes with to gguf, and so on. Leave"
    ):
        refuse_unused(RULES, {"gguf_format": value, "to": "hf"}, reason="so on")
    refuse_unused(RULES, {"gguf_format": value, "to": "gguf"}, reason="so on")


def test_the_command_line_reads_flags() -> None:
    with pytest.raises(ConfigError, match=r"^--gguf-format q8_0 would .* goes with --to gguf"):
        refuse_unused(RULES, {"gguf_format": "q8_0", "to": "hf"}, as_flag, reason="")


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (OneOf(("a", "b")), ["a", "b"], ["", "c", "A", 1]),
        (Whole(1, 4), [1, 4], [0, 5, -1, 2.0, "2", 10**30]),
        (Real(0, 1), [0, 0.5, 1.0], [-0.1, 1.1, nan, inf, "0.5", 10**400]),
    ],
)
def test_what_a_value_may_be(allowed: Any, inside: list[Any], outside: list[Any]) -> None:
    for value in inside:
        require_values({"n": allowed}, {"n": value})
    for value in outside:
        with pytest.raises(ConfigError, match=r"^--n must be "):
            require_values({"n": allowed}, {"n": value}, as_flag)
