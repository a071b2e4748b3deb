"""Thoughts told apart from the answer, whole and in any pieces."""

from __future__ import annotations

import random

import pytest

from quadriga.text.reasoning import Thought, Thoughts, inside

THINK = ("<think>", "</think>")
# (what the model writes, the prompt had opened a thought, thought, words)
ANSWERS = [
    ("<think>\nOne.\n Two.\n</think>\n\nThree.\n", False, "One.\n Two.", "Three.\n"),
    ("One.</think>Two <think>x</think>", True, "One.", "Two <think>x</think>"),
    ("\n\n</think>\n\nTwo", True, "", "Two"),
    (" \n One.</think>Two", True, "One.", "Two"),
    ("  <think></think> a", False, "", "a"),
    ("<think>never ends </thin", False, "never ends </thin", ""),
    ("Just <think>words</think>", False, "", "Just <think>words</think>"),
    ("<thin", False, "", "<thin"),
    ("  <b>", False, "", "  <b>"),
    ("", True, "", ""),
]


@pytest.mark.parametrize("seed", [None, *range(8)])
@pytest.mark.parametrize(("text", "opened", "thought", "words"), ANSWERS, ids=lambda value: str(value)[:20])
def test_thoughts_and_words(text: str, opened: bool, thought: str, words: str, seed: int | None) -> None:
    reader, rng, at = Thoughts(THINK, opened=opened), random.Random(seed), 0
    said = {True: "", False: ""}
    while True:
        n = len(text) if seed is None else rng.choice([1, 1, 2, 5])
        for piece in reader.push(text[at : at + n], last=at + n >= len(text)):
            assert piece, "nothing empty"
            is_thought = isinstance(piece, Thought)
            assert not (is_thought and said[False]), "thoughts come first"
            said[is_thought] += piece.text if isinstance(piece, Thought) else piece
        at += n
        if at >= len(text):
            break
    assert (said[True], said[False]) == (thought, words)


def test_words_do_not_wait() -> None:
    assert Thoughts(None).push("<think>", last=False) == ["<think>"]
    reader = Thoughts(THINK)
    assert reader.push("It", last=False) == ["It"]
    reader = Thoughts(THINK, opened=True)
    assert reader.push("One two", last=False) == [Thought("One two")]


def test_a_prompt_is_inside_a_thought_by_its_last_mark() -> None:
    assert inside("a<think>\n", THINK) and inside("<think></think>b<think>", THINK)
    assert not inside("<think>\n\n</think>\n\n", THINK) and not inside("a", THINK) and not inside("<think>", None)
