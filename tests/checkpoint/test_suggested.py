"""generation_config.json: how the makers of a checkpoint would have tokens chosen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quadriga.errors import CheckpointError
from quadriga.io.detect import locate
from quadriga.io.suggested import Suggested, of_config, suggested
from tests.checkpoint.models import TINY, write_hf


def test_what_is_said_is_taken_and_the_rest_is_off() -> None:
    said = of_config({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2]})
    assert said == Suggested(temperature=0.6, top_p=0.95, top_k=20)
    assert of_config({"top_k": 5.0}) == Suggested(temperature=1.0, top_p=1.0, top_k=5)


def test_a_file_without_sampling_and_no_file_mean_the_defaults(tmp_path: Path) -> None:
    assert of_config({"eos_token_id": 0, "temperature": None}) == Suggested() == suggested(tmp_path)
    assert of_config({"repetition_penalty": 1.1}) == Suggested(repetition_penalty=1.1)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.3}))
    assert suggested(tmp_path).temperature == 0.3
    assert suggested(tmp_path / "model.gguf") == Suggested()


@pytest.mark.parametrize("raw", [{"temperature": "warm"}, {"top_p": [1]}, {"top_k": 1.5}, {"min_p": True}])
def test_what_is_no_number_is_named(raw: dict) -> None:
    with pytest.raises(CheckpointError, match=f"{next(iter(raw))} in generation_config.json must be a number"):
        of_config(raw)


def test_what_is_not_heeded_is_said(tmp_path: Path) -> None:
    """transformers 4.57.6 writes its defaults of many of these keys, which say nothing."""
    write_hf(tmp_path, TINY["llama2"])
    nothing = {
        "bad_words_ids": None, "suppress_tokens": [], "num_beams": 1, "typical_p": 1.0, "min_length": 0,
        "guidance_scale": None, "temperature": 0.6, "eos_token_id": [2, 7],
    }  # fmt: skip
    (tmp_path / "generation_config.json").write_text(json.dumps(nothing))
    assert locate(tmp_path).notes == ()
    asked = {"suppress_tokens": [5], "num_beams": 4, "forced_bos_token_id": 0, "min_new_tokens": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(nothing | asked))
    found = locate(tmp_path)
    assert found.config.eos_ids == (2, 7)
    (note,) = found.notes
    assert "asks for forced_bos_token_id, min_new_tokens, num_beams, suppress_tokens, which" in note
