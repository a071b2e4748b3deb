"""Grading: the four ways to compare continuations of different lengths, truths, cloze."""

from __future__ import annotations

import pytest

from quadriga.evaluate.items import ChoiceItem, ClozeItem, TextItem, TruthItem
from tests.evaluate.fakes import Said


def test_each_way_of_comparing_can_choose_differently() -> None:
    texts = ("ab", "abcdefgh", "好好好", "x")
    item = ChoiceItem(pairs=tuple(("q", " " + text) for text in texts), gold=0, texts=texts)
    answers = [Said(-4.0, n_tokens=1), Said(-8.0, n_tokens=4), Said(-3.3, n_tokens=1), Said(-3.0, n_tokens=2)]
    # sums: the last; a character: -2, -1, -1.1, -3; a byte: -2, -1, -0.37, -3; a token: -4, -2, -3.3, -1.5
    golds = {"acc": 3, "acc_norm": 1, "acc_bytes": 2, "acc_tokens": 3}
    for gold in range(4):
        scores = ChoiceItem(pairs=item.pairs, gold=gold, texts=texts).grade(answers)
        assert scores == {name: float(right == gold) for name, right in golds.items()}


def test_of_equal_choices_the_first_is_chosen() -> None:
    item = ChoiceItem(pairs=(("q", "a"), ("q", "b")), gold=0)
    assert item.grade([Said(-1.0), Said(-1.0)])["acc"] == 1.0


def test_mc2_is_right_where_probabilities_underflow() -> None:
    item = TruthItem(context="q", continuations=("a", "b", "c"), truths=(True, False, True))
    assert item.pairs == (("q", "a"), ("q", "b"), ("q", "c"))
    assert item.grade([Said(-1000.0), Said(-1000.0), Said(-1000.0)])["mc2"] == pytest.approx(2 / 3)
    assert item.grade([Said(-1.0), Said(-800.0), Said(-2.0)])["mc2"] == pytest.approx(1.0)


def test_cloze_and_text() -> None:
    assert ClozeItem(context="a", continuation=" b").grade([Said(-2.0, greedy=True)]) == {"acc": 1.0, "logprob": -2.0}
    graded = TextItem(text="two wörds").grade(Said(-7.0, n_tokens=3))
    assert graded == {"logprob": -7.0, "words": 2.0, "bytes": 10.0, "tokens": 3.0}
