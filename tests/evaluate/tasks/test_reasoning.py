"""BIG-Bench Hard and IFEval as tasks: prompts by hand, grading, figures over instructions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quadriga.errors import EvaluationError
from quadriga.evaluate.data import Data
from quadriga.evaluate.harness import Options, run_task
from quadriga.evaluate.items import AnswerItem
from quadriga.evaluate.statistics import figures
from quadriga.evaluate.tasks import TASKS
from quadriga.evaluate.tasks.ifeval import ifeval_scores
from quadriga.evaluate.tasks.reasoning import NAMES, bbh_scores, worked_examples
from tests.evaluate.fakes import RuleModel, Unchecked, write

PROMPT = "canary\n-----\nSort words.\n\nQ: a\nA: Let's think step by step.\nSo the answer is a.\n\nQ: b\nA: b\n\nmore\n\nQ: c\nA: c\n"


def test_published_examples() -> None:
    first = "Q: a\nA: Let's think step by step.\nSo the answer is a.\n\n"
    assert worked_examples(PROMPT, 2, "x") == f"Sort words.\n\n{first}Q: b\nA: b\n\nmore\n\n"
    assert worked_examples(PROMPT, 0, "x") == "Sort words.\n\n"
    with pytest.raises(EvaluationError, match=r"bbh/cot-prompts/x.txt must have 4 examples after a line -----, got 3"):
        worked_examples(PROMPT, 4, "x")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("So the answer is (B).", 1),
        ("the answer is (B)", 0),
        ("the answer is (B). Or the answer is (C).", 0),
        ("the answer is (A).\nthe answer is (B).", 0),
        ("(B)", 0),
    ],
)
def test_bbh_grading(answer: str, right: int) -> None:
    assert bbh_scores("(B)", answer) == {"acc": float(right)}


def test_bbh_items(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / "bbh/bbh").mkdir(parents=True, exist_ok=True)
        (tmp_path / "bbh/cot-prompts").mkdir(exist_ok=True)
        (tmp_path / f"bbh/cot-prompts/{name}.txt").write_text(PROMPT)
        rows = {"canary": "c", "examples": [{"input": f"{name} {i}", "target": "x"} for i in range(2)]}
        (tmp_path / f"bbh/bbh/{name}.json").write_text(json.dumps(rows))
    found = TASKS["bbh"].items(Unchecked(tmp_path), None, 1)
    assert len(found) == 54 and len({item.group for item in found}) == 27
    item = found[1]
    assert isinstance(item, AnswerItem)
    assert item.prompt == (
        "Sort words.\n\nQ: a\nA: Let's think step by step.\nSo the answer is a.\n\n"
        "Q: boolean_expressions 1\nA: Let's think step by step.\n"
    )
    assert item.grade("the answer is x.") == {"acc": 1.0}
    (tmp_path / "bbh/bbh/navigate.json").write_text("[]")
    with pytest.raises(EvaluationError, match=r"navigate.json must be a JSON object with a list named examples"):
        TASKS["bbh"].items(Unchecked(tmp_path))


ROWS = [
    {
        "key": 1,
        "prompt": "p0",
        "instruction_id_list": ["punctuation:no_comma", "detectable_format:title", "startend:quotation"],
        "kwargs": [{}, {"num_words": None}, {}],
    },
    {"key": 2, "prompt": "p1", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
]


def test_ifeval_counts_prompts_and_instructions(tmp_path: Path) -> None:
    write(tmp_path / "ifeval/input_data.jsonl", ROWS)
    said = {"p0": '*"<<a>>"*', "p1": "well,\nfine"}
    model = RuleModel(write=lambda prompt: said[prompt])
    result = run_task(TASKS["ifeval"], model, Data(tmp_path), tmp_path / "out", Options())
    values = {name: figure.value for name, figure in result.figures.items()}
    assert values == {"prompt_strict": 0.0, "prompt_loose": 1.0, "inst_strict": 2 / 4, "inst_loose": 1.0}
    again = run_task(TASKS["ifeval"], model, Data(tmp_path), tmp_path / "out", Options())
    assert again.figures == result.figures and model.n_prompts == 2, "read from the journal"


def test_a_share_of_counts_has_a_jackknife_error() -> None:
    rows = [
        {"inst_a_count": 2.0, "inst_n": 3.0},
        {"inst_a_count": 0.0, "inst_n": 1.0},
        {"inst_a_count": 1.0, "inst_n": 1.0},
    ]
    found = figures(rows)
    assert set(found) == {"inst_a"}
    assert found["inst_a"].value == 3 / 5
    left_out = [1 / 2, 3 / 4, 2 / 4]
    middle = sum(left_out) / 3
    assert found["inst_a"].stderr == pytest.approx((2 / 3 * sum((x - middle) ** 2 for x in left_out)) ** 0.5)


def test_ifeval_strict_and_loose() -> None:
    assert ifeval_scores(ROWS[0], '"<<a>>"') == {
        "prompt_strict": 1.0,
        "prompt_loose": 1.0,
        "inst_strict_count": 3.0,
        "inst_loose_count": 3.0,
        "inst_n": 3.0,
    }


def test_a_row_with_an_unknown_instruction_is_found_at_once(tmp_path: Path) -> None:
    write(tmp_path / "ifeval/input_data.jsonl", [ROWS[1], ROWS[1] | {"instruction_id_list": ["a:b"]}])
    with pytest.raises(EvaluationError, match=r"row 2: every instruction must be one of IFEval's"):
        TASKS["ifeval"].items(Data(tmp_path))
