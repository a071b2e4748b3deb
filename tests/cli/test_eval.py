"""``quadriga eval`` and ``quadriga compare`` as they are typed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quadriga.cli import app
from quadriga.nn.transformer import random_parameters
from tests.checkpoint.models import TINY, write_hf
from tests.paths import data
from tests.text import vocabularies


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DBRX with a vocabulary."""
    folder = tmp_path_factory.mktemp("model")
    config = replace(TINY["dbrx"], vocab_size=400, max_seq_len=1024)
    write_hf(folder, config, parameters=random_parameters(config, std=0.3))
    (folder / "tokenizer.json").write_text(json.dumps(vocabularies.bpe()))
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    rows = [{"query": f"The fox number {i} is", "choices": ["red", "very very blue"], "gold": i % 2} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def quadriga(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_own_questions_end_in_a_table_json_and_go_on(model: Path, questions: Path, tmp_path: Path) -> None:
    command = [
        "eval",
        "--model",
        str(model),
        "--tasks",
        str(questions),
        "--out",
        str(tmp_path / "out"),
        "--threads",
        "1",
    ]
    shown = quadriga(*command, "--limit", "3")
    assert "mine\t0\t3 of 5\tacc_norm\t" in shown
    kept = (tmp_path / "out/items/mine.jsonl.jsonl").read_text()
    body = json.loads(quadriga(*command, "--json"))
    assert (tmp_path / "out/items/mine.jsonl.jsonl").read_text().startswith(kept)
    task = body["tasks"]["mine.jsonl"]
    assert (task["items"], task["items_this_run"]) == (5, 2)
    assert body["model"]["format"] == "float32"
    assert len(body["model"]["weights"]) == 16
    restarted = json.loads(quadriga(*command, "--json", "--restart"))
    assert restarted["tasks"]["mine.jsonl"]["items_this_run"] == 5
    assert restarted["tasks"]["mine.jsonl"]["figures"] == task["figures"]
    assert "benchmark\tpublished: DBRX Instruct" in quadriga("compare", str(tmp_path / "out"))
    assert "\nmine.jsonl\tacc_norm\t5\t" in quadriga("diff", str(tmp_path / "out"), str(tmp_path / "out"))
    (compared,) = json.loads(quadriga("diff", str(tmp_path / "out"), str(tmp_path / "out"), "--json"))["tasks"]
    assert (compared["flips"], compared["p"], compared["items"]) == ([], 1.0, 5)


def test_published_tasks_run_on_a_tiny_model(model: Path, tmp_path: Path) -> None:
    folder = data("bench")
    command = ["eval", "--model", str(model), "--data-dir", str(folder), "--out", str(tmp_path / "out")]
    body = json.loads(
        quadriga(*command, "--tasks", "copa,truthfulqa_mc2,humaneval", "--limit", "2", "--json", "--threads", "1")
    )
    assert set(body["tasks"]) == {"copa", "truthfulqa_mc2", "humaneval"}
    assert body["tasks"]["copa"]["data"].keys() == {"copa/validation.jsonl"}
    assert body["tasks"]["humaneval"]["figures"]["pass@1"]["value"] == 0.0


def test_without_tasks_there_is_a_list() -> None:
    shown = quadriga("eval")
    assert "hellaswag\t0\tacc_norm\t" in shown
    assert "squad" in shown


def test_compare_prints_markdown_and_json() -> None:
    assert "| MMLU | 73.7 |" in quadriga("compare", "--markdown")
    assert json.loads(quadriga("compare", "--table", "closed", "--json"))["table"] == "closed"
