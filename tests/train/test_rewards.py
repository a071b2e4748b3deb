"""Rewards, each on answers that earn it and answers that do not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from quadriga.errors import ConfigError, TrainingError
from quadriga.text.tokenizer import load_directory
from quadriga.train.rewards import Attempt, Reward, number_reward, reward_of
from quadriga.train.services import Services
from quadriga.train.tune_config import RewardSection
from tests.text.vocabularies import write_bpe


def attempt(answer: str, *, wanted: str = "", finished: bool = True, **row: object) -> Attempt:
    return Attempt("What?", answer, wanted, row, finished)


def reward(*sections: RewardSection, services: Services | None = None, folder: Path | None = None) -> Reward:
    tokenizer = None
    if folder is not None:
        write_bpe(folder, eos_token="<|im_end|>")
        tokenizer = load_directory(folder)
    return reward_of(sections, services or Services(), tokenizer, 448, {2})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "answer", "worth"),
    [
        ("so 3 * 24 = 72.", "... #### 72", 1.0),
        ("it is 1,234 in all", "#### 1234", 1.0),
        ("The answer is -5", "#### 5", 0.0),
        ("72 at first, then 73", "#### 72", 0.0),
        ("no idea", "#### 72", 0.0),
        ("3.50 dollars", "#### 3.5", 1.0),
    ],
)
def test_the_last_number_is_compared(text: str, answer: str, worth: float) -> None:
    assert number_reward(text, answer) == worth
    assert reward(RewardSection(kind="number"))([attempt(text, wanted=answer)]) == [worth]


def test_rewards_add_up_by_their_weights() -> None:
    made = reward(
        RewardSection(kind="text", weight=2.0),
        RewardSection(kind="finished", weight=0.5),
        RewardSection(kind="regex", pattern=r"^b\w+$", weight=-1.0),
    )
    found = made([attempt(" blue\n", wanted="blue"), attempt("blue", wanted="blue", finished=False), attempt("a")])
    assert found == [2.5, 1.0, 0.5], "the first begins with a space, so its pattern is not there"


def test_a_pattern_may_be_the_rows() -> None:
    made = reward(RewardSection(kind="regex", column="form"))
    assert made([attempt("12-3", form=r"\d+-\d"), attempt("12-3", form="^x")]) == [1.0, 0.0]
    with pytest.raises(TrainingError, match="reads the column 'form', which must be text in every row"):
        made([attempt("12-3", other="x")])


def test_json_must_follow_the_schema(tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    made = reward(RewardSection(kind="json", schema=str(tmp_path / "schema.json")), folder=tmp_path)
    good = '{"name": "Ada", "age": 36}'
    answers = (
        good,
        good + "\n",
        '{"name": "Ada"}',
        '{"name": "Ada", "age": "36"}',
        "Ada is 36",
        good[:-1],
        good + " x",
    )
    assert made([attempt(one) for one in answers]) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert made([attempt(good, finished=False)]) == [0.0]
    of_row = reward(RewardSection(kind="json", column="schema"), folder=tmp_path)
    assert of_row([attempt("[1, 2]", schema='{"type": "array"}'), attempt("3", schema='{"type": "array"}')]) == [1, 0]


def test_programs_run_with_the_rows_tests() -> None:
    ran: list[tuple[list[str], float]] = []

    def run(programs: Sequence[str], wall_s: float) -> list[bool]:
        ran.append((list(programs), wall_s))
        return ["return 4" in one for one in programs]

    made = reward(RewardSection(kind="code", timeout_s=3.0), services=Services(run_programs=run))
    fenced = "Here:\n```python\ndef f():\n    return 4\n```\nDone."
    assert made([attempt(fenced, test="assert f() == 4"), attempt("def f(): return 5", test="assert f()")]) == [1, 0]
    assert ran == [(["def f():\n    return 4\nassert f() == 4\n", "def f(): return 5\nassert f()\n"], 3.0)]
    with pytest.raises(ConfigError, match="needs a sandbox"):
        reward(RewardSection(kind="code"))


def test_a_judges_mark_is_of_ten() -> None:
    asked: list[str] = []

    def judge(url: str, model: str) -> object:
        assert (url, model) == ("http://judge/v1", "wise")
        verdicts = iter(["7", "I give it a 15", "none"])

        def ask(texts: Sequence[str]) -> list[str]:
            asked.extend(texts)
            return [next(verdicts) for _ in texts]

        return ask

    section = RewardSection(kind="judge", url="http://judge/v1", model="wise", prompt="{question}|{answer}|{wanted}")
    made = reward(section, services=Services(judge=judge))  # type: ignore[arg-type]
    assert made([attempt(a, wanted="w") for a in ("{wanted}?", "b", "c")]) == [0.7, 1.0, 0.0]
    assert asked[1] == "What?|b|w"


def lengths(attempts: Sequence[Attempt]) -> list[float]:
    return [len(one.answer) for one in attempts][:2]


def test_a_function_of_ones_own() -> None:
    made = reward(RewardSection(kind="python", function="tests.train.test_rewards:lengths", weight=2.0))
    assert made([attempt("abc"), attempt("")]) == [6.0, 0.0]
    with pytest.raises(TrainingError, match="must give a number for each of 3 answers, gave 2"):
        made([attempt("abc")] * 3)
    with pytest.raises(ConfigError, match="'nowhere:f' cannot be imported"):
        reward(RewardSection(kind="python", function="nowhere:f"))


def raises(attempts: Sequence[Attempt]) -> list[float]:
    return [1.0 / len(one.answer) for one in attempts]


def words(attempts: Sequence[Attempt]) -> list[str]:
    return [one.answer for one in attempts]


def infinite(attempts: Sequence[Attempt]) -> list[float | None]:
    return [float("inf") if one.answer else None for one in attempts]


def one_number(attempts: Sequence[Attempt]) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "raised ZeroDivisionError: float division by zero"),
        ("words", "must give finite numbers, gave 'abc'"),
        ("infinite", "must give finite numbers, gave inf"),
        ("one_number", "raised TypeError: 'float' object is not iterable"),
    ],
)
def test_what_a_function_does_wrong_is_said(function: str, message: str) -> None:
    made = reward(RewardSection(kind="python", function=f"tests.train.test_rewards:{function}"))
    with pytest.raises(TrainingError, match=message):
        made([attempt("abc"), attempt("")])


def test_a_function_that_is_none_and_a_module_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="must be a function, got"):
        reward(RewardSection(kind="python", function="math:pi"))
    (tmp_path / "broken_rewards.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="'broken_rewards:f' cannot be imported: no licence"):
        reward(RewardSection(kind="python", function="broken_rewards:f"))


def test_a_pattern_of_a_row_that_cannot_be_read_is_named() -> None:
    with pytest.raises(ConfigError, match=r"the pattern '\(' of a regex reward cannot be read: missing \)"):
        reward(RewardSection(kind="regex", column="form"))([attempt("a", form="(")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "number", "pattern": "x"}, "'number' has no use for pattern"),
        ({"kind": "regex"}, "'regex' needs pattern or column"),
        ({"kind": "json", "schema": "a", "column": "b"}, "'json' needs schema or column"),
        ({"kind": "judge", "url": "http://x"}, "'judge' needs model"),
        ({"kind": "text", "timeout_s": 3.0}, "'text' has no use for timeout_s"),
    ],
)
def test_keys_that_a_kind_has_no_use_for_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardSection(**options)  # type: ignore[arg-type]
