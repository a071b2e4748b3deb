"""The examples run as a reader would run them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from quadriga.nn.transformer import random_parameters
from tests.checkpoint.models import TINY, write_hf
from tests.text import vocabularies

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_every_example_is_short() -> None:
    for example in EXAMPLES.glob("*.py"):
        assert len(example.read_text().splitlines()) < 60, example.name


def test_look_inside(tmp_path: Path) -> None:
    from dataclasses import replace

    config = replace(TINY["dbrx"], vocab_size=400)
    write_hf(tmp_path, config, parameters=random_parameters(config, std=0.3))
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabularies.bpe()))
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "look_inside.py"), str(tmp_path), "The fox"],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = run.stdout.splitlines()
    assert sum(row.startswith("layer ") for row in rows) == config.n_layers
    weights = [float(part.split(": ")[1]) for part in rows[1].split("  ")[-3:]]
    assert abs(sum(weights) - 1) < 0.02
