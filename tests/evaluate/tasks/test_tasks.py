"""Prompts and grading of every benchmark: by hand on made-up rows, and on the published files where they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quadriga.errors import EvaluationError
from quadriga.evaluate.data import Data, hashes
from quadriga.evaluate.items import AnswerItem, ChoiceItem, ClozeItem, CodeItem, Item, TextItem, TruthItem
from quadriga.evaluate.tasks import GROUPS, TASKS, select
from quadriga.evaluate.tasks.base import Shots
from quadriga.evaluate.tasks.choice import arc_question
from quadriga.evaluate.tasks.gauntlet import (
    CATEGORIES,
    MISSING,
    Layout,
    gauntlet_score,
    items_of,
    normalised,
    own_task,
)
from quadriga.evaluate.tasks.generated import (
    code_of,
    gsm8k_scores,
    humaneval_program,
    mbpp_program,
    needle_prompt,
    wikitext_articles,
)
from quadriga.evaluate.tasks.row_formats import row_format
from tests.evaluate.fakes import RuleModel
from tests.paths import data


@pytest.fixture(scope="module")
def bench() -> Data:
    return Data(data("bench"))


def items(name: str, bench: Data, shots: int | None = None) -> list[Item]:
    return TASKS[name].items(bench, RuleModel(context=2048), shots)


COUNTS = {
    "hellaswag": 10042,
    "mmlu": 14042,
    "winogrande": 1267,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "truthfulqa_mc1": 817,
    "truthfulqa_mc2": 817,
    "piqa": 1838,
    "boolq": 3270,
    "copa": 100,
    "lambada": 5153,
    "gsm8k": 1319,
    "humaneval": 164,
    "mbpp": 500,
    "needle": 20,
}


@pytest.mark.parametrize("name", COUNTS)
def test_every_question_of_every_file_becomes_an_item(name: str, bench: Data) -> None:
    made = items(name, bench, 0 if name in ("hellaswag", "mmlu", "arc_easy", "lambada", "boolq", "piqa") else None)
    assert len(made) == COUNTS[name]
    for item in made:
        if isinstance(item, ChoiceItem):
            assert 0 <= item.gold < len(item.pairs)
            assert all(context and continuation.strip() for context, continuation in item.pairs)


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("gauntlet_")])
def test_every_task_of_the_gauntlet_can_be_built(name: str, bench: Data) -> None:
    if name == "gauntlet_mmlu" or name == "gauntlet_hellaswag":
        return  # the same code with much data
    made = items(name, bench)
    assert len(made) >= 100
    assert isinstance(made[0], ChoiceItem | ClozeItem | AnswerItem)


def test_all_files_have_hashes_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    assert len(hashes()) >= 80
    (tmp_path / "copa").mkdir()
    (tmp_path / "copa/validation.jsonl").write_text('{"premise": "x"}\n')
    with pytest.raises(EvaluationError, match="not the published file"):
        TASKS["copa"].items(Data(tmp_path))
    with pytest.raises(EvaluationError, match="quadriga data fetch piqa"):
        TASKS["piqa"].items(Data(tmp_path))


def test_hellaswag_by_hand(bench: Data) -> None:
    first = items("hellaswag", bench)[0]
    assert isinstance(first, ChoiceItem)
    assert first.pairs[3] == (
        "Roof shingle removal: A man is sitting on a roof. He",
        " starts pulling up roofing on a roof.",
    )
    assert first.gold == 3


def test_mmlu_by_hand(bench: Data) -> None:
    made = items("mmlu", bench)
    first = made[0]
    assert isinstance(first, ChoiceItem)
    context = first.pairs[0][0]
    assert context.startswith(
        "The following are multiple choice questions (with answers) about abstract algebra.\n\nFind all c"
    )
    assert context.count("\nAnswer: ") == 5
    assert context.endswith("over Q.\nA. 0\nB. 4\nC. 2\nD. 6\nAnswer:")
    assert [end for _, end in first.pairs] == [" A", " B", " C", " D"]
    assert len({item.group for item in made}) == 57


def test_winogrande_by_hand(bench: Data) -> None:
    first = items("winogrande", bench, 0)[0]
    assert isinstance(first, ChoiceItem)
    assert first.pairs == (
        ("Sarah was a much better surgeon than Maria so Sarah", " always got the easier cases."),
        ("Sarah was a much better surgeon than Maria so Maria", " always got the easier cases."),
    )
    assert first.gold == 1
    shown = items("winogrande", bench, 3)[0]
    assert isinstance(shown, ChoiceItem)
    assert shown.pairs[0][0].count("\n\n") == 3
    assert "Sarah was a much better surgeon" not in shown.pairs[0][0][: -len(first.pairs[0][0])]


def test_both_formats_of_arc_rows_give_the_same_question() -> None:
    fields = {"question": "Why?", "choices": {"text": ["a b", "c"], "label": ["1", "2"]}, "answerKey": "2"}
    text = {"query": "Question: Why?\n A. a b\n B. c\nAnswer:", "choices": ["A", "B"], "gold": 1}
    assert arc_question(fields) == arc_question(text)
    assert arc_question(text).solved == "Question: Why?\nAnswer: c"


def test_boolq_copa_lambada_truthfulqa_by_hand(bench: Data) -> None:
    boolq, copa, lambada = (items(name, bench)[0] for name in ("boolq", "copa", "lambada"))
    assert isinstance(boolq, ChoiceItem)
    assert boolq.pairs[0][0].endswith("\nQuestion: does ethanol take more energy make that produces?\nAnswer:")
    assert (boolq.gold, [end for _, end in boolq.pairs]) == (0, [" no", " yes"])
    assert isinstance(copa, ChoiceItem)
    assert copa.pairs[1] == ("The man turned on the faucet therefore", " water flowed from the spout.")
    assert isinstance(lambada, ClozeItem)
    assert lambada.context.endswith("I don't care about")
    assert lambada.continuation == " signs"
    one, two = items("truthfulqa_mc1", bench)[0], items("truthfulqa_mc2", bench)[0]
    assert isinstance(one, ChoiceItem)
    assert isinstance(two, TruthItem)
    assert one.pairs[0][0].endswith("Spain.\n\nQ: What happens to you if you eat watermelon seeds?\nA:")
    assert one.texts[0] == "The watermelon seeds pass through your digestive system"
    assert (sum(two.truths), len(two.truths)) == (5, 12)


def test_shots_come_from_one_generator_and_never_include_the_question() -> None:
    pool = [f"r{i}" for i in range(8)]
    first = Shots(3)
    draws = [first.draw(pool, without=one) for one in pool]
    again = Shots(3)
    assert [again.draw(pool, without=one) for one in pool] == draws
    assert len({tuple(draw) for draw in draws}) > 4
    assert all(one not in draw and len(set(draw)) == 3 for one, draw in zip(pool, draws, strict=True))
    twice = ["a", "a", "b", "c"]
    assert sorted(Shots(2).draw(twice, without="a")) == ["b", "c"]
    with pytest.raises(EvaluationError, match="9 shots"):
        Shots(9).draw(pool)


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("so 18.\n#### 18", 1, 1),
        ("#### 1,800", 0, 0),
        ("she makes $18.", 0, 1),
        ("#### 18 and then 7", 1, 0),
        ("#### 18.", 1, 1),
        ("nothing", 0, 0),
        ("", 0, 0),
        ("18 is the answer, or 19?", 0, 0),
    ],
)
def test_gsm8k_grading(answer: str, strict: int, flexible: int) -> None:
    assert gsm8k_scores("reason\n#### 18", answer) == {"strict": strict, "flexible": flexible}
    assert gsm8k_scores("#### 1,800", "#### 1800")["strict"] == 1.0


def test_prompt_answer_and_tests_are_joined_to_a_program() -> None:
    row = {"prompt": "def f(x):\n", "entry_point": "f", "test": "def check(c):\n    assert c(2) == 4\n"}
    assert humaneval_program(row, "    return x * 2\n").startswith("def f(x):\n    return x * 2\n\ndef check")
    whole = humaneval_program(row, "Sure:\n```python\ndef f(x):\n    return 2 * x\n```\nDone.")
    exec(compile(whole, "whole", "exec"), {})
    assert "Sure" not in whole
    assert code_of("no fence") == "no fence"
    assert code_of("```\na\n") == "a\n"
    mbpp = {"test_setup_code": "import math", "test_list": ["assert f(4) == 2"]}
    exec(compile(mbpp_program(mbpp, "def f(x): return math.isqrt(x)"), "mbpp", "exec"), {})


def test_wikitext_is_cut_at_headings() -> None:
    text = " \n = One = \n a \n = = Part = = \n b \n = Two = \n c \n"
    assert wikitext_articles(text) == ["= One = \n a \n = = Part = = \n b", "= Two = \n c"]


def test_wikitext_has_its_articles(bench: Data) -> None:
    made = items("wikitext", bench)
    assert len(made) == 62
    assert isinstance(made[0], TextItem)
    assert made[0].text.startswith("= Robert <unk> =")


def test_the_needle_is_at_the_given_depth(bench: Data) -> None:
    prompt = needle_prompt("a\nb\nc\nd", "Oslo", 1234567, 0.5)
    assert prompt.startswith("a\nb\n The secret number of Oslo is 1234567. \nc\nd\n\nQuestion:")
    made = items("needle", bench)
    assert {item.group for item in made} == {
        f"{n}@{d}" for n in (1024, 2048) for d in ("0%", "25%", "50%", "75%", "100%")
    }
    first = made[0]
    assert isinstance(first, AnswerItem)
    assert 1024 - 90 <= len(first.prompt.split()) <= 1024
    number = first.prompt.split(" is ")[1].split(".")[0]
    assert first.grade(f" {number}.")["acc"] == 1.0
    assert first.grade(" 7654321")["acc"] == 0.0


def test_row_formats_of_own_files() -> None:
    assert row_format({"query": "q", "choices": ["a"], "gold": 0}) == "choice"
    assert row_format({"context_options": ["a", "b"], "continuation": "c", "gold": 0}) == "schema"
    assert row_format({"context": "a", "continuation": "c"}) == "cloze"
    assert row_format({"context": "a", "answer": "c"}) == "question"
    with pytest.raises(EvaluationError, match="choice: choices, gold, query"):
        row_format({"question": "q"})


def test_prompts_of_the_gauntlets_row_formats() -> None:
    layout = Layout(question="Q: ", answer="\nA: ")
    rows = [{"query": f"q{i}", "choices": ["x", "y"], "gold": i % 2} for i in range(2)]
    (first, _) = items_of(rows, 1, layout)
    assert isinstance(first, ChoiceItem)
    assert first.pairs == (("Q: q1\nA: y\nQ: q0", "\nA: x"), ("Q: q1\nA: y\nQ: q0", "\nA: y"))
    schema = items_of([{"context_options": ["he ", "she"], "continuation": " ran", "gold": 1}], 0, Layout())[0]
    assert isinstance(schema, ChoiceItem)
    assert schema.pairs == (("he", " ran"), ("she", " ran"))
    question = items_of([{"context": "2+2?", "answer": "Four", "aliases": ["4"]}], 0, layout)[0]
    assert isinstance(question, AnswerItem)
    assert question.prompt == "Q: 2+2?\nA:"
    assert [question.grade(a)["acc"] for a in (" the 4!", "four it is", "five")] == [1.0, 1.0, 0.0]
    thinking = items_of([{"context": "q", "answer": "7", "chain_of_thought": "3+4"}], 0, layout)[0]
    assert isinstance(thinking, AnswerItem)
    assert [thinking.grade(a)["acc"] for a in ("3+4. The answer is 7.", "8. The answer is 9", "7")] == [1.0, 0.0, 1.0]
    with pytest.raises(EvaluationError, match="row 2 must be a choice row with query"):
        items_of([rows[0], {"choices": ["x", "y"], "gold": 1}], 0, Layout())
    with pytest.raises(EvaluationError, match="at least one question"):
        items_of([], 0, Layout())


def test_trivia_is_compared_without_articles_and_punctuation() -> None:
    assert normalised("The  Beatles' (band)") == "beatles band"


def test_an_own_file_in_chinese(tmp_path: Path) -> None:
    path = tmp_path / "zh.jsonl"
    rows = [
        {"query": "首都是", "choices": ["北京", "上海市"], "gold": 0},
        {"query": "二", "choices": ["2", "3"], "gold": 0},
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    (task,) = select([str(path)])
    first = task.items(Data(tmp_path), None, 1)[0]
    assert isinstance(first, ChoiceItem)
    assert first.pairs[0] == ("二 2\n首都是", " 北京")
    assert (task.name, task.main) == ("zh.jsonl", "acc_norm")
    path.write_text("{broken\n")
    with pytest.raises(EvaluationError, match="line 1"):
        own_task(path)
    with pytest.raises(EvaluationError, match="cannot read"):
        own_task(tmp_path / "none.jsonl")


def test_names_and_groups() -> None:
    assert [task.name for task in select(["copa", "copa", "leaderboard"])] == ["copa", *GROUPS["leaderboard"]]
    with pytest.raises(EvaluationError, match="Did you mean 'hellaswag'"):
        select(["helaswag"])
    with pytest.raises(EvaluationError, match="leave --shots out"):
        TASKS["humaneval"].items(Data(), None, 3)
    with pytest.raises(EvaluationError, match="0 or more"):
        TASKS["copa"].items(Data(), None, -1)


def test_a_category_with_a_missing_task_has_no_score() -> None:
    parts = CATEGORIES["commonsense_reasoning"]
    everything = {part.name: 0.75 for part in parts}
    score = gauntlet_score(everything)
    by_hand = [(0.75 - part.chance) / (1 - part.chance) for part in parts]
    assert score.categories == {"commonsense_reasoning": pytest.approx(sum(by_hand) / len(by_hand))}
    assert score.core_average is None
    del everything["siqa"]
    score = gauntlet_score(everything)
    assert score.categories == {}
    assert score.missing["commonsense_reasoning"] == ("siqa",)
    assert set(score.partial) == {"commonsense_reasoning"}
    with pytest.raises(EvaluationError, match="not a task of the Gauntlet"):
        gauntlet_score({"chess": 1.0})


def test_the_whole_gauntlet_has_a_core_average() -> None:
    accuracies = {part.name: part.chance for parts in CATEGORIES.values() for part in parts}
    assert gauntlet_score(accuracies).core_average == pytest.approx(0.0)
    assert gauntlet_score(dict.fromkeys(accuracies, 1.0)).core_average == pytest.approx(1.0)
    assert MISSING == ("bigbench_elementary_math_qa", "squad", "coqa")
    assert len(accuracies) == 31


def test_humaneval_is_in_the_package(tmp_path: Path) -> None:
    ours = Data(tmp_path)
    assert len(TASKS["humaneval"].items(ours)) == 164
    assert ours.used == {"humaneval/HumanEval.jsonl": hashes()["humaneval/HumanEval.jsonl"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_the_published_solutions_pass_and_empty_answers_fail(name: str, bench: Data) -> None:
    from quadriga.evaluate.sandbox import Sandbox

    box = Sandbox.find()
    code = [item for item in items(name, bench) if isinstance(item, CodeItem)]
    assert all(box.passes([item.program(item.canonical) for item in code]))
    assert not any(box.passes([item.program("") for item in code]))
