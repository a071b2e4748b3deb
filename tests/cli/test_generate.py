"""``quadriga generate`` with experts on disk says what the disk cost."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from typer.testing import CliRunner

from quadriga.cli import app
from quadriga.io.convert import convert
from tests.checkpoint.test_packed import write


def test_experts_on_disk_are_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = write(tmp_path / "hf", "mixtral")
    letters = {chr(ord("!") + i): i for i in range(97)}
    Tokenizer(models.BPE(vocab=letters, merges=[])).save(str(folder / "tokenizer.json"))
    convert(folder, tmp_path / "out", format="q8")
    arguments = ["generate", "hello", "--model", str(tmp_path / "out"), "--max-tokens", "3", "--expert-memory", "1MB"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = re.search(r"experts: ([\d.]+) GB read, (\d+)% found in memory", result.output)
    assert found is not None and int(found[2]) > 0
