"""Long contexts after RULER (Hsieh et al. 2024): eleven kinds of questions over text that is generated to a length.

    niah_single_1..3      a number or identifier hidden in repeated sentences or in prose
    niah_multikey_1..3    several are hidden, one is asked for; in 2 and 3 all of the text is such sentences
    niah_multivalue       one key has four values, all are asked for
    niah_multiquery       four keys are asked for
    vt                    chains of assignments; which variables have a value
    cwe, fwe              the words that occur most often, in a list of words and in a coded text

Sizes and questions are those of the published generator; the prose is WikiText-2's instead of essays, and words come
from it too. Its two kinds over SQuAD and HotpotQA are left out: their data is not here. A question's text is made as
long as fits into the length, answer included, by the model's own tokenizer.
"""

from __future__ import annotations

import random
import re
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from quadriga.errors import EvaluationError
from quadriga.evaluate.data import Data
from quadriga.evaluate.items import AnswerItem, Item, Scores
from quadriga.evaluate.model import LanguageModel
from quadriga.evaluate.tasks.base import Task

LENGTHS = (4096, 8192, 16384, 32768)
SAMPLES = 5
"""Questions of each kind and length; the published generator makes 500."""
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_ANSWER_TOKENS = 128


@dataclass(frozen=True)
class Asked:
    """A generated question: the text with its question, the beginning of the answer, and what must be in the answer."""

    text: str
    prefix: str
    wanted: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """What text is made of: prose cut into sentences, and words."""

    sentences: Sequence[str]
    words: Sequence[str]


Maker = Callable[[random.Random, Source, int], Asked]
"""(random numbers, source, how much text: sentences, lines or words) -> a question."""


def source_of(text: str) -> Source:
    """Sentences and words of WikiText-2."""
    prose = " ".join(line for line in text.split("\n") if line.strip() and not line.startswith(" ="))
    sentences = [one.strip() for one in re.split(r"(?<= [.!?]) ", re.sub(r"\s+", " ", prose)) if one.strip()]
    return Source(sentences, sorted(set(re.findall(r"\b[a-z]{4,12}\b", prose))))


# Needles -------------------------------------------------------------------------------------------------------------


def _needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def _value(chosen: random.Random, source: Source, kind: str) -> str:
    if kind == "numbers":
        return str(chosen.randint(1_000_000, 9_999_999))
    if kind == "uuids":
        return str(uuid.UUID(int=chosen.getrandbits(128), version=4))
    return f"{chosen.choice(source.words)}-{chosen.choice(source.words)}"


def needles(hay: str, key_kind: str, value_kind: str, *, keys: int = 1, values: int = 1, queries: int = 1) -> Maker:
    """A maker of needles in a haystack.

    Args:
        hay: prose, repeat (one line of noise again and again) or needle (lines like the needles).
        key_kind, value_kind: words, numbers or uuids.
        keys, values, queries: how many keys there are, values of each, and keys that are asked for.
    """

    def make(chosen: random.Random, source: Source, size: int) -> Asked:
        names = [_value(chosen, source, key_kind) for _ in range(keys)]
        held = {name: [_value(chosen, source, value_kind) for _ in range(values)] for name in names}
        hidden = [_needle(value_kind, name, value) for name in names for value in held[name]]
        chosen.shuffle(hidden)
        lines = _hay(chosen, source, hay, key_kind, value_kind, size)
        for needle in hidden:
            lines.insert(chosen.randint(0, len(lines)), needle)
        asked = chosen.sample(names, queries)
        single = queries * values == 1
        kind = value_kind.removesuffix("s") if single else value_kind
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        context = (" " if hay == "prose" else "\n").join(lines)
        text = (
            f"{'A' if single else 'Some'} special magic {kind} {'is' if single else 'are'} hidden within the following "
            f"text. Make sure to memorize it. I will quiz you about the {kind} afterwards.\n{context}\n"
            f"What {'is' if single else 'are all'} the special magic {kind} for {query} mentioned in the provided text?"
        )
        prefix = f"The special magic {kind} for {query} mentioned in the provided text {'is' if single else 'are'}"
        return Asked(text, prefix, tuple(value for name in asked for value in held[name]))

    return make


def _hay(chosen: random.Random, source: Source, hay: str, key_kind: str, value_kind: str, size: int) -> list[str]:
    if hay == "repeat":
        return [_NOISE] * size
    if hay == "needle":
        pairs = [(_value(chosen, source, key_kind), _value(chosen, source, value_kind)) for _ in range(size)]
        return [_needle(value_kind, key, value) for key, value in pairs]
    times = -(-size // len(source.sentences))
    return list((list(source.sentences) * times)[:size])


# Variables and words -------------------------------------------------------------------------------------------------


def variables(chosen: random.Random, source: Source, size: int) -> Asked:
    """A chain of five variables that pass a value on, in lines of noise; all five are asked for."""
    names: list[str] = []
    while len(names) < 5:
        name = "".join(chosen.choices(string.ascii_uppercase, k=5))
        names += [] if name in names else [name]
    value = str(chosen.randint(10_000, 99_999))
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]
    lines = [_NOISE] * size
    places = sorted(chosen.choices(range(len(lines) + 1), k=len(chain)))
    for i, (place, line) in enumerate(zip(places, chain, strict=True)):
        lines.insert(place + i, line)
    text = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        + "\n".join(lines)
        + f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
    )
    prefix = (
        "Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the "
        "value "
        f"{value}, they are:"
    )
    return Asked(text, prefix, tuple(names))


def common_words(chosen: random.Random, source: Source, size: int) -> Asked:
    """Ten words 30 times and ``size`` others 3 times, numbered; an example with 10 and 3 comes first."""

    def listed(n_others: int, often: int, seldom: int) -> tuple[str, list[str]]:
        words = chosen.sample(source.words, 10 + min(n_others, len(source.words) - 10))
        whole = words[:10] * often + words[10:] * seldom
        chosen.shuffle(whole)
        numbered = " ".join(f"{i}. {word}" for i, word in enumerate(whole, 1))
        asked = (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
            "ones that "
            f"appear most often.\n{numbered}\nQuestion: What are the 10 most common words in the above list?"
        )
        return asked, words[:10]

    prefix = "Answer: The top 10 words that appear most often in the list are:"
    example, shown = listed(30, 10, 3)
    solved = " ".join(f"{i}. {word}" for i, word in enumerate(shown, 1))
    asked, wanted = listed(size, 30, 3)
    return Asked(f"{example} {prefix} {solved}\n{asked}", prefix, tuple(wanted))


def frequent_words(chosen: random.Random, source: Source, size: int) -> Asked:
    """About ``size`` coded words whose counts fall as 1 / rank^2, the first dots; the next three are asked for."""
    words: list[str] = []
    while len(words) < 4 + size // 50:
        word = "".join(chosen.choices(string.ascii_lowercase, k=6))
        words += [] if word in words else [word]
    counts = [int(size * 6 / 9.8696 / rank**2) for rank in range(1, len(words) + 1)]  # 6 / pi^2: their sum is 1
    coded = [word for word, count in zip(["...", *words[1:]], counts, strict=True) for _ in range(count)]
    chosen.shuffle(coded)
    text = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared "
        f"coded words. {' '.join(coded)}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        f"What are "
        "the three most frequently appeared words in the above coded text?"
    )
    prefix = "Answer: According to the coded text above, the three most frequently appeared words are:"
    return Asked(text, prefix, tuple(words[1:4]))


KINDS: dict[str, Maker] = {
    "niah_single_1": needles("repeat", "words", "numbers"),
    "niah_single_2": needles("prose", "words", "numbers"),
    "niah_single_3": needles("prose", "words", "uuids"),
    "niah_multikey_1": needles("prose", "words", "numbers", keys=4),
    "niah_multikey_2": needles("needle", "words", "numbers"),
    "niah_multikey_3": needles("needle", "uuids", "uuids"),
    "niah_multivalue": needles("prose", "words", "numbers", values=4),
    "niah_multiquery": needles("prose", "words", "numbers", keys=4, queries=4),
    "vt": variables,
    "cwe": common_words,
    "fwe": frequent_words,
}


def fitted(make: Maker, source: Source, length: int, count: Callable[[str], int], seed: str) -> Asked:
    """The question with the most text that leaves room for the answer; the same seed for every size that is tried.

    Raises:
        EvaluationError: even the least text does not fit.
    """

    def tried(size: int) -> Asked:
        return make(random.Random(seed), source, size)

    def fits(size: int) -> bool:
        asked = tried(size)
        return count(f"{asked.text} {asked.prefix}") + _ANSWER_TOKENS <= length

    low, high = 1, 64
    if not fits(low):
        raise EvaluationError(f"{length} tokens of this model's vocabulary do not hold the question {seed}")
    while fits(high) and high < length:
        low, high = high, 2 * high
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return tried(low)


def recalled(wanted: Sequence[str], answer: str) -> Scores:
    """acc: the share of what was asked for that is in the answer, without regard to case."""
    return {"acc": sum(one.lower() in answer.lower() for one in wanted) / len(wanted)}


def _ruler(data: Data, model: LanguageModel) -> list[Item]:
    source, items = source_of(data.text("wikitext2/test.txt")), list[Item]()
    for length in (one for one in LENGTHS if one <= model.context):
        for kind, make in KINDS.items():
            for number in range(SAMPLES):
                asked = fitted(make, source, length, model.count_tokens, f"{kind} {length} {number}")
                prompt = f"{asked.text} {asked.prefix}"
                items.append(AnswerItem(prompt=prompt, grader=_grader(asked.wanted), group=f"{length} {kind}"))
    return items


def _grader(wanted: Sequence[str]) -> Callable[[str], Scores]:
    return lambda answer: recalled(wanted, answer)


TASKS = (
    Task(
        name="ruler",
        version=1,
        title="RULER",
        protocol="After Hsieh et al. 2024 (eleven of thirteen kinds, 4k to 32k tokens that fit into the context, "
        "five each): generated "
        "here by the model's tokenizer, prose from WikiText-2; the share of the wanted texts in the next 128 tokens.",
        kind="generate",
        shots=0,
        build=lambda data, shots: [],
        build_for=_ruler,
        main="acc",
        fixed_shots=True,
        max_new_tokens=_ANSWER_TOKENS,
        by_group=True,
    ),
)
