"""The 25 instructions of IFEval (Zhou et al. 2023, arXiv 2311.07911), each checked by a rule on the answer's text.

    follows("punctuation:no_comma", {}, "One, two.")     False

What counts is as in the benchmark's own program (google-research/instruction_following_eval) and in EleutherAI's
harness 0.4.13, with three differences. Sentences are split by this module's rule instead of NLTK's trained model, which
needs a download; languages are told by fastText's model instead of langdetect's, which is random without a seed.
Where a row asks for a count of "!" or "#" as letters, these are counted; the benchmark's program takes a random letter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from quadriga.errors import EvaluationError
from quadriga.text.language import language

Check = Callable[[str, Mapping[str, Any]], bool]
"""(answer, the instruction's arguments) -> is it followed."""

CONSTRAINED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_ABBREVIATIONS = frozenset({"dr", "mr", "mrs", "ms", "prof", "st", "jr", "sr", "vs", "etc", "inc", "ltd", "fig"})
_FENCES = ("```json", "```Json", "```JSON", "```")


def follows(instruction: str, arguments: Mapping[str, Any], answer: str) -> bool:
    """True if ``answer`` follows the instruction; an empty answer follows none.

    Args:
        instruction: a key of ``CHECKS``, e.g. "length_constraints:number_words".
        arguments: the row's ``kwargs`` for it; those that are None do not count as given.

    Raises:
        EvaluationError: an unknown instruction, a missing argument, or a language without the library that tells it.
    """
    if instruction not in CHECKS:
        raise EvaluationError(f"an instruction must be one of IFEval's {len(CHECKS)}, got {instruction!r}")
    given = {name: value for name, value in arguments.items() if value is not None}
    try:
        return bool(answer.strip()) and CHECKS[instruction](answer, given)
    except KeyError as error:
        raise EvaluationError(f"{instruction} needs the argument {error}, it came with {sorted(given)}") from None


def loose_variants(answer: str) -> list[str]:
    """The eight texts of which one must pass in the loose grading: without first or last line, without asterisks."""
    lines = answer.split("\n")
    cut = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(text.replace("*", "") for text in cut)]


def _compared(count: int, relation: str, limit: int) -> bool:
    """The benchmark's two relations."""
    if relation not in ("less than", "at least"):
        raise EvaluationError(f"a relation must be 'less than' or 'at least', got {relation!r}")
    return count < limit if relation == "less than" else count >= limit


# Keywords ------------------------------------------------------------------------------------------------------------


def _occurrences(word: str, answer: str) -> int:
    return len(re.findall(re.escape(word), answer, re.IGNORECASE))


def _existence(answer: str, given: Mapping[str, Any]) -> bool:
    return all(_occurrences(word, answer) for word in given["keywords"])


def _frequency(answer: str, given: Mapping[str, Any]) -> bool:
    return _compared(_occurrences(given["keyword"].strip(), answer), given["relation"], given["frequency"])


def _forbidden_words(answer: str, given: Mapping[str, Any]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE) for word in given["forbidden_words"])


def _letter_frequency(answer: str, given: Mapping[str, Any]) -> bool:
    count = answer.lower().count(given["letter"].strip().lower())
    return _compared(count, given["let_relation"], given["let_frequency"])


# Lengths -------------------------------------------------------------------------------------------------------------


def count_sentences(text: str) -> int:
    """Sentences: runs up to a full stop, question or exclamation mark before a space, not after an abbreviation."""
    pieces = re.split(r"(?<=[.!?])[\"'”’)\]]*\s+|(?<=[。！？])|\n{2,}", text.strip())
    count, open_piece = 0, False
    for piece in pieces:
        if not piece.strip():
            continue
        last = re.search(r"(\w+)\.$", piece.strip())
        initial = last is not None and (
            last[1].lower() in _ABBREVIATIONS or re.fullmatch(r"[A-Z]", last[1]) is not None
        )
        count += not initial
        open_piece = initial
    return count + open_piece


def _number_sentences(answer: str, given: Mapping[str, Any]) -> bool:
    return _compared(count_sentences(answer), given["relation"], given["num_sentences"])


def _number_words(answer: str, given: Mapping[str, Any]) -> bool:
    return _compared(len(re.findall(r"\w+", answer)), given["relation"], given["num_words"])


def _number_paragraphs(answer: str, given: Mapping[str, Any]) -> bool:
    """Paragraphs are separated by ***; only the first and the last may be empty, and then do not count."""
    parts = re.split(r"\s?\*\*\*\s?", answer)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    return bool(sum(bool(part.strip()) for part in parts) == given["num_paragraphs"])


def _nth_paragraph_first_word(answer: str, given: Mapping[str, Any]) -> bool:
    parts = answer.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    if not 0 < given["nth_paragraph"] <= count:
        return False
    words = parts[given["nth_paragraph"] - 1].split()
    if not words:
        return False
    first = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"').lower(), maxsplit=1)[0]
    return bool(count == given["num_paragraphs"] and first == given["first_word"].lower())


# Content and format --------------------------------------------------------------------------------------------------


def _number_placeholders(answer: str, given: Mapping[str, Any]) -> bool:
    return bool(len(re.findall(r"\[.*?\]", answer)) >= given["num_placeholders"])


def _postscript(answer: str, given: Mapping[str, Any]) -> bool:
    marker = given["postscript_marker"].strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(known.get(marker, re.escape(marker.lower())), answer.lower()) is not None


def _number_bullet_lists(answer: str, given: Mapping[str, Any]) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", answer, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", answer, re.MULTILINE)
    return bool(len(stars) + len(dashes) == given["num_bullets"])


def _constrained_response(answer: str, given: Mapping[str, Any]) -> bool:
    return any(one in answer for one in CONSTRAINED_ANSWERS)


def _number_highlighted_sections(answer: str, given: Mapping[str, Any]) -> bool:
    """*Single* and **double** asterisks around text of one line, each found by a pattern of its own."""
    single = [part for part in re.findall(r"\*[^\n*]*\*", answer) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*[^\n*]*\*\*", answer) if part[2:-2].strip()]
    return bool(len(single) + len(double) >= given["num_highlights"])


def _multiple_sections(answer: str, given: Mapping[str, Any]) -> bool:
    mark = re.escape(given["section_spliter"].strip())
    return bool(len(re.findall(rf"{mark}\s?\d+", answer)) >= given["num_sections"])


def _json_format(answer: str, given: Mapping[str, Any]) -> bool:
    text = answer.strip()
    for fence in _FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def _title(answer: str, given: Mapping[str, Any]) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", answer))


def _two_responses(answer: str, given: Mapping[str, Any]) -> bool:
    parts = answer.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    kept = [part.strip() for part in parts if part.strip()]
    return len(kept) == 2 and kept[0] != kept[1]


def _repeat_prompt(answer: str, given: Mapping[str, Any]) -> bool:
    return answer.strip().lower().startswith(given["prompt_to_repeat"].strip().lower())


def _end_checker(answer: str, given: Mapping[str, Any]) -> bool:
    return answer.strip().strip('"').lower().endswith(given["end_phrase"].strip().lower())


def _quotation(answer: str, given: Mapping[str, Any]) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _no_comma(answer: str, given: Mapping[str, Any]) -> bool:
    return "," not in answer


# Cases and languages -------------------------------------------------------------------------------------------------


def _capital_word_frequency(answer: str, given: Mapping[str, Any]) -> bool:
    """Words with hyphens are one word; what follows an apostrophe is a word of its own, as for NLTK."""
    words = re.findall(r"'\w+|\w+(?:-\w+)*", answer)
    count = sum(word.isupper() for word in words)
    return _compared(count, given["capital_relation"], given["capital_frequency"])


def _english_capital(answer: str, given: Mapping[str, Any]) -> bool:
    return answer.isupper() and language(answer.lower())[0] == "en"


def _english_lowercase(answer: str, given: Mapping[str, Any]) -> bool:
    return answer.islower() and language(answer)[0] == "en"


def _response_language(answer: str, given: Mapping[str, Any]) -> bool:
    return bool(language(answer)[0] == given["language"].split("-")[0])


CHECKS: dict[str, Check] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _response_language,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _number_bullet_lists,
    "detectable_format:constrained_response": _constrained_response,
    "detectable_format:number_highlighted_sections": _number_highlighted_sections,
    "detectable_format:multiple_sections": _multiple_sections,
    "detectable_format:json_format": _json_format,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end_checker,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_word_frequency,
    "change_case:english_capital": _english_capital,
    "change_case:english_lowercase": _english_lowercase,
    "punctuation:no_comma": _no_comma,
}
