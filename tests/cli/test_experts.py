"""``quadriga experts label``: from a file of texts to labels beside the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from quadriga.cli import app
from quadriga.engine import load as load_module
from quadriga.errors import ConfigError
from quadriga.io import expert_labels
from tests.server.conftest import tiny_llm

TEXTS = {"letters": "the quick brown fox " * 90, "digits": "0123456789 " * 200}  # longer than the model's context


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = [json.dumps({"words": text, "lang": name}) for name, text in TEXTS.items() for _ in range(4)]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the model lies that every name means."""
    here = tmp_path / "model"
    here.mkdir()

    def load(model: Any, **_: Any) -> Any:
        llm = tiny_llm()
        llm.path = here
        return llm

    monkeypatch.setattr(load_module, "load", load)
    return here


def label(*words: str) -> Result:
    return CliRunner().invoke(app, ["experts", "label", "any", *words])


def test_labels_are_made_from_texts_longer_than_the_context_and_lie_beside_the_model(folder: Path, data: Path) -> None:
    result = label("--data", str(data), "--text-field", "words", "--domain-field", "lang", "--domain-tokens", "1000")
    assert result.exit_code == 0, result.output
    labels = expert_labels.read(folder / expert_labels.NAME, tiny_llm().config)
    assert labels is not None and labels["domains"] == [{"name": n, "tokens": 1000} for n in TEXTS]
    assert labels["n_tokens"] == 2000 and labels["data"] == str(data)
    llm = tiny_llm()
    ids = list(TEXTS["letters"].encode())[:512]  # no text is read further
    counts = [0] * 5
    for name in TEXTS:
        for n in (512, 488):
            ids = list(TEXTS[name].encode())[:n]
            for chosen in llm.routing(ids)[1].expert_ids.reshape(-1).tolist():
                counts[chosen] += 1
    shares = [expert["share"] for expert in labels["layers"][1]["experts"]]
    assert shares == pytest.approx([n / 2000 for n in counts], abs=1e-4)
    assert "15 experts from 2,000 tokens" in result.output and str(folder) in result.output.replace("\n", "")


def test_json_and_another_place(folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels.json"
    result = label(
        *("--data", str(data), "--text-field", "words", "--domain-field", "lang"), "--labels-file", str(out), "--json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["layers"] == json.loads(out.read_text())["layers"]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "a line needs a text 'text' and a domain 'domain'"),
        (["--text-field", "words"], "a domain 'domain'"),
        (["--data", "nowhere.jsonl"], "cannot read the data nowhere.jsonl"),
    ],
)
def test_data_that_cannot_be_read_is_said(folder: Path, data: Path, words: list[str], said: str) -> None:
    error = label("--data", str(data), *words).exception if "--data" not in words else label(*words).exception
    assert isinstance(error, ConfigError) and said in str(error)
