"""The published tables, and columns of measured results beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quadriga.errors import EvaluationError
from quadriga.evaluate import compare
from quadriga.evaluate.published import TABLES
from quadriga.evaluate.tasks import TASKS


def results(tmp_path: Path, **tasks: dict[str, Any]) -> Path:
    (tmp_path / "results.json").write_text(json.dumps({"model": {"name": "mine"}, "tasks": tasks}))
    return tmp_path


def task(main: str, value: float, stderr: float | None, items: int = 5, whole: int = 9) -> dict[str, Any]:
    figures = {main: {"value": value, "stderr": stderr}}
    return {"title": "T", "shots": 3, "main": main, "figures": figures, "items": items, "items_whole": whole}


def test_the_leaderboards_mean_is_the_mean_of_its_six() -> None:
    table = TABLES["open"]
    six = [
        b
        for b in table.benchmarks
        if b.name in ("ARC-challenge", "HellaSwag", "MMLU", "TruthfulQA", "WinoGrande", "GSM8K")
    ]
    mean = next(b for b in table.benchmarks if "mean of six" in b.name)
    assert len(six) == 6
    for column, published in mean.values.items():
        assert sum(b.values[column] for b in six) / 6 == pytest.approx(published, abs=0.09), column


def test_every_number_has_a_column_a_source_and_a_protocol() -> None:
    for table in TABLES.values():
        assert "Databricks" in table.source
        for benchmark in table.benchmarks:
            assert benchmark.protocol
            assert set(benchmark.values) <= set(table.columns)
            assert set(benchmark.notes) <= set(table.columns)
            assert all(0 < value <= 100 for value in benchmark.values.values())
            assert set(benchmark.tasks) <= {*TASKS, "gauntlet"}


def test_dbrx_leads_where_the_launch_says_so() -> None:
    rows = {b.name: b.values for b in TABLES["open"].benchmarks}
    for name in ("MMLU", "HumanEval", "GSM8K"):
        assert max(rows[name], key=lambda column: rows[name][column]) == "DBRX Instruct"


def test_measured_and_published_never_share_a_column(tmp_path: Path) -> None:
    folder = results(tmp_path, mmlu=task("acc", 0.25, 0.01), hellaswag=task("acc_norm", 0.5, None, 9, 9))
    head, *body = compare.rows(compare.compare("open", [folder]))
    assert head[-1] == "measured: mine"
    assert all(cell.startswith("published: ") for cell in head[1:-1])
    cells = {row[0]: row for row in body}
    assert cells["MMLU"][1] == "73.7"
    assert cells["MMLU"][-1] == "25.0 ± 1.0"
    assert cells["HellaSwag"][-1] == "50.0"
    assert cells["HumanEval"][-1] == ""
    assert cells["HumanEval"][3] == "40.2*"
    notes = "\n".join(compare.notes(compare.compare("open", [folder])))
    assert "measured, mine: T, 3 shots, acc, 5 of 9 items" in notes
    assert "measured, mine: T, 3 shots, acc_norm\n" in notes
    assert "Mixtral Base: from the Mixtral paper" in notes


def test_markdown_json_and_picture(tmp_path: Path) -> None:
    comparison = compare.compare("open", [results(tmp_path, mmlu=task("acc", 0.25, 0.01))])
    assert "| MMLU | 73.7 |" in compare.as_markdown(comparison)
    mmlu = next(b for b in compare.as_json(comparison)["benchmarks"] if b["name"] == "MMLU")
    assert mmlu["measured"]["mine"]["value"] == 25.0
    assert mmlu["published"]["DBRX Instruct"] == 73.7
    pytest.importorskip("matplotlib")
    compare.picture(tmp_path / "table.svg", comparison)
    assert (tmp_path / "table.svg").stat().st_size > 5000


def test_perplexities_are_not_read_as_accuracies(tmp_path: Path) -> None:
    assert compare.read(results(tmp_path, wikitext=task("word_perplexity", 30.0, 1.0))).cells == {}


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="open, closed, long, rag"):
        compare.compare("secret", [])
    with pytest.raises(EvaluationError, match="cannot read"):
        compare.read(tmp_path / "none")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(EvaluationError, match=r"must be a results\.json"):
        compare.read(tmp_path)
