"""The recipes of tuning can be read, and the arithmetic that one of them learns is what it says."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from quadriga.train.config import read_toml
from quadriga.train.tune_config import TuneConfig

FOLDER = Path(__file__).parent.parent.parent / "recipes" / "tune"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.toml")), ids=lambda file: file.stem)
def test_a_recipe_is_valid(file: Path) -> None:
    config = read_toml(file, TuneConfig)
    assert config.run == f"runs/{file.stem}" or file.stem == "qlora-experts"


def test_the_arithmetic_is_right_and_what_is_held_out_is_not_trained(tmp_path: Path) -> None:
    runpy.run_path(str(FOLDER / "arithmetic.py"))["main"](tmp_path)
    files = [
        [json.loads(line) for line in (tmp_path / f"{n}.jsonl").read_text().splitlines()] for n in ("train", "test")
    ]
    train, test = files
    assert (len(train), len(test)) == (48 * 48 + 48 * 47 // 2 - 500, 500)
    assert not {row["question"] for row in train} & {row["question"] for row in test}
    for row in (*train, *test):
        a, sign, b = row["question"].split()
        answer = int(a) + int(b) if sign == "+" else int(a) - int(b)
        assert answer > 0 and row["answer"] == str(answer)
        for text, right in (
            (f" {answer}\n5", True),
            (f"{answer}", True),
            (f" {answer}0", False),
            (f" -{answer}", False),
        ):
            assert (re.search(row["pattern"], text) is not None) is right
