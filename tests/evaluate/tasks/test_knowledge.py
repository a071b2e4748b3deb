"""Examinations: each prompt by hand, over rows in the published layouts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from quadriga.errors import EvaluationError
from quadriga.evaluate.items import AnswerItem, ChoiceItem, Item
from quadriga.evaluate.tasks import TASKS
from quadriga.evaluate.tasks.knowledge import gpqa_cot_scores, gpqa_question, mmlu_pro_scores
from quadriga.evaluate.tasks.subjects import CEVAL_SUBJECTS, CMMLU_SUBJECTS
from tests.evaluate.fakes import Unchecked, write


def items(name: str, folder: Path, shots: int | None = None) -> list[Item]:
    return TASKS[name].items(Unchecked(folder), None, shots)


def choice(item: Item) -> ChoiceItem:
    assert isinstance(item, ChoiceItem)
    return item


def answer(item: Item) -> AnswerItem:
    assert isinstance(item, AnswerItem)
    return item


def pro(n: int, category: str, **more: Any) -> dict[str, Any]:
    return {"question": f"Q{n}?", "options": ["a ", "b", "c"], "answer": "B", "category": category} | more


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_mmlu_pro(tmp_path: Path, kind: str) -> None:
    tail = "-00000-of-00001.parquet" if kind == "parquet" else ".jsonl"
    worked = "A: Let's think step by step. One. The answer is (C)."
    examples = [
        pro(7, "law", cot_content=worked),
        pro(8, "math", cot_content=worked),
        pro(9, "law", cot_content=worked),
    ]
    write(tmp_path / f"mmlu_pro/validation{tail}", examples)
    write(tmp_path / f"mmlu_pro/test{tail}", [pro(1, "law"), pro(2, "math")])
    first, second = items("mmlu_pro", tmp_path, 1)
    options = "Options:\nA. a\nB. b\nC. c\nAnswer: Let's think step by step."
    head = (
        "The following are multiple choice questions (with answers) about {}. Think step by step and then finish your "
        'answer with "the answer is (X)" where X is the correct letter choice.\n'
    )
    assert answer(first).prompt == (
        f"{head.format('law')}Question:\nQ7?\n{options} One. The answer is (C).\n\nQuestion:\nQ1?\n{options}"
    )
    assert answer(second).prompt.startswith(f"{head.format('math')}Question:\nQ8?\n")
    assert (answer(first).group, answer(second).group) == ("law", "math")
    assert answer(first).grade("so the answer is (B).") == {"acc": 1.0}


@pytest.mark.parametrize(("text", "right"), [("answer is B", 1), ("answer is (A), no, answer is (B)", 0), ("B", 0)])
def test_mmlu_pro_takes_the_first_letter(text: str, right: int) -> None:
    assert mmlu_pro_scores("B", text) == {"acc": float(right)}


def science(n: int) -> dict[str, str]:
    wrong = {f"Incorrect Answer {i}": f"w{i}  [title]x" for i in (1, 2, 3)}
    return {"Question": f"Q{n}?", "Correct Answer": f" right{n} ", "High-level domain": "Physics"} | wrong


def test_gpqa(tmp_path: Path) -> None:
    write(tmp_path / "gpqa/gpqa_diamond.csv", [science(1), science(2)])
    found = [choice(item) for item in items("gpqa_diamond", tmp_path)]
    chosen = random.Random(1234)
    for item, row in zip(found, (science(1), science(2)), strict=True):
        choices, gold = gpqa_question(row, chosen)
        assert choices[gold] == row["Correct Answer"].strip()
        assert sorted(choices)[1:] == ["w1 . x", "w2 . x", "w3 . x"], "as the harness cleans them"
        listed = "\n".join(f"({letter}) {text}" for letter, text in zip("ABCD", choices, strict=True))
        prompt = f"What is the correct answer to this question:{row['Question']}\nChoices:\n{listed}\nAnswer:"
        assert item.pairs == tuple((prompt, f" ({letter})") for letter in "ABCD")
        assert (item.gold, item.group) == (gold, "Physics")
    reasoned = answer(items("gpqa_diamond_cot", tmp_path)[0])
    assert reasoned.prompt == found[0].pairs[0][0].removesuffix("Answer:") + "Let's think step by step: "
    letter = "ABCD"[found[0].gold]
    assert reasoned.grade(f"The answer is ({letter}).") == {"strict": 1.0, "flexible": 1.0}
    with pytest.raises(EvaluationError, match="fixed prompt"):
        items("gpqa_diamond", tmp_path, 3)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("The answer is (B).", 1, 1),
        ("First (A), but then (b)", 0, 0),
        ("The answer is (C). Or (B)", 0, 1),
        ("(B) has less energy (E)", 0, 0),
        ("B", 0, 0),
        ("It must be guilty-of-it!", 0, 0),
        ("It must be Guilty, of it!", 0, 1),
        ("Guilty of it? No, guilty.", 0, 0),
        ("My choice: B", 0, 1),
        ("My choice: B, that is 10 eV", 0, 0),
    ],
)
def test_gpqa_reasoned_answers(text: str, strict: int, flexible: int) -> None:
    choices = ("Guilty", "Guilty of it", "10 eV", "20 eV")
    assert gpqa_cot_scores(1, choices, text) == {"strict": float(strict), "flexible": float(flexible)}


def test_cmmlu_and_ceval(tmp_path: Path) -> None:
    assert (len(CMMLU_SUBJECTS), len(CEVAL_SUBJECTS)) == (67, 52)
    for subject in CMMLU_SUBJECTS:
        row = {"": "0", "Question": f" {subject}？", "A": "甲", "B": "乙", "C": "丙", "D": "丁", "Answer": "C"}
        write(tmp_path / f"cmmlu/test/{subject}.csv", [row])
        write(tmp_path / f"cmmlu/dev/{subject}.csv", [row | {"Question": "例？", "Answer": "A"}])
    for subject in CEVAL_SUBJECTS:
        row = {"id": "0", "question": f"{subject}？", "A": "甲", "B": "乙", "C": "丙", "D": "丁", "answer": "D"}
        write(tmp_path / f"ceval/val/{subject}_val.csv", [row])
        write(tmp_path / f"ceval/dev/{subject}_dev.csv", [row | {"question": "例？", "explanation": ""}])
    listed = "\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案："
    found = {choice(item).group: choice(item) for item in items("cmmlu", tmp_path, 1)}
    head = "以下是关于解剖学的单项选择题，请直接给出正确答案的选项。\n\n"
    prompt = f"{head}例？{listed} A\n\nanatomy？{listed}"
    assert found["anatomy"].pairs == tuple((prompt, f" {letter}") for letter in "ABCD")
    assert (found["anatomy"].gold, len(found)) == (2, 67)
    found = {choice(item).group: choice(item) for item in items("ceval", tmp_path, 0)}
    head = "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n"
    assert (found["law"].pairs[0], found["law"].gold) == ((f"{head}law？{listed}", " A"), 3)


def test_four_sets_of_everyday_and_school_questions(tmp_path: Path) -> None:
    write(
        tmp_path / "mine/openbookqa/test.jsonl",
        [{"query": "Question: The sun\nAnswer:", "choices": ["burns", "rests"], "gold": 1}],
    )
    write(
        tmp_path / "mine/sciq/validation.jsonl",
        [
            {
                "support": " P.",
                "question": "Q?",
                "distractor1": "x",
                "distractor2": "y",
                "distractor3": "z",
                "correct_answer": "r",
            }
        ],
    )
    five = {"label": list("ABCDE"), "text": ["v", "w", "x", "y", "z"]}
    write(tmp_path / "mine/commonsense_qa/validation.jsonl", [{"question": "Q? ", "choices": five, "answerKey": "D"}])
    people = {"context": "C.", "question": "Q?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "2"}
    write(tmp_path / "mine/siqa/validation.jsonl", [people])

    def only(name: str) -> ChoiceItem:
        return choice(TASKS[name].items(Unchecked(tmp_path / "mine"), None, 0)[0])

    assert (only("openbookqa").pairs[1], only("openbookqa").gold) == (("The sun", " rests"), 1)
    assert (only("sciq").pairs[3], only("sciq").gold) == (("P.\nQuestion: Q?\nAnswer:", " r"), 3)
    prompt = "Question: Q?\nA. v\nB. w\nC. x\nD. y\nE. z\nAnswer:"
    assert (only("commonsense_qa").pairs[3], only("commonsense_qa").gold) == ((prompt, " D"), 3)
    assert (only("siqa").pairs[1], only("siqa").gold) == (("Q: C. Q?\nA:", " y"), 1)
