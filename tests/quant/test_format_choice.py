"""The choice of formats keeps the budget and is as good as any other choice."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quadriga.errors import ConfigError
from quadriga.quant.format_choice import Candidate, choose, protected_share

candidates = st.dictionaries(
    st.sampled_from("abcd"),
    st.lists(
        st.tuples(st.integers(1, 50), st.floats(0, 10, allow_subnormal=False)), min_size=1, max_size=4, unique=True
    ),
    min_size=1,
).map(lambda d: {n: [Candidate(f"f{i}", *option) for i, option in enumerate(options)] for n, options in d.items()})


def total(options: dict[str, list[Candidate]], chosen: dict[str, str]) -> tuple[int, float]:
    picked = [next(c for c in options[name] if c.format == form) for name, form in chosen.items()]
    return sum(c.nbytes for c in picked), sum(c.error for c in picked)


@given(candidates, st.integers(0, 60))
def test_choices_keep_the_budget_and_are_nearly_optimal(options: dict[str, list[Candidate]], spare: int) -> None:
    smallest = sum(min(c.nbytes for c in option) for option in options.values())
    budget = smallest + spare
    nbytes, error = total(options, choose(options, budget))
    assert nbytes <= budget
    every = [
        dict(zip(options, forms, strict=True)) for forms in product(*([c.format for c in o] for o in options.values()))
    ]
    best = min(e for n, e in (total(options, chosen) for chosen in every) if n <= budget)
    # A greedy choice on the hull loses at most the last step that did not fit: one matrix's whole range.
    widest = max(max(c.error for c in o) - min(c.error for c in o) for o in options.values())
    assert error <= best + widest + 1e-9


def test_bytes_are_spent_where_they_help_most() -> None:
    options = {
        "robust": [Candidate("q4", 10, 0.10), Candidate("q8", 20, 0.01)],
        "delicate": [Candidate("q4", 10, 5.00), Candidate("q8", 20, 0.20)],
    }
    assert choose(options, 30) == {"robust": "q4", "delicate": "q8"}
    assert choose(options, 40) == {"robust": "q8", "delicate": "q8"}


def test_the_gain_per_byte_decides() -> None:
    """A small matrix whose error falls by 3 for 10 bytes comes before a large one's 5 for 100."""
    options = {
        "large": [Candidate("q4", 100, 6.0), Candidate("q8", 200, 1.0)],
        "small": [Candidate("q4", 10, 4.0), Candidate("q8", 20, 1.0)],
    }
    assert choose(options, 215) == {"large": "q4", "small": "q8"}


def test_a_step_that_does_not_fit_is_skipped_for_one_that_does() -> None:
    options = {
        "large": [Candidate("q4", 10, 100.0), Candidate("q8", 60, 0.0)],
        "small": [Candidate("q4", 10, 2.0), Candidate("q8", 20, 0.0)],
    }
    assert choose(options, 35) == {"large": "q4", "small": "q8"}


def test_an_option_below_the_line_between_two_others_is_never_taken() -> None:
    """q5 gains little for its bytes and q8 much, so the choice goes from q4 to q8 in one step."""
    options = {
        "w": [Candidate("q4", 10, 10.0), Candidate("q5", 20, 9.9), Candidate("q8", 30, 0.0)],
        "v": [Candidate("q4", 10, 5.0), Candidate("q8", 30, 0.0)],
    }
    assert choose(options, 45) == {"w": "q8", "v": "q4"}
    assert choose(options, 35)["w"] == "q4"


def test_an_option_that_a_cheaper_one_beats_is_never_taken() -> None:
    options = {"w": [Candidate("q4", 10, 0.1), Candidate("worse", 15, 0.2), Candidate("q8", 20, 0.05)]}
    assert {choose(options, budget)["w"] for budget in range(10, 30)} == {"q4", "q8"}


def test_a_budget_below_the_smallest_formats_is_an_error() -> None:
    with pytest.raises(ConfigError, match="the budget must be at least"):
        choose({"w": [Candidate("q4", 10, 0.1)]}, 9)


def test_an_expert_with_few_tokens_is_protected() -> None:
    assert protected_share(0, 1000, 16) == 1 / 32
    assert protected_share(500, 1000, 16) == 0.5
