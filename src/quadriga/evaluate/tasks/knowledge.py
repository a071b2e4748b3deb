"""Examinations: MMLU-Pro, GPQA, CMMLU, C-Eval, and four sets of everyday and school science questions.

Prompts are those of EleutherAI's harness 0.4.13; where a task differs, its protocol says how.
"""

from __future__ import annotations

import random
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence

from quadriga.evaluate.data import Data, Row
from quadriga.evaluate.items import AnswerItem, ChoiceItem, Item, Scores
from quadriga.evaluate.tasks.base import Task
from quadriga.evaluate.tasks.choice import HARNESS, OWN_POOL, Question, choice_task, question_items
from quadriga.evaluate.tasks.subjects import CEVAL_SUBJECTS, CMMLU_SUBJECTS

_LETTERS = "ABCDEFGHIJ"

# MMLU-Pro ------------------------------------------------------------------------------------------------------------

_THINK = "Let's think step by step."
_MMLU_PRO_ANSWER = re.compile(r"answer is \(?([ABCDEFGHIJ])\)?")


def mmlu_pro_prompt(row: Row, worked: bool = False) -> str:
    """A question with up to ten lettered options; ``worked`` adds the published reasoning of an example."""
    options = "".join(f"{letter}. {text.strip()}\n" for letter, text in zip(_LETTERS, row["options"], strict=False))
    start = f"Question:\n{row['question']}\nOptions:\n{options}Answer: {_THINK}"
    if not worked:
        return start
    return f"{start} {row['cot_content'].replace(f'A: {_THINK} ', '')}\n\n"


def mmlu_pro_scores(gold: str, answer: str) -> Scores:
    """acc: the first letter after "answer is" is the right one."""
    found = _MMLU_PRO_ANSWER.search(answer)
    return {"acc": float(found is not None and found[1] == gold)}


def _mmlu_pro(data: Data, shots: int) -> list[Item]:
    examples: dict[str, list[Row]] = {}
    if shots:
        for row in data.rows(data.first_of(*_files("mmlu_pro", "validation"))):
            examples.setdefault(row["category"], []).append(row)
    items = list[Item]()
    for row in data.rows(data.first_of(*_files("mmlu_pro", "test"))):
        head = (
            f"The following are multiple choice questions (with answers) about {row['category']}. Think step by step "
            'and then finish your answer with "the answer is (X)" where X is the correct letter choice.\n'
        )
        worked = "".join(mmlu_pro_prompt(one, worked=True) for one in examples.get(row["category"], [])[:shots])
        prompt = head + worked + mmlu_pro_prompt(row)
        items.append(AnswerItem(prompt=prompt, grader=_letter_grader(row["answer"]), group=row["category"]))
    return items


def _letter_grader(gold: str) -> Callable[[str], Scores]:
    return lambda answer: mmlu_pro_scores(gold, answer)


def _files(folder: str, split: str) -> tuple[str, str]:
    """The names under which a split is published: Parquet, or the same rows as JSONL."""
    return f"{folder}/{split}-00000-of-00001.parquet", f"{folder}/{split}.jsonl"


# GPQA ----------------------------------------------------------------------------------------------------------------


def gpqa_question(row: Row, chosen: random.Random) -> tuple[list[str], int]:
    """(the four choices in random order, index of the right one)."""
    names = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Correct Answer")
    choices = [_gpqa_text(row[name]) for name in names]
    right = choices[3]
    chosen.shuffle(choices)
    return choices, choices.index(right)


def _gpqa_text(text: str | None) -> str:
    return " " if text is None else text.strip().replace(" [title]", ". ").replace("  ", " ")


def _gpqa_prompt(row: Row, choices: Sequence[str], end: str) -> str:
    listed = "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=True))
    return f"What is the correct answer to this question:{row['Question']}\nChoices:\n{listed}\n{end}"


def _gpqa(part: str) -> Callable[[Data, int], list[Item]]:
    def build(data: Data, shots: int) -> list[Item]:
        chosen, items = random.Random(1234), list[Item]()
        for row in data.rows(f"gpqa/gpqa_{part}.csv"):
            choices, gold = gpqa_question(row, chosen)
            prompt = _gpqa_prompt(row, choices, "Answer:")
            pairs = tuple((prompt, f" ({letter})") for letter in "ABCD")
            items.append(ChoiceItem(pairs=pairs, gold=gold, texts=("(A)", "(B)", "(C)", "(D)"), group=_domain(row)))
        return items

    return build


def _domain(row: Row) -> str:
    return str(row.get("High-level domain") or "")


def gpqa_cot_scores(gold: int, choices: Sequence[str], answer: str) -> Scores:
    """strict: the letter after "The answer is "; flexible: see ``_chosen``."""
    strict = re.search(r"(?<=The answer is )(.*)(?=.)", answer)
    return {
        "strict": float(strict is not None and _without_signs(strict[1].strip()) == "abcd"[gold]),
        "flexible": float(_chosen(choices, answer) == f"({'ABCD'[gold]})"),
    }


def _without_signs(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", string.punctuation))


def _chosen(choices: Sequence[str], answer: str) -> str:
    """The last capital in parentheses; else the last choice whose text occurs; else the last letter after a colon."""
    letters: list[str] = re.findall(r"\([A-Z]\)", answer)
    if letters:
        return letters[-1]
    named = {_plain(choice.strip()): f"({letter})" for letter, choice in zip("ABCD", choices, strict=True)}
    # Longest first: a choice that begins another one must not hide it.
    texts = re.findall("|".join(re.escape(text) for text in sorted(named, key=len, reverse=True)), _plain(answer))
    if texts and texts[-1].strip():
        return named.get(texts[-1].strip(), "")
    letters = re.findall(r":[\s]*(A|B|C|D)", answer)
    return f"({letters[-1]})" if letters else ""


def _plain(text: str) -> str:
    """Lower case, without what Unicode calls punctuation."""
    return "".join(letter for letter in text.lower() if not unicodedata.category(letter).startswith("P"))


def _gpqa_cot(part: str) -> Callable[[Data, int], list[Item]]:
    def build(data: Data, shots: int) -> list[Item]:
        chosen, items = random.Random(1234), list[Item]()
        for row in data.rows(f"gpqa/gpqa_{part}.csv"):
            choices, gold = gpqa_question(row, chosen)
            prompt = _gpqa_prompt(row, choices, "Let's think step by step: ")
            items.append(AnswerItem(prompt=prompt, grader=_cot_grader(gold, choices), group=_domain(row)))
        return items

    return build


def _cot_grader(gold: int, choices: Sequence[str]) -> Callable[[str], Scores]:
    return lambda answer: gpqa_cot_scores(gold, choices, answer)


# CMMLU and C-Eval ----------------------------------------------------------------------------------------------------


def _chinese(
    subjects: Mapping[str, str],
    head: str,
    files: Callable[[str], tuple[str, str]],
    fields: tuple[str, str],
) -> Callable[[Data, int], list[Item]]:
    """Items of all subjects.

    Args:
        subjects: file name -> Chinese name.
        head: the line before the examples, with {} for the subject's name.
        files: subject -> (file of the questions, file of the examples).
        fields: columns of the question and of the right letter; the choices are in columns A to D.
    """

    def question(row: Row) -> Question:
        choices = "\n".join(f"{letter}. {row[letter]}" for letter in "ABCD")
        return Question(f"{row[fields[0]].strip()}\n{choices}\n答案：", tuple("ABCD"), "ABCD".index(row[fields[1]]))

    def build(data: Data, shots: int) -> list[Item]:
        items = list[Item]()
        for subject, name in subjects.items():
            asked, examples = files(subject)
            worked = [question(row).solved for row in data.rows(examples)[:shots]] if shots else []
            before = head.format(name) + "".join(f"{one}\n\n" for one in worked)
            for one in map(question, data.rows(asked)):
                pairs = tuple((before + one.prompt, f" {letter}") for letter in "ABCD")
                items.append(ChoiceItem(pairs=pairs, gold=one.gold, texts=tuple("ABCD"), group=subject))
        return items

    return build


_cmmlu = _chinese(
    CMMLU_SUBJECTS,
    "以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n",
    lambda subject: (f"cmmlu/test/{subject}.csv", f"cmmlu/dev/{subject}.csv"),
    ("Question", "Answer"),
)
_ceval = _chinese(
    CEVAL_SUBJECTS,
    "以下是中国关于{}的单项选择题，请选出其中的正确答案。\n\n",
    lambda subject: (f"ceval/val/{subject}_val.csv", f"ceval/dev/{subject}_dev.csv"),
    ("question", "answer"),
)

# OpenBookQA, SciQ, CommonsenseQA, Social IQa --------------------------------------------------------------------------


def _openbookqa(data: Data, shots: int) -> list[Item]:
    questions = []
    for row in data.rows("openbookqa/test.jsonl"):
        stem = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        questions.append(Question(stem, tuple(row["choices"]), int(row["gold"])))
    return question_items(questions, shots)


def _sciq(data: Data, shots: int) -> list[Item]:
    questions = []
    for row in data.rows("sciq/validation.jsonl"):
        choices = (row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"])
        prompt = f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"
        questions.append(Question(prompt, choices, 3))
    return question_items(questions, shots)


def _commonsense_qa(data: Data, shots: int) -> list[Item]:
    questions = []
    for row in data.rows("commonsense_qa/validation.jsonl"):
        listed = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCDE", row["choices"]["text"], strict=True))
        prompt = f"Question: {row['question'].strip()}\n{listed}\nAnswer:"
        questions.append(Question(prompt, tuple("ABCDE"), "ABCDE".index(row["answerKey"])))
    return question_items(questions, shots)


def _siqa(data: Data, shots: int) -> list[Item]:
    questions = []
    for row in data.rows("siqa/validation.jsonl"):
        choices = (row["answerA"], row["answerB"], row["answerC"])
        questions.append(Question(f"Q: {row['context']} {row['question']}\nA:", choices, int(row["label"]) - 1))
    return question_items(questions, shots)


def _gpqa_tasks(part: str) -> tuple[Task, Task]:
    order = "The order of the choices is random, ours drawn once with a fixed seed; theirs changes with the run."
    asked = f"Rein et al. 2023 as in {HARNESS}, gpqa_{part}"
    title = f"GPQA {part}"
    return (
        choice_task(
            f"gpqa_{part}",
            title,
            0,
            _gpqa(part),
            "acc",
            0.25,
            f"{asked}_zeroshot: (A) to (D) scored. {order}",
            fixed_shots=True,
        ),
        Task(
            name=f"gpqa_{part}_cot",
            version=2,
            title=f"{title}, reasoned",
            protocol=f"{asked}_cot_zeroshot, but with 1,024 tokens. {order}",
            kind="generate",
            shots=0,
            build=_gpqa_cot(part),
            main="flexible",
            chance=0.25,
            fixed_shots=True,
            max_new_tokens=1024,
            stop=("</s>",),
        ),
    )


TASKS = (
    Task(
        name="mmlu_pro",
        version=1,
        title="MMLU-Pro",
        protocol=f"Wang et al. 2024 as in {HARNESS}: the category's first five worked examples of validation, 2,048 "
        'tokens, the first letter after "answer is"; mean over questions and over categories.',
        kind="generate",
        shots=5,
        build=_mmlu_pro,
        main="acc",
        chance=0.1,
        max_new_tokens=2048,
        stop=("Question:",),
        by_group=True,
    ),
    *_gpqa_tasks("diamond"),
    *_gpqa_tasks("main"),
    choice_task(
        "cmmlu",
        "CMMLU",
        5,
        _cmmlu,
        "acc",
        0.25,
        f"Li et al. 2023 as in {HARNESS}: the first shots of dev, letters scored.",
        by_group=True,
    ),
    choice_task(
        "ceval",
        "C-Eval",
        5,
        _ceval,
        "acc",
        0.25,
        f"Huang et al. 2023 as in {HARNESS} (ceval-valid): the validation questions, the first shots of dev, "
        f"letters scored.",
        by_group=True,
    ),
    choice_task(
        "openbookqa", "OpenBookQA", 0, _openbookqa, "acc_norm", 0.25, f"{HARNESS}, openbookqa, test. {OWN_POOL}"
    ),
    choice_task(
        "sciq",
        "SciQ",
        0,
        _sciq,
        "acc",
        0.25,
        f"{HARNESS}, sciq, on the validation questions instead of test. {OWN_POOL}",
    ),
    choice_task(
        "commonsense_qa",
        "CommonsenseQA",
        0,
        _commonsense_qa,
        "acc",
        0.2,
        f"{HARNESS}, commonsense_qa, validation. {OWN_POOL}",
    ),
    choice_task("siqa", "Social IQa", 0, _siqa, "acc", 1 / 3, f"{HARNESS}, social_iqa, validation. {OWN_POOL}"),
)
