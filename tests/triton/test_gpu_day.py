"""The script for the day a GPU is there: all of it runs here, interpreted, at toy sizes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_section_runs_dry(tmp_path: Path) -> None:
    out = tmp_path / "gpu.csv"
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), "--dry", str(out)]
    environment = os.environ | {"PYTHON": sys.executable}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert list(dict.fromkeys(row["section"] for row in rows)) == [
        "family", "parity", "invariance", "model", "speed", "training",
    ]  # fmt: skip
    for row in rows:
        assert row["note"] == "", row
        if row["section"] == "parity":
            assert 0 < float(row["value"]) < 1e-5
        elif row["section"] == "invariance":
            assert int(row["value"]) == 0
        elif row["section"] in ("model", "speed", "training"):
            assert row["value"] == row["gb_per_s"] == "", "a host's times say nothing of a GPU"
