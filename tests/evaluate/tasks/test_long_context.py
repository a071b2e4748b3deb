"""Long contexts: what is asked can be answered from the text, which is as long as fits."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest

from quadriga.errors import EvaluationError
from quadriga.evaluate.data import Data
from quadriga.evaluate.items import AnswerItem
from quadriga.evaluate.tasks import TASKS
from quadriga.evaluate.tasks.long_context import KINDS, Asked, Source, fitted, recalled, source_of
from tests.evaluate.fakes import RuleModel

WORDS = [f"word{a}{b}{c}" for a in "abcdefghij" for b in "klmno" for c in "pqrst"]
SOURCE = Source([f"Sentence {i} is here ." for i in range(50)], WORDS)


def asked(kind: str, size: int = 60, seed: int = 3) -> Asked:
    return KINDS[kind](random.Random(seed), SOURCE, size)


@pytest.mark.parametrize(
    ("kind", "n_hidden", "n_wanted"),
    [
        *(("niah_single_1", 1, 1), ("niah_single_2", 1, 1), ("niah_single_3", 1, 1), ("niah_multikey_1", 4, 1)),
        *(("niah_multikey_2", 61, 1), ("niah_multikey_3", 61, 1), ("niah_multivalue", 4, 4), ("niah_multiquery", 4, 4)),
    ],
)
def test_needles_are_in_the_text_once_and_belong_to_the_key(kind: str, n_hidden: int, n_wanted: int) -> None:
    one = asked(kind)
    hidden = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", one.text)
    assert (len(hidden), len(one.wanted)) == (n_hidden, n_wanted)
    query = re.search(r"The special magic \w+ for (.*) mentioned", one.prefix)
    assert query is not None
    keys = re.split(r", and |, ", query[1])
    assert sorted(value for key, value in hidden if key in keys) == sorted(one.wanted)
    assert one.text.endswith(f"for {query[1]} mentioned in the provided text?")
    single = n_wanted == 1
    assert one.text.startswith("A special magic" if single else "Some special magic")
    assert one.prefix.endswith(" is" if single else " are")


def test_variables_can_be_followed() -> None:
    one = asked("vt")
    value = re.search(r"assigned the value (\d{5})", one.text)
    assert value is not None
    held = {}
    for name, given in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", one.text):
        held[name] = held.get(given, given)
    assert {name for name, number in held.items() if number == value[1]} == set(one.wanted)
    assert len(one.wanted) == 5


def test_common_and_frequent_words_are_so() -> None:
    one = asked("cwe", 40)
    whole = one.text.split("Below is a numbered list of words.")[-1]
    counts = Counter(re.findall(r"\d+\. (\w+)", whole))
    assert {word for word, n in counts.items() if n == 30} == set(one.wanted) and len(one.wanted) == 10
    assert set(counts.values()) == {30, 3} and len(counts) == 50
    two = asked("fwe", 400)
    coded = two.text.split("coded words. ")[1].split("\n")[0].split()
    most = [word for word, _ in Counter(coded).most_common(4)]
    assert most[0] == "..." and tuple(most[1:]) == two.wanted


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_as_long_as_fits(kind: str) -> None:
    def count(text: str) -> int:
        return len(text.split())

    one = fitted(KINDS[kind], SOURCE, 3000, count, f"{kind} 0")
    used = count(f"{one.text} {one.prefix}") + 128
    bound = 150 + 3 * len(WORDS) + 30 * 10 if kind == "cwe" else 0  # where the words run out
    assert used <= 3000 and (used > 2800 or used >= bound > 0)
    assert one == fitted(KINDS[kind], SOURCE, 3000, count, f"{kind} 0")
    assert one != fitted(KINDS[kind], SOURCE, 3000, count, f"{kind} 1")


def test_a_length_that_holds_no_question_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="300 tokens of this model's vocabulary do not hold the question cwe 1"):
        fitted(KINDS["cwe"], SOURCE, 300, lambda text: len(text.split()), "cwe 1")


def test_what_is_recalled() -> None:
    assert recalled(["12", "AB", "cd"], "it is 12 and ab") == {"acc": pytest.approx(2 / 3)}


def test_lengths_fit_the_models_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quadriga.evaluate.tasks import long_context

    monkeypatch.setattr(long_context, "SAMPLES", 1)
    monkeypatch.setattr(long_context, "LENGTHS", (1500, 2500, 5000))
    text = " = Title = \n" + "\n".join(
        f" The {a} of {b} was here . It was {c} ." for a, b, c in zip(WORDS, WORDS[1:], WORDS[2:], strict=False)
    )
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2/test.txt").write_text(text)

    class Own(Data):
        def bytes(self, name: str) -> bytes:
            return (tmp_path / name).read_bytes()

    found = TASKS["ruler"].items(Own(tmp_path), RuleModel(context=2500))
    assert [item.group for item in found] == [f"{length} {kind}" for length in (1500, 2500) for kind in KINDS]
    assert all(isinstance(item, AnswerItem) and len(item.prompt.split()) <= 2500 - 128 for item in found)
    assert "Title" not in source_of(text).words and len(source_of(text).sentences) > 200
