"""Benchmarks with generated answers (GSM8K, HumanEval, MBPP, needle in a haystack) and with whole texts (WikiText)."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from quadriga.evaluate.data import Data, Row
from quadriga.evaluate.items import AnswerItem, CodeItem, Item, Scores, TextItem
from quadriga.evaluate.model import LanguageModel
from quadriga.evaluate.tasks.base import Shots, Task

# GSM8K ---------------------------------------------------------------------------------------------------------------

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def gsm8k_scores(gold: str, answer: str) -> Scores:
    """Grade an answer. strict: the number after "####"; flexible: the last number anywhere in the answer."""
    strict, numbers = _STRICT.search(answer), _FLEXIBLE.findall(answer)
    last = next((part for part in numbers[-1] if part), "") if numbers else ""
    return {
        "strict": float(strict is not None and _number(strict[1]) == _number(gold)),
        "flexible": float(bool(last) and _number(last.strip()) == _number(gold)),
    }


def _number(text: str) -> str:
    """Normalise a number for comparison: no commas, dollar signs or final dot, and nothing up to "####"."""
    for pattern in (r",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


def _gsm8k(data: Data, shots: int) -> list[Item]:
    pool = data.rows("gsm8k/train.jsonl") if shots else []
    draw, items = Shots(shots), list[Item]()
    for row in data.rows("gsm8k/test.jsonl"):
        examples = "".join(f"Question: {one['question']}\nAnswer: {one['answer']}\n\n" for one in draw.draw(pool))
        prompt = f"{examples}Question: {row['question']}\nAnswer:"
        items.append(AnswerItem(prompt=prompt, grader=_gsm8k_grader(row["answer"])))
    return items


def _gsm8k_grader(gold: str) -> Callable[[str], Scores]:
    return lambda answer: gsm8k_scores(gold, answer)


# HumanEval and MBPP --------------------------------------------------------------------------------------------------

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Stop strings that end a function body (Chen et al. 2021, section 2.1)."""


def code_of(answer: str) -> str:
    """The first fenced code block of an answer, or the whole answer if it has none."""
    match = re.search(r"```(?:[a-zA-Z0-9_+-]*)\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    return match[1] if match else answer


def humaneval_program(row: Row, answer: str) -> str:
    """Join prompt, answer and tests. An answer that defines the function itself replaces the prompt's definition."""
    code = code_of(answer)
    if re.search(rf"^def {re.escape(row['entry_point'])}\b", code, re.MULTILINE):
        code = f"    pass\n\n{code}"
    return f"{row['prompt']}{code}\n{row['test']}\ncheck({row['entry_point']})\n"


def _humaneval(data: Data, shots: int) -> list[Item]:
    return [
        CodeItem(prompt=row["prompt"], program=_humaneval_assembler(row), canonical=row["canonical_solution"])
        for row in data.rows("humaneval/HumanEval.jsonl")
    ]


def _humaneval_assembler(row: Row) -> Callable[[str], str]:
    return lambda answer: humaneval_program(row, answer)


def mbpp_prompt(row: Row, solution: str | None = None) -> str:
    """Prompt of Austin et al. 2021, section 4.1: the task and its three tests, then the start of the program."""
    tests = "\n".join(row["test_list"])
    end = "" if solution is None else f"{solution}\n[DONE]\n\n"
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} Your code should pass these "
        f"tests:\n\n{tests}\n[BEGIN]\n{end}"
    )


def mbpp_program(row: Row, answer: str) -> str:
    """Join the answer, the tests' setup code (which may use what the answer defines) and the tests."""
    return "\n".join([code_of(answer), row["test_setup_code"], *row["test_list"], ""])


def _mbpp(data: Data, shots: int) -> list[Item]:
    rows = {row["task_id"]: row for row in data.rows("mbpp/mbpp.jsonl")}
    examples = "".join(mbpp_prompt(rows[i], rows[i]["code"]) for i in (2, 3, 4)[:shots])
    return [
        CodeItem(prompt=examples + mbpp_prompt(rows[i]), program=_mbpp_assembler(rows[i]), canonical=rows[i]["code"])
        for i in range(11, 511)
    ]


def _mbpp_assembler(row: Row) -> Callable[[str], str]:
    return lambda answer: mbpp_program(row, answer)


# WikiText ------------------------------------------------------------------------------------------------------------


def wikitext_articles(text: str) -> list[str]:
    """Split a WikiText file into articles: each starts with a heading between single equals signs."""
    starts = [m.start() for m in re.finditer(r"^ = [^=\n]+ = $", text, re.MULTILINE)]
    return [text[start:stop].strip() for start, stop in zip(starts, [*starts[1:], len(text)], strict=True)]


def _wikitext(data: Data, shots: int) -> list[Item]:
    return [TextItem(text=article) for article in wikitext_articles(data.text("wikitext2/test.txt"))]


# Needle in a haystack ------------------------------------------------------------------------------------------------

NEEDLE_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
NEEDLE_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_CITIES = ("Lisbon", "Oslo", "Nairobi", "Kyoto", "Lima", "Perth", "Riga", "Quito", "Accra", "Hanoi")
_ANSWER_TOKENS = 16


def needle_prompt(hay: str, city: str, number: int, depth: float) -> str:
    """``hay`` with one sentence inserted after the fraction ``depth`` (0 to 1) of its lines, then the question."""
    lines = hay.split("\n")
    place = round(depth * len(lines))
    needle = f" The secret number of {city} is {number}. "
    body = "\n".join([*lines[:place], needle, *lines[place:]])
    return f"{body}\n\nQuestion: What is the secret number of {city}?\nAnswer: The secret number of {city} is"


def _needle(data: Data, model: LanguageModel) -> list[Item]:
    """Two items per depth and length, for all lengths that fit into the model's context."""
    text, chosen, items = data.text("wikitext2/test.txt"), random.Random(1234), list[Item]()
    for length in (n for n in NEEDLE_LENGTHS if n <= model.context):
        hay = _cut(text, length - _ANSWER_TOKENS - 64, model.count_tokens)
        for depth in NEEDLE_DEPTHS:
            for _ in range(2):
                city, number = chosen.choice(_CITIES), chosen.randrange(1_000_000, 10_000_000)
                prompt = needle_prompt(hay, city, number, depth)
                items.append(AnswerItem(prompt=prompt, grader=_contains(str(number)), group=f"{length}@{depth:.0%}"))
    return items


def _cut(text: str, n_tokens: int, count: Callable[[str], int]) -> str:
    """The start of the text (repeated if too short), within 64 characters of the most that ``n_tokens`` hold."""
    low, high = 0, n_tokens * 12
    while len(text) < high:
        text += text
    while high - low > 64:
        middle = (low + high) // 2
        if count(text[:middle]) <= n_tokens:
            low = middle
        else:
            high = middle
    return text[:low]


def _contains(wanted: str) -> Callable[[str], Scores]:
    return lambda answer: {"acc": float(wanted in answer.replace(",", ""))}


TASKS = (
    Task(
        name="gsm8k",
        version=1,
        title="GSM8K",
        protocol="EleutherAI's harness 0.4.13, gsm8k: 5 worked examples drawn from train, greedy, 256 tokens. Strict "
        "takes the number after ####, flexible the last number.",
        kind="generate",
        shots=5,
        build=_gsm8k,
        main="strict",
        max_new_tokens=256,
        stop=("Question:", "</s>", "<|im_end|>"),
    ),
    Task(
        name="humaneval",
        version=1,
        title="HumanEval",
        protocol="Chen et al. 2021: the prompt as it is, stops at class, def, #, if, print at the line's start; the "
        "published tests; unbiased pass@k (greedy for one sample, temperature 0.8 for more).",
        kind="code",
        shots=0,
        build=_humaneval,
        main="pass@1",
        fixed_shots=True,
        max_new_tokens=512,
        stop=HUMANEVAL_STOPS,
    ),
    Task(
        name="mbpp",
        version=1,
        title="MBPP",
        protocol="Austin et al. 2021: tasks 11 to 510, 3 shots (tasks 2, 3, 4), all three tests in the prompt; "
        "unbiased pass@k.",
        kind="code",
        shots=3,
        build=_mbpp,
        main="pass@1",
        max_new_tokens=512,
        stop=("[DONE]",),
    ),
    Task(
        name="wikitext",
        version=2,
        title="WikiText-2",
        protocol="WikiText-2's test text as published, <unk> and @-@ and all, each article whole, in the windows of "
        "EleutherAI's harness (the last with as much context as fits); not its detokenised raw text.",
        kind="rolling",
        shots=0,
        build=_wikitext,
        main="word_perplexity",
        fixed_shots=True,
    ),
    Task(
        name="needle",
        version=1,
        title="Needle in a haystack",
        protocol="Generated here: a sentence with a seven-digit number in WikiText-2, at five depths of lengths 1k to "
        "32k tokens that fit into the context, two each; the number must be in the next 16 tokens.",
        kind="generate",
        shots=0,
        build=lambda data, shots: [],
        build_for=_needle,
        main="acc",
        fixed_shots=True,
        max_new_tokens=_ANSWER_TOKENS,
        stop=("\n",),
        by_group=True,
    ),
)
