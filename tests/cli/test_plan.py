"""`quadriga plan`: what it takes where nothing is said."""

from __future__ import annotations

import json

import pytest

from quadriga.cli.plan import plan_command
from quadriga.errors import ConfigError


@pytest.mark.parametrize(("model", "rows"), [("quadriga-nano", 1024), ("dbrx-9b", 4096)])
def test_rows_and_positions_are_at_most_the_models_context(
    capsys: pytest.CaptureFixture[str], model: str, rows: int
) -> None:
    plan_command(model, gpus="8xH100", tokens="1B", json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["context"], found["training"]["seq_len"]) == (rows, rows)


def test_rows_beyond_the_context_are_refused() -> None:
    with pytest.raises(ConfigError, match="seq_len must be from 1 to this model's 1024, got 1025"):
        plan_command("quadriga-nano", gpus="8xH100", seq_len=1025)
