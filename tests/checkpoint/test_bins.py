"""Hugging Face directories from before safetensors: refused unless asked for, then read without running anything."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quadriga.errors import CheckpointError
from quadriga.io.convert import convert
from quadriga.io.open import open_checkpoint
from quadriga.model import families
from quadriga.nn.load import load_parameters
from tests.checkpoint.models import TINY, bits, random_bits, stored


def write_bins(folder: Path, name: str, n_shards: int = 1) -> dict[str, Tensor]:
    config, parameters = TINY[name], random_bits(TINY[name])
    family = families.family_of(config)
    tensors = stored(next(iter(family.layouts.values()))(config), parameters)
    if name == "llama2-tied":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # one storage, as transformers saved it
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(family.config_to_hf(config)))
    torch.save({"optimizer": 1}, folder / "training_args.bin")
    if n_shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return parameters
    table = {}
    for shard in range(n_shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{n_shards:05d}.bin"
        mine = list(tensors)[shard::n_shards]
        torch.save({n: tensors[n] for n in mine}, folder / file)
        table.update(dict.fromkeys(mine, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return parameters


@pytest.mark.parametrize(("name", "n_shards"), [("mixtral", 1), ("mixtral", 3), ("llama2-tied", 1), ("dbrx", 2)])
def test_they_are_read_when_asked_for(tmp_path: Path, name: str, n_shards: int) -> None:
    parameters = write_bins(tmp_path / "old", name, n_shards)
    with pytest.raises(CheckpointError, match=r"is not safetensors.*quadriga convert --pickles"):
        open_checkpoint(tmp_path / "old")
    convert(tmp_path / "old", tmp_path / "new", to="hf", pickles=True)
    loaded = load_parameters(open_checkpoint(tmp_path / "new"))
    assert all(bits(loaded[n]) == bits(value) for n, value in parameters.items())


def test_safetensors_are_taken_where_there_are_some(tmp_path: Path) -> None:
    write_bins(tmp_path / "old", "mixtral")
    convert(tmp_path / "old", tmp_path / "new", to="hf", pickles=True)
    (tmp_path / "new" / "pytorch_model.bin").write_bytes(b"never opened")
    open_checkpoint(tmp_path / "new", pickles=True).close()


class Runs:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("fault", ["code", "missing", "other tensors", "twice", "another index"])
def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_bins(tmp_path / "old", "mixtral", 3)
    one, two, three = sorted((tmp_path / "old").glob("pytorch_model-*.bin"))
    index = tmp_path / "old" / "pytorch_model.bin.index.json"
    match fault:
        case "code":
            torch.save(torch.load(one) | {"x": Runs()}, one)
            says = r"it names posix\.system"
        case "missing":
            two.unlink()
            says = "pytorch_model-00002-of-00003.bin is named by"
        case "other tensors":
            torch.save(dict(list(torch.load(two).items())[1:]), two)
            says = "does not hold what pytorch_model.bin.index.json says"
        case "twice":
            index.unlink()
            torch.save(torch.load(two) | torch.load(three), two)
            says = "is in two files of"
        case "another index":
            index.write_text('{"weight_map": {"a": 1}}')
            says = "must have a 'weight_map'"
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(tmp_path / "old", pickles=True)
    assert not (tmp_path / "pwned").exists()
